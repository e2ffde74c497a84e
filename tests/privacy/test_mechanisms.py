"""The only road out: the right noise on a public grid, paid for before it is drawn."""

from __future__ import annotations

import ast
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from looks_normal import looks_like_normal
from torch import Tensor

import sfumato
from sfumato.errors import BudgetExhaustedError, InputError, LostClientsError, SelfCheckError, SfumatoError
from sfumato.privacy import events
from sfumato.privacy.books import Cost
from sfumato.privacy.bounded import Bounded
from sfumato.privacy.budget import Budget, Relation, Unit
from sfumato.privacy.ledger import Charge, Ledger
from sfumato.privacy.mechanisms import SharedGaussian, gaussian, gaussian_counts, gaussian_each, grid_of, noise_std
from sfumato.privacy.randomness import SecureSource, SeededSource

ADD = Relation.ADD_OR_REMOVE_ONE
SIZE = 40_000


def charge(draws: int = 1) -> Charge:
    ledger = Ledger.in_memory()
    ledger.grant("a", Budget(1.0, 1e-5))
    cost = Cost(1.0, 1e-5, Unit.RECORD, ADD)
    event = events.to_json(events.repeated(events.gaussian(1.0), draws))
    return ledger.charge("a", purpose="test", event=event, cost=cost, draws=draws)


