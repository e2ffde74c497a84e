"""What the processes of `test_distributed` run: `distributed_cases.py FOLDER RANK WORLD CASE...`, or under `torchrun`.

Every case also runs alone, for comparison. What it returns, or the error it ends with, is saved for each rank.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from helpers import LOSS, flat, sgd, toy_model, toy_plan, toy_records
from torch import Tensor, nn

import sfumato as sf
from sfumato.errors import SfumatoError
from sfumato.learning import central, client_rounds, distributed
from sfumato.privacy.randomness import RandomSource

Result = dict[str, Any]


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def poisson_plan() -> sf.Plan:
    """Return the one Poisson plan of all cases, two records of 60 a step, so that it is accounted for once."""
    return sf.Plan(sf.Budget(1.0, 1e-3), sf.Poisson(1 / 30), 1.0, 2.0, 12, 60)


def trained(plan: sf.Plan, records: sf.Records, model: nn.Module, *, lr: float = 0.5, **more: Any) -> Result:
    more.setdefault("optimizer", sgd(model, lr))
    more.setdefault("loss", LOSS)
    return told(sf.train(model, records, plan, source=sf.SeededSource(7), **more))


def told(result: sf.TrainingResult) -> Result:
    return {
        "model": flat(result.model),
        "epsilons": [step.epsilon for step in result.steps],
        "statement": str(result.privacy),
        "nonfinite": result.nonfinite,
        "lost": result.lost,
        "run": result.run,
    }


def attempt(work: Callable[[], Any]) -> tuple[str, str]:
    """Return the kind and the text of the error that `work` ends with."""
    try:
        work()
    except SfumatoError as error:
        return type(error).__name__, str(error)
    return "", ""


def full_batch(folder: Path) -> Result:
    # The ranks begin with other weights; those of rank 0 count.
    return trained(toy_plan(), toy_records(), toy_model(seed=rank()))


def poisson(folder: Path) -> Result:
    model = toy_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    return trained(poisson_plan(), toy_records(), model, optimizer=optimizer)


def nearly_empty(folder: Path) -> Result:
    return trained(poisson_plan(), toy_records(6), toy_model())


def shuffled(folder: Path) -> Result:
    return trained(toy_plan(batch_size=25, sampling="shuffled"), toy_records(), toy_model())


def views_and_nan(folder: Path) -> Result:
    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        return LOSS(outputs, targets) * torch.where(targets[0] == 1, math.nan, 1.0)

    def two_views(features: Tensor) -> Tensor:
        return torch.stack([features, -features])

    return trained(toy_plan(steps=3), toy_records(), toy_model(), loss=loss, augment=two_views)


class Unreached(nn.Module):
    """A model with a parameter that the output does not depend on."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = toy_model(), nn.Linear(1, 3)
        nn.init.ones_(self.unused.weight)
        nn.init.ones_(self.unused.bias)

    def forward(self, features: Tensor) -> Tensor:
        out: Tensor = self.used(features)
        return out


def infinite_epsilon(folder: Path) -> Result:
    model = Unreached()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    plan = sf.Plan.without_privacy(population=60, batch_size=2, steps=25)
    return trained(plan, toy_records(), model, optimizer=optimizer)


def infinite_epsilon_by_record(folder: Path) -> Result:
    plan = sf.Plan.without_privacy(population=60, batch_size=60, steps=5)
    loss = nn.CrossEntropyLoss(reduction="none")
    return trained(plan, toy_records(), toy_model(), loss=loss, augment=lambda features: torch.stack([features] * 2))


def batch_statistics(folder: Path) -> Result:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    plan = sf.Plan.without_privacy(population=60, batch_size=60, steps=1)
    return {"error": attempt(lambda: trained(plan, toy_records(), model))}


def noise_ratios() -> list[float]:
    """Return each step's noise over what the plan says, in a model that no record has a gradient in."""
    model = nn.Linear(4, 1000)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    plan = poisson_plan()
    ratios = []
    training = sf.steps(
        model, toy_records(), plan, loss=lambda outputs, targets: outputs.sum() * 0, optimizer=sgd(model, 1.0)
    )
    before = flat(model)
    for _ in training:
        after = flat(model)
        ratios.append(float((after - before).square().mean().sqrt()) * plan.expected_batch / plan.noise_multiplier)
        before = after
    return ratios


