"""One engine of federated rounds on one task, in its own process: takes rounds when `federation.py` asks, and times them.

A request is a line on standard input: a number of rounds, `loss`, the global model's loss on pooled records, or `collect`,
which has Python's garbage collected. The answer is a line of JSON on standard output.
"""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import importlib.metadata
import json
import logging
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from federation_models import ALL, BATCH, LEARNING_RATE, Client, Task, clients_of, load
from torch import Tensor, nn
from torch.optim import SGD

# Each engine imports its own library, which the other engines' environments lack.
# ruff: noqa: PLC0415

THREADS = 2
ROUNDS = 100_000  # more than anybody asks for
POOLED = 6000  # records that the loss is taken on
LIBRARIES = ("torch", "numpy", "pfl", "flwr", "ray", "sfumato")

Serve = Callable[[Callable[[], object], Callable[[], nn.Module]], None]
"""Answers requests till there are no more; takes what runs one round, and what gives the global model."""


def plain(task: Task, folder: Path, serve: Serve) -> None:
    """Serve the loop that anybody would write: a copy of the model for each client, SGD, the weighted mean."""
    model, clients = task.first_model(), clients_of(folder)

    def take_round() -> None:
        cohort = random.sample(clients, task.cohort)
        total = sum(len(targets) for _, targets in cohort)
        sums = [torch.zeros_like(weight) for weight in model.parameters()]
        for client in cohort:
            local = copy.deepcopy(model)
            train(local, client)
            for summed, weight in zip(sums, local.parameters(), strict=True):
                summed.add_(weight.detach(), alpha=len(client[1]) / total)
        with torch.no_grad():
            for weight, summed in zip(model.parameters(), sums, strict=True):
                weight.copy_(summed)

    serve(take_round, lambda: model)


def sfumato(task: Task, folder: Path, serve: Serve) -> None:
    import sfumato as sf

    features, targets, offsets = load(folder)

    def make(index: int) -> sf.Records:
        own = index % (len(offsets) - 1)
        begin, end = offsets[own], offsets[own + 1]
        return sf.Records(features[begin:end], targets[begin:end])

    clients = (
        sf.Population.from_factory(task.clients, make)
        if task.lazy
        else sf.Population.of({f"client-{index}": make(index) for index in range(task.clients)})
    )
    plan = sf.Plan.calibrate(
        sf.Budget(math.inf, unit="client"), population=task.clients, batch_size=task.cohort, steps=ROUNDS,
        sampling="full-batch" if task.cohort == task.clients else "poisson",
    )  # fmt: skip
    algorithm = sf.FedAvg(local=partial(SGD, lr=LEARNING_RATE), local_epochs=1, batch_size=BATCH)
    model = task.first_model()
    rounds = sf.rounds(model, clients, plan, algorithm=algorithm, engine=sf.Simulation(), loss=F.cross_entropy)
    serve(lambda: next(rounds), lambda: model)


def pfl(task: Task, folder: Path, serve: Serve) -> None:
    """Serve pfl: records in memory, batches that it keeps, no evaluation, no callbacks, no metrics to a platform."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.aggregate.weighting import WeightByDatapoints
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.pytorch import PyTorchTensorDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
    from pfl.model.pytorch import PyTorchModel

    logging.getLogger().setLevel(logging.WARNING)
    network = task.first_model()
    network.loss = lambda features, targets: F.cross_entropy(network(features), targets)  # type: ignore[assignment]
    network.metrics = lambda *_: {}  # type: ignore[assignment]
    users = [PyTorchTensorDataset(client) for client in clients_of(folder)]
    everyone = task.cohort == task.clients
    sampler = get_user_sampler("minimize_reuse" if everyone else "random", range(task.clients))
    data = FederatedDataset(users.__getitem__, sampler)
    # Clients of equal size weigh the same as they are.
    weights = [] if len({len(user) for user in users}) == 1 else [WeightByDatapoints()]
    backend = SimulatedBackend(training_data=data, val_data=data, postprocessors=weights)
    model = PyTorchModel(network, SGD, SGD(network.parameters(), lr=1.0))
    local = NNTrainHyperParams(local_batch_size=BATCH, local_num_epochs=1, local_learning_rate=LEARNING_RATE)
    algorithm, done = FederatedAveraging(), 0

    def take_round() -> None:
        nonlocal done
        done += 1
        # The algorithm counts its rounds over calls: this one goes on for one more.
        until = NNAlgorithmParams(
            done, evaluation_frequency=ROUNDS, train_cohort_size=task.cohort, val_cohort_size=None
        )
        algorithm.run(until, backend, model, local, NNEvalHyperParams(None), send_metrics_to_platform=False)

    serve(take_round, lambda: network)


def flower(task: Task, folder: Path, serve: Serve) -> None:
    """Serve Flower's simulation: one actor a core, training only, the model and the records kept by each actor."""
    from flwr.app import ArrayRecord, Context
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg
    from flwr.simulation import run_simulation

    logging.getLogger("flwr").setLevel(logging.ERROR)
    server, client = ServerApp(), ClientApp()
    client.train()(partial(train_by_flower, _name_of(task), str(folder)))
    model = task.first_model()
    strategy = FedAvg(
        fraction_train=task.cohort / task.clients, min_train_nodes=task.cohort, min_available_nodes=task.clients,
        fraction_evaluate=0.0,
    )  # fmt: skip

    @server.main()
    def serve_rounds(grid: Grid, context: Context) -> None:
        arrays = ArrayRecord(model.state_dict())

        def take_round() -> None:
            nonlocal arrays
            arrays = strategy.start(grid, arrays, num_rounds=1).arrays

        def current() -> nn.Module:
            model.load_state_dict(arrays.to_torch_state_dict())
            return model

        serve(take_round, current)

    run_simulation(
        server, client, task.clients,
        backend_config={"init_args": {"num_cpus": THREADS}, "client_resources": {"num_cpus": 1, "num_gpus": 0.0}},
    )  # fmt: skip