def zeros(size: int = SIZE, bound: float = 1.0) -> Bounded:
    return Bounded({"w": torch.zeros(size // 4), "b": torch.zeros(size - size // 4)}, bound)


def flat(value: object) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in value.values()])  # type: ignore[attr-defined]


def only_this_scale(noise: Tensor, std: float) -> bool:
    return looks_like_normal(noise, std) and not any(looks_like_normal(noise, wrong * std) for wrong in (2 / 3, 3 / 2))


@pytest.mark.parametrize("wrong", [2 / 3, 3 / 2])
def test_the_test_of_noise_has_power(wrong: float) -> None:
    right = SeededSource(1).normal(SIZE) * 2.5
    assert looks_like_normal(right, 2.5)
    assert not looks_like_normal(right * wrong, 2.5)
    assert not looks_like_normal((SeededSource(1).bernoulli(SIZE, 0.5) * 2.0 - 1) * 2.5, 2.5)


@pytest.mark.parametrize("relation", list(Relation))
@pytest.mark.parametrize("bound", [0.37, 1.0, 1000.0])
@pytest.mark.parametrize("multiplier", [0.5, 4.0])
def test_the_noise_has_the_accounted_scale_and_no_other(relation: Relation, bound: float, multiplier: float) -> None:
    sensitivity = {Relation.ADD_OR_REMOVE_ONE: bound, Relation.REPLACE_ONE: 2 * bound}[relation]
    released = gaussian(zeros(bound=bound), multiplier, relation=relation, charge=charge(), source=SecureSource())
    assert only_this_scale(flat(released.value), multiplier * sensitivity)
    assert released.noise_std == pytest.approx(multiplier * sensitivity, rel=1e-4)


def test_the_noise_is_never_less_than_accounted() -> None:
    for relation in Relation:
        value = zeros()
        assert noise_std(value, 1.3, relation) > 1.3 * value.sensitivity(relation)


def test_an_empty_sum_is_released_as_noise_alone() -> None:
    released = gaussian(zeros(), 2.0, relation=ADD, charge=charge(), source=SecureSource())
    assert released.value.keys() == {"w", "b"}
    assert only_this_scale(flat(released.value), 2.0)


def test_the_noise_is_added_to_the_sum_itself() -> None:
    sums = {"w": torch.linspace(-5, 5, SIZE, dtype=torch.float64)}
    released = gaussian(Bounded(sums, 1.0), 1.0, relation=ADD, charge=charge(), source=SecureSource())
    assert only_this_scale(released.value["w"] - sums["w"], 1.0)


def test_every_tensor_and_every_release_has_noise_of_its_own() -> None:
    paid, source, sums = charge(2), SeededSource(0), Bounded({"a": torch.zeros(50), "b": torch.zeros(50)}, 1.0)
    one = gaussian(sums, 1.0, relation=ADD, charge=paid, source=source)
    two = gaussian(sums, 1.0, relation=ADD, charge=paid, source=source)
    drawn = torch.cat([flat(one.value), flat(two.value)])
    assert drawn.unique().numel() == 200
    assert (one.draw, two.draw) == (0, 1)


def test_a_release_leaves_the_bounded_sum_as_it_was() -> None:
    sums = torch.ones(4, dtype=torch.float64)
    gaussian(Bounded({"w": sums}, 1.0), 1.0, relation=ADD, charge=charge(), source=SeededSource(0))
    assert sums.tolist() == [1.0] * 4


# Floating point: the low bits of what leaves must not depend on the records.

BOUNDS = st.floats(min_value=1e-6, max_value=1e6)


@settings(max_examples=40, deadline=None)
@given(
    bound=BOUNDS,
    parts=st.lists(st.floats(min_value=-1000, max_value=1000), min_size=1, max_size=20),
    multiplier=st.floats(min_value=0.1, max_value=100),
)
def test_every_released_coordinate_is_a_whole_multiple_of_the_public_grid(
    bound: float, parts: list[float], multiplier: float
) -> None:
    sums = Bounded({"w": torch.tensor(parts, dtype=torch.float64) * bound}, bound)
    released = gaussian(sums, multiplier, relation=ADD, charge=charge(), source=SeededSource(0))
    units = released.value["w"] / released.grid
    assert torch.equal(units, units.round())
    assert released.grid == grid_of(bound)


@settings(max_examples=40, deadline=None)
@given(BOUNDS)
def test_the_grid_is_a_power_of_two_far_below_the_bound(bound: float) -> None:
    grid = grid_of(bound)
    assert math.frexp(grid)[0] == 0.5
    assert bound * 2.0**-25 <= grid <= bound * 2.0**-24


@settings(max_examples=40, deadline=None)
@given(st.lists(st.floats(min_value=-1000, max_value=1000), min_size=1, max_size=20))
def test_the_same_noise_on_two_sums_differs_by_exactly_the_sums_on_the_grid(parts: list[float]) -> None:
    sums = torch.tensor(parts, dtype=torch.float64)
    release = [
        gaussian(Bounded({"w": s}, 1.0), 3.0, relation=ADD, charge=charge(), source=SeededSource(4)).value["w"]
        for s in (sums, torch.zeros_like(sums))
    ]
    grid = grid_of(1.0)
    assert torch.equal(release[0] - release[1], (sums / grid).round() * grid)


# Nothing leaves that is not paid for, and nothing is paid for that cannot leave.


class Watched:
    """A source that counts what is asked of it."""

    def __init__(self) -> None:
        self.asked = 0

    def add_normal(self, total: Tensor, std: float) -> None:
        self.asked += len(total)
        SeededSource(0).add_normal(total, std)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf, 1e30])
def test_a_broken_sum_is_refused_before_the_charge_is_touched(broken: float) -> None:
    paid, source = charge(), Watched()
    sums = Bounded({"fine": torch.zeros(3), "bad": torch.tensor([0.0, broken])}, 1.0)
    with pytest.raises(SelfCheckError, match='"bad" is not finite or far beyond'):
        gaussian(sums, 1.0, relation=ADD, charge=paid, source=source)  # type: ignore[arg-type]
    assert paid.position == 0
    assert source.asked == 0


def test_an_exhausted_charge_draws_no_noise() -> None:
    paid, source = charge(1), Watched()
    gaussian(zeros(8), 1.0, relation=ADD, charge=paid, source=source)  # type: ignore[arg-type]
    assert source.asked == 8
    with pytest.raises(BudgetExhaustedError):
        gaussian(zeros(8), 1.0, relation=ADD, charge=paid, source=source)  # type: ignore[arg-type]
    assert source.asked == 8