def noise(folder: Path) -> Result:
    found: Result = {"honest": noise_ratios()}
    honest = central.Central.use
    for factor in (2 / 3, 3 / 2):
        central.Central.use = lambda self, total, factor=factor: honest(  # type: ignore[method-assign,misc]
            self, {name: tensor * factor for name, tensor in total.items()}
        )
        try:
            found[f"{factor:.2f}"] = noise_ratios()
        finally:
            central.Central.use = honest  # type: ignore[method-assign]
    return found


def noise_off(folder: Path) -> Result:
    honest = RandomSource.add_normal
    RandomSource.add_normal = lambda source, total, std: None  # type: ignore[method-assign, misc]
    try:
        return {"error": attempt(noise_ratios)}
    finally:
        RandomSource.add_normal = honest  # type: ignore[method-assign, misc]


def opened(folder: Path, name: str) -> sf.Ledger:
    """Return a ledger on disk, granted by rank 0."""
    ledger = sf.Ledger(folder / f"{name}.sqlite")
    if rank() == 0:
        ledger.grant("toy", sf.Budget(3.0, 1e-2))
    return ledger


def ledger_once(folder: Path) -> Result:
    # Only rank 0 needs a ledger.
    ledger = opened(folder, "once") if rank() == 0 else None
    found = trained(toy_plan(), toy_records(), toy_model(), ledger=ledger)
    model = toy_model()
    found["error"] = attempt(lambda: trained(toy_plan(), toy_records(), model, ledger=ledger))
    found["untouched"] = torch.equal(flat(model), flat(toy_model()))
    return found


def disagreement(folder: Path) -> Result:
    ledger, other = opened(folder, "disagreement"), rank() == 1
    return {
        "records": attempt(lambda: trained(toy_plan(), toy_records(seed=int(other)), toy_model(), ledger=ledger)),
        "order": attempt(
            lambda: trained(
                toy_plan(), toy_records().select(torch.arange(60).roll(int(other))), toy_model(), ledger=ledger
            )
        ),
        "plan": attempt(lambda: trained(toy_plan(steps=6 + other), toy_records(), toy_model(), ledger=ledger)),
        "model": attempt(
            lambda: trained(
                toy_plan(), toy_records(), nn.Sequential(toy_model()) if other else toy_model(), ledger=ledger
            )
        ),
        "optimiser": attempt(lambda: with_other_optimiser(ledger, other)),
    }


def with_other_optimiser(ledger: sf.Ledger, other: bool) -> Result:
    model = toy_model()
    optimizer = torch.optim.Adam(model.parameters()) if other else sgd(model)
    return trained(toy_plan(), toy_records(), model, ledger=ledger, optimizer=optimizer)


def refused_on_one_rank(folder: Path) -> Result:
    model = toy_model() if rank() == 0 else nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2))
    return {"error": attempt(lambda: trained(toy_plan(), toy_records(), model))}


def failure_at_first(folder: Path) -> Result:
    ledger = opened(folder, "failure")

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if rank() == 1:
            raise ValueError("a record's secret")
        return LOSS(outputs, targets)

    return {"error": attempt(lambda: trained(toy_plan(), toy_records(), toy_model(), loss=loss, ledger=ledger))}


