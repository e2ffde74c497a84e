"""Who holds what: the clients of a population by size and by class, as SVG text. Made from private records."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sfumato import _checks
from sfumato.data.population import Population
from sfumato.errors import InputError
from sfumato.report.drawing import FAINT, LOOKS, drawing, percent_axis, svg
from sfumato.report.labels import short

# Up to this many clients each has a row of its own; of more, the spread is shown.
MAX_ROWS: Final = 60
MAX_CLASSES: Final = 30
NOTE: Final = "For the data's owner: it is not covered by any budget."

_WIDTH: Final = 7.4
_COLOUR: Final = LOOKS["pooled"].colour
# So few colours that their bar is drawn as shapes: of more, matplotlib makes a picture of dots, which `svg` cannot hold.
_SHARES: Final = LinearSegmentedColormap.from_list("shares", ["#ffffff", _COLOUR], N=40)


def partition_figure(population: Population, *, most: int = 2_000) -> str:
    """Return a picture of how many records each client holds and, for classes, of which.

    Up to 60 clients have a row each: its classes as shares, and its size. Of more, it shows a histogram of the sizes and, for
    each class, how its share spreads over the clients. Every client is made once, one after another. It shows private
    numbers as they are: it is for who may see the records, never for release.

    Args:
        population: The clients.
        most: How many clients to read at most; of more, this many at even distances stand for all, and the picture says so.

    Raises:
        InputError: population is no Population, or most is no whole number of at least 1; a client is not what it should be.
    """
    _check(population)
    held = _read(population, _checks.count("most", most))
    told = [_whom(len(held.names), len(population)), *held.left_out(), NOTE]
    with drawing():
        figure = _rows(held) if len(held.names) <= MAX_ROWS else _spread(held)
        figure.suptitle("Who holds what", x=0.01, ha="left", fontsize=11)
        figure.supxlabel("\n".join(told), x=0.01, ha="left", fontsize=8.5, color=FAINT)
        return svg(figure, "partition", " ".join(["How many records of which class each client holds.", *told]))


@dataclass(frozen=True)
class _Held:
    """What the clients that were read hold.

    Attributes:
        names: Of the clients.
        sizes: (clients,) records of each.
        classes: Names of the classes that are shown; empty if targets are no classes.
        counts: (clients, classes) records of each class that is shown.
        found: How many classes there are.
    """

    names: tuple[str, ...]
    sizes: npt.NDArray[np.int64]
    classes: tuple[str, ...]
    counts: npt.NDArray[np.int64]
    found: int

    @property
    def shares(self) -> npt.NDArray[np.float64]:
        """(clients, classes): the share of each class among a client's own records."""
        return np.asarray(self.counts / self.sizes[:, None])

    def left_out(self) -> list[str]:
        """Return the sentence about classes that are not shown, if there are some."""
        if len(self.classes) == self.found:
            return []
        return [f"Shown are the {len(self.classes)} most frequent of {self.found} classes."]


