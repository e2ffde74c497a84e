"""The choice of a strategy: made once for each kind of layer, only among those that fit, and never a matter of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import final

import pytest
import torch
from gradient_checks import DOUBLE, Case, check_agreement, normals, with_values
from torch import Tensor, nn
from typing_extensions import override

from sfumato.gradients import strategies
from sfumato.gradients.clipping import Clipping
from sfumato.gradients.compute import Compute
from sfumato.gradients.private import PrivateGradient
from sfumato.gradients.strategies import Choices
from sfumato.gradients.terms.held import Held
from sfumato.gradients.terms.term import Strategy, Term


@final
class Pretended(Term):
    """A term whose strategies take as long as they say."""

    def __init__(self, seconds: Mapping[str, float], held: Mapping[str, int], work: int = 10**9) -> None:
        self.name, self.records, self.device, self.work = "w", 2, torch.device("cpu"), work
        self.signature = ("pretended", *seconds.items())
        self.seconds, self.held = seconds, held
        self.tried: list[str] = []

    @override
    def strategies(self) -> Mapping[str, Strategy]:
        return {name: Strategy(lambda name=name: self._make(name), self.held[name]) for name in self.seconds}

    def _make(self, name: str) -> Held:
        self.tried.append(name)
        clock.now += self.seconds[name]
        return Held(torch.ones(2, 3, dtype=DOUBLE), lambda row: row)

    @override
    def per_record(self) -> Tensor:
        return torch.ones(2, 3)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


clock = Clock()


@pytest.fixture(autouse=True)
def _our_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategies.time, "perf_counter", clock)


def test_the_fastest_is_chosen_and_remembered() -> None:
    choices = Choices()
    term = Pretended({"first": 2.0, "fast": 1.0, "slow": 3.0}, {"first": 0, "fast": 10, "slow": 0})
    assert choices.name(term, math.inf, timed=True) == "fast"
    tried = len(term.tried)
    assert set(term.tried) == {"first", "fast", "slow"}
    assert choices.name(term, math.inf, timed=True) == choices.name(term, 0, timed=False) == "fast"
    assert len(term.tried) == tried


def test_of_nearly_equal_ones_the_one_that_holds_least_is_chosen() -> None:
    term = Pretended({"large": 1.0, "small": 1.05, "none": 1.3}, {"large": 100, "small": 10, "none": 0})
    assert Choices().name(term, math.inf, timed=True) == "small"


def test_what_does_not_fit_is_not_tried() -> None:
    term = Pretended({"large": 1.0, "small": 5.0}, {"large": 100, "small": 10})
    assert Choices().name(term, 50, timed=True) == "small"
    assert set(term.tried) == {"small"}


def test_where_nothing_fits_the_fastest_is_chosen_all_the_same() -> None:
    term = Pretended({"large": 1.0, "small": 5.0}, {"large": 100, "small": 10})
    assert Choices().name(term, 1, timed=True) == "large"


@pytest.mark.parametrize(("timed", "work"), [(False, 10**9), (True, 10)])
def test_where_timing_does_not_pay_the_first_is_taken_and_not_remembered(timed: bool, work: int) -> None:
    choices = Choices()
    seconds, held = {"first": 2.0, "fast": 1.0}, {"first": 0, "fast": 0}
    term = Pretended(seconds, held, work)
    assert choices.name(term, math.inf, timed=timed) == "first"
    assert term.tried == []
    assert choices.name(Pretended(seconds, held), math.inf, timed=True) == "fast"


@pytest.mark.parametrize("layer", ["linear", "convolution"])
@pytest.mark.parametrize("place", range(7))
def test_whatever_is_chosen_the_sum_is_the_same(layer: str, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    class Always(Choices):
        @override
        def name(self, term: Term, room: float, *, timed: bool) -> str:
            ways = list(term.strategies())
            return ways[place % len(ways)]

    monkeypatch.setattr("sfumato.gradients.private.CHOICES", Always())
    if layer == "linear":
        model, shape = nn.Linear(6, 5), (4, 6)
    else:
        model, shape = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.Tanh(), nn.Conv2d(6, 4, 2)), (3, 3, 3)
    case = Case(with_values(model, 0), normals(1, 11, *shape), normals(2, 11))
    case.features[3].fill_(math.nan)
    check_agreement(case.fast(Clipping(0.1)), case.loop(Clipping(0.1)), 1e-10)


def test_the_first_few_records_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    class Noted(Choices):
        @override
        def name(self, term: Term, room: float, *, timed: bool) -> str:
            asked.append(timed)
            return next(iter(term.strategies()))

    monkeypatch.setattr("sfumato.gradients.private.CHOICES", Noted())
    case = Case(with_values(nn.Linear(3, 2, bias=False), 0), normals(1, 20, 3), normals(2, 20))
    case.fast(Clipping(1.0))
    assert asked[0] is False
    assert all(asked[1:])
    assert len(asked) > 1


def test_a_microbatch_keeps_to_the_memory_that_it_was_given() -> None:
    gradient = PrivateGradient(
        nn.Linear(50, 50), lambda out, _: out.sum(), Clipping(1.0), compute=Compute(memory_mb=0.01)
    )
    assert gradient.microbatch(100, 100) == 1  # the first few tell what a record takes
    gradient.sum(torch.ones(100, 50), torch.zeros(100))
    taken = gradient.microbatch(100, 100)
    assert 1 <= taken < 100
    assert gradient.memory_limit(100) == 1e4
    tiny = PrivateGradient(nn.Linear(50, 50), lambda out, _: out.sum(), Clipping(1.0), compute=Compute(memory_mb=1e-9))
    tiny.sum(torch.ones(10, 50), torch.zeros(10))
    assert tiny.microbatch(10, 10) == 1
