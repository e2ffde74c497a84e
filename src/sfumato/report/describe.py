"""From plans, statements and ledgers to the plain data of `result.json`."""

from __future__ import annotations

import math
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.data.population import Population
from sfumato.data.records import Records
from sfumato.learning.plan import Plan
from sfumato.learning.training import Step
from sfumato.privacy import events
from sfumato.privacy.books import Entry
from sfumato.privacy.ledger import Ledger
from sfumato.privacy.meaning import meaning
from sfumato.privacy.statement import PrivacyStatement
from sfumato.report.client_plots import ClientPart

_POINTS = 64
_AT_ONCE = 1_000  # records that a model sees together when it is scored
_MOST_CLIENTS = 2_000


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
        "accountants": {"pld": _finite(statement.spending.pld), "rdp": _finite(statement.spending.rdp)},
        "event": events.to_dict(statement.event),
        "not_covered": [*statement.not_covered, *extra],
        "risk": meaning(statement).to_dict(),
    }


def curves_of(plan: Plan, name: str, steps: Sequence[Step]) -> dict[str, Any]:
    """Return the `curves` part of a result for one private run: epsilon, noise and what is left, at up to 64 of its steps."""
    shown = steps[:: max(1, len(steps) // _POINTS)]
    if steps and shown[-1] is not steps[-1]:
        shown = [*shown, steps[-1]]
    points = sorted({0, *(math.ceil(plan.steps * part / 16) for part in range(1, 17))})
    return {
        "epsilon_over_steps": {name: [(step, plan.epsilon_after(step)) for step in points]},
        "noise_over_steps": {name: [(step.index, step.noise_multiplier) for step in shown]},
        "left_over_steps": {name: [(step.index, min(1.0, step.left)) for step in shown]},
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


def rights_of(model: nn.Module, records: Records) -> Tensor:
    """Return which records the model puts into the right class, (n,) bool. The exact answers: under no budget."""
    was_training = model.training
    model.eval()
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with torch.no_grad():
        parts = [
            (model(features.to(device)).argmax(dim=1).cpu() == targets.cpu())
            for features, targets in zip(records.features.split(_AT_ONCE), records.targets.split(_AT_ONCE), strict=True)
        ]
    model.train(was_training)
    return torch.cat(parts)


def parts_of(
    population: Population,
    total: int,
    asked: Mapping[str, int],
    answered: Mapping[str, int],
    scored: Callable[[str, Records], tuple[float | None, float | None]],
) -> list[ClientPart]:
    """Return what each client held, did and got; of more than 2,000 clients, as many at even distances.

    Args:
        population: The clients; each of those returned is made once.
        total: How many records all clients hold together.
        asked: Rounds in which a client was asked, by name; 0 if it is missing.
        answered: Rounds in which it answered.
        scored: Called with a client's name and records; returns the accuracy of the shared and of its own model.
    """
    read = min(_MOST_CLIENTS, len(population))
    parts = []
    for place in range(read):
        index = place * len(population) // read
        name, records = population.name_at(index), population.at(index)
        shared, own = scored(name, records)
        parts.append(ClientPart(name, len(records) / total, asked.get(name, 0), answered.get(name, 0), shared, own))
    return parts


def ledger_extract(ledger: Ledger, dataset: str | None = None) -> dict[str, Any]:
    """Return the `ledger` part of a result: what was spent when on one data set or on all, and the digest of the whole."""
    fields = ("seq", "at", "kind", "dataset", "run", "epsilon", "delta", "purpose", "by")
    # Read once, so that the digest belongs to these very entries whoever writes meanwhile.
    entries = ledger.history()
    return {
        "path": "memory" if ledger.path is None else ledger.path.name,
        "digest": entries[-1].digest if entries else ledger.digest,
        "entries": [
            {name: getattr(entry, name) for name in fields} | _more(entry)
            for entry in entries
            if dataset in (None, entry.dataset)
        ],
    }


def _more(entry: Entry) -> dict[str, Any]:
    """Return what only some rows say: how a Renyi filter counts them, and whose share a grant caps."""
    renyi = {"renyi_order": entry.renyi_order, "rdp": entry.rdp} if entry.renyi_order else {}
    return renyi | ({"user": entry.user} if entry.user else {})


def describe_machine() -> str:
    """Return cores, processor family, Python and torch versions in one line."""
    return (
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
