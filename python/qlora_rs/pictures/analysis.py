"""What quantizing did to a model, as pictures: errors by layer, use of codes, outlier blocks, bits by part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_rs.checkpoint.figures import OUTLIER_RATIO, Analysis, WeightError, WeightFigures, part_of
from qlora_rs.pictures.canvas import COLORS, MUTED, label, new_figure, plain_axes, save_png

EXTRA, PURPOSE = "report", "drawing a report"
NO_SOURCE = "No 16-bit source was given, so errors are not known: give it with --source."

Draw = Callable[[Any, Analysis], None]


def draw_analysis(analysis: Analysis, path: Path) -> None:
    """Draw everything as one PNG; an earlier file is replaced when the new one is whole.

    Raises:
        UnsupportedError: matplotlib is not installed.
        OSError: the system failed, with the file's name.
    """
    rows = sections(analysis)
    figure = new_figure(16, 1.0 + 4.2 * len(rows), EXTRA, PURPOSE)
    for part, row in zip(figure.subfigures(len(rows), 1, squeeze=False)[:, 0], rows, strict=True):
        _draw_row(part, analysis, row)
    title = f"{label(Path(analysis.path).resolve().name)}: {analysis.spec.describe()}"
    note = NO_SOURCE if analysis.source is None else f"errors against {label(Path(analysis.source).resolve().name)}"
    figure.suptitle(f"{title}\n{note}", fontsize=12)
    save_png(figure, path)


@dataclass(frozen=True)
class Section:
    """Pictures that stand beside each other.

    Attributes:
        title: what they show.
        draws: what draws each.
        legend: whether the first one's legend is that of all.
    """

    title: str
    draws: Sequence[Draw]
    legend: bool = False


def sections(analysis: Analysis) -> list[Section]:
    """As far as there are figures for them."""
    if analysis.source is None:
        return [Section("Codes, outliers and bits", (_codes, _outliers, _bits))]
    return [
        Section("Errors by layer", (_relative, _absolute, _steps), legend=True),
        Section("Errors and codes of single weights", (_distribution, _codes)),
        Section("Outliers and bits", (_outliers, _bits)),
    ]


def draw_section(analysis: Analysis, section: Section) -> Any:
    """One section as a figure of its own."""
    figure = new_figure(16, 4.6, EXTRA, PURPOSE)
    _draw_row(figure, analysis, section)
    return figure


def _draw_row(figure: Any, analysis: Analysis, section: Section) -> None:
    row = figure.subplots(1, len(section.draws))
    for axes, draw in zip(row, section.draws, strict=True):
        draw(axes, analysis)
    if section.legend:
        figure.legend(*row[0].get_legend_handles_labels(), loc="outside lower center", ncols=8, fontsize=9)


def _relative(axes: Any, analysis: Analysis) -> None:
    plain_axes(axes, "Relative error (Frobenius norms)", _depth_label(analysis), "|packed - source| / |source|")
    _lines(axes, analysis, lambda error: error.relative)


def _absolute(axes: Any, analysis: Analysis) -> None:
    plain_axes(axes, "Absolute error (root mean square)", _depth_label(analysis), "of |packed - source|")
    _lines(axes, analysis, lambda error: error.rms)
    axes.set_ylim(bottom=0)


def _steps(axes: Any, analysis: Analysis) -> None:
    plain_axes(axes, "Error in steps of its block (root mean square)", _depth_label(analysis), "steps")
    _lines(axes, analysis, lambda error: error.rms_steps)
    axes.margins(y=0.12)
    # Rounding to evenly spaced values errs evenly over one step.
    axes.axhline(12**-0.5, color=MUTED, lw=1, ls="--")
    axes.annotate(
        "even steps, evenly used: 0.289",
        (1, 12**-0.5),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=8,
        color=MUTED,
    )


def _distribution(axes: Any, analysis: Analysis) -> None:
    plain_axes(axes, "Error of a weight, in steps", "(packed - source) / step", "share of weights, log scale")
    edges, counts = analysis.step_edges, analysis.step_counts
    total = max(1, sum(counts))
    width = edges[1] - edges[0]
    shares = [count / total for count in counts]
    axes.bar(edges[:-1], shares, width=width, align="edge", color=COLORS[0])
    axes.set_yscale("log")
    reach = [edge for edge, count in zip(edges, counts, strict=False) if count]
    bound = max(1.0, *(max(abs(edge), abs(edge + width)) for edge in reach)) if reach else 1.0
    axes.set_xlim(-bound, bound)


def _codes(axes: Any, analysis: Analysis) -> None:
    counts, values = analysis.code_counts, analysis.spec.values
    total = max(1, sum(counts))
    shares = [100 * count / total for count in counts]
    bits = analysis.spec.bits
    title = f"Use of codes: {analysis.entropy:.2f} of {bits} bits are information"
    plain_axes(axes, title, "value of the code (times the block's absmax)", "% of weights")
    even = 100 / len(shares)
    if len(values) <= 16:
        order = sorted(range(len(values)), key=lambda code: (values[code], -code))
        axes.bar(range(len(order)), [shares[code] for code in order], color=COLORS[2], width=0.85)
        axes.set_xticks(range(len(order)), [f"{values[code]:.3g}" for code in order], rotation=60, fontsize=7.5)
        axes.grid(visible=False, axis="x")
    else:
        axes.fill_between(values, shares, step="mid", color=COLORS[2])
    axes.axhline(even, color=MUTED, lw=1, ls="--", label=f"all alike: {even:.3g} %")
    axes.legend(fontsize=8, framealpha=0.8)


def _outliers(axes: Any, analysis: Analysis) -> None:
    found = sum(weight.outlier_blocks for weight in analysis.weights)
    blocks = max(1, sum(weight.blocks for weight in analysis.weights))
    title = f"Outlier blocks: {found:,} of {blocks:,} ({100 * found / blocks:.2g} %)"
    plain_axes(axes, title, _depth_label(analysis), "largest value / root mean square, log scale")
    for index, (name, points) in enumerate(_by_part(analysis.weights, lambda weight: weight.largest_ratio)):
        marker = "o" if index < len(COLORS) else "x"
        axes.plot(*zip(*points, strict=True), marker, ms=4, color=COLORS[index % len(COLORS)], label=label(name))
    medians = [weight.median_ratio for weight in analysis.weights if weight.median_ratio > 0]
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:.3g}")
    axes.yaxis.set_minor_formatter("{x:.2g}")
    axes.axhline(OUTLIER_RATIO, color=MUTED, lw=1, ls="--", label=f"outliers lie above {OUTLIER_RATIO:g}")
    if medians:
        middle = sorted(medians)[len(medians) // 2]
        axes.axhline(middle, color=MUTED, lw=1, ls=":", label=f"a usual block: {middle:.2g}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    _legend_below(axes, *axes.get_legend_handles_labels())


def _bits(axes: Any, analysis: Analysis) -> None:
    title = f"Bits per parameter: {analysis.bits_per_parameter:.3f} on the whole"
    plain_axes(axes, title, "bits per parameter (right: share of the model's bytes)")
    parts = sorted(analysis.parts, key=lambda part: part.bytes)[-14:]
    names = [label(part.name) for part in parts]
    codes = [8 * part.code_bytes / max(1, part.parameters) for part in parts]
    scales = [8 * part.scale_bytes / max(1, part.parameters) for part in parts]
    colors = [COLORS[0] if part.kind == "packed" else COLORS[7] for part in parts]
    places = range(len(names))
    axes.barh(places, codes, color=colors, height=0.7)
    axes.barh(places, scales, left=codes, color=COLORS[4], height=0.7)
    axes.set_yticks(places, names)
    for index, part in enumerate(parts):
        text = f"{part.bits_per_parameter:.3f} ({100 * part.bytes / max(1, analysis.total_bytes):.1f} %)"
        at = (part.bits_per_parameter, index)
        axes.annotate(text, at, xytext=(4, 0), textcoords="offset points", va="center", fontsize=8)
    axes.grid(visible=False, axis="y")
    axes.set_xlim(0, 1.45 * max(part.bits_per_parameter for part in parts))
    if any(scales):
        patches = [axes.barh([0], [0], color=color) for color in (COLORS[0], COLORS[4], COLORS[7])]
        _legend_below(axes, patches, ["codes", "scales", "not packed"])


def _legend_below(axes: Any, handles: Sequence[Any], labels: Sequence[str]) -> None:
    """Not over the data, which may be anywhere."""
    axes.legend(handles, labels, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=5, frameon=False)


def _depth_label(analysis: Analysis) -> str:
    numbered = any(part_of(weight.name)[1] is not None for weight in analysis.weights)
    return "layer" if numbered else "weight, in the order of the files"


def _lines(axes: Any, analysis: Analysis, figure: Callable[[WeightError], float]) -> None:
    groups = _by_part(analysis.weights, lambda weight: None if weight.error is None else figure(weight.error))
    for index, (name, points) in enumerate(groups):
        style = "-" if index < len(COLORS) else "--"
        marker = "o" if len(points) < 3 else ""
        color = COLORS[index % len(COLORS)]
        axes.plot(*zip(*points, strict=True), style, color=color, marker=marker, ms=4, lw=1.4, label=label(name))
    axes.xaxis.get_major_locator().set_params(integer=True)


def _by_part(
    weights: Sequence[WeightFigures], figure: Callable[[WeightFigures], float | None]
) -> list[tuple[str, list[tuple[int, float]]]]:
    """Per part its (layer, figure); of several weights in one layer, as experts are, the largest figure."""
    groups: dict[str, dict[int, float]] = {}
    for index, weight in enumerate(weights):
        value = figure(weight)
        if value is not None:
            name, depth = part_of(weight.name)
            points = groups.setdefault(name, {})
            at = index if depth is None else depth
            points[at] = max(points.get(at, value), value)
    return [(name, sorted(points.items())) for name, points in groups.items()]