@pytest.mark.parametrize("bound", [1e-101, 1e101])
def test_a_bound_without_a_grid_in_float64_is_refused_before_the_charge(bound: float) -> None:
    paid = charge()
    with pytest.raises(InputError, match="use a clip norm between 1e-100 and 1e"):
        gaussian(zeros(4, bound), 1.0, relation=ADD, charge=paid, source=SeededSource(0))
    assert paid.position == 0


@pytest.mark.parametrize("bound", [1e-100, 1e-30, 1e30, 1e100])
def test_extreme_bounds_keep_the_scale_of_the_noise_and_the_grid(bound: float) -> None:
    sums = Bounded({"w": torch.zeros(SIZE, dtype=torch.float64)}, bound)
    released = gaussian(sums, 2.0**20, relation=ADD, charge=charge(), source=SecureSource())
    units = released.value["w"] / grid_of(bound)
    assert torch.equal(units, units.round())
    assert only_this_scale(units, released.noise_std / grid_of(bound))


@pytest.mark.parametrize("multiplier", [0, -1, math.nan, math.inf])
def test_a_noise_multiplier_that_is_no_noise_is_refused_before_the_charge(multiplier: float) -> None:
    paid = charge()
    with pytest.raises(InputError, match="noise_multiplier"):
        gaussian(zeros(4), multiplier, relation=ADD, charge=paid, source=SeededSource(0))
    with pytest.raises(InputError, match="noise_multiplier"):
        SharedGaussian(1.0, 4, multiplier, relation=ADD, clients=2, tolerate=0, charge=paid)
    assert paid.position == 0


def test_gaussian_each_takes_one_draw_and_gives_each_part_its_own_noise() -> None:
    paid = charge(5)
    parts = {"north": zeros(bound=1.0), "south": zeros(bound=8.0)}
    released = gaussian_each(parts, 1.5, relation=ADD, charge=paid, source=SecureSource())
    assert paid.position == 1
    assert {name: part.draw for name, part in released.items()} == {"north": 0, "south": 0}
    north, south = flat(released["north"].value), flat(released["south"].value)
    assert only_this_scale(north, 1.5)
    assert only_this_scale(south, 12.0)
    assert abs(float((north * south).mean())) < 6 * 1.5 * 12 / math.sqrt(SIZE)


def test_gaussian_each_releases_nothing_if_one_part_is_broken() -> None:
    paid, source = charge(), Watched()
    parts = {"a": zeros(4), "b": Bounded({"w": torch.tensor([math.nan])}, 1.0)}
    with pytest.raises(SelfCheckError):
        gaussian_each(parts, 1.0, relation=ADD, charge=paid, source=source)  # type: ignore[arg-type]
    assert (paid.position, source.asked) == (0, 0)


# Noise drawn by the clients.


def shared(clients: int, tolerate: int, size: int = SIZE) -> SharedGaussian:
    return SharedGaussian(1.0, size, 2.0, relation=ADD, clients=clients, tolerate=tolerate, charge=charge())


@pytest.mark.parametrize("clients", [1, 3, 10])
def test_the_shares_add_up_to_the_full_noise(clients: int) -> None:
    opened = shared(clients, 0)
    released = opened.combine([opened.share(str(i), zeros(), SecureSource()) for i in range(clients)])
    assert only_this_scale(flat(released.value), 2.0)
    assert released.noise_std == pytest.approx(2.0, rel=1e-4)
    units = flat(released.value) / released.grid
    assert torch.equal(units, units.round())


@pytest.mark.parametrize("lost", [0, 1, 3])
def test_the_noise_stays_whole_when_tolerated_clients_are_lost(lost: int) -> None:
    opened = shared(8, 3)
    released = opened.combine([opened.share(str(i), zeros(), SecureSource()) for i in range(8 - lost)])
    assert released.noise_std >= 2.0
    assert released.noise_std == pytest.approx(2.0 * math.sqrt((8 - lost) / 5), rel=1e-4)
    assert only_this_scale(flat(released.value), released.noise_std)


