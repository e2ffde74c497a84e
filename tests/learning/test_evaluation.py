"""Metrics inside the budget: what a record can move, what the intervals cover, what is charged and what is refused."""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path

import pytest
import torch
from helpers import toy_model, toy_records
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sfumato as sf
from sfumato.errors import (
    BudgetExhaustedError,
    DivergedError,
    InputError,
    PlanError,
    UnsupportedModelError,
)
from sfumato.learning import evaluation
from sfumato.learning.evaluation import Evaluation, evaluate
from sfumato.learning.metrics import NORM_BOUNDS, SHARES, VOTES, Estimate, Layout, measure
from sfumato.privacy.randomness import RandomSource

BUDGET = sf.Budget(1.0, 1e-4)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "calibrate", _calibrate)


_calibrate = functools.cache(evaluation.calibrate)


def made_up(count: int, classes: int = 3, seed: int = 0) -> sf.Records:
    """Return records whose features are the scores of a classifier that is too sure of itself."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(count, classes, generator=generator)
    targets = torch.multinomial(scores.softmax(1), 1, generator=generator)[:, 0]
    return sf.Records.from_arrays(2 * scores, targets, name="made-up")


def empty() -> sf.Records:
    return sf.Records(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64), "empty")


# What one record can move.


@st.composite
def neighbours(draw: st.DrawFn) -> tuple[Layout, Tensor, Tensor]:
    """Return a layout, and scores and targets of two records."""
    classes = draw(st.integers(2, 5))
    layout = Layout(classes, draw(st.integers(1, 12)), draw(st.floats(0.01, 50)))
    number = st.one_of(st.floats(-30, 30), st.sampled_from([0.0, 1e4, -1e4, 3e38, -3e38]))
    scores = draw(st.lists(st.lists(number, min_size=classes, max_size=classes), min_size=2, max_size=2))
    targets = draw(st.lists(st.integers(0, classes - 1), min_size=2, max_size=2))
    return layout, torch.tensor(scores, dtype=torch.float64), torch.tensor(targets)


@settings(max_examples=100, deadline=None)
@given(neighbours())
def test_one_record_moves_every_table_by_its_bound_in_both_relations(two: tuple[Layout, Tensor, Tensor]) -> None:
    layout, scores, targets = two
    ones = [layout.tables(scores[[place]], targets[[place]]) for place in (0, 1)]
    both = layout.tables(scores, targets)
    shapes = {name: table.shape for name, table in layout.empty().items()}
    for name, bound in NORM_BOUNDS.items():
        first, second = (one[name] for one in ones)
        assert first.shape == second.shape == shapes[name]
        assert torch.equal(both[name], first + second)
        for part in (first, second):
            assert part.dtype == torch.int64
            assert int(part.min()) >= 0
            assert int(part.sum()) == bound
            assert float(part.double().norm()) <= bound
        assert float((first - second).double().norm()) <= math.sqrt(2) * bound


def test_the_tables_of_the_release_are_those_with_bounds_and_shares() -> None:
    assert Layout(3, 10, 1.0).empty().keys() == NORM_BOUNDS.keys() == SHARES.keys()


@pytest.mark.parametrize("relation", list(sf.Relation))
def test_the_release_spends_the_budget_and_no_more(relation: sf.Relation, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = {}

    def watch(*args: object, **more: object) -> object:
        released = true_release(*args, **more)  # type: ignore[arg-type]
        seen.update(released)
        return released

    true_release = evaluation.gaussian_counts
    monkeypatch.setattr(evaluation, "gaussian_counts", watch)
    budget = sf.Budget(1.0, 1e-4, relation=relation)
    said = evaluate(nn.Identity(), made_up(50), budget).privacy
    moved = 2 if relation is sf.Relation.REPLACE_ONE else 1
    spent = sum(moved * (NORM_BOUNDS[name] / part.noise_std) ** 2 for name, part in seen.items())
    assert said is not None
    assert 0.99 < said.epsilon <= 1.0
    assert spent == pytest.approx(said.event.noise_multiplier**-2, rel=1e-6)
    assert spent <= said.event.noise_multiplier**-2


# The numbers.


def exact(records: sf.Records, model: nn.Module | None = None, **more: object) -> Evaluation:
    return evaluate(model or nn.Identity(), records, **more)  # type: ignore[arg-type]


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("batch", [7, 1024])
def test_without_a_budget_the_numbers_are_those_of_the_books(classes: int, batch: int) -> None:
    records = made_up(500, classes)
    found = exact(records, batch=batch, loss_bound=100.0)
    scores, targets = records.features.double(), records.targets
    sure, predicted = scores.softmax(1).max(1)
    right = (predicted == targets).double()
    assert found.accuracy.value == pytest.approx(float(right.mean()))
    assert found.loss.value == pytest.approx(float(nn.functional.cross_entropy(scores, targets)), rel=1e-4)
    for true in range(classes):
        for guess in range(classes):
            cell = found.confusion[true][guess]
            assert cell.value == cell.low == cell.high == int(((targets == true) & (predicted == guess)).sum())
    error = 0.0
    for one in found.calibration.bins:
        inside = (sure >= one.lower) & (sure < one.upper + (one.upper == 1))
        assert one.count.value == int(inside.sum())
        if inside.any():
            assert one.accuracy.value == pytest.approx(float(right[inside].mean()))
            assert one.confidence.value == pytest.approx(float(sure[inside].mean()), abs=1e-5)
            error += float((sure[inside] - right[inside]).sum().abs()) / 500
    assert found.calibration.error.value == pytest.approx(error, abs=1e-5)
    assert sum(one.count.value for one in found.calibration.bins) == found.count.value == 500


def test_the_loss_of_a_record_is_cut_at_the_bound() -> None:
    records = sf.Records.from_arrays([[50.0, 0.0]] * 4, [0, 0, 0, 1])
    assert exact(records, loss_bound=2.0).loss.value == pytest.approx(0.5, abs=1e-5)
    assert exact(records).loss_bound == pytest.approx(math.log(2) + 3)


def test_much_budget_comes_close_to_the_exact_numbers_and_little_does_not() -> None:
    records = made_up(4000)
    true, near = exact(records), evaluate(nn.Identity(), records, sf.Budget(50.0, 1e-3))
    for name in ("accuracy", "loss", "count"):
        assert getattr(near, name).value == pytest.approx(getattr(true, name).value, rel=0.02)
    assert near.calibration.error.value == pytest.approx(true.calibration.error.value, abs=0.01)
    # Too good under a tiny budget would mean that the noise is missing.
    far = [evaluate(nn.Identity(), records, sf.Budget(0.1, 1e-6)).count.value for _ in range(5)]
    assert max(abs(count - 4000) for count in far) > 40


@pytest.mark.parametrize("shape", [(), (1,)])
def test_one_logit_is_a_model_of_two_classes(shape: tuple[int, ...]) -> None:
    class OneLogit(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            return features[:, 0].view(-1, *shape)

    records = made_up(300, 2)
    margin = sf.Records.from_arrays(
        records.features[:, 1:] - records.features[:, :1], records.targets, classes=["no", "yes"]
    )
    two, one = exact(records), exact(margin, OneLogit())
    assert one.classes == ("no", "yes")
    assert one.accuracy == two.accuracy
    assert one.confusion == two.confusion
    assert one.loss.value == pytest.approx(two.loss.value, abs=1e-5)


def test_released_numbers_of_records_are_whole() -> None:
    found = evaluate(nn.Identity(), made_up(300), BUDGET)
    counts = [found.count, *(cell for row in found.confusion for cell in row)]
    assert all(one.value.is_integer() for one in [*counts, *(b.count for b in found.calibration.bins)])


# What the intervals cover.

RUNS = 300


def halved(one: Estimate) -> Estimate:
    return Estimate(one.value, (one.low + one.value) / 2, (one.high + one.value) / 2)


def coverage(found: list[Estimate], truth: list[float]) -> float:
    return sum(one.low <= true <= one.high for one, true in zip(found, truth, strict=True)) / len(found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "budget"),
    [(150, sf.Budget(1.0, 1e-4)), (1000, sf.Budget(1.0, 1e-5)), (400, None)],
    ids=["mostly noise", "noise and chance", "chance alone"],
)
def test_intervals_cover_the_truth_and_half_as_wide_do_not(count: int, budget: sf.Budget | None) -> None:
    population = exact(made_up(400_000, seed=12_345), batch=100_000)
    truth: dict[str, list[float]] = {}
    found: dict[str, list[Estimate]] = {}

    def note(name: str, one: Estimate, true: float) -> None:
        found.setdefault(name, []).append(one)
        truth.setdefault(name, []).append(true)

    for seed in range(RUNS):
        records = made_up(count, seed=seed)
        one = evaluate(nn.Identity(), records, budget, source=sf.SeededSource(seed))
        note("accuracy", one.accuracy, population.accuracy.value)
        note("loss", one.loss, population.loss.value)
        note("error", one.calibration.error, population.calibration.error.value)
        note("last bin", one.calibration.bins[-1].accuracy, population.calibration.bins[-1].accuracy.value)
        note("its confidence", one.calibration.bins[-1].confidence, population.calibration.bins[-1].confidence.value)
        if budget is not None:
            within = exact(records)
            note("count", one.count, count)
            note("cell", one.confusion[0][0], within.confusion[0][0].value)
    for name, intervals in found.items():
        assert coverage(intervals, truth[name]) >= 0.9, name
    for name in found.keys() - {"error", "last bin", "its confidence"}:  # these are cautious, or end at 0 or 1
        assert coverage([halved(one) for one in found[name]], truth[name]) < 0.85, name
    if budget is not None and count == 1000:
        # The noise on the number of records: the right scale, and neither 2/3 nor 3/2 of it.
        spread = torch.tensor([one.value - count for one in found["count"]], dtype=torch.float64)
        multiplier = _calibrate(evaluation.events.gaussian, budget).noise_multiplier
        right = math.sqrt(2 * (multiplier**2 / SHARES["tally"] + 1 / 12))
        assert 0.85 < float(spread.square().mean().sqrt()) / right < 1.18


def test_the_calibration_error_is_not_just_noise() -> None:
    # The plain formula on noisy bins would say about 0.05 here; a perfectly calibrated model has next to none.
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(3000, 3, generator=generator)
    records = sf.Records.from_arrays(scores, torch.multinomial(scores.softmax(1), 1, generator=generator)[:, 0])
    found = [
        evaluate(nn.Identity(), records, sf.Budget(0.3, 1e-5), source=sf.SeededSource(seed)).calibration.error
        for seed in range(40)
    ]
    assert sum(one.value for one in found) / 40 < 0.03
    assert sum(one.low == 0.0 for one in found) >= 38


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 4), st.integers(1, 8), st.data(), st.floats(0, 1e4), st.floats(0.5, 0.999)
)  # fmt: skip
def test_every_estimate_lies_in_its_interval_whatever_the_noise_did(
    classes: int, bins: int, data: st.DataObject, std: float, level: float
) -> None:
    layout = Layout(classes, bins, 2.0)
    tables = {
        name: torch.tensor(
            data.draw(st.lists(st.integers(-(10**6), 10**6), min_size=table.numel(), max_size=table.numel()))
        ).view(table.shape)
        * NORM_BOUNDS[name]
        for name, table in layout.empty().items()
    }
    found = measure(layout, tables, {name: std * bound for name, bound in NORM_BOUNDS.items()}, level)
    shares = [found.accuracy, found.calibration.error, *(b.accuracy for b in found.calibration.bins)]
    for one in [found.number, found.loss, *shares, *(cell for row in found.confusion for cell in row)]:
        assert 0 <= one.low <= one.value <= one.high < math.inf
    assert all(one.high <= 1 for one in shares)
    assert found.loss.high <= 2.0
    for one in found.calibration.bins:
        assert one.lower <= one.confidence.low <= one.confidence.high <= one.upper + 1e-12


# What is charged, and when.


def ledger_with(path: Path, budget: sf.Budget = BUDGET) -> sf.Ledger:
    ledger = sf.Ledger(path / "ledger.sqlite")
    ledger.grant("toy", budget)
    return ledger


def test_the_charge_is_in_the_ledger_with_its_event(tmp_path: Path) -> None:
    ledger = ledger_with(tmp_path)
    said = evaluate(toy_model(), toy_records(), BUDGET, ledger=ledger, purpose="a look", by="ada").privacy
    assert said is not None
    (entry,) = [entry for entry in ledger.history("toy") if entry.kind == "charge"]
    assert (entry.purpose, entry.by, entry.draws) == ("a look", "ada", 1)
    assert entry.epsilon == said.epsilon <= 1.0
    assert json.loads(entry.event) == {"type": "GaussianDpEvent", "noise_multiplier": said.event.noise_multiplier}
    assert not any("no ledger on disk" in sentence for sentence in said.not_covered)
    with pytest.raises(BudgetExhaustedError):
        evaluate(toy_model(), toy_records(), BUDGET, ledger=ledger)


def test_a_crash_while_the_noise_is_drawn_leaves_the_charge_spent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(self: RandomSource, total: Tensor, std: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RandomSource, "add_normal", crash)
    ledger = ledger_with(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        evaluate(toy_model(), toy_records(), BUDGET, ledger=ledger)
    assert ledger.balance("toy").spent_epsilon > 0.99


class Nan(nn.Module):
    def forward(self, features: Tensor) -> Tensor:
        return torch.where(features[:, :2] > 2, math.nan, features[:, :2])


class Picky(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(1, 2)

    def forward(self, features: Tensor) -> Tensor:
        return self.table((features[:, 0].abs() * 100).long())


class Remembering(nn.Linear):
    def forward(self, features: Tensor) -> Tensor:
        self.last = features
        return super().forward(features)


@pytest.mark.parametrize(
    ("model", "error", "words"),
    [
        (Nan(), DivergedError, "not finite for all records; nothing was charged"),
        (Picky(), UnsupportedModelError, "runs on records of zeros but not on these; nothing was charged"),
        (nn.Linear(5, 2), UnsupportedModelError, r"cannot be run on one record of shape \(4,\)"),
        (nn.Linear(4, 3), InputError, "scores are for 3 classes, but 2 are declared"),
        (nn.Sequential(nn.Linear(4, 2), nn.Unflatten(1, (2, 1, 1))), UnsupportedModelError, "does not return scores"),
        (nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2, track_running_stats=False)), UnsupportedModelError, "mixes no"),
        (Remembering(4, 2), UnsupportedModelError, "keeps a value of the records"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)  # fmt: skip
def test_what_cannot_be_evaluated_is_refused_and_costs_nothing(
    tmp_path: Path, model: nn.Module, error: type[Exception], words: str
) -> None:
    ledger = ledger_with(tmp_path)
    with pytest.raises(error, match=words):
        evaluate(model, toy_records(400), BUDGET, ledger=ledger, classes=["no", "yes"])
    assert ledger.balance("toy").spent_epsilon == 0


@pytest.mark.parametrize(
    ("more", "error", "words"),
    [
        ({"budget": sf.Budget(1.0, 1e-4, unit=sf.Unit.CLIENT)}, PlanError, 'choose unit "record"'),
        ({"bins": 0}, InputError, "bins must be"),
        ({"batch": 0}, InputError, "batch must be"),
        ({"loss_bound": math.nan}, InputError, "loss_bound must be"),
        ({"loss_bound": math.inf}, InputError, "loss_bound must be"),
        ({"confidence": 1.0}, InputError, "confidence must lie in"),
        ({"confidence": math.nan}, InputError, "confidence must lie in"),
        ({"budget": sf.Budget(1e-3, 1e-4)}, PlanError, "outside"),
        ({"budget": None}, InputError, "no budget, so nothing would be charged"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_and_cost_nothing(
    tmp_path: Path, more: dict[str, object], error: type[Exception], words: str
) -> None:
    ledger = ledger_with(tmp_path)
    with pytest.raises(error, match=words):
        evaluate(toy_model(), toy_records(), ledger=ledger, **({"budget": BUDGET} | more))  # type: ignore[arg-type]
    assert ledger.balance("toy").spent_epsilon == 0


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (torch.tensor([0.0, 1.0]), "targets are numbers, not classes"),
        (torch.tensor([0, 2]), "not one of the 2 classes"),
    ],
)
def test_targets_that_are_no_classes_are_refused(targets: Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words):
        evaluate(toy_model(), sf.Records.from_arrays(torch.zeros(2, 4), targets), BUDGET)


def test_no_records_release_noise_alone_and_are_refused_without_a_budget() -> None:
    found = evaluate(toy_model(), empty(), BUDGET, confidence=1 - 1e-7)  # noise alone passes 95 % one time in twenty
    assert found.count.low == 0
    assert (found.accuracy.low, found.accuracy.high) == (0.0, 1.0)
    assert (found.loss.low, found.loss.high) == (0.0, found.loss_bound)
    with pytest.raises(InputError, match="there is no record"):
        evaluate(toy_model(), empty())


# What the model sees.


def test_the_model_is_put_in_eval_mode_and_back_module_by_module() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.9), nn.Linear(8, 2))
    model.train()
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = exact(toy_records(), model), exact(toy_records(), model)
    assert first == second  # without dropout
    assert [module.training for module in model.modules()] == [True, True, False, True, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    broken = nn.Sequential(Nan(), nn.Dropout(0.5))
    with pytest.raises(DivergedError):
        exact(toy_records(400), broken)
    assert broken.training
    assert broken[1].training


class Centred(nn.Module):
    """Mixes the records of a batch: each output depends on all of them."""

    def forward(self, features: Tensor) -> Tensor:
        return features[:, :2] - features[:, :2].mean(0)


class Recurrent(nn.Module):
    """Has no batched form under vmap."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.cells, self.head = nn.LSTM(1, 6, batch_first=True), nn.Linear(6, 2)

    def forward(self, features: Tensor) -> Tensor:
        return self.head(self.cells(features.unsqueeze(-1))[0][:, -1])


