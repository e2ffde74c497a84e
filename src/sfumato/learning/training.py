"""The loop: charge, sum, noise, update, once a step, for every procedure; and what it leaves behind."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from torch import nn

from sfumato import _checks
from sfumato.errors import CheckpointError, LedgerError, PlanError
from sfumato.gradients.support import trainable
from sfumato.learning import checkpoint as checkpoints
from sfumato.learning.aggregation import Noise
from sfumato.learning.checkpoint import Checkpoint
from sfumato.learning.plan import Plan
from sfumato.learning.procedure import Procedure, zero_like
from sfumato.learning.selfcheck import check_first_step
from sfumato.privacy import events
from sfumato.privacy.ledger import Charge, Cost, Ledger
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
    """

    index: int
    total: int
    epsilon: float
    remaining: float
    noise_multiplier: float


@final
@dataclass(frozen=True)
class TrainingResult:
    """A trained model and what it cost.

    Attributes:
        model: The model that was given, trained.
        privacy: The privacy statement.
        steps: The steps of this process, in order.
        run: The run's name in the ledger; empty without privacy.
        nonfinite: How often a unit's NaN or infinite part was left out. For the data's owner only: it is not covered by
            the budget and must not be published.
    """

    model: nn.Module
    privacy: PrivacyStatement
    steps: tuple[Step, ...]
    run: str
    nonfinite: int = field(repr=False)


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
        checkpoint: Checkpoint | None = None,
    ) -> None:  # fmt: skip
        self.model, self.plan = model, plan
        self._procedure, self._account, self._source = procedure, account, source
        self._checkpoint = checkpoint
        self._steps: list[Step] = []
        self._charge: Charge | None = None
        self._run = ""
        self._position = 0
        self._nonfinite = 0
        self._checked = False
        if checkpoint is not None:
            self._open_checkpoint(checkpoint)

    def __iter__(self) -> Training:
        return self

    def __next__(self) -> Step:
        if self._position >= self.plan.steps:
            raise StopIteration
        if self.plan.is_private:
            self._private_step()
        else:
            self._procedure.plain(self._position)
            self._position += 1
        spent = self.plan.epsilon_after(self._position)
        remaining = max(0.0, self.plan.budget.epsilon - spent) if self.plan.is_private else math.inf
        step = Step(self._position, self.plan.steps, spent, remaining, self.plan.noise_multiplier)
        self._steps.append(step)
        if self._checkpoint is not None and (
            self._position % self._checkpoint.every == 0 or self._position == self.plan.steps
        ):
            self._save()
        return step

    def pause(self) -> None:
        """Stop cleanly: save, and give back the steps that were paid for but not taken, so that a resume costs nothing."""
        if self._checkpoint is not None:
            self._save()
            if self._charge is not None and self._position < self.plan.steps:
                self._charge.pause()

    def result(self) -> TrainingResult:
        """Return the model and the statement of what has been charged for it."""
        return TrainingResult(self.model, self._statement(), tuple(self._steps), self._run, self._nonfinite)

    def _private_step(self) -> None:
        contributions = self._procedure.contributions(self._position)
        self._nonfinite += sum(part.nonfinite for part in contributions.values())
        parts = {name: part.bounded for name, part in contributions.items()}
        if self._charge is None:
            self._charge = self._pay()
            self._run = self._charge.run
        noise = Noise(self.plan.noise_multiplier, self.plan.budget.relation, self._charge, self._source)
        zero = zero_like(self.model, self.plan.clip)
        asked = self._procedure.asked(self._position)
        released = self._procedure.aggregation.combine(parts, zero=zero, asked=asked, noise=noise)
        if any(release.draw != self._position for release in released.values()):
            raise LedgerError(
                f"Another process is going on with run {self._charge.run}; this one stopped and what it drew was discarded."
            )
        if not self._checked:
            check_first_step(trainable(self.model), parts, self._procedure.probe(), released, zero)
            self._checked = True
        # Sensitive until here; what follows is post-processing.
        del contributions, parts
        self._procedure.apply(released, self._position)
        self._position += 1

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
        content = checkpoints.read(path)
        if content["plan"] != self.plan.fingerprint():
            raise CheckpointError(
                f"The checkpoint {path} belongs to another plan; resume with the plan it was started with."
            )
        if content["dataset"] != self._account.dataset:
            raise CheckpointError(
                f'The checkpoint {path} belongs to the data set "{content["dataset"]}", not "{self._account.dataset}".'
            )
        try:
            self.model.load_state_dict(content["model"])
            self._procedure.restore(content["procedure"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"The checkpoint {path} belongs to another model or optimiser: {str(error).splitlines()[0]}"
            ) from error
        self._position, self._run = content["position"], content["run"]
        if self._run and ledger is not None and self._position < self.plan.steps:
            # The ledger, not the file, knows how far the run may have come: what was leased counts as drawn.
            self._charge = ledger.resume(self._run, lease=checkpoint.every)
            self._position = self._charge.position

    def _save(self) -> None:
        assert self._checkpoint is not None
        content: dict[str, Any] = {
            "plan": self.plan.fingerprint(),
            "dataset": self._account.dataset,
            "run": self._run,
            "position": self._position,
            "model": self.model.state_dict(),
            "procedure": self._procedure.state(),
        }
        checkpoints.write(Path(self._checkpoint.path), content)

    def _statement(self) -> PrivacyStatement:
        not_covered = list(self._procedure.not_covered)
        if self.plan.is_private:
            not_covered += _always_not_covered(self._account, self._source.is_secure)
        else:
            not_covered = ["Everything: the run was not private."]
        return PrivacyStatement(
            self.plan.budget, self.plan.spending, self.plan.event, tuple(not_covered), self._source.is_secure
        )


def _always_not_covered(account: Account, secure: bool) -> list[str]:
    sentences = [
        "Choices made by looking at these records before the run (model, learning rate, clip norm, number of steps).",
        "Metrics, counts or messages computed from the records without noise, and how long the run took.",
    ]
    if account.ledger is None or not account.ledger.is_durable:
        sentences.append("Other runs on the same records: no ledger on disk was given, so nobody adds them up.")
    if not secure:
        sentences.append("Anybody who knows the seed: the noise came from a seeded source, which is for tests only.")
    return sentences