def test_too_many_lost_clients_stop_the_round_and_its_charge_stays_spent() -> None:
    paid = charge(2)
    opened = SharedGaussian(1.0, 8, 2.0, relation=ADD, clients=5, tolerate=2, charge=paid)
    shares = [opened.share(str(i), zeros(8), SeededSource(i)) for i in range(2)]
    with pytest.raises(LostClientsError, match="Only 2 of 5 clients answered and the noise needs 3"):
        opened.combine(shares)
    with pytest.raises(LostClientsError):
        opened.combine([])
    assert paid.position == 1


def test_one_share_carries_its_part_of_the_noise() -> None:
    opened = shared(8, 4)
    share = opened.share("a", zeros(), SecureSource())
    assert only_this_scale(flat(share.units) * grid_of(1.0), 2.0 / math.sqrt(4))


def test_the_shares_add_up_to_the_sum_of_the_clients() -> None:
    opened = SharedGaussian(1.0, 2, 1e-6, relation=ADD, clients=3, tolerate=0, charge=charge())
    parts = [Bounded({"w": torch.tensor([float(i), -1.0])}, 1.0) for i in range(3)]
    total = opened.combine([opened.share(str(i), part, SeededSource(i)) for i, part in enumerate(parts)])
    assert total.value["w"].tolist() == pytest.approx([3.0, -3.0], abs=1e-4)


def test_a_share_is_counted_once_and_only_in_its_own_round() -> None:
    opened, other = shared(2, 0, 8), shared(2, 0, 8)
    mine, foreign = opened.share("a", zeros(8), SeededSource(0)), other.share("b", zeros(8), SeededSource(1))
    for shares in ([mine, mine], [mine, foreign]):
        with pytest.raises(SfumatoError, match="another round or arrived twice"):
            opened.combine(shares)


def test_a_round_is_combined_once() -> None:
    opened = shared(3, 1, 8)
    shares = [opened.share(str(i), zeros(8), SeededSource(i)) for i in range(3)]
    opened.combine(shares)
    with pytest.raises(SfumatoError, match="combined before"):
        opened.combine(shares[:2])


def test_more_shares_than_clients_are_refused() -> None:
    opened = shared(2, 0, 8)
    with pytest.raises(SfumatoError, match="3 shares came from 2 clients"):
        opened.combine([opened.share(str(i), zeros(8), SeededSource(i)) for i in range(3)])


def test_a_client_with_a_larger_bound_or_another_size_is_refused() -> None:
    opened = shared(2, 0, 8)
    with pytest.raises(SfumatoError, match="clip to the latter"):
        opened.share("c", zeros(8, bound=1.5), SeededSource(0))
    with pytest.raises(SfumatoError, match="has 9 coordinates, the round 8"):
        opened.share("d", zeros(9), SeededSource(0))


@pytest.mark.parametrize(("clients", "tolerate"), [(2, 2), (2, 5), (0, 0)])
def test_somebody_must_be_left_to_add_noise(clients: int, tolerate: int) -> None:
    paid = charge()
    with pytest.raises(InputError, match="clients minus tolerated losses"):
        SharedGaussian(1.0, 4, 1.0, relation=ADD, clients=clients, tolerate=tolerate, charge=paid)
    assert paid.position == 0


# No other file draws noise.

DRAWING = {
    "randn", "randn_like", "rand", "rand_like", "normal_", "standard_normal", "uniform_", "exponential_",
    "cauchy_", "geometric_", "log_normal_", "bernoulli_", "Normal", "Laplace", "laplace", "default_rng",
    "RandomState", "SystemRandom", "poisson",
}  # fmt: skip
MODULES = ("random", "numpy.random", "torch.distributions", "scipy.stats")


