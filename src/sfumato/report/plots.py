"""The plots of the report as SVG text to stand inline in a page; the same result gives the same text."""

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
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from sfumato._numbers import bound
from sfumato.report.result import PRIVATE, Result, Run, Score

INK: Final = "#222222"
FAINT: Final = "#767676"
PANELS_PER_ROW: Final = 4
MAX_OWNER_PANELS: Final = 12

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


@dataclass(frozen=True)
class _Look:
    colour: str
    marker: str


# Colours of the Okabe-Ito set, told apart with any colour vision; the marker tells them apart in grey print.
_LOOKS: Final = {
    "alone": _Look("#5f5f5f", "^"),
    "pooled": _Look("#0072b2", "o"),
    "federated": _Look("#d55e00", "s"),
    "central": _Look("#00795a", "D"),
}


def epsilon_over_steps(result: Result) -> str | None:
    """Return epsilon over steps, a line per private run, each claim as a dashed line; None without curves."""
    curves = result.curves.epsilon_over_steps if result.curves else {}
    runs = [run for run in result.private_runs if curves.get(run.name)]
    if not runs:
        return None
    with _drawing():
        figure = Figure(figsize=(7.4, 3.8), layout="constrained")
        ax = figure.add_subplot()
        labels = []
        for i, run in enumerate(runs):
            steps = [step for step, _ in curves[run.name]]
            spent = [epsilon for _, epsilon in curves[run.name]]
            every = max(1, len(steps) // 6)
            # Each run starts its markers elsewhere, so that runs on the same line can both be seen.
            start = (every * i // len(runs)) % len(steps)
            look = _look(run)
            ax.plot(steps, spent, color=look.colour, lw=1.6, marker=look.marker, ms=4.5, markevery=(start, every))
            labels.append(_Label(spent[-1], run.name, look.colour))
        claims = sorted({run.privacy.epsilon for run in runs if run.privacy})
        top = 1.08 * max([*claims, *(label.at for label in labels), 1e-9])
        ax.set(xlabel="step", ylabel="epsilon spent", xlim=(0, None), ylim=(0, top))
        for claim in claims:
            ax.axhline(claim, color=FAINT, lw=1, ls=(0, (5, 4)), zorder=1)
            ax.annotate(
                f"budget {bound(claim)}",
                (0.005, claim),
                xycoords=("axes fraction", "data"),
                xytext=(0, 2),
                textcoords="offset points",
                color=FAINT,
                fontsize=8,
            )
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(axis="y")
        _label_right(ax, labels)
        return _svg(figure, "epsilon-over-steps", "Epsilon spent over the steps, one line per private run.")


def accuracy_by_run(result: Result) -> str | None:
    """Return the accuracy of every run: mean and spread, each seed as a light dot.

    None if all there is to see is a single number, or none.
    """
    rows = _measured(result)
    if len(rows) < 2 and all(score.sd == 0 for _, score in rows):
        return None
    with _drawing():
        figure = Figure(figsize=(7.4, 0.9 + 0.34 * len(rows)), layout="constrained")
        ax = figure.add_subplot()
        for y, (run, score) in enumerate(rows):
            _cloud(ax, score.values or (), y, run)
            _dot(ax, score.mean, y, run, xerr=score.sd)
            ax.annotate(
                f"{100 * score.mean:.1f} %",
                (1.01, y),
                xycoords=("axes fraction", "data"),
                va="center",
                color=_look(run).colour,
            )
        _rows_of_runs(ax, [run for run, _ in rows])
        _percent_axis(ax, _spread_of(rows))
        ax.set_xlabel("accuracy (dot: mean, bar: standard deviation, light dots: seeds)")
        return _svg(figure, "accuracy-by-run", "Accuracy of every run with its spread over the seeds.")


def accuracy_over_epsilon(result: Result) -> str | None:
    """Return accuracy over epsilon, a line per kind of training, the same without privacy as a dashed line.

    None without two points to compare, one of them private and with an epsilon above 0.
    """
    rows = [(r, s) for r, s in _measured(result) if r.privacy is not None and r.privacy.epsilon > 0]
    families = list(dict.fromkeys(run.mode for run, _ in rows))
    references = {mode.removesuffix(PRIVATE) for mode in families} | {"alone"}
    plain = [(r, s) for r, s in _measured(result) if r.privacy is None and r.mode in references]
    if not rows or len(rows) + len(plain) < 2:
        return None
    with _drawing():
        figure = Figure(figsize=(7.4, 3.8), layout="constrained")
        ax = figure.add_subplot()
        epsilons = sorted({run.privacy.epsilon for run, _ in rows if run.privacy})
        labels = []
        for i, mode in enumerate(families):
            points = sorted((r.privacy.epsilon, s.mean, s.sd) for r, s in rows if r.mode == mode and r.privacy)
            # A small shift keeps the bars of two families at one epsilon apart.
            shift = 1 + 0.02 * (i - (len(families) - 1) / 2)
            xs, ys, sds = zip(*points, strict=True)
            look = _LOOKS[mode.removesuffix(PRIVATE)]
            ax.errorbar(
                [x * shift for x in xs],
                ys,
                yerr=sds,
                color=look.colour,
                marker=look.marker,
                ms=6,
                lw=1.6,
                capsize=3,
            )
            labels.append(_Label(ys[-1], mode, look.colour))
        for run, score in plain:
            ax.axhline(score.mean, color=_look(run).colour, lw=1.1, ls=(0, (5, 4)), zorder=1)
            labels.append(_Label(score.mean, f"{run.name} (no privacy)", _look(run).colour))
        if epsilons[-1] > 2 * epsilons[0]:
            ax.set_xscale("log")
        ax.xaxis.set_major_locator(FixedLocator(epsilons))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: bound(x)))
        ax.set_xlim(epsilons[0] / 1.25, epsilons[-1] * 1.25)
        _percent_axis(ax, _spread_of(rows + plain), vertical=True)
        ax.set(xlabel="epsilon (smaller is more private)", ylabel="accuracy")
        _label_right(ax, labels)
        return _svg(figure, "accuracy-over-epsilon", "Accuracy over epsilon; dashed: without privacy.")


