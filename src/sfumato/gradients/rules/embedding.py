"""Embedding tables and bags of embeddings."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sfumato.errors import UnsupportedModelError
from sfumato.gradients.rules.registry import rule
from sfumato.gradients.tape import Kept, Tape
from sfumato.gradients.terms.rows import Rows
from sfumato.gradients.terms.term import Term


@rule(F.embedding)
def embedding(
    tape: Tape, input: Tensor, weight: Tensor, padding_idx: int | None = None, max_norm: float | None = None,
    norm_type: float = 2.0, scale_grad_by_freq: bool = False, sparse: bool = False,
) -> Any:  # fmt: skip
    """Follow `torch.nn.functional.embedding`; `sparse` changes nothing, because the noised sum is dense."""
    if not tape.has_records(input) or tape.has_records(weight):
        return NotImplemented
    _refuse(max_norm, scale_grad_by_freq)
    index = tape.open(input)
    w = tape.weight(weight)
    assert w is not None
    out = F.embedding(index.reshape(-1), w.value)
    kept, rows, records = Kept(index), len(weight), tape.records
    nothing = None if padding_idx is None else padding_idx % rows

    def terms(gradients: Sequence[Tensor | None]) -> Iterator[Term]:
        (gradient,) = gradients
        assert gradient is not None
        read = kept.get().reshape(records, -1).long()
        if nothing is not None:
            read = torch.where(read == nothing, -1, read)
        yield Rows(w.name, read, gradient.view(records, read.shape[1], -1), rows)

    tape.note("embedding", (w,), (), (out,), terms)
    return tape.close(out.view(*index.shape, weight.shape[1]))


@rule(F.embedding_bag)
def embedding_bag(
    tape: Tape, input: Tensor, weight: Tensor, offsets: Tensor | None = None, max_norm: float | None = None,
    norm_type: float = 2, scale_grad_by_freq: bool = False, mode: str = "mean", sparse: bool = False,
    per_sample_weights: Tensor | None = None, include_last_offset: bool = False, padding_idx: int | None = None,
) -> Any:  # fmt: skip
    """Follow `torch.nn.functional.embedding_bag` for bags of one size: an embedding, then a sum, mean or maximum."""
    _refuse(max_norm, scale_grad_by_freq)
    if offsets is not None or input.dim() != 2:
        raise UnsupportedModelError(
            "EmbeddingBag with offsets holds bags of different sizes in one batch; give every record its bag as a row of a "
            "2-dimensional input, filled up with padding_idx."
        )
    if not tape.has_records(input):
        return NotImplemented
    with tape:
        read = F.embedding(input, weight, padding_idx)
    kept = torch.ones_like(input, dtype=torch.bool) if padding_idx is None else input != padding_idx % len(weight)
    kept = kept.unsqueeze(-1)
    if mode == "max":
        # A bag of nothing but padding is 0, as in torch.
        top = torch.where(kept, read, -torch.inf).amax(1)
        return torch.where(kept.any(1), top, 0.0)
    if per_sample_weights is not None:
        if per_sample_weights.requires_grad:
            raise UnsupportedModelError("EmbeddingBag cannot train its per_sample_weights here; detach them.")
        read = read * per_sample_weights.unsqueeze(-1)
    total = torch.where(kept, read, 0.0).sum(1)
    return total if mode == "sum" else total / kept.sum(1).clamp(min=1)


def _refuse(max_norm: float | None, by_frequency: bool) -> None:
    if max_norm is not None:
        raise UnsupportedModelError(
            "An embedding with max_norm rewrites its table by which rows the records read, without noise; use max_norm=None."
        )
    if by_frequency:
        raise UnsupportedModelError(
            "An embedding with scale_grad_by_freq divides by counts over the records; use scale_grad_by_freq=False."
        )
