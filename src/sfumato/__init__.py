"""sfumato: declare a privacy budget; train, on one machine or across many; release; prove what was spent."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sfumato._version import __version__

if TYPE_CHECKING:
    from sfumato.data import partitions
    from sfumato.data.allocated import RandomAllocation
    from sfumato.data.participation import MinSeparation
    from sfumato.data.population import Population
    from sfumato.data.records import Records
    from sfumato.data.sampling import FullBatch, Poisson, Sampler, Shuffled
    from sfumato.data.sources import load
    from sfumato.data.truncated import TruncatedPoisson
    from sfumato.engines.simulation import Simulation
    from sfumato.errors import SfumatoError
    from sfumato.gradients.compute import Compute
    from sfumato.gradients.explain import explain
    from sfumato.learning.adaptive_clip import AdaptiveClip
    from sfumato.learning.aggregation import LocalNoise, ServerNoise, SharedNoise
    from sfumato.learning.api import federate, rounds, steps, train
    from sfumato.learning.checkpoint import Checkpoint
    from sfumato.learning.controlled import FedNova, Scaffold
    from sfumato.learning.correlated import CorrelatedNoise
    from sfumato.learning.evaluation import Evaluation, evaluate
    from sfumato.learning.fedavg import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi
    from sfumato.learning.fedsgd import FedSGD
    from sfumato.learning.personal import Ditto, FedPer
    from sfumato.learning.plan import Plan
    from sfumato.learning.policies import (
        Decay,
        Outlook,
        PublicPolicy,
        ReleasedPolicy,
        Signal,
        SignalToNoise,
        SpendEvenly,
        StopWhenFlat,
    )
    from sfumato.learning.stopping import FirstOf, Plateau, Rounds, Target
    from sfumato.learning.training import Step, TrainingResult
    from sfumato.learning.trials import Trial
    from sfumato.learning.tuning import Tuned, tune
    from sfumato.learning.weighting import ByRecords, Uniform, UpTo
    from sfumato.privacy.accounts import Balance
    from sfumato.privacy.budget import Budget, Relation, Unit
    from sfumato.privacy.ledger import Ledger
    from sfumato.privacy.meaning import Meaning, meaning
    from sfumato.privacy.randomness import SecureSource, SeededSource
    from sfumato.privacy.risk import RiskCalibration, calibrate_to_risk
    from sfumato.privacy.schedules import Constant, Cosine, Exponential, Linear, Listed, Schedule, Stepwise
    from sfumato.privacy.statement import PrivacyStatement
    from sfumato.privacy.tradeoff import TradeOff, trade_off

# Public names are imported when they are first used, so that the command line answers without loading torch.
_HOMES = {
    "AdaptiveClip": "sfumato.learning.adaptive_clip",
    "Balance": "sfumato.privacy.accounts",
    "Budget": "sfumato.privacy.budget",
    "ByRecords": "sfumato.learning.weighting",
    "Checkpoint": "sfumato.learning.checkpoint",
    "Compute": "sfumato.gradients.compute",
    "Constant": "sfumato.privacy.schedules",
    "CorrelatedNoise": "sfumato.learning.correlated",
    "Cosine": "sfumato.privacy.schedules",
    "Decay": "sfumato.learning.policies",
    "Ditto": "sfumato.learning.personal",
    "Evaluation": "sfumato.learning.evaluation",
    "Exponential": "sfumato.privacy.schedules",
    "FedAdagrad": "sfumato.learning.fedavg",
    "FedAdam": "sfumato.learning.fedavg",
    "FedAvg": "sfumato.learning.fedavg",
    "FedAvgM": "sfumato.learning.fedavg",
    "FedNova": "sfumato.learning.controlled",
    "FedPer": "sfumato.learning.personal",
    "FedProx": "sfumato.learning.fedavg",
    "FedSGD": "sfumato.learning.fedsgd",
    "FedYogi": "sfumato.learning.fedavg",
    "FirstOf": "sfumato.learning.stopping",
    "FullBatch": "sfumato.data.sampling",
    "Ledger": "sfumato.privacy.ledger",
    "Linear": "sfumato.privacy.schedules",
    "Listed": "sfumato.privacy.schedules",
    "LocalNoise": "sfumato.learning.aggregation",
    "Meaning": "sfumato.privacy.meaning",
    "MinSeparation": "sfumato.data.participation",
    "Outlook": "sfumato.learning.policies",
    "Plan": "sfumato.learning.plan",
    "Plateau": "sfumato.learning.stopping",
    "Poisson": "sfumato.data.sampling",
    "Population": "sfumato.data.population",
    "PrivacyStatement": "sfumato.privacy.statement",
    "PublicPolicy": "sfumato.learning.policies",
    "RandomAllocation": "sfumato.data.allocated",
    "Records": "sfumato.data.records",
    "Relation": "sfumato.privacy.budget",
    "ReleasedPolicy": "sfumato.learning.policies",
    "RiskCalibration": "sfumato.privacy.risk",
    "Rounds": "sfumato.learning.stopping",
    "Sampler": "sfumato.data.sampling",
    "Scaffold": "sfumato.learning.controlled",
    "Schedule": "sfumato.privacy.schedules",
    "SecureSource": "sfumato.privacy.randomness",
    "SeededSource": "sfumato.privacy.randomness",
    "ServerNoise": "sfumato.learning.aggregation",
    "SfumatoError": "sfumato.errors",
    "SharedNoise": "sfumato.learning.aggregation",
    "Shuffled": "sfumato.data.sampling",
    "Signal": "sfumato.learning.policies",
    "SignalToNoise": "sfumato.learning.policies",
    "Simulation": "sfumato.engines.simulation",
    "SpendEvenly": "sfumato.learning.policies",
    "Step": "sfumato.learning.training",
    "Stepwise": "sfumato.privacy.schedules",
    "StopWhenFlat": "sfumato.learning.policies",
    "Target": "sfumato.learning.stopping",
    "TradeOff": "sfumato.privacy.tradeoff",
    "TrainingResult": "sfumato.learning.training",
    "Trial": "sfumato.learning.trials",
    "TruncatedPoisson": "sfumato.data.truncated",
    "Tuned": "sfumato.learning.tuning",
    "Uniform": "sfumato.learning.weighting",
    "Unit": "sfumato.privacy.budget",
    "UpTo": "sfumato.learning.weighting",
    "calibrate_to_risk": "sfumato.privacy.risk",
    "evaluate": "sfumato.learning.evaluation",
    "explain": "sfumato.gradients.explain",
    "federate": "sfumato.learning.api",
    "load": "sfumato.data.sources",
    "meaning": "sfumato.privacy.meaning",
    "rounds": "sfumato.learning.api",
    "steps": "sfumato.learning.api",
    "trade_off": "sfumato.privacy.tradeoff",
    "train": "sfumato.learning.api",
    "tune": "sfumato.learning.tuning",
}

__all__ = [
    "AdaptiveClip",
    "Balance",
    "Budget",
    "ByRecords",
    "Checkpoint",
    "Compute",
    "Constant",
    "CorrelatedNoise",
    "Cosine",
    "Decay",
    "Ditto",
    "Evaluation",
    "Exponential",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedNova",
    "FedPer",
    "FedProx",
    "FedSGD",
    "FedYogi",
    "FirstOf",
    "FullBatch",
    "Ledger",
    "Linear",
    "Listed",
    "LocalNoise",
    "Meaning",
    "MinSeparation",
    "Outlook",
    "Plan",
    "Plateau",
    "Poisson",
    "Population",
    "PrivacyStatement",
    "PublicPolicy",
    "RandomAllocation",
    "Records",
    "Relation",
    "ReleasedPolicy",
    "RiskCalibration",
    "Rounds",
    "Sampler",
    "Scaffold",
    "Schedule",
    "SecureSource",
    "SeededSource",
    "ServerNoise",
    "SfumatoError",
    "SharedNoise",
    "Shuffled",
    "Signal",
    "SignalToNoise",
    "Simulation",
    "SpendEvenly",
    "Step",
    "Stepwise",
    "StopWhenFlat",
    "Target",
    "TradeOff",
    "TrainingResult",
    "Trial",
    "TruncatedPoisson",
    "Tuned",
    "Uniform",
    "Unit",
    "UpTo",
    "__version__",
    "calibrate_to_risk",
    "evaluate",
    "explain",
    "federate",
    "load",
    "meaning",
    "partitions",
    "rounds",
    "steps",
    "trade_off",
    "train",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name == "partitions":  # a module of functions, as it is
        return importlib.import_module("sfumato.data.partitions")
    if name not in _HOMES:
        raise AttributeError(f"module 'sfumato' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *_HOMES, "partitions"]
