"""Several processes share one training: the cases run in real processes, a whole set of them for each number of processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import distributed_cases as cases
import pytest
import torch
from helpers import LOSS, sgd, toy_model, toy_plan, toy_records
from torch import Tensor

import sfumato as sf
from sfumato.errors import ProcessError
from sfumato.learning import distributed

pytestmark = pytest.mark.slow

SAME = ["full_batch", "poisson", "nearly_empty", "shuffled", "views_and_nan"]
PLAIN = ["infinite_epsilon", "infinite_epsilon_by_record"]
TWO = [
    *SAME, *PLAIN, "batch_statistics", "noise", "noise_off", "ledger_once", "disagreement", "refused_on_one_rank",
    "failure_at_first", "failure_in_between", "too_large_a_batch", "checkpoint", "federation",
]  # fmt: skip
THREE = ["poisson", "infinite_epsilon", "failure_in_between", "killed"]


def run(folder: Path, processes: int, names: list[str]) -> list[int]:
    """Run the cases in `processes` processes and return how each ended; no process may hang."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = []
    for rank in range(processes):
        with (folder / f"{rank}.log").open("w") as log:
            command = [sys.executable, cases.__file__, str(folder), str(rank), str(processes), *names]
            started.append(subprocess.Popen(command, env=environment, stderr=log))
    try:
        return [process.wait(150) for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()


class Outcome:
    """What every case returned on every rank."""

    def __init__(self, folder: Path, processes: int, names: list[str]) -> None:
        self.folder, self.processes = folder, processes
        ended = run(folder, processes, names)
        expected = [-9 if "killed" in names and rank == 1 else 0 for rank in range(processes)]
        assert ended == expected, [(folder / f"{rank}.log").read_text() for rank in range(processes)]

    def __getitem__(self, case: str) -> list[dict[str, Any]]:
        return [torch.load(self.folder / f"{case}-{rank}.pt") for rank in range(self.processes)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return Outcome(tmp_path_factory.mktemp("two"), 2, TWO)


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    return Outcome(tmp_path_factory.mktemp("three"), 3, THREE)


def assert_same_as_alone(case: str, ranks: list[dict[str, Any]], folder: Path) -> None:
    alone = getattr(cases, case)(folder)
    for found in ranks:
        assert torch.equal(found["model"], ranks[0]["model"])
        torch.testing.assert_close(found["model"], alone["model"], rtol=1e-6, atol=1e-6)
        assert found["epsilons"] == alone["epsilons"]
        assert (found["nonfinite"], found["lost"]) == (alone["nonfinite"], alone["lost"])
        assert found["statement"] == ranks[0]["statement"]
        assert found["run"] == ranks[0]["run"]


@pytest.mark.parametrize("case", [*SAME, *PLAIN])
def test_two_processes_make_the_model_of_one(two: Outcome, case: str, tmp_path: Path) -> None:
    assert_same_as_alone(case, two[case], tmp_path)


@pytest.mark.parametrize("case", THREE[:2])
def test_three_processes_make_the_model_of_one(three: Outcome, case: str, tmp_path: Path) -> None:
    assert_same_as_alone(case, three[case], tmp_path)


def test_the_cases_hold_empty_batches_and_empty_shares(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sizes(case: str) -> list[int]:
        seen: list[int] = []
        honest = cases.central.Central.draw

        def draw(self: Any, step: int) -> Tensor:
            drawn = honest(self, step)
            seen.append(len(drawn))
            return drawn

        with monkeypatch.context() as patch:
            patch.setattr(cases.central.Central, "draw", draw)
            getattr(cases, case)(tmp_path)
        return seen

    assert {1, 2, 3} <= set(sizes("poisson"))
    assert {0, 1} <= set(sizes("nearly_empty"))
    assert {0, 1, 2, 3} <= set(sizes("infinite_epsilon"))


def test_a_private_statement_names_the_processes(two: Outcome) -> None:
    assert "The processes that share the run" in two["full_batch"][1]["statement"]


def is_one_scale(ratios: list[float]) -> bool:
    # 5000 coordinates put each ratio within 0.05 of 1.
    return all(abs(ratio - 1) < 0.1 for ratio in ratios)


def test_the_noise_enters_once(two: Outcome) -> None:
    for found in two["noise"]:
        assert is_one_scale(found["honest"])
        assert not is_one_scale(found["0.67"])
        assert not is_one_scale(found["1.50"])


def test_a_failed_self_check_stops_every_rank(two: Outcome) -> None:
    first, second = (found["error"] for found in two["noise_off"])
    assert first[0] == "SelfCheckError"
    assert second[0] == "ProcessError"
    assert "Rank 0 of 2 stopped" in second[1]
    assert "without noise" in second[1]


def test_the_ledger_is_charged_once_and_a_refusal_reaches_every_rank(two: Outcome) -> None:
    entries = sf.Ledger.existing(two.folder / "once.sqlite").history("toy")
    assert [entry.kind for entry in entries] == ["grant", "charge"]
    first, second = two["ledger_once"]
    assert first["run"] == second["run"] == entries[1].run
    assert first["statement"] == second["statement"]
    assert "no ledger on disk" not in second["statement"]
    assert first["error"][0] == "BudgetExhaustedError"
    assert second["error"] == ("ProcessError", second["error"][1])
    assert first["error"][1] in second["error"][1]
    assert first["untouched"]
    assert second["untouched"]


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("records", "other records"),
        ("order", "other records"),
        ("plan", "another plan"),
        ("model", "another model"),
        ("optimiser", "Adam"),
    ],
)
def test_ranks_that_disagree_are_refused(two: Outcome, what: str, said: str) -> None:
    for found in two["disagreement"]:
        kind, text = found[what]
        assert kind == "ProcessError"
        assert "Rank 1" in text
        assert said in text
        assert "\n" not in text
    assert [entry.kind for entry in sf.Ledger.existing(two.folder / "disagreement.sqlite").history()] == ["grant"]


def test_a_refusal_on_one_rank_stops_all(two: Outcome) -> None:
    first, second = (found["error"] for found in two["refused_on_one_rank"])
    assert first[0] == "ProcessError"
    assert "Rank 1 of 2 stopped" in first[1]
    assert "GroupNorm" in first[1]
    assert second[0] == "UnsupportedModelError"


def test_a_failure_in_the_first_share_costs_nothing(two: Outcome) -> None:
    first, second = (found["error"] for found in two["failure_at_first"])
    assert first[0] == "ProcessError"
    assert "Rank 1 of 2 stopped" in first[1]
    assert second[0] == "UnsupportedModelError"
    assert "secret" not in first[1] + second[1]
    assert [entry.kind for entry in sf.Ledger.existing(two.folder / "failure.sqlite").history()] == ["grant"]


@pytest.mark.parametrize("processes", ["two", "three"])
def test_a_failure_on_rank_1_stops_all_and_all_can_go_on(processes: str, request: pytest.FixtureRequest) -> None:
    outcome: Outcome = request.getfixturevalue(processes)
    ranks = outcome["failure_in_between"]
    for number, found in enumerate(ranks):
        assert torch.equal(found["model"], ranks[0]["model"])
        if number == 1:
            assert found["share"][0] == "UnsupportedModelError"
            assert found["update"] == ("MemoryError", "no more")
            assert found["indices"] == [1, 2, 3, 5, 6]
        else:
            assert found["share"][0] == found["update"][0] == "ProcessError"
            assert f"Rank 1 of {outcome.processes} stopped" in found["share"][1]
            assert f"Rank 1 of {outcome.processes} stopped: MemoryError" in found["update"][1]
            assert found["indices"] == [1, 2, 3, 4, 5, 6]


def test_the_size_of_the_whole_batch_counts(two: Outcome) -> None:
    first, second = (found["error"] for found in two["too_large_a_batch"])
    assert first[0] == "UnsupportedModelError"
    assert first[1] in second[1]


def test_batch_statistics_are_refused(two: Outcome) -> None:
    for found in two["batch_statistics"]:
        assert found["error"][0] == "UnsupportedModelError"
        assert 'Module "1" is BatchNorm1d' in found["error"][1]


def test_a_checkpoint_is_rank_0s_and_any_number_of_processes_goes_on(two: Outcome) -> None:
    first, second = two["checkpoint"]
    for found in (first, second):
        assert found["indices"] == [1, 2, 3, 4, 5]
        assert torch.equal(found["stopped"], first["stopped"])
        assert torch.equal(found["resumed"], first["stopped"])
        assert torch.equal(found["model"], first["model"])
    assert first["missing"][0] == "CheckpointError"
    assert "Rank 0 of 2 stopped: There is no checkpoint" in second["missing"][1]
    model = toy_model(seed=3)
    training = cases.checkpointed(two.folder, model, resume=True)
    assert torch.equal(cases.flat(model), first["model"])
    assert [step.index for step in training] == [6, 7, 8, 9, 10, 11, 12]
    assert training.result().lost == 0
    history = sf.Ledger.existing(two.folder / "checkpoint.sqlite").history("toy")
    assert sum(entry.kind == "charge" for entry in history) == 1


def test_federations_are_refused(two: Outcome) -> None:
    for found in two["federation"]:
        assert found["error"][0] == "ProcessError"
        assert "plain python" in found["error"][1]


def test_a_killed_process_stops_the_others(three: Outcome) -> None:
    for rank in (0, 2):
        kind, text = torch.load(three.folder / f"killed-{rank}.pt")["error"]
        assert kind == "ProcessError"
        assert f"Rank {rank} of 3 lost touch" in text
        assert "\n" not in text
    entries = sf.Ledger.existing(three.folder / "killed.sqlite").history("toy")
    assert [entry.kind for entry in entries] == ["grant", "charge"]


def test_the_same_script_runs_alone_and_under_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import os, sys
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            import torch
            from helpers import LOSS, flat, sgd, toy_model, toy_plan, toy_records
            import sfumato as sf

            if "RANK" in os.environ:
                torch.distributed.init_process_group("gloo")
            model = toy_model()
            sf.train(model, toy_records(), toy_plan(), loss=LOSS, optimizer=sgd(model), source=sf.SeededSource(7))
            torch.save(flat(model), sys.argv[1] + os.environ.get("RANK", "alone"))
            """
        )
    )
    together = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for command in ([sys.executable], together):
        subprocess.run([*command, str(script), f"{tmp_path}/"], check=True, timeout=120, capture_output=True)
    alone = torch.load(tmp_path / "alone")
    for rank in "01":
        torch.testing.assert_close(torch.load(tmp_path / rank), alone, rtol=1e-6, atol=1e-6)


@pytest.fixture
def unconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "made up")
    monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.mark.usefixtures("unconnected")
def test_unconnected_processes_of_torchrun_do_not_train_twice() -> None:
    model = toy_model()
    with pytest.raises(ProcessError, match="init_process_group"):
        sf.train(model, toy_records(), toy_plan(), loss=LOSS, optimizer=sgd(model))


@pytest.mark.parametrize(
    ("backends", "place"), [("cpu:gloo,cuda:gloo", "cpu"), ("cpu:gloo,cuda:nccl", "cpu"), ("cuda:nccl", None)]
)
def test_tensors_travel_where_the_backend_can_take_them(
    monkeypatch: pytest.MonkeyPatch, backends: str, place: str | None
) -> None:
    monkeypatch.setattr(distributed.dist, "get_backend_config", lambda: backends)
    if place is None:
        with pytest.raises(ProcessError, match="gloo"):
            distributed._device(toy_model())
    else:
        assert distributed._device(toy_model()) == torch.device(place)
