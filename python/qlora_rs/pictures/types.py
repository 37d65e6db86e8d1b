"""What data types cost a model, as a picture: perplexity against bits, and the nats that each loses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from qlora_rs.eval.types import TypeComparison, TypeResult
from qlora_rs.pictures.canvas import COLORS, MUTED, label, new_figure, plain_axes, save_png

EXTRA, PURPOSE = "report", "drawing a comparison of data types"
# From one line of labels to the next.
_LINE_POINTS = 11


def draw_types(comparison: TypeComparison, path: Path) -> None:
    """Draw a comparison as a PNG; an earlier file is replaced when the new one is whole.

    Raises:
        UnsupportedError: matplotlib is not installed.
        OSError: the system failed, with the file's name.
    """
    figure = new_figure(11, 4.6, EXTRA, PURPOSE)
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": (1.25, 1)})
    base, *packed = comparison.results
    colors = {row.name: COLORS[index % len(COLORS)] for index, row in enumerate(packed)}
    _draw_points(left, base, packed, colors)
    _draw_losses(right, base, packed, colors)
    name = label(Path(comparison.model).resolve().name)
    figure.suptitle(
        f"{name}: {comparison.tokens:,} tokens in windows of {comparison.window}, arithmetic in {comparison.dtype}",
        fontsize=11,
    )
    save_png(figure, path)


def _draw_points(axes: Any, base: TypeResult, packed: list[TypeResult], colors: dict[str, str]) -> None:
    plain_axes(axes, "Perplexity against size (lower left is better)", "bits per parameter, whole model", "perplexity")
    axes.axhline(base.perplexity, color=MUTED, lw=1, ls="--")
    axes.plot(base.bits_per_parameter, base.perplexity, "s", color=MUTED, ms=8)
    for row in packed:
        axes.plot(row.bits_per_parameter, row.perplexity, "o", color=colors[row.name], ms=8)
    sizes = [row.bits_per_parameter for row in (base, *packed)]
    margin = 0.16 * (max(sizes) - min(sizes))
    axes.set_xlim(min(sizes) - margin, max(sizes) + margin)
    axes.margins(y=0.15)
    axes.set_ylim(axes.get_ylim())
    labelled: dict[str, list[TypeResult]] = {"right": [base], "left": []}
    for row in packed:
        # Of two at one height, as a type is with and without double quantization, the smaller is labelled to the left.
        twin = any(
            other.bits_per_parameter > row.bits_per_parameter
            and abs(other.perplexity - row.perplexity) < 0.06 * (max(r.perplexity for r in packed) - base.perplexity)
            and other.bits_per_parameter < 1.5 * row.bits_per_parameter
            for other in packed
        )
        labelled["left" if twin else "right"].append(row)
    for side, rows in labelled.items():
        _label(axes, rows, side, apart=margin)


def _label(axes: Any, rows: list[TypeResult], side: str, apart: float) -> None:
    """Names beside the points, those of points closer than ``apart`` bits above each other where they would meet."""
    across, align = (8, "left") if side == "right" else (-8, "right")
    to_points = 72 / axes.figure.dpi
    placed: list[tuple[float, float]] = []
    for row in sorted(rows, key=lambda row: row.perplexity):
        point = row.bits_per_parameter, row.perplexity
        height = axes.transData.transform(point)[1] * to_points
        below = [at for bits, at in placed if abs(bits - point[0]) < apart]
        at = max([height + 5, *(each + _LINE_POINTS for each in below)])
        placed.append((point[0], at))
        axes.annotate(
            row.name,
            point,
            xytext=(across, at - height),
            textcoords="offset points",
            ha=align,
            va="center",
            fontsize=9,
        )


def _draw_losses(axes: Any, base: TypeResult, packed: list[TypeResult], colors: dict[str, str]) -> None:
    plain_axes(axes, f"Nats per token lost against {base.name}", "nats per token")
    rows = sorted(packed, key=lambda row: row.nats_over_stored, reverse=True)
    labels = [f"{row.name}\n{row.bits_per_weight:.3f} bits/weight" for row in rows]
    losses = [row.nats_over_stored for row in rows]
    bars = axes.barh(labels, losses, color=[colors[row.name] for row in rows], height=0.62)
    for bar, loss in zip(bars, losses, strict=True):
        # To the right of zero even where nothing was lost: the names are on the other side.
        at = (max(loss, 0.0), bar.get_y() + bar.get_height() / 2)
        axes.annotate(f"{loss:+.4f}", at, xytext=(4, 0), textcoords="offset points", va="center", fontsize=9)
    axes.axvline(0, color=MUTED, lw=1)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.25)
