"""Clients train on their own for a while, then their updates are averaged: FedAvg and its nearest relatives."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, final

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from typing_extensions import override

from sfumato import _checks
from sfumato.errors import PlanError
from sfumato.gradients.support import trainable
from sfumato.learning.aggregation import Aggregation, LocalNoise
from sfumato.learning.client_rounds import ClientRounds
from sfumato.learning.federated import ClientAlgorithm, Federation, Work, made_for
from sfumato.learning.groups import Group
from sfumato.learning.local_private import LocalPrivateSteps
from sfumato.learning.local_training import LocalTraining, MakeOptimizer
from sfumato.learning.procedure import Procedure
from sfumato.learning.server_optimizers import AdaptiveServer
from sfumato.privacy.bounded import Tensors

AS_IT_IS: MakeOptimizer = functools.partial(SGD, lr=1.0)


class Averaging(ClientAlgorithm):
    """Every client trains from the server's model and hands in how far it went.

    A kind is a frozen dataclass that has what follows as fields, or derives it.
    """

    if TYPE_CHECKING:  # at run time these would hide fields without a default

        @property
        def local(self) -> MakeOptimizer:
            """Makes a client's optimiser, anew in every round."""
            ...

        @property
        def local_steps(self) -> int | None:
            """Steps of a client in a round; 1 if neither steps nor epochs are given."""

        @property
        def local_epochs(self) -> int | None:
            """Passes over the client's records, in place of `local_steps`."""

        @property
        def batch_size(self) -> int | None:
            """Records of a step; None means all of the client's."""

    @property
    def proximal(self) -> float:
        """How strongly a client is pulled back to the server's model."""
        return 0.0

    def __post_init__(self) -> None:
        _ = self.training  # refuses what does not go together

    @cached_property
    def training(self) -> LocalTraining:
        """What a client does."""
        return self._trained(self.proximal)

    def _trained(self, proximal: float) -> LocalTraining:
        steps = 1 if self.local_steps is None and self.local_epochs is None else self.local_steps
        return LocalTraining(self.local, steps, self.local_epochs, self.batch_size, proximal)

    @override
    def is_stackable(self, model: nn.Module) -> bool:
        return self.training.stacks(trainable(model).values())

    @override
    def check(self, federation: Federation) -> None:
        made_for(federation.model, self.training.optimizer)  # refuses an unfit optimiser before anything is charged

    @override
    def client(self, group: Group, shared: Tensors, kept: Mapping[str, torch.Tensor]) -> Work:
        ends = group.train(self.training, {}).weights
        return Work(moved(group, ends))

    @override
    def procedure(self, federation: Federation, noise: Aggregation | None) -> Procedure:
        """Return rounds of clients.

        Raises:
            PlanError: records are to be protected, which this algorithm cannot bound.
        """
        if federation.plan.is_private and not federation.protects_clients:
            raise PlanError(
                f"{type(self).__name__} cannot bound one record after several local steps; protect clients "
                '(unit "client"), or use FedSGD or FedAvg.'
            )
        return ClientRounds(federation, noise, self)


class Served(Averaging):
    """An `Averaging` whose server's optimiser is the caller's choice."""

    if TYPE_CHECKING:  # as above

        @property
        def server(self) -> MakeOptimizer:
            """Makes the server's optimiser for the averaged update."""
            ...

    @override
    def server_optimizer(self, model: nn.Module) -> Optimizer:
        return made_for(model, self.server)


