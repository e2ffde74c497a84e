"""The sources: the right distributions, out to the tails, and never the same noise twice."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from looks_normal import looks_like_normal
from torch import Tensor

from sfumato.errors import InputError
from sfumato.privacy import randomness
from sfumato.privacy.randomness import RandomSource, SecureSource, SeededSource, keyed_source

BLOCK = 2 * randomness._PAIRS


@pytest.fixture(params=[SecureSource, lambda: SeededSource(5)], ids=["secure", "seeded"])
def source(request: pytest.FixtureRequest) -> RandomSource:
    return request.param()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_normal_draws_pass_kolmogorov_smirnov_at_scale_one_only(source: RandomSource, dtype: torch.dtype) -> None:
    draws = source.normal(200_001, dtype)
    assert draws.dtype is dtype
    assert draws.shape == (200_001,)
    assert looks_like_normal(draws, 1.0)
    for wrong in (2 / 3, 1.5, 0.97, 1.03):
        assert not looks_like_normal(draws, wrong)


def test_normal_draws_have_the_moments_of_a_gaussian(source: RandomSource) -> None:
    n = 400_000
    draws = source.normal(n)
    for power, mean, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs(float((draws**power).mean()) - mean) < 6 * math.sqrt(variance / n)


def test_the_two_halves_of_a_pair_are_uncorrelated(source: RandomSource) -> None:
    n = 100_000
    draws = source.normal(n)
    left, right = draws[: n // 2], draws[n // 2 :]
    for a, b in [(left, right), (left.square() - 1, right.square() - 1), (draws[:-1], draws[1:])]:
        assert abs(float((a * b).mean())) < 6 * 2 / math.sqrt(len(a))


def normal_from(words: list[int], monkeypatch: pytest.MonkeyPatch) -> Tensor:
    source = SeededSource(0)
    monkeypatch.setattr(source, "_next", lambda count: torch.tensor(words, dtype=torch.int64))
    return source.normal(len(words))


@pytest.mark.parametrize("word", [-(2**63), -1, 0, 1, 2**63 - 1])
def test_no_word_makes_a_draw_that_is_not_finite(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for angle in (-(2**63), 0, 2**63 - 1):
        assert bool(torch.isfinite(normal_from([word, angle], monkeypatch)).all())


@pytest.mark.parametrize("word", [-1, 0])
def test_the_tail_ends_beyond_nine_standard_deviations(word: int, monkeypatch: pytest.MonkeyPatch) -> None:
    furthest = float(normal_from([word, 0], monkeypatch)[0])
    assert furthest == pytest.approx(math.sqrt(-2 * math.log(2.0**-64)), rel=1e-12)
    assert furthest > 9.4


@settings(max_examples=30, deadline=None)
@given(st.integers(min_value=-(2**63), max_value=2**63 - 1))
def test_a_word_and_its_mirror_make_the_same_radius(word: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        assert torch.equal(normal_from([word, 0], patch), normal_from([-word - 1, 0], patch))


@pytest.mark.parametrize("count", [0, 1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 7])
def test_any_number_of_draws_can_be_asked_for(count: int) -> None:
    source = SeededSource(1)
    assert source.normal(count).shape == (count,)
    assert source.words(count).shape == (count,)
    assert bool(torch.isfinite(source.normal(count)).all())


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(min_value=0, max_value=1000), max_size=8))
def test_a_seeded_stream_of_words_does_not_depend_on_how_it_is_cut(sizes: list[int]) -> None:
    whole = SeededSource(9).words(sum(sizes))
    cut = SeededSource(9)
    assert torch.equal(torch.cat([torch.empty(0, dtype=torch.int64), *map(cut.words, sizes)]), whole)


def test_a_seeded_stream_of_normals_goes_on_where_a_block_ended() -> None:
    whole = SeededSource(9).normal(2 * BLOCK + 10)
    cut = SeededSource(9)
    assert torch.equal(torch.cat([cut.normal(BLOCK), cut.normal(BLOCK), cut.normal(10)]), whole)


@pytest.mark.parametrize("count", [0, 1, 2, 7, BLOCK - 1, BLOCK + 1, 2 * BLOCK + 3])
def test_noise_that_is_added_is_the_same_stream_times_its_scale(count: int) -> None:
    total = torch.arange(count, dtype=torch.float64)
    SeededSource(9).add_normal(total, 3.5)
    torch.testing.assert_close(total - torch.arange(count), 3.5 * SeededSource(9).normal(count), rtol=0, atol=1e-9)


def test_single_precision_is_the_rounded_double_stream() -> None:
    wide, narrow = SeededSource(3).normal(1001), SeededSource(3).normal(1001, torch.float32)
    assert torch.equal(wide.to(torch.float32), narrow)


def test_the_same_seed_repeats_and_another_does_not() -> None:
    assert torch.equal(SeededSource(7).normal(50), SeededSource(7).normal(50))
    assert not torch.equal(SeededSource(7).normal(50), SeededSource(8).normal(50))


def test_no_two_secure_sources_draw_the_same() -> None:
    assert not torch.equal(SecureSource().words(4), SecureSource().words(4))


def test_a_stream_does_not_repeat_itself(source: RandomSource) -> None:
    assert source.words(3 * BLOCK).unique().numel() == 3 * BLOCK


def test_only_the_secure_source_says_that_it_is_secure() -> None:
    assert SecureSource().is_secure
    assert not SeededSource(0).is_secure


@pytest.mark.parametrize("seed", [-1, 1.5, math.nan, True, "0"])
def test_a_seed_must_be_a_count(seed: object) -> None:
    with pytest.raises(InputError, match="seed"):
        SeededSource(seed)  # type: ignore[arg-type]


def test_a_keyed_stream_can_be_drawn_again_and_differs_by_key_and_index() -> None:
    key = [-1, 2, -(2**63), 2**63 - 1]
    draw = keyed_source(key, 4).words(8)
    assert torch.equal(draw, keyed_source(key, 4).words(8))
    assert not torch.equal(draw, keyed_source(key, 5).words(8))
    assert not torch.equal(draw, keyed_source([*key[:3], 0], 4).words(8))


# A source belongs to one process and has no copies.


@pytest.mark.parametrize("away", [pickle.dumps, copy.copy, copy.deepcopy])
def test_a_source_cannot_be_pickled_or_copied(source: RandomSource, away: object) -> None:
    with pytest.raises(TypeError, match="two copies would draw the same noise"):
        away(source)  # type: ignore[operator]


FORK = """
import os, sys
from sfumato.errors import SfumatoError
from sfumato.privacy.randomness import SecureSource, SeededSource