def _read(population: Population, most: int) -> _Held:
    read = min(most, len(population))
    # In whole numbers, so that no two places round to one.
    places = [place * len(population) // read for place in range(read)]
    sizes: list[int] = []
    found: list[dict[int, int]] = []
    declared: tuple[str, ...] | None = None
    for place in places:
        records = population.at(place)
        sizes.append(len(records))
        declared = declared or records.classes
        if not records.targets.is_floating_point():
            labels, counts = np.unique(records.targets.cpu().numpy(), return_counts=True)
            found.append(dict(zip(labels.tolist(), counts.tolist(), strict=True)))
    total: Counter[int] = Counter(dict.fromkeys(range(len(declared or ())), 0) if found else {})
    for client in found:
        total.update(client)
    shown = sorted(label for label, _ in total.most_common(MAX_CLASSES))
    return _Held(
        tuple(population.name_at(place) for place in places),
        np.array(sizes),
        tuple(declared[label] if declared and 0 <= label < len(declared) else str(label) for label in shown),
        np.array([[client.get(label, 0) for label in shown] for client in found]).reshape(read, len(shown)),
        len(total),
    )


def _check(population: object) -> None:
    if not isinstance(population, Population):
        kind = type(population).__name__
        raise InputError(f"population must be of type Population, not {kind}; make one with Population.of(clients).")


def _whom(read: int, clients: int) -> str:
    if read == clients:
        return "All clients." if clients > 1 else "The only client."
    return f"A sample of {read:,} of the {clients:,} clients, at even distances."


def _rows(held: _Held) -> Figure:
    rows = len(held.names)
    height = 2.1 + 0.19 * rows
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    if not held.classes:
        _size_bars(figure.add_subplot(), held, named=True)
        return figure
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    _size_bars(right, held, named=False)
    mesh = left.pcolormesh(held.shares, cmap=_SHARES, vmin=0, vmax=1, edgecolors="white", linewidth=0.4)
    left.set_yticks(np.arange(rows) + 0.5, [short(name, 24) for name in held.names], fontsize=8)
    _class_ticks(left, held.classes)
    left.tick_params(length=0)
    left.set_title("share of each class in a client's records")
    for side in left.spines.values():
        side.set_visible(False)
    # In shares of the figure: the bar is as thick and as far away however many clients there are.
    bar = figure.colorbar(
        mesh,
        ax=left,
        location="bottom",
        aspect=30,
        shrink=0.5,
        pad=0.1 / height,
        fraction=0.3 / height,
        ticks=[0, 0.5, 1],
    )
    bar.ax.set_xticklabels(["0 %", "50 %", "100 %"], fontsize=8)
    bar.outline.set_visible(False)
    return figure


def _size_bars(ax: Axes, held: _Held, *, named: bool) -> None:
    places = np.arange(len(held.names)) + 0.5
    ax.barh(places, held.sizes, height=0.7, color=_COLOUR)
    ax.set_ylim(len(held.names), 0)
    ax.set_title("records of a client")
    ax.xaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
    ax.grid(axis="x")
    ax.tick_params(axis="y", length=0, labelleft=named)
    if named:
        ax.set_yticks(places, [short(name, 24) for name in held.names], fontsize=8)


def _class_ticks(ax: Axes, classes: Sequence[str]) -> None:
    crowded = sum(len(short(name, 16)) + 2 for name in classes) > 56
    ax.set_xticks(
        np.arange(len(classes)) + 0.5,
        [short(name, 16) for name in classes],
        rotation=90 if crowded else 0,
        fontsize=8,
    )


def _spread(held: _Held) -> Figure:
    below = len(held.classes)
    figure = Figure(figsize=(_WIDTH, 3.2 + (0.7 + 0.24 * below if below else 0)), layout="constrained")
    if not below:
        _size_histogram(figure.add_subplot(), held)
        return figure
    top, bottom = figure.subplots(2, 1, height_ratios=(2.4, 0.6 + 0.24 * below))
    _size_histogram(top, held)
    shares = held.shares
    places = np.arange(below)
    low, first, middle, third, high = np.quantile(shares, (0.05, 0.25, 0.5, 0.75, 0.95), axis=0)
    bottom.hlines(places, low, high, color=_COLOUR, lw=1.2, alpha=0.6)
    bottom.hlines(places, first, third, color=_COLOUR, lw=5, alpha=0.45)
    bottom.plot(middle, places, ls="none", marker="o", ms=5.5, color=_COLOUR)
    overall = held.counts.sum(axis=0) / held.sizes.sum()
    bottom.plot(overall, places, ls="none", marker="|", ms=11, mew=1.6, color=LOOKS["federated"].colour)
    bottom.set_ylim(below - 0.5, -0.5)
    bottom.set_yticks(places, [short(name, 24) for name in held.classes], fontsize=8)
    bottom.tick_params(axis="y", length=0)
    bottom.set_title("share of each class in a client's records")
    percent_axis(bottom, [*low, *high, *overall])
    bottom.set_xlabel("dot: median client, thick: middle half, thin: 5th to 95th percentile, stroke: all records")
    return figure


def _size_histogram(ax: Axes, held: _Held) -> None:
    least, greatest = int(held.sizes.min()), int(held.sizes.max())
    # Bars of whole numbers of records, so that none looks empty for lack of a number within it.
    width = max(1, -(-(greatest - least + 1) // 30))
    edges = np.arange(least, greatest + width + 1, width) - 0.5
    ax.hist(held.sizes, bins=edges.tolist(), color=_COLOUR, edgecolor="white", linewidth=0.4)
    ax.set(title="how many records a client holds", xlabel="records", ylabel="clients")
    ax.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    ax.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    ax.grid(axis="y")
