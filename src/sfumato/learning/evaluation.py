"""How good a classifier is, inside the budget: one release of whole numbers, and every metric computed from it."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from sfumato import _checks
from sfumato.data.client_names import kind_of
from sfumato.data.population import Population
from sfumato.data.records import Records
from sfumato.errors import DivergedError, InputError, PlanError, UnsupportedModelError
from sfumato.gradients.support import refuse_memories
from sfumato.learning import distributed
from sfumato.learning.client_evaluation import client_sums, public_form
from sfumato.learning.metrics import SHARES, UNIT_BOUNDS, Estimate, Layout, Reliability, measure
from sfumato.privacy import events
from sfumato.privacy.books import Cost
from sfumato.privacy.bounded import Bounded
from sfumato.privacy.budget import Budget, Unit
from sfumato.privacy.calibration import Calibration, calibrate
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.mechanisms import gaussian_counts
from sfumato.privacy.randomness import RandomSource, SecureSource
from sfumato.privacy.statement import PrivacyStatement

NOT_COVERED = "not covered by any budget"
_BEYOND_A_GUESS = 3.0
_ROUNDING = 1 / 12  # variance of rounding to whole numbers
_SHOWN_CLASSES = 12


@final
@dataclass(frozen=True)
class Evaluation:
    """How good a classifier is on some records, or over the clients of a federation, and what it cost to know.

    Each interval stands for itself, not for all at once. Those of counts are around the number in these very records or
    clients: they tell of the noise. Those of shares and means are around the value in the population that the records or
    clients were drawn from, independently: they tell of the noise and of chance. The noise's spread is known exactly; both are
    taken as normal. The lower end for the calibration error is cautious; for clients all of them are, because a client's mean
    is taken to vary as much as one of its records.

    In a federation every client counts the same: each number is a mean, or a sum, over clients of the client's own mean
    over its records.

    Attributes:
        classes: Class names in the order of the confusion matrix.
        count: Number of records, or of clients.
        accuracy: Share of records whose class got the largest score; for clients the mean of their shares.
        confusion: Row by row: confusion[true class][predicted class] is a number of records, or the sum of the clients' shares,
            of which each client has 1 in all. Every table has noise of its own, so that the cells do not add up to `count`.
        calibration: Confidence against accuracy; its counts are as those of `confusion`.
        loss: Mean cross-entropy (nats), each record's cut off at `loss_bound`.
        loss_bound: The declared cut.
        level: What the intervals are meant to hold with, such as 0.95.
        privacy: The privacy statement, or None: then the numbers are exact and not covered by any budget.
        unit: What is counted: records or clients.
    """

    classes: tuple[str, ...]
    count: Estimate
    accuracy: Estimate
    confusion: tuple[tuple[Estimate, ...], ...]
    calibration: Reliability
    loss: Estimate
    loss_bound: float
    level: float
    privacy: PrivacyStatement | None
    unit: Unit = Unit.RECORD

    def __str__(self) -> str:
        named = {
            "accuracy": self.accuracy,
            "calibration error": self.calibration.error,
            f"mean loss (cut at {self.loss_bound:.3g})": self.loss,
        }
        rows = [(name, *(f"{number:.4f}" for number in vars(one).values())) for name, one in named.items()]
        rows.append((f"{self.unit}s", *(f"{number:.0f}" for number in vars(self.count).values())))
        bins = [
            (f"{one.lower:.3g} to {one.upper:.3g}", self._number(one.count.value), f"{one.confidence.value:.3f}",
             f"{one.accuracy.value:.3f} ({one.accuracy.low:.3f} to {one.accuracy.high:.3f})")
            for one in self.calibration.bins
        ]  # fmt: skip
        lines = [
            *_aligned([("", "value", "low", "high"), *rows]),
            f"Each interval is meant to hold in {100 * self.level:.4g} % of cases by itself: "
            f"that of the number of {self.unit}s for",
            f"these very {self.unit}s, the others for the population that they come from.",
            *(("Every client counts the same, however many records it has.",) if self.unit is Unit.CLIENT else ()),
            *(self._confusion_lines() if len(self.classes) <= _SHOWN_CLASSES else ()),
            "",
            *_aligned([("confidence", f"{self.unit}s", "mean", "accuracy"), *bins]),
            "",
            f"These numbers are {NOT_COVERED}." if self.privacy is None else str(self.privacy),
        ]
        return "\n".join(lines)

    def _confusion_lines(self) -> list[str]:
        reach = max(cell.high - cell.value for row in self.confusion for cell in row)
        body = [
            (name, *(self._number(cell.value) for cell in row))
            for name, row in zip(self.classes, self.confusion, strict=True)
        ]
        noise = "" if self.privacy is None else f" (each number has noise, within about {reach:.0f})"
        return ["", f"true class \\ predicted{noise}", *_aligned([("", *self.classes), *body])]

    def _number(self, value: float) -> str:
        # A client's records spread over the cells, so that each has a part of the client.
        return f"{value:.0f}" if self.unit is Unit.RECORD else f"{value:.2f}"

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain JSON data; `privacy` says where no budget covers the numbers."""
        content = {name: value for name, value in vars(self).items() if name not in ("calibration", "privacy")}
        said = self.privacy
        return content | {
            "classes": list(self.classes),
            "unit": str(self.unit),
            "count": asdict(self.count),
            "accuracy": asdict(self.accuracy),
            "confusion": [[asdict(cell) for cell in row] for row in self.confusion],
            "calibration": {"bins": [asdict(b) for b in self.calibration.bins], "error": asdict(self.calibration.error)},
            "loss": asdict(self.loss),
            "privacy": NOT_COVERED if said is None else {
                "epsilon": said.epsilon, "delta": said.delta, "unit": str(said.unit), "relation": str(said.relation),
                "accountants": {"pld": said.spending.pld, "rdp": said.spending.rdp}, "event": events.to_dict(said.event),
                "secret_noise": said.secret_noise, "not_covered": list(said.not_covered),
            },
        }  # fmt: skip