for source in (SecureSource(), SeededSource(1)):
    flips = (lambda n: source.bernoulli(n, 0.5), lambda n: source.chosen(10**5 * n, 0.5))
    for draw in (source.words, source.normal, source.permutation, *flips):
        child = os.fork()
        if child == 0:
            try:
                draw(3)
            except SfumatoError as error:
                os._exit(0 if "forked" in str(error) else 2)
            os._exit(1)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0:
            sys.exit("a forked child drew from its parent's source")
        draw(3)
print("all refused")
"""


def test_a_forked_child_is_refused_and_the_parent_goes_on() -> None:
    done = subprocess.run([sys.executable, "-c", FORK], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "all refused", done.stderr


# Coin flips and orders.


def rate_fits(hits: int, n: int, rate: float) -> bool:
    return abs(hits - n * rate) < 6 * math.sqrt(n * rate * (1 - rate)) + 1e-9


@pytest.mark.parametrize("rate", [0.004, 0.1, 0.5, 0.97])
def test_coin_flips_come_at_the_rate_and_at_no_other(source: RandomSource, rate: float) -> None:
    n = 300_000
    hits = int(source.bernoulli(n, rate).sum())
    assert rate_fits(hits, n, rate)
    for wrong in (rate * 2 / 3, min(rate * 1.5, 0.999)):
        assert not rate_fits(hits, n, wrong)


def test_a_rate_of_zero_never_hits_and_of_one_always(source: RandomSource) -> None:
    assert not bool(source.bernoulli(BLOCK, 0.0).any())
    assert bool(source.bernoulli(BLOCK, 1.0).all())


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan, math.inf])
def test_a_rate_that_is_no_probability_is_refused(rate: float) -> None:
    with pytest.raises(InputError, match="rate"):
        SeededSource(0).bernoulli(3, rate)


def test_the_stated_rate_is_never_exceeded_even_in_the_last_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    source = SeededSource(0)
    # Of the 2**53 values of the coin exactly 0, 1 and 2 are below 3 * 2**-53, and 1/2 of a step adds none.
    monkeypatch.setattr(source, "_next", lambda count: torch.tensor([0, 1, 2, 3, -1]) << 11)
    assert source.bernoulli(5, 3 * 2.0**-53).tolist() == [True, True, True, False, False]
    assert source.bernoulli(5, 2.5 * 2.0**-53).tolist() == [True, True, False, False, False]


SIDES = st.integers(min_value=0, max_value=2**53)


@settings(max_examples=200, deadline=None)
@given(
    sides=SIDES, seed=st.integers(min_value=0, max_value=99), near=st.lists(st.integers(-2, 2), min_size=1, max_size=40)
)
def test_the_chosen_are_those_whose_coin_of_53_bits_is_below_the_threshold(
    sides: int, seed: int, near: list[int]
) -> None:
    first, rest = divmod(sides, 2**45)
    stream = SeededSource(seed)
    # Coins on both sides of the threshold's first byte, and just beside the rest of it where that byte is met.
    heads = [min(255, max(0, first + step)) for step in near]
    tails = [rest + step if 0 <= rest + step < 2**45 else 0 for step in near]
    tails = [tail + (word << 45) for tail, word in zip(tails, stream.words(len(near)).tolist(), strict=True)]
    open_tails = [tail for head, tail in zip(heads, tails, strict=True) if head == first]
    served = [
        torch.tensor([*heads, *[0] * (-len(heads) % 8)], dtype=torch.uint8).view(torch.int64),
        torch.tensor([((tail + 2**63) % 2**64) - 2**63 for tail in open_tails], dtype=torch.int64),
    ]
    coins = [head * 2**45 + tail % 2**45 for head, tail in zip(heads, tails, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "_next", lambda count: served.pop(0)[:count])
        patch.setattr(randomness, "_FEW", -1)
        chosen = stream.chosen(len(near), sides / 2**53)
    assert chosen.dtype is torch.int64
    assert chosen.tolist() == [unit for unit, coin in enumerate(coins) if coin < sides]


@pytest.mark.parametrize("rate", [0.0009, 0.004, 0.1, 0.5, 0.97])
def test_units_are_chosen_at_the_rate_and_at_no_other(source: RandomSource, rate: float) -> None:
    n = 16 * randomness._PAIRS + 300_001  # more than a block
    hits = len(source.chosen(n, rate))
    assert rate_fits(hits, n, rate)
    for wrong in (rate * 2 / 3, min(rate * 1.5, 0.999)):
        assert not rate_fits(hits, n, wrong)


@pytest.mark.parametrize("few", [-1, randomness._FEW])
def test_every_unit_is_chosen_at_the_same_rate_and_independently(
    source: RandomSource, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(randomness, "_FEW", few)
    n, draws, rate = 200, 8_000, 0.3  # 76.8 / 256: units with the byte 76 are undecided
    joined = torch.zeros(draws, n, dtype=torch.bool)
    for draw in joined:
        draw[source.chosen(n, rate)] = True
    assert all(rate_fits(hits, draws, rate) for hits in joined.sum(0).tolist())

    def both(hits: int, pairs: int) -> bool:
        # Pairs that share a unit make the count of pairs vary a fifth more than independent ones do.
        return abs(hits - pairs * rate**2) < 8 * rate * math.sqrt(pairs)

    for apart in (1, 7, 8, 9):
        assert both(int((joined[:, apart:] & joined[:, :-apart]).sum()), draws * (n - apart))
    assert both(int((joined[1:] & joined[:-1]).sum()), (draws - 1) * n)


@pytest.mark.parametrize(
    "count", [0, 1, 7, 16_384, 16_385, 16_393, BLOCK, 16 * randomness._PAIRS, 16 * randomness._PAIRS + 9]
)
def test_the_chosen_are_ascending_and_among_the_units(source: RandomSource, count: int) -> None:
    everybody = source.chosen(count, 1.0)
    assert torch.equal(everybody, torch.arange(count))
    assert source.chosen(count, 0.0).tolist() == []
    some = source.chosen(count, 0.5)
    assert torch.equal(some, some.unique())
    assert all(0 <= unit < count for unit in some[[0, -1]].tolist()) if len(some) else count < 64


def test_a_seed_chooses_the_same_of_few_units_in_one_call_as_in_several() -> None:
    whole, cut = SeededSource(3).chosen(16_384, 0.2), SeededSource(3)
    assert torch.equal(torch.cat([cut.chosen(6_000, 0.2), cut.chosen(10_384, 0.2) + 6_000]), whole)


@pytest.mark.parametrize("rate", [-0.1, 1.1, math.nan, math.inf])
def test_a_rate_of_choice_that_is_no_probability_is_refused(rate: float) -> None:
    for count in (0, 3, 20_000):
        with pytest.raises(InputError, match="rate"):
            SeededSource(0).chosen(count, rate)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(min_value=0, max_value=500), seed=st.integers(min_value=0, max_value=99))
def test_a_permutation_holds_every_index_once(count: int, seed: int) -> None:
    order = SeededSource(seed).permutation(count)
    assert order.sort().values.tolist() == list(range(count))


def test_all_orders_of_four_are_equally_likely(source: RandomSource) -> None:
    n = 12_000
    seen: dict[tuple[int, ...], int] = {}
    for _ in range(n):
        order = tuple(source.permutation(4).tolist())
        seen[order] = seen.get(order, 0) + 1
    assert len(seen) == 24
    assert all(rate_fits(hits, n, 1 / 24) for hits in seen.values())
