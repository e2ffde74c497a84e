"""Mutants of the fast path: each is put in place of the real thing, and must be caught.

Two checks kill them. The self-check of the first step stops a run in which one record's part is above the clip norm; it runs
for every user. Agreement with a loop of plain autograd over records catches, here in the tests, what the self-check cannot
see: it looks at one record alone, so a mutant that mixes records up, or makes the sum too small, goes past it.
"""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable
from typing import Any, final

import pytest
import torch
from gradient_checks import SINGLE, Case, check_agreement, normals, tokens, with_values
from helpers import sgd, toy_plan
from torch import Tensor, nn

import sfumato as sf
from sfumato.errors import SelfCheckError
from sfumato.gradients import clipping, private, strategies
from sfumato.gradients.clipping import KINDS, Clipping
from sfumato.gradients.compute import DEFAULT, Compute
from sfumato.gradients.private import PrivateGradient
from sfumato.gradients.tape import Tape
from sfumato.gradients.terms import convolution, product, rows, term
from sfumato.gradients.terms.held import Held

RECORDS, CLIP = 12, 1e-3
ABOVE = "above the clip norm"


def uneven(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return a loss whose gradient is far above the clip norm, and of another size for each record; no number for target -1."""
    ramp = torch.linspace(0.5, 1.5, outputs[0].numel(), dtype=outputs.dtype)
    size = torch.where(targets == -1, math.nan, 1.0 + targets)
    return ((outputs.flatten(1) * ramp).square().sum(1) * size).mean()


class Twice(nn.Module):
    """One layer in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x)))


def layers() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(12, 4))


# What each model's only parameter is measured and summed with: a part, and its strategy where that is not the first.
PARTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], type[Any], str | None]] = {
    "linear, one position": (lambda: nn.Linear(6, 4, bias=False), (6,), product._Direct, None),
    "linear, per record": (lambda: nn.Linear(4, 2, bias=False), (3, 4), Held, None),
    "linear, ghost norm": (lambda: nn.Linear(20, 10, bias=False), (2, 20), product._Direct, None),
    "linear, in blocks": (lambda: nn.Linear(4, 2, bias=False), (3, 4), product._Direct, "in blocks"),
    "convolution, per record": (lambda: nn.Conv1d(2, 3, 3, bias=False), (2, 6), Held, None),
    "convolution, patches": (lambda: nn.Conv1d(2, 3, 3, bias=False), (2, 6), Held, "per record, patches"),
    "convolution, in blocks": (
        lambda: nn.Conv1d(2, 3, 3, bias=False), (2, 6), convolution._Direct, "in blocks, grouped",
    ),
    "convolution, ghost norm": (lambda: nn.Conv1d(8, 9, 3, bias=False), (8, 4), convolution._Direct, "ghost norm"),
    "embedding": (lambda: nn.Embedding(5, 3), (4,), rows._Segments, None),
}  # fmt: skip


@final
class Study:
    """A model on records, its sum by the loop before anything is changed, and the two checks."""

    def __init__(self, model: nn.Module, shape: tuple[int, ...], *, clip: float = CLIP, kind: str = "flat") -> None:
        self.model = with_values(model, 3, SINGLE)
        whole = isinstance(model, nn.Embedding)
        features = tokens(4, 5, RECORDS, *shape) if whole else normals(4, RECORDS, *shape).to(SINGLE)
        self.case = Case(self.model, features, torch.arange(RECORDS), uneven)
        self.clipping = Clipping(clip, kind)

    @functools.cached_property
    def expected(self) -> Any:
        return self.case.loop(self.clipping)

    def agrees(self, compute: Compute = DEFAULT) -> bool:
        """Tell whether the sum is that of the loop."""
        try:
            check_agreement(self.case.fast(self.clipping, compute=compute), self.expected, 1e-4)
        except AssertionError:
            return False
        return True

    def train(self) -> None:
        """Train for a step, which the self-check stops if it sees something."""
        model = copy.deepcopy(self.model)
        records = sf.Records.from_arrays(self.case.features, self.case.targets)
        sf.train(model, records, plan(self.clipping), loss=uneven, optimizer=sgd(model, 1e-6))

    def check_sound(self) -> None:
        """Check that nothing is wrong as long as nothing is changed."""
        assert self.agrees()
        self.train()


