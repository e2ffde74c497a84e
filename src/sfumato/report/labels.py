"""Labels in the right margin of a plot, beside the lines they name, so that none lies on another."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from matplotlib.axes import Axes

LINE_HEIGHT: Final = 13.0
AXES_SHARE: Final = 0.8


@dataclass(frozen=True)
class Label:
    """What a line at the height `at` (in data) is called; one row of text for each name."""

    at: float
    names: tuple[str, ...]
    colour: str


def short(text: str, limit: int = 34) -> str:
    """Return the text, cut to `limit` characters with an ellipsis if it is longer."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def height_for(labels: Iterable[Label], least: float = 3.8) -> float:
    """Return the height in inches of a figure whose axes have room for every label."""
    rows = sum(len(label.names) for label in labels)
    return max(least, rows * LINE_HEIGHT / 72 / AXES_SHARE)


def spread(wanted: Sequence[float], heights: Sequence[float], low: float, high: float) -> list[float]:
    """Return the centres of labels: as near to the wanted ones (least squares) as labels that do not overlap can be.

    The order is kept, and all labels lie whole in [low, high]; if there is no room for that, the heights
    shrink alike. A cluster of labels stays centred on its lines.
    """
    room = high - low
    scale = min(1.0, room / sum(heights)) if heights else 1.0
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    sizes = [heights[i] * scale for i in order]
    bases = list(accumulate(sizes, initial=0.0))
    offsets = [base + size / 2 for base, size in zip(bases[:-1], sizes, strict=True)]
    # Less its own offset, a label may lie anywhere not below the one before: an isotonic regression.
    blocks: list[tuple[float, int]] = []
    for i, offset in zip(order, offsets, strict=True):
        mean, count = wanted[i] - offset, 1
        while blocks and blocks[-1][0] > mean:
            before, members = blocks.pop()
            mean, count = (before * members + mean * count) / (members + count), members + count
        blocks.append((mean, count))
    ceiling = max(low, high - bases[-1])
    shifts = [min(max(mean, low), ceiling) for mean, count in blocks for _ in range(count)]
    placed = [0.0] * len(wanted)
    for i, shift, offset in zip(order, shifts, offsets, strict=True):
        placed[i] = shift + offset
    return placed


def label_right(ax: Axes, labels: Sequence[Label]) -> None:
    """Write each label to the right of the axes, with a thin line to the height that it names."""
    low, high = ax.get_ylim()
    points = ax.get_figure(root=True).get_figheight() * 72 * AXES_SHARE  # type: ignore[union-attr]
    heights = [len(label.names) * LINE_HEIGHT * (high - low) / points for label in labels]
    places = spread([label.at for label in labels], heights, low, high)
    for label, y in zip(labels, places, strict=True):
        ax.annotate(
            "\n".join(short(name) for name in label.names),
            (1, label.at),
            xycoords=("axes fraction", "data"),
            xytext=(1.05, y),
            textcoords=("axes fraction", "data"),
            va="center",
            linespacing=1.2,
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