def train_by_flower(name: str, folder: str, message: Any, context: Any) -> Any:
    """Train one client's model in an actor."""
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

    model, clients = _kept_by_actor(name, folder)
    client = clients[int(context.node_config["partition-id"])]
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    train(model, client)
    trained = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({"num-examples": len(client[1])})}
    return Message(content=RecordDict(trained), reply_to=message)


@functools.cache
def _kept_by_actor(name: str, folder: str) -> tuple[nn.Module, list[Client]]:
    torch.set_num_threads(1)
    return ALL[name].first_model(), clients_of(Path(folder))


def _name_of(task: Task) -> str:
    return next(name for name, known in ALL.items() if known is task)


def train(model: nn.Module, client: Client) -> None:
    """Train in place for one epoch."""
    features, targets = client
    optimizer = SGD(model.parameters(), lr=LEARNING_RATE)
    for batch in torch.randperm(len(targets)).split(BATCH):
        optimizer.zero_grad()
        F.cross_entropy(model(features[batch]), targets[batch]).backward()
        optimizer.step()


@torch.no_grad()
def loss_of(model: nn.Module, pooled: tuple[Tensor, Tensor]) -> float:
    parts = zip(pooled[0].split(100), pooled[1].split(100), strict=True)
    return sum(float(F.cross_entropy(model(x), y, reduction="sum")) for x, y in parts) / len(pooled[1])


ENGINES: dict[str, Callable[[Task, Path, Serve], None]] = {
    "plain": plain,
    "sfumato": sfumato,
    "pfl": pfl,
    "pfl-2": pfl,
    "flower": flower,
}
# Imported before the clock of the first round starts.
IMPORTS = {"sfumato": "sfumato.learning.api", "pfl": "pfl.model.pytorch", "pfl-2": "pfl.model.pytorch", "flower": "ray"}


def _requests() -> Iterator[str]:
    """Yield the lines of standard input; where processes share an engine, the first reads and tells the others."""
    if not torch.distributed.is_initialized():
        yield from sys.stdin
        return
    told: list[str | None] = [""]
    while True:
        if torch.distributed.get_rank() == 0:
            told[0] = sys.stdin.readline() or None
        torch.distributed.broadcast_object_list(told)
        if told[0] is None:
            return
        yield told[0]


def main(engine: str, name: str, folder: str) -> None:
    # Answers have a pipe of their own, so that whatever a library prints cannot be taken for one.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        if int(os.environ.get("RANK", "0")) == 0:
            print(json.dumps(fields), file=answers, flush=True)

    def serve(take_round: Callable[[], object], model: Callable[[], nn.Module]) -> None:
        start_up = time.perf_counter() - begun
        features, targets, _ = load(Path(folder))
        every = max(1, len(targets) // POOLED)
        pooled = features[::every], targets[::every]
        answer(ready=True, start_s=start_up, versions=_installed())
        for request in _requests():
            if request.strip() == "loss":
                answer(loss=loss_of(model(), pooled))
                continue
            if request.strip() == "collect":
                answer(collected=gc.collect())
                continue
            answer(s=[_seconds(take_round) for _ in range(int(request))])

    try:
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", THREADS)))
        importlib.import_module(IMPORTS.get(engine, "torch"))
        begun = time.perf_counter()
        ENGINES[engine](ALL[name], Path(folder), serve)
    except Exception as error:
        said = str(error).strip().splitlines()
        answer(error=f"{type(error).__name__}: {said[0]}" if said else type(error).__name__)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _seconds(take_round: Callable[[], object]) -> float:
    begun = time.perf_counter()
    take_round()
    return time.perf_counter() - begun


def _installed() -> dict[str, str]:
    found = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    return {name: found[name] for name in LIBRARIES if name in found}


if __name__ == "__main__":
    # By its own name, so that an engine's processes find what they are sent by name.
    from federation_worker import main as started_by_name

    started_by_name(*sys.argv[1:])