def test_no_record_sees_another() -> None:
    # Alone, every record is its own mean.
    found = exact(toy_records(), Centred())
    assert [one.count.value for one in found.calibration.bins] == [60, 0, 0, 0, 0]


def test_models_without_a_batched_form_are_run_one_by_one() -> None:
    model, records = Recurrent(), toy_records()
    with torch.no_grad():
        right = (model(records.features).argmax(1) == records.targets).double().mean()
    assert exact(records, model).accuracy.value == pytest.approx(float(right))


def test_a_transformer_and_a_convolution_are_run() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    records = sf.Records.from_arrays(torch.randn(30, 5, 4), torch.randint(0, 3, (30,)))
    for model in (
        nn.Sequential(layer, nn.Flatten(), nn.Linear(20, 3)),
        nn.Sequential(nn.Conv1d(5, 2, 2), nn.Flatten(), nn.Linear(6, 3)),
    ):
        model.eval()
        with torch.no_grad():
            right = (model(records.features).argmax(1) == records.targets).double().mean()
        assert exact(records, model).accuracy.value == pytest.approx(float(right))


# What is printed.


@pytest.mark.parametrize("budget", [None, sf.Budget(math.inf)])
def test_without_a_budget_every_print_says_so(budget: sf.Budget | None) -> None:
    found = evaluate(toy_model(), toy_records(), budget)
    assert found.privacy is None
    assert "not covered by any budget" in str(found)
    assert found.to_dict()["privacy"] == "not covered by any budget"


