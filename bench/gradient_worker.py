"""One mode of training on one model, in its own process: takes steps when `gradients.py` asks, and tells their times.

A request is a line on standard input, the number of steps; the answer is a line of JSON on standard output.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from gradient_models import WORKLOADS, Workload
from torch import Tensor, nn

# Each mode imports its own library, which the other modes' environments lack.
# ruff: noqa: PLC0415

THREADS = 2
LEARNING_RATE = 0.1
CLIP = 1.0
STEPS = 200  # of the plan; its accountant looks ahead 16 times a plan, so few of the timed steps pay for that
NOISE_MULTIPLIER = 8.4885  # of the peers: what sfumato's plan below comes to, so that all models move alike

TakeStep = Callable[[], object]


def plain(workload: Workload, device: str) -> TakeStep:
    features, targets = _batch(workload, device)
    model = workload.build(nn.LSTM).to(device)
    optimizer = _sgd(model)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(features), targets).backward()
        optimizer.step()

    return step


def plain_noised(workload: Workload, device: str) -> TakeStep:
    """A plain step with secure noise on its gradient: what a private one would take if clipping cost nothing."""
    import sfumato as sf
    from sfumato.privacy import events
    from sfumato.privacy.books import Cost
    from sfumato.privacy.bounded import Bounded
    from sfumato.privacy.budget import Relation, Unit
    from sfumato.privacy.mechanisms import gaussian
    from sfumato.privacy.randomness import SecureSource

    features, targets = _batch(workload, device)
    model = workload.build(nn.LSTM).to(device)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer, source, ledger = _sgd(model), SecureSource(), sf.Ledger.in_memory()
    ledger.grant("bench", sf.Budget(1, 1e-5))
    charge = ledger.charge(
        "bench", purpose="bench", event=events.to_json(events.repeated(events.gaussian(8.0), STEPS)), draws=STEPS,
        cost=Cost(1, 1e-5, Unit.RECORD, Relation.ADD_OR_REMOVE_ONE),
    )  # fmt: skip

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(features), targets).backward()
        summed = Bounded({name: p.grad for name, p in trained.items() if p.grad is not None}, 1.0)
        released = gaussian(summed, 1e-6, relation=Relation.ADD_OR_REMOVE_ONE, charge=charge, source=source)
        for name, gradient in released.value.items():
            trained[name].grad = gradient
        optimizer.step()

    return step


def sfumato(workload: Workload, device: str) -> TakeStep:
    import sfumato as sf

    records = sf.Records.from_arrays(*_batch(workload, device))
    plan = sf.Plan.calibrate(
        sf.Budget(8, 1e-5), population=len(records), batch_size=workload.batch, steps=STEPS, clip=CLIP,
        sampling="full-batch",
    )  # fmt: skip
    model = workload.build(nn.LSTM).to(device)
    training = sf.steps(model, records, plan, loss=F.cross_entropy, optimizer=_sgd(model))
    return lambda: next(training)


def opacus(how: str) -> Callable[[Workload, str], TakeStep]:
    def prepare(workload: Workload, device: str) -> TakeStep:
        from opacus import PrivacyEngine
        from opacus.layers import DPLSTM

        features, targets = _batch(workload, device)
        model = workload.build(DPLSTM).to(device)
        data = torch.utils.data.TensorDataset(features, targets)
        model, optimizer, *rest = PrivacyEngine().make_private(
            module=model, optimizer=_sgd(model), criterion=nn.CrossEntropyLoss(),
            data_loader=torch.utils.data.DataLoader(data, batch_size=workload.batch),
            noise_multiplier=NOISE_MULTIPLIER, max_grad_norm=CLIP, poisson_sampling=False, grad_sample_mode=how,
        )  # fmt: skip
        criterion = rest[0] if how == "ghost" else nn.CrossEntropyLoss()

        def step() -> None:
            optimizer.zero_grad()
            criterion(model(features), targets).backward()
            optimizer.step()

        return step

    return prepare


def opake(workload: Workload, device: str) -> TakeStep:
    from opake.dpsgd.clipping import clipped_grad
    from opake.dpsgd.noise import gaussian_noise
    from opake.functional import make_functional
    from opake.random import random_key

    features, targets = _batch(workload, device)
    model = workload.build(nn.LSTM).to(device)
    call, trained, frozen = make_functional(model, disable_autograd_tracking=True, partition_trainable=True)

    def loss_of_one(weights: dict[str, Tensor], feature: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(call({**frozen, **weights}, feature.unsqueeze(0)), target.unsqueeze(0))

    gradient, clipping = clipped_grad(
        loss_of_one, clipping_norm=CLIP, normalize_by=workload.batch, batch_argnums=(1, 2)
    )
    noise, drawn = gaussian_noise(noise_multiplier=NOISE_MULTIPLIER, key=random_key())

    def step() -> None:
        nonlocal clipping, drawn
        mean, clipping = gradient(trained, features, targets, state=clipping)
        noised, drawn = noise(mean, drawn)
        for name, tensor in noised.pytree.items():
            trained[name].sub_(tensor, alpha=LEARNING_RATE)

    return step


MODES: dict[str, Callable[[Workload, str], TakeStep]] = {
    "plain": plain,
    "plain-noised": plain_noised,
    "sfumato": sfumato,
    "opacus-hooks": opacus("hooks"),
    "opacus-functorch": opacus("functorch"),
    "opacus-ghost": opacus("ghost"),
    "opake-dpsgd": opake,
}
LIBRARIES = ("torch", "opacus", "opake-dpsgd")


def _batch(workload: Workload, device: str) -> tuple[Tensor, Tensor]:
    features, targets = workload.data()
    return features.to(device), targets.to(device)


def _sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)


class PeakMemory:
    """The most memory held since it was made, above what was held then, in MB (of 2**20 bytes).

    On the CPU that is the process's resident memory, on a GPU what torch allocated there.
    """

    def __init__(self, device: str) -> None:
        self._cuda = device == "cuda"
        gc.collect()
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return
        # The kernel forgets the peak so far where it lets us; where not, the peak of the loading counts too.
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self._before = _status("VmRSS")

    def megabytes(self) -> float:
        peak = torch.cuda.max_memory_allocated() if self._cuda else _status("VmHWM")
        return (peak - self._before) / 2**20


def _status(name: str) -> int:
    """Return a figure of this process's memory in bytes."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def _timed(step: TakeStep, device: str) -> float:
    begun = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) * 1e3


def _installed() -> dict[str, str]:
    found = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return {name: found[name] for name in LIBRARIES if name in found}


def main(mode: str, model: str, device: str) -> None:
    # Answers have a pipe of their own, so that whatever a library prints cannot be taken for one.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        print(json.dumps(fields), file=answers, flush=True)

    try:
        torch.set_num_threads(THREADS)
        torch.manual_seed(0)
        step = MODES[mode](WORKLOADS[model], device)
        memory = PeakMemory(device)
        answer(ready=True, versions=_installed())
        for line in sys.stdin:
            times = [_timed(step, device) for _ in range(int(line))]
            answer(ms=times, peak_mb=memory.megabytes())
    except Exception as error:
        said = str(error).strip().splitlines()
        answer(error=f"{type(error).__name__}: {said[0]}" if said else type(error).__name__)


if __name__ == "__main__":
    main(*sys.argv[1:])