def failure_in_between(folder: Path) -> Result:
    """Rank 1 fails in its share of step 3 and in its update of step 4; each time all go on together."""
    model, armed = toy_model(), {"loss": False, "step": False}

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if rank() == 1 and armed["loss"]:
            raise ValueError("a record's secret")
        return LOSS(outputs, targets)

    class Failing(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            if rank() == 1 and armed["step"]:
                raise MemoryError("no more")
            return super().step(closure)

    optimizer = Failing(model.parameters(), lr=0.5, momentum=0.9)
    training = sf.steps(model, toy_records(), toy_plan(), loss=loss, optimizer=optimizer, source=sf.SeededSource(7))
    found: Result = {"indices": [next(training).index for _ in range(2)]}
    armed["loss"] = True
    found["share"] = attempt(lambda: next(training))
    armed["loss"] = False
    found["indices"].append(next(training).index)
    armed["step"] = True
    try:
        # Rank 1 fails in this step, after the release; the others hear of it when they ask for the next.
        found["indices"].append(next(training).index)
        found["update"] = attempt(lambda: next(training))
    except MemoryError as error:
        found["update"] = (type(error).__name__, str(error))
    armed["step"] = False
    found["indices"] += [step.index for step in training]
    return {**found, "model": flat(model)}


def too_large_a_batch(folder: Path) -> Result:
    honest = distributed.MAX_UNITS
    distributed.MAX_UNITS = 59
    try:
        return {"error": attempt(lambda: trained(toy_plan(), toy_records(), toy_model()))}
    finally:
        distributed.MAX_UNITS = honest


def checkpointed(folder: Path, model: nn.Module, *, resume: bool, path: str = "run.pt") -> Any:
    ledger = sf.Ledger(folder / "checkpoint.sqlite")
    if rank() == 0 and not ledger.has_grant("toy"):
        ledger.grant("toy", sf.Budget(2.0, 1e-3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    return sf.steps(
        model, toy_records(), poisson_plan(), loss=LOSS, optimizer=optimizer, ledger=ledger,
        checkpoint=sf.Checkpoint(folder / path, every=2, resume=resume),
    )  # fmt: skip


def checkpoint(folder: Path) -> Result:
    model = toy_model()
    training = checkpointed(folder, model, resume=False)
    indices = [next(training).index for _ in range(3)]
    training.pause()
    stopped = flat(model)
    other = toy_model(seed=9 + rank())
    training = checkpointed(folder, other, resume=True)
    resumed = flat(other)
    indices += [next(training).index for _ in range(2)]
    training.pause()
    return {
        "indices": indices,
        "stopped": stopped,
        "resumed": resumed,
        "model": flat(other),
        "missing": attempt(lambda: checkpointed(folder, toy_model(), resume=True, path="none.pt")),
    }


def federation(folder: Path) -> Result:
    records = toy_records().by_owner()
    algorithm = sf.FedSGD(optimizer=LOCAL)
    return {
        "error": attempt(
            lambda: sf.federate(
                toy_model(), records, toy_plan(), algorithm=algorithm, engine=sf.Simulation(), loss=LOSS
            )
        )
    }


LOCAL = functools.partial(torch.optim.SGD, lr=0.3)


def cohorts(steps: int = 5, **more: Any) -> sf.Plan:
    """Return a plan of rounds with 4 of 12 clients."""
    more.setdefault("sampling", "poisson")
    return toy_plan(4.0, 12, 4, steps, unit="client", **more)


def plain_cohorts(steps: int = 5) -> sf.Plan:
    return sf.Plan.without_privacy(population=12, batch_size=3, steps=steps, unit="client")


def started(plan: sf.Plan, algorithm: Any = None, model: nn.Module | None = None, **more: Any) -> Any:
    """Return the rounds of 12 clients, who hold 5 to 13 records."""
    records = toy_records(100, owners=12)
    more.setdefault("engine", sf.Simulation())
    more.setdefault("loss", LOSS)
    more.setdefault("source", sf.SeededSource(7))
    return sf.rounds(
        model or toy_model(), more.pop("clients", records.by_owner()), plan,
        algorithm=algorithm or sf.FedAvg(LOCAL, local_steps=3, batch_size=2), **more,
    )  # fmt: skip


def opened_for_clients(folder: Path, name: str) -> sf.Ledger | None:
    """Return a ledger on disk for rank 0, and none for the others, who need none."""
    if rank() != 0:
        return None
    ledger = sf.Ledger(folder / f"{name}.sqlite")
    if not ledger.has_grant("federation"):
        ledger.grant("federation", sf.Budget(10.0, 1e-2, unit="client"))
    return ledger


def federated(*given: Any, **more: Any) -> Result:
    training = started(*given, **more)
    for _ in training:
        pass
    result = training.result()
    return {**told(result), "refused": result.refused, "void": result.void, "stopped": result.stopped}


def rounds_private(folder: Path) -> Result:
    # The ranks begin with other weights; those of rank 0 count.
    return federated(cohorts(), model=toy_model(seed=rank()))


def rounds_nearly_empty(folder: Path) -> Result:
    return federated(toy_plan(4.0, 12, 1, 8, unit="client"), sf.FedSGD(LOCAL))


def rounds_adaptive(folder: Path) -> Result:
    algorithm = sf.FedAdam(LOCAL, local_epochs=2, batch_size=3)
    return federated(cohorts(clip=0.5, clips=sf.AdaptiveClip()), algorithm, weighting=sf.UpTo(6, expected=0.9))


def rounds_scaffold(folder: Path) -> Result:
    return federated(plain_cohorts(8), sf.Scaffold(LOCAL, local_steps=2))


def rounds_correlated(folder: Path) -> Result:
    plan = sf.Plan.calibrate(
        sf.Budget(20.0, 1e-3, unit="client"),
        population=12,
        batch_size=3,
        steps=6,
        sampling="min-separation",
        separation=3,
    )

    def come(step: int) -> Tensor:
        assert rank() == 0
        return torch.arange(12)[torch.arange(12) % 3 == step % 3]

    return federated(plan, noise=sf.CorrelatedNoise(3), available=come)


def rounds_plain(folder: Path) -> Result:
    return federated(plain_cohorts(8), sf.FedYogi(LOCAL, local_epochs=1, batch_size=4))


def rounds_nova(folder: Path) -> Result:
    return federated(plain_cohorts(), sf.FedNova(LOCAL, local_epochs=2, batch_size=4))


def rounds_random_layers(folder: Path) -> Result:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.BatchNorm1d(6), nn.Linear(6, 2))
    # Whole batches: the statistics of two records would magnify the last digit of a weight.
    found = federated(plain_cohorts(3), sf.FedAvg(LOCAL, local_steps=2), model)
    return {**found, "buffers": [model[2].running_mean, model[2].running_var]}


def personal(algorithm: Any) -> Result:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    training = started(plain_cohorts(6), algorithm, model)
    names = [f"site-{number}" for number in range(12)]
    next(training)
    early = [attempt(lambda name=name: training.personal_model(name)) for name in names]  # type: ignore[misc]
    for _ in training:
        pass
    result = training.result()
    models = torch.stack([flat(result.personal_model(name)) for name in names])
    return {**told(result), "personal": models, "early": early}


def rounds_ditto(folder: Path) -> Result:
    return personal(sf.Ditto(LOCAL, local_steps=2))


def rounds_personal_layers(folder: Path) -> Result:
    return personal(sf.FedPer(LOCAL, ("1",), local_steps=2))


def rounds_void(folder: Path) -> Result:
    """Nobody answers in round 2, and too few in round 4: what the clients of that round keep is forgotten everywhere."""

    def lost(step: int, name: str) -> bool:
        return step == 1 or (step == 3 and name not in ("site-2", "site-5"))

    engine, plan = sf.Simulation(drop_out=lost), toy_plan(8.0, 12, 12, 6, unit="client")
    private = federated(plan, engine=engine, quorum=7, ledger=opened_for_clients(folder, "void"))
    every = sf.Plan.without_privacy(population=12, batch_size=12, steps=6, unit="client")
    plain = federated(every, sf.Scaffold(LOCAL), engine=engine, quorum=7)
    return {**private, "plain": plain}


def rounds_nan(folder: Path) -> Result:
    """The updates of two clients, one on each of two ranks, are not finite."""
    clients = dict(toy_records(100, owners=12).by_owner())
    for name in ("site-3", "site-8"):
        clients[name] = dataclasses.replace(clients[name], features=clients[name].features * 1e38)
    everybody = sf.Plan.without_privacy(population=12, batch_size=12, steps=3, unit="client")
    private = federated(toy_plan(8.0, 12, 12, 3, unit="client"), clients=clients)
    return {**private, "plain": federated(everybody, clients=clients)}


def rounds_refused(folder: Path) -> Result:
    ledger = opened_for_clients(folder, "refused")
    clients = toy_records(owners=12).by_owner()
    shared = {"ledger": ledger, "clients": clients}
    saved = {"checkpoint": sf.Checkpoint(folder / "refused.pt")}
    everybody = toy_plan(4.0, 12, 12, 2, unit="client")
    counts = dict.fromkeys(clients, 5)
    return {
        "record sums": attempt(lambda: started(toy_plan(), sf.FedSGD(LOCAL), **shared)),
        "record steps": attempt(lambda: started(toy_plan(), sf.FedAvg(LOCAL), populations=counts, **shared)),
        "SharedNoise": attempt(lambda: started(everybody, noise=sf.SharedNoise(), **shared)),
        "LocalNoise": attempt(lambda: started(everybody, noise=sf.LocalNoise(), **shared)),
        "kept": attempt(lambda: started(everybody, sf.Ditto(LOCAL), **shared, **saved)),
        "clients": attempt(
            lambda: started(everybody, ledger=ledger, clients=toy_records(seed=rank(), owners=12).by_owner())
        ),
        "algorithm": attempt(lambda: started(everybody, sf.FedProx(LOCAL, mu=1.0 + rank()), **shared)),
        "quorum": attempt(lambda: started(everybody, quorum=1 + rank(), **shared)),
        "one rank": attempt(
            lambda: started(everybody, sf.FedAvg(LOCAL if rank() == 0 else torch.optim.LBFGS), **shared)
        ),
    }


def rounds_too_many(folder: Path) -> Result:
    honest = client_rounds.MAX_UNITS
    client_rounds.MAX_UNITS = 11
    try:
        return {"error": attempt(lambda: next(started(toy_plan(4.0, 12, 12, 2, unit="client"))))}
    finally:
        client_rounds.MAX_UNITS = honest


def rounds_failure(folder: Path) -> Result:
    """A client of rank 1 fails in round 3; nobody is to be trained twice, and all go on together."""
    armed = False

    def loss(outputs: Tensor, targets: Tensor) -> Tensor:
        if rank() == 1 and armed:
            raise ValueError("a record's secret")
        return LOSS(outputs, targets)

    training = started(toy_plan(8.0, 12, 12, 6, unit="client"), sf.FedAvgM(LOCAL), loss=loss)
    found: Result = {"indices": [next(training).index for _ in range(2)]}
    armed = True
    found["error"] = attempt(lambda: next(training))
    armed = False
    found["indices"] += [step.index for step in training]
    return {**found, "model": flat(training.model)}


def rounds_noise_ratios() -> list[float]:
    """Return each round's noise over what the plan says, in a model that no client has an update for."""
    model = nn.Linear(4, 1000)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    plan = cohorts(8)
    one = functools.partial(torch.optim.SGD, lr=1.0)
    training = started(
        plan, sf.FedSGD(one), model, loss=lambda outputs, targets: outputs.sum() * 0, source=sf.SecureSource()
    )
    ratios, before = [], flat(model)
    for _ in training:
        after = flat(model)
        ratios.append(float((after - before).square().mean().sqrt()) * plan.expected_batch / plan.noise_multiplier)
        before = after
    return ratios


def rounds_noise(folder: Path) -> Result:
    found: Result = {"honest": rounds_noise_ratios()}
    honest = client_rounds.ClientRounds.use
    for factor in (2 / 3, 3 / 2):
        client_rounds.ClientRounds.use = lambda self, mean, share, factor=factor: honest(  # type: ignore[method-assign,misc]
            self, {name: tensor * factor for name, tensor in mean.items()}, share
        )
        try:
            found[f"{factor:.2f}"] = rounds_noise_ratios()
        finally:
            client_rounds.ClientRounds.use = honest  # type: ignore[method-assign]
    return found


def rounds_saved(folder: Path, model: nn.Module, *, resume: bool) -> Any:
    return started(
        cohorts(8), sf.FedAvgM(LOCAL), model, ledger=opened_for_clients(folder, "saved"),
        source=sf.SecureSource(), checkpoint=sf.Checkpoint(folder / "rounds.pt", every=2, resume=resume),
    )  # fmt: skip


def rounds_checkpoint(folder: Path) -> Result:
    model = toy_model()
    training = rounds_saved(folder, model, resume=False)
    indices = [next(training).index for _ in range(3)]
    training.pause()
    stopped, other = flat(model), toy_model(seed=9 + rank())
    training = rounds_saved(folder, other, resume=True)
    resumed = flat(other)
    indices += [next(training).index for _ in range(2)]
    training.pause()
    return {"indices": indices, "stopped": stopped, "resumed": resumed, "model": flat(other)}


def rounds_killed(folder: Path) -> Result:
    def work() -> None:
        for step in started(cohorts(), ledger=opened_for_clients(folder, "killed rounds")):
            if rank() == 1 and step.index == 2:
                os.kill(os.getpid(), signal.SIGKILL)

    return {"error": attempt(work)}


def killed(folder: Path) -> Result:
    def on_step(step: sf.Step) -> None:
        if rank() == 1 and step.index == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    ledger = opened(folder, "killed")
    return {"error": attempt(lambda: trained(toy_plan(), toy_records(), toy_model(), ledger=ledger, on_step=on_step))}


def main() -> None:
    folder, cases = Path(sys.argv[1]), sys.argv[4:]
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=int(sys.argv[2]), world_size=int(sys.argv[3]),
        timeout=datetime.timedelta(seconds=60),
    )  # fmt: skip
    for case in cases:
        torch.save(globals()[case](folder), folder / f"{case}-{rank()}.pt")
    if not {"killed", "rounds_killed"} & {*cases}:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
