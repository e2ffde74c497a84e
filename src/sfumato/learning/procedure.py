"""What a training does in one step, apart from privacy bookkeeping: make bounded sums, use released ones."""

from __future__ import annotations

import contextlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sfumato.data.records import Records
from sfumato.errors import UnsupportedModelError
from sfumato.gradients.clipped import ClippedSum
from sfumato.gradients.clipping import UNCLIPPED, Clipping
from sfumato.gradients.support import trainable
from sfumato.learning.aggregation import Aggregation
from sfumato.learning.terms import Terms
from sfumato.privacy.bounded import Bounded, Released, Tensors

NO_PERSONAL_MODELS = "This training keeps no model for each client; use the model of the result."


class Progress(NamedTuple):
    """How far a run has come: what the process that leads it tells those that work along.

    Attributes:
        position: Steps of the plan used up.
        run: The run's name in the ledger.
        lost: Steps that were paid for and lost.
        nonfinite: How often a unit's part was left out.
        secret: Whether all noise came from a secure source.
        remembered: Whether a ledger on disk was charged.
        terms: Noise multiplier, clip norm and length of the indicator of the next step; None if the run is over.
    """

    position: int
    run: str
    lost: int
    nonfinite: int
    secret: bool
    remembered: bool
    terms: tuple[float, float, float] | None


class Procedure(ABC):
    """One way to train: the loop in `sfumato.learning.training` calls it and does everything else.

    Attributes:
        aggregation: Where the noise is added.
        not_covered: Sentences that this procedure adds to the privacy statement.
        leads: Whether this process draws, pays, releases and saves; False where it only works along.
        terms: What the current step is done with.
        refused: How many answers of clients were left out because names or shapes were not those of the round.
        nonfinite: How many updates of a run without privacy were left out because a value was NaN or infinite; a private
            one counts them with its bounded sums.
    """

    aggregation: Aggregation
    not_covered: tuple[str, ...]
    leads: bool = True
    terms: Terms
    refused: int = 0
    nonfinite: int = 0

    @property
    def is_void(self) -> bool:
        """Whether too few answered in the current step, so that nothing of it may be released."""
        return False

    def personal_model(self, client: str) -> nn.Module:
        """Return a copy of the model as one client has it.

        Raises:
            KeyError: there is no such client.
        """
        raise KeyError(NO_PERSONAL_MODELS)

    def void(self) -> None:  # noqa: B027 (only rounds of clients can be void)
        """Take note that the current step is void."""

    def shapes(self) -> Mapping[str, Tensor] | None:
        """Return tensors with the names and shapes of what a step releases; None for the trainable parameters."""
        return None

    @property
    def kind(self) -> str:
        """What a checkpoint calls the procedure."""
        return type(self).__name__

    def start(self, fingerprint: str) -> None:  # noqa: B027 (one process has nothing to do)
        """Begin: the run is set up or restored, and `fingerprint` tells its plan."""

    def together(self) -> contextlib.AbstractContextManager[object]:
        """Return a context whose errors reach every process that shares the run."""
        return contextlib.nullcontext()

    def agree(self, progress: Progress) -> Progress:
        """Return the progress of the process that leads, before each step."""
        return progress

    def use_terms(self, terms: Terms) -> None:
        """Take note of what the next step is done with."""
        self.terms = terms

    @abstractmethod
    def contributions(self, step: int) -> dict[str, ClippedSum]:
        """Return the bounded sum of each client that answered in step `step` (from 0)."""

    @abstractmethod
    def asked(self, step: int) -> int:
        """Return how many clients were asked in step `step`."""

    @abstractmethod
    def probe(self) -> Bounded | None:
        """Return one unit's part alone, made by the same code, for the self-check of the first step.

        In a federation it is of a client that answered in this step; None if none did.
        """

    @abstractmethod
    def apply(self, released: Mapping[str, Released], step: int) -> None:
        """Use the released sums of step `step`: post-processing."""

    @abstractmethod
    def plain(self, step: int) -> None:
        """Do step `step` without any privacy."""

    @abstractmethod
    def skip(self) -> None:
        """Take note that paid steps were lost in a crash, or void, and will not be done."""

    @abstractmethod
    def data_digest(self) -> str:
        """Return a digest of all records in their order; private, for checkpoints only."""

    @abstractmethod
    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must keep besides the model."""

    @abstractmethod
    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""


def zero_like(parameters: Mapping[str, Tensor], clipping: Clipping) -> Bounded:
    """Return the sum of no units, in the shapes of the given tensors."""
    # One zero seen in every place, so that it costs no memory.
    value = {
        name: torch.zeros((), dtype=torch.float64, device=tensor.device).expand(tensor.shape)
        for name, tensor in parameters.items()
    }
    if clipping.counted:
        value[UNCLIPPED] = torch.zeros((), dtype=torch.float64, device=next(iter(value.values())).device)
    return Bounded(value, clipping.bound)


def set_gradients(model: nn.Module, total: Tensors, divisor: float) -> None:
    """Set the gradient of every trainable parameter to total / divisor, in the parameter's dtype; uses `total` up."""
    for name, parameter in trainable(model).items():
        parameter.grad = total[name].to(dtype=parameter.dtype, device=parameter.device).div_(divisor)


