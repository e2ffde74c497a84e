"""Four hospitals: each alone, together without a promise, and together with a promise to every patient.

    python examples/cross_silo.py

One split of 920 patients: two points more or less are chance.
"""

from functools import partial

import torch
from torch.nn.functional import cross_entropy

import sfumato as sf

training, test = sf.load("heart").split(0.66, seed=0)
hospitals = training.by_owner()  # name to Records; a hospital's records are used by its own work alone
sgd = partial(torch.optim.SGD, lr=0.2)


def fresh() -> torch.nn.Module:
    """Return a model with the same first weights every time."""
    torch.manual_seed(0)
    return torch.nn.Linear(training.features.shape[1], 2)


def show(what: str, models: dict[str, torch.nn.Module]) -> None:
    """Print how often the model of each hospital is right on that hospital's test records: exact, so under no promise."""
    right = {name: models[name](held.features).argmax(1) == held.targets for name, held in test.by_owner().items()}
    words = [f"{name} {float(found.double().mean()):.0%}" for name, found in right.items()]
    print(f"{what:24} {float(torch.cat([*right.values()]).double().mean()):.1%}   ({', '.join(words)})")


# Alone: a federation of one.
alone = {}
for name, records in hospitals.items():
    plain = sf.Plan.without_privacy(population=1, batch_size=1, steps=30, unit="client")
    algorithm, engine = sf.FedAvg(sgd, local_steps=5), sf.Simulation()
    own = sf.federate(fresh(), {name: records}, plain, algorithm=algorithm, engine=engine, loss=cross_entropy)
    alone[name] = own.model
show("alone", alone)

# Together without a promise. Hospitals differ, which pulls plain averages apart; SCAFFOLD corrects for it.
plain = sf.Plan.without_privacy(population=4, batch_size=4, steps=30, unit="client")
for algorithm in (sf.FedAvg(sgd, local_steps=5), sf.Scaffold(sgd, local_steps=5)):
    result = sf.federate(fresh(), hospitals, plain, algorithm=algorithm, engine=sf.Simulation(), loss=cross_entropy)
    show(type(algorithm).__name__, dict.fromkeys(hospitals, result.model))

# Together with a promise to every patient. Each hospital adds its part of the noise; one may be lost in a round.
plan = sf.Plan.calibrate(sf.Budget(epsilon=1.0, delta=1e-4), population=607, batch_size=607, steps=20, clip=1.0)
result = sf.federate(
    fresh(),
    hospitals,
    plan,
    algorithm=sf.FedSGD(partial(torch.optim.SGD, lr=0.5, momentum=0.9)),
    engine=sf.Simulation(drop_out=lambda step, name: step == 7 and name == "switzerland"),
    noise=sf.SharedNoise(tolerate=1),
    loss=cross_entropy,
)
show("FedSGD, epsilon 1", dict.fromkeys(hospitals, result.model))
print(result.privacy)
