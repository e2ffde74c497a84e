"""Any other operation that takes a trained parameter: the reference path, for that operation alone.

The operation runs under vmap like the rest of the model. After the backward it is run again, one record at a time, and the
record's output gradient is pulled back to the parameter: exact for whatever torch can differentiate, at the price of one
gradient in memory for each record.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.func import vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from sfumato.errors import UnsupportedModelError
from sfumato.gradients.tape import Kept, Tape, Weight
from sfumato.gradients.terms.held import Given
from sfumato.gradients.terms.term import Term

_functorch = torch._C._functorch


def otherwise(tape: Tape, function: Any, args: Any, kwargs: Any) -> Any:
    """Run `function` and note how to pull its output gradients back, one record at a time."""
    leaves, structure = pytree.tree_flatten((args, kwargs))
    weights: dict[int, Weight] = {}
    records: dict[int, Kept] = {}
    opened: list[Tensor] = []
    closed: dict[int, Tensor] = {}
    for place, leaf in enumerate(leaves):
        if tape.has_records(leaf):
            opened.append(tape.open(leaf))
            records[place] = Kept(opened[-1])
            closed[place], leaves[place] = leaf, None
        elif isinstance(leaf, Tensor) and leaf.requires_grad:
            weight = tape.weight(leaf)
            assert weight is not None
            weights[place] = weight

    device = opened[0].device.type
    autocast = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def run(values: dict[int, Tensor]) -> tuple[list[Any], Any]:
        mixed = [values.get(place, leaf) for place, leaf in enumerate(leaves)]
        new_args, new_kwargs = pytree.tree_unflatten(mixed, structure)
        # The fused attention kernels have no batched form. The backward is outside of the forward's autocast.
        with (
            sdpa_kernel(SDPBackend.MATH),
            torch.autocast(device, dtype=autocast[1], enabled=autocast[0], cache_enabled=False),
        ):
            return pytree.tree_flatten(function(*new_args, **new_kwargs))

    outputs, shape = run({place: weight.value for place, weight in weights.items()} | closed)
    followed = [
        place
        for place, out in enumerate(outputs)
        if tape.has_records(out) and _functorch.get_unwrapped(out).requires_grad
    ]
    if not followed:
        # It only took the tensor's dtype or shape, say; what it returns depends on parameters alone.
        return function(*args, **kwargs)
    for place in followed:
        outputs[place] = outputs[place].clone()  # an output may be a view, whose place on the graph can change
    name = getattr(function, "__name__", str(function))

    def terms(gradients: Sequence[Tensor | None]) -> Iterator[Term]:
        held = [kept.get() for kept in records.values()]
        given = [place for place, gradient in zip(followed, gradients, strict=True) if gradient is not None]
        upstream = [g.movedim(dim, 0) for g, dim in zip(gradients, dims, strict=True) if g is not None]

        def pull(upstream: list[Tensor], values: list[Tensor]) -> tuple[Tensor, ...]:
            def again(*parameters: Tensor) -> list[Tensor]:
                out, _ = run(dict(zip(weights, parameters, strict=True)) | dict(zip(records, values, strict=True)))
                return [out[place] for place in given]

            pulled: tuple[Tensor, ...] = vjp(again, *(weight.value.detach() for weight in weights.values()))[1](
                upstream
            )
            return pulled

        try:
            pulled = vmap(pull, randomness="error")(upstream, held)
        except RuntimeError:
            raise UnsupportedModelError(
                f'{name} with the parameter "{next(iter(weights.values())).name}" has no rule and cannot be repeated for one '
                "record at a time (it may be random); split it into simpler operations, or freeze the parameter."
            ) from None
        for weight, gradient in zip(weights.values(), pulled, strict=True):
            yield Given(weight.name, gradient)

    inner: list[Tensor] = [_functorch.get_unwrapped(outputs[place]) for place in followed]
    dims: list[int] = [_functorch.maybe_get_bdim(outputs[place]) for place in followed]
    tape.note(f"reference ({name})", list(weights.values()), opened, inner, terms)
    return pytree.tree_unflatten(outputs, shape)
