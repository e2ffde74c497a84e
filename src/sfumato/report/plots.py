"""The plots of the report as SVG text to stand inline in a page; the same result gives the same text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeVar

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from sfumato._numbers import bound, percent_bound
from sfumato.privacy.meaning import SHOWN_RATE
from sfumato.report.drawing import (
    FAINT,
    INK,
    LOOKS,
    cloud,
    dot,
    drawing,
    look_of,
    percent_axis,
    rows_of_runs,
    svg,
)
from sfumato.report.labels import Label, height_for, label_right, short
from sfumato.report.result import PRIVATE, Result, Run, Score

PANELS_PER_ROW: Final = 4
MAX_OWNER_PANELS: Final = 12
# Lines nearer than this share of the axis cover each other; they are drawn, and named, as one.
COVERS: Final = 1 / 400

_WIDTH: Final = 7.4
_LINES: Final = ("-", (0, (6, 2)), (0, (6, 2, 1.5, 2)), (0, (1.5, 1.5)))
_T = TypeVar("_T")
_Curve = Sequence[tuple[int, float]]


def epsilon_over_steps(result: Result) -> str | None:
    """Return epsilon over steps, a line per private run, each claim as a dashed line; None without curves.

    Runs that spend alike share one line, whose label names them all.
    """
    curves = result.curves.epsilon_over_steps if result.curves else {}
    runs = [run for run in result.private_runs if curves.get(run.name)]
    if not runs:
        return None
    claims = sorted({run.privacy.epsilon for run in runs if run.privacy})
    top = 1.08 * max([*claims, *(epsilon for run in runs for _, epsilon in curves[run.name]), 1e-9])
    groups = _alike(runs, lambda a, b: _covers(curves[a.name], curves[b.name], COVERS * top))
    labels = [
        Label(curves[group[0].name][-1][1], tuple(run.name for run in group), look_of(group).colour) for group in groups
    ]
    with drawing():
        figure = Figure(figsize=(_WIDTH, height_for(labels)), layout="constrained")
        ax = figure.add_subplot()
        for i, group in enumerate(groups):
            steps, spent = zip(*curves[group[0].name], strict=True)
            every = max(1, len(steps) // 6)
            # Each line starts its markers elsewhere, so that two that run together for a while can both be seen.
            start = (every * i // len(groups)) % len(steps)
            look = look_of(group)
            ax.plot(steps, spent, color=look.colour, lw=1.6, marker=look.marker, ms=4.5, markevery=(start, every))
        ax.set(xlabel="step", ylabel="epsilon spent", xlim=(0, None), ylim=(0, top))
        for claim in claims:
            _claim_line(ax, claim)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(axis="y")
        label_right(ax, labels)
        return svg(figure, "epsilon-over-steps", "Epsilon spent over the steps of the private runs.")


def noise_over_steps(result: Result) -> str | None:
    """Return the noise of each step above the budget that is left after it, a line per run; None if no run has both.

    Runs that do alike share one line.
    """
    curves = result.curves
    if curves is None:
        return None
    noise, left = curves.noise_over_steps, curves.left_over_steps
    runs = [run for run in result.private_runs if noise.get(run.name) and left.get(run.name)]
    if not runs:
        return None
    top = 1.08 * max([*(value for run in runs for _, value in noise[run.name]), 1e-9])
    groups = _alike(
        runs,
        lambda a, b: (
            _covers(noise[a.name], noise[b.name], COVERS * top) and _covers(left[a.name], left[b.name], COVERS)
        ),
    )
    labels = [
        [Label(of[group[0].name][-1][1], tuple(run.name for run in group), look_of(group).colour) for group in groups]
        for of in (noise, left)
    ]
    with drawing():
        figure = Figure(figsize=(_WIDTH, 2 * height_for(labels[0])), layout="constrained")
        panels = figure.subplots(2, 1, sharex=True)
        for panel, of, label, high in zip(
            panels, (noise, left), ("noise multiplier", "budget left"), (top, 1.08), strict=True
        ):
            for i, group in enumerate(groups):
                steps, values = zip(*of[group[0].name], strict=True)
                panel.plot(steps, values, color=look_of(group).colour, lw=1.6, ls=_LINES[i % len(_LINES)])
            panel.set(ylabel=label, xlim=(0, None), ylim=(0, high))
            panel.grid(axis="y")
        panels[1].set(xlabel="step")
        panels[1].xaxis.set_major_locator(MaxNLocator(integer=True))
        for panel, named in zip(panels, labels, strict=True):
            label_right(panel, named)
        return svg(figure, "noise-over-steps", "Noise of each step, and the share of the budget left after it.")


def trade_off(result: Result) -> str | None:
    """Return the errors that an attack must make, a line per promise below that of guessing; None without such curves.

    The dots are at the false positive rate of the sentences beside the plot.
    """
    known = [(run, run.privacy.risk) for run in result.private_runs if run.privacy and run.privacy.risk]
    groups = sorted(_alike(known, lambda a, b: a[1] == b[1]), key=lambda group: group[0][1].guess)
    if not groups:
        return None
    labels = [Label(0.0, tuple(run.name for run, _ in one), look_of(run for run, _ in one).colour) for one in groups]
    with drawing():
        figure = Figure(figsize=(_WIDTH, height_for(labels, least=4.6)), layout="constrained")
        ax = figure.add_subplot()
        for vertical in (False, True):
            percent_axis(ax, (0.0, 1.0), vertical=vertical)
        ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        ax.plot((0, 1), (1, 0), color=FAINT, lw=1, ls=(0, (5, 4)))
        ax.annotate("guessing", (0.72, 0.28), xytext=(5, 5), textcoords="offset points", color=FAINT, fontsize=8)
        for i, (group, label) in enumerate(zip(groups, labels, strict=True)):
            risk = group[0][1]
            wrong, missed = zip(*risk.curve, strict=True)
            ax.plot(wrong, missed, color=label.colour, lw=1.6, ls=_LINES[i % len(_LINES)], label=str(i))
            ax.plot(SHOWN_RATE, 1 - risk.shown, color=label.colour, marker="o", ms=6, zorder=3, clip_on=False)
        weakest = groups[-1][0][1].shown
        ax.annotate(
            f"{100 * SHOWN_RATE:g} % named wrongly:\nat most {percent_bound(weakest)} found",
            (SHOWN_RATE, 1 - weakest),
            xytext=(0.42, 0.86),
            fontsize=8.5,
            arrowprops={"arrowstyle": "-", "color": INK, "lw": 0.7, "shrinkB": 4},
        )
        ax.set(xlabel="not used, but named (false positives)", ylabel="used, but not found (false negatives)")
        legend = ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), frameon=False, labelspacing=0.9)
        # Set afterwards, because a legend leaves out what is called "_hidden".
        for text, label in zip(legend.get_texts(), labels, strict=True):
            text.set_text("\n".join(short(name) for name in label.names))
        return svg(figure, "trade-off", "The least false negative rate of any attack, over its false positive rate.")


def accuracy_by_run(result: Result) -> str | None:
    """Return the accuracy of every run: mean and spread, each seed as a light dot.

    None if all there is to see is a single number, or none.
    """
    rows = _measured(result)
    if len(rows) < 2 and all(score.sd == 0 for _, score in rows):
        return None
    with drawing():
        figure = Figure(figsize=(_WIDTH, 0.9 + 0.34 * len(rows)), layout="constrained")
        ax = figure.add_subplot()
        for y, (run, score) in enumerate(rows):
            cloud(ax, score.values or (), y, run)
            dot(ax, score.mean, y, run, xerr=score.sd)
            ax.annotate(
                f"{100 * score.mean:.1f} %",
                (1.01, y),
                xycoords=("axes fraction", "data"),
                va="center",
                color=look_of([run]).colour,
            )
        rows_of_runs(ax, [run for run, _ in rows])
        percent_axis(ax, _spread_of(rows))
        ax.set_xlabel("accuracy (dot: mean, bar: standard deviation, light dots: seeds)")
        return svg(figure, "accuracy-by-run", "Accuracy of every run with its spread over the seeds.")


def accuracy_over_epsilon(result: Result) -> str | None:
    """Return accuracy over epsilon, a line per kind of training, the same without privacy as a dashed line.

    Runs without privacy that came out alike share one dashed line, whose label names them all. None without
    two points to compare, one of them private and with an epsilon above 0.
    """
    rows = [(r, s) for r, s in _measured(result) if r.privacy is not None and r.privacy.epsilon > 0]
    families = list(dict.fromkeys(run.mode for run, _ in rows))
    references = {mode.removesuffix(PRIVATE) for mode in families} | {"alone"}
    plain = [(r, s) for r, s in _measured(result) if r.privacy is None and r.mode in references]
    if not rows or len(rows) + len(plain) < 2:
        return None
    with drawing():
        figure = Figure(layout="constrained")
        ax = figure.add_subplot()
        percent_axis(ax, _spread_of(rows + plain), vertical=True)
        labels = [_family(ax, rows, families, mode) for mode in families]
        low, high = ax.get_ylim()
        for group in _alike(plain, lambda a, b: abs(a[1].mean - b[1].mean) <= COVERS * (high - low)):
            mean = statistics.fmean(score.mean for _, score in group)
            colour = look_of(run for run, _ in group).colour
            ax.axhline(mean, color=colour, lw=1.1, ls=(0, (5, 4)), zorder=1)
            labels.append(Label(mean, tuple(f"{run.name} (no privacy)" for run, _ in group), colour))
        _epsilon_axis(ax, sorted({run.privacy.epsilon for run, _ in rows if run.privacy}))
        ax.set(xlabel="epsilon (smaller is more private)", ylabel="accuracy")
        figure.set_size_inches(_WIDTH, height_for(labels))
        label_right(ax, labels)
        return svg(figure, "accuracy-over-epsilon", "Accuracy over epsilon; dashed: without privacy.")


def accuracy_by_owner(result: Result) -> str | None:
    """Return the accuracy at each owner, a row per run and a panel per owner; None without such numbers.

    With many owners a single panel shows every owner as one light dot.
    """
    rows = [(run, score) for run, score in _measured(result) if score.per_owner]
    owners = [name for name in result.owners if any(name in score.per_owner for _, score in rows)]
    if not rows:
        return None
    with drawing():
        if len(owners) > MAX_OWNER_PANELS:
            figure = _owners_in_one_panel(rows)
        else:
            figure = _panel_per_owner(rows, owners)
        return svg(figure, "accuracy-by-owner", "Accuracy at each owner, one row per run.")


def _claim_line(ax: Axes, claim: float) -> None:
    ax.axhline(claim, color=FAINT, lw=1, ls=(0, (5, 4)), zorder=1)
    # On the right the curves of larger claims have risen above the text; on the left they would cross it.
    ax.annotate(
        f"budget {bound(claim)}",
        (0.99, claim),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        color=FAINT,
        fontsize=8,
    )


def _family(ax: Axes, rows: Sequence[tuple[Run, Score]], families: Sequence[str], mode: str) -> Label:
    points = sorted((r.privacy.epsilon, s.mean, s.sd) for r, s in rows if r.mode == mode and r.privacy)
    # A small shift keeps the bars of two families at one epsilon apart.
    shift = 1 + 0.02 * (families.index(mode) - (len(families) - 1) / 2)
    xs, ys, sds = zip(*points, strict=True)
    look = LOOKS[mode.removesuffix(PRIVATE)]
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
    return Label(ys[-1], (mode,), look.colour)


def _epsilon_axis(ax: Axes, epsilons: Sequence[float]) -> None:
    if epsilons[-1] > 2 * epsilons[0]:
        ax.set_xscale("log")
    ax.xaxis.set_major_locator(FixedLocator(epsilons))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: bound(x)))
    ax.set_xlim(epsilons[0] / 1.25, epsilons[-1] * 1.25)


def _panel_per_owner(rows: Sequence[tuple[Run, Score]], owners: Sequence[str]) -> Figure:
    columns = min(PANELS_PER_ROW, len(owners))
    lines = math.ceil(len(owners) / columns)
    figure = Figure(figsize=(_WIDTH, lines * (0.8 + 0.27 * len(rows))), layout="constrained")
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    everything = [value for _, score in rows for value in score.per_owner.values()]
    for i, ax in enumerate(grid.flat):
        if i >= len(owners):
            ax.set_visible(False)
            continue
        owner = owners[i]
        for y, (run, score) in enumerate(rows):
            if owner in score.per_owner:
                dot(ax, score.per_owner[owner], y, run)
        ax.set_title(short(owner, 56 // columns))
        rows_of_runs(ax, [run for run, _ in rows])
        # The panels are narrow: the sign stands once, below them all.
        percent_axis(ax, everything, sign="")
        # The lowest panel of each column carries the numbers, also above a gap in the last line.
        ax.tick_params(axis="x", labelsize=8, labelbottom=i + columns >= len(owners))
    figure.supxlabel("accuracy in %", fontsize=9.5)
    return figure


def _owners_in_one_panel(rows: Sequence[tuple[Run, Score]]) -> Figure:
    figure = Figure(figsize=(_WIDTH, 0.9 + 0.34 * len(rows)), layout="constrained")
    ax = figure.add_subplot()
    for y, (run, score) in enumerate(rows):
        values = list(score.per_owner.values())
        cloud(ax, values, y, run)
        dot(ax, sum(values) / len(values), y, run)
    rows_of_runs(ax, [run for run, _ in rows])
    percent_axis(ax, [value for _, score in rows for value in score.per_owner.values()])
    ax.set_xlabel("accuracy (light dots: owners, dot: their mean)")
    return figure


def _measured(result: Result) -> list[tuple[Run, Score]]:
    return [(run, run.metrics.accuracy) for run in result.runs if run.metrics.accuracy is not None]


def _spread_of(rows: Iterable[tuple[Run, Score]]) -> list[float]:
    return [x for _, s in rows for x in (s.mean - s.sd, s.mean + s.sd, *(s.values or ()))]


def _covers(one: _Curve, other: _Curve, tolerance: float) -> bool:
    same_steps = [step for step, _ in one] == [step for step, _ in other]
    return same_steps and all(abs(a - b) <= tolerance for (_, a), (_, b) in zip(one, other, strict=True))


def _alike(items: Iterable[_T], alike: Callable[[_T, _T], bool]) -> list[list[_T]]:
    """Group the items that are like the first of a group, in the order given."""
    groups: list[list[_T]] = []
    for item in items:
        group = next((group for group in groups if alike(group[0], item)), None)
        if group is None:
            groups.append([item])
        else:
            group.append(item)
    return groups
