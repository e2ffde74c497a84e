"""Every rule against the oracle and against a loop of plain autograd, on generated layers, shapes and frozen parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from gradient_checks import DOUBLE, SINGLE, Case, check_agreement, normals, squares, tokens, with_values
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.gradients.clipping import KINDS, Clipping

# Shrinking whole models takes minutes and tells little more than what was drawn.
GENERATED = settings(deadline=None, phases=(Phase.explicit, Phase.reuse, Phase.generate))
BOOLS = st.booleans()
COUNTS = st.sampled_from([0, 1, 2, 3, 5, 9, 13])


class Draw:
    """A short way to draw sizes."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data

    def size(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))

    def sizes(self, dims: int, low: int, high: int) -> tuple[int, ...]:
        return tuple(self.size(low, high) for _ in range(dims))

    def of(self, *values: Any) -> Any:
        return self.data.draw(st.sampled_from(values))

    def flag(self) -> bool:
        return self.data.draw(BOOLS)


Made = tuple[nn.Module, Callable[[int, int], Tensor]]
"""A model, and features by (seed, records)."""
Factory = Callable[[Draw], Made]


class Call(nn.Module):
    """A model around one layer and a function of it."""

    def __init__(self, layer: nn.Module, forward: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.run = layer, forward

    def forward(self, x: Tensor) -> Any:
        return self.run(self.layer, x)


def of_shape(*shape: int) -> Callable[[int, int], Tensor]:
    return lambda seed, records: normals(seed, records, *shape)


def of_tokens(rows: int, *shape: int) -> Callable[[int, int], Tensor]:
    return lambda seed, records: tokens(seed, rows, records, *shape)


def linear(draw: Draw) -> Made:
    inside, out = draw.size(1, 5), draw.size(1, 5)
    layer = nn.Linear(inside, out, bias=draw.flag())
    return layer, of_shape(*draw.sizes(draw.size(0, 3), 1, 4), inside)


def linear_wide(draw: Draw) -> Made:
    """Few positions and many coordinates, and the reverse, so that every strategy comes first once."""
    inside, out, positions = draw.of((40, 30, 2), (2, 3, 60), (1, 1, 50))
    return nn.Linear(inside, out), of_shape(positions, inside)


def _channels(draw: Draw) -> tuple[int, int, int]:
    groups = draw.size(1, 3)
    return groups, groups * draw.size(1, 2), groups * draw.size(1, 2)


def convolution(dims: int) -> Factory:
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]

    def make(draw: Draw) -> Made:
        groups, inside, out = _channels(draw)
        kernel, spread = draw.sizes(dims, 1, 3), draw.sizes(dims, 1, 2)
        size = tuple((k - 1) * d + draw.size(1, 4) for k, d in zip(kernel, spread, strict=True))
        padding = draw.of("same", "valid", draw.sizes(dims, 0, 2), draw.size(0, 2))
        stride = 1 if padding == "same" else draw.of(2, draw.sizes(dims, 1, 3))
        mode = draw.of("zeros", "zeros", "circular") if padding == "valid" else "zeros"
        layer = kind(
            inside, out, kernel, stride=stride, padding=padding, dilation=spread, groups=groups, bias=draw.flag(),
            padding_mode=mode,
        )  # fmt: skip
        return layer, of_shape(inside, *size)

    return make


def transposed(dims: int) -> Factory:
    kind = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)[dims - 1]

    def make(draw: Draw) -> Made:
        groups, inside, out = _channels(draw)
        kernel, spread, stride = draw.sizes(dims, 1, 3), draw.sizes(dims, 1, 3), draw.sizes(dims, 1, 3)
        more = tuple(draw.size(0, max(s, d) - 1) for s, d in zip(stride, spread, strict=True))
        padding = tuple(draw.size(0, min(1, (k - 1) * d)) for k, d in zip(kernel, spread, strict=True))
        layer = kind(
            inside, out, kernel, stride=stride, padding=padding, output_padding=more, groups=groups, dilation=spread,
            bias=draw.flag(),
        )  # fmt: skip
        return layer, of_shape(inside, *draw.sizes(dims, 2, 4))

    return make


