"""sfumato: declare a privacy budget; train, on one machine or across many; release; prove what was spent."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sfumato._version import __version__

if TYPE_CHECKING:
    from sfumato.data.records import Records
    from sfumato.data.sampling import FullBatch, Poisson, Sampler, Shuffled
    from sfumato.data.sources import load
    from sfumato.engines.simulation import Simulation
    from sfumato.errors import SfumatoError
    from sfumato.gradients.compute import Compute
    from sfumato.gradients.explain import explain
    from sfumato.learning.aggregation import LocalNoise, ServerNoise, SharedNoise
    from sfumato.learning.api import federate, rounds, steps, train
    from sfumato.learning.checkpoint import Checkpoint
    from sfumato.learning.fedavg import FedAvg
    from sfumato.learning.fedsgd import FedSGD
    from sfumato.learning.plan import Plan
    from sfumato.learning.training import Step, TrainingResult
    from sfumato.privacy.budget import Budget, Relation, Unit
    from sfumato.privacy.ledger import Ledger
    from sfumato.privacy.randomness import SecureSource, SeededSource
    from sfumato.privacy.statement import PrivacyStatement

# Public names are imported when they are first used, so that the command line answers without loading torch.
_HOMES = {
    "Budget": "sfumato.privacy.budget",
    "Checkpoint": "sfumato.learning.checkpoint",
    "Compute": "sfumato.gradients.compute",
    "FedAvg": "sfumato.learning.fedavg",
    "FedSGD": "sfumato.learning.fedsgd",
    "FullBatch": "sfumato.data.sampling",
    "Ledger": "sfumato.privacy.ledger",
    "LocalNoise": "sfumato.learning.aggregation",
    "Plan": "sfumato.learning.plan",
    "Poisson": "sfumato.data.sampling",
    "PrivacyStatement": "sfumato.privacy.statement",
    "Records": "sfumato.data.records",
    "Relation": "sfumato.privacy.budget",
    "Sampler": "sfumato.data.sampling",
    "SecureSource": "sfumato.privacy.randomness",
    "SeededSource": "sfumato.privacy.randomness",
    "ServerNoise": "sfumato.learning.aggregation",
    "SfumatoError": "sfumato.errors",
    "SharedNoise": "sfumato.learning.aggregation",
    "Shuffled": "sfumato.data.sampling",
    "Simulation": "sfumato.engines.simulation",
    "Step": "sfumato.learning.training",
    "TrainingResult": "sfumato.learning.training",
    "Unit": "sfumato.privacy.budget",
    "explain": "sfumato.gradients.explain",
    "federate": "sfumato.learning.api",
    "load": "sfumato.data.sources",
    "rounds": "sfumato.learning.api",
    "steps": "sfumato.learning.api",
    "train": "sfumato.learning.api",
}

__all__ = [
    "Budget",
    "Checkpoint",
    "Compute",
    "FedAvg",
    "FedSGD",
    "FullBatch",
    "Ledger",
    "LocalNoise",
    "Plan",
    "Poisson",
    "PrivacyStatement",
    "Records",
    "Relation",
    "Sampler",
    "SecureSource",
    "SeededSource",
    "ServerNoise",
    "SfumatoError",
    "SharedNoise",
    "Shuffled",
    "Simulation",
    "Step",
    "TrainingResult",
    "Unit",
    "__version__",
    "explain",
    "federate",
    "load",
    "rounds",
    "steps",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sfumato' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