def evaluate(
    model: nn.Module, records: Records | Mapping[str, Records], budget: Budget | None = None, *,
    ledger: Ledger | None = None, dataset: str | None = None, purpose: str = "evaluation", by: str | None = None,
    source: RandomSource | None = None, classes: Sequence[str] | None = None, bins: int = 10,
    loss_bound: float | None = None, confidence: float = 0.95, batch: int = 1024,
) -> Evaluation:  # fmt: skip
    """Return accuracy, confusion matrix, calibration and mean loss of a classifier on private records or over private clients.

    **Guarantee**: with a budget, the evaluation keeps it, for one record or for one client with all its records, as the
    budget's unit says, and in its relation, whatever the model is: it is one Gaussian release
    (`mechanisms.gaussian_counts`), charged before the noise is drawn, and all that is returned is computed from it. The
    number of records or clients is part of the release, not used without noise. The model sees one record at a time
    (`torch.func.vmap`, or one call for each where torch has no batched form), so that none can change another's score. A
    client adds the mean of what its records add, rounded so that it keeps within one record's bound: ten thousand records
    move the release no more than one.

    **Edge cases**

    | case | what happens |
    | --- | --- |
    | no budget, or an infinite epsilon | exact numbers, labelled "not covered by any budget" |
    | no records | with a budget noise alone is released; without one it is refused |
    | no clients | with a budget and `classes` noise alone is released; else it is refused |
    | a client without records | refused, as in training |
    | a score is NaN or infinite | refused before the charge; that it happened is not covered |
    | unit "client" for records, or unit "record" for clients | refused: the parts of such units have no known bound |
    | one output (a logit of the second class) | two classes |
    | a model in train mode | is put in eval mode and back, module by module |
    | fewer records or clients than noise | the intervals grow to all of [0, 1] |

    Args:
        model: Maps features (n, ...) to scores (logits) (n, classes), or (n, 1) or (n,) for two classes.
        records: With int64 classes as targets. Or the clients of a federation: a mapping of name to such records, or a
            `Population`, whose clients are made one at a time.
        budget: What the evaluation may cost, with unit "record" for records and "client" for clients.
        ledger: Where the charge is written. None: the evaluation keeps its budget but nobody remembers it.
        dataset: The data set's name in the ledger; by default the records' name, or "federation".
        purpose: What the charge is called.
        by: Who evaluates; by default the user's login.
        source: Where the noise comes from; by default a fresh secure source.
        classes: Class names in the order of their numbers; by default those that the records declare (clients: all the
            same), or numbers.
        bins: Bins of confidence within [0, 1].
        loss_bound: Where a record's loss is cut off, a public number; by default 3 above log(classes), the loss of a guess.
        confidence: What each interval is meant to hold with.
        batch: Records computed at once; it changes nothing but memory and rounding.

    Raises:
        PlanError: The budget's unit does not fit the records, or no noise keeps the budget.
        InputError: The targets are not classes, the classes do not fit the model, a client cannot be one, or an argument
            is out of range.
        UnsupportedModelError: The model cannot be run on such records, or does not return scores.
        DivergedError: A score is not a finite number.
        SfumatoError: The ledger refused the charge.
    """
    distributed.refuse("Evaluations")
    _checks.count("bins", bins)
    _checks.count("batch", batch)
    level = _checks.fraction("confidence", confidence)
    _check_model(model)
    held = _held(records)
    unit = Unit.RECORD if isinstance(held, Records) else Unit.CLIENT
    paid = _price(budget, ledger, unit)
    with _in_eval_mode(model), torch.no_grad():
        if held is None:
            names = _names_alone(classes)
        else:
            made_up, declared = public_form(held if isinstance(held, Records) else held.at(0))
            device = next((parameter.device for parameter in model.parameters()), made_up.device)
            forward, outputs = _forward(model, made_up.to(device))
            names = _names(classes or declared, outputs)
        bound = math.log(len(names)) + _BEYOND_A_GUESS if loss_bound is None else loss_bound
        layout = Layout(len(names), bins, _checks.positive("loss_bound", bound))

        def tables_of(some: Records, who: str) -> dict[str, Tensor]:
            if not classes and some.classes != declared:
                raise InputError(
                    f"{who} declares other classes than the first client; give all the same, or pass classes=."
                )
            _check_targets(some.targets, layout.classes, who)
            tables = layout.empty()
            for start in range(0, len(some), batch):
                features, targets = some.batch(torch.arange(start, min(start + batch, len(some))))
                for name, part in layout.tables(_finite_scores(forward, features.to(device)), targets.cpu()).items():
                    tables[name] += part
            return tables

        if held is None:
            tables = layout.empty()
        else:
            tables = tables_of(held, held.name) if isinstance(held, Records) else client_sums(layout, held, tables_of)
    called = held.name if isinstance(held, Records) else "federation"
    if budget is None or paid is None:
        if not held:
            raise InputError(f"{called}: there is no {unit} to evaluate on. Fix: pass at least one.")
        exact = measure(layout, tables, dict.fromkeys(tables, 0.0), level, unit)
        return Evaluation(names, *exact, layout.loss_bound, level, None, unit)

    source = source or SecureSource()
    statement = _statement(budget, paid, ledger, source)
    account, spending = dataset or called, paid.spending
    pays = ledger
    if pays is None:
        pays = Ledger.in_memory()
        pays.grant(account, budget)
    cost = Cost(spending.epsilon, spending.delta, budget.unit, budget.relation)
    charge = pays.charge(account, purpose=purpose, event=events.to_json(statement.event), cost=cost, draws=1, by=by)
    released = gaussian_counts(
        {name: Bounded({name: table}, UNIT_BOUNDS[unit][name]) for name, table in tables.items()},
        paid.noise_multiplier, shares=SHARES, relation=budget.relation, charge=charge, source=source,
    )  # fmt: skip
    stds = {name: math.sqrt(part.noise_std**2 + _ROUNDING) for name, part in released.items()}
    noisy = {name: part.value[name] for name, part in released.items()}
    return Evaluation(names, *measure(layout, noisy, stds, level, unit), layout.loss_bound, level, statement, unit)


