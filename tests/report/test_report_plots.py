from __future__ import annotations

import itertools
import xml.etree.ElementTree as ET
from collections.abc import Callable
from typing import Any

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_study import risk
from matplotlib.figure import Figure

from sfumato.report import Privacy, Result, plots
from sfumato.report.drawing import INK, look_of, percent_axis

SVG = "{http://www.w3.org/2000/svg}"
ALL = [
    plots.epsilon_over_steps,
    plots.noise_over_steps,
    plots.accuracy_by_run,
    plots.accuracy_over_epsilon,
    plots.accuracy_by_owner,
    plots.trade_off,
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


def curves_of(svg: str | None) -> list[str]:
    """Return the paths of the curves: drawn through more points than a grid line or a tick."""
    assert svg is not None
    paths = [e.get("d", "") for e in ET.fromstring(svg).iter(f"{SVG}path") if e.get("clip-path")]
    return [path for path in paths if path.count("L") > 2]


def test_runs_that_spend_alike_share_one_line_and_one_label(result: Result) -> None:
    svg = plots.epsilon_over_steps(result)
    curves = curves_of(svg)
    assert len(curves) == len(set(curves)) == 3
    assert [texts(svg).count(run.name) for run in result.private_runs] == [1] * 6


@pytest.mark.parametrize(("change", "lines"), [(1e-6, 3), (0.1, 4)])
def test_only_a_difference_that_can_be_seen_parts_two_lines(mapping: dict[str, Any], change: float, lines: int) -> None:
    points = mapping["curves"]["epsilon_over_steps"]["federated, epsilon 1"]
    points[10][1] -= change
    assert len(curves_of(plots.epsilon_over_steps(Result.model_validate(mapping)))) == lines


def test_noise_and_what_is_left_stand_above_each_other_with_every_run_named(result: Result) -> None:
    svg = plots.noise_over_steps(result)
    assert {"noise multiplier", "budget left"} <= set(texts(svg))
    assert {run.name for run in result.private_runs} <= set(texts(svg))
    assert len(curves_of(svg)) == 2 * 3


def test_runs_that_differ_only_in_what_is_left_have_lines_of_their_own(mapping: dict[str, Any]) -> None:
    for point in mapping["curves"]["left_over_steps"]["federated, epsilon 1"]:
        point[1] /= 2
    assert len(curves_of(plots.noise_over_steps(Result.model_validate(mapping)))) == 2 * 4


def test_one_kind_keeps_its_colour_and_a_mixture_gets_a_neutral_one(result: Result) -> None:
    by_name = {run.name: run for run in result.runs}
    pooled, again, other = (by_name[name] for name in ("pooled", "pooled, epsilon 1", "federated"))
    assert look_of([pooled, again]) == look_of([pooled]) != look_of([other])
    assert look_of([pooled, other]).colour == INK


def test_every_run_is_shown_with_its_mean(result: Result) -> None:
    shown = texts(plots.accuracy_by_run(result))
    assert {run.name for run in result.runs} <= set(shown)
    assert {"74.2 %", "83.1 %", "77.0 %"} <= set(shown)


def test_accuracy_over_epsilon_shows_the_reference_without_privacy(result: Result) -> None:
    shown = texts(plots.accuracy_over_epsilon(result))
    assert {"pooled-private", "federated-private", "pooled (no privacy)", "federated (no privacy)"} <= set(shown)
    assert {"0.5", "1", "3"} <= set(shown)


def dashed_lines(svg: str | None) -> int:
    assert svg is not None
    return sum("dasharray" in e.get("style", "") for e in ET.fromstring(svg).iter(f"{SVG}path"))


@pytest.mark.parametrize(("federated", "lines"), [(0.8312, 2), (0.8274, 3)])
def test_references_that_came_out_alike_share_one_line(mapping: dict[str, Any], federated: float, lines: int) -> None:
    mapping["runs"][5]["metrics"]["accuracy"]["mean"] = federated
    assert mapping["runs"][5]["name"] == "federated"
    svg = plots.accuracy_over_epsilon(Result.model_validate(mapping))
    assert dashed_lines(svg) == lines
    assert [texts(svg).count(f"{name} (no privacy)") for name in ("alone", "pooled", "federated")] == [1, 1, 1]


@pytest.mark.parametrize("plot", [plots.epsilon_over_steps, plots.accuracy_over_epsilon])
@pytest.mark.parametrize("apart", [0.0, 0.0005, 0.004])
def test_no_label_lies_on_another(mapping: dict[str, Any], plot: Plot, apart: float) -> None:
    for i, run in enumerate(mapping["runs"]):
        run["metrics"]["accuracy"]["mean"] = 0.8 + apart * i
    for i, points in enumerate(mapping["curves"]["epsilon_over_steps"].values()):
        points[:] = [[step, step / 10 * (1 + apart * i)] for step, _ in points]
    svg = plot(Result.model_validate(mapping))
    names = {run["name"] for run in mapping["runs"]} | {run["mode"] for run in mapping["runs"]}
    heights = sorted(
        float(e.get("y") or e.get("transform", "").partition("translate(")[2].partition(")")[0].split()[1])
        for e in ET.fromstring(svg or "").iter(f"{SVG}text")
        if "".join(e.itertext()).removesuffix(" (no privacy)") in names
    )
    assert len(heights) >= 5
    # The letters are 9.5 points high.
    assert min(b - a for a, b in itertools.pairwise(heights)) > 9.5


def test_every_owner_has_a_panel(result: Result) -> None:
    assert set(result.owners) <= set(texts(plots.accuracy_by_owner(result)))


def panels_of(svg: str | None) -> list[tuple[float, float, list[float]]]:
    """Return left edge, right edge and the centres of the marks of every panel, in points."""
    root = ET.fromstring(svg or "")
    boxes = {}
    for clip in root.iter(f"{SVG}clipPath"):
        (box,) = clip
        boxes[f"url(#{clip.get('id')})"] = (float(box.get("x", "")), float(box.get("width", "")))
    marks: dict[str, list[float]] = {}
    for group in root.iter(f"{SVG}g"):
        box_name = group.get("clip-path")
        if box_name:
            marks.setdefault(box_name, []).extend(float(use.get("x", "")) for use in group.iter(f"{SVG}use"))
    return [(boxes[name][0], sum(boxes[name]), found) for name, found in marks.items()]


@pytest.mark.parametrize("shares", [(0.7402, 0.9206), (0.0, 1.0), (1.0, 1.0), (0.5, 0.52)])
@pytest.mark.parametrize("owners", [1, 4, 5, 12])
def test_no_mark_touches_the_edge_of_its_panel(
    mapping: dict[str, Any], shares: tuple[float, float], owners: int
) -> None:
    for i, run in enumerate(mapping["runs"]):
        run["metrics"]["accuracy"]["per_owner"] = {f"bank {k}": shares[(i + k) % 2] for k in range(owners)}
    panels = panels_of(plots.accuracy_by_owner(Result.model_validate(mapping)))
    assert len(panels) == owners
    for left, right, marks in panels:
        assert len(marks) == 9
        # A mark is 6.5 points wide, and its edge 1.4.
        assert left + 4 < min(marks)
        assert max(marks) < right - 4


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_a_percent_axis_has_four_to_six_ticks_and_none_beyond_its_ends(values: list[float]) -> None:
    ax = Figure().add_subplot()
    percent_axis(ax, values)
    low, high = ax.get_xlim()
    ticks = list(ax.xaxis.get_majorticklocs())
    assert low < min(values) <= max(values) < high
    assert 4 <= len(ticks) <= 6
    assert all(max(low, 0) - 1e-9 <= tick <= min(high, 1) + 1e-9 for tick in ticks)
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert max(steps) - min(steps) < 1e-9
    assert all(float(f"{100 * tick:.3g}") == pytest.approx(100 * tick) for tick in ticks)


def test_every_panel_of_one_line_has_its_numbers(mapping: dict[str, Any]) -> None:
    four = texts(plots.accuracy_by_owner(Result.model_validate(mapping)))
    assert four.count("80") == 4
    for run in mapping["runs"]:
        owners = run["metrics"]["accuracy"]["per_owner"]
        owners["toledo"] = owners["cleveland"]
    five = texts(plots.accuracy_by_owner(Result.model_validate(mapping)))
    # Toledo stands below Cleveland; the other three have nothing below them.
    assert five.count("80") == 4


def test_many_owners_share_one_panel(mapping: dict[str, Any]) -> None:
    for run in mapping["runs"]:
        run["metrics"]["accuracy"]["per_owner"] = {f"bank {i}": 0.5 + i / 200 for i in range(60)}
    shown = texts(plots.accuracy_by_owner(Result.model_validate(mapping)))
    assert not any(text.startswith("bank") for text in shown)
    assert any("light dots: owners" in text for text in shown)


def test_without_numbers_there_are_no_plots(single: dict[str, Any]) -> None:
    result = Result.model_validate(single)
    assert [plot(result) for plot in ALL] == [None] * 6


def test_one_seed_without_spread_and_one_point_are_drawn(single: dict[str, Any]) -> None:
    single["runs"][0]["metrics"] = {"accuracy": {"mean": 1.0, "sd": 0.0, "seeds": 1, "per_owner": {"a": 1.0}}}
    single["curves"] = {
        "epsilon_over_steps": {"only": [[0, 0.0]]},
        "noise_over_steps": {"only": [[1, 2.0]]},
        "left_over_steps": {"only": [[1, 0.5]]},
    }
    result = Result.model_validate(single)
    assert [plot(result) is None for plot in ALL] == [False, False, True, True, False, True]
    single["runs"].append(single["runs"][0] | {"name": "plain", "mode": "central", "privacy": None})
    single["runs"][0]["privacy"]["risk"] = risk()
    result = Result.model_validate(single)
    assert all(plot(result) for plot in ALL)


def test_promises_that_mean_the_same_share_one_line_and_the_weakest_is_told(result: Result) -> None:
    svg = plots.trade_off(result)
    shown = texts(svg)
    lines = [path for path in curves_of(svg) if path.count("L") > 20]
    assert len(lines) == len(set(lines)) == 3
    assert [shown.count(run.name) for run in result.private_runs] == [1] * 6
    # At epsilon 3 alone, delta + 0.01 e^3.
    assert {"1 % named wrongly:", "at most 20.1 % found", "guessing"} <= set(shown)


def test_a_weaker_promise_lies_lower(result: Result) -> None:
    def heights(promise: Privacy | None) -> list[float]:
        assert promise is not None
        assert promise.risk is not None
        return [missed for _, missed in promise.risk.curve]

    strict, middle, loose = (heights(run.privacy) for run in result.private_runs[:3])
    assert all(a >= b >= c for a, b, c in zip(strict, middle, loose, strict=True))
    assert strict != middle != loose


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "$\\frac{", 'url(#x" id="y', "_hidden", "日本", "a" * 200, "%s {0}"]
)
def test_a_strange_name_stays_text(mapping: dict[str, Any], name: str) -> None:
    old = mapping["runs"][2]["name"]
    mapping["runs"][2]["name"] = name
    for curves in mapping["curves"].values():
        curves[name] = curves.pop(old)
    result = Result.model_validate(mapping)
    for plot in (
        plots.epsilon_over_steps,
        plots.noise_over_steps,
        plots.accuracy_by_run,
        plots.accuracy_by_owner,
        plots.trade_off,
    ):
        svg = plot(result)
        assert any(text.rstrip("…") and name.startswith(text.rstrip("…")) for text in texts(svg))
        assert "<script" not in (svg or "")
