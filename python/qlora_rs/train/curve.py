"""The loss curve as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qlora_rs.pictures.canvas import new_figure, save_png

CURVE_FILE = "loss.png"
EXTRA, PURPOSE = "train", "drawing the loss curve"


def draw_curve(entries: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """Draw the loss of every step, its running mean, and the held-out loss.

    Args:
        entries: lines of the log.
        path: PNG file; replaced when the new one is whole.
        title: what was trained.
    """
    figure = new_figure(8, 4.5, EXTRA, PURPOSE)
    axes = figure.add_subplot()
    steps = [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry]
    held_out = [(entry["step"], entry["eval_loss"]) for entry in entries if "eval_loss" in entry]
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
    save_png(figure, path)


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
