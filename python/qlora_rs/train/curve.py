"""The loss curve as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_rs.checkpoint.folder import replacing
from qlora_rs.errors import require_extra

CURVE_FILE = "loss.png"


def require_matplotlib() -> None:
    """Raise UnsupportedError if no curve can be drawn; to be asked before the work, not after it."""
    require_extra("matplotlib.figure", "train", "drawing the loss curve")


def draw_curve(entries: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the loss of every step, its running mean, and the held-out loss.

    Args:
        entries: lines of the log.
        path: PNG file; replaced when the new one is whole.
        title: what was trained.
    """
    figure_module = require_extra("matplotlib.figure", "train", "drawing the loss curve")
    backend = require_extra("matplotlib.backends.backend_agg", "train", "drawing the loss curve")
    steps = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    held_out = [(entry["step"], entry["eval_loss"]) for entry in entries if "eval_loss" in entry]
    # Not through pyplot: it keeps figures and a backend for the whole process.
    figure = figure_module.Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    backend.FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if steps:
        numbers, losses = zip(*steps, strict=True)
        window = max(1, len(losses) // 20)
        marker = "." if len(losses) < 100 else ""
        many = window > 1
        axes.plot(
            numbers,
            losses,
            color="tab:blue",
            alpha=0.35 if many else 1,
            lw=1,
            marker=marker,
            label="each step",
        )
        if many:
            label = f"mean of {window} steps"
            axes.plot(numbers, _running_mean(losses, window), color="tab:blue", lw=2, label=label)
    if held_out:
        numbers, losses = zip(*held_out, strict=True)
        axes.plot(numbers, losses, color="tab:red", lw=1.5, marker="o", ms=5, label="held out")
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per counted token)")
    axes.set_title(title, fontsize=10)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if steps or held_out:
        axes.legend()
    with replacing(path) as (partial,):
        figure.savefig(partial, format="png")


def _running_mean(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and those before it, ``window`` at most."""
    means = []
    total = 0.0
    for index, value in enumerate(values):
        total += value
        if index >= window:
            total -= values[index - window]
        means.append(total / min(index + 1, window))
    return means