def _check_model(model: object) -> None:
    if not isinstance(model, nn.Module):
        fix = "pass result.model" if isinstance(getattr(model, "model", None), nn.Module) else "pass an instance"
        raise InputError(f"model must be of type Module, not {kind_of(model)}; {fix}.")


def _held(records: Records | Mapping[str, Records]) -> Records | Population | None:
    """Return records as they are and clients as a population, or None for no client: a population has at least one."""
    if isinstance(records, Records):
        return records
    return None if isinstance(records, Mapping) and not records else Population.of(records)


def _price(budget: Budget | None, ledger: Ledger | None, unit: Unit) -> Calibration | None:
    """Return the noise that keeps the budget, or None where nothing is promised."""
    if budget is None and ledger is not None:
        raise InputError("A ledger was given but no budget, so nothing would be charged; pass a budget too.")
    if budget is None or not budget.is_private:
        return None
    if budget.unit is not unit:
        raise PlanError(
            'A budget for unit "client" needs clients: pass a mapping of name to Records, such as records.by_owner(), or '
            'choose unit "record".'
            if unit is Unit.RECORD
            else 'A budget for unit "record" does not fit clients, because a record of a small client weighs more than others; '
            'choose unit "client", or pass all records as one Records.'
        )
    return calibrate(events.gaussian, budget)


