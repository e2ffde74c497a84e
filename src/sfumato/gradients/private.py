"""The fast path: exact clipped sums at nearly the price of a plain gradient.

One forward, one backward that stops at the layers' outputs (`tape`), norms from what the layers saw (`terms`), one weighted
sum. `per_record` is the oracle that it is tested against.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor, nn

from sfumato.errors import UnsupportedModelError
from sfumato.gradients.clipped import ClippedSum, Loss
from sfumato.gradients.clipping import MAX_UNITS, UNCLIPPED, Clipping
from sfumato.gradients.compute import DEFAULT, Compute
from sfumato.gradients.rules import RULES, TOGETHER, otherwise
from sfumato.gradients.strategies import CHOICES
from sfumato.gradients.support import check_model, trainable
from sfumato.gradients.tape import Tape, Use
from sfumato.gradients.terms.held import Given, added, joined
from sfumato.gradients.terms.term import Part, Term, Weighting, Workspace, exactly
from sfumato.privacy.bounded import Bounded

_MOST_RECORDS = (
    1024  # of a microbatch, fewer in huge batches: what is added in float32 then stays inside the clipping margin
)
_FEW = 16  # microbatches whose sums may be added in the model's own dtype
_SMALL = 4096  # coordinates of a parameter that is handled together with others
_JOINED = ""  # no parameter has an empty name
_SHARE = (
    1.25  # of what plain training would hold by a rough count: the measured peaks are then about the same, or lower
)
_FIRST = 8  # records of the first microbatch, which tells how much memory a record takes
_LEAST, _MOST = 2**25, 2**28  # bytes of a microbatch unless told: what is smaller or larger is no faster


@final
class PrivateGradient:
    """Sums of clipped per-record gradients of one model and loss.

    **Guarantee**: as `per_record.clipped_gradient_sum`: adding or removing one record moves the sum by at most the clip
    norm, whatever it holds. Records cannot meet inside the model, because it runs under vmap, and a model that keeps a value
    of a record for later is refused. The rounding of sums in the model's own number type is not covered beyond what
    `terms.term` and `clipping` say.

    **Edge cases**

    | case | what it adds |
    | --- | --- |
    | empty batch | zero |
    | a record whose gradient is NaN or infinite | zero, and is counted |
    | a parameter that the output does not depend on | zero |
    | random layers (dropout) | each record draws its own mask |
    | a layer without a rule | its exact gradients by the reference path, for that operation alone |

    Args:
        model: Any module that `check_model` accepts. It is not changed: no hooks, no wrappers, no attributes.
        loss: Called as loss(outputs, targets) with one record at a time.
        clipping: How records are clipped, and at which norm.
        compute: Speed knobs.
        views: Whether features hold several views of each record, shape (batch, views, ...): the loss is then their mean, and
            the record is clipped once (De et al. 2022).
        space: Memory to share with other objects that are used in turn, never at the same time.

    Raises:
        UnsupportedModelError: names the module or operation, and the fix.
    """

    def __init__(
        self, model: nn.Module, loss: Loss, clipping: Clipping, *, compute: Compute = DEFAULT, views: bool = False,
        space: Workspace | None = None,
    ) -> None:  # fmt: skip
        check_model(model)
        self._model, self._loss, self._clipping = model, loss, clipping
        self._compute, self._views = compute, views
        self._bytes_per_record: float | None = None
        self._plain_per_record = 0.0
        self._space = space or Workspace()

    def sum(self, features: Tensor, targets: Tensor, clipping: Clipping | None = None) -> ClippedSum:
        """Return the clipped sum.

        Args:
            features: Shape (batch, ...), or (batch, views, ...).
            targets: Shape (batch, ...).
            clipping: In place of the one that was given at first.
        """
        with self._space.lock:
            self._clipping = clipping or self._clipping
            return self._sum(features, targets)

    def _sum(self, features: Tensor, targets: Tensor) -> ClippedSum:
        count = len(features)
        if count > MAX_UNITS:
            raise UnsupportedModelError(f"A batch may hold at most {MAX_UNITS} records; lower the batch size.")
        parameters = trainable(self._model)
        total: dict[str, Tensor] = {}
        nonfinite, start = 0, 0
        # A sum over many records or microbatches is taken in float64.
        long = count > 0 and count > min(_MOST_RECORDS, _FEW * self.microbatch(count, count))
        while start < count:
            size = self.microbatch(count, count - start)
            part = slice(start, start + size)
            nonfinite += self._add_microbatch(total, parameters, features[part], targets[part], long=long)
            start += size
        for name, parameter in parameters.items():
            if name not in total:
                total[name] = torch.zeros_like(parameter, dtype=torch.float64)
        # In the order of the parameters, whichever was first reached.
        value = {name: total[name] for name in parameters}
        if self._clipping.counted:
            like = next(iter(value.values()))  # in whose dtype and place the whole vector is noised
            value[UNCLIPPED] = total.get(UNCLIPPED, torch.zeros(())).to(like)
        return ClippedSum(Bounded(value, self._clipping.bound), nonfinite)

    def microbatch(self, batch: int, left: int) -> int:
        """Return how many of the `left` records of a batch are taken next."""
        if self._bytes_per_record is None:
            return min(_FIRST if self._compute.memory_mb is None else 1, left)
        limit = self.memory_limit(batch) / self._bytes_per_record
        records = _MOST_RECORDS if batch <= 16 * _MOST_RECORDS else _MOST_RECORDS // 16
        most = max(1, min(left, records, math.floor(limit)))
        return math.ceil(left / math.ceil(left / most))

    def memory_limit(self, batch: int) -> float:
        """Return the bytes that a microbatch of a batch of this size may take."""
        if self._compute.memory_mb is not None:
            return self._compute.memory_mb * 1e6
        return min(_MOST, max(_LEAST, _SHARE * self._plain_per_record * batch))

    def _add_microbatch(
        self, total: dict[str, Tensor], parameters: dict[str, Tensor], features: Tensor, targets: Tensor, *, long: bool
    ) -> int:  # fmt: skip
        """Add the clipped gradients to `total`; return how many were not finite."""
        records = len(features)
        known = self._bytes_per_record is not None
        tape, losses = self.forward(parameters, features, targets)
        # The first few records only tell how much memory one takes; what is fastest shows on a whole microbatch.
        timed = known or records > _FIRST
        waiting: dict[str, list[Term]] = {}
        small: list[Given] = []
        parts: dict[str, Part] = {}
        held = 0

        def make(term: Term) -> None:
            nonlocal held
            if isinstance(term, Given) and term.work <= _SMALL * records and self._clipping.kind != "per-layer":
                small.append(term)
                return
            term.space = self._space
            choice = CHOICES.choose(term, self._room(), timed=timed)
            held += choice.bytes
            parts[term.name] = choice.make()

        def take(use: Use, terms: list[Term]) -> None:
            for term in terms:
                if tape.used_once(term.name):
                    make(term)
                    continue
                before = waiting.setdefault(term.name, [])
                if before and isinstance(term, Given) and isinstance(before[-1], Given):
                    before[-1] = added([before[-1], term])  # one gradient a record, however often it is used
                else:
                    before.append(term)

        tape.backward(losses, take)
        with torch.no_grad(), exactly(losses.device):
            for name in list(waiting):
                make(together(waiting.pop(name)))
            self._learn(tape, held)
            if small:
                # Biases and the like: one vector is measured and summed faster than many.
                parts[_JOINED] = joined(small).strategies()["per record"].make()
            if not parts:
                return 0
            factors, broken = self._clipping.factors({name: part.squared for name, part in parts.items()}, parameters)
            weightings = _weightings(factors, broken)
            if self._clipping.counted:
                self._count(total, next(iter(factors.values())), broken)

            def add(name: str, sums: Tensor) -> None:
                if name in total:
                    total[name].add_(sums)
                else:
                    total[name] = sums.to(torch.float64) if long else sums

            for name in list(parts):
                part = parts.pop(name)
                if name == _JOINED:
                    sums = part.weighted_sum(weightings[name])
                    for term, piece in zip(small, sums.split([term.size for term in small]), strict=True):
                        add(term.name, piece.view(parameters[term.name].shape))
                elif name in total:
                    part.add_weighted_sum(total[name], weightings[name])
                else:
                    add(name, part.weighted_sum(weightings[name]))
        return int(broken.sum())

    def _count(self, total: dict[str, Tensor], factors: Tensor, broken: Tensor) -> None:
        """Add the number of records within the clip norm, centred, to `total`."""
        count = self._clipping.count(factors, broken)
        total[UNCLIPPED] = total[UNCLIPPED] + count if UNCLIPPED in total else count

    def forward(self, parameters: dict[str, Tensor], features: Tensor, targets: Tensor) -> tuple[Tape, Tensor]:
        """Return the tape of one forward and the loss of every record, shape (records,)."""
        tape = Tape(parameters, RULES, otherwise, TOGETHER)
        with torch.enable_grad(), self._precision(features):
            losses = tape.losses(self._model, self._loss, features, targets, views=self._views)
        return tape, losses

    def estimate(self, records: int) -> float:
        """Return the bytes that so many records take at once; 0 before the first batch has shown it."""
        return (self._bytes_per_record or 0.0) * records

    def _precision(self, features: Tensor) -> contextlib.AbstractContextManager[object]:
        if not self._compute.autocast:
            return contextlib.nullcontext()
        return torch.autocast(features.device.type, dtype=torch.bfloat16)

    def _room(self) -> float:
        if self._compute.memory_mb is not None:
            return self._compute.memory_mb * 1e6
        return _MOST

    def _learn(self, tape: Tape, held: int) -> None:
        """Note what a record takes: the outputs of all operations, the gradients of those of layers, what is held."""
        self._plain_per_record = tape.bytes / tape.records
        self._bytes_per_record = (tape.bytes + tape.noted_bytes + held) / tape.records


def _weightings(factors: Mapping[str, Tensor], broken: Tensor) -> dict[str, Weighting]:
    missing = broken if bool(broken.any()) else None
    distinct = {id(values): values for values in factors.values()}  # one for all names, unless clipped per layer
    made = {key: Weighting(values, missing) for key, values in distinct.items()}
    return {name: made[id(values)] for name, values in factors.items()}


def together(terms: Sequence[Term]) -> Term:
    """Return one term for a parameter from the terms of all its uses."""
    if len(terms) == 1:
        return terms[0]
    return terms[0].merged(terms[1:]) or added(terms)
