"""Algorithms in which every client ends with a model of its own: Ditto and personal layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import final

from torch import Tensor, nn
from typing_extensions import override

from sfumato import _checks
from sfumato.errors import InputError
from sfumato.gradients.support import trainable
from sfumato.learning.fedavg import AS_IT_IS, Served, moved
from sfumato.learning.federated import Federation, Work
from sfumato.learning.groups import Group, running_statistics
from sfumato.learning.local_training import LocalTraining, MakeOptimizer
from sfumato.privacy.bounded import Tensors


@final
@dataclass(frozen=True)
class Ditto(Served):
    """FedAvg, and beside it each client trains a model of its own that is pulled to the server's (Li et al. 2021).

    A client's own model never leaves it, so it is in no release and under no promise towards the client itself. It has running
    statistics of its own.

    Args:
        local: As for `FedAvg`; it makes the optimiser of both models.
        pull: Lambda: pull / 2 * (distance to the server's model)**2 is added to the own model's loss; above 0.
        local_steps: As for `FedAvg`.
        batch_size: As for `FedAvg`.
        server: As for `FedAvg`.
        local_epochs: As for `FedAvg`.

    Raises:
        InputError: a number is out of range.
    """

    local: MakeOptimizer
    pull: float = 1.0
    local_steps: int | None = None
    batch_size: int | None = None
    server: MakeOptimizer = AS_IT_IS
    local_epochs: int | None = None

    def __post_init__(self) -> None:
        _checks.positive("pull", self.pull)
        super().__post_init__()

    @cached_property
    def _own(self) -> LocalTraining:
        return self._trained(self.pull)

    @override
    def kept(self, model: nn.Module) -> dict[str, Tensor]:
        every = {**trainable(model), **running_statistics(model)}
        return {name: value.detach().clone() for name, value in every.items()}

    @override
    def client(self, group: Group, shared: Tensors, kept: Mapping[str, Tensor]) -> Work:
        own = group.train(self._own, kept, toward=group.sent()).weights
        return Work(moved(group, group.train(self.training, {}).weights), {name: own[name] for name in kept})

    @override
    def personal(self, model: nn.Module, kept: Tensors) -> dict[str, Tensor]:
        return dict(kept)


@final
@dataclass(frozen=True)
class FedPer(Served):
    """FedAvg of the base of a model, while each client keeps its own last layers (Arivazhagan et al. 2019).

    The personal layers never leave the client; the server's model keeps the ones it began with.

    Args:
        local: As for `FedAvg`.
        personal_layers: Names of modules or parameters that stay with the client, for example ("head",).
        local_steps: As for `FedAvg`.
        batch_size: As for `FedAvg`.
        server: As for `FedAvg`.
        local_epochs: As for `FedAvg`.

    Raises:
        InputError: a number is out of range, no layer is named, or (when the rounds are made) the model has no such layer.
    """

    local: MakeOptimizer
    personal_layers: tuple[str, ...]
    local_steps: int | None = None
    batch_size: int | None = None
    server: MakeOptimizer = AS_IT_IS
    local_epochs: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.personal_layers, tuple) or not self.personal_layers:
            raise InputError('personal_layers must be a tuple of names of layers, for example ("head",).')
        super().__post_init__()

    @override
    def check(self, federation: Federation) -> None:
        super().check(federation)
        names = {**trainable(federation.model), **running_statistics(federation.model)}
        for layer in self.personal_layers:
            if not any(self._belongs(name, layer) for name in names):
                parents = sorted({name.rpartition(".")[0] or name for name in names})
                raise InputError(f'The model has no trained layer "{layer}".{_checks.did_you_mean(layer, parents)}')
        if all(self._is_personal(name) for name in trainable(federation.model)):
            raise InputError("Every layer is personal, so there is nothing to learn together; name fewer of them.")

    @override
    def kept(self, model: nn.Module) -> dict[str, Tensor]:
        every = {**trainable(model), **running_statistics(model)}
        return {name: value.detach().clone() for name, value in every.items() if self._is_personal(name)}

    @override
    def shapes(self, model: nn.Module) -> dict[str, Tensor]:
        return {name: value for name, value in super().shapes(model).items() if not self._is_personal(name)}

    @override
    def client(self, group: Group, shared: Tensors, kept: Mapping[str, Tensor]) -> Work:
        ends = group.train(self.training, kept).weights
        own = {name: ends.pop(name) for name in kept}
        return Work(moved(group, ends), own)

    @override
    def personal(self, model: nn.Module, kept: Tensors) -> dict[str, Tensor]:
        return dict(kept)

    def _is_personal(self, name: str) -> bool:
        return any(self._belongs(name, layer) for layer in self.personal_layers)

    @staticmethod
    def _belongs(name: str, layer: str) -> bool:
        return name == layer or name.startswith(f"{layer}.")
