"""Each kind of clipping from the plan to the model: the bound holds, every way to train takes it, and it costs the same."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Mapping

import pytest
import torch
from helpers import LOSS, flat, sgd, toy_plan, toy_records
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sfumato as sf
from sfumato.data.population import Population
from sfumato.errors import CheckpointError, InputError
from sfumato.gradients.clipping import KINDS, Clipping
from sfumato.gradients.per_record import clipped_gradient_sum
from sfumato.learning.central import Central
from sfumato.learning.federated import Federation
from sfumato.learning.fedsgd import FedSGD

LOCAL = functools.partial(torch.optim.SGD, lr=0.1)


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


@functools.cache
def plan(kind: str, clip: float = 1.0, unit: str = "record") -> sf.Plan:
    count = 60 if unit == "record" else 3
    # Made by hand, which is quicker than finding the least noise.
    return sf.Plan(sf.Budget(2.0, 1e-3, unit=unit), sf.FullBatch(), clip, 4.0, 3, count, kind)


def vector(total: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.double().flatten() for tensor in total.values()])


def central(kind: str, clip: float, records: sf.Records) -> Central:
    model = network()
    return Central(model, records, plan(kind, clip), LOSS, sgd(model), sf.SeededSource(0), sf.Compute(), None)


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    clip=st.sampled_from([1e-3, 0.1, 1.0, 100.0]),
    record=st.integers(0, 59),
    size=st.floats(-20, 20),
)
def test_one_record_moves_the_sum_of_a_step_by_at_most_the_clip_norm(
    kind: str, clip: float, record: int, size: float
) -> None:
    usual = toy_records()
    features = usual.features.clone()
    features[record] *= 10**size
    procedure = central(kind, clip, sf.Records.from_arrays(features, usual.targets))
    everybody = torch.arange(60)
    whole = vector(procedure.sum(everybody).bounded.value)
    rest = vector(procedure.sum(everybody[everybody != record]).bounded.value)
    assert bool(torch.isfinite(whole).all())
    assert float((whole - rest).norm()) <= clip
    assert procedure.sum(everybody).bounded.norm_bound == clip


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_sums_what_the_oracle_sums(kind: str) -> None:
    records = toy_records()
    found = central(kind, 0.3, records).sum(torch.arange(60)).bounded
    right = clipped_gradient_sum(network(), LOSS, records.features, records.targets, clipping=Clipping(0.3, kind))
    assert torch.allclose(vector(found.value), vector(right.bounded.value), rtol=1e-5, atol=1e-6)
    assert float(vector(found.value).norm()) > 1


def test_the_kinds_are_different_sums() -> None:
    sums = [vector(central(kind, 0.5, toy_records()).sum(torch.arange(60)).bounded.value) for kind in KINDS]
    apart = [float((one - other).norm() / one.norm()) for one, other in itertools.combinations(sums, 2)]
    assert min(apart) > 0.005


@settings(max_examples=15, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    clip=st.sampled_from([1e-3, 0.1, 10.0]),
    client=st.integers(0, 2),
    size=st.floats(-20, 20),
)
def test_one_client_moves_the_sum_of_a_round_by_at_most_the_clip_norm(
    kind: str, clip: float, client: int, size: float
) -> None:
    usual = toy_records()
    features = usual.features.clone()
    features[usual.owner_codes == client] *= 10**size
    records = sf.Records.from_arrays(features, usual.targets, (usual.owner_names, usual.owner_codes))
    federation = Federation(
        network(),
        Population.of(records.by_owner()),
        plan(kind, clip, "client"),
        LOSS,
        sf.Simulation(),
        sf.SeededSource(0),
    )
    parts = FedSGD(LOCAL).procedure(federation, sf.LocalNoise()).contributions(0)
    assert set(parts) == set(records.owner_names)
    for part in parts.values():
        assert float(vector(part.bounded.value).norm()) <= clip
        assert part.bounded.norm_bound == clip
    whole = FedSGD(LOCAL).procedure(federation, sf.ServerNoise()).contributions(0)["all"].bounded
    together = torch.stack([vector(part.bounded.value) for part in parts.values()]).sum(0)
    assert whole.norm_bound == clip
    assert torch.allclose(vector(whole.value), together, rtol=1e-6, atol=1e-6 * clip)


@pytest.mark.parametrize("kind", KINDS)
def test_training_for_records_takes_each_kind(kind: str) -> None:
    records, model = toy_records(), network()
    before = flat(model).clone()
    result = sf.train(model, records, plan(kind), loss=LOSS, optimizer=sgd(model))
    assert 0 < result.privacy.epsilon <= 2
    assert len(result.steps) == 3
    assert not torch.equal(flat(model), before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", [sf.FedSGD(LOCAL), sf.FedAvg(LOCAL, local_steps=2)], ids=["FedSGD", "FedAvg"])
@pytest.mark.parametrize("unit", ["record", "client"])
def test_federations_take_each_kind(unit: str, algorithm: sf.FedSGD | sf.FedAvg, kind: str) -> None:
    records, model = toy_records(), network()
    before = flat(model).clone()
    result = sf.federate(
        model, records.by_owner(), plan(kind, 1.0, unit), algorithm=algorithm, engine=sf.Simulation(), loss=LOSS,
        populations=dict.fromkeys(records.owner_names, 20),
    )  # fmt: skip
    assert 0 < result.privacy.epsilon <= 2
    assert f"one {unit}" in str(result.privacy)
    assert not torch.equal(flat(model), before)


@pytest.mark.parametrize("kind", KINDS)
def test_federated_and_pooled_training_are_the_same_with_each_kind(kind: str) -> None:
    records, pooled, federated = toy_records(), network(), network()
    sf.train(pooled, records, plan(kind), loss=LOSS, optimizer=LOCAL(pooled.parameters()), source=sf.SeededSource(7))
    sf.federate(
        federated, records.by_owner(), plan(kind), algorithm=sf.FedSGD(LOCAL), engine=sf.Simulation(), loss=LOSS,
        source=sf.SeededSource(7),
    )  # fmt: skip
    assert torch.allclose(flat(pooled), flat(federated), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_training_with_little_noise_learns_with_each_kind(kind: str) -> None:
    records, model = toy_records(), network()
    loud = sf.Plan(sf.Budget(30.0, 1e-3), sf.FullBatch(), 0.5, 1.0, 8, 60, kind)
    sf.train(model, records, loud, loss=LOSS, optimizer=sgd(model, 3.0))
    assert float((model(records.features).argmax(1) == records.targets).float().mean()) > 0.75


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_tells_its_kind(kind: str) -> None:
    made = plan(kind)
    assert made.clipping == kind
    assert made.terms(0).clipping == Clipping(1.0, kind)
    assert made.describe()["clipping"] == kind
    assert json.loads(made.fingerprint())["clipping"] == kind


def test_plans_that_differ_in_the_kind_alone_have_different_fingerprints() -> None:
    assert len({plan(kind).fingerprint() for kind in KINDS}) == len(KINDS)
    assert plan("flat").fingerprint() == dataclasses.replace(plan("normalised"), clipping="flat").fingerprint()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unit", ["record", "client"])
def test_the_kind_costs_nothing(unit: str, kind: str) -> None:
    count = 60 if unit == "record" else 3
    usual, made = (toy_plan(2.0, count, count, 1, unit=unit, clipping=one) for one in ("flat", kind))
    assert (made.noise_multiplier, made.spending, made.event) == (usual.noise_multiplier, usual.spending, usual.event)


def test_flat_is_the_default() -> None:
    assert toy_plan(steps=1).clipping == "flat"


@pytest.mark.parametrize("kind", ["Flat", "per_layer", "normalized", "", "none"])
def test_an_unknown_kind_is_refused_with_the_known_ones(kind: str) -> None:
    with pytest.raises(InputError, match=r'There is no clipping ".*(flat|per-layer|normalised)"'):
        toy_plan(steps=1, clipping=kind)
    with pytest.raises(InputError, match="There is no clipping"):
        dataclasses.replace(plan("flat"), clipping=kind)


def test_a_plan_without_privacy_clips_nothing_whatever_the_kind() -> None:
    models = []
    for kind in KINDS:
        model = network()
        free = sf.Plan.calibrate(sf.Budget(math.inf), population=60, batch_size=60, steps=3, clipping=kind)
        sf.train(model, toy_records(), free, loss=LOSS, optimizer=sgd(model))
        models.append(flat(model))
    assert torch.equal(models[0], models[1])
    assert torch.equal(models[0], models[2])


def test_a_checkpoint_does_not_go_on_with_another_kind(tmp_path: object) -> None:
    folder = str(tmp_path)
    with sf.Ledger(f"{folder}/ledger.sqlite") as ledger:
        ledger.grant("toy", sf.Budget(10.0, 1e-2))
        model = network()
        started = copy.deepcopy(model)
        sf.train(
            model, toy_records(), plan("flat"), loss=LOSS, optimizer=sgd(model), ledger=ledger,
            checkpoint=sf.Checkpoint(f"{folder}/run.pt", 1),
        )  # fmt: skip
        with pytest.raises(CheckpointError, match="another plan"):
            sf.train(
                started, toy_records(), plan("per-layer"), loss=LOSS, optimizer=sgd(started), ledger=ledger,
                checkpoint=sf.Checkpoint(f"{folder}/run.pt", 1, resume=True),
            )  # fmt: skip
