"""Algorithms that correct what clients with unlike records do to an average: SCAFFOLD and FedNova."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor, nn
from torch.optim import SGD
from typing_extensions import override

from sfumato import _checks
from sfumato.errors import InputError, PlanError
from sfumato.gradients.support import trainable
from sfumato.learning.aggregation import Aggregation
from sfumato.learning.fedavg import AS_IT_IS, Served, moved
from sfumato.learning.federated import Federation, Server, Work
from sfumato.learning.groups import Group
from sfumato.learning.local_training import MakeOptimizer
from sfumato.learning.procedure import Procedure
from sfumato.learning.weighting import BY_RECORDS, Uniform
from sfumato.privacy.bounded import Tensors

_CONTROL = ".control "  # in front of a parameter's name; no parameter's own name has a blank
_NORMALISER = ".normaliser"


@final
@dataclass(frozen=True)
class Scaffold(Served):
    """Clients correct their steps by how their own gradients differ from everybody's (Karimireddy et al. 2020, option II).

    Each client keeps a control variate c_i, the server keeps their mean c. A client hands in its update and the change of its
    control variate. Clients must come back to profit, so this is for few of them, each in many rounds.

    Every client counts the same, as in the paper: c is the uniform mean of the c_i whoever takes part, and with weights by
    records it would be that of no clients' c_i as soon as one is absent, so that the rounds would settle at a wrong point.

    It makes no promise: the noise of every round would stay in c and push all later steps, so that the model would do a
    random walk that no further round takes back.

    Args:
        local: Makes a client's optimiser: plain SGD, without momentum or weight decay.
        local_steps: As for `FedAvg`.
        batch_size: As for `FedAvg`.
        server: As for `FedAvg`.
        local_epochs: As for `FedAvg`.

    Raises:
        InputError: the optimiser is another, or a number is out of range.
        PlanError: (when the rounds are made) anything is promised, or clients are to count differently.
    """

    local: MakeOptimizer
    local_steps: int | None = None
    batch_size: int | None = None
    server: MakeOptimizer = AS_IT_IS
    local_epochs: int | None = None

    counts_alike = True

    def __post_init__(self) -> None:
        self._rate([torch.zeros(1)])

    @override
    def procedure(self, federation: Federation, noise: Aggregation | None) -> Procedure:
        """Return rounds of clients.

        Raises:
            PlanError: anything is promised.
        """
        if federation.plan.is_private:
            raise PlanError(
                "Scaffold keeps the noise of every round in its control variates, so that a private run would drift without "
                "end; use FedAvg or FedAdam."
            )
        return super().procedure(federation, noise)

    def _rate(self, parameters: Iterable[Tensor]) -> float:
        """Return the learning rate of the clients."""
        if rate := self.training.plain_rate(parameters):
            return rate
        raise InputError(
            "Scaffold reads a client's mean gradient off its update, which needs plain SGD with one learning rate; use "
            "functools.partial(torch.optim.SGD, lr=...) without momentum or weight decay."
        )

    @override
    def check(self, federation: Federation) -> None:
        super().check(federation)
        self._rate(trainable(federation.model).values())  # a factory may look at the parameters
        if federation.weighting is not BY_RECORDS and not isinstance(federation.weighting, Uniform):
            raise PlanError(
                f"Scaffold needs every client to count the same, and {federation.weighting} does not; leave weighting out, or "
                "use Uniform()."
            )

    @override
    def shared(self, model: nn.Module) -> dict[str, Tensor]:
        return {_CONTROL + name: torch.zeros_like(value) for name, value in trainable(model).items()}

    @override
    def kept(self, model: nn.Module) -> dict[str, Tensor]:
        return self.shared(model)

    @override
    def shapes(self, model: nn.Module) -> dict[str, Tensor]:
        return {**super().shapes(model), **self.shared(model)}

    @override
    def client(self, group: Group, shared: Tensors, kept: Mapping[str, Tensor]) -> Work:
        rate = self._rate(trainable(group.model).values())
        push = {name.removeprefix(_CONTROL): shared[name] - own for name, own in kept.items()}
        ends, steps = group.train(self.training, {}, push=push)
        vectors = moved(group, ends)
        controls = {}
        for name, own in kept.items():
            update = vectors[name.removeprefix(_CONTROL)]
            taken = (steps.double() * rate).to(update).view(-1, *[1] * (update.dim() - 1))
            controls[name] = own - shared[name] + update / taken
        vectors.update({name: control - kept[name] for name, control in controls.items()})
        return Work(vectors, controls)

    @override
    def update(self, server: Server, mean: Tensors, share: float) -> None:
        for name, control in server.shared.items():
            control.add_(mean[name].to(control.dtype), alpha=share)
        server.descend(mean)


@final
@dataclass(frozen=True)
class FedNova(Served):
    """Updates are divided by how far each client's steps could have gone before they are averaged (Wang et al. 2020).

    Clients that take more steps no longer pull the average to themselves. Running statistics, which no step size scales, are
    averaged as they are. With SGD of momentum rho and tau steps the normaliser
    is (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho).

    Args:
        local: Makes a client's optimiser: SGD, with momentum or without, no weight decay.
        local_epochs: As for `FedAvg`.
        batch_size: As for `FedAvg`.
        server: As for `FedAvg`.
        effective_steps: By which the mean is multiplied again; None for the mean normaliser of the clients, which is computed
            from their numbers of records: where clients are protected it must be declared.
        local_steps: As for `FedAvg`.

    Raises:
        InputError: the optimiser is another, or a number is out of range.
    """

    local: MakeOptimizer
    local_epochs: int | None = None
    batch_size: int | None = None
    server: MakeOptimizer = AS_IT_IS
    effective_steps: float | None = None
    local_steps: int | None = None

    def __post_init__(self) -> None:
        if self.effective_steps is not None:
            _checks.positive("effective_steps", self.effective_steps)
        self._momentum([torch.zeros(1)])

    def _momentum(self, parameters: Iterable[Tensor]) -> float:
        """Return the momentum of the clients."""
        kind, _, each = self.training.settings(parameters)
        momenta = {one["momentum"] for one in each} if kind is SGD else set()
        if len(momenta) != 1 or any(one["weight_decay"] or one["nesterov"] or one["dampening"] for one in each):
            raise InputError(
                "FedNova knows how far the steps of SGD go, with one momentum or without; use "
                "functools.partial(torch.optim.SGD, lr=...) without weight decay, nesterov or dampening."
            )
        return float(momenta.pop())

    @override
    def check(self, federation: Federation) -> None:
        super().check(federation)
        self._momentum(trainable(federation.model).values())  # a factory may look at the parameters
        if federation.plan.is_private and self.effective_steps is None:
            raise PlanError(
                "The mean number of local steps tells how many records the clients have; declare effective_steps for FedNova."
            )

    @override
    def shapes(self, model: nn.Module) -> dict[str, Tensor]:
        shapes = super().shapes(model)
        return (
            shapes
            if self.effective_steps is not None
            else {**shapes, _NORMALISER: torch.zeros((), dtype=torch.float64)}
        )

    @override
    def client(self, group: Group, shared: Tensors, kept: Mapping[str, Tensor]) -> Work:
        ends, steps = group.train(self.training, {})
        rho, tau = self._momentum(trainable(group.model).values()), steps.to(torch.float64)
        normaliser = (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho)
        vectors = moved(group, ends)
        for name in trainable(group.model):
            value = vectors[name]
            value.div_(normaliser.to(value).view(-1, *[1] * (value.dim() - 1)))
        if self.effective_steps is None:
            vectors[_NORMALISER] = normaliser
        return Work(vectors)

    @override
    def update(self, server: Server, mean: Tensors, share: float) -> None:
        steps = self.effective_steps or float(mean[_NORMALISER])
        stepped = trainable(server.model)
        server.descend(
            {name: value * steps if name in stepped else value for name, value in mean.items() if name != _NORMALISER}
        )
