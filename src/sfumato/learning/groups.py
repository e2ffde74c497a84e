"""Some clients of a round, trained at once: stacked along a new first dimension, or one after the other.

Both ways compute the same steps. Stacked, every operation is done for all clients at once (`torch.func.vmap`), which wins while
models are small; alone, each client has the machine's caches to itself, which wins when they are large. Where the ways are told
apart in rounding only, an engine may choose by time.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.functional import cross_entropy
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_map

from sfumato.data.records import Records
from sfumato.errors import UnsupportedModelError
from sfumato.gradients import spare
from sfumato.gradients.clipped import Loss
from sfumato.gradients.support import trainable
from sfumato.learning.fused_linear import Fusing, Sink
from sfumato.learning.group_data import ALONE, CHANNELS_LAST, STACKED, Batch, Data, channels_last
from sfumato.learning.local_training import Batches, LocalTraining, batches_of, mixed
from sfumato.learning.procedure import mean_loss


class Trained(NamedTuple):
    """Where the clients ended.

    Attributes:
        weights: Parameters and floating-point buffers by name, each (clients, ...).
        steps: How many steps each client took, (clients,) int64.
    """

    weights: dict[str, Tensor]
    steps: Tensor


@final
@dataclass
class Draws:
    """Whether the work of clients draws from torch's random numbers (dropout): one stream for all threads of a process.

    Attributes:
        found: None until it is known, for which a first client has to work while no other does. If True, every client is
            seeded on its own, and they have to take turns.
        late: Whether a client drew after the first did not, so that others may have drawn from the same stream meanwhile.
        trusted: Whether making clients leaves the stream alone. If a factory of records draws from it, an engine has to make
            clients while none works, and to put the stream back.
    """

    found: bool | None = None
    late: bool = False
    trusted: bool = True


@final
@dataclass
class Hints:
    """What was found out about a model while its first clients were trained; it changes the speed and nothing else.

    Attributes:
        draws: Whether the model draws random numbers.
        fused: Parameters that `fused_linear` may take; None before the first step.
        padding: Whether stacked clients may have batches of different sizes; where records are mixed in the forward pass,
            what is put in place of missing ones would be mixed in. Such groups are then trained one by one.
    """

    fused: frozenset[str] | None = None
    padding: bool = True
    draws: Draws = field(default_factory=Draws)


@final
@dataclass(frozen=True)
class Group:
    """Clients that work at once, and all that their work may depend on.

    Attributes:
        model: The server's model; never trained here, only copied.
        loss: As for `sfumato.train`.
        clients: The clients' numbers in the population.
        records: Of each client.
        key: The round's random 64-bit number, which decides the order of records.
        way: `STACKED`, `ALONE` or `CHANNELS_LAST`.
        hints: Shared by the groups of a run.
    """

    model: nn.Module
    loss: Loss
    clients: Sequence[int]
    records: Sequence[Records]
    key: int
    way: str = ALONE
    hints: Hints = field(default_factory=Hints)

    @functools.cached_property
    def sizes(self) -> Tensor:
        """Records of each client, (clients,) int64."""
        return torch.tensor([len(one) for one in self.records])

    def sent(self) -> dict[str, Tensor]:
        """Return the server's parameters and running statistics for each client, (clients, ...), without a copy."""
        values = {name: value.detach() for name, value in trainable(self.model).items()} | running_statistics(
            self.model
        )
        return {name: value.expand(len(self.clients), *value.shape) for name, value in values.items()}

    def train(
        self, training: LocalTraining, start: Mapping[str, Tensor], *, toward: Mapping[str, Tensor] | None = None,
        push: Mapping[str, Tensor] | None = None,
    ) -> Trained:  # fmt: skip
        """Train every client on its own records.

        Args:
            training: Steps, batches and optimiser.
            start: Where each client starts, (clients, ...); names that are missing start at the server's.
            toward: What `training.proximal` pulls to, by parameter, (clients, ...); None for the start.
            push: Added to every gradient, by parameter, (clients, ...) (SCAFFOLD's correction).
        """
        begin = {**self.sent(), **start}
        batches = batches_of(training, self.sizes, self.key, torch.tensor(self.clients))
        if self.way == STACKED and not self.hints.padding and batches.are_padded:
            return dataclasses.replace(self, way=ALONE).train(training, start, toward=toward, push=push)
        steps = (batches.count > 0).sum(1)
        pull = _Pull(training.proximal, begin if toward is None else toward, push)
        if self.way == STACKED:
            return Trained(self._stacked(training, begin, pull, batches, steps), steps)
        if len(self.clients) == 1:
            alone = self._alone(training, begin, pull, batches, 0)
            return Trained({name: value.unsqueeze(0) for name, value in alone.items()}, steps)
        ends: dict[str, Tensor] = {}
        for row in range(len(self.clients)):
            for name, value in self._alone(training, begin, pull, batches, row).items():
                if name not in ends:
                    ends[name] = value.new_empty(len(self.clients), *value.shape)
                ends[name][row].copy_(value)
        return Trained(ends, steps)

    def gradients(self) -> dict[str, Tensor]:
        """Return the gradient of each client's mean loss over all of its records, by parameter, (clients, ...)."""
        if self.way == STACKED and (self.hints.padding or len(self.sizes.unique()) == 1):
            return self._gradients(range(len(self.clients)))
        if self.way == STACKED:
            return dataclasses.replace(self, way=ALONE).gradients()
        parts = [self._gradients([row]) for row in range(len(self.clients))]
        return {name: torch.stack([one[name] for one in parts]) for name in parts[0]}

    def _gradients(self, rows: Sequence[int]) -> dict[str, Tensor]:
        begin = self.sent()
        weights, buffers = self._copied(_picked(begin, rows) if self.way == STACKED else _at(begin, rows[0]))
        for weight in weights.values():
            weight.requires_grad_()
        sizes = self.sizes[list(rows)]
        place = torch.arange(int(sizes.max())).expand(len(rows), 1, -1)
        everything = Batches(place.masked_fill(place >= sizes[:, None, None], 0), sizes[:, None])
        with self._random(rows):
            forward = self._forward({name: weight.detach() for name, weight in weights.items()})
            total = forward(weights, buffers, *self._data(rows, everything).batch(0, len(rows)))
        found = forward.gradients(total, list(weights.values()), check=True)
        return {
            name: torch.zeros_like(weight) if gradient is None else gradient
            for (name, weight), gradient in zip(weights.items(), found, strict=True)
        }

    def _stacked(
        self, training: LocalTraining, begin: dict[str, Tensor], pull: _Pull, batches: Batches, steps: Tensor
    ) -> dict[str, Tensor]:
        # Clients that stop early lie behind the others, so that a step's clients are always the first ones.
        rows = torch.argsort(steps, descending=True, stable=True)
        moved = not bool((rows == torch.arange(len(rows))).all())
        if moved:
            begin, pull = _picked(begin, rows), pull.at(rows)
            batches = Batches(batches.index[rows], batches.count[rows])
        weights, buffers = self._copied(begin)
        data = self._data(rows.tolist(), batches)
        self._descent(training, weights).run(buffers, data, batches, pull)
        data.done()
        ends = {**weights, **buffers}
        return _picked(ends, torch.argsort(rows)) if moved else ends

    def _alone(
        self, training: LocalTraining, begin: dict[str, Tensor], pull: _Pull, batches: Batches, row: int
    ) -> dict[str, Tensor]:
        weights, buffers = self._copied(_at(begin, row))
        if self.way == CHANNELS_LAST:
            weights = {name: channels_last(value) for name, value in weights.items()}
        own = Batches(batches.index[row : row + 1], batches.count[row : row + 1])
        with self._random([row]):
            self._descent(training, weights).run(buffers, self._data([row], own), own, pull.at(row))
        return {**weights, **buffers}

    def _descent(self, training: LocalTraining, weights: dict[str, Tensor]) -> _Descent:
        rate = training.plain_rate(trainable(self.model).values())
        return _Descent(training, rate, weights, self._forward(weights), self.hints)

    def _forward(self, weights: Mapping[str, Tensor]) -> _Forward:
        # Fresh copies, so that nothing a model or loss keeps of one client (a buffer, an attribute) reaches the next. A plain
        # function is its own copy. Parameters that a loss holds stay the server's, so that `_Forward` finds them.
        own = trainable(self.model)
        loss = copy.deepcopy(self.loss, {id(value): value for value in own.values()})
        # The trained parameters are put in anew at each call, so they need no copy; frozen ones a forward might write to. One
        # client's copy holds its own weights in between too, where activation checkpointing computes once more.
        same = {id(value): value if self.way == STACKED else nn.Parameter(weights[name]) for name, value in own.items()}
        idle = {value: name for name, value in own.items()} | {same[id(value)]: name for name, value in own.items()}
        return _Forward(copy.deepcopy(self.model, same), loss, idle, many=self.way == STACKED)

    def _copied(self, begin: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return fresh trained parameters and running statistics."""
        parameters, statistics = trainable(self.model), running_statistics(self.model)
        return {name: _fresh(begin[name]) for name in parameters}, {name: _fresh(begin[name]) for name in statistics}

    def _data(self, rows: Sequence[int], batches: Batches) -> Data:
        device = next(self.model.parameters()).device
        return Data([self.records[row] for row in rows], batches, device, self.way)

    @contextlib.contextmanager
    def _random(self, rows: Sequence[int]) -> Iterator[None]:
        """Seed what a client's dropout draws by the round and the client, whoever worked before it; watch whether it draws."""
        draws = self.hints.draws
        if self.way == STACKED:  # torch refuses to draw
            yield
            return
        if draws.found is False:
            before = stream_of(self.model)
            yield
            if stream_of(self.model) != before:
                draws.found = draws.late = True
            return
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        # `torch.manual_seed` is slow where there may be accelerators: it notes down who called it, for each kind of them.
        seed = torch.default_generator.manual_seed if on_cpu else torch.manual_seed
        with torch.random.fork_rng(devices=[] if on_cpu else None):
            seed(int(mixed(mixed(torch.tensor(self.clients[rows[0]]) + self.key) - 1)))
            before = stream_of(self.model)
            yield
            draws.found = draws.found or stream_of(self.model) != before


class _Pull(NamedTuple):
    """What is added to every gradient: mu * (weights - anchor) + push."""

    mu: float
    anchor: Mapping[str, Tensor]
    push: Mapping[str, Tensor] | None

    @property
    def is_idle(self) -> bool:
        return not self.mu and self.push is None

    def at(self, rows: Any) -> _Pull:
        if self.is_idle:
            return self
        return _Pull(self.mu, _picked(self.anchor, rows), None if self.push is None else _picked(self.push, rows))

    def on(self, name: str, gradient: Tensor, weight: Tensor) -> Tensor:
        if self.mu:
            gradient = gradient.add(weight - self.anchor[name], alpha=self.mu)
        return gradient if self.push is None else gradient.add(self.push[name])


_Watch = Callable[[Mapping[str, Tensor]], Fusing]


@final
class _Forward:
    """The sum over clients of their mean losses, as a function of their weights.

    Args:
        scratch: Computes; the weights are put in at each call.
        loss: As for `sfumato.train`.
        idle: The name of each parameter that the weights stand for, in the scratch model and in the server's.
        many: Whether the clients are stacked.
    """

    def __init__(self, scratch: nn.Module, loss: Loss, idle: Mapping[Tensor, str], *, many: bool) -> None:
        self._scratch, self._loss, self._idle, self._many = scratch, loss, idle, many

    def __call__(
        self, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], features: Tensor, targets: Tensor,
        count: Tensor | None, watch: _Watch | None = None,
    ) -> Tensor:  # fmt: skip
        def outputs_of(weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], features: Tensor) -> Any:
            if watch is None:
                return functional_call(self._scratch, {**weights, **buffers}, (features,))
            with watch(weights) as mode:
                outputs = functional_call(self._scratch, {**weights, **buffers}, (features,))
            mode.returned(outputs)
            return outputs

        if not self._many:
            return mean_loss(self._loss(outputs_of(weights, buffers, features), targets))
        outputs = vmap(outputs_of)(weights, buffers, features)
        if _is_cross_entropy(self._loss, outputs, targets):
            # The same numbers without vmap, under which this loss is taken apart into many small operations.
            each = cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)
            if count is None:
                return each.sum() / targets.shape[1]
            part = torch.arange(targets.shape[1], device=count.device) < count[:, None]
            return (torch.where(part, each, 0.0).sum(1) / count).sum()
        if count is None:
            return vmap(self._mean)(outputs, targets).sum()
        # A loss over what takes the place of missing records could not be told from the others, so equal sizes go together.
        parts = []
        for size in count.unique().tolist():
            rows = (count == size).nonzero().squeeze(1)
            held = tree_map(lambda value, rows=rows, size=size: value[rows, :size], outputs)
            parts.append(vmap(self._mean)(held, targets[rows, :size]).sum())
        return torch.stack(parts).sum()

    def gradients(self, total: Tensor, asked: Sequence[Tensor], *, check: bool) -> Sequence[Tensor | None]:
        """Return the gradient of each tensor, and check that nothing else was to be trained.

        Raises:
            UnsupportedModelError: the model or the loss also uses a parameter that the weights were to stand for.
        """
        idle = list(self._idle) if check else []
        found = torch.autograd.grad(total, [*asked, *idle], allow_unused=True)
        for parameter, gradient in zip(idle, found[len(asked) :], strict=True):
            if gradient is not None:
                name = self._idle[parameter]
                raise UnsupportedModelError(
                    f'{type(self._scratch).__name__} or the loss also reaches the parameter "{name}" by another '
                    "reference (a list, a dict or a variable that holds it), where no client could train it; take it from its "
                    "module in forward."
                )
        return found[: len(asked)]

    def _mean(self, outputs: Any, targets: Tensor) -> Tensor:
        return mean_loss(self._loss(outputs, targets))


