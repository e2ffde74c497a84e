"""What the processes of `test_distributed` run: `distributed_cases.py FOLDER RANK WORLD CASE...`, or under `torchrun`.

Every case also runs alone, for comparison. What it returns, or the error it ends with, is saved for each rank.
"""

from __future__ import annotations

import datetime
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
from sfumato.learning import central, distributed
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
    result = sf.train(model, records, plan, source=sf.SeededSource(7), **more)
    return {
        "model": flat(model),
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
    algorithm = sf.FedSGD(optimizer=sgd)
    return {
        "error": attempt(
            lambda: sf.federate(
                toy_model(), records, toy_plan(), algorithm=algorithm, engine=sf.Simulation(), loss=LOSS
            )
        )
    }


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
    if "killed" not in cases:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
