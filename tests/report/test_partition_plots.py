"""Pictures of who holds what: right numbers, closed in themselves, honest about samples and about privacy."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.data import partitions
from sfumato.data.population import Population
from sfumato.data.records import Records
from sfumato.errors import InputError
from sfumato.report import partition_plots
from sfumato.report.partition_plots import MAX_CLASSES, MAX_ROWS, NOTE, partition_figure

SVG = "{http://www.w3.org/2000/svg}"


def texts(svg: str) -> list[str]:
    return ["".join(element.itertext()) for element in ET.fromstring(svg).iter(f"{SVG}text")]


def records(n: int = 1_200, classes: int = 4) -> Records:
    generator = torch.Generator().manual_seed(0)
    return Records(torch.zeros(n, 1), torch.randint(0, classes, (n,), generator=generator))


def some(targets: list[int] | list[float], **declared: list[str]) -> Records:
    return Records.from_arrays([[0.0]] * len(targets), targets, **declared)  # type: ignore[arg-type]


FEW = partitions.dirichlet(records(), 6, 0.5, 0)
MANY = partitions.quantity(records(), MAX_ROWS + 1, 1.0, 0)
NUMBERS = Population.of({"east": some([0.5, 1.5]), "west": some([0.5])})
MANY_NUMBERS = Population.from_factory(MAX_ROWS + 1, lambda i: some([float(i)] * (i + 1)))


@pytest.mark.parametrize(
    "population", [FEW, MANY, NUMBERS, MANY_NUMBERS], ids=["few", "many", "numbers", "many numbers"]
)
def test_a_picture_is_valid_closed_in_itself_and_says_what_it_is(population: Population) -> None:
    svg = partition_figure(population)
    assert svg == partition_figure(population)
    root = ET.fromstring(svg)
    assert root.get("role") == "img"
    assert NOTE in (root.get("aria-label") or "")
    assert not {element.tag.removeprefix(SVG) for element in root.iter()} & {"metadata", "style", "script", "image"}
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    links = [value for element in root.iter() for key, value in element.attrib.items() if key.endswith("href")]
    assert len(ids) == len(set(ids))
    assert all(link.startswith("#partition-") and link[1:] in ids for link in links)
    found = texts(svg)
    assert "Who holds what" in found
    assert any(NOTE in text for text in found)
    assert any("All clients." in text for text in found)


def test_each_of_a_few_clients_has_a_row() -> None:
    named = Population.of(
        {"east $x": some([0, 1], classes=["well", "ill"]), "a" * 50: some([1], classes=["well", "ill"])}
    )
    found = texts(partition_figure(named))
    assert {"east $x", f"{'a' * 23}…", "well", "ill", "records of a client"} <= set(found)


def test_many_clients_are_shown_by_their_spread() -> None:
    found = texts(partition_figure(MANY))
    assert "how many records a client holds" in found
    assert not [text for text in found if text.startswith("client-")]


@pytest.mark.parametrize("population", [NUMBERS, MANY_NUMBERS])
def test_targets_that_are_no_classes_show_sizes_alone(population: Population) -> None:
    assert not [text for text in texts(partition_figure(population)) if "share of each class" in text]


def test_a_sample_is_at_even_distances_reads_each_client_once_and_is_told() -> None:
    made: list[int] = []

    def make(index: int) -> Records:
        made.append(index)
        return some([index % 2])

    svg = partition_figure(Population.from_factory(1_000_000, make), most=100)
    assert made == list(range(0, 1_000_000, 10_000))
    assert any("A sample of 100 of the 1,000,000 clients, at even distances." in text for text in texts(svg))


@settings(deadline=None)
@given(st.integers(1, 50), st.integers(1, 60))
def test_a_sample_has_no_client_twice(clients: int, most: int) -> None:
    made: list[int] = []
    population = Population.from_factory(clients, lambda i: (made.append(i), some([0]))[1])  # type: ignore[func-returns-value]
    held = partition_plots._read(population, most)
    assert len(made) == len(set(made)) == len(held.names) == min(clients, most)


def test_the_numbers_that_are_drawn() -> None:
    clients = {"a": some([0, 0, 2, -7]), "b": some([2])}
    held = partition_plots._read(Population.of(clients), 10)
    assert held.names == ("a", "b")
    assert held.sizes.tolist() == [4, 1]
    assert held.classes == ("-7", "0", "2")
    assert held.counts.tolist() == [[1, 2, 1], [0, 0, 1]]
    assert held.shares.tolist() == [[0.25, 0.5, 0.25], [0, 0, 1]]


def test_a_declared_class_that_nobody_holds_is_shown() -> None:
    held = partition_plots._read(Population.of({"a": some([0], classes=["well", "ill"])}), 1)
    assert held.classes == ("well", "ill")
    assert held.counts.tolist() == [[1, 0]]


def test_of_many_classes_the_most_frequent_are_shown_and_it_is_told() -> None:
    targets = [*range(MAX_CLASSES + 10), *range(10, MAX_CLASSES + 10)]
    population = Population.of({"a": some(targets)})
    held = partition_plots._read(population, 1)
    assert held.classes == tuple(str(label) for label in range(10, MAX_CLASSES + 10))
    assert (held.shares.sum(1) < 1).all()
    assert np.isclose(held.shares.sum(), 2 * MAX_CLASSES / len(targets))
    told = "Shown are the 30 most frequent of 40 classes."
    assert any(told in text for text in texts(partition_figure(population)))


@pytest.mark.parametrize("sizes", [[5] * 100, [1] * 99 + [100_000], list(range(1, 101))])
def test_every_client_is_in_one_bar(sizes: list[int]) -> None:
    bars: list[float] = []
    population = Population.from_factory(len(sizes), lambda i: Records(torch.zeros(sizes[i], 1), torch.zeros(sizes[i])))

    class Axes:
        xaxis = yaxis = type("Axis", (), {"set_major_locator": lambda self, _: None})()

        def hist(self, values: np.ndarray, bins: list[float], **_: object) -> None:
            bars.extend(np.histogram(values, bins)[0])
            assert len(bins) <= 32

        def set(self, **_: object) -> None: ...

        def grid(self, **_: object) -> None: ...

    partition_plots._size_histogram(Axes(), partition_plots._read(population, 1_000))  # type: ignore[arg-type]
    assert sum(bars) == len(sizes)


@pytest.mark.parametrize("wrong", [{"a": some([0])}, None, Population])
def test_what_is_no_population_is_refused(wrong: object) -> None:
    with pytest.raises(InputError, match=r"population must be of type Population.*Population\.of"):
        partition_figure(wrong)  # type: ignore[arg-type]


def test_most_is_a_whole_number() -> None:
    with pytest.raises(InputError, match="most must be a whole number"):
        partition_figure(FEW, most=0)
