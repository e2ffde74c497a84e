"""The bench of noise policies: its arguments, its intervals, and that one data set goes through."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

BENCH = Path(__file__).parent.parent / "bench" / "policies.py"


def loaded() -> ModuleType:
    sys.path.insert(0, str(BENCH.parent))  # as for a script: it imports what lies beside it
    try:
        return executed()
    finally:
        del sys.path[0]


def executed() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_policies", BENCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_policies"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


policies = loaded()


def test_the_defaults_are_all_data_and_ten_seeds() -> None:
    asked = policies.parsed([])
    assert asked.data == ["heart", "adult", "mnist"]
    assert asked.seeds == 10
    assert asked.out == BENCH.parent / "results" / "policies.json"


def test_a_quick_run_writes_no_results_unless_told_where() -> None:
    assert policies.parsed(["--quick"]).out is None
    assert policies.parsed(["--quick"]).seeds == 2
    assert policies.parsed(["--quick", "--seeds", "3", "--out", "a.json"]).out == Path("a.json")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--seeds", "1"], "at least 2"),
        (["--seeds", "1000"], "below 1000"),
        (["--seeds", "-3"], "at least 2"),
        (["--threads", "0"], "--threads must be at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused_in_one_line(words: list[str], told: str) -> None:
    with pytest.raises(SystemExit, match=told):
        policies.parsed(words)


@pytest.mark.parametrize("words", [["--data", "hearts"], ["--seeds", "two"], ["--unknown"]])
def test_unknown_words_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        policies.parsed(words)
    assert refusal.value.code == 2
    assert words[-1] in capsys.readouterr().err


def test_missing_data_are_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SFUMATO_DATA", raising=False)
    monkeypatch.setattr(sys, "argv", ["policies.py", "--quick", "--data", "adult"])
    policies._parts.cache_clear()
    threads = torch.get_num_threads()
    try:
        with pytest.raises(SystemExit, match=r"policies: .*SFUMATO_DATA"):
            policies.main()
    finally:
        torch.set_num_threads(threads)


def test_the_search_never_sees_a_seed_that_is_reported() -> None:
    assert policies.parsed(["--seeds", "999"]).seeds <= min(policies.SEARCH_SEEDS)


def test_the_interval_is_students() -> None:
    # By hand: mean 2, standard deviation 1, t quantile 4.302653 with two degrees of freedom.
    interval = policies.Interval.of([1.0, 2.0, 3.0], 1)
    assert interval.mean == 2
    assert interval.high - 2 == pytest.approx(4.302653 / 3**0.5, rel=1e-6)
    assert interval.low + interval.high == pytest.approx(4)
    assert interval.verdict(True) == "no difference shown"


def test_a_verdict_needs_an_interval_beyond_zero_and_knows_the_direction() -> None:
    clear = policies.Interval.of([1.0, 1.1, 0.9, 1.0], 1)
    assert clear.verdict(True) == "better!"
    assert clear.verdict(False) == "worse!"
    assert policies.Interval.of([-1.0, -1.1, -0.9, -1.0], 1).verdict(True) == "worse!"
    assert policies.Interval.of([1.0, 1.0], 1).verdict(True) == "no difference shown"


def test_many_arms_widen_the_interval_of_the_mark_only() -> None:
    differences = [1.0, 2.0, 3.0, 2.0, 0.2]
    alone, among = policies.Interval.of(differences, 1), policies.Interval.of(differences, 11)
    assert (alone.low, alone.high) == (among.low, among.high)
    assert alone.verdict(True) == "better!"
    assert among.verdict(True) == "better"


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=12), st.integers(1, 20))
def test_a_sign_change_turns_better_into_worse(differences: list[float], arms: int) -> None:
    one = policies.Interval.of(differences, arms).verdict(True)
    other = policies.Interval.of([-value for value in differences], arms).verdict(True)
    turned = {"better": "worse", "worse": "better"}
    assert other.rstrip("!") == turned.get(one.rstrip("!"), one)
    assert one.endswith("!") == other.endswith("!")


def test_one_data_set_goes_through_and_every_arm_keeps_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = (policies.FIXED, "linear 2 -> 1", "StopWhenFlat")
    monkeypatch.setattr(policies, "ARMS", {name: policies.ARMS[name] for name in kept})
    out = tmp_path / "found.json"
    policies.report(policies.parsed(["--quick", "--data", "heart", "--out", str(out)]))
    (found,) = json.loads(out.read_text())["data"]
    assert [arm["arm"] for arm in found["arms"]] == list(kept)
    assert "accuracy_difference" not in found["arms"][0]
    assert all(0 < row["epsilon"] <= found["epsilon"] for row in found["rows"])
    falling = next(row for row in found["rows"] if row["arm"] == "linear 2 -> 1")
    assert falling["noise"][0] == pytest.approx(2 * falling["noise"][1])