def take_step(model: nn.Module, optimizer: Optimizer, sums: Iterable[Tensors], divisor: float) -> None:
    """Let the optimiser take one step on the total of `sums` over `divisor`, which uses them up; without any, do nothing."""
    total: Tensors = {}
    for one in sums:
        total = {name: tensor + total[name] for name, tensor in one.items()} if total else one
    if total:
        set_gradients(model, total, divisor)
        optimizer.step()
        optimizer.zero_grad()


def optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """Return the optimiser's state and kind, for a checkpoint."""
    return {"kind": type(optimizer).__qualname__, "state": optimizer.state_dict()}


def restore_optimizer(optimizer: Optimizer, kept: dict[str, Any]) -> None:
    """Take back what `optimizer_state` returned; its learning rate and other settings are those that were saved.

    Raises:
        ValueError: it was another kind of optimiser, or one over other parameters.
    """
    if kept["kind"] != type(optimizer).__qualname__:
        raise ValueError(f"it was started with {kept['kind']}, not {type(optimizer).__qualname__}")
    optimizer.load_state_dict(kept["state"])


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Refuse an optimiser that needs a closure, or does not hold exactly the model's trainable parameters.

    Raises:
        UnsupportedModelError: names the optimiser, or the first parameter that is missing or foreign.
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UnsupportedModelError(
            f"{type(optimizer).__name__} evaluates the loss several times a step, which a plan does not pay for; "
            "use a first-order optimiser such as SGD or Adam."
        )
    if isinstance(optimizer, torch.optim.SparseAdam):
        raise UnsupportedModelError("SparseAdam takes sparse gradients only, and noise is dense; use torch.optim.Adam.")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in trainable(model).items():
        if id(parameter) not in held:
            raise UnsupportedModelError(
                f'The optimiser does not hold the parameter "{name}"; pass all of model.parameters() or set '
                "requires_grad=False on what is not trained."
            )
        held.discard(id(parameter))
    frozen = {id(p) for p in model.parameters()}
    if held - frozen:
        raise UnsupportedModelError(
            "The optimiser holds parameters that are not the model's; make it from this model's parameters()."
        )


def batch_on(model: nn.Module, records: Records, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features and targets of `indices` on the model's device."""
    device = next(model.parameters()).device
    features, targets = records.batch(indices)
    return features.to(device), targets.to(device)


def mean_loss(losses: Tensor) -> Tensor:
    """Return the mean of a loss that may already be reduced."""
    return losses if losses.dim() == 0 else losses.mean()
