"""What quantizing did to a model, as one HTML page: pictures and tables in a file that needs nothing else."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from qlora_rs import _core
from qlora_rs.checkpoint.figures import OUTLIER_RATIO, Analysis, WeightFigures
from qlora_rs.checkpoint.folder import naming, replacing
from qlora_rs.pictures.analysis import NO_SOURCE, draw_section, sections
from qlora_rs.pictures.canvas import to_svg
from qlora_rs.report import as_text, format_bytes

STYLE = """
:root { color-scheme: light; }
body { margin: 0 auto; max-width: 1180px; padding: 24px; color: #1f2937; background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 36px 0 8px; }
p { max-width: 820px; margin: 6px 0; } .muted { color: #6b7280; }
.cards { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0; padding: 0; }
.cards li { list-style: none; border: 1px solid #e5e7eb; border-radius: 8px; padding: 8px 16px; min-width: 120px; }
.cards b { display: block; font-size: 20px; font-variant-numeric: tabular-nums; }
.cards span { color: #6b7280; font-size: 13px; }
.note { border-left: 4px solid #e69f00; background: #fffbeb; padding: 8px 14px; margin: 12px 0; }
.picture svg { width: 100%; height: auto; display: block; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: 8px 0; }
th, td { padding: 3px 12px 3px 0; text-align: right; white-space: nowrap; border-bottom: 1px solid #f0f1f3; }
th { border-bottom: 1px solid #9ca3af; vertical-align: bottom; } th:first-child, td:first-child { text-align: left; }
summary { cursor: pointer; color: #0072b2; margin: 8px 0; }
code { font: 13px ui-monospace, monospace; }
"""


def write_page(analysis: Analysis, path: Path) -> None:
    """Write the page; an earlier file is replaced when the new one is whole.

    Raises:
        UnsupportedError: matplotlib is not installed.
        OSError: the system failed, with the file's name.
    """
    content = render_page(analysis)
    with replacing(path) as (partial,), naming(path):
        partial.write_text(content, encoding="utf-8")


def render_page(analysis: Analysis) -> str:
    """The page as text."""
    name = Path(analysis.path).resolve().name
    body = [
        f"<h1>{_text(name)}</h1>",
        f'<p class="muted">{_text(analysis.spec.describe())} &middot; {_text(analysis.path)}</p>',
        _cards(analysis),
        *(f'<p class="note">{_text(note)}</p>' for note in _notes(analysis)),
    ]
    for section in sections(analysis):
        picture = to_svg(draw_section(analysis, section))
        body += [f"<h2>{_text(section.title)}</h2>", f'<div class="picture">{picture}</div>']
    body += [
        "<h2>Bits per parameter, by part</h2>",
        _parts(analysis),
        "<h2>Outlier blocks</h2>",
        _outliers(analysis),
        "<h2>Weights</h2>",
        _weights(analysis),
        "<h2>What the figures are</h2>",
        *(f"<p>{line}</p>" for line in _meanings(analysis)),
        f'<p class="muted">qlora-rs {_text(_core.__version__)}</p>',
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{_text(name)}</title>'
    joined = "\n".join(body)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head><body>\n{joined}\n</body></html>\n'
    )


def _notes(analysis: Analysis) -> list[str]:
    notes = [note for note in analysis.notes if not note.startswith("no source")]
    return notes if analysis.source is not None else [NO_SOURCE, *notes]


def _cards(analysis: Analysis) -> str:
    packed = [part for part in analysis.parts if part.kind == "packed"]
    elements = max(1, sum(part.parameters for part in packed))
    cards = [
        (f"{analysis.parameters:,}", "parameters"),
        (format_bytes(analysis.total_bytes), "all tensors"),
        (f"{analysis.bits_per_parameter:.3f}", "bits per parameter"),
        (
            f"{8 * sum(part.bytes for part in packed) / elements:.3f}",
            f"bits per packed weight, in {len(analysis.weights)}",
        ),
        (f"{analysis.entropy:.2f} of {analysis.spec.bits}", "bits of information in a code"),
    ]
    if analysis.relative_error is not None:
        cards.insert(0, (f"{100 * analysis.relative_error:.3g} %", "relative error of the packed weights"))
    return '<ul class="cards">' + "".join(f"<li><b>{b}</b><span>{_text(s)}</span></li>" for b, s in cards) + "</ul>"


def _parts(analysis: Analysis) -> str:
    rows = [
        (
            part.name,
            part.kind,
            f"{part.tensors:,}",
            f"{part.parameters:,}",
            f"{8 * part.code_bytes / max(1, part.parameters):.3f}",
            f"{8 * part.scale_bytes / max(1, part.parameters):.3f}",
            f"{part.bits_per_parameter:.3f}",
            format_bytes(part.bytes),
            f"{100 * part.bytes / max(1, analysis.total_bytes):.1f} %",
        )
        for part in sorted(analysis.parts, key=lambda part: -part.bytes)
    ]
    titles = ("part", "", "tensors", "parameters", "codes", "scales", "bits per parameter", "bytes", "share")
    return _table(titles, rows)


def _outliers(analysis: Analysis) -> str:
    if not analysis.outliers:
        return "<p>There are none.</p>"
    rows = [
        (
            block.name,
            str(block.expert),
            f"{block.row:,}",
            f"{block.block:,}",
            f"{block.absmax:.4g}",
            f"{block.ratio:.1f}",
            f"{100 * block.zeros:.0f} %",
        )
        for block in analysis.outliers
    ]
    titles = (
        "weight",
        "expert",
        "row",
        "block",
        "absmax",
        "times the matrix's root mean square",
        "values that became 0",
    )
    found = sum(weight.outlier_blocks for weight in analysis.weights)
    shown = f"<p>The {len(rows)} largest of {found:,}.</p>"
    return shown + _table(titles, rows)


def _weights(analysis: Analysis) -> str:
    titles = ["weight", "shape", "bits per weight", "blocks", "outlier blocks", "largest ratio"]
    if analysis.source is not None:
        titles += ["relative error", "mean |error|", "rms error", "largest |error|"]
        titles += ["mean steps", "rms steps", "largest steps"]
    worst = sorted(analysis.weights, key=_badness, reverse=True)[:10]
    label = "relative error" if analysis.source is not None else "ratio of an outlier"
    return (
        f"<p>The {len(worst)} with the largest {label}:</p>"
        + _table(titles, map(_weight_row, worst))
        + f"<details><summary>All {len(analysis.weights)}</summary>"
        + _table(titles, map(_weight_row, analysis.weights))
        + "</details>"
    )


def _badness(weight: WeightFigures) -> float:
    return weight.largest_ratio if weight.error is None else weight.error.relative


def _weight_row(weight: WeightFigures) -> tuple[str, ...]:
    cells = (
        weight.name,
        " x ".join(map(str, weight.shape)),
        f"{weight.bits_per_weight:.3f}",
        f"{weight.blocks:,}",
        f"{weight.outlier_blocks:,}",
        f"{weight.largest_ratio:.1f}",
    )
    if weight.error is None:
        return cells
    error = weight.error
    absolute = (f"{error.mean_abs:.3g}", f"{error.rms:.3g}", f"{error.max_abs:.3g}")
    steps = (f"{error.mean_steps:.3f}", f"{error.rms_steps:.3f}", f"{error.max_steps:.3f}")
    return (*cells, f"{error.relative:.4f}", *absolute, *steps)


def _meanings(analysis: Analysis) -> list[str]:
    source = "" if analysis.source is None else f" Errors are against <code>{_text(analysis.source)}</code>."
    return [
        "An <b>error</b> is packed minus source, in float32. Relative errors are Frobenius norms: the root of the "
        f"summed squares of the errors, over that of the source's values.{source}",
        "A <b>step</b> is the mean distance of neighbouring values of the codebook, times the block's absmax. Rounding "
        "to evenly spaced values that are evenly used errs by 0.289 steps (root mean square).",
        f"An <b>outlier block</b> has a largest value beyond {OUTLIER_RATIO:g} times the root mean square of its "
        "matrix. One such value makes the steps of its whole block wide: the share of its values that became 0 tells "
        "what that cost.",
        "<b>Information in a code</b> is the entropy of how often codes occur: at most all bits that a code takes, "
        "when all occur alike.",
    ]


def _table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(title)}</th>" for title in titles)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _text(value: str) -> str:
    return html.escape(as_text(value))