def unbatched_convolution(draw: Draw) -> Made:
    """A convolution that is given one image without a batch dimension."""
    layer = nn.Conv1d(2, 3, 2) if draw.flag() else nn.ConvTranspose1d(2, 3, 2)
    return Call(layer, lambda conv, x: conv(x.squeeze(0)).unsqueeze(0)), of_shape(2, draw.size(2, 5))


def several_images(draw: Draw) -> Made:
    """Each record is several images."""
    layer = nn.Conv2d(2, 3, 2, padding=1) if draw.flag() else nn.GroupNorm(2, 2)
    return Call(layer, lambda inner, x: inner(x.squeeze(0)).unsqueeze(0)), of_shape(draw.size(2, 4), 2, 3, 3)


def embedding(draw: Draw) -> Made:
    rows = draw.size(2, 6)
    layer = nn.Embedding(rows, draw.size(1, 4), padding_idx=draw.of(None, 0, -1), sparse=False)
    return layer, of_tokens(rows, *draw.sizes(draw.size(0, 2), 1, 5))


def bag(draw: Draw) -> Made:
    rows = draw.size(2, 6)
    layer = nn.EmbeddingBag(rows, draw.size(1, 4), mode=draw.of("sum", "mean", "max"), padding_idx=draw.of(None, 0, -1))
    return layer, of_tokens(rows, draw.size(1, 6))


def bag_with_weights(draw: Draw) -> Made:
    layer = nn.EmbeddingBag(5, 3, mode="sum", padding_idx=draw.of(None, 1))
    weigh = torch.linspace(-1, 2, 4, dtype=DOUBLE)
    return Call(layer, lambda bag, x: bag(x, per_sample_weights=weigh.to(bag.weight.dtype).expand(x.shape))), of_tokens(
        5, 4
    )


def layer_norm(draw: Draw) -> Made:
    shape = draw.sizes(draw.size(1, 2), 3, 4)
    layer = nn.LayerNorm(shape, bias=draw.flag())
    return layer, of_shape(*draw.sizes(draw.size(0, 2), 1, 3), *shape)


def rms_norm(draw: Draw) -> Made:
    shape = draw.sizes(draw.size(1, 2), 3, 4)
    return nn.RMSNorm(shape, eps=draw.of(None, 1e-3)), of_shape(*draw.sizes(draw.size(0, 2), 1, 3), *shape)


def group_norm(draw: Draw) -> Made:
    groups = draw.size(1, 3)
    channels = groups * draw.size(1, 2)
    return nn.GroupNorm(groups, channels), of_shape(channels, *draw.sizes(draw.size(1, 3), 3, 4))


def instance_norm(dims: int) -> Factory:
    kind = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)[dims - 1]

    def make(draw: Draw) -> Made:
        channels = draw.size(1, 3)
        return kind(channels, affine=True), of_shape(channels, *draw.sizes(dims, 3, 4))

    return make


def self_attention(draw: Draw) -> Made:
    heads, steps, first = draw.size(1, 3), draw.size(1, 4), draw.flag()
    layer = nn.MultiheadAttention(2 * heads, heads, bias=draw.flag(), batch_first=first)
    more: dict[str, Any] = {"need_weights": draw.flag(), "average_attn_weights": draw.flag()}
    masked = draw.of(None, "bool", "float", "causal", "each head")
    upper = torch.ones(steps, steps, dtype=torch.bool).triu(1)
    if masked == "bool":
        more["attn_mask"] = upper
    elif masked == "float":
        more["attn_mask"] = torch.linspace(-1, 1, steps * steps, dtype=DOUBLE).view(steps, steps)
    elif masked == "causal":
        more |= {"attn_mask": upper, "is_causal": True}

    def run(attention: nn.Module, x: Tensor) -> Any:
        if draw_padding:
            more["key_padding_mask"] = (torch.arange(steps) >= max(1, steps - 1)).expand(len(x), steps)
        x = x if first else x.transpose(0, 1)
        kept = dict(more)
        if masked == "float":
            kept["attn_mask"] = more["attn_mask"].to(x.dtype)
        elif masked == "each head":
            kept["attn_mask"] = upper.expand(heads * (x.shape[0] if first else x.shape[1]), steps, steps)
        out, weights = attention(x, x, x, **kept)
        return (out if first else out.transpose(0, 1), weights)

    draw_padding = draw.flag() and masked in (None, "bool", "each head")
    return Call(layer, run), of_shape(steps, 2 * heads)