def _is_cross_entropy(loss: Loss, outputs: Any, targets: Tensor) -> bool:
    """Whether the loss is the plain cross entropy of classes, none of which is to be ignored."""
    return (
        (loss is cross_entropy or _is_plain(loss))
        and isinstance(outputs, Tensor)
        and outputs.dim() == 3
        and targets.dim() == 2
        and targets.dtype is torch.int64
        and not bool((targets < 0).any())
    )


def _is_plain(loss: object) -> bool:
    if type(loss) is not nn.CrossEntropyLoss or loss.weight is not None:
        return False
    return (loss.reduction, loss.ignore_index, loss.label_smoothing) == ("mean", -100, 0.0)


@final
class _Descent:
    """The steps of local training over weights that are changed in place; of plain SGD where a rate is given."""

    def __init__(
        self, training: LocalTraining, rate: float | None, weights: dict[str, Tensor], forward: _Forward, hints: Hints
    ) -> None:  # fmt: skip
        self._weights, self._forward, self._hints, self._rate = weights, forward, hints, rate
        if self._rate is None:
            self._parameters = {name: nn.Parameter(tensor) for name, tensor in weights.items()}
            self._optimizer = training.optimizer(list(self._parameters.values()))
        anchor = torch.zeros((), device=next(iter(weights.values())).device, requires_grad=True)
        self._sink = Sink(self._rate or 0.0, anchor)
        self._begun = False

    def run(self, buffers: Mapping[str, Tensor], data: Data, batches: Batches, pull: _Pull) -> None:
        weights = self._weights
        for step, active in enumerate((batches.count > 0).sum(0).tolist()):
            if not active:
                break
            if active < len(batches.count):
                some = slice(None, active)
                weights, buffers, pull = _picked(weights, some), _picked(buffers, some), pull.at(some)
            batch = data.batch(step, active)
            if self._rate is None:
                self._optimized(weights, buffers, batch, pull)
            else:
                self._plain(weights, buffers, batch, pull)

    def _plain(self, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Batch, pull: _Pull) -> None:
        fused = self._hints.fused or frozenset()
        kept = {name: value.clone() for name, value in buffers.items()} if fused else {}
        try:
            total, leaves = self._watched(weights, buffers, batch, fused)
        except Exception:
            if not fused:
                raise
            # Nothing has been written yet. What fails without fusing as well fails again.
            self._hints.fused = fused = frozenset()
            for name, value in kept.items():
                buffers[name].copy_(value)
            total, leaves = self._watched(weights, buffers, batch, fused)
        asked = [*leaves.values(), self._sink.anchor] if fused else list(leaves.values())
        self._sink.is_open = True
        gradients = self._gradients(total, asked)
        self._sink.is_open = False
        found = dict(zip(leaves, gradients, strict=False))
        for name, weight in weights.items():
            gradient = found.get(name)
            if gradient is None:
                if pull.is_idle:
                    continue
                gradient = torch.zeros_like(weight)
            weight.sub_(pull.on(name, gradient, weight), alpha=self._sink.rate)

    def _gradients(self, total: Tensor, asked: Sequence[Tensor]) -> Sequence[Tensor | None]:
        check, self._begun = not self._begun, True
        return self._forward.gradients(total, asked, check=check)

    def _watched(
        self,
        weights: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        batch: Batch,
        fused: frozenset[str],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        # Detached views share the weights' memory; those that are fused move in the backward pass and need no gradient.
        seen = {name: value.detach() for name, value in weights.items()}
        leaves = {name: value.requires_grad_() for name, value in seen.items() if name not in fused}
        if self._hints.fused is not None and not fused:
            return self._forward(seen, buffers, *batch), leaves
        modes: list[Fusing] = []

        def watch(given: Mapping[str, Tensor]) -> Fusing:
            modes.append(Fusing(given, fused, self._sink))
            return modes[-1]

        total = self._forward(seen, buffers, *batch, watch)
        if self._hints.fused is None:
            self._hints.fused = modes[-1].fusable()
        return total, leaves

    def _optimized(
        self, weights: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Batch, pull: _Pull
    ) -> None:
        leaves = {name: value.detach().requires_grad_() for name, value in weights.items()}
        total = self._forward(leaves, buffers, *batch)
        gradients = self._gradients(total, list(leaves.values()))
        resting: dict[str, Tensor] = {}
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
            parameter = self._parameters[name]
            if gradient is None and pull.is_idle:
                parameter.grad = None
                continue
            found = pull.on(name, torch.zeros_like(leaf) if gradient is None else gradient, leaf.detach())
            if leaf.shape != parameter.shape:  # clients that have stopped rest where they are
                resting[name] = parameter.detach()[len(leaf) :].clone()
                found = torch.cat([found, torch.zeros_like(resting[name])])
            parameter.grad = found
        self._optimizer.step()
        for name, value in resting.items():
            rested = self._parameters[name].detach()
            rested[len(rested) - len(value) :] = value


def running_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the running means and variances of the model's batch normalisations, which clients change as they train."""
    return {
        f"{path}.{key}" if path else key: value
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        for key, value in module._buffers.items()
        if value is not None and value.is_floating_point()
    }


def moving_statistics(model: nn.Module) -> dict[str, Tensor]:
    """Return the running statistics of the modules that are in training mode; the others stay as they are."""
    resting = {path for path, module in model.named_modules() if not module.training}
    return {name: value for name, value in running_statistics(model).items() if name.rpartition(".")[0] not in resting}


def draws_numbers(model: nn.Module) -> bool:
    """Whether a layer of the model draws random numbers in training; what a forward draws itself, only running it tells."""
    return any(module.training and (_drops(module) or isinstance(module, nn.RReLU)) for module in model.modules())


def _drops(module: nn.Module) -> bool:
    if isinstance(module, _DropoutNd):
        return module.p > 0
    rate = getattr(module, "dropout", 0)  # as recurrent and attention layers have
    return not isinstance(rate, nn.Module) and bool(rate)


def stream_of(model: nn.Module) -> bytes:
    """Return where the stream of random numbers stands that the model draws from."""
    device = next(model.parameters()).device
    here = torch.get_rng_state().numpy().tobytes()
    return here + torch.cuda.get_rng_state(device).numpy().tobytes() if device.type == "cuda" else here


def _fresh(value: Tensor) -> Tensor:
    return spare.take(value.shape, value.dtype, value.device).copy_(value)


def _picked(values: Mapping[str, Tensor], rows: Any) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in values.items()}


def _at(values: Mapping[str, Tensor], row: int) -> dict[str, Tensor]:
    return {name: value[row] for name, value in values.items()}
