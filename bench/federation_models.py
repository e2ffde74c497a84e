"""The tasks that `federation.py` times: models, clients and cohorts. Plain torch only, so that every peer can import it.

The clients' records lie in three files, sorted by client, which every process maps into its memory: no engine pays for
a copy of them that it did not make.
"""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

LEARNING_RATE = 0.1
BATCH = 10
CLASSES = 10
SIDE = 28

Client = tuple[Tensor, Tensor]
"""One client's features (records, 1, 28, 28), float32, and targets (records,), int64."""


@dataclass(frozen=True)
class Task:
    """One federation, and the round that is timed.

    Attributes:
        build: Makes the model; always with the same first weights after `first_model`.
        clients: How many clients there are.
        cohort: How many of them train in a round; in expectation, where the engine draws so.
        write: Writes the records into a folder.
        lazy: Whether clients are made as they are drawn, all from the same small pool of records.
        tolerance: How far apart two engines' losses may lie after one round, relatively.
    """

    build: Callable[[], nn.Module]
    clients: int
    cohort: int
    write: Callable[[Path], None]
    lazy: bool = False
    tolerance: float = 0.05

    def first_model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build()


def logistic() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(SIDE * SIDE, CLASSES))


def mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(SIDE * SIDE, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, CLASSES)
    )


def leaf_cnn() -> nn.Module:
    """Return the network of LEAF's FEMNIST (Caldas et al. 2018) with a fourth of its hidden layer: 1.7M parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(3136, 512), nn.ReLU(), nn.Linear(512, CLASSES),
    )  # fmt: skip


def write_synthetic(folder: Path, clients: int = 100, records: int = 60) -> None:
    """Write clients of equal size: noise around one mean for each class, so that a round shows in the loss."""
    generator = torch.Generator().manual_seed(0)
    means = torch.randn((CLASSES, 1, SIDE, SIDE), generator=generator)
    targets = torch.randint(CLASSES, (clients * records,), generator=generator)
    features = 0.2 * means[targets] + 0.25 * torch.randn((len(targets), 1, SIDE, SIDE), generator=generator)
    _save(folder, features.numpy(), targets.numpy(), np.arange(clients + 1) * records)


def write_mnist_writers(folder: Path) -> None:
    """Write MNIST's training digits by who wrote them, after the labels of QMNIST (Yadav and Bottou 2019)."""
    if not (data := os.environ.get("SFUMATO_DATA")):
        raise FileNotFoundError("mnist-writers needs SFUMATO_DATA, the folder that holds mnist and qmnist_writers")
    pixels = _idx(Path(data) / "mnist" / "train-images-idx3-ubyte.gz", ">u1")
    labels = _idx(Path(data) / "qmnist_writers" / "qmnist-train-labels-idx2-int.gz", ">i4")
    order = np.argsort(labels[:, 2], kind="stable")
    _, sizes = np.unique(labels[:, 2], return_counts=True)
    features = pixels[order, None].astype(np.float32) / 255
    _save(folder, features, labels[order, 0].astype(np.int64), np.concatenate(([0], np.cumsum(sizes))))


def load(folder: Path) -> tuple[Tensor, Tensor, list[int]]:
    """Return all features, all targets, and where each client begins and the last one ends."""
    # Copy on write: torch wants memory that it may write to, and nobody writes.
    features, targets = (np.load(folder / f"{name}.npy", mmap_mode="c") for name in ("features", "targets"))
    return torch.from_numpy(features), torch.from_numpy(targets), np.load(folder / "offsets.npy").tolist()


def clients_of(folder: Path) -> list[Client]:
    features, targets, offsets = load(folder)
    return [(features[a:b], targets[a:b]) for a, b in pairwise(offsets)]


def _save(folder: Path, features: np.ndarray, targets: np.ndarray, offsets: np.ndarray) -> None:
    np.save(folder / "features.npy", features)
    np.save(folder / "targets.npy", targets)
    np.save(folder / "offsets.npy", offsets)


def _idx(path: Path, kind: str) -> np.ndarray:
    with gzip.open(path) as file:
        axes = file.read(4)[3]
        shape = np.frombuffer(file.read(4 * axes), ">u4")
        return np.frombuffer(file.read(), kind).reshape(shape)


TASKS = {
    "logistic": Task(logistic, 100, 100, write_synthetic),
    "mlp": Task(mlp, 100, 100, write_synthetic),
    "leaf-cnn": Task(leaf_cnn, 100, 100, write_synthetic),
    "mnist-writers": Task(leaf_cnn, 539, 50, write_mnist_writers, tolerance=0.25),
}
SIZES = (10_000, 1_000_000)
POPULATIONS = {
    f"{name}-{size}": Task(build, size, 1000, partial(write_synthetic, clients=1000), lazy=True)
    for name, build in (("logistic", logistic), ("mlp", mlp))
    for size in SIZES
}
MEMORY = {
    "logistic-memory": Task(logistic, 1_000_000, 100, write_synthetic, lazy=True),
    "mlp-memory": Task(mlp, 1_000_000, 20, write_synthetic, lazy=True),
}
ALL = TASKS | POPULATIONS | MEMORY
