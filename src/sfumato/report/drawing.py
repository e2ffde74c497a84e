"""How every plot of the report looks: colours and marks, axes in percent, and the SVG text that comes out."""

from __future__ import annotations

import io
import math
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import matplotlib.style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter

from sfumato.report.labels import short
from sfumato.report.result import PRIVATE, Run

INK: Final = "#222222"
FAINT: Final = "#767676"

# Text stays text (searchable, and small); parse_math is off because a run may be called "$\frac".
_STYLE: Final = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sfumato",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],
    "font.size": 9.5,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
}
_SVG: Final = "http://www.w3.org/2000/svg"
_XLINK: Final = "http://www.w3.org/1999/xlink"

LEAST_TICKS: Final = 4
# Step and start in percent, from coarse to fine; with these the first that gives enough ticks gives at most six.
_TICKS: Final = (
    *((25.0, 0.0), (20.0, 0.0), (20.0, 10.0), (10.0, 0.0), (10.0, 5.0), (5.0, 0.0)),
    *((4.0, 0.0), (4.0, 2.0), (2.0, 0.0), (2.0, 1.0), (1.0, 0.0), (0.5, 0.0)),
)


@dataclass(frozen=True)
class Look:
    """The colour and the mark of one kind of training."""

    colour: str
    marker: str


# Colours of the Okabe-Ito set, told apart with any colour vision; the marker tells them apart in grey print.
LOOKS: Final = {
    "alone": Look("#5f5f5f", "^"),
    "pooled": Look("#0072b2", "o"),
    "federated": Look("#d55e00", "s"),
    "central": Look("#00795a", "D"),
}
MIXED: Final = Look(INK, "v")


def look_of(runs: Iterable[Run]) -> Look:
    """Return the look that the runs share, or a neutral one if they are of different kinds."""
    looks = {LOOKS[run.mode.removesuffix(PRIVATE)] for run in runs}
    return looks.pop() if len(looks) == 1 else MIXED


def dot(ax: Axes, x: float, y: float, run: Run, *, xerr: float = 0.0) -> None:
    """Draw the mark of one run (filled: private, hollow: not), with a bar of `xerr` to each side."""
    look = look_of([run])
    ax.errorbar(
        x,
        y,
        xerr=xerr or None,
        color=look.colour,
        marker=look.marker,
        ms=6.5,
        mfc=look.colour if run.privacy is not None else "white",
        mew=1.4,
        elinewidth=1.4,
        capsize=3,
        zorder=3,
    )


def cloud(ax: Axes, values: Sequence[float], y: float, run: Run) -> None:
    """Draw single values as light dots, a little below the bar, which would hide them."""
    ax.scatter(values, [y + 0.26] * len(values), s=20, color=look_of([run]).colour, alpha=0.4, lw=0)


def rows_of_runs(ax: Axes, runs: Sequence[Run]) -> None:
    """Make the vertical axis one row per run, the first on top."""
    ax.set_ylim(len(runs) - 0.5, -0.5)
    ax.set_yticks(range(len(runs)), [short(run.name) for run in runs])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="y")


def percent_ticks(low: float, high: float) -> list[float]:
    """Return the ticks, as shares, in [low, high] and in [0, 1]: four to six on every axis of `percent_axis`."""
    # A hair of slack lets an end that is a tick in all but rounding be one.
    first, last = 100 * max(low, 0.0) - 1e-9, 100 * min(high, 1.0) + 1e-9
    ticks: list[float] = []
    for step, start in _TICKS:
        indices = range(math.ceil((first - start) / step), math.floor((last - start) / step) + 1)
        ticks = [(start + step * i) / 100 for i in indices]
        if len(ticks) >= LEAST_TICKS:
            break
    return ticks


def percent_axis(ax: Axes, values: Iterable[float], *, vertical: bool = False, sign: str = " %") -> None:
    """Make one axis show the shares `values` as percent, with room for a whole mark beside the outermost ones."""
    shown = [min(max(value, 0.0), 1.0) for value in values]
    margin = max(0.02, 0.12 * (max(shown) - min(shown)))
    low, high = min(shown) - margin, max(shown) + margin
    (ax.set_ylim if vertical else ax.set_xlim)(low, high)
    axis = ax.yaxis if vertical else ax.xaxis
    axis.set_major_locator(FixedLocator(percent_ticks(low, high)))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.3g}{sign}"))
    axis.grid(True)


@contextmanager
def drawing() -> Iterator[None]:
    """Draw in the report's style, whatever style the caller's program has set."""
    with matplotlib.style.context(["default", dict(_STYLE)]), warnings.catch_warnings():
        # The reader's browser has the letters that the measuring font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def svg(figure: Figure, prefix: str, description: str) -> str:
    """Return the figure as SVG text that may stand beside others in a page; every id begins with `prefix`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="white")
    root = ET.fromstring(buffer.getvalue())
    # Metadata names foreign addresses, and a style element would reach into the page around the plot.
    _remove(root, lambda tag: tag in {f"{{{_SVG}}}metadata", f"{{{_SVG}}}style"})
    for element in root.iter():
        for key, value in element.attrib.items():
            if key == "id":
                element.set(key, f"{prefix}-{value}")
            else:
                linked = value.replace("url(#", f"url(#{prefix}-")
                element.set(key, f"#{prefix}-{linked[1:]}" if key == f"{{{_XLINK}}}href" else linked)
    root.set("style", "stroke-linejoin: round; stroke-linecap: butt")
    root.set("role", "img")
    root.set("aria-label", description)
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _XLINK)
    return ET.tostring(root, encoding="unicode")


def _remove(element: ET.Element, unwanted: Callable[[str], bool]) -> None:
    for child in list(element):
        if unwanted(child.tag):
            element.remove(child)
        else:
            _remove(child, unwanted)