def accuracy_by_owner(result: Result) -> str | None:
    """Return the accuracy at each owner, a row per run and a panel per owner; None without such numbers.

    With many owners a single panel shows every owner as one light dot.
    """
    rows = [(run, score) for run, score in _measured(result) if score.per_owner]
    owners = [name for name in result.owners if any(name in score.per_owner for _, score in rows)]
    if not rows:
        return None
    with _drawing():
        if len(owners) > MAX_OWNER_PANELS:
            figure = _owners_in_one_panel(rows)
        else:
            figure = _panel_per_owner(rows, owners)
        return _svg(figure, "accuracy-by-owner", "Accuracy at each owner, one row per run.")


def _panel_per_owner(rows: Sequence[tuple[Run, Score]], owners: Sequence[str]) -> Figure:
    columns = min(PANELS_PER_ROW, len(owners))
    lines = math.ceil(len(owners) / columns)
    figure = Figure(figsize=(7.4, lines * (0.8 + 0.27 * len(rows))), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    everything = [value for _, score in rows for value in score.per_owner.values()]
    for i, ax in enumerate(grid.flat):
        if i >= len(owners):
            ax.set_visible(False)
            continue
        owner = owners[i]
        for y, (run, score) in enumerate(rows):
            if owner in score.per_owner:
                _dot(ax, score.per_owner[owner], y, run)
        ax.set_title(_short(owner, 20))
        _rows_of_runs(ax, [run for run, _ in rows])
        _percent_axis(ax, everything, ticks=4)
    figure.supxlabel("accuracy", fontsize=9.5)
    return figure


def _owners_in_one_panel(rows: Sequence[tuple[Run, Score]]) -> Figure:
    figure = Figure(figsize=(7.4, 0.9 + 0.34 * len(rows)), layout="constrained")
    ax = figure.add_subplot()
    for y, (run, score) in enumerate(rows):
        values = list(score.per_owner.values())
        _cloud(ax, values, y, run)
        _dot(ax, sum(values) / len(values), y, run)
    _rows_of_runs(ax, [run for run, _ in rows])
    _percent_axis(ax, [value for _, score in rows for value in score.per_owner.values()])
    ax.set_xlabel("accuracy (light dots: owners, dot: their mean)")
    return figure


@dataclass(frozen=True)
class _Label:
    at: float
    text: str
    colour: str


def spread(positions: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return the positions moved as little as a single pass needs so that neighbours are `gap` apart.

    The order is kept, and all stay in [low, high] if there is room; else the gap shrinks to what fits.
    """
    if len(positions) > 1:
        gap = min(gap, (high - low) / (len(positions) - 1))
    order = sorted(range(len(positions)), key=lambda i: positions[i])
    placed = list(positions)
    floor = low
    for i in order:
        placed[i] = floor = max(floor, positions[i])
        floor += gap
    ceiling = high
    for i in reversed(order):
        placed[i] = ceiling = min(ceiling, placed[i])
        ceiling -= gap
    return placed


def _label_right(ax: Axes, labels: Sequence[_Label]) -> None:
    low, high = ax.get_ylim()
    height = ax.get_figure(root=True).get_figheight() * 72 * 0.8  # type: ignore[union-attr]
    places = spread([label.at for label in labels], 12.5 * (high - low) / height, low, high)
    for label, y in zip(labels, places, strict=True):
        ax.annotate(
            _short(label.text),
            (1, label.at),
            xycoords=("axes fraction", "data"),
            xytext=(1.05, y),
            textcoords=("axes fraction", "data"),
            va="center",
            color=label.colour,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": label.colour,
                "lw": 0.7,
                "relpos": (0, 0.5),
                "shrinkA": 2,
                "shrinkB": 0,
            },
        )


def _measured(result: Result) -> list[tuple[Run, Score]]:
    return [(run, run.metrics.accuracy) for run in result.runs if run.metrics.accuracy is not None]


def _look(run: Run) -> _Look:
    return _LOOKS[run.mode.removesuffix(PRIVATE)]


def _dot(ax: Axes, x: float, y: float, run: Run, *, xerr: float = 0.0) -> None:
    look = _look(run)
    # Filled: private. Hollow: not.
    face = look.colour if run.privacy is not None else "white"
    ax.errorbar(
        x,
        y,
        xerr=xerr or None,
        color=look.colour,
        marker=look.marker,
        ms=6.5,
        mfc=face,
        mew=1.4,
        elinewidth=1.4,
        capsize=3,
        zorder=3,
    )


def _cloud(ax: Axes, values: Sequence[float], y: float, run: Run) -> None:
    # A little below the bar, which would hide them.
    ax.scatter(values, [y + 0.26] * len(values), s=20, color=_look(run).colour, alpha=0.4, lw=0)


def _rows_of_runs(ax: Axes, runs: Sequence[Run]) -> None:
    ax.set_ylim(len(runs) - 0.5, -0.5)
    ax.set_yticks(range(len(runs)), [_short(run.name) for run in runs])
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="y")


def _spread_of(rows: Iterable[tuple[Run, Score]]) -> list[float]:
    return [x for _, s in rows for x in (s.mean - s.sd, s.mean + s.sd, *(s.values or ()))]


def _percent_axis(ax: Axes, values: Iterable[float], *, ticks: int = 6, vertical: bool = False) -> None:
    shown = list(values)
    margin = max(0.02, 0.06 * (max(shown) - min(shown)))
    bounds = (max(min(shown) - margin, -0.02), min(max(shown) + margin, 1.02))
    axis = ax.yaxis if vertical else ax.xaxis
    (ax.set_ylim if vertical else ax.set_xlim)(bounds)
    ax.locator_params(axis="y" if vertical else "x", nbins=ticks)
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.3g} %"))
    axis.grid(True)


def _short(text: str, limit: int = 34) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


@contextmanager
def _drawing() -> Iterator[None]:
    with matplotlib.style.context(["default", dict(_STYLE)]), warnings.catch_warnings():
        # The reader's browser has the letters that the measuring font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def _svg(figure: Figure, prefix: str, description: str) -> str:
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
