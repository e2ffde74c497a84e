from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sfumato.errors import InputError
from sfumato.report import Result, read_result, write_result
from sfumato.report.result import exact_sum, write_text_atomically


def test_round_trip_of_a_study(result: Result, tmp_path: Path) -> None:
    path = write_result(result, tmp_path / "result.json")
    assert read_result(path) == result
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_what_is_written_has_exactly_the_keys_given(mapping: dict[str, Any], tmp_path: Path) -> None:
    path = write_result(Result.model_validate(mapping), tmp_path / "result.json")
    assert json.loads(path.read_text("utf-8")) == mapping


def test_absent_keys_stay_absent_but_null_privacy_is_said(single: dict[str, Any], tmp_path: Path) -> None:
    single["runs"][0] |= {"mode": "central", "privacy": None}
    path = write_result(Result.model_validate(single), tmp_path / "r.json")
    written = json.loads(path.read_text("utf-8"))
    assert written == {"runs": [{"name": "only", "mode": "central", "seconds": 3.25, "metrics": {}, "privacy": None}]}


@given(st.floats(min_value=0, max_value=1e6), st.floats(min_value=0, max_value=1))
def test_numbers_survive_to_the_last_bit(tmp_path_factory: pytest.TempPathFactory, a: float, b: float) -> None:
    metrics = {"accuracy": {"mean": b, "sd": a, "seeds": 1}}
    plain = {"name": "x", "mode": "alone", "seconds": a, "metrics": metrics, "privacy": None}
    before = Result.model_validate({"runs": [plain]})
    path = tmp_path_factory.mktemp("bits") / "result.json"
    assert read_result(write_result(before, path)) == before


def _at(mapping: Any, path: str) -> tuple[Any, Any]:
    steps = [int(step) if step.isdigit() else step for step in path.split("/")]
    for step in steps[:-1]:
        mapping = mapping[step]
    return mapping, steps[-1]


PRIVACY = "runs/2/privacy"


@pytest.mark.parametrize(
    "path",
    [
        "runs",
        *(f"runs/0/{key}" for key in ("name", "mode", "seconds", "metrics", "privacy")),
        *(f"runs/0/metrics/accuracy/{key}" for key in ("mean", "sd", "seeds")),
        *(
            f"{PRIVACY}/{key}"
            for key in (
                *("epsilon", "delta", "unit", "relation", "noise_multiplier", "clip_norm", "sampling"),
                *("steps", "accountants", "event", "not_covered", "accountants/pld", "accountants/rdp"),
                *("sampling/kind", "sampling/rate"),
            )
        ),
        *(f"{PRIVACY}/risk/{key}" for key in ("advantage", "guess", "certainty", "success", "curve", "basis")),
        *(f"ledger/{key}" for key in ("path", "digest", "entries", "entries/0/seq", "entries/0/purpose")),
        "dataset/name",
    ],
)
def test_a_missing_key_is_named(mapping: dict[str, Any], tmp_path: Path, path: str) -> None:
    inside, key = _at(mapping, path)
    del inside[key]
    _refused(mapping, tmp_path, key)


@pytest.mark.parametrize("path", ["", "runs/0", PRIVACY, "runs/0/metrics", "ledger", "curves", "dataset"])
def test_an_unknown_key_is_named(mapping: dict[str, Any], tmp_path: Path, path: str) -> None:
    inside, key = _at({"top": mapping}, f"top/{path}".rstrip("/"))
    inside[key]["epsilom"] = 1
    _refused(mapping, tmp_path, "epsilom")


@pytest.mark.parametrize(
    ("path", "value", "word"),
    [
        ("runs", [], "runs"),
        ("runs/0/mode", "central-privat", "mode"),
        ("runs/0/name", "", "name"),
        ("runs/0/name", "a\u202eb", "name"),
        ("runs/0/name", "a\nb", "name"),
        ("runs/0/seconds", "3", "seconds"),
        ("runs/0/seconds", True, "seconds"),
        ("runs/0/seconds", -1, "seconds"),
        ("runs/0/metrics/accuracy/mean", 1.5, "mean"),
        ("runs/0/metrics/accuracy/seeds", 4, "values"),
        ("runs/0/metrics/accuracy/seeds", 5.0, "seeds"),
        ("runs/0/mode", "pooled-private", "privacy statement"),
        ("runs/2/mode", "pooled", "promises nothing"),
        (f"{PRIVACY}/epsilon", 0.4, "PLD accountant"),
        (f"{PRIVACY}/unit", "patient", "unit"),
        (f"{PRIVACY}/risk/guess", 0.49, "guessing reaches"),
        (f"{PRIVACY}/risk/certainty", 0.49, "guessing reaches"),
        (f"{PRIVACY}/risk/success", [[0.001, 0.001], [0.01, 0.009], [0.1, 0.1]], "guessing reaches"),
        (f"{PRIVACY}/risk/success", [[0.01, 0.1]], "false positive rates"),
        (f"{PRIVACY}/risk/curve", [[0.0, 1.0]], "curve"),
        (f"{PRIVACY}/risk/curve", [[0.0, 1.0], [0.5, 0.6]], "below that of guessing"),
        (f"{PRIVACY}/risk/curve", [[0.5, 0.2], [0.0, 0.9]], "left to right"),
        (f"{PRIVACY}/risk/basis", "guess", "basis"),
        (f"{PRIVACY}/accountants", {"pld": None, "rdp": 0.6}, "RDP accountant"),
        (f"{PRIVACY}/accountants", {"pld": None, "rdp": None}, "prove nothing"),
        (f"{PRIVACY}/delta", 1.5, "delta"),
        ("runs/1/name", "alone", "two runs"),
        ("curves/epsilon_over_steps", {"poled": [[1, 0.1]]}, "pooled"),
        ("ledger/path", "/home/x/heart.ledger", "folder"),
        ("ledger/digest", "abc", "digest"),
        ("created", "2026-01-31T12:00:00+02:00", "UTC"),
        ("created", "yesterday", "created"),
    ],
)
def test_a_wrong_value_is_named(mapping: dict[str, Any], tmp_path: Path, path: str, value: Any, word: str) -> None:
    inside, key = _at(mapping, path)
    inside[key] = value
    _refused(mapping, tmp_path, word)