def moved(group: Group, ends: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return start - end for each client, which points like a gradient; uses `ends` up."""
    start = group.sent()
    return {name: torch.sub(start[name], end, out=end) for name, end in ends.items()}


@final
@dataclass(frozen=True)
class FedAvg(Served):
    """Clients train on their own, then their models are averaged (McMahan et al. 2017).

    With unit "client" (and without privacy) a step of the plan is a round: each client's update is clipped as a whole, and
    the noised sum of updates goes to the server's optimiser. With unit "record" a step of the plan is a local step of
    DP-SGD with the client's own noise; after every `local_steps` of them, and at the end, the models are averaged by the
    declared populations.

    Args:
        local: Makes a client's optimiser, anew in every round.
        local_steps: Steps of a client between two averages; 1 if nothing is said.
        batch_size: Records of a plain local step; None means all of the client's. With unit "record" the plan's
            sampler draws instead.
        server: Makes the server's optimiser for the averaged update; the default takes it as it is.
        local_epochs: Passes over the client's records, in place of `local_steps`.

    Raises:
        InputError: a count is below 1, or both steps and epochs are given.
    """

    local: MakeOptimizer
    local_steps: int | None = None
    batch_size: int | None = None
    server: MakeOptimizer = AS_IT_IS
    local_epochs: int | None = None

    @override
    def procedure(self, federation: Federation, noise: Aggregation | None) -> Procedure:
        """Return the procedure for the unit of the plan."""
        if federation.protects_clients or not federation.plan.is_private:
            return ClientRounds(federation, noise, self)
        if noise is not None and not isinstance(noise, LocalNoise):
            raise PlanError(
                "FedAvg that protects records adds noise inside every client (LocalNoise): several local steps "
                'cannot be bounded for one record afterwards. Use FedSGD for other noise, or unit "client".'
            )
        if self.training.steps is None:
            raise PlanError("FedAvg that protects records counts local steps, not epochs; give local_steps.")
        return LocalPrivateSteps(federation, self.local, self.training.steps)


@final
@dataclass(frozen=True)
class FedAvgM(Averaging):
    """FedAvg whose server keeps a momentum of the updates (Hsu, Qi and Brown 2019).

    Args:
        local: As for `FedAvg`.
        local_steps: As for `FedAvg`.
        batch_size: As for `FedAvg`.
        momentum: In [0, 1).
        server_lr: Above 0.
        local_epochs: As for `FedAvg`.

    Raises:
        InputError: a number is out of range.
    """

    local: MakeOptimizer
    local_steps: int | None = None
    batch_size: int | None = None
    momentum: float = 0.9
    server_lr: float = 1.0
    local_epochs: int | None = None

    def __post_init__(self) -> None:
        _checks.fraction("momentum", self.momentum, allow_zero=True)
        _checks.positive("server_lr", self.server_lr)
        super().__post_init__()

    @override
    def server_optimizer(self, model: nn.Module) -> Optimizer:
        return made_for(model, functools.partial(SGD, lr=self.server_lr, momentum=self.momentum))


@final
@dataclass(frozen=True)
class FedProx(Served):
    """FedAvg whose clients are pulled back to the server's model (Li et al. 2020).

    Args:
        local: As for `FedAvg`.
        mu: How strongly: mu / 2 * (distance to the server's model)**2 is added to a client's loss.
        local_steps: As for `FedAvg`.
        batch_size: As for `FedAvg`.
        server: As for `FedAvg`.
        local_epochs: As for `FedAvg`.

    Raises:
        InputError: a number is out of range.
    """

    local: MakeOptimizer
    mu: float = 0.01
    local_steps: int | None = None
    batch_size: int | None = None
    server: MakeOptimizer = AS_IT_IS
    local_epochs: int | None = None

    def __post_init__(self) -> None:
        _checks.positive("mu", self.mu)
        super().__post_init__()

    @property
    @override
    def proximal(self) -> float:
        return self.mu


@dataclass(frozen=True)
class Adaptive(Averaging):
    """FedAvg whose server has a step size for each coordinate (Reddi et al. 2021, algorithm 2).

    Args:
        local: As for `FedAvg`.
        local_steps: As for `FedAvg`.
        batch_size: As for `FedAvg`.
        server_lr: Above 0; try 10 ** -2.5 to 10 ** -1.
        beta1: Momentum of the update, in [0, 1).
        beta2: Momentum of its squares, in [0, 1); FedAdagrad has none.
        tau: The degree of adaptivity, above 0.
        local_epochs: As for `FedAvg`.

    Raises:
        InputError: a number is out of range.
    """

    local: MakeOptimizer
    local_steps: int | None = None
    batch_size: int | None = None
    server_lr: float = 0.03
    beta1: float = 0.9
    beta2: float = 0.99
    tau: float = 1e-3
    local_epochs: int | None = None

    def __post_init__(self) -> None:
        self._make([nn.Parameter(torch.zeros(1))])  # refuses numbers that are out of range
        super().__post_init__()

    @property
    @abstractmethod
    def kind(self) -> str:
        """One of `server_optimizers.KINDS`."""

    @property
    def _make(self) -> MakeOptimizer:
        return functools.partial(
            AdaptiveServer, kind=self.kind, lr=self.server_lr, beta1=self.beta1, beta2=self.beta2, tau=self.tau
        )

    @override
    def server_optimizer(self, model: nn.Module) -> Optimizer:
        return made_for(model, self._make)


@final
class FedAdam(Adaptive):
    """`Adaptive` whose second moments are those of Adam; its arguments are those of `Adaptive`."""

    kind = "adam"


@final
class FedYogi(Adaptive):
    """`Adaptive` whose second moments are those of Yogi; its arguments are those of `Adaptive`."""

    kind = "yogi"


@final
class FedAdagrad(Adaptive):
    """`Adaptive` whose second moments are those of Adagrad; its arguments are those of `Adaptive`."""

    kind = "adagrad"
