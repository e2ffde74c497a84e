"""Each client's part in a federation: its records, its rounds and its accuracy, as SVG text. Made from private records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sfumato import _checks
from sfumato.errors import InputError
from sfumato.report.drawing import FAINT, LOOKS, drawing, percent_axis, svg
from sfumato.report.labels import short
from sfumato.report.partition_plots import MAX_ROWS, NOTE

_WIDTH: Final = 7.4
_BARS: Final = LOOKS["pooled"].colour
_SHARED: Final = LOOKS["federated"]
_OWN: Final = LOOKS["central"]


@final
@dataclass(frozen=True)
class ClientPart:
    """What one client held, did and got.

    Attributes:
        name: The client's.
        share: Of all records that it holds, in (0, 1].
        asked: In how many rounds it was asked.
        answered: In how many of these it answered.
        shared: Accuracy of the shared model on its records; None if there is none.
        own: Accuracy of its own model there; None if it has none.

    Raises:
        InputError: a number is out of range.
    """

    name: str
    share: float
    asked: int
    answered: int
    shared: float | None = None
    own: float | None = None

    def __post_init__(self) -> None:
        _checks.fraction("share", self.share, allow_one=True)
        _checks.count("answered", self.answered, minimum=0)
        _checks.count("asked", self.asked, minimum=self.answered)
        for name, score in (("shared", self.shared), ("own", self.own)):
            if score is not None:
                _checks.fraction(name, score, allow_zero=True, allow_one=True)


@final
@dataclass(frozen=True)
class ForOwner:
    """The part of a report that only the data's owner may see.

    Attributes:
        partition: The picture of who holds what, as `partition_figure` draws it.
        clients: The picture of each client's part, as `clients_figure` draws it.
        notes: Sentences below it.
    """

    partition: str
    clients: str
    notes: tuple[str, ...] = ()


def clients_figure(parts: Sequence[ClientPart], *, rounds: int, clients: int, scored_on: str) -> str:
    """Return a picture of each client's share of the records, of the rounds, and of how good the model is for it.

    Up to 60 clients have a row each; of more, histograms show how they spread. It shows private numbers as they are: it is for
    who may see the records, never for release.

    Args:
        parts: Of all clients or of a sample.
        rounds: How many there were.
        clients: How many clients there are.
        scored_on: What the accuracies were measured on, for example "its own test records".

    Raises:
        InputError: there is no part or no round, there are more parts than clients, or a client was asked more often than
            there were rounds.
    """
    if not 0 < len(parts) <= _checks.count("clients", clients):
        raise InputError(
            f"{len(parts)} parts of {clients} clients cannot be drawn; pass from one to one for each client."
        )
    _checks.count("rounds", rounds, minimum=max(1, *(part.asked for part in parts)))
    told = [_whom(len(parts), clients), *_measured(parts, scored_on), NOTE]
    with drawing():
        figure = _rows(parts, rounds) if len(parts) <= MAX_ROWS else _spread(parts, rounds)
        figure.suptitle("Each client's part", x=0.01, ha="left", fontsize=11)
        figure.supxlabel("\n".join(told), x=0.01, ha="left", fontsize=8.5, color=FAINT)
        what = "Each client's share of the records, the rounds it answered, and the accuracy on its records."
        return svg(figure, "clients", " ".join([what, *told]))


def _whom(drawn: int, clients: int) -> str:
    if drawn == clients:
        return f"All {clients:,} clients." if clients > 1 else "The only client."
    return f"A sample of {drawn:,} of the {clients:,} clients, at even distances."


def _measured(parts: Sequence[ClientPart], scored_on: str) -> list[str]:
    if not _has_scores(parts):
        return []
    return [f"The accuracy of a client was measured on {scored_on}."]


def _has_scores(parts: Sequence[ClientPart]) -> bool:
    return any(part.shared is not None or part.own is not None for part in parts)


def _rows(parts: Sequence[ClientPart], rounds: int) -> Figure:
    scored = _has_scores(parts)
    figure = Figure(figsize=(_WIDTH, 2.0 + 0.22 * len(parts)), layout="constrained")
    panels = figure.subplots(1, 2 + scored, sharey=True, squeeze=False)[0]
    places = np.arange(len(parts)) + 0.5
    panels[0].barh(places, [part.share for part in parts], height=0.7, color=_BARS)
    panels[0].set_title("share of the records")
    panels[0].set_yticks(places, [short(part.name, 24) for part in parts], fontsize=8)
    _whole_percent(panels[0], max(part.share for part in parts))
    panels[1].barh(places, [part.asked / rounds for part in parts], height=0.7, color=_BARS, alpha=0.3)
    panels[1].barh(places, [part.answered / rounds for part in parts], height=0.7, color=_BARS)
    panels[1].set_title("rounds answered\n(pale: asked)")
    _whole_percent(panels[1], max(1 / rounds, *(part.asked / rounds for part in parts)))
    if scored:
        _dots(panels[2], parts)
    for panel in panels:
        panel.set_ylim(len(parts), 0)
        panel.tick_params(axis="y", length=0)
        panel.tick_params(axis="x", labelsize=8)
    return figure


def _dots(panel: Axes, parts: Sequence[ClientPart]) -> None:
    found = [score for part in parts for score in (part.shared, part.own) if score is not None]
    for y, part in enumerate(parts):
        for score, look in ((part.shared, _SHARED), (part.own, _OWN)):
            if score is not None:
                panel.plot(score, y + 0.5, ls="none", marker=look.marker, ms=5.5, color=look.colour)
    panel.set_title(_accuracy_of(parts))
    percent_axis(panel, found)


def _accuracy_of(parts: Sequence[ClientPart]) -> str:
    marks = {"square: shared": [part.shared for part in parts], "diamond: own": [part.own for part in parts]}
    shown = [words for words, scores in marks.items() if any(score is not None for score in scores)]
    return "accuracy (" + ",\n".join(shown) + ")"


def _whole_percent(panel: Axes, most: float) -> None:
    """Make an axis of shares begin at 0 and hold the largest of them."""
    percent_axis(panel, [0.0, most])
    panel.set_xlim(0, min(1.0, 1.08 * most) if most > 0.5 else 1.08 * most)


def _spread(parts: Sequence[ClientPart], rounds: int) -> Figure:
    scored = _has_scores(parts)
    figure = Figure(figsize=(_WIDTH, 2.2 * (2 + scored) + 0.6), layout="constrained")
    panels = figure.subplots(2 + scored, 1, squeeze=False)[:, 0]
    panels[0].hist([100 * part.share for part in parts], bins=30, color=_BARS, edgecolor="white", linewidth=0.4)
    panels[0].set(title="share of the records that a client holds", xlabel="%")
    most = max(1, *(part.asked for part in parts))
    # Bars of whole rounds, so that none looks empty for lack of a number within it.
    width = max(1, -(-(most + 1) // 30))
    edges = (np.arange(0, most + width + 1, width) - 0.5).tolist()
    panels[1].hist([part.asked for part in parts], bins=edges, color=_BARS, alpha=0.3)
    panels[1].hist([part.answered for part in parts], bins=edges, histtype="step", color=_BARS, linewidth=1.6)
    panels[1].set(title="rounds that a client answered (pale: was asked)", xlabel=f"of {rounds:,} rounds")
    panels[1].xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    if scored:
        models = {"shared model": [part.shared for part in parts], "own model": [part.own for part in parts]}
        for (words, scores), look in zip(models.items(), (_SHARED, _OWN), strict=True):
            found = [100 * score for score in scores if score is not None]
            if found:
                edges = np.linspace(0, 100, 26).tolist()
                panels[2].hist(found, edges, histtype="step", linewidth=1.6, color=look.colour, label=words)
        panels[2].set(title="accuracy on a client's records", xlabel="%")
        panels[2].legend(frameon=False, fontsize=8, loc="upper left")
    for panel in panels:
        panel.set_ylabel("clients")
        panel.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
        panel.grid(axis="y")
    return figure
