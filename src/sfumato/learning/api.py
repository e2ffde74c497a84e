"""The front door: `train`, `steps`, `federate` and `rounds`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sfumato import _checks
from sfumato.data.population import Population
from sfumato.data.records import Records
from sfumato.errors import InputError, LostClientsError
from sfumato.gradients.clipped import Loss
from sfumato.gradients.compute import DEFAULT, Compute
from sfumato.learning import distributed, distributed_rounds
from sfumato.learning.aggregation import Aggregation
from sfumato.learning.augmentation import Augment
from sfumato.learning.central import Central
from sfumato.learning.checkpoint import Checkpoint
from sfumato.learning.federated import Algorithm, Available, Engine, Federation
from sfumato.learning.plan import Plan
from sfumato.learning.stopping import Stop
from sfumato.learning.training import Account, Step, Training, TrainingResult
from sfumato.learning.weighting import BY_RECORDS, Weighting
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.randomness import RandomSource, SecureSource


def steps(
    model: nn.Module, records: Records, plan: Plan, *, loss: Loss, optimizer: Optimizer,
    ledger: Ledger | None = None, dataset: str | None = None, purpose: str = "training", by: str | None = None,
    source: RandomSource | None = None, checkpoint: Checkpoint | None = None, compute: Compute = DEFAULT,
    augment: Augment | None = None,
) -> Training:  # fmt: skip
    """Return the training of one model on one curator's records, to be stepped through.

    With an infinite epsilon this is plain PyTorch training on the sampler's batches.

    Under `torchrun`, after `torch.distributed.init_process_group`, all processes share the one run: call this on every rank
    with the same arguments. The ledger, the checkpoint and the randomness are those of rank 0, and only rank 0 writes.

    Args:
        model: Trained in place; it is never wrapped, and its `state_dict` keys stay as they are.
        records: The private records.
        plan: Unit "record".
        loss: Called as loss(outputs, targets); the mean over records, or one loss for each.
        optimizer: Over the model's trainable parameters.
        ledger: Where the charge is written. None: the run is bounded by its plan but nobody remembers it.
        dataset: The data set's name in the ledger; by default the records' name.
        purpose: What the charge is called.
        by: Who trains; by default the user's login.
        source: Randomness for sampling and noise; by default a fresh secure source.
        checkpoint: Where to save; needs a ledger on disk if the plan is private.
        compute: Speed knobs, which change nothing but rounding.
        augment: Maps one record's features (...) to its views (views, ...); their mean gradient is clipped once.

    Raises:
        SfumatoError: one of its kinds, each with the fix; a refusal before the first noise costs nothing.
    """
    source = source or SecureSource()
    _expect("model", model, nn.Module, _MODEL)
    with distributed.together(model) as team:
        _expect("records", records, Records, "build them with Records.from_arrays, sf.load or the like")
        _expect(
            "optimizer", optimizer, Optimizer, "make it over the model, for example SGD(model.parameters(), lr=0.1)"
        )
        _check_run(plan, loss, ledger, checkpoint, compute)
        if augment is not None:
            _expect_function("augment", augment, "pass a function from one record's features to its views")
        account = Account(dataset or records.name, ledger, purpose, by)
        central = Central(model, records, plan, loss, optimizer, source, compute, augment)
        procedure = central if team is None else distributed.Shared(team, central, model)
        return Training(model, plan, procedure, account, source, checkpoint)


def train(
    model: nn.Module, records: Records, plan: Plan, *, loss: Loss, optimizer: Optimizer,
    ledger: Ledger | None = None, dataset: str | None = None, purpose: str = "training", by: str | None = None,
    source: RandomSource | None = None, checkpoint: Checkpoint | None = None, compute: Compute = DEFAULT,
    augment: Augment | None = None, on_step: Callable[[Step], None] | None = None,
) -> TrainingResult:  # fmt: skip
    """Train to the end of the plan: `steps`, run through. `on_step` is called after every step."""
    training = steps(
        model, records, plan, loss=loss, optimizer=optimizer, ledger=ledger, dataset=dataset, purpose=purpose, by=by,
        source=source, checkpoint=checkpoint, compute=compute, augment=augment,
    )  # fmt: skip
    return _finish(training, on_step)


def rounds(
    model: nn.Module, clients: Mapping[str, Records], plan: Plan, *, algorithm: Algorithm, engine: Engine, loss: Loss,
    noise: Aggregation | None = None, populations: Mapping[str, int] | None = None,
    weighting: Weighting | None = None, quorum: int = 0, stop: Stop | None = None,
    available: Available | None = None,
    ledger: Ledger | None = None, dataset: str = "federation", purpose: str = "federated training",
    by: str | None = None, source: RandomSource | None = None, checkpoint: Checkpoint | None = None,
    compute: Compute = DEFAULT,
) -> Training:  # fmt: skip
    """Return the training of one model by a federation, to be stepped through.

    Under `torchrun` all processes share the one run, as for `steps`, and each runs its own clients. This needs unit "client",
    noise at the server, and no checkpoint if the algorithm lets clients keep something of their own.

    Args:
        model: The server's model, trained in place.
        clients: Name to records, or a `Population`; each client's records are only used by that client's work.
        plan: Unit "record" or "client" (then its population is the number of clients, and its sampler draws the cohorts).
        algorithm: `FedAvg`, `FedSGD` or one of their relatives.
        engine: Where clients run, for example `Simulation()`.
        loss: Called as loss(outputs, targets); the mean over records, or one loss for each.
        noise: `ServerNoise()` (default), `SharedNoise(tolerate)`, `LocalNoise()` or `CorrelatedNoise(bands)`.
        populations: Declared number of records of each client; `FedAvg` with unit "record" needs it.
        weighting: How much a client counts: `ByRecords()` (default without privacy), `Uniform()` (default where clients
            are protected, and always with `Scaffold`) or `UpTo(most)`.
        quorum: If fewer clients answer, a round is void: it is spent and releases nothing. At most the expected cohort.
        stop: Ends the run before the plan does, for example `Target(score, 0.95)`.
        available: For sampling "min-separation": called with each step (from 0); returns the numbers of the clients that have
            come, (any,) int64 or a list, or their names; the cohort is drawn among them.
        ledger: As for `steps`.
        dataset: The data set's name in the ledger.
        purpose: What the charge is called.
        by: Who trains.
        source: Randomness for sampling and noise.
        checkpoint: As for `steps`.
        compute: As for `steps`.

    Raises:
        SfumatoError: one of its kinds, each with the fix.
    """
    _expect("model", model, nn.Module, _MODEL)
    with distributed.together(model) as team:
        _expect("clients", clients, Mapping, "pass a mapping of name to Records, for example records.by_owner()")
        population = Population.of(clients)
        _expect("algorithm", algorithm, Algorithm, "make one, for example FedSGD(partial(SGD, lr=0.1))")
        if isinstance(engine, type) or not all(callable(getattr(engine, name, None)) for name in ("run", "start")):
            raise InputError(f"engine must be an engine, not {_kind_of(engine)}; make one, for example Simulation().")
        _check_run(plan, loss, ledger, checkpoint, compute)
        source = source or SecureSource()
        if weighting is not None:
            _expect("weighting", weighting, Weighting, "make one, for example UpTo(100)")
        if stop is not None:
            _expect("stop", stop, Stop, "make one, for example Target(score, 0.95)")
        if available is not None:
            _expect_function(
                "available", available, "pass a function from a step to the numbers of the clients that came"
            )
        federation = Federation(
            model, population, plan, loss, engine, source, populations, compute, weighting or BY_RECORDS,
            _checks.count("quorum", quorum, minimum=0), available,
        )  # fmt: skip
        account = Account(dataset, ledger, purpose, by)
        procedure = distributed_rounds.shared(
            team, algorithm.procedure(federation, noise), model, saved=checkpoint is not None
        )
        return Training(model, plan, procedure, account, source, checkpoint, stop)


def federate(
    model: nn.Module, clients: Mapping[str, Records], plan: Plan, *, algorithm: Algorithm, engine: Engine, loss: Loss,
    noise: Aggregation | None = None, populations: Mapping[str, int] | None = None,
    weighting: Weighting | None = None, quorum: int = 0, stop: Stop | None = None,
    available: Available | None = None,
    ledger: Ledger | None = None, dataset: str = "federation", purpose: str = "federated training",
    by: str | None = None, source: RandomSource | None = None, checkpoint: Checkpoint | None = None,
    compute: Compute = DEFAULT, on_step: Callable[[Step], None] | None = None,
) -> TrainingResult:  # fmt: skip
    """Train to the end of the plan: `rounds`, run through. `on_step` is called after every round.

    An error of one client ends the run and names the client; the model is that of the round before, and a run with a
    checkpoint can be resumed from it. Only an update that is NaN or infinite is passed over.
    """
    training = rounds(
        model, clients, plan, algorithm=algorithm, engine=engine, loss=loss, noise=noise, populations=populations,
        weighting=weighting, quorum=quorum, stop=stop, available=available,
        ledger=ledger, dataset=dataset, purpose=purpose, by=by, source=source, checkpoint=checkpoint, compute=compute,
    )  # fmt: skip
    return _finish(training, on_step)


def _finish(training: Training, on_step: Callable[[Step], None] | None) -> TrainingResult:
    try:
        for step in training:
            if on_step is not None:
                on_step(step)
    except (KeyboardInterrupt, LostClientsError):
        training.pause()
        raise
    return training.result()


_MODEL = "pass an instance, for example torch.nn.Linear(4, 2)"


def _check_run(plan: object, loss: object, ledger: object, checkpoint: object, compute: object) -> None:
    """Refuse what is of the wrong kind among the arguments that every way to train has."""
    _expect("plan", plan, Plan, "make one with Plan.calibrate(...) or Plan.without_privacy(...)")
    _expect_function("loss", loss, "pass a function of (outputs, targets), or a loss module that is made")
    if ledger is not None:
        _expect("ledger", ledger, Ledger, 'open one with Ledger("ledger.sqlite")')
    if checkpoint is not None:
        _expect("checkpoint", checkpoint, Checkpoint, 'make one with Checkpoint("run.pt")')
    _expect("compute", compute, Compute, "make one, for example Compute(memory_mb=200)")


def _expect_function(name: str, value: object, fix: str) -> None:
    if isinstance(value, type) or not callable(value):
        raise InputError(f"{name} must be a function, not {_kind_of(value)}; {fix}.")


def _expect(name: str, value: object, kind: type[Any], fix: str) -> None:
    if not isinstance(value, kind):
        raise InputError(f"{name} must be of type {kind.__name__}, not {_kind_of(value)}; {fix}.")


def _kind_of(value: object) -> str:
    """Return what a value is, never what it holds: it may be records."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
