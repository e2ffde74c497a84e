"""The loop: charge, sum, noise, update, once a step, for every procedure; and what it leaves behind."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from sfumato import _checks
from sfumato.errors import CheckpointError, DivergedError, LedgerError, LostClientsError, PlanError
from sfumato.gradients.clipped import ClippedSum
from sfumato.gradients.clipping import Clipping
from sfumato.gradients.support import trainable
from sfumato.learning import checkpoint as checkpoints
from sfumato.learning.aggregation import Noise
from sfumato.learning.checkpoint import Checkpoint
from sfumato.learning.control import Control
from sfumato.learning.plan import Plan
from sfumato.learning.procedure import NO_PERSONAL_MODELS, Procedure, Progress, zero_like
from sfumato.learning.selfcheck import check_bounded, check_noised, check_scale
from sfumato.learning.stopping import Stop, Watched
from sfumato.learning.terms import Terms
from sfumato.privacy import events
from sfumato.privacy.books import Cost
from sfumato.privacy.bounded import Released
from sfumato.privacy.ledger import Charge, Ledger
from sfumato.privacy.mechanisms import noise_std
from sfumato.privacy.randomness import RandomSource
from sfumato.privacy.statement import PrivacyStatement


@final
@dataclass(frozen=True)
class Step:
    """What may be printed after a step: public numbers only.

    Attributes:
        index: Steps of the plan used up so far, 1..total.
        total: Steps of the plan.
        epsilon: Upper bound on what has been spent so far (infinite without privacy).
        remaining: Budget minus `epsilon`.
        noise_multiplier: Of this step.
        clip_norm: Of this step.
        left: Share of the budget that is left: of epsilon, or, under a filter, of its cap. There `epsilon` is the whole,
            because a filter promises nothing smaller on the way.
    """

    index: int
    total: int
    epsilon: float
    remaining: float
    noise_multiplier: float
    clip_norm: float
    left: float


def _no_client(client: str) -> nn.Module:
    raise KeyError(NO_PERSONAL_MODELS)


@final
@dataclass(frozen=True)
class TrainingResult:
    """A trained model and what it cost.

    Attributes:
        model: The model that was given, trained.
        privacy: The privacy statement.
        steps: The steps of this process, in order.
        run: The run's name in the ledger; empty without privacy.
        lost: Steps that were paid for and lost, in a crash or a stop in the middle of a step.
        nonfinite: How often a unit's NaN or infinite part was left out. For the data's owner only: it is not covered by
            the budget and must not be published. A private run in which every part was left out ends like any other,
            having learned from noise alone; only this number tells.
        refused: How many answers of clients were left out because names or shapes were not those of the round. For the
            data's owner only.
        void: Rounds in which too few clients answered; they are spent and released nothing.
        stopped: Why a stopping rule ended the run; empty if the plan did. A private run says how many steps were taken, and
            that the whole plan stays charged; under a filter a ledger that composes by one gets back what is left.
        personal_model: Called with a client's name; returns the model as that client has it. What a client keeps of its own
            never left it and is under no promise; hand it to nobody else.
    """

    model: nn.Module
    privacy: PrivacyStatement
    steps: tuple[Step, ...]
    run: str
    lost: int
    nonfinite: int = field(repr=False)
    refused: int = field(default=0, repr=False)
    void: int = 0
    stopped: str = ""
    personal_model: Callable[[str], nn.Module] = field(default=_no_client, repr=False)


@final
@dataclass(frozen=True)
class Account:
    """Who pays: the ledger, the data set's name in it, and what the charge is called.

    Without a ledger the run pays from a ledger in memory that is granted exactly its budget: it is bounded by its plan, but
    nobody remembers it afterwards.
    """

    dataset: str
    ledger: Ledger | None = None
    purpose: str = "training"
    by: str | None = None


@final
class Training(Iterator[Step]):
    """A run that is stepped through: `for step in training`, then `training.result()`.

    The first step's sum is computed before the charge, so a model or data that cannot be trained costs nothing; then the
    whole plan is charged; only then is noise drawn.
    """

    def __init__(
        self, model: nn.Module, plan: Plan, procedure: Procedure, account: Account, source: RandomSource,
        checkpoint: Checkpoint | None = None, stop: Stop | None = None,
    ) -> None:  # fmt: skip
        self.model, self.plan = model, plan
        self._stop, self._watched = stop, Watched()
        self._procedure, self._account, self._source = procedure, account, source
        self._checkpoint = checkpoint if procedure.leads else None
        self._steps: list[Step] = []
        self._charge: Charge | None = None
        self._run = ""
        self._position = 0
        self._nonfinite = 0
        self._checked = False
        self._secret = source.is_secure
        self._remembered = account.ledger is not None and account.ledger.is_durable
        self._saved_at = 0
        self._lost = 0
        self._void = 0
        self._settled = False
        self._digest: str | None = None
        self._control = Control(plan)
        if self._checkpoint is not None:
            self._open_checkpoint(self._checkpoint)
        self._ask = None if stop is None else stop.begin(self._watched.memory)
        procedure.start(self._fingerprint())

    def __iter__(self) -> Training:
        return self

    def __next__(self) -> Step:
        with self._procedure.together():
            return self._next()

    def _next(self) -> Step:
        over = bool(self._watched.stopped)
        if self.plan.is_private and self._procedure.leads and not over:
            self._catch_up()
        terms = self._agree(None if over else self._next_terms())
        if terms is None:
            self._end()
            raise StopIteration
        self._procedure.use_terms(terms)
        if self.plan.is_private:
            self._private_step(terms)
        else:
            self._procedure.plain(self._position)
            self._void += self._procedure.is_void
            self._position += 1
        self._refuse_divergence()
        step = self._step(terms)
        self._steps.append(step)
        self._watched.rounds += 1
        if self._ask is not None:
            self._watched.stopped = self._ask(self.model, self._watched.rounds) or ""
        self._save_if_due()
        return step

    def pause(self) -> None:
        """Stop cleanly: save, and give back the steps that were paid for but not taken, so that a resume costs nothing."""
        if self._checkpoint is not None:
            self._save()
            if self._charge is not None and self._position < self.plan.steps:
                self._charge.pause()
                self._charge = None

    def result(self) -> TrainingResult:
        """Return the model and the statement of what has been charged for it."""
        return TrainingResult(
            self.model, self._statement(), tuple(self._steps), self._run, self._lost,
            self._nonfinite + self._procedure.nonfinite, self._procedure.refused, self._void, self._why(),
            self.personal_model,
        )  # fmt: skip

    def personal_model(self, client: str) -> nn.Module:
        """Return a copy of the model as one client has it: the server's, with what the client keeps of its own.

        What a client keeps never left it and is under no promise; hand it to nobody else.

        Raises:
            KeyError: there is no such client.
        """
        return self._procedure.personal_model(client)

    def _why(self) -> str:
        stopped = self._watched.stopped
        if not stopped or not self.plan.is_private:
            return stopped
        charged = "" if self._control.spent is not None else "; the whole plan stays charged"
        return f"{stopped} ({self._position} of {self.plan.steps} steps were taken{charged})"

    def _next_terms(self) -> Terms | None:
        """Return what the next step is done with; None if there is none, or another process decides."""
        if self._position >= self.plan.steps or not self._procedure.leads:
            return None
        return self._control.terms(self._position)

    def _agree(self, terms: Terms | None) -> Terms | None:
        said = None if terms is None else (terms.noise_multiplier, *_norm_and_indicator(terms.clipping))
        own = Progress(self._position, self._run, self._lost, self._nonfinite, self._secret, self._remembered, said)
        first = self._procedure.agree(own)
        self._position, self._run, self._lost, self._nonfinite, self._secret, self._remembered, said = first
        if said is None or self._procedure.leads:
            return terms
        noise, norm, counted = said
        planned = self.plan.terms(self._position)
        if planned.clipping is None:
            return planned
        return Terms(noise, Clipping(norm, self.plan.clipping, counted), planned.rate)

    def _end(self) -> None:
        """Give back to a ledger that composes by a filter what this run's filter did not need."""
        spent = self._control.spent
        ledger = self._account.ledger
        if spent is None or self._charge is None or ledger is None or self._settled:
            return
        if ledger.balance(self._account.dataset).composition == "renyi":
            self._charge.settle(events.to_json(spent))
        self._settled = True

    def _step(self, terms: Terms) -> Step:
        """Return what may be printed of the step that was just done."""
        plan = self.plan
        spent = plan.epsilon_after(self._position)
        remaining = max(0.0, plan.budget.epsilon - spent) if plan.is_private else math.inf
        left = self._control.share_left
        if left is None:
            left = remaining / plan.budget.epsilon if plan.is_private else 1.0
        return Step(
            self._position,
            plan.steps,
            spent,
            remaining,
            terms.noise_multiplier,
            _norm_and_indicator(terms.clipping)[0],
            left,
        )

    def _catch_up(self) -> None:
        """Move behind every draw that was or may have been taken without its step: a crash, a stop in the middle."""
        if self._charge is None and self._run and self._position < self.plan.steps:
            self._charge = self._go_on()
            self._saved_at = self._charge.position  # so that saves and leases stay in step
        if self._charge is not None and self._charge.position > self._position:
            self._control.lose(self._charge.position - self._position)
            self._lost += self._charge.position - self._position
            self._position = self._charge.position
            self._procedure.skip()

    def _private_step(self, terms: Terms) -> None:
        contributions = self._procedure.contributions(self._position)
        if self._procedure.is_void:
            self._void += 1
            if self._procedure.leads:
                self._skip_void()
            else:
                self._position += 1
            return
        released = self._release(contributions, terms) if self._procedure.leads else {}
        # Sensitive until here; what follows is post-processing.
        del contributions
        if self._procedure.leads:
            self._control.observe(released, terms)
        self._procedure.apply(released, self._position)
        self._position += 1

    def _skip_void(self) -> None:
        """Use the step up without releasing anything: to ask again until enough answer would not be the draw that is paid."""
        if self._charge is None:
            self._begin_charge()
        assert self._charge is not None
        self._charge.take()
        self._procedure.void()
        self._position = self._charge.position

    def _begin_charge(self) -> None:
        if self._checkpoint is not None:
            checkpoints.check(Path(self._checkpoint.path), self._content())
        self._charge = self._pay()
        self._run = self._charge.run

    def _release(self, contributions: Mapping[str, ClippedSum], terms: Terms) -> dict[str, Released]:
        self._nonfinite += sum(part.nonfinite for part in contributions.values())
        parts = {name: part.bounded for name, part in contributions.items()}
        shapes = self._procedure.shapes() or trainable(self.model)
        zero = zero_like(shapes, terms.bounded)
        probe = None if self._checked else self._procedure.probe()
        if not self._checked:
            check_bounded(shapes, parts, probe)
        if self._charge is None:
            self._begin_charge()
        assert self._charge is not None
        noise = Noise(terms.noise_multiplier, self.plan.budget.relation, self._charge, self._source)
        asked = self._procedure.asked(self._position)
        summed = parts if self._checked else self._procedure.aggregation.summed(parts, zero=zero, noise=noise)
        try:
            released = self._procedure.aggregation.combine(parts, zero=zero, asked=asked, noise=noise)
        except LostClientsError:
            # The void round is spent; the caller may go on with the next.
            self._position = self._charge.position
            self._procedure.skip()
            self._save_if_due()
            raise
        if self._charge.position != self._position + 1:
            raise LedgerError(
                f"Another process is going on with run {self._charge.run}; this one stopped and what it drew was discarded."
            )
        wide = self._procedure.aggregation.bound(zero, terms.noise_multiplier)
        check_scale(released, parts, noise_std(wide, terms.noise_multiplier, self.plan.budget.relation))
        if released and not self._checked:
            check_noised(shapes, summed, released, zero)
            self._checked = probe is not None
        return released

    def _refuse_divergence(self) -> None:
        for name, parameter in trainable(self.model).items():
            if parameter.numel() and not all(math.isfinite(end) for end in torch.aminmax(parameter.detach())):
                raise DivergedError(
                    f'The parameter "{name}" is not finite after step {self._position}: the training diverged. What was '
                    "charged, if anything, stays spent. Fix: lower the learning rate."
                )

    def _pay(self) -> Charge:
        plan, spending = self.plan, self.plan.spending
        ledger = self._account.ledger
        if ledger is None:
            ledger = Ledger.in_memory()
            ledger.grant(self._account.dataset, plan.budget)
        cost = Cost(spending.epsilon, spending.delta, plan.budget.unit, plan.budget.relation)
        return ledger.charge(
            self._account.dataset,
            purpose=self._account.purpose,
            event=events.to_json(plan.event),
            cost=cost,
            draws=plan.steps,
            lease=self._checkpoint.every if self._checkpoint else None,
            by=self._account.by,
        )

    def _go_on(self) -> Charge:
        """Return the charge of the run in the checkpoint, behind the last draw that may have been taken."""
        ledger, plan = self._account.ledger, self.plan
        assert ledger is not None
        assert self._checkpoint is not None
        paid = next(
            (
                entry
                for entry in ledger.history(self._account.dataset)
                if (entry.run, entry.kind) == (self._run, "charge")
            ),
            None,
        )
        what_it_costs = (events.to_json(plan.event), plan.steps, plan.spending.epsilon, plan.spending.delta)
        if paid is None or (paid.event, paid.draws, paid.epsilon, paid.delta) != what_it_costs:
            raise CheckpointError(
                f'The ledger has no charge for this plan under run {self._run} of data set "{self._account.dataset}"; '
                "resume with the ledger and the checkpoint that belong together."
            )
        # The ledger, not the file, knows how far the run may have come: what was leased counts as drawn.
        return ledger.resume(self._run, lease=self._checkpoint.every)

    def _open_checkpoint(self, checkpoint: Checkpoint) -> None:
        path = Path(checkpoint.path)
        _checks.count("checkpoint every", checkpoint.every)
        ledger = self._account.ledger
        if self.plan.is_private and (ledger is None or not ledger.is_durable):
            raise PlanError(
                "A private run can only be checkpointed with a ledger on disk, which remembers its steps; pass ledger."
            )
        if not path.parent.is_dir():
            raise CheckpointError(f"The folder of the checkpoint {path} does not exist; make it first.")
        if not checkpoint.resume:
            if path.exists():
                raise CheckpointError(
                    f"The checkpoint {path} exists already; pass resume=True to go on with it, or another path."
                )
            return
        if self.plan.is_private and not self._source.is_secure:
            raise CheckpointError(
                "A seeded source would repeat the noise that was drawn before the pause; resume with a secure source."
            )
        content = checkpoints.read(path)
        if content["plan"] != self._fingerprint():
            raise CheckpointError(
                f"The checkpoint {path} belongs to another plan; resume with the plan it was started with."
            )
        if content["dataset"] != self._account.dataset:
            raise CheckpointError(
                f'The checkpoint {path} belongs to the data set "{content["dataset"]}", not "{self._account.dataset}".'
            )
        if content["data"] != self._procedure.data_digest():
            raise CheckpointError(
                f"The records are not those, or not in the order, that the run in {path} was started with; restore them."
            )
        try:
            self.model.load_state_dict(content["model"])
            self._procedure.restore(content["procedure"])
            self._control.restore(content["control"])
            self._watched = Watched(**content["watched"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"The checkpoint {path} belongs to another model or optimiser: {str(error).splitlines()[0]}"
            ) from error
        self._position = self._saved_at = content["position"]
        self._run = content["run"]
        self._secret = self._secret and content["secret"]

    def _save_if_due(self) -> None:
        if self._checkpoint is not None and (
            self._position - self._saved_at >= self._checkpoint.every
            or self._position == self.plan.steps
            or self._watched.stopped  # so that it stays stopped
        ):
            self._save()

    def _save(self) -> None:
        assert self._checkpoint is not None
        checkpoints.write(Path(self._checkpoint.path), self._content())
        self._saved_at = self._position

    def _content(self) -> dict[str, Any]:
        if self._digest is None:
            self._digest = self._procedure.data_digest()
        return {
            "plan": self._fingerprint(),
            "secret": self._secret,
            "dataset": self._account.dataset,
            "run": self._run,
            "position": self._position,
            "model": self.model.state_dict(),
            "procedure": self._procedure.state(),
            "control": self._control.state(),
            "watched": dataclasses.asdict(self._watched),
            "data": self._digest,
        }

    def _fingerprint(self) -> str:
        """Return one line that is the same only for the same plan, procedure and place of the noise."""
        procedure = self._procedure
        return f"{self.plan.fingerprint()} {procedure.kind} {procedure.aggregation!r}"

    def _statement(self) -> PrivacyStatement:
        not_covered = list(self._procedure.not_covered)
        if self.plan.is_private:
            not_covered += _always_not_covered(self._remembered, self._secret)
            if self._stop is not None and self._stop.looks:
                not_covered.append("The score that the stopping rule looked at, and the step at which it stopped.")
        else:
            not_covered = ["Everything: the run was not private."]
        return PrivacyStatement(self.plan.budget, self.plan.spending, self.plan.event, tuple(not_covered), self._secret)


def _norm_and_indicator(clipping: Clipping | None) -> tuple[float, float]:
    return (math.inf, 0.0) if clipping is None else (clipping.norm, clipping.counted)


def _always_not_covered(remembered: bool, secure: bool) -> list[str]:
    sentences = [
        "Choices made by looking at these records before the run (model, learning rate, clip norm, number of steps).",
        "Metrics, counts or messages computed from the records without noise, and how long the run took.",
        "Rounding in the model's own number type, inside the model and in sums of gradients: a record's part is taken to be "
        "the same whichever records are computed beside it.",
    ]
    if not remembered:
        sentences.append("Other runs on the same records: no ledger on disk was given, so nobody adds them up.")
    if not secure:
        sentences.append("Anybody who knows the seed: the noise came from a seeded source, which is for tests only.")
    return sentences