def cross_attention(draw: Draw) -> Made:
    """Queries, keys and values of different lengths and widths; the padding differs by record."""
    heads, steps, keys = draw.size(1, 2), draw.size(1, 3), draw.size(2, 4)
    width = 2 * heads
    separate = draw.flag()
    more: dict[str, Any] = {"kdim": 3, "vdim": 5} if separate else {}
    layer = nn.MultiheadAttention(width, heads, batch_first=True, bias=draw.flag(), **more)
    need, padded = draw.flag(), draw.flag()

    def run(attention: nn.Module, x: Tensor) -> Any:
        query, memory = x[:, :steps, :width], x[:, steps:]
        key, value = (memory[..., :3], memory[..., -5:]) if separate else (memory[..., :width], memory[..., -width:])
        padding = None
        if padded:
            padding = torch.cat([torch.zeros_like(memory[:, :1, 0], dtype=torch.bool), memory[:, 1:, 0] > 0.5], 1)
        return attention(query, key, value, need_weights=need, key_padding_mask=padding)

    return Call(layer, run), of_shape(steps + keys, 6)


class Latents(nn.Module):
    """Learned queries that look at the record."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.ones(1, 2, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.need = need_weights

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(self.latents.expand(len(x), -1, -1), x, x, need_weights=self.need)[0]


class Scores(nn.Module):
    """Torch's fused attention with a mask that differs by record."""

    def __init__(self, mask: str) -> None:
        super().__init__()
        self.into = nn.Linear(4, 12)
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.into(x).unflatten(-1, (3, 2, 2)).permute(2, 0, 3, 1, 4)
        known = x[..., 0] > -1
        known = torch.cat([torch.ones_like(known[:, :1]), known[:, 1:]], 1)
        if self.mask == "by image":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=known[:, None, None, :])
        if self.mask == "of the first image":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=known[:1, None, None, :])
        return F.scaled_dot_product_attention(q, k, v, is_causal=self.mask == "causal", scale=0.3)


def encoder(draw: Draw) -> Made:
    heads, first = draw.size(1, 2), draw.flag()
    layer = nn.TransformerEncoderLayer(
        4 * heads, heads, 5, 0.0, activation=draw.of("relu", "gelu"), batch_first=first, norm_first=draw.flag(),
        bias=draw.flag(),
    ).train(draw.flag())  # fmt: skip
    order = (lambda x: x) if first else (lambda x: x.transpose(0, 1))
    return Call(layer, lambda inner, x: order(inner(order(x)))), of_shape(draw.size(1, 4), 4 * heads)


def recurrent(kind: type[nn.RNNBase], **more: Any) -> Factory:
    def make(draw: Draw) -> Made:
        inside, hidden, first = draw.size(1, 3), draw.size(2, 3), draw.flag()
        layer = kind(
            inside, hidden, num_layers=draw.size(1, 2), bidirectional=draw.flag(), batch_first=first, bias=draw.flag(),
            **more,
        )  # fmt: skip

        def run(inner: nn.Module, x: Tensor) -> Any:
            out, last = inner(x if first else x.transpose(0, 1))
            last = last if isinstance(last, tuple) else (last,)
            return (out if first else out.transpose(0, 1), *(tensor.transpose(0, 1) for tensor in last))

        return Call(layer, run), of_shape(draw.size(1, 4), inside)

    return make


def recurrent_from_a_state(draw: Draw) -> Made:
    kind = draw.of(nn.GRU, nn.LSTM, nn.RNN)
    layer = kind(3, 3, batch_first=True)
    fixed = draw.flag()

    def run(inner: nn.Module, x: Tensor) -> Tensor:
        start = torch.ones(1, len(x), 3, dtype=x.dtype) if fixed else x[:, 0].unsqueeze(0)
        return inner(x, (start, start * 2) if kind is nn.LSTM else start)[0]

    return Call(layer, run), of_shape(3, 3)


