"""Attention: the fused kernel without parameters, and `nn.MultiheadAttention`'s function taken apart into linear layers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from sfumato.gradients.rules.registry import rule, together
from sfumato.gradients.tape import Tape


@together(F.scaled_dot_product_attention)
def attention(
    tape: Tape, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, **more: Any,
) -> Any:  # fmt: skip
    """Run attention with the records among the images of the batch, where torch's fused kernels take it."""
    q, k, v = (tape.open(t).flatten(0, 1) if tape.has_records(t) and t.dim() > 2 else None for t in (query, key, value))
    mask = attn_mask
    if attn_mask is not None and tape.has_records(attn_mask) and attn_mask.dim() == query.dim():
        mask = tape.open(attn_mask)
        mask = mask.expand(-1, len(query), *mask.shape[2:]).flatten(0, 1)
        fits = True
    else:
        fits = attn_mask is None or (not tape.has_records(attn_mask) and (attn_mask.dim() == 2 or len(attn_mask) == 1))
    if q is None or k is None or v is None or not fits or not len(query) == len(key) == len(value):
        with sdpa_kernel(SDPBackend.MATH):  # the others have no batched form
            return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **more)
    with tape.outside():
        out = F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, **more)
    return tape.close(out.unflatten(0, (tape.records, -1)))


@rule(F.multi_head_attention_forward)
def multi_head_attention(
    tape: Tape, query: Tensor, key: Tensor, value: Tensor, embed_dim_to_check: int, num_heads: int,
    in_proj_weight: Tensor | None, in_proj_bias: Tensor | None, bias_k: Tensor | None, bias_v: Tensor | None,
    add_zero_attn: bool, dropout_p: float, out_proj_weight: Tensor, out_proj_bias: Tensor | None, training: bool = True,
    key_padding_mask: Tensor | None = None, need_weights: bool = True, attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False, q_proj_weight: Tensor | None = None, k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None, static_k: Tensor | None = None, static_v: Tensor | None = None,
    average_attn_weights: bool = True, is_causal: bool = False,
) -> Any:  # fmt: skip
    """Follow `torch.nn.functional.multi_head_attention_forward` for inputs of shape (tokens, batch, width)."""
    unusual = (bias_k, bias_v, static_k, static_v)
    if add_zero_attn or query.dim() != 3 or any(tensor is not None for tensor in unusual):
        return NotImplemented
    with tape:  # so that the linear layers below are seen
        if use_separate_proj_weight:
            assert q_proj_weight is not None
            assert k_proj_weight is not None
            assert v_proj_weight is not None
            weights: tuple[Tensor, ...] = (q_proj_weight, k_proj_weight, v_proj_weight)
        else:
            assert in_proj_weight is not None
            weights = in_proj_weight.chunk(3)
        if not use_separate_proj_weight and query is key and key is value:
            assert in_proj_weight is not None
            q, k, v = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, dim=-1)
        else:
            biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
            q, k, v = (F.linear(x, w, b) for x, w, b in zip((query, key, value), weights, biases, strict=True))
        mask = _mask(attn_mask, key_padding_mask, q, num_heads, k.shape[0])
        q, k, v = (x.unflatten(2, (num_heads, -1)).permute(1, 2, 0, 3) for x in (q, k, v))
        p = dropout_p if training else 0.0
        if need_weights:
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            weights_out = F.dropout(torch.softmax(scores if mask is None else scores + mask, -1), p)
            mixed = weights_out @ v
        else:
            weights_out = None
            causal = is_causal and key_padding_mask is None
            mixed = F.scaled_dot_product_attention(q, k, v, None if causal else mask, p, causal)
        out = F.linear(mixed.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
        if weights_out is not None and average_attn_weights:
            weights_out = weights_out.mean(1)
    return out, weights_out


@together(F.multi_head_attention_forward)
def frozen_attention(tape: Tape, *args: Any, **kwargs: Any) -> Any:
    """Run multi-head attention without trained parameters through the same pieces, which have batched kernels."""
    result = multi_head_attention(tape, *args, **kwargs)
    if result is not NotImplemented:
        return result
    with sdpa_kernel(SDPBackend.MATH):
        return F.multi_head_attention_forward(*args, **kwargs)


def _mask(attention: Tensor | None, padding: Tensor | None, like: Tensor, heads: int, keys: int) -> Tensor | None:
    """Return both masks as one to be added to the scores, shape broadcasting to (batch, heads, queries, keys)."""
    total = None
    if attention is not None:
        total = _added(attention, like)
        total = total.unflatten(0, (-1, heads)) if total.dim() == 3 else total
    if padding is not None:
        padded = _added(padding, like).view(-1, 1, 1, keys)
        total = padded if total is None else total + padded
    return total


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype is torch.bool:
        return torch.where(mask, -torch.inf, 0.0).to(like.dtype)
    return mask.to(like.dtype)
