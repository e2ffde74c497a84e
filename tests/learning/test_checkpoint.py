from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import LOSS, flat, sgd, toy_model, toy_plan, toy_records

import sfumato as sf
from sfumato.errors import CheckpointError, LostClientsError, PlanError
from sfumato.learning.training import Training


def start(folder: Path, model: torch.nn.Module, *, resume: bool = False, every: int = 2, **plan: object) -> object:
    ledger = sf.Ledger(folder / "ledger.sqlite")
    if not ledger.has_grant("toy"):
        ledger.grant("toy", sf.Budget(2.0, 1e-3))
    return sf.steps(
        model, toy_records(), toy_plan(steps=8, **plan), loss=LOSS, optimizer=sgd(model), ledger=ledger,
        checkpoint=sf.Checkpoint(folder / "run.pt", every=every, resume=resume),
    )  # fmt: skip


def test_a_paused_run_goes_on_where_it_was_and_is_charged_once(tmp_path: Path) -> None:
    model = toy_model()
    training = start(tmp_path, model)
    for _ in range(3):
        next(training)  # type: ignore[call-overload]
    training.pause()  # type: ignore[attr-defined]
    stopped = flat(model)
    other = toy_model(seed=9)
    resumed = start(tmp_path, other, resume=True)
    assert torch.equal(flat(other), stopped)
    steps = list(resumed)  # type: ignore[call-overload]
    assert [step.index for step in steps] == [4, 5, 6, 7, 8]
    history = sf.Ledger(tmp_path / "ledger.sqlite").history("toy")
    assert sum(entry.kind == "charge" for entry in history) == 1


def test_a_crashed_run_skips_the_steps_that_may_have_been_noised(tmp_path: Path) -> None:
    model = toy_model()
    training = start(tmp_path, model)
    for _ in range(3):
        next(training)  # type: ignore[call-overload]
    del training  # as after a crash: the last save is at step 2, steps 3 and 4 are leased
    resumed = start(tmp_path, toy_model(), resume=True)
    assert [step.index for step in resumed] == [5, 6, 7, 8]  # type: ignore[attr-defined]


