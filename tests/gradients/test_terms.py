"""Every strategy of every term against the gradient of each record written out in full."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from gradient_checks import DOUBLE, SINGLE, normals
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato.gradients.clipping import Clipping
from sfumato.gradients.private import together
from sfumato.gradients.terms.convolution import Convolution, Geometry
from sfumato.gradients.terms.held import Given, added
from sfumato.gradients.terms.product import Product
from sfumato.gradients.terms.rows import Rows
from sfumato.gradients.terms.term import Term, Weighting, squared_norms, wide

Written = Callable[[], Tensor]
"""The gradient of every record in float64, shape (records, *shape of the parameter)."""
_CONVOLVE = (torch.conv1d, torch.conv2d, torch.conv3d)


def product(seed: int, records: int, positions: int, m: int, n: int, dtype: torch.dtype) -> tuple[Product, Written]:
    left, right = normals(seed, records, positions, m).to(dtype), normals(seed + 1, records, positions, n).to(dtype)
    return product_of(left, right)


def product_of(left: Tensor, right: Tensor) -> tuple[Product, Written]:
    shape = torch.Size((left.shape[2], right.shape[2]))
    return Product("w", left, right, shape), lambda: torch.einsum("rpm,rpn->rmn", left.double(), right.double())


def convolution(
    seed: int, records: int, images: int, size: tuple[int, ...], geometry: Geometry, dtype: torch.dtype
) -> tuple[Convolution, Written]:
    inputs = normals(seed, records, images, geometry.kernel[1] * geometry.groups, *size).to(dtype)
    rest = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    convolve = _CONVOLVE[geometry.dims - 1]

    def out(kernel: Tensor, record: Tensor) -> Tensor:
        return convolve(record, kernel, None, *rest)

    shape = out(torch.zeros(geometry.kernel, dtype=dtype), inputs.flatten(0, 1)).shape[1:]
    gradients = normals(seed + 1, records, images, *shape).to(dtype)

    def written() -> Tensor:
        rows = []
        for record, gradient in zip(inputs.double(), gradients.double(), strict=True):
            kernel = torch.zeros(geometry.kernel, dtype=DOUBLE, requires_grad=True)
            rows.append(torch.autograd.grad(out(kernel, record), kernel, gradient)[0])
        return torch.stack(rows)

    return Convolution("w", inputs, gradients, geometry), written


def rows(seed: int, records: int, positions: int, width: int, table: int, dtype: torch.dtype) -> tuple[Rows, Written]:
    index = (normals(seed, records, positions) * 3).round().long().clamp(-1, table - 1)
    gradients = normals(seed + 1, records, positions, width).to(dtype)

    def written() -> Tensor:
        total = torch.zeros(records, table, width, dtype=DOUBLE)
        for record in range(records):
            for position in range(positions):
                if index[record, position] >= 0:
                    total[record, index[record, position]] += gradients[record, position].double()
        return total

    return Rows("w", index, gradients, table), written


def given_term(seed: int, records: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Given, Written]:
    gradients = normals(seed, records, *shape).to(dtype)
    return Given("w", gradients), gradients.double


def geometries(dims: int, groups: int) -> Iterator[tuple[tuple[int, ...], Geometry]]:
    for channels, kernel, stride, padding, dilation, size in (
        ((2, 3), (3, 2, 1), (2, 1, 1), (1, 0, 1), (1, 2, 1), (6, 5, 2)),
        ((1, 1), (1, 1, 1), (1, 3, 1), (0, 0, 0), (1, 1, 1), (3, 4, 2)),
        ((6, 5), (3, 3, 1), (1, 1, 1), (1, 1, 0), (1, 1, 1), (2, 1, 1)),
    ):
        shape = torch.Size((groups * channels[0], channels[1], *kernel[:dims]))
        yield size[:dims], Geometry(shape, stride[:dims], padding[:dims], dilation[:dims], groups)


def terms(dtype: torch.dtype) -> Iterator[tuple[str, Term, Written]]:
    for records, positions, m, n in (
        (5, 1, 3, 4),
        (5, 7, 3, 2),
        (5, 2, 9, 8),
        (4, 3, 1, 1),
        (3, 0, 2, 2),
        (3, 90, 7, 11),
    ):
        yield f"product {positions} x {m} x {n}", *product(0, records, positions, m, n, dtype)
    for dims in (1, 2, 3):
        for groups in (1, 2):
            for images in (1, 3):
                for place, (size, geometry) in enumerate(geometries(dims, groups)):
                    name = f"convolution {dims}d, groups {groups}, images {images}, {place}"
                    yield name, *convolution(0, 4, images, size, geometry, dtype)
    for positions, table in ((1, 5), (6, 3), (9, 400)):
        yield f"rows {positions} of {table}", *rows(0, 4, positions, 3, table, dtype)
    for shape in ((), (3,), (2, 3)):
        yield f"given {shape}", *given_term(0, 4, shape, dtype)


TERMS = [
    pytest.param(dtype, place, id=f"{name}, {str(dtype)[6:]}")
    for dtype in (DOUBLE, SINGLE)
    for place, (name, _, _) in enumerate(terms(DOUBLE))
]


@functools.cache
def listed(dtype: torch.dtype) -> list[tuple[str, Term, Written]]:
    return list(terms(dtype))


def rounding(dtype: torch.dtype) -> float:
    return 1e-12 if dtype is DOUBLE else 1e-5


def close(got: Tensor, expected: Tensor, dtype: torch.dtype, scale: float) -> bool:
    return float((got.double() - expected).norm()) <= rounding(dtype) * scale


def most_slack(term: Term) -> Tensor:
    """Return what the measure may be above the squared norms for the rounding of what could have cancelled."""
    roundoffs = 16 * torch.finfo(SINGLE).eps / 2
    if isinstance(term, Product):
        factors, places = (term.left, term.right), 1
    elif isinstance(term, Convolution):
        factors, places = (term.inputs, term.gradients), math.prod(term.geometry.kernel[2:])
    else:
        return torch.zeros(term.records, dtype=DOUBLE)
    if factors[0].dtype is DOUBLE:
        roundoffs = 16 * torch.finfo(DOUBLE).eps / 2
    first, second = (tensor.double().flatten(1).square().sum(1) for tensor in factors)
    return roundoffs * places * first * second


@pytest.mark.parametrize(("dtype", "place"), TERMS)
def test_each_strategy_measures_and_sums_the_gradients_themselves(dtype: torch.dtype, place: int) -> None:
    _, term, written = listed(dtype)[place]
    gradients = written()
    squared = gradients.reshape(len(gradients), -1).square().sum(1)
    factors = torch.linspace(0.1, 2, len(gradients), dtype=DOUBLE)
    expected, scale = torch.tensordot(factors, gradients, 1), float(gradients.norm())
    assert close(term.per_record(), gradients, dtype, scale)
    for way, strategy in term.strategies().items():
        part = strategy.make()
        assert part.squared.dtype is DOUBLE, way
        assert bool((part.squared >= squared * (1 - rounding(dtype))).all()), way
        most = squared * (1 + rounding(dtype)) + 1.01 * most_slack(term)
        assert bool((part.squared <= most).all()), way
        got = part.weighted_sum(Weighting(factors))
        assert got.shape == expected.shape, way
        assert close(got, expected, dtype, scale), way


def with_broken(term: Term, record: int, value: float) -> Term:
    made = copy.copy(term)
    for field in ("left", "right", "inputs", "gradients", "_gradients"):
        if hasattr(term, field):
            tensor = getattr(term, field).clone()
            tensor.view(len(tensor), -1)[record] = value
            setattr(made, field, tensor)
    return made


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize(("dtype", "place"), TERMS)
def test_each_strategy_leaves_out_broken_records(dtype: torch.dtype, place: int, value: float) -> None:
    _, term, written = listed(dtype)[place]
    gradients = written()
    if not bool(gradients[1].any()):  # nothing was read: there is nothing to break
        return
    kept = torch.arange(len(gradients)) != 1
    expected, scale = gradients[kept].sum(0), float(gradients.norm())
    for way, strategy in with_broken(term, 1, value).strategies().items():
        part = strategy.make()
        assert torch.isfinite(part.squared).tolist() == kept.tolist(), way
        got = part.weighted_sum(Weighting(kept.double(), ~kept))
        assert close(got, expected, dtype, scale), way


def test_every_kind_of_strategy_was_tried() -> None:
    tried = {way for _, term, _ in listed(DOUBLE) for way in term.strategies()}
    assert tried == {
        "outer product", "per record", "ghost norm", "in blocks", "rows read",
        *(f"{how}, {kernel}" for how in ("per record", "in blocks") for kernel in ("grouped", "patches")),
        "per record, patches, channels last", "in blocks, patches, channels last",
    }  # fmt: skip


@pytest.mark.parametrize("blocks", [1, 40, 2**21])
def test_blocks_of_any_size_give_the_same(blocks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sfumato.gradients.terms.product._BLOCK", blocks)
    monkeypatch.setattr("sfumato.gradients.terms.convolution._BLOCK", blocks)
    size, geometry = next(geometries(2, 1))
    for term, written in (product(0, 5, 3, 4, 2, DOUBLE), convolution(0, 5, 2, size, geometry, DOUBLE)):
        squared = written().flatten(1).square().sum(1)
        for strategy in term.strategies().values():
            part = strategy.make()
            assert torch.allclose(part.squared, squared, rtol=1e-10)
            assert torch.allclose(
                part.weighted_sum(Weighting(torch.ones(5, dtype=DOUBLE))), written().sum(0), rtol=1e-10
            )


def test_uses_of_one_parameter_are_measured_together() -> None:
    pairs = [product(seed, 4, positions, 3, 2, DOUBLE) for seed, positions in ((0, 1), (10, 5), (20, 2))]
    many = together([term for term, _ in pairs])
    assert isinstance(many, Product)
    total = sum(written() for _, written in pairs)
    assert torch.allclose(many.per_record(), total)
    read = [rows(seed, 4, 3, 2, 5, DOUBLE) for seed in (0, 7)]
    assert isinstance(together([term for term, _ in read]), Rows)
    assert torch.allclose(together([term for term, _ in read]).per_record(), read[0][1]() + read[1][1]())
    tied = [rows(0, 4, 3, 2, 5, DOUBLE), product(3, 4, 6, 5, 2, DOUBLE)]
    mixed = together([term for term, _ in tied])
    assert isinstance(mixed, Given)
    assert torch.allclose(mixed.per_record(), tied[0][1]() + tied[1][1]())
    assert torch.allclose(added([term for term, _ in tied]).per_record(), mixed.per_record())


# What is added never exceeds the clip norm: values of any size, and gradients that nearly cancel inside a record.


def check_clipped(term: Term, clipping: Clipping) -> None:
    """Check that a record alone adds at most the clip norm, by each strategy."""
    for name, strategy in term.strategies().items():
        squared = strategy.make().squared
        factors, broken = clipping.factors({term.name: squared}, [term.name])
        for record in range(term.records):
            alone = torch.arange(term.records) == record
            total = strategy.make().weighted_sum(
                Weighting(torch.where(alone, factors[term.name], 0.0), broken | ~alone)
            )
            share = float(total.double().norm()) / clipping.norm
            assert share <= 1, (name, record, share)


CLIPPINGS = st.builds(
    Clipping, st.sampled_from([1e-12, 1e-6, 3.3e-5, 1.0, 1e3]), st.sampled_from(["flat", "normalised"])
)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    scale=st.floats(-30, 30),
    apart=st.floats(-8, 0),
    sizes=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    clip=st.sampled_from([1e-3, 1.0, 30.0]),
)
def test_a_linear_layer_whose_gradient_cancels_stays_within_the_clip_norm(
    seed: int, scale: float, apart: float, sizes: tuple[int, int], clip: float
) -> None:
    left = normals(seed, 2, 32, sizes[0])
    right = normals(seed + 1, 2, 32, sizes[1])
    near = right + 10**apart * normals(seed + 2, 2, 32, sizes[1])
    size = 10.0 ** (scale / 2)
    term, _ = product_of(
        (torch.cat([left, -left], 1) * size).to(SINGLE), (torch.cat([right, near], 1) * size).to(SINGLE)
    )
    check_clipped(term, Clipping(clip))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.floats(-30, 30), apart=st.floats(-8, 0), groups=st.sampled_from([1, 2]))
def test_a_convolution_whose_gradient_cancels_stays_within_the_clip_norm(
    seed: int, scale: float, apart: float, groups: int
) -> None:
    geometry = Geometry(torch.Size((2 * groups, 2, 3, 2)), (1, 1), (1, 0), (1, 1), groups)
    term, _ = convolution(seed, 2, 1, (8, 8), geometry, SINGLE)
    size = 10.0 ** (scale / 2)
    near = term.inputs + 10**apart * normals(seed + 2, *term.inputs.shape).to(SINGLE)
    inputs, gradients = torch.cat([term.inputs, near], 1) * size, torch.cat([term.gradients, -term.gradients], 1) * size
    check_clipped(Convolution("w", inputs, gradients, geometry), Clipping(1.0))


SIZES = st.sampled_from([0.0, 1e-38, 1e-30, 1e-23, 1e-8, 1.0, 1e8, 1e18, 1e30, 1e38])


@settings(max_examples=80, deadline=None)
@given(left=SIZES, right=SIZES, positions=st.sampled_from([1, 3]), clipping=CLIPPINGS, seed=st.integers(0, 10**6))
def test_factors_of_any_size_stay_within_the_clip_norm(
    left: float, right: float, positions: int, clipping: Clipping, seed: int
) -> None:
    a = (normals(seed, 3, positions, 4).clamp(-3, 3) * left).to(SINGLE)
    b = (normals(seed + 1, 3, positions, 5).clamp(-3, 3) * right).to(SINGLE)
    check_clipped(product_of(a, b)[0], clipping)
    geometry = Geometry(torch.Size((1, 1, 2)), (1,), (0,), (1,), 1)
    check_clipped(Convolution("w", b.unsqueeze(2), a.unsqueeze(2), geometry), clipping)


@settings(max_examples=40, deadline=None)
@given(size=SIZES, clipping=CLIPPINGS, seed=st.integers(0, 10**6))
def test_held_gradients_of_any_size_stay_within_the_clip_norm(size: float, clipping: Clipping, seed: int) -> None:
    values = (normals(seed, 3, 4, 5).clamp(-3, 3) * size).to(SINGLE)
    check_clipped(Given("w", values), clipping)
    check_clipped(Rows("w", torch.tensor([[0, 1, 1, -1]] * 3), values, 3), clipping)


@given(
    scale=st.floats(-37, 37), size=st.sampled_from([0, 1, 3, 63, 64, 65, 200]), seed=st.integers(0, 10**6)
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_squared_norms_are_right_for_values_of_any_size(scale: float, size: int, seed: int) -> None:
    vectors = (normals(seed, 4, size) * 10**scale).to(SINGLE)
    vectors[2] = 0
    assert torch.allclose(squared_norms(vectors), vectors.double().square().sum(1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [3, 200])
def test_the_squared_norm_of_a_broken_vector_is_not_finite(bad: float, size: int) -> None:
    vectors = torch.ones(3, size)
    vectors[1, size // 2] = bad
    assert torch.isfinite(squared_norms(vectors)).tolist() == [True, False, True]


def test_norms_are_taken_in_single_precision_at_least() -> None:
    for dtype, expected in ((torch.bfloat16, SINGLE), (torch.float16, SINGLE), (SINGLE, SINGLE), (DOUBLE, DOUBLE)):
        assert wide(torch.ones(2, dtype=dtype, requires_grad=True)).dtype is expected
    mixed = Product(
        "w", torch.ones(2, 1, 3, dtype=torch.bfloat16), torch.ones(2, 1, 3, dtype=DOUBLE), torch.Size((3, 3))
    )
    assert mixed.left.dtype is mixed.right.dtype is DOUBLE
