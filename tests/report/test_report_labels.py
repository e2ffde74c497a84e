from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sfumato.report.labels import AXES_SHARE, LINE_HEIGHT, Label, height_for, short, spread

LABELS = st.lists(st.tuples(st.floats(-1, 2), st.floats(0.01, 0.4)), min_size=1, max_size=12)


@given(LABELS)
def test_labels_do_not_overlap_stay_inside_and_keep_their_order(labels: list[tuple[float, float]]) -> None:
    wanted, heights = [at for at, _ in labels], [height for _, height in labels]
    placed = spread(wanted, heights, 0.0, 1.0)
    scale = min(1.0, 1 / sum(heights))
    boxes = sorted((y - scale * h / 2, y + scale * h / 2) for y, h in zip(placed, heights, strict=True))
    assert boxes[0][0] >= -1e-9
    assert boxes[-1][1] <= 1 + 1e-9
    assert all(b[0] >= a[1] - 1e-9 for a, b in itertools.pairwise(boxes))
    for (a, y), (b, z) in itertools.permutations(zip(wanted, placed, strict=True), 2):
        assert a >= b or y < z


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8, unique=True))
def test_labels_with_room_stay_where_they_are(cells: list[int]) -> None:
    wanted = [(cell + 0.5) / 51 for cell in cells]
    assert spread(wanted, [0.0195] * len(cells), 0.0, 1.0) == pytest.approx(wanted)


@given(st.floats(0.3, 0.7), st.lists(st.floats(0.01, 0.08), min_size=1, max_size=6))
def test_a_cluster_stays_centred_on_its_lines(at: float, heights: list[float]) -> None:
    placed = spread([at] * len(heights), heights, 0.0, 1.0)
    assert sum(placed) / len(placed) == pytest.approx(at)


@given(LABELS, st.lists(st.floats(-0.05, 0.05), min_size=12, max_size=12))
def test_no_other_placing_is_nearer(labels: list[tuple[float, float]], moves: list[float]) -> None:
    wanted, heights = [at for at, _ in labels], [height for _, height in labels]
    placed = spread(wanted, heights, 0.0, 1.0)
    # Any other placing: the wanted heights moved, then made to fit.
    moved = spread([y + move for y, move in zip(wanted, moves, strict=False)], heights, 0.0, 1.0)
    in_order = sorted(range(len(wanted)), key=lambda i: wanted[i]) == sorted(range(len(wanted)), key=lambda i: moved[i])

    def distance(places: list[float]) -> float:
        return sum((a - b) ** 2 for a, b in zip(places, wanted, strict=True))

    assert not in_order or distance(placed) <= distance(moved) + 1e-9


def test_no_labels_need_no_place() -> None:
    assert spread([], [], 0.0, 1.0) == []


def test_a_figure_grows_with_its_labels() -> None:
    few, many = [Label(0.5, ("a", "b"), "red")], [Label(0.5, ("a", "b"), "red")] * 20
    assert height_for(few) == 3.8
    assert height_for(many) * 72 * AXES_SHARE == pytest.approx(40 * LINE_HEIGHT)


def test_a_long_name_is_cut() -> None:
    assert short("a" * 34) == "a" * 34
    assert short("a" * 35) == "a" * 33 + "…"
