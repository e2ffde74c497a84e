"""Layer, group, instance and RMS normalisation: a scale and a shift of something normalised within a record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from sfumato.gradients.rules.registry import rule
from sfumato.gradients.tape import Kept, Tape
from sfumato.gradients.terms.held import Given
from sfumato.gradients.terms.term import Term, wide

Normalise = Callable[[Tensor, Tensor | None, Tensor | None], Tensor]


@rule(F.layer_norm)
def layer_norm(
    tape: Tape, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
    bias: Tensor | None = None, eps: float = 1e-5,
) -> Any:  # fmt: skip
    """Follow `torch.nn.functional.layer_norm`."""
    shape = tuple(normalized_shape)
    return _over_last(tape, input, weight, bias, len(shape), lambda x, w, b: F.layer_norm(x, shape, w, b, eps))


@rule(F.rms_norm)
def rms_norm(
    tape: Tape, input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:  # fmt: skip
    """Follow `torch.nn.functional.rms_norm`."""
    shape = tuple(normalized_shape)
    return _over_last(tape, input, weight, None, len(shape), lambda x, w, _: F.rms_norm(x, shape, w, eps))


@rule(F.group_norm)
def group_norm(
    tape: Tape, input: Tensor, num_groups: int, weight: Tensor | None = None, bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:  # fmt: skip
    """Follow `torch.nn.functional.group_norm`."""
    return _over_channels(tape, input, weight, bias, lambda x, w, b: F.group_norm(x, num_groups, w, b, eps))


@rule(F.instance_norm)
def instance_norm(
    tape: Tape, input: Tensor, running_mean: Tensor | None = None, running_var: Tensor | None = None,
    weight: Tensor | None = None, bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:  # fmt: skip
    """Follow `torch.nn.functional.instance_norm` without running statistics."""
    if running_mean is not None or running_var is not None or not use_input_stats or input[0, 0].numel() == 1:
        return NotImplemented
    # Every channel a group: the same numbers, in one kernel whose output is no view.
    channels = input.shape[1]
    return _over_channels(tape, input, weight, bias, lambda x, w, b: F.group_norm(x, channels, w, b, eps))


def _over_last(
    tape: Tape, input: Tensor, weight: Tensor | None, bias: Tensor | None, dims: int, normalise: Normalise
) -> Any:
    if not tape.has_records(input) or tape.has_records(weight) or tape.has_records(bias):
        return NotImplemented
    x = tape.open(input)

    def per_record(values: Tensor) -> Tensor:
        return values.flatten(1, -dims - 1).sum(1) if values.dim() > dims + 1 else values

    return tape.close(_scaled(tape, x, weight, bias, normalise, per_record))


def _over_channels(tape: Tape, input: Tensor, weight: Tensor | None, bias: Tensor | None, normalise: Normalise) -> Any:
    if not tape.has_records(input) or tape.has_records(weight) or tape.has_records(bias) or input.dim() < 2:
        return NotImplemented
    x = tape.open(input)
    records, images = x.shape[:2]

    def per_record(values: Tensor) -> Tensor:  # (records * images, channels, *size)
        sums = values.flatten(2).sum(2) if values.dim() > 2 else values
        return sums.view(records, images, -1).sum(1)

    out = _scaled(tape, x.flatten(0, 1), weight, bias, normalise, per_record)
    return tape.close(out.unflatten(0, (records, images)))


def _scaled(
    tape: Tape, x: Tensor, weight: Tensor | None, bias: Tensor | None, normalise: Normalise,
    per_record: Callable[[Tensor], Tensor],
) -> Tensor:  # fmt: skip
    w, b = tape.weight(weight), tape.weight(bias)
    out = normalise(x, w.value if w else None, b.value if b else None)
    kept = Kept(x)

    def terms(gradients: Sequence[Tensor | None]) -> Iterator[Term]:
        (gradient,) = gradients
        assert gradient is not None
        if w is not None and w.name:
            # Fresh from its kernel, so it may be written to.
            yield Given(w.name, per_record(wide(normalise(kept.get(), None, None)).mul_(wide(gradient))))
        if b is not None and b.name:
            yield Given(b.name, per_record(wide(gradient)))

    tape.note("normalisation", (w, b), (x,), (out,), terms)
    return out
