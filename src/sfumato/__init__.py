"""sfumato: declare a privacy budget; train, on one machine or across many; release; prove what was spent."""

from __future__ import annotations

from sfumato.data.records import Records
from sfumato.data.sampling import FullBatch, Poisson, Sampler, Shuffled
from sfumato.data.sources import load
from sfumato.engines.simulation import Simulation
from sfumato.errors import SfumatoError
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

__version__ = "0.1.0"

__all__ = [
    "Budget",
    "Checkpoint",
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
    "federate",
    "load",
    "rounds",
    "steps",
    "train",
]
