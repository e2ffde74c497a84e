"""Which client an error names, and which one the self-check of the first step asks."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from helpers import LOSS
from torch import nn

import sfumato as sf
from sfumato.errors import SelfCheckError, UnsupportedModelError
from sfumato.learning import selfcheck
from sfumato.learning import training as loop
from sfumato.learning.federated import Algorithm
from sfumato.learning.training import Training

SGD = functools.partial(torch.optim.SGD, lr=0.1)
SIZES = dict.fromkeys((f"site-{row}" for row in range(4)), 5)
KINDS: dict[str, tuple[Algorithm, str]] = {
    "rounds of clients": (sf.FedAvg(SGD), "client"),
    "sums of records": (sf.FedSGD(SGD), "record"),
    "steps of records": (sf.FedAvg(SGD), "record"),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def with_a_wrong_target(bad: str) -> dict[str, sf.Records]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: sf.Records(
            torch.randn(size, 3, generator=generator),
            torch.full((size,), 9) if name == bad else torch.randint(0, 2, (size,), generator=generator),
        )
        for name, size in SIZES.items()
    }


def begun(kind: str, bad: str, engine: sf.Simulation, private: bool = True) -> Training:
    algorithm, unit = KINDS[kind]
    count = 4 if unit == "client" else 20
    plan = sf.Plan.without_privacy(population=count, batch_size=count, steps=2, unit=unit)
    if private:
        plan = sf.Plan(sf.Budget(50.0, 1e-3, unit=unit), sf.FullBatch(), 1.0, 2.0, 3, count)
    populations = SIZES if private and kind == "steps of records" else None
    return sf.rounds(
        nn.Linear(3, 2), with_a_wrong_target(bad), plan, algorithm=algorithm, engine=engine, loss=LOSS,
        populations=populations,
    )  # fmt: skip


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_an_error_names_the_client(kind: str, private: bool) -> None:
    with pytest.raises(UnsupportedModelError, match=r'^Client "site-2", step 1: '):
        next(begun(kind, "site-2", sf.Simulation(), private))


@pytest.mark.parametrize("kind", KINDS)
def test_the_self_check_asks_a_client_that_answered(kind: str) -> None:
    engine = sf.Simulation(drop_out=lambda step, name: name == "site-0")
    assert len(list(begun(kind, "site-0", engine))) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_the_self_check_waits_for_a_client_that_answers(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    units: list[bool] = []

    def watched(names: object, parts: object, probe: object) -> None:
        units.append(probe is not None)
        selfcheck.check_bounded(names, parts, probe)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "check_bounded", watched)
    training = begun(kind, "nobody", sf.Simulation(drop_out=lambda step, name: step == 0))
    assert len(list(training)) == 3
    assert units == [False, True]


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_above_its_bound_is_found_in_whoever_answers_first(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    training = begun(kind, "nobody", sf.Simulation(drop_out=lambda step, name: step == 0))
    next(training)
    procedure = training._procedure
    honest = type(procedure).probe

    def forged(self: object) -> object:
        part = honest(self)  # type: ignore[arg-type]
        assert part is not None
        return type(part)({name: value + 10 for name, value in part.value.items()}, part.norm_bound)

    monkeypatch.setattr(type(procedure), "probe", forged)
    with pytest.raises(SelfCheckError, match="above the clip norm"):
        next(training)