def noise_calls(text: str, *, normal_allowed: bool = False) -> list[str]:
    """Return every name in a source text that draws noise, or imports something that does."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name in MODULES]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            full = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
            found += [name for name in full if name in MODULES]
            found += [alias.name for alias in node.names if alias.name in {*DRAWING, "normal"}]
        elif isinstance(node, ast.Attribute):
            if node.attr in DRAWING or (node.attr == "normal" and not normal_allowed):
                found.append(node.attr)
            elif ast.unparse(node) in {"np.random", "numpy.random", "torch.distributions"}:
                found.append(ast.unparse(node))
    return found


@pytest.mark.parametrize(
    "line",
    [
        "import torch\nx = torch.randn(3)",
        "import torch\nx = torch.normal(0.0, 1.0, (3,))",
        "x.normal_()",
        "import numpy as np\nx = np.random.default_rng(0)",
        "import random",
        "from random import gauss",
        "from numpy import random",
        "from torch import randn",
        "from torch.distributions import Normal",
        "noise = source.normal(3)",
    ],
)
def test_the_scan_finds_noise(line: str) -> None:
    assert noise_calls(line)


def test_no_file_but_the_mechanisms_draws_noise() -> None:
    root = Path(sfumato.__file__).parent
    files = sorted(root.rglob("*.py"))
    mechanisms, randomness = root / "privacy" / "mechanisms.py", root / "privacy" / "randomness.py"
    # Deals records out to simulated clients by a seed: nothing there is released, as its imports show.
    partitions = root / "data" / "partitions.py"
    assert {mechanisms, randomness, partitions} <= set(files)
    assert "sfumato.privacy" not in partitions.read_text(encoding="utf-8")
    found = {
        str(path.relative_to(root)): calls
        for path in files
        if path not in (randomness, partitions)
        and (calls := noise_calls(path.read_text(encoding="utf-8"), normal_allowed=path == mechanisms))
    }
    assert not found


def test_a_client_that_shares_twice_is_refused() -> None:
    opened = SharedGaussian(1.0, 8, 1.0, relation=ADD, clients=3, tolerate=1, charge=charge())
    opened.share("a", zeros(8), SeededSource(0))
    with pytest.raises(SfumatoError, match='Client "a" has shared already'):
        opened.share("a", zeros(8), SeededSource(1))


def test_a_noise_multiplier_beyond_exact_floats_is_refused() -> None:
    with pytest.raises(InputError, match="such a release says nothing"):
        gaussian(zeros(8), 1e8, relation=ADD, charge=charge(), source=SeededSource(0))


# Counts: several tables of whole numbers over the same units.


def counted(tables: dict[str, Tensor], bounds: dict[str, float] | None = None) -> dict[str, Bounded]:
    return {name: Bounded({name: table}, (bounds or {}).get(name, 1.0)) for name, table in tables.items()}


@pytest.mark.parametrize("relation", list(Relation))
@pytest.mark.parametrize("multiplier", [100.0, 1000.0])
def test_counts_carry_the_noise_of_their_share_and_no_other(relation: Relation, multiplier: float) -> None:
    parts = counted({name: torch.full((SIZE,), 70, dtype=torch.int64) for name in "ab"}, {"a": 1.0, "b": 64.0})
    released = gaussian_counts(
        parts, multiplier, shares={"a": 3.0, "b": 1.0}, relation=relation, charge=charge(), source=SecureSource()
    )
    moved = math.sqrt(2) if relation is Relation.REPLACE_ONE else 1.0
    for name, std in {"a": multiplier * moved / math.sqrt(0.75), "b": multiplier * 64 * moved * 2}.items():
        assert released[name].value[name].dtype == torch.int64
        assert released[name].grid == 1.0
        assert released[name].noise_std == pytest.approx(std, rel=1e-9)
        assert only_this_scale(released[name].value[name].double() - 70, std)


@settings(max_examples=40, deadline=None)
@given(
    shares=st.lists(st.floats(min_value=1e-3, max_value=1e3), min_size=1, max_size=6),
    multiplier=st.floats(min_value=0.01, max_value=1e4),
)
def test_all_counts_together_cost_one_gaussian(shares: list[float], multiplier: float) -> None:
    bounds = {str(place): 2.0**place for place in range(len(shares))}
    parts = counted({name: torch.zeros(3, dtype=torch.int64) for name in bounds}, bounds)
    released = gaussian_counts(
        parts, multiplier, shares=dict(zip(bounds, shares, strict=True)), relation=ADD, charge=charge(),
        source=SeededSource(0),
    )  # fmt: skip
    moved = math.fsum((bounds[name] / part.noise_std) ** 2 for name, part in released.items())
    assert moved <= multiplier**-2
    assert moved == pytest.approx(multiplier**-2, rel=1e-9)


def test_small_noise_on_counts_is_the_gaussian_rounded_to_whole_numbers() -> None:
    # With a std of 0.7 the chance of each whole number is that of its interval, not that of a point of the curve.
    parts = counted({"a": torch.full((SIZE,), 9, dtype=torch.int64)})
    released = gaussian_counts(parts, 0.7, shares={"a": 1}, relation=ADD, charge=charge(), source=SecureSource())
    noise = (released["a"].value["a"] - 9).double()
    for number in range(-2, 3):
        ends = torch.tensor([number - 0.5, number + 0.5], dtype=torch.float64) / 0.7
        expected = float(torch.special.ndtr(ends).diff())
        assert abs(float((noise == number).double().mean()) - expected) < 5.5 * math.sqrt(expected / SIZE)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(min_value=0, max_value=2**49), min_size=1, max_size=20), st.floats(0.1, 1e9))
def test_the_same_noise_on_two_counts_differs_by_exactly_the_counts(counts: list[int], multiplier: float) -> None:
    table = torch.tensor(counts)
    noisy = [
        gaussian_counts(
            counted({"a": one}), multiplier, shares={"a": 1}, relation=ADD, charge=charge(), source=SeededSource(4)
        )["a"].value["a"]
        for one in (table, torch.zeros_like(table))
    ]
    # Where the noise is half a whole number up to the last bit, it may round to the other side.
    assert int((noisy[0] - noisy[1] - table).abs().max()) <= 1


@pytest.mark.parametrize(
    "broken",
    [torch.zeros(3), torch.tensor([1, -1]), torch.tensor([0, 2**51])],
    ids=["not whole", "negative", "too large"],
)
def test_a_broken_count_is_refused_before_the_charge_is_touched(broken: Tensor) -> None:
    paid, source = charge(), Watched()
    parts = counted({"fine": torch.zeros(3, dtype=torch.int64), "bad": broken})
    with pytest.raises(SelfCheckError, match="bad"):
        gaussian_counts(parts, 1.0, shares={"fine": 1, "bad": 1}, relation=ADD, charge=paid, source=source)  # type: ignore[arg-type]
    assert (paid.position, source.asked) == (0, 0)


@pytest.mark.parametrize(
    ("multiplier", "shares", "words"),
    [
        (1e15, {"a": 1.0}, "too large for counts"),
        (math.nan, {"a": 1.0}, "noise_multiplier"),
        (0.0, {"a": 1.0}, "noise_multiplier"),
        (1.0, {"a": 0.0}, 'share of "a"'),
        (1.0, {"a": math.nan}, 'share of "a"'),
        (1.0, {"b": 1.0}, "give each part one share"),
        (1.0, {}, "give each part one share"),
    ],
)
def test_counts_without_proper_noise_are_refused_before_the_charge(
    multiplier: float, shares: dict[str, float], words: str
) -> None:
    paid = charge()
    with pytest.raises(InputError, match=words):
        gaussian_counts(
            counted({"a": torch.zeros(3, dtype=torch.int64)}), multiplier, shares=shares, relation=ADD, charge=paid,
            source=SeededSource(0),
        )  # fmt: skip
    assert paid.position == 0


def test_counts_take_one_draw_and_none_without_a_charge() -> None:
    paid, source = charge(1), Watched()
    parts = counted({"a": torch.zeros(3, dtype=torch.int64), "b": torch.zeros(2, 2, dtype=torch.int64)})
    both = {"a": 1.0, "b": 1.0}
    gaussian_counts(parts, 1.0, shares=both, relation=ADD, charge=paid, source=source)  # type: ignore[arg-type]
    assert (paid.position, source.asked) == (1, 7)
    with pytest.raises(BudgetExhaustedError):
        gaussian_counts(parts, 1.0, shares=both, relation=ADD, charge=paid, source=source)  # type: ignore[arg-type]
    assert source.asked == 7
