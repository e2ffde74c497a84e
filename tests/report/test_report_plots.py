from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.report import Result, plots

SVG = "{http://www.w3.org/2000/svg}"
ALL = [
    plots.epsilon_over_steps,
    plots.accuracy_by_run,
    plots.accuracy_over_epsilon,
    plots.accuracy_by_owner,
]
Plot = Callable[[Result], str | None]


def texts(svg: str | None) -> list[str]:
    assert svg is not None
    return ["".join(element.itertext()) for element in ET.fromstring(svg).iter(f"{SVG}text")]


@pytest.mark.parametrize("plot", ALL)
def test_a_plot_is_valid_and_closed_in_itself(result: Result, plot: Plot) -> None:
    svg = plot(result)
    assert svg is not None
    root = ET.fromstring(svg)
    assert root.tag == f"{SVG}svg"
    assert root.get("role") == "img"
    assert root.get("aria-label")
    tags = {element.tag.removeprefix(SVG) for element in root.iter()}
    assert not tags & {"metadata", "style", "script", "image", "foreignObject"}
    links = [v for e in root.iter() for k, v in e.attrib.items() if k.endswith("href")]
    ids = {e.get("id") for e in root.iter() if e.get("id")}
    assert links
    assert all(link.startswith("#") and link[1:] in ids for link in links)


def test_ids_of_all_plots_are_distinct(result: Result) -> None:
    ids = [e.get("id") for plot in ALL for e in ET.fromstring(plot(result) or "").iter() if e.get("id")]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("plot", ALL)
def test_the_same_result_gives_the_same_plot(result: Result, plot: Plot) -> None:
    first = plot(result)
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "axes.facecolor": "red"}):
        assert plot(result) == first


def test_every_run_and_its_budget_is_labelled(result: Result) -> None:
    shown = texts(plots.epsilon_over_steps(result))
    assert {run.name for run in result.private_runs} <= set(shown)
    assert {"budget 0.5", "budget 1", "budget 3"} <= set(shown)


def test_every_run_is_shown_with_its_mean(result: Result) -> None:
    shown = texts(plots.accuracy_by_run(result))
    assert {run.name for run in result.runs} <= set(shown)
    assert {"74.2 %", "83.1 %", "77.0 %"} <= set(shown)


def test_accuracy_over_epsilon_shows_the_reference_without_privacy(result: Result) -> None:
    shown = texts(plots.accuracy_over_epsilon(result))
    assert {"pooled-private", "federated-private", "pooled (no privacy)", "federated (no privacy)"} <= set(shown)
    assert {"0.5", "1", "3"} <= set(shown)


def test_every_owner_has_a_panel(result: Result) -> None:
    assert set(result.owners) <= set(texts(plots.accuracy_by_owner(result)))


def test_many_owners_share_one_panel(mapping: dict[str, Any]) -> None:
    for run in mapping["runs"]:
        run["metrics"]["accuracy"]["per_owner"] = {f"bank {i}": 0.5 + i / 200 for i in range(60)}
    shown = texts(plots.accuracy_by_owner(Result.model_validate(mapping)))
    assert not any(text.startswith("bank") for text in shown)
    assert any("light dots: owners" in text for text in shown)


def test_without_numbers_there_are_no_plots(single: dict[str, Any]) -> None:
    result = Result.model_validate(single)
    assert [plot(result) for plot in ALL] == [None] * 4


def test_one_seed_without_spread_and_one_point_are_drawn(single: dict[str, Any]) -> None:
    single["runs"][0]["metrics"] = {"accuracy": {"mean": 1.0, "sd": 0.0, "seeds": 1, "per_owner": {"a": 1.0}}}
    single["curves"] = {"epsilon_over_steps": {"only": [[0, 0.0]]}}
    result = Result.model_validate(single)
    assert [plot(result) is None for plot in ALL] == [False, True, True, False]
    single["runs"].append(single["runs"][0] | {"name": "plain", "mode": "central", "privacy": None})
    result = Result.model_validate(single)
    assert all(plot(result) for plot in ALL)


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "$\\frac{", 'url(#x" id="y', "_hidden", "日本", "a" * 200, "%s {0}"]
)
def test_a_strange_name_stays_text(mapping: dict[str, Any], name: str) -> None:
    old = mapping["runs"][2]["name"]
    mapping["runs"][2]["name"] = name
    curves = mapping["curves"]["epsilon_over_steps"]
    curves[name] = curves.pop(old)
    result = Result.model_validate(mapping)
    for plot in (plots.epsilon_over_steps, plots.accuracy_by_run, plots.accuracy_by_owner):
        svg = plot(result)
        assert any(text.rstrip("…") and name.startswith(text.rstrip("…")) for text in texts(svg))
        assert "<script" not in (svg or "")


@given(st.lists(st.floats(-1, 2), min_size=1, max_size=12), st.floats(0.001, 0.3))
def test_spread_labels_keep_their_order_and_distance(positions: list[float], gap: float) -> None:
    low, high = 0.0, 1.0
    placed = plots.spread(positions, gap, low, high)
    room = min(gap, (high - low) / max(1, len(positions) - 1))
    ordered = sorted(placed)
    assert all(b - a >= room - 1e-9 for a, b in itertools.pairwise(ordered))
    assert all(low - 1e-9 <= y <= high + 1e-9 for y in placed)
    for i, a in enumerate(positions):
        for j, b in enumerate(positions):
            assert a >= b or placed[i] < placed[j]


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8, unique=True))
def test_labels_with_room_stay_where_they_are(cells: list[int]) -> None:
    positions = [cell / 50 for cell in cells]
    assert plots.spread(positions, 0.0199, 0.0, 1.0) == positions
