from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn import functional as F

from sfumato.learning.fused_linear import Fusing, NotFusable, Sink

RATE = 0.3


def step(
    forward: Callable[[dict[str, Tensor], Tensor], Tensor], weights: dict[str, Tensor], x: Tensor, fused: bool,
    clients: int | None = None,
) -> tuple[dict[str, Tensor], Tensor | None]:  # fmt: skip
    """Return the weights after one step of SGD, and the gradient of the input; fused, or as autograd has it."""
    weights = {name: value.clone() for name, value in weights.items()}
    anchor = torch.zeros((), requires_grad=True)
    sink = Sink(RATE, anchor, is_open=True)
    leaves = {name: value.detach().requires_grad_(not fused) for name, value in weights.items()}
    x = x.clone().requires_grad_()

    def one(given: dict[str, Tensor], own: Tensor) -> Tensor:
        if not fused:
            return forward(given, own)
        with Fusing(given, given, sink):
            return forward(given, own)

    out = one(leaves, x) if clients is None else vmap(one)(leaves, x)
    asked = [x, anchor] if fused else [x, *leaves.values()]
    found = torch.autograd.grad((out.square() * 0.5 + out.sin()).sum(), asked, allow_unused=True)
    if not fused:
        for weight, gradient in zip(weights.values(), found[1:], strict=True):
            weight.sub_(gradient, alpha=RATE)
    return weights, found[0]


def assert_alike(
    forward: Callable[[dict[str, Tensor], Tensor], Tensor], weights: dict[str, Tensor], x: Tensor, clients: int | None = None
) -> None:  # fmt: skip
    (expected, of_input), (found, gradient) = (step(forward, weights, x, fused, clients) for fused in (False, True))
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=0, atol=1e-10), name
        assert not torch.equal(found[name], weights[name])
    assert of_input is not None
    assert gradient is not None
    assert torch.allclose(gradient, of_input, rtol=0, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=0, max_size=3), st.integers(1, 5), st.integers(1, 5), st.booleans(),
    st.none() | st.integers(1, 4), st.integers(0, 99),
)  # fmt: skip
def test_two_fused_layers_take_the_step_that_autograd_takes(
    rows: list[int], into: int, out: int, biased: bool, clients: int | None, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def some(*shape: int) -> Tensor:
        front = () if clients is None else (clients,)
        return torch.randn(*front, *shape, generator=generator, dtype=torch.float64)

    weights = {"one": some(out, into), "two": some(3, out)} | ({"shift": some(out)} if biased else {})

    def forward(given: dict[str, Tensor], x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, given["one"], given.get("shift"))), given["two"])

    assert_alike(forward, weights, some(*rows, into), clients)


def test_an_input_that_all_clients_have_in_common_serves_each_of_them() -> None:
    generator = torch.Generator().manual_seed(1)
    weights = {"one": torch.randn(3, 4, 2, generator=generator), "shift": torch.randn(3, 4, generator=generator)}
    x = torch.randn(3, 5, 2, generator=generator)
    same = torch.randn(5, 2, generator=generator)

    def forward(given: dict[str, Tensor], own: Tensor) -> Tensor:
        return F.linear(same, given["one"], given["shift"]) + own.sum() * 1e-3

    (expected, _), (found, _) = (step(forward, weights, x, fused, 3) for fused in (False, True))
    assert all(torch.allclose(found[name], value, atol=1e-5) for name, value in expected.items())


def watched(module: nn.Module, x: Tensor) -> frozenset[str]:
    weights = {name: value.detach() for name, value in module.named_parameters()}
    with Fusing(weights, (), Sink(RATE, torch.zeros(()))) as mode:
        functional_call(module, weights, (x,))
    return mode.fusable()


class _Uses(nn.Module):
    """Does with a layer what it is told."""

    def __init__(self, use: Callable[[nn.Linear, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.use = nn.Linear(2, 2), use

    def forward(self, x: Tensor) -> Tensor:
        return self.use(self.layer, x)


def _penalised(layer: nn.Linear, x: Tensor) -> Tensor:
    return layer(x) + layer.weight.norm()


NOT_ONCE: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "twice": lambda layer, x: layer(layer(x)),
    "penalised": _penalised,
    "detached": lambda layer, x: layer(x) + layer.weight.detach().sum(),
    "its data": lambda layer, x: layer(x) + layer.weight.data.sum(),
    "transposed": lambda layer, x: layer(x) @ layer.weight.T,
    "by operator": lambda layer, x: layer(x) @ layer.weight,
    "in a list": lambda layer, x: layer(x) + torch.cat([layer.weight, x]).sum(),
    "by keyword": lambda layer, x: layer(x) + torch.sum(input=layer.weight),
    "as an input": lambda layer, x: layer(x) + F.linear(layer.weight, torch.ones(1, 2)).sum(),
    "bias elsewhere": lambda layer, x: layer(x) + layer.bias,
    "bias of another": lambda layer, x: layer(x) + F.linear(x, torch.ones(2, 2), layer.bias),
    "another's bias": lambda layer, x: F.linear(x, layer.weight, torch.ones(2)) + layer.bias,
    "within another function": lambda layer, x: layer(x) + F.bilinear(x, x, layer.weight[None]),
    "before": lambda layer, x: layer.weight.sum() + layer(x),
}


@pytest.mark.parametrize("use", NOT_ONCE)
def test_a_weight_with_any_other_use_is_never_fused(use: str) -> None:
    module, x = _Uses(NOT_ONCE[use]), torch.ones(2, 2)
    assert watched(module, x).isdisjoint({"layer.weight"} if "bias" not in use else {"layer.weight", "layer.bias"})
    weights = {name: value.detach() for name, value in module.named_parameters()}
    with pytest.raises(NotFusable), Fusing(weights, weights, Sink(RATE, torch.zeros((), requires_grad=True))):
        functional_call(module, weights, (x,))


def test_a_weight_used_once_is_fused_also_beside_others() -> None:
    assert watched(_Uses(lambda layer, x: layer(x)), torch.ones(2, 2)) == {"layer.weight", "layer.bias"}
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.Linear(2, 3, bias=False))
    assert watched(model, torch.ones(2, 2)) == {"0.weight", "0.bias", "2.weight"}
    attention = nn.MultiheadAttention(2, 1, batch_first=True)
    encoder = _Uses(lambda layer, x: layer(attention(x[None], x[None], x[None])[0]))
    assert watched(encoder, torch.ones(2, 2)) == {"layer.weight", "layer.bias"}


def test_attention_uses_its_weights_in_a_function_of_its_own() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(2, 1, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.attention(x, x, x)[0]
            return found

    assert not watched(Attends(), torch.ones(1, 2, 2))


def test_tied_weights_are_seen_as_one() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    assert watched(model, torch.ones(1, 2)) == frozenset()


def test_nested_vmap_is_refused() -> None:
    weights = {"one": torch.randn(2, 3, 4, 2)}
    anchor = torch.zeros((), requires_grad=True)
    sink = Sink(RATE, anchor, is_open=True)

    def inner(given: dict[str, Tensor], x: Tensor) -> Tensor:
        with Fusing(given, given, sink):
            return F.linear(x, given["one"])

    with pytest.raises(NotFusable):
        vmap(vmap(inner))(weights, torch.randn(2, 3, 5, 2))