def _statement(budget: Budget, paid: Calibration, ledger: Ledger | None, source: RandomSource) -> PrivacyStatement:
    sentences = [
        "The curator who evaluates holds all records and is trusted with them.",
        "The model itself, if it was trained or chosen by looking at these records: training has its own price.",
        "That the evaluation was not refused for scores that are no numbers, and how long it took.",
    ]
    if budget.unit is Unit.CLIENT:
        # Only a client's own records are computed beside each other.
        sentences.append(
            "That there is a client at all, and the shape, the type and the declared classes of clients' records."
        )
    else:
        sentences.append(
            "Rounding in the model's own number type: a record's scores are taken to be the same whichever records are "
            "computed beside it."
        )
    if ledger is None or not ledger.is_durable:
        sentences.append("Other runs on the same records: no ledger on disk was given, so nobody adds them up.")
    if not source.is_secure:
        sentences.append("Anybody who knows the seed: the noise came from a seeded source, which is for tests only.")
    event = events.gaussian(paid.noise_multiplier)
    return PrivacyStatement(budget, paid.spending, event, tuple(sentences), source.is_secure)


@contextlib.contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    before = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


Forward = Callable[[Tensor], Any]


def _forward(model: nn.Module, made_up: Tensor) -> tuple[Forward, int]:
    """Return what maps features to outputs, (n, 1, ...), of each record alone, and the number of classes.

    Both come from a try on made-up records, so they say nothing of the private ones.
    """

    def one(feature: Tensor) -> Any:
        return model(feature.unsqueeze(0))

    def at_once(features: Tensor) -> Any:
        # The fused attention kernels have no batched form.
        with sdpa_kernel(SDPBackend.MATH):
            return vmap(one, randomness="different")(features)

    def one_by_one(features: Tensor) -> Any:
        # A fresh copy for each record, so that nothing the model keeps of one reaches another.
        return torch.stack([copy.deepcopy(model)(feature.unsqueeze(0)) for feature in features])

    failure: Exception | None = None
    for way in (at_once, one_by_one):
        try:
            outputs = way(made_up)
        except Exception as error:
            failure = error
            continue
        if way is at_once:
            refuse_memories(model, None)
        return way, _scores(outputs).shape[1]
    said = str(failure).splitlines()[0] if str(failure) else type(failure).__name__
    raise UnsupportedModelError(
        f"{type(model).__name__} cannot be run on one record of shape {tuple(made_up.shape[1:])} alone ({said}). "
        "Fix: pass features of the shape that it was trained on, and a model that mixes no records in eval mode."
    ) from failure


def _finite_scores(forward: Forward, features: Tensor) -> Tensor:
    """Return the scores of private records; an error tells nothing of them."""
    try:
        scores = _scores(forward(features))
    except Exception:
        raise UnsupportedModelError(
            "The model runs on records of zeros but not on these; nothing was charged. Usual cause: a number or a "
            "token that it does not know. Run model(records.features) to see torch's message."
        ) from None
    if not bool(scores.isfinite().all()):
        raise DivergedError(
            "The model's scores are not finite for all records; nothing was charged. Fix: check that its training did not "
            "diverge."
        )
    return scores


def _scores(outputs: Any) -> Tensor:
    """Return outputs (n, 1, ...) of single records as float64 scores (n, classes) on the CPU."""
    if not isinstance(outputs, Tensor) or not outputs.is_floating_point() or outputs.ndim not in (2, 3):
        raise UnsupportedModelError(
            "The model does not return scores; it must map features (n, ...) to a float tensor (n, classes), or (n, 1) for two."
        )
    scores = outputs.detach().to("cpu", torch.float64).flatten(1)
    # The logistic function of z is the softmax of (0, z).
    return torch.cat([torch.zeros_like(scores), scores], 1) if scores.shape[1] == 1 else scores


def _names(declared: Sequence[str] | None, outputs: int) -> tuple[str, ...]:
    if declared is None:
        return tuple(map(str, range(outputs)))
    if len(declared) != outputs:
        raise InputError(
            f"The model's scores are for {outputs} classes, but {len(declared)} are declared; use a model with one output a "
            "class (or one in all for two classes)."
        )
    return tuple(map(str, declared))


def _names_alone(classes: Sequence[str] | None) -> tuple[str, ...]:
    if classes is None or len(classes) < 2:
        raise InputError(
            "The federation has no client, so nothing tells its classes; pass at least one client, or classes= with two or "
            "more names."
        )
    return tuple(map(str, classes))


def _check_targets(targets: Tensor, classes: int, who: str) -> None:
    if targets.is_floating_point():
        raise InputError(f"{who}: targets are numbers, not classes. Fix: number the classes from 0, as int64.")
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise InputError(f"{who}: a target is not one of the {classes} classes. Fix: number them from 0.")


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the rows as lines: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