RULED: dict[str, Factory] = {
    "linear": linear,
    "linear, wide": linear_wide,
    **{f"convolution {dims}d": convolution(dims) for dims in (1, 2, 3)},
    **{f"transposed convolution {dims}d": transposed(dims) for dims in (1, 2, 3)},
    "convolution without a batch": unbatched_convolution,
    "several images": several_images,
    "embedding": embedding,
    "embedding bag": bag,
    "embedding bag with weights": bag_with_weights,
    "layer norm": layer_norm,
    "rms norm": rms_norm,
    "group norm": group_norm,
    **{f"instance norm {dims}d": instance_norm(dims) for dims in (1, 2, 3)},
    "self attention": self_attention,
    "cross attention": cross_attention,
    "learned queries": lambda draw: (Latents(draw.flag()), of_shape(3, 4)),
    "fused attention": lambda draw: (
        Scores(draw.of("by image", "of the first image", "causal", "none")),
        of_shape(3, 4),
    ),
    "transformer encoder layer": encoder,
}

# Torch cannot run these under vmap, so only the loop says what is right.
RECURRENT: dict[str, Factory] = {
    "rnn, tanh": recurrent(nn.RNN),
    "rnn, relu": recurrent(nn.RNN, nonlinearity="relu"),
    "lstm": recurrent(nn.LSTM),
    "lstm with projections": recurrent(nn.LSTM, proj_size=1),
    "gru": recurrent(nn.GRU),
    "recurrent from a state": recurrent_from_a_state,
}


def freeze_some(model: nn.Module, draw: Draw) -> None:
    parameters = list(model.parameters())
    for parameter in parameters[1:]:
        parameter.requires_grad_(draw.of(True, True, True, False))
    parameters[0].requires_grad_(draw.of(True, True, False) or not any(p.requires_grad for p in parameters[1:]))


def drawn(make: Factory, draw: Draw) -> Case:
    model, features = make(draw)
    seed = draw.size(0, 10**6)
    with_values(model, seed)
    if draw.flag():
        freeze_some(model, draw)
    count = draw.data.draw(COUNTS)
    return Case(model, features(seed + 1, count), normals(seed + 2, count))


def clippings(draw: Draw) -> Clipping:
    return Clipping(draw.of(0.03, 1.0, 100.0), draw.of(*KINDS))


def in_single_precision(case: Case) -> Case:
    features = case.features.float() if case.features.is_floating_point() else case.features
    return replace(case, model=case.model.float(), features=features, targets=case.targets.float())


def check(make: Factory, data: st.DataObject, *, oracle: bool = True) -> None:
    draw = Draw(data)
    case, clipping = drawn(make, draw), clippings(draw)
    expected = case.loop(clipping)
    if oracle:
        check_agreement(case.reference(clipping), expected, 1e-10)
    check_agreement(case.fast(clipping), expected, 1e-10)
    check_agreement(in_single_precision(case).fast(clipping), expected, 1e-4)


@pytest.mark.parametrize("name", RULED)
@settings(GENERATED, max_examples=10)
@given(data=st.data())
def test_the_sum_of_a_layer_equals_the_oracle(name: str, data: st.DataObject) -> None:
    check(RULED[name], data)


@pytest.mark.parametrize("name", RECURRENT)
@settings(GENERATED, max_examples=10)
@given(data=st.data())
def test_the_sum_of_a_recurrent_layer_equals_a_loop(name: str, data: st.DataObject) -> None:
    check(RECURRENT[name], data, oracle=False)


# Without a rule: the reference path for that operation alone. Torch warns where it has no batched kernel.

