"""What the next step is done with, as far as it depends on how the run went: the policy's noise and the learnt clip norm."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, final

from sfumato.errors import CheckpointError
from sfumato.gradients.clipping import UNCLIPPED
from sfumato.learning.adaptive_clip import AdaptiveClip
from sfumato.learning.filters import Purse, ask
from sfumato.learning.plan import Plan
from sfumato.learning.policies import ReleasedPolicy, Signal
from sfumato.learning.terms import Terms
from sfumato.privacy import events
from sfumato.privacy.bounded import Released


@final
class Control:
    """The terms of a run's steps, one after the other. It knows public and released numbers only.

    Args:
        plan: Of the run.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._purse = None if plan.filter is None else Purse(plan.filter, plan.steps)
        self._seen: list[Signal] = []
        self._clip = plan.clip

    def terms(self, step: int) -> Terms | None:
        """Return what step `step` (from 0) is done with, and pay for it; None if the policy ends the run before it."""
        plan = self._plan
        terms = plan.terms(step)
        if self._purse is not None:
            assert isinstance(plan.noise, ReleasedPolicy)
            noise = ask(plan.noise, self._purse, step, tuple(self._seen))
            if noise is None:
                return None
            terms = dataclasses.replace(terms, noise_multiplier=noise)
        if isinstance(plan.clips, AdaptiveClip):
            counted = plan.clips.counted(terms.noise_multiplier, terms.rate * plan.population)
            clipping = dataclasses.replace(terms.bounded, norm=self._clip, counted=counted)
            terms = dataclasses.replace(terms, clipping=clipping)
        return terms

    def observe(self, released: Mapping[str, Released], terms: Terms) -> None:
        """Take note of what a step released."""
        if self._purse is not None:
            values = [value for one in released.values() for value in one.value.values()]
            size = math.sqrt(sum(float(value.double().square().sum()) for value in values))
            drawn = sum(one.noise_std**2 * sum(v.numel() for v in one.value.values()) for one in released.values())
            if drawn > 0:
                self._seen.append(Signal(size, math.sqrt(drawn)))
        if isinstance(self._plan.clips, AdaptiveClip) and released:
            total = math.fsum(float(one.value[UNCLIPPED]) for one in released.values())
            clips = self._plan.clips
            share = terms.bounded.share_within(total, clips.answers(terms.rate * self._plan.population))
            self._clip = clips.next(terms.bounded, share, self._plan.clip)

    @property
    def spent(self) -> events.Event | None:
        """What the steps so far cost together, if the run is held by a filter; None for other runs."""
        if self._purse is None or self._plan.filter is None:
            return None
        return self._plan.filter.event_of(self._purse.spent)

    @property
    def share_left(self) -> float | None:
        """The share of the filter's cap that is left, in [0, 1]; None for other runs."""
        return None if self._purse is None else self._purse.outlook(0).left

    def lose(self, steps: int) -> None:
        """Go on after steps that were paid for and may have been drawn by a process that is gone.

        Raises:
            CheckpointError: the noise of those steps was chosen from results that nobody remembers.
        """
        if steps and self._purse is not None:
            raise CheckpointError(
                f"{steps} steps were lost in a crash, and their noise was chosen from results that are lost with them, so what "
                "is left of the filter is unknown. The run cannot go on; its charge stays spent. Fix: start a new run."
            )

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint must keep."""
        seen = [[one.size, one.noise] for one in self._seen]
        return {"clip": self._clip, "seen": seen, "spent": self._purse.spent if self._purse else 0.0}

    def restore(self, state: dict[str, Any]) -> None:
        """Take back what `state` returned."""
        self._clip = state["clip"]
        self._seen = [Signal(*one) for one in state["seen"]]
        if self._purse is not None:
            self._purse.spent = state["spent"]
