"""From plans, statements and ledgers to the plain data of `result.json`."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sfumato.learning.plan import Plan
from sfumato.privacy import events
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.statement import PrivacyStatement


def privacy_of(plan: Plan, statement: PrivacyStatement, extra: Sequence[str] = ()) -> dict[str, Any]:
    """Return the `privacy` part of a run; `extra` sentences are added to what is not covered."""
    return {
        "epsilon": statement.epsilon,
        "delta": statement.delta,
        "unit": str(statement.unit),
        "relation": str(statement.relation),
        "noise_multiplier": plan.noise_multiplier,
        "clip_norm": plan.clip,
        "sampling": {"kind": plan.sampler.kind, "rate": plan.sampler.rate},
        "steps": plan.steps,
        "accountants": {"pld": statement.spending.pld, "rdp": _finite(statement.spending.rdp)},
        "event": events.to_dict(statement.event),
        "not_covered": [*statement.not_covered, *extra],
    }


def score_of(values: Sequence[float], per_owner: Mapping[str, float]) -> dict[str, Any]:
    """Return the `accuracy` part of a run from one value for each seed; a single seed has a spread of 0."""
    return {
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else 0.0,
        "seeds": len(values),
        "per_owner": dict(per_owner),
        "values": list(values),
    }


def ledger_extract(ledger: Ledger, dataset: str | None = None) -> dict[str, Any]:
    """Return the `ledger` part of a result: what was spent when on one data set or on all, and the digest of the whole."""
    fields = ("seq", "at", "kind", "dataset", "run", "epsilon", "delta", "purpose", "by")
    # Read once, so that the digest belongs to these very entries whoever writes meanwhile.
    entries = ledger.history()
    return {
        "path": "memory" if ledger.path is None else ledger.path.name,
        "digest": entries[-1].digest if entries else ledger.digest,
        "entries": [
            {name: getattr(entry, name) for name in fields} for entry in entries if dataset in (None, entry.dataset)
        ],
    }


def describe_machine() -> str:
    """Return cores, processor family, Python and torch versions in one line."""
    return (
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
