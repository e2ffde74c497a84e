"""A made-up study: four hospitals, three budgets, training alone, pooled and federated."""

from __future__ import annotations

import copy
from typing import Any

from sfumato.privacy.budget import Relation, Unit
from sfumato.privacy.meaning import Meaning
from sfumato.privacy.tradeoff import TradeOff

HOSPITALS = ("cleveland", "hungary", "switzerland", "long-beach")
NOT_COVERED = (
    "The choice of hyper-parameters (learning rate, clip norm, steps) used the same data.",
    "Accuracy was measured on held-out real records without noise.",
)
# 20 Poisson-sampled Gaussian sums at rate 0.1 and noise 2: PLD 0.86673 and RDP 1.0 at delta 1e-4.
PLD = 0.8667246802204838
RDP = 1.0366
EVENT = {
    "type": "SelfComposedDpEvent",
    "count": 20,
    "event": {
        "type": "PoissonSampledDpEvent",
        "sampling_probability": 0.1,
        "event": {"type": "GaussianDpEvent", "noise_multiplier": 2.0},
    },
}


def privacy(epsilon: float = PLD, **changes: Any) -> dict[str, Any]:
    return {
        "epsilon": epsilon,
        "delta": 0.0001,
        "unit": "record",
        "relation": "add-or-remove-one",
        "noise_multiplier": 2.0,
        "clip_norm": 1.25,
        "sampling": {"kind": "poisson", "rate": 0.1},
        "steps": 20,
        "accountants": {"pld": epsilon, "rdp": epsilon * 1.19},
        "event": copy.deepcopy(EVENT),
        "not_covered": list(NOT_COVERED),
    } | changes


def risk(epsilon: float = PLD, delta: float = 0.0001) -> dict[str, Any]:
    curve = TradeOff((epsilon,), (delta,))
    return Meaning(epsilon, delta, Unit.RECORD, Relation.ADD_OR_REMOVE_ONE, curve, "pld").to_dict()


def run(name: str = "only", mode: str = "central-private", **changes: Any) -> dict[str, Any]:
    promise = privacy() if mode.endswith("-private") else None
    return {"name": name, "mode": mode, "seconds": 3.25, "metrics": {}, "privacy": promise} | changes


def accuracy(mean: float, sd: float = 0.0123) -> dict[str, Any]:
    values = [mean - sd, mean - sd / 3, mean, mean + sd / 3, mean + sd]
    shifts = (0.031, 0.012, -0.047, -0.029)
    owners = {name: round(mean + shift, 6) for name, shift in zip(HOSPITALS, shifts, strict=True)}
    return {"accuracy": {"mean": mean, "sd": sd, "seeds": 5, "per_owner": owners, "values": values}}


def study() -> dict[str, Any]:
    runs = [run("alone", "alone", seconds=1.5, metrics=accuracy(0.7421, 0.0202))]
    curves, noise, left, entries = {}, {}, {}, [_entry(1, "grant", 9.0, 0.0006, "cap for the study")]
    for mode, top in (("pooled", 0.8312), ("federated", 0.8274)):
        runs.append(run(mode, mode, seconds=4.125, metrics=accuracy(top, 0.0061)))
        for epsilon, loss in ((0.5, 0.0613), (1.0, 0.0291), (3.0, 0.0084)):
            name = f"{mode}, epsilon {epsilon:g}"
            promise = privacy(epsilon, noise_multiplier=round(8.1234 / epsilon, 5), risk=risk(epsilon))
            scores = accuracy(round(top - loss, 6), round(0.0312 - loss / 4, 6))
            runs.append(run(name, f"{mode}-private", seconds=6.5, metrics=scores, privacy=promise))
            curves[name] = [[step, epsilon * (step / 20) ** 0.5] for step in range(1, 21)]
            noise[name] = [[step, 8 / epsilon * (1.5 - step / 40)] for step in range(1, 21)]
            left[name] = [[step, 1 - (step / 20) ** 0.5] for step in range(1, 21)]
            seq = len(entries) + 1
            entries.append(_entry(seq, "charge", epsilon, 0.0001, f"train: {name}"))
    entries.append(_entry(len(entries) + 1, "lease", 0.0, 0.0, "20 draws"))
    return {
        "title": "Heart disease in four hospitals",
        "created": "2026-01-31T12:00:00+00:00",
        "version": "0.1.0",
        "machine": "2 CPU cores",
        "dataset": {
            "name": "heart",
            "owners": {"cleveland": 303, "hungary": 294, "switzerland": 123, "long-beach": None},
            "description": "Is a coronary artery narrowed? Thirteen clinical measurements per patient.",
        },
        "runs": runs,
        "ledger": {"path": "heart.ledger", "digest": "5b" * 32, "entries": entries},
        "curves": {"epsilon_over_steps": curves, "noise_over_steps": noise, "left_over_steps": left},
    }


def _entry(seq: int, kind: str, epsilon: float, delta: float, purpose: str) -> dict[str, Any]:
    return {
        "seq": seq,
        "at": f"2026-01-31T11:{seq:02d}:00+00:00",
        "kind": kind,
        "dataset": "heart",
        "run": f"{seq:032x}",
        "epsilon": epsilon,
        "delta": delta,
        "purpose": purpose,
        "by": "r.keller",
    }
