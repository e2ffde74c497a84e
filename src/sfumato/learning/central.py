"""One curator holds all records: DP-SGD (Abadi et al. 2016) with any torch optimiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from sfumato.data.records import Records
from sfumato.errors import PlanError
from sfumato.gradients.clipped import ClippedSum, Loss
from sfumato.gradients.compute import Compute
from sfumato.gradients.private import PrivateGradient
from sfumato.gradients.support import running
from sfumato.learning.aggregation import ServerNoise
from sfumato.learning.augmentation import Augment, views_of
from sfumato.learning.plan import Plan
from sfumato.learning.procedure import (
    Procedure,
    batch_on,
    check_optimizer,
    mean_loss,
    optimizer_state,
    restore_optimizer,
    take_step,
)
from sfumato.privacy.bounded import Bounded, Released, Tensors
from sfumato.privacy.budget import Unit
from sfumato.privacy.randomness import RandomSource


@final
class Central(Procedure):
    """Each step: draw a batch, sum its clipped gradients, and hand the noised sum over the expected batch to the optimiser."""

    def __init__(
        self, model: nn.Module, records: Records, plan: Plan, loss: Loss, optimizer: Optimizer, source: RandomSource,
        compute: Compute, augment: Augment | None,
    ) -> None:  # fmt: skip
        if plan.is_private and plan.budget.unit is not Unit.RECORD:
            raise PlanError(
                'One curator\'s training protects records; for unit "client" use federate over records.by_owner().'
            )
        check_optimizer(model, optimizer)
        self._model, self._records, self._plan, self._loss = model, records, plan, loss
        self._augment = augment
        if plan.is_private:
            self._gradient = PrivateGradient(
                model, loss, plan.terms(0).bounded, compute=compute, views=augment is not None
            )
        self._optimizer, self._source = optimizer, source
        self._draws = plan.sampler.start(len(records), source)
        self.aggregation = ServerNoise()
        self.use_terms(plan.terms(0))
        self.not_covered = ("The curator who trains holds all records and is trusted with them.",)

    @override
    def contributions(self, step: int) -> dict[str, ClippedSum]:
        return {"all": self.sum(self.draw(step))}

    def draw(self, step: int) -> Tensor:
        """Return the indices of the records of step `step`, shape (any,)."""
        return self._draws.batch(step)

    def sum(self, indices: Tensor) -> ClippedSum:
        """Return the clipped sum over the records at `indices`, shape (any,)."""
        return self._gradient.sum(*self._batch(indices), self.terms.bounded)

    @override
    def asked(self, step: int) -> int:
        return 1

    @override
    def probe(self) -> Bounded:
        return self.sum(torch.zeros(1, dtype=torch.int64)).bounded

    @override
    def apply(self, released: Mapping[str, Released], step: int) -> None:
        self.use(released["all"].value)

    def use(self, total: Tensors) -> None:
        """Let the optimiser take one step on a released sum, which is used up."""
        take_step(self._model, self._optimizer, [total], self.terms.rate * self._plan.population)

    @override
    def plain(self, step: int) -> None:
        indices = self.draw(step)
        if len(indices):
            self.backward(indices)
            self.advance()

    def backward(self, indices: Tensor, share: float = 1.0) -> None:
        """Set the gradients to `share` times those of the mean loss over the records at `indices`; clear them if none."""
        self._optimizer.zero_grad()
        if not len(indices):
            return
        features, targets = self._batch(indices)
        if self._augment is not None:
            targets = targets.repeat_interleave(features.shape[1], 0)
            features = features.flatten(0, 1)
        with running(self._model, "on a batch", quote=True):
            (mean_loss(self._loss(self._model(features), targets)) * share).backward()

    def advance(self) -> None:
        """Let the optimiser take one step on the gradients as they are."""
        self._optimizer.step()

    def _batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        features, targets = batch_on(self._model, self._records, indices)
        return (features if self._augment is None else views_of(features, self._augment)), targets

    @override
    def skip(self) -> None:
        pass

    @override
    def data_digest(self) -> str:
        return self._records.digest()

    @override
    def state(self) -> dict[str, Any]:
        return {"optimizer": optimizer_state(self._optimizer), "draws": self._draws.state()}

    @override
    def restore(self, state: dict[str, Any]) -> None:
        restore_optimizer(self._optimizer, state["optimizer"])
        self._draws = self._plan.sampler.start(len(self._records), self._source, state["draws"])
