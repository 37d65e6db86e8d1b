"""Where matplotlib is used from: figures without its global state, saved whole or not at all."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

from qlora_rs.checkpoint.folder import replacing
from qlora_rs.errors import require_extra
from qlora_rs.report import as_text

# One colour a series, in this order; chosen to stay apart for colour-blind readers (Okabe and Ito, 2008).
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C564B", "#4D4D4D")
MUTED = "#6B7280"


def require_matplotlib(extra: str, purpose: str) -> None:
    """Raise UnsupportedError if nothing can be drawn; to be asked before the work, not after it."""
    require_extra("matplotlib.figure", extra, purpose)


def new_figure(width: float, height: float, extra: str, purpose: str) -> Any:
    """An empty figure of ``width`` x ``height`` inches.

    Raises:
        UnsupportedError: matplotlib is not installed.
    """
    figures = require_extra("matplotlib.figure", extra, purpose)
    backend = require_extra("matplotlib.backends.backend_agg", extra, purpose)
    # Not through pyplot: it keeps figures and a backend for the whole process.
    figure = figures.Figure(figsize=(width, height), dpi=120, layout="constrained")
    backend.FigureCanvasAgg(figure)
    return figure


def label(name: str) -> str:
    """A name of a folder or a tensor as text of a picture: not endless, and ``$`` begins no formula."""
    text = as_text(name)
    text = text if len(text) <= 60 else f"{text[:30]} ... {text[-25:]}"
    return text.replace("$", r"\$")


def plain_axes(axes: Any, title: str, x: str = "", y: str = "") -> None:
    """Titles, a light grid behind the data, and no frame where there is no axis."""
    axes.set_title(title, fontsize=10.5, loc="left", fontweight="bold")
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(y, fontsize=9)
    axes.tick_params(labelsize=8.5)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def save_png(figure: Any, path: Path) -> None:
    """Write a PNG; an earlier file is replaced when the new one is whole.

    Raises:
        OSError: the system failed, with the file's name.
    """
    with replacing(path) as (partial,):
        figure.savefig(partial, format="png")


def to_svg(figure: Any) -> str:
    """The figure as an ``<svg>`` element to put into a page: letters are outlines, so no font is needed."""
    content = io.StringIO()
    matplotlib = require_extra("matplotlib", "report", "drawing")
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "qlora_rs"}):
        figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = content.getvalue()
    return re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
