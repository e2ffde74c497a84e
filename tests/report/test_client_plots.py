"""Pictures of each client's part: right numbers, closed in themselves, marked for the owner, and only on the page if given."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from sfumato.data import partitions
from sfumato.data.population import Population
from sfumato.data.records import Records
from sfumato.errors import InputError
from sfumato.report import Result, render
from sfumato.report import client_plots as plots
from sfumato.report.client_plots import ClientPart, ForOwner, clients_figure
from sfumato.report.describe import parts_of, rights_of
from sfumato.report.partition_plots import NOTE, partition_figure

SVG = "{http://www.w3.org/2000/svg}"
FEW = [
    ClientPart("north $x", 0.75, 10, 8, 0.9, 0.95),
    ClientPart("s" * 50, 0.25, 10, 0, 0.4),
]
MANY = [ClientPart(f"c{i}", 1 / 200, i % 8, i % 8 // 2, i % 11 / 10) for i in range(200)]


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ET.fromstring(svg).iter(f"{SVG}text")]


def picture(parts: list[ClientPart], rounds: int = 10, clients: int | None = None) -> str:
    return clients_figure(parts, rounds=rounds, clients=clients or len(parts), scored_on="its test records")


def bare(parts: list[ClientPart]) -> list[ClientPart]:
    return [ClientPart(part.name, part.share, part.asked, part.answered) for part in parts]


@pytest.mark.parametrize(
    "parts",
    [FEW, MANY, bare(FEW), bare(MANY), [ClientPart("x", 1.0, 0, 0)]],
    ids=["few", "many", "few, no scores", "many, no scores", "never asked"],
)
def test_a_picture_is_valid_closed_in_itself_and_says_whom_it_is_for(parts: list[ClientPart]) -> None:
    svg = picture(parts)
    assert svg == picture(parts)
    root = ET.fromstring(svg)
    assert root.get("role") == "img"
    assert NOTE in (root.get("aria-label") or "")
    assert any(NOTE in text for text in texts(svg))
    assert not {element.tag.removeprefix(SVG) for element in root.iter()} & {"metadata", "style", "script", "image"}
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    links = [value for element in root.iter() for key, value in element.attrib.items() if key.endswith("href")]
    assert len(ids) == len(set(ids))
    assert all(link.startswith("#clients-") and link[1:] in ids for link in links)
    scored = any(part.shared is not None for part in parts)
    assert any("its test records" in text for text in texts(svg)) == scored


def test_each_of_a_few_clients_has_a_row_and_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "svg", lambda figure, *_: drawn.append(figure) or "")
    picture(FEW)
    shares, rounds, scores = drawn[0].axes
    assert [label.get_text() for label in shares.get_yticklabels()] == ["north $x", f"{'s' * 23}…"]
    assert [bar.get_width() for bar in shares.patches] == [0.75, 0.25]
    assert [bar.get_width() for bar in rounds.patches] == [1.0, 1.0, 0.8, 0.0]
    dots = {(line.get_marker(), line.get_xdata()[0], line.get_ydata()[0]) for line in scores.lines}  # type: ignore[index]
    assert dots == {("s", 0.9, 0.5), ("D", 0.95, 0.5), ("s", 0.4, 1.5)}
    for panel in drawn[0].axes:
        low, high = panel.get_xlim()
        widths = [bar.get_width() for bar in panel.patches]
        assert low <= 0.4
        assert all(width <= high for width in widths)


def test_no_bar_of_many_clients_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Figure] = []
    monkeypatch.setattr(plots, "svg", lambda figure, *_: drawn.append(figure) or "")
    picture(MANY)
    shares, rounds, _ = drawn[0].axes
    assert sum(bar.get_height() for bar in shares.patches) == 200
    asked = [bar.get_height() for bar in rounds.patches if isinstance(bar, Rectangle)]
    assert asked == [25] * 8  # clients asked in 0, ..., 7 rounds


def test_a_sample_says_so() -> None:
    words = "A sample of 200 of the 5,000 clients, at even distances."
    assert any(words in text for text in texts(picture(MANY, clients=5_000)))
    assert not any("sample" in text for text in texts(picture(MANY)))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: picture([], clients=1), "0 parts of 1 clients"),
        (lambda: picture(FEW, clients=1), "2 parts of 1 clients"),
        (lambda: picture(FEW, rounds=9), "rounds must be a whole number of at least 10"),
        (lambda: ClientPart("x", 0.0, 1, 1), "share"),
        (lambda: ClientPart("x", float("nan"), 1, 1), "share"),
        (lambda: ClientPart("x", 0.5, 1, 2), "asked"),
        (lambda: ClientPart("x", 0.5, 1, -1), "answered"),
        (lambda: ClientPart("x", 0.5, 1, 1, 1.5), "shared"),
        (lambda: ClientPart("x", 0.5, 1, 1, None, float("nan")), "own"),
    ],
)
def test_what_cannot_be_is_refused(call: object, words: str) -> None:
    with pytest.raises(InputError, match=words):
        call()  # type: ignore[operator]


def records(n: int) -> Records:
    return Records(torch.eye(3).repeat(n, 1), torch.arange(3).repeat(n), classes=("a", "b", "c"))


def test_parts_are_what_the_clients_hold_and_did() -> None:
    held = records(4)
    population = Population.of({"big": held.select(torch.arange(9)), "small": held.select(torch.arange(9, 12))})
    parts = parts_of(population, 12, {"big": 3}, {"big": 2}, lambda name, own: (0.5, len(own) / 9))
    assert parts == [ClientPart("big", 0.75, 3, 2, 0.5, 1.0), ClientPart("small", 0.25, 0, 0, 0.5, 1 / 3)]


def test_of_many_clients_a_sample_is_made_and_no_more() -> None:
    made: list[int] = []

    def make(index: int) -> Records:
        made.append(index)
        return records(1)

    parts = parts_of(Population.from_factory(10_000, make), 30_000, {}, {}, lambda *_: (None, None))
    assert made == list(range(0, 10_000, 5))
    assert len({part.name for part in parts}) == 2_000


def test_a_model_is_scored_on_every_record_and_left_as_it_was() -> None:
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Dropout(0.9))
    held = records(700)
    right = rights_of(model, held)  # in training mode most features would be dropped
    assert right.shape == (2_100,)
    assert bool(right.all())
    assert model.training
    wrong = Records(held.features, (held.targets + (torch.arange(2_100) >= 2_000)) % 3, classes=held.classes)
    assert torch.equal(rights_of(model, wrong), torch.arange(2_100) < 2_000)


def test_only_a_page_that_is_given_the_pictures_has_them(result: Result) -> None:
    clients = partitions.iid(records(20), 6, 0)
    owner = ForOwner(partition_figure(clients), picture(FEW), ("Left out: <3>.",))
    plain, page = render(result), render(result, owner)
    for heading in ("<h2>Who holds what</h2>", "<h2>Each client’s part</h2>"):
        assert heading in page
        assert heading not in plain
    assert NOTE not in plain
    assert "not covered by the budget" in page.split("<h2>Who holds what</h2>")[1].split("<figure>")[0]
    assert "Left out: &lt;3&gt;." in page
    assert owner.partition in page
    assert owner.clients in page
    assert render(result, None) == plain