def test_a_resumed_run_does_not_repeat_noise(tmp_path: Path) -> None:
    updates = []
    for seed in range(2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        model = toy_model()
        before = flat(model)
        next(start(folder, model))  # type: ignore[call-overload]
        updates.append(flat(model) - before)
    assert not torch.equal(*updates)


def test_shuffled_batches_go_on_with_the_same_order(tmp_path: Path) -> None:
    model = toy_model()
    training = start(tmp_path, model, batch_size=15, sampling="shuffled", every=1)
    next(training)  # type: ignore[call-overload]
    first = training._procedure._draws  # type: ignore[attr-defined]
    resumed = start(tmp_path, toy_model(), resume=True, batch_size=15, sampling="shuffled", every=1)
    second = resumed._procedure._draws  # type: ignore[attr-defined]
    for step in range(8):
        assert torch.equal(first.batch(step), second.batch(step))


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = toy_model()
    with pytest.raises(CheckpointError, match="There is no checkpoint"):
        start(tmp_path, model, resume=True)
    next(start(tmp_path, model, every=1))  # type: ignore[call-overload]
    with pytest.raises(CheckpointError, match="exists already"):
        start(tmp_path, model)
    with pytest.raises(CheckpointError, match="another plan"):
        start(tmp_path, model, resume=True, clip=2.0)
    with pytest.raises(CheckpointError, match="another model"):
        start(tmp_path, torch.nn.Linear(3, 2), resume=True)
    (tmp_path / "run.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        start(tmp_path, model, resume=True)
    with pytest.raises(PlanError, match="ledger on disk"):
        sf.steps(
            model, toy_records(), toy_plan(), loss=LOSS, optimizer=sgd(model), checkpoint=sf.Checkpoint(tmp_path / "x.pt")
        )  # fmt: skip


@pytest.mark.slow
def test_kill_9_in_the_middle_never_forgets_a_noised_step(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        import os, sys
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from test_checkpoint import start, toy_model
        folder, resume, stop = Path(sys.argv[1]), sys.argv[2] == "resume", int(sys.argv[3])
        for count, step in enumerate(start(folder, toy_model(), resume=resume)):
            with open(folder / "done", "a") as file:
                print(step.index, file=file, flush=True)
            if count == stop:
                os.kill(os.getpid(), {signal.SIGKILL.value})
        """
    )
    for attempt in range(3):
        mode = "resume" if attempt else "start"
        subprocess.run([sys.executable, "-c", script, str(tmp_path), mode, "2"], check=False, env=os.environ.copy())
    done = [int(line) for line in (tmp_path / "done").read_text().split()]
    # Every noised step has its own number: none was noised twice under one charge.
    assert len(done) == len(set(done))
    assert max(done) <= 8


def test_a_rehearsal_that_is_resumed_stays_a_rehearsal(tmp_path: Path) -> None:
    ledger = sf.Ledger(tmp_path / "ledger.sqlite")
    ledger.grant("toy", sf.Budget(2.0, 1e-3))

    def begin(*, resume: bool, source: sf.SeededSource | None = None) -> object:
        model = toy_model()
        return sf.steps(
            model, toy_records(), toy_plan(steps=4), loss=LOSS, optimizer=sgd(model), ledger=ledger, source=source,
            checkpoint=sf.Checkpoint(tmp_path / "run.pt", every=2, resume=resume),
        )  # fmt: skip

    seeded = begin(resume=False, source=sf.SeededSource(1))
    next(seeded)  # type: ignore[call-overload]
    seeded.pause()  # type: ignore[attr-defined]
    with pytest.raises(CheckpointError, match="repeat the noise"):
        begin(resume=True, source=sf.SeededSource(1))
    resumed = begin(resume=True)
    list(resumed)  # type: ignore[call-overload]
    assert "A rehearsal" in str(resumed.result().privacy)  # type: ignore[attr-defined]


def test_opening_a_checkpoint_without_a_step_costs_no_draw(tmp_path: Path) -> None:
    training = start(tmp_path, toy_model())
    next(training)  # type: ignore[call-overload]
    training.pause()  # type: ignore[attr-defined]
    for _ in range(3):
        start(tmp_path, toy_model(), resume=True)
    assert [step.index for step in start(tmp_path, toy_model(), resume=True)] == [2, 3, 4, 5, 6, 7, 8]  # type: ignore[attr-defined]


def test_after_a_pause_saves_and_leases_stay_in_step(tmp_path: Path) -> None:
    training = start(tmp_path, toy_model(), every=3)
    next(training)  # type: ignore[call-overload]
    training.pause()  # type: ignore[attr-defined]
    resumed = start(tmp_path, toy_model(), resume=True, every=3)
    for _ in range(4):
        next(resumed)  # type: ignore[call-overload]
    # Crash at step 5: the last save is at step 4 and the lease ends at 7, so at most `every` steps are lost.
    again = start(tmp_path, toy_model(), resume=True, every=3)
    assert [step.index for step in again] == [8]  # type: ignore[attr-defined]


def test_a_run_that_the_ledger_did_not_charge_for_this_plan_is_refused(tmp_path: Path) -> None:
    training = start(tmp_path, toy_model(), every=1)
    next(training)  # type: ignore[call-overload]
    content = torch.load(tmp_path / "run.pt", weights_only=True)
    torch.save(content | {"run": "0" * 32}, tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match="no charge for this plan"):
        next(start(tmp_path, toy_model(), resume=True, every=1))  # type: ignore[call-overload]
    del content["position"]
    torch.save(content, tmp_path / "run.pt")
    with pytest.raises(CheckpointError, match="not a checkpoint of this version"):
        start(tmp_path, toy_model(), resume=True, every=1)


def test_a_checkpoint_that_cannot_be_written_or_read_back_costs_nothing(tmp_path: Path) -> None:
    ledger = sf.Ledger(tmp_path / "ledger.sqlite")
    ledger.grant("toy", sf.Budget(2.0, 1e-3))
    for folder, rate in [("/proc", 0.5), (tmp_path, np.float64(0.5))]:
        model = toy_model()
        training = sf.steps(
            model, toy_records(), toy_plan(), loss=LOSS, optimizer=sgd(model, lr=rate), ledger=ledger,
            checkpoint=sf.Checkpoint(Path(folder) / "run.pt"),
        )  # fmt: skip
        with pytest.raises(CheckpointError, match="nothing was charged"):
            next(training)
    assert ledger.balance("toy").spent_epsilon == 0
    assert sorted(path.name for path in tmp_path.iterdir() if "run.pt" in path.name) == []


def test_another_optimizer_or_other_records_cannot_go_on_with_a_run(tmp_path: Path) -> None:
    training = start(tmp_path, toy_model())
    next(training)  # type: ignore[call-overload]
    training.pause()  # type: ignore[attr-defined]
    records = toy_records()
    for other, optimizer, message in [
        (records, torch.optim.Adam, "started with SGD, not Adam"),
        (records.select(torch.arange(59, -1, -1)), torch.optim.SGD, "not in the order"),
    ]:
        model = toy_model()
        with pytest.raises(CheckpointError, match=message):
            sf.steps(
                model, other, toy_plan(steps=8), loss=LOSS, optimizer=optimizer(model.parameters(), lr=0.5),
                ledger=sf.Ledger(tmp_path / "ledger.sqlite"), checkpoint=sf.Checkpoint(tmp_path / "run.pt", 2, True),
            )  # fmt: skip


def test_a_federation_that_lost_its_last_steps_still_averages_what_its_clients_learnt(tmp_path: Path) -> None:
    ledger = sf.Ledger(tmp_path / "ledger.sqlite")
    ledger.grant("federation", sf.Budget(2.0, 1e-3))

    def begin(model: torch.nn.Module, *, resume: bool) -> Training:
        return sf.rounds(
            model, toy_records().by_owner(), toy_plan(steps=8), loss=LOSS, ledger=ledger, engine=sf.Simulation(),
            algorithm=sf.FedAvg(functools.partial(torch.optim.SGD, lr=0.5), local_steps=8),
            populations=dict.fromkeys(toy_records().owner_names, 20),
            checkpoint=sf.Checkpoint(tmp_path / "run.pt", 6, resume),
        )  # fmt: skip

    training = begin(toy_model(), resume=False)
    for _ in range(7):
        next(training)
    del training
    model = toy_model()
    resumed = begin(model, resume=True)
    assert list(resumed) == []
    assert resumed.result().lost == 2
    assert not torch.equal(flat(model), flat(toy_model()))


def test_a_stop_in_the_middle_of_a_step_loses_that_step_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy_model()
    training = sf.steps(model, toy_records(), toy_plan(), loss=LOSS, optimizer=sgd(model))
    next(training)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(training._procedure), "apply", stop)
        with pytest.raises(KeyboardInterrupt):
            next(training)
    assert [step.index for step in training] == [3, 4, 5, 6]
    assert training.result().lost == 1


def test_a_void_last_round_is_saved(tmp_path: Path) -> None:
    ledger = sf.Ledger(tmp_path / "ledger.sqlite")
    ledger.grant("federation", sf.Budget(2.0, 1e-3))

    def begin(model: torch.nn.Module, *, resume: bool) -> Training:
        return sf.rounds(
            model, toy_records().by_owner(), toy_plan(), loss=LOSS, ledger=ledger, noise=sf.SharedNoise(),
            engine=sf.Simulation(drop_out=lambda step, name: step == 5), algorithm=sf.FedSGD(torch.optim.Adam),
            checkpoint=sf.Checkpoint(tmp_path / "run.pt", 4, resume),
        )  # fmt: skip

    model, again = toy_model(), toy_model()
    training = begin(model, resume=False)
    with pytest.raises(LostClientsError):
        list(training)
    assert list(begin(again, resume=True)) == []
    assert torch.equal(flat(model), flat(again))