def _refused(mapping: dict[str, Any], folder: Path, word: str) -> None:
    path = folder / "result.json"
    path.write_text(json.dumps(mapping), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        read_result(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path) in message
    assert word in message


@pytest.mark.parametrize("constant", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("path", ["runs/0/seconds", f"{PRIVACY}/epsilon", f"{PRIVACY}/event/count"])
def test_no_nan_or_infinity_is_read(mapping: dict[str, Any], tmp_path: Path, constant: str, path: str) -> None:
    inside, key = _at(mapping, path)
    inside[key] = float(constant.replace("Infinity", "inf"))
    _refused(mapping, tmp_path, constant)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.1])
def test_no_nan_or_infinity_is_built(single: dict[str, Any], bad: float) -> None:
    single["runs"][0]["privacy"]["epsilon"] = bad
    with pytest.raises(ValidationError, match="epsilon"):
        Result.model_validate(single)


def test_no_nan_is_written(single: dict[str, Any], tmp_path: Path) -> None:
    single["runs"][0]["privacy"]["event"] = {"type": "GaussianDpEvent", "noise_multiplier": float("nan")}
    with pytest.raises(InputError, match="NaN"):
        write_result(Result.model_validate(single), tmp_path / "result.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "word"),
    [(b'{"runs": [', "not valid JSON"), (b"[]", "no JSON object"), (b"\xff\xfe", "not UTF-8"), (b"", "JSON")],
)
def test_a_file_that_is_no_result_is_refused(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=word) as caught:
        read_result(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.json does not exist"):
        read_result(tmp_path / "nowhere.json")
    with pytest.raises(InputError, match="cannot be read"):
        read_result(tmp_path)


def test_writing_into_a_missing_folder_is_refused(result: Result, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="choose a folder that exists"):
        write_result(result, tmp_path / "missing" / "result.json")


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_text_atomically(tmp_path / "page", "old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="No space left"):
        write_text_atomically(path, "new")
    assert path.read_text("utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["page"]


def test_the_ledger_totals_count_charges_alone_and_exactly(mapping: dict[str, Any]) -> None:
    entries = mapping["ledger"]["entries"]
    for entry in entries:
        if entry["kind"] == "charge":
            entry |= {"epsilon": 0.1, "delta": 1e-5}
    entries[-1] |= {"epsilon": 5.0}
    ledger = Result.model_validate(mapping).ledger
    assert ledger is not None
    (total,) = ledger.totals()
    assert (total.dataset, total.epsilon, total.delta) == ("heart", 0.6, 6e-5)
    assert (total.epsilon_cap, total.delta_cap) == (9.0, 0.0006)


def test_the_latest_grant_is_the_cap_of_its_own_data_set(mapping: dict[str, Any]) -> None:
    first = mapping["ledger"]["entries"][0]
    mapping["ledger"]["entries"] += [
        first | {"seq": 20, "epsilon": 12.0},
        first | {"seq": 21, "epsilon": 1.0, "dataset": "adult"},
    ]
    ledger = Result.model_validate(mapping).ledger
    assert ledger is not None
    assert [(t.dataset, t.epsilon, t.epsilon_cap) for t in ledger.totals()] == [
        ("adult", 0.0, 1.0),
        ("heart", 9.0, 12.0),
    ]


@given(st.integers(1, 1000), st.integers(1, 10**9))
def test_decimal_sums_do_not_drift(tenths: int, count: int) -> None:
    assert exact_sum([(tenths / 10, count)]) == tenths * count / 10


def test_the_counterpart_is_the_same_training_without_privacy(result: Result) -> None:
    by_name = {run.name: run for run in result.runs}
    assert result.counterpart(by_name["pooled, epsilon 1"]) is by_name["pooled"]
    assert result.counterpart(by_name["federated, epsilon 3"]) is by_name["federated"]
    assert result.counterpart(by_name["pooled"]) is None


def test_two_counterparts_are_none(mapping: dict[str, Any]) -> None:
    mapping["runs"].append(mapping["runs"][1] | {"name": "pooled again"})
    result = Result.model_validate(mapping)
    assert result.counterpart(result.runs[2]) is None
