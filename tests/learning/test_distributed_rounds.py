"""Several processes share a federation: the cases run in real processes, a whole set of them for each number of processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import distributed_cases as cases
import pytest
import torch
from helpers import flat, toy_model
from test_distributed import Outcome, assert_same_as_alone, is_one_scale, run

import sfumato as sf

pytestmark = pytest.mark.slow

SAME = [
    "rounds_private", "rounds_nearly_empty", "rounds_adaptive", "rounds_scaffold", "rounds_correlated", "rounds_plain",
    "rounds_nova", "rounds_random_layers", "rounds_ditto", "rounds_personal_layers", "rounds_void", "rounds_nan",
]  # fmt: skip
TWO = [
    *SAME, "rounds_refused", "rounds_too_many", "rounds_failure", "rounds_noise", "rounds_checkpoint",
]  # fmt: skip
THREE = ["rounds_private", "rounds_ditto", "rounds_failure"]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return Outcome(tmp_path_factory.mktemp("two"), 2, TWO)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return Outcome(tmp_path_factory.mktemp("three"), 3, THREE)


@pytest.mark.parametrize("case", SAME)
def test_two_processes_make_the_model_of_one(two: Outcome, case: str, tmp_path: Path) -> None:
    assert_same_as_alone(case, two[case], tmp_path)
    alone = getattr(cases, case)(tmp_path / "again") if case == "rounds_random_layers" else {}
    for found in two[case]:
        torch.testing.assert_close(found.get("buffers"), alone.get("buffers"), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ["rounds_private", "rounds_ditto"])
def test_three_processes_make_the_model_of_one(three: Outcome, case: str, tmp_path: Path) -> None:
    assert_same_as_alone(case, three[case], tmp_path)


def test_the_cases_train(two: Outcome) -> None:
    start = flat(toy_model())
    for case in ("rounds_private", "rounds_scaffold", "rounds_correlated", "rounds_plain"):
        assert float((two[case][0]["model"] - start).abs().max()) > 1e-2


def test_the_cases_hold_empty_cohorts_and_empty_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    honest = cases.client_rounds.ClientRounds.draw

    def draw(self: Any, step: int) -> tuple[list[int], int]:
        drawn = honest(self, step)
        seen.append(drawn[0])
        return drawn

    monkeypatch.setattr(cases.client_rounds.ClientRounds, "draw", draw)
    cases.rounds_nearly_empty(tmp_path)
    assert [] in seen
    assert any(cohort and len({number % 2 for number in cohort}) == 1 for cohort in seen)


def test_a_private_statement_names_the_processes(two: Outcome) -> None:
    assert "which see what the server and the clients see" in two["rounds_private"][1]["statement"]


@pytest.mark.parametrize(
    ("processes", "case"), [("two", "rounds_ditto"), ("two", "rounds_personal_layers"), ("three", "rounds_ditto")]
)
def test_every_process_has_the_models_of_all_clients_when_the_run_ends(
    processes: str, case: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    outcome: Outcome = request.getfixturevalue(processes)
    alone = getattr(cases, case)(tmp_path)
    apart = (alone["personal"] - alone["model"]).abs().amax(1)
    assert (apart > 1e-2).sum() >= 6  # else there was nothing to tell
    for rank, found in enumerate(outcome[case]):
        torch.testing.assert_close(found["personal"], alone["personal"], rtol=1e-6, atol=1e-6)
        for number, (kind, text) in enumerate(found["early"]):
            owner = number % outcome.processes
            assert kind == ("" if owner == rank else "ProcessError")
            assert owner == rank or f'Client "site-{number}" runs on rank {owner}' in text


def test_a_void_round_is_void_on_every_rank(two: Outcome, tmp_path: Path) -> None:
    alone = cases.rounds_void(tmp_path)
    assert alone["void"] == alone["plain"]["void"] == 2
    for found in two["rounds_void"]:
        torch.testing.assert_close(found["plain"]["model"], alone["plain"]["model"], rtol=1e-6, atol=1e-6)
        assert found["plain"]["void"] == 2
        assert found["void"] == 2
    history = sf.Ledger.existing(two.folder / "void.sqlite").history("federation")
    assert [entry.kind for entry in history] == ["grant", "charge"]


def test_values_that_are_not_finite_are_counted_over_all_ranks(two: Outcome, tmp_path: Path) -> None:
    alone = cases.rounds_nan(tmp_path)
    assert alone["nonfinite"] == 2 * 3
    for found in two["rounds_nan"]:
        assert found["nonfinite"] == alone["nonfinite"]
        assert found["plain"]["nonfinite"] == alone["plain"]["nonfinite"] == 2 * 3
        torch.testing.assert_close(found["plain"]["model"], alone["plain"]["model"], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("record sums", 'unit "client", or start the script with plain python'),
        ("record steps", 'unit "client", or start the script with plain python'),
        ("SharedNoise", "use ServerNoise()"),
        ("LocalNoise", "use ServerNoise()"),
        ("kept", "leave the checkpoint out"),
        ("clients", "Rank 1 has other records than rank 0"),
        ("algorithm", "Rank 1 has another algorithm, weighting or quorum than rank 0"),
        ("quorum", "Rank 1 has another algorithm, weighting or quorum than rank 0"),
        ("one rank", "LBFGS"),
    ],
)
def test_what_processes_cannot_share_is_refused_before_anything_is_charged(two: Outcome, what: str, said: str) -> None:
    for rank, found in enumerate(two["rounds_refused"]):
        kind, text = found[what]
        assert kind == ("UnsupportedModelError" if (what, rank) == ("one rank", 1) else "ProcessError")
        assert said in text
        assert "\n" not in text
    history = sf.Ledger.existing(two.folder / "refused.sqlite").history("federation")
    assert [entry.kind for entry in history] == ["grant"]


def test_a_private_cohort_is_not_larger_than_its_rounding_allows(two: Outcome) -> None:
    first, second = (found["error"] for found in two["rounds_too_many"])
    assert first[0] == "PlanError"
    assert first[1] in second[1]


@pytest.mark.parametrize("processes", ["two", "three"])
def test_a_failure_on_rank_1_stops_all_and_all_can_go_on(processes: str, request: pytest.FixtureRequest) -> None:
    outcome: Outcome = request.getfixturevalue(processes)
    ranks = outcome["rounds_failure"]
    for rank, found in enumerate(ranks):
        assert found["indices"] == [1, 2, 3, 4, 5, 6]
        assert torch.equal(found["model"], ranks[0]["model"])
        kind, text = found["error"]
        assert kind == ("UnsupportedModelError" if rank == 1 else "ProcessError")
        assert "step 3" in text
        assert "secret" not in text
        assert rank == 1 or f"Rank 1 of {outcome.processes} stopped" in text


def test_the_noise_enters_once(two: Outcome) -> None:
    for found in two["rounds_noise"]:
        assert len(found["honest"]) == 8
        assert is_one_scale(found["honest"])
        assert not is_one_scale(found["0.67"])
        assert not is_one_scale(found["1.50"])


def test_a_checkpoint_is_rank_0s_and_any_number_of_processes_goes_on(two: Outcome) -> None:
    first, second = two["rounds_checkpoint"]
    for found in (first, second):
        assert found["indices"] == [1, 2, 3, 4, 5]
        assert torch.equal(found["stopped"], first["stopped"])
        assert torch.equal(found["resumed"], first["stopped"])
        assert torch.equal(found["model"], first["model"])
    model = toy_model(seed=3)
    training = cases.rounds_saved(two.folder, model, resume=True)
    assert torch.equal(flat(model), first["model"])
    assert [step.index for step in training] == [6, 7, 8]
    history = sf.Ledger.existing(two.folder / "saved.sqlite").history("federation")
    assert sum(entry.kind == "charge" for entry in history) == 1


def test_a_killed_process_stops_the_others(tmp_path: Path) -> None:
    assert run(tmp_path, 3, ["rounds_killed"]) == [0, -9, 0]
    for rank in (0, 2):
        kind, text = torch.load(tmp_path / f"rounds_killed-{rank}.pt")["error"]
        assert kind == "ProcessError"
        assert f"Rank {rank} of 3 lost touch" in text
    entries = sf.Ledger.existing(tmp_path / "killed rounds.sqlite").history("federation")
    assert [entry.kind for entry in entries] == ["grant", "charge"]
