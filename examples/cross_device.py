"""100,000 phones, each protected with all that it holds. A phone is made when it is asked, so memory stays small.

python examples/cross_device.py
"""

import random
from functools import partial

import torch
from torch.nn.functional import cross_entropy

import sfumato as sf

PHONES, FEATURES, CLASSES = 100_000, 20, 4
truth = torch.randn(FEATURES, CLASSES, generator=torch.Generator().manual_seed(1))


def phone(number: int) -> sf.Records:
    """Make the same records every time: few or many, and of people who differ."""
    generator = torch.Generator().manual_seed(number)
    whose = torch.randn(FEATURES, generator=generator) / 2
    features = whose + torch.randn(5 + number % 26, FEATURES, generator=generator)
    return sf.Records(features, (features @ truth).argmax(1))


phones = sf.Population.from_factory(PHONES, phone, name="phone", version="1")
public = [phone(PHONES + number) for number in range(200)]  # people who are not in the federation
features, targets = torch.cat([one.features for one in public]), torch.cat([one.targets for one in public])

# Who is asked is drawn anew in every round, each phone with the same chance: what the plan accounts for is what is done.
plan = sf.Plan.calibrate(
    sf.Budget(epsilon=2.0, delta=1e-6, unit="client"),
    population=PHONES,
    batch_size=500,  # the expected cohort
    steps=60,
    clip=0.1,  # of a phone's whole update, to begin with
    clips=sf.AdaptiveClip(quantile=0.5),  # follows the median update, learnt within the same release
)

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(FEATURES, 32), torch.nn.Tanh(), torch.nn.Linear(32, CLASSES))
rounds = sf.rounds(
    model,
    phones,
    plan,
    algorithm=sf.FedAvgM(partial(torch.optim.SGD, lr=0.2), local_epochs=1, batch_size=10),
    # One phone in five does not answer, whatever it holds. The noise stays whole: the server adds it.
    engine=sf.Simulation(drop_out=lambda step, name: random.Random(f"{step} {name}").random() < 0.2),
    loss=cross_entropy,
    quorum=250,  # fewer answers, and the round releases nothing
)
for step in rounds:
    if step.index % 10 == 0:
        right = float((model(features).argmax(1) == targets).double().mean())
        print(f"round {step.index}: epsilon {step.epsilon:.2f}, clip norm {step.clip_norm:.3f}, accuracy {right:.1%}")
print(rounds.result().privacy)