def test_with_a_budget_every_print_carries_the_statement() -> None:
    records = sf.Records.from_arrays(torch.randn(60, 4), torch.randint(0, 2, (60,)), classes=["ill", "well"])
    found = evaluate(toy_model(), records, BUDGET, source=sf.SeededSource(0))
    text = str(found)
    assert str(found.privacy) in text
    assert "A rehearsal" in text  # seeded noise
    assert "not covered by any budget" not in text
    for word in ("accuracy", "calibration error", "mean loss", "records", "ill", "well", "0.9 to 1"):
        assert word in text
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert content["privacy"]["epsilon"] <= 1.0
    assert content["classes"] == ["ill", "well"]
    assert content["accuracy"].keys() == {"value", "low", "high"}
    assert "Evaluation(" in repr(found)


def test_many_classes_leave_the_confusion_matrix_out_of_the_print() -> None:
    assert "predicted" not in str(exact(made_up(50, 13)))
    assert "predicted" in str(exact(made_up(50, 12)))


def test_votes_are_a_power_of_two_so_that_counts_come_back_exactly() -> None:
    assert math.frexp(VOTES)[0] == 0.5


class Remembers(torch.nn.Module):
    """Cannot be run under vmap, and scores by how much it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen += float(x.sum())
        return torch.stack([x.sum(1) * 0 + self.seen, -x.sum(1) * 0 - self.seen], 1)


def test_a_model_with_a_memory_cannot_carry_one_record_to_the_next() -> None:
    features = torch.ones(50, 3)
    targets = torch.zeros(50, dtype=torch.int64)
    clean = sf.evaluate(Remembers(), sf.Records.from_arrays(features, targets), classes=("a", "b"))
    features[0] = -1e6
    poisoned = sf.evaluate(Remembers(), sf.Records.from_arrays(features, targets), classes=("a", "b"))
    assert clean.accuracy.value == pytest.approx(1.0)
    assert poisoned.accuracy.value == pytest.approx(49 / 50)
