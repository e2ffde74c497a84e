"""Metrics over the clients of a federation: every client counts the same, and none moves the release by more than its bound."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sfumato as sf
from sfumato.errors import DivergedError, InputError, PlanError
from sfumato.learning import evaluation
from sfumato.learning.client_evaluation import client_part
from sfumato.learning.evaluation import Evaluation, evaluate
from sfumato.learning.metrics import NORM_BOUNDS, SHARES, UNIT_BOUNDS, VOTES, Estimate, Layout, measure

BUDGET = sf.Budget(1.0, 1e-4, unit=sf.Unit.CLIENT)
LAYOUT = Layout(3, 10, math.log(3) + 3)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "calibrate", _calibrate)


_calibrate = functools.cache(evaluation.calibrate)


def client(seed: int, most: int = 30) -> sf.Records:
    """Return a client for whose records the scores are right to a degree of its own; its features are the scores."""
    generator = torch.Generator().manual_seed(seed)
    count = int(torch.randint(1, most + 1, (), generator=generator))
    scores = torch.randn(count, 3, generator=generator) + torch.randn(3, generator=generator)
    likely = scores * 3 * torch.rand((), generator=generator)
    targets = torch.multinomial(likely.softmax(1), 1, generator=generator)[:, 0]
    return sf.Records.from_arrays(2 * scores, targets)


def federation(count: int, seed: int = 0) -> dict[str, sf.Records]:
    return {f"client-{index}": client(1000 * seed + index) for index in range(count)}


def over(clients: Mapping[str, sf.Records], budget: sf.Budget | None = None, **more: object) -> Evaluation:
    return evaluate(nn.Identity(), clients, budget, **more)  # type: ignore[arg-type]


@pytest.fixture
def releases(monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, sf.Bounded], dict[str, sf.Released]]]:
    """Return a list to which every release is added: what went in, and what came out."""
    seen: list[tuple[dict[str, sf.Bounded], dict[str, sf.Released]]] = []
    true_release = evaluation.gaussian_counts

    def watch(parts: dict[str, sf.Bounded], *args: object, **more: object) -> object:
        seen.append((parts, true_release(parts, *args, **more)))  # type: ignore[arg-type]
        return seen[-1][1]

    monkeypatch.setattr(evaluation, "gaussian_counts", watch)
    return seen


# What one client can move.


@st.composite
def records_of_one(draw: st.DrawFn) -> tuple[Layout, Tensor, Tensor]:
    classes, count = draw(st.integers(2, 5)), draw(st.integers(1, 12))
    layout = Layout(classes, draw(st.integers(1, 12)), draw(st.floats(0.01, 50)))
    number = st.one_of(st.floats(-30, 30), st.sampled_from([0.0, 1e4, -1e4, 3e38, -3e38]))
    scores = draw(st.lists(st.lists(number, min_size=classes, max_size=classes), min_size=count, max_size=count))
    targets = draw(st.lists(st.integers(0, classes - 1), min_size=count, max_size=count))
    return layout, torch.tensor(scores, dtype=torch.float64), torch.tensor(targets)


@settings(max_examples=100, deadline=None)
@given(records_of_one(), st.integers(1, 10_000))
def test_a_part_keeps_its_bound_after_rounding_and_lies_beside_the_mean(
    one: tuple[Layout, Tensor, Tensor], times: int
) -> None:
    layout, scores, targets = one
    count = len(targets) * times
    sums = {name: table * times for name, table in layout.tables(scores, targets).items()}
    for name, part in client_part(sums, count).items():
        assert part.dtype == torch.int64
        assert part.shape == sums[name].shape
        assert int(part.min()) >= 0
        assert int(part.sum()) == VOTES == UNIT_BOUNDS[sf.Unit.CLIENT][name]
        assert sum(int(cell) ** 2 for cell in part.flatten()) <= VOTES**2
        mean = sums[name].double() * (VOTES / NORM_BOUNDS[name] / count)
        assert float((part - mean).abs().max()) < 1 + 1e-6


def test_the_largest_client_that_can_be_counted_does_not_overflow() -> None:
    count = 2**42
    sums = {name: (table * bound).flatten().index_fill(0, torch.tensor(0), count * bound) for name, table, bound in (
        (name, table, NORM_BOUNDS[name]) for name, table in LAYOUT.empty().items()
    )}  # fmt: skip
    for part in client_part(sums, count).values():
        assert part.tolist() == [VOTES] + [0] * (len(part) - 1)


@pytest.mark.parametrize("relation", list(sf.Relation))
def test_taking_any_client_away_moves_the_release_by_no_more_than_is_paid_for(
    relation: sf.Relation, releases: list[tuple[dict[str, sf.Bounded], dict[str, sf.Released]]]
) -> None:
    clients = federation(6)
    clients["large"] = sf.Records.from_arrays(torch.tensor([[9.0, 0.0, 0.0]]).repeat(10_000, 1), [0] * 10_000)
    clients["small"] = sf.Records.from_arrays([[0.0, 2.0, 0.0]], [0])
    budget = sf.Budget(1.0, 1e-4, unit=sf.Unit.CLIENT, relation=relation)
    said = over(clients, budget).privacy
    assert said is not None
    assert 0.99 < said.epsilon <= 1.0
    (whole, released), *_ = releases
    parts = {}
    for name in clients:
        over({other: records for other, records in clients.items() if other != name}, budget)
        without = releases[-1][0]
        parts[name] = {
            table: (part.value[table] - without[table].value[table]).double() for table, part in whole.items()
        }
    moves = list(parts.values())
    if relation is sf.Relation.REPLACE_ONE:
        moves = [{t: one[t] - two[t] for t in one} for one in moves for two in moves]
    paid = said.event.noise_multiplier**-2
    spent = [
        sum(float(part.square().sum()) / released[table].noise_std ** 2 for table, part in one.items()) for one in moves
    ]
    assert max(spent) <= paid
    # The bound is reached, so that it could not be smaller.
    for table in ("tally", "confusion", "bins"):
        assert float(parts["large"][table].norm()) == VOTES == float(parts["small"][table].norm())
    assert max(spent) > 0.8 * paid


def test_ten_thousand_records_move_no_more_than_one() -> None:
    one = client(1, most=1)
    many = sf.Records.from_arrays(one.features.repeat(10_000, 1), one.targets.repeat(10_000))
    others = federation(5)
    assert over({**others, "last": many}, batch=4096) == over({**others, "last": one})


# The numbers.


def test_without_a_budget_the_numbers_are_means_over_clients_and_said_to_be_not_covered() -> None:
    clients = federation(12)
    found = over(clients, loss_bound=100.0)
    accuracy, loss = [], []
    confusion = torch.zeros(3, 3, dtype=torch.float64)
    for records in clients.values():
        scores, targets = records.features.double(), records.targets
        predicted = scores.argmax(1)
        accuracy.append(float((predicted == targets).double().mean()))
        loss.append(float(nn.functional.cross_entropy(scores, targets)))
        for true, guess in zip(targets, predicted, strict=True):
            confusion[true, guess] += 1 / len(records)
    assert found.count == Estimate(12.0, 12.0, 12.0)
    assert found.accuracy.value == pytest.approx(sum(accuracy) / 12, abs=1e-5)
    assert found.loss.value == pytest.approx(sum(loss) / 12, abs=1e-3)
    for true in range(3):
        for guess in range(3):
            assert found.confusion[true][guess].value == pytest.approx(float(confusion[true, guess]), abs=1e-4)
    assert sum(one.count.value for one in found.calibration.bins) == pytest.approx(12)
    assert found.unit is sf.Unit.CLIENT
    assert found.privacy is None
    assert "not covered by any budget" in str(found)
    assert found.to_dict()["privacy"] == "not covered by any budget"


def test_a_federation_of_clients_with_one_record_each_is_judged_as_the_records_are() -> None:
    one_each = {f"client-{index}": client(index, most=1) for index in range(40)}
    together = sf.Records.from_arrays(
        torch.cat([one.features for one in one_each.values()]), torch.cat([one.targets for one in one_each.values()])
    )
    clients, records = over(one_each), evaluate(nn.Identity(), together)
    for name in ("count", "accuracy", "confusion", "calibration"):
        assert getattr(clients, name) == getattr(records, name)
    assert clients.loss.value == records.loss.value


def test_much_budget_comes_close() -> None:
    clients = federation(300)
    true = over(clients)
    near = over(clients, sf.Budget(50.0, 1e-4, unit=sf.Unit.CLIENT), source=sf.SeededSource(0))
    for name in ("accuracy", "loss", "count"):
        assert getattr(near, name).value == pytest.approx(getattr(true, name).value, rel=0.04)
        assert getattr(near, name).value != getattr(true, name).value


def test_neither_batches_nor_order_change_the_numbers() -> None:
    clients = federation(8)
    assert over(clients) == over(clients, batch=3) == over(dict(reversed(clients.items())))


@pytest.mark.parametrize("budget", [None, BUDGET])
def test_clients_are_made_one_at_a_time(budget: sf.Budget | None) -> None:
    alive: weakref.WeakSet[sf.Records] = weakref.WeakSet()
    most, made = 0, []

    def make(index: int) -> sf.Records:
        nonlocal most
        records = client(index)
        made.append(index)
        alive.add(records)
        most = max(most, len(alive))
        return records

    found = over(sf.Population.from_factory(20, make), budget)
    assert most == 1
    assert made == [0, *range(20)]  # the first once more, for the public shape of records
    if budget is None:
        assert found == over({f"client-{index}": client(index) for index in range(20)})


# The noise, and what the intervals cover.


def test_no_clients_release_noise_alone_of_the_right_scale(
    releases: list[tuple[dict[str, sf.Bounded], dict[str, sf.Released]]],
) -> None:
    for seed in range(200):
        found = over({}, BUDGET, classes=["a", "b", "c"], source=sf.SeededSource(seed))
    assert found.classes == ("a", "b", "c")
    assert (found.accuracy.low, found.accuracy.high) == (0.0, 1.0)
    multiplier = _calibrate(evaluation.events.gaussian, BUDGET).noise_multiplier
    for name, share in SHARES.items():
        noise = torch.cat([released[name].value[name].flatten().double() for _, released in releases])
        right = multiplier * VOTES / math.sqrt(share)
        ratio = float(noise.square().mean().sqrt()) / right
        assert 0.8 < ratio < 1.25, name  # at least 400 draws, so 2/3 and 3/2 are far outside
        assert all(released[name].noise_std == pytest.approx(right) for _, released in releases)


@pytest.fixture(scope="module")
def parts() -> dict[str, Tensor]:
    """Return what each of 1,500 clients adds, (clients, ...) for every table."""
    found: dict[str, list[Tensor]] = {name: [] for name in NORM_BOUNDS}
    for seed in range(1500):
        one = client(seed)
        for name, part in client_part(LAYOUT.tables(one.features.double(), one.targets), len(one)).items():
            found[name].append(part)
    return {name: torch.stack(tables) for name, tables in found.items()}


def covered(found: list[Estimate], truth: list[float]) -> float:
    return sum(one.low <= true <= one.high for one, true in zip(found, truth, strict=True)) / len(found)


def narrowed(one: Estimate, share: float) -> Estimate:
    return Estimate(one.value, *(one.value + share * (end - one.value) for end in (one.low, one.high)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "budget"),
    [(150, BUDGET), (1200, BUDGET), (4, None), (40, None), (1000, None)],
    ids=["mostly noise", "noise and chance", "few", "some", "many"],
)
def test_intervals_cover_the_truth(
    count: int, budget: sf.Budget | None, parts: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The population is the 1,500 clients; a federation is drawn from it with replacement.
    zero = dict.fromkeys(NORM_BOUNDS, 0.0)
    truth = measure(LAYOUT, {name: table.sum(0) for name, table in parts.items()}, zero, 0.95, sf.Unit.CLIENT)
    found: dict[str, list[Estimate]] = {}
    true: dict[str, list[float]] = {}

    def note(name: str, one: Estimate, value: float) -> None:
        found.setdefault(name, []).append(one)
        true.setdefault(name, []).append(value)

    anybody = federation(1)
    for seed in range(300):
        drawn = torch.randint(len(parts["tally"]), (count,), generator=torch.Generator().manual_seed(seed))
        sums = {name: table[drawn].sum(0) for name, table in parts.items()}
        monkeypatch.setattr(evaluation, "client_sums", lambda *_, sums=sums: sums)
        one = over(anybody, budget, source=sf.SeededSource(seed))
        note("accuracy", one.accuracy, truth.accuracy.value)
        note("loss", one.loss, truth.loss.value)
        note("error", one.calibration.error, truth.calibration.error.value)
        for place in (-1, -4):
            note(f"bin {place}", one.calibration.bins[place].accuracy, truth.calibration.bins[place].accuracy.value)
            note(
                f"its mean {place}",
                one.calibration.bins[place].confidence,
                truth.calibration.bins[place].confidence.value,
            )
        note("count", one.count, count)
        note("cell", one.confusion[0][0], float(sums["confusion"][0, 0]) / VOTES)
    for name, intervals in found.items():
        assert covered(intervals, true[name]) >= 0.92, name
    if budget is not None:
        # Two thirds as wide would not do: the intervals are not just wide.
        for name in ("count", "cell"):
            assert covered([narrowed(one, 2 / 3) for one in found[name]], true[name]) < 0.9, name
        if count == 150:
            assert covered([narrowed(one, 1 / 2) for one in found["accuracy"]], true["accuracy"]) < 0.92
        spread = math.sqrt(sum((one.value - count) ** 2 for one in found["count"]) / 300)
        right = _calibrate(evaluation.events.gaussian, budget).noise_multiplier * math.sqrt(2 / SHARES["tally"])
        assert 0.82 < spread / right < 1.22  # not 2/3 and not 3/2
    if count == 1000:
        assert all(one.high - one.low < 0.07 for one in found["accuracy"])


def test_one_client_whose_records_are_alike_tells_next_to_nothing_of_others() -> None:
    found = over({"only": sf.Records.from_arrays([[9.0, 0.0, 0.0]] * 1000, [0] * 1000)})
    assert found.accuracy.value == 1.0
    assert found.accuracy.low < 0.25
    assert found.loss.value == pytest.approx(0.0, abs=1e-3)
    assert found.loss.high > 0.7 * found.loss_bound


# What is charged and what is refused.


def test_the_charge_is_for_one_client(tmp_path: Path) -> None:
    ledger = sf.Ledger(tmp_path / "ledger.sqlite")
    ledger.grant("federation", BUDGET)
    found = over(federation(5), BUDGET, ledger=ledger, purpose="a look")
    said = found.privacy
    assert said is not None
    assert said.unit is sf.Unit.CLIENT
    (entry,) = [entry for entry in ledger.history("federation") if entry.kind == "charge"]
    assert (entry.purpose, entry.draws, entry.epsilon) == ("a look", 1, said.epsilon)
    assert "differentially private for one client" in str(found)
    assert "Every client counts the same" in str(found)
    assert found.to_dict()["unit"] == "client"


TWO = sf.Records.from_arrays([[1.0, 0.0, 0.0]], [0], classes=["a", "b", "c"])


@pytest.mark.parametrize(
    ("clients", "more", "error", "words"),
    [
        (federation(2), {"budget": sf.Budget(1.0, 1e-4)}, PlanError, 'choose unit "client"'),
        (client(0), {}, PlanError, 'pass a mapping of name to Records, such as .* or choose unit "record"'),
        ({}, {}, InputError, "has no client, so nothing tells its classes; pass"),
        ({}, {"classes": ["a"]}, InputError, "two or more names"),
        ([client(0)], {}, InputError, "must be of type Mapping"),
        ({"a": 1}, {}, InputError, "must be of type Records"),
        ({"a": sf.Records(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))}, {}, InputError, "has no records"),
        ({"a": client(0), "b": TWO}, {}, InputError, 'Client "b" declares other classes than the first'),
        ({"a": client(0), "b": sf.Records.from_arrays([[0.0] * 3], [3])}, {}, InputError, 'Client "b": a target is not'),
        ({"a": sf.Records.from_arrays([[0.0] * 3], [0.5])}, {}, InputError, 'Client "a": targets are numbers'),
        ({"a": client(0), "b": sf.Records(torch.full((1, 3), math.nan), torch.tensor([0]))}, {}, DivergedError, "nothing was"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_a_sentence_and_costs_nothing(
    tmp_path: Path, clients: object, more: dict[str, object], error: type[Exception], words: str
) -> None:
    ledger = sf.Ledger(tmp_path / "ledger.sqlite")
    ledger.grant("federation", BUDGET)
    with pytest.raises(error, match=words):
        evaluate(nn.Identity(), clients, ledger=ledger, **({"budget": BUDGET} | more))  # type: ignore[arg-type]
    assert ledger.balance("federation").spent_epsilon == 0


def test_named_classes_overrule_what_clients_declare() -> None:
    assert over({"a": client(0), "b": TWO}, classes=["x", "y", "z"]).classes == ("x", "y", "z")


def test_no_clients_and_no_budget_are_refused() -> None:
    with pytest.raises(InputError, match="there is no client to evaluate on"):
        over({}, classes=["a", "b"])