@functools.cache
def plan(clipped: Clipping) -> sf.Plan:
    return toy_plan(2.0, RECORDS, RECORDS, 1, clip=clipped.norm, clipping=clipped.kind)


@pytest.fixture(params=PARTS)
def part(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Study, type[Any]]:
    """Return a model with one parameter, which was made sure to be measured by the part."""
    make, shape, made, strategy = PARTS[request.param]
    if strategy is not None:
        monkeypatch.setattr(strategies.Choices, "name", lambda self, term, room, timed: strategy)
    study, seen = Study(make(), shape), []
    with pytest.MonkeyPatch.context() as spying:
        honest = made.__init__
        spying.setattr(made, "__init__", lambda self, *rest: (seen.append(1), honest(self, *rest))[1])
        study.check_sound()
    assert seen
    return study, made


def test_mutant_norms_too_small_by_a_third_are_caught_by_the_self_check(
    part: tuple[Study, type[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, made = part
    honest = made.__init__

    def smaller(self: Any, *arguments: Any) -> None:
        honest(self, *arguments)
        self.squared = self.squared * (2 / 3) ** 2

    monkeypatch.setattr(made, "__init__", smaller)
    with pytest.raises(SelfCheckError, match=ABOVE):
        study.train()
    assert not study.agrees()


def test_mutant_sum_that_counts_a_term_twice_is_caught_by_the_self_check(
    part: tuple[Study, type[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, made = part
    honest = made.weighted_sum
    monkeypatch.setattr(made, "weighted_sum", lambda self, weighting: honest(self, weighting) * 2)
    with pytest.raises(SelfCheckError, match=ABOVE):
        study.train()
    assert not study.agrees()


def test_mutant_weights_that_are_not_applied_are_caught_by_the_self_check(
    part: tuple[Study, type[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, _ = part
    honest = term.Weighting.__init__
    monkeypatch.setattr(
        term.Weighting, "__init__", lambda self, factors, broken=None: honest(self, torch.ones_like(factors), broken)
    )
    with pytest.raises(SelfCheckError, match=ABOVE):
        study.train()
    assert not study.agrees()


@pytest.mark.parametrize("kind", ["flat", "per-layer"])
def test_mutant_clip_off_is_caught_by_the_self_check(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(layers(), (2, 6), kind=kind)
    study.check_sound()
    monkeypatch.setattr(clipping, "clip_factors", lambda squared, norm: (torch.ones_like(squared), squared < 0))
    with pytest.raises(SelfCheckError, match=ABOVE):
        study.train()
    assert not study.agrees()


Factors = tuple[dict[str, Tensor], Tensor]


def with_factors(monkeypatch: pytest.MonkeyPatch, change: Callable[[Factors], Factors]) -> None:
    honest = Clipping.factors
    monkeypatch.setattr(Clipping, "factors", lambda self, squared, names: change(honest(self, squared, names)))


@pytest.mark.parametrize("kind", KINDS)
def test_mutant_factors_of_one_are_caught_by_the_self_check(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(layers(), (2, 6), kind=kind)
    study.check_sound()
    with_factors(monkeypatch, lambda made: ({n: torch.ones_like(f) for n, f in made[0].items()}, made[1]))
    with pytest.raises(SelfCheckError, match=ABOVE):
        study.train()
    assert not study.agrees()


@pytest.mark.parametrize("kind", KINDS)
def test_mutant_layers_that_may_each_have_the_whole_clip_norm_are_caught_by_the_self_check(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = Study(layers(), (2, 6), kind=kind)
    study.check_sound()
    honest = Clipping.factors

    def each_alone(self: Clipping, squared: dict[str, Tensor], names: Any) -> Factors:
        broken = honest(self, squared, names)[1]
        return {name: honest(self, {name: values}, [name])[0][name] for name, values in squared.items()}, broken

    monkeypatch.setattr(Clipping, "factors", each_alone)
    with pytest.raises(SelfCheckError, match=ABOVE):
        study.train()
    assert not study.agrees()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("position", [0, 1, -1])
def test_mutant_norm_of_one_parameter_left_out_is_caught_by_the_self_check(
    position: int, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The measured parts are the kernel, the matrix and, together, the biases."""
    study = Study(layers(), (2, 6), kind=kind)
    study.check_sound()
    honest = Clipping.factors

    def without_one(self: Clipping, squared: dict[str, Tensor], names: Any) -> Factors:
        left_out = list(squared)[position]
        return honest(self, squared | {left_out: torch.zeros_like(squared[left_out])}, names)

    monkeypatch.setattr(Clipping, "factors", without_one)
    with pytest.raises(SelfCheckError, match=ABOVE):
        study.train()
    assert not study.agrees()


def goes_past_the_self_check(study: Study) -> bool:
    study.train()
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_mutant_factors_of_another_record_are_caught_by_the_oracle(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(layers(), (2, 6), kind=kind)
    study.check_sound()
    with_factors(monkeypatch, lambda made: ({name: values.roll(1) for name, values in made[0].items()}, made[1]))
    assert goes_past_the_self_check(study)
    assert not study.agrees()


def test_mutant_one_factor_for_the_whole_batch_is_caught_by_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(layers(), (2, 6))
    study.check_sound()
    with_factors(monkeypatch, lambda made: ({n: f.mean().expand_as(f).clone() for n, f in made[0].items()}, made[1]))
    assert goes_past_the_self_check(study)
    assert not study.agrees()


def test_mutant_broken_record_that_is_not_left_out_is_caught_by_the_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """The record that the self-check looks at is the broken one."""
    study = Study(layers(), (2, 6))
    study.case.targets[0] = -1
    study.check_sound()
    honest = term.Weighting.__init__
    monkeypatch.setattr(term.Weighting, "__init__", lambda self, factors, broken=None: honest(self, factors))
    with pytest.raises(SelfCheckError, match=ABOVE):
        study.train()
    assert not study.agrees()


@pytest.mark.parametrize("name", PARTS)
def test_mutant_broken_record_that_is_not_left_out_is_caught_by_the_oracle(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape, _, strategy = PARTS[name]
    study = Study(make(), shape)
    study.case.targets[5] = -1
    if strategy is not None:
        monkeypatch.setattr(strategies.Choices, "name", lambda self, term, room, timed: strategy)
    study.check_sound()
    honest = term.Weighting.__init__
    monkeypatch.setattr(term.Weighting, "__init__", lambda self, factors, broken=None: honest(self, factors))
    assert not study.agrees()


def test_mutant_broken_record_that_is_not_counted_is_caught_by_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(layers(), (2, 6))
    study.case.targets[5] = -1
    study.check_sound()
    monkeypatch.setattr(private.PrivateGradient, "_add_microbatch", _silent(PrivateGradient._add_microbatch))
    assert goes_past_the_self_check(study)
    assert not study.agrees()


def _silent(honest: Callable[..., int]) -> Callable[..., int]:
    def add(*arguments: Any, **more: Any) -> int:
        honest(*arguments, **more)
        return 0

    return add


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda uses: [*uses, uses[0]], id="counted twice"),
        pytest.param(lambda uses: uses[1:], id="left out"),
    ],
)
def test_mutant_use_counted_twice_or_left_out_is_caught_by_the_oracle(
    change: Callable[[list[Any]], list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is measured wrong and summed alike is bounded all the same, so it goes past the self-check."""
    study = Study(Twice(), (6,))
    study.check_sound()
    honest = private.together
    monkeypatch.setattr(private, "together", lambda uses: honest(change(list(uses))))
    assert goes_past_the_self_check(study)
    assert not study.agrees()


def test_mutant_every_use_noted_twice_is_caught_by_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    # Below the clip norm: above it, a gradient of one parameter that is twice as large is clipped to the same.
    study = Study(layers(), (2, 6), clip=1e6)
    study.check_sound()
    honest = Tape.note

    def twice(self: Tape, *arguments: Any) -> None:
        honest(self, *arguments)
        honest(self, *arguments)

    monkeypatch.setattr(Tape, "note", twice)
    assert goes_past_the_self_check(study)
    assert not study.agrees()


SMALL = Compute(memory_mb=1e-6)
"""One record at a time."""


def with_sums(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor, int], Tensor]) -> None:
    """Change every total of a batch, given it and the number of records."""
    honest = PrivateGradient.sum

    def changed(self: PrivateGradient, features: Tensor, targets: Tensor, *more: Any) -> Any:
        result = honest(self, features, targets, *more)
        value = {name: change(total, len(features)) for name, total in result.bounded.value.items()}
        return type(result)(type(result.bounded)(value, result.bounded.norm_bound), result.nonfinite)

    monkeypatch.setattr(PrivateGradient, "sum", changed)


def test_mutant_mean_in_place_of_the_sum_is_caught_by_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(layers(), (2, 6))
    study.check_sound()
    with_sums(monkeypatch, lambda total, records: total / max(1, records))
    assert goes_past_the_self_check(study)
    assert not study.agrees()


def test_mutant_total_over_the_number_of_microbatches_is_caught_by_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(layers(), (2, 6))
    study.check_sound()
    assert study.agrees(SMALL)
    counts: list[int] = []
    honest = PrivateGradient._add_microbatch

    def counting(self: PrivateGradient, *arguments: Any, **more: Any) -> int:
        counts[-1] += 1
        return honest(self, *arguments, **more)

    monkeypatch.setattr(PrivateGradient, "_add_microbatch", counting)
    with_sums(monkeypatch, lambda total, records: total / max(1, counts[-1]))
    changed = PrivateGradient.sum

    def fresh(self: PrivateGradient, features: Tensor, targets: Tensor, *more: Any) -> Any:
        counts.append(0)
        return changed(self, features, targets, *more)

    monkeypatch.setattr(PrivateGradient, "sum", fresh)
    assert goes_past_the_self_check(study)
    assert not study.agrees(SMALL)
    assert max(counts) > 2


def test_mutant_only_the_last_microbatch_is_caught_by_the_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(layers(), (2, 6))
    study.check_sound()
    assert study.agrees(SMALL)
    honest = PrivateGradient._add_microbatch

    def forgetting(self: PrivateGradient, total: dict[str, Tensor], *arguments: Any, **more: Any) -> int:
        total.clear()
        return honest(self, total, *arguments, **more)

    monkeypatch.setattr(PrivateGradient, "_add_microbatch", forgetting)
    assert goes_past_the_self_check(study)
    assert not study.agrees(SMALL)


def test_mutant_parameter_that_is_not_covered_is_caught_by_the_self_check(monkeypatch: pytest.MonkeyPatch) -> None:
    study = Study(layers(), (2, 6))
    study.check_sound()
    honest = PrivateGradient.sum

    def without_bias(self: PrivateGradient, features: Tensor, targets: Tensor, *more: Any) -> Any:
        result = honest(self, features, targets, *more)
        value = {name: total for name, total in result.bounded.value.items() if name != "3.bias"}
        return type(result)(type(result.bounded)(value, result.bounded.norm_bound), result.nonfinite)

    monkeypatch.setattr(PrivateGradient, "sum", without_bias)
    with pytest.raises(SelfCheckError, match=r'does not cover .* "3\.bias"'):
        study.train()
    assert not study.agrees()