UNRULED: dict[str, Factory] = {
    "prelu, one": lambda draw: (nn.PReLU(), of_shape(3, 4)),
    "prelu, channels": lambda draw: (nn.PReLU(3), of_shape(3, draw.size(1, 4))),
    "bilinear": lambda draw: (
        Call(nn.Bilinear(3, 3, 2, bias=draw.flag()), lambda inner, x: inner(x, x.flip(1))),
        of_shape(draw.size(1, 3), 3),
    ),
    "attention over one more key": lambda draw: (
        Call(
            nn.MultiheadAttention(4, 2, batch_first=True, add_bias_kv=draw.flag(), add_zero_attn=draw.flag()),
            lambda inner, x: inner(x, x, x)[0],
        ),
        of_shape(3, 4),
    ),
    "attention without a batch": lambda draw: (
        Call(nn.MultiheadAttention(4, 2), lambda inner, x: inner(x[0], x[0], x[0])[0].unsqueeze(0)),
        of_shape(3, 4),
    ),
    "recurrence of what no record is": lambda draw: (
        Call(nn.Linear(3, 3), lambda inner, x: x @ inner(torch.eye(3, dtype=x.dtype))),
        of_shape(2, 3),
    ),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", UNRULED)
@settings(GENERATED, max_examples=6)
@given(data=st.data())
def test_the_sum_of_a_layer_without_a_rule_equals_the_oracle(name: str, data: st.DataObject) -> None:
    check(UNRULED[name], data)


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("odd", ["add_zero_attn", "add_bias_kv"])
def test_attention_that_falls_back_neither_warns_nor_differs(odd: str, need_weights: bool) -> None:
    layer = nn.MultiheadAttention(4, 2, batch_first=True, **{odd: True})
    model = with_values(Call(layer, lambda inner, x: inner(x, x, x, need_weights=need_weights)[0]), 0)
    case = Case(model, normals(1, 3, 3, 4), normals(2, 3))
    check_agreement(case.fast(Clipping(0.1)), case.loop(Clipping(0.1)), 1e-10)


@pytest.mark.parametrize("training", [True, False])
def test_a_frozen_transformer_under_a_trained_head_neither_warns_nor_differs(training: bool) -> None:
    body = nn.TransformerEncoderLayer(4, 2, 5, 0.0, batch_first=True).requires_grad_(False)
    model = with_values(nn.Sequential(body, nn.Linear(4, 2)), 0).train(training)
    case = Case(model, normals(1, 3, 3, 4), normals(2, 3))
    check_agreement(case.fast(Clipping(0.1)), case.loop(Clipping(0.1)), 1e-10)


def test_padding_adds_nothing_to_its_row() -> None:
    layer = with_values(nn.Embedding(4, 2, padding_idx=1), 0)
    read = Case(layer, torch.tensor([[1, 1, 2], [1, 0, 2]]), torch.zeros(2, dtype=DOUBLE)).fast(Clipping(1.0))
    assert read.bounded.value["weight"].abs().sum(1).gt(0).tolist() == [True, False, True, False]


def test_a_table_whose_gradients_torch_would_make_sparse_gets_a_dense_sum() -> None:
    case = Case(with_values(nn.Embedding(4, 2, sparse=True), 0), torch.tensor([[3, 3], [0, 2]]), normals(2, 2))
    result = case.fast(Clipping(0.1))
    assert result.bounded.value["weight"].layout is torch.strided
    check_agreement(result, case.loop(Clipping(0.1)), 1e-10)


@pytest.mark.parametrize("name", ["linear", "convolution 2d", "layer norm", "lstm", "self attention", "embedding"])
@settings(GENERATED, max_examples=5)
@given(data=st.data())
def test_views_of_a_record_are_clipped_once(name: str, data: st.DataObject) -> None:
    draw = Draw(data)
    model, features = (RULED | RECURRENT)[name](draw)
    with_values(model, draw.size(0, 10**6))
    count, views, clipping = draw.size(0, 4), draw.size(1, 3), clippings(draw)
    many = features(1, count * views)
    case = Case(model, many.view(count, views, *many.shape[1:]), normals(2, count), squares)
    expected = case.loop(clipping, views=True)
    if name not in RECURRENT:
        check_agreement(case.reference(clipping, views=True), expected, 1e-10)
    check_agreement(case.fast(clipping, views=True), expected, 1e-10)


@pytest.mark.parametrize("mask", ["by image", "of the first image"])
def test_views_may_share_an_attention_mask(mask: str) -> None:
    case = Case(with_values(Scores(mask), 0), normals(1, 3, 2, 3, 4), normals(2, 3))
    check_agreement(case.fast(Clipping(0.1), views=True), case.loop(Clipping(0.1), views=True), 1e-10)


def test_single_precision_is_what_the_single_precision_model_gives() -> None:
    case = in_single_precision(Case(with_values(nn.Linear(3, 2), 0), normals(1, 4, 3), normals(2, 4)))
    assert case.features.dtype is SINGLE
    check_agreement(case.fast(Clipping(0.5)), case.reference(Clipping(0.5)), 1e-6)
