"""Partitions: every record once, repeatable, as skewed as they say, and refused in one sentence."""

import dataclasses
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from sfumato.data import partitions
from sfumato.data.partitions import Partition, by_feature, by_owner, dirichlet, feature_noise, iid, quantity, shards
from sfumato.data.records import Records
from sfumato.errors import InputError


def refused(action, *parts):
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def numbered(n, classes=3, **declared):
    """Record i has the features (i, -i) and the class i % classes."""
    x = [[float(i), -float(i)] for i in range(n)]
    return Records.from_arrays(x, [i % classes for i in range(n)], name="ward", **declared)


def held(partition):
    return [partition.indices(i).tolist() for i in range(len(partition))]


MAKERS = {
    "iid": lambda records, clients, seed, alpha: iid(records, clients, seed),
    "dirichlet": lambda records, clients, seed, alpha: dirichlet(records, clients, alpha, seed),
    "shards": lambda records, clients, seed, alpha: shards(
        records, clients, max(1, len(records) // clients // 2), seed
    ),
    "quantity": lambda records, clients, seed, alpha: quantity(records, clients, alpha, seed),
    "feature_noise": lambda records, clients, seed, alpha: feature_noise(records, clients, alpha, seed),
    "by_feature": lambda records, clients, seed, alpha: by_feature(records, clients, 1),
}
SEEDED = sorted(set(MAKERS) - {"by_feature"})
ALPHAS = st.sampled_from([1e-4, 0.01, 0.3, 1.0, 50.0])


@settings(deadline=None)
@given(st.sampled_from(sorted(MAKERS)), st.integers(1, 60), st.integers(1, 60), st.integers(0, 2**70), ALPHAS)
def test_every_record_has_one_holder_and_every_client_a_record(kind, n, clients, seed, alpha):
    assume(clients <= n)
    records = numbered(n)
    partition = MAKERS[kind](records, clients, seed, alpha)
    parts = held(partition)
    assert len(partition) == len(parts) == clients
    assert sorted(index for part in parts for index in part) == list(range(n))
    assert all(part and part == sorted(part) for part in parts)
    for i, part in enumerate(parts):
        client = partition.at(i)
        assert torch.equal(client.targets, records.targets[part])
        assert client.features.shape == (len(part), 2)
        if kind != "feature_noise":
            assert torch.equal(client.features, records.features[part])
    assert partition.records is records


@pytest.mark.parametrize("kind", sorted(MAKERS))
def test_the_seed_decides_and_no_global_state_is_touched(kind):
    records = numbered(200, classes=7)
    before = (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate())
    one, again, other = (MAKERS[kind](records, 8, seed, 0.5) for seed in (3, 3, 4))
    for i in range(8):
        assert torch.equal(one.at(i).features, again.at(i).features)
    assert (torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()) == before
    assert held(one) == held(again)
    assert one.identity() == again.identity()
    if kind in SEEDED:
        assert held(one) != held(other)
        assert one.identity() != other.identity()


@settings(deadline=None)
@given(st.integers(1, 80), st.integers(1, 80))
def test_even_parts_differ_by_one_record_at_most(n, clients):
    assume(clients <= n)
    for partition in (iid(numbered(n), clients, 1), by_feature(numbered(n), clients, 0)):
        sizes = [len(part) for part in held(partition)]
        assert max(sizes) - min(sizes) <= 1


def test_iid_is_no_skew():
    # 10 clients of 3,000 records: a class's share has a standard deviation of 0.0081.
    partition = iid(numbered(30_000), 10, seed=1)
    for i in range(10):
        shares = torch.bincount(partition.at(i).targets, minlength=3) / 3_000
        assert (shares - 1 / 3).abs().max() < 0.05


# The skew is as strong as alpha says: for shares p of a symmetric Dirichlet distribution over k clients,
# E sum p^2 = (alpha + 1) / (k alpha + 1).


def _expected(alpha, clients):
    return (alpha + 1) / (clients * alpha + 1)


def _is_skewed_by(found, alpha, clients):
    return abs(found / _expected(alpha, clients) - 1) < 0.06


@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_dirichlet_skews_labels_by_alpha(alpha):
    classes, each, clients = 500, 400, 10
    partition = dirichlet(numbered(classes * each, classes), clients, alpha, seed=5)
    counts = torch.stack([torch.bincount(partition.at(i).targets, minlength=classes) for i in range(clients)])
    assert counts.sum(0).tolist() == [each] * classes
    found = float(((counts / each) ** 2).sum(0).mean())
    assert _is_skewed_by(found, alpha, clients)
    assert not _is_skewed_by(found, alpha * 2 / 3, clients)
    assert not _is_skewed_by(found, alpha * 3 / 2, clients)


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_quantity_skews_sizes_by_alpha(alpha):
    clients, records = 10, numbered(4_000)
    found = [
        sum((len(part) / 4_000) ** 2 for part in held(quantity(records, clients, alpha, seed))) for seed in range(600)
    ]
    mean = sum(found) / len(found)
    assert _is_skewed_by(mean, alpha, clients)
    assert not _is_skewed_by(mean, alpha * 2 / 3, clients)
    assert not _is_skewed_by(mean, alpha * 3 / 2, clients)


def test_quantity_keeps_the_mix_of_classes():
    partition = quantity(numbered(30_000), 5, 1.0, seed=2, minimum=2_000)
    for i in range(5):
        client = partition.at(i)
        assert (torch.bincount(client.targets, minlength=3) / len(client) - 1 / 3).abs().max() < 0.07


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(0, 8), st.integers(0, 40), st.integers(0, 2**32), ALPHAS)
def test_the_minimum_is_kept(clients, minimum, spare, seed, alpha):
    records = numbered(clients * max(minimum, 1) + spare)
    for make in (dirichlet, quantity):
        if minimum:
            sizes = [len(part) for part in held(make(records, clients, alpha, seed, minimum))]
            assert min(sizes) >= minimum
        else:
            refused(lambda make=make: make(records, clients, alpha, seed, minimum), "minimum")


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 20), st.data())
def test_filling_takes_no_more_than_is_lacking_and_from_the_largest(clients, minimum, spare, data):
    n = clients * minimum + spare
    before = np.array(data.draw(st.lists(st.integers(0, clients - 1), min_size=n, max_size=n)))
    after = partitions._filled(np.random.default_rng(0), before, clients, minimum)
    old, new = np.bincount(before, minlength=clients), np.bincount(after, minlength=clients)
    assert (before != after).sum() == np.maximum(minimum - old, 0).sum()
    assert new.min() >= minimum
    assert (new[old <= minimum] == minimum).all()
    # Who gave is level with the others who gave, to one record, and above who did not have to.
    gave = new < old
    if gave.any():
        assert new[gave].max() - new[gave].min() <= 1
        assert new[~gave].max() <= new[gave].max() + 1
    assert (np.bincount(before[before != after], minlength=clients) == np.maximum(old - new, 0)).all()


def test_shards_give_clients_few_classes():
    # 10 classes of 60 in 20 shards of 30: each shard is of one class.
    partition = shards(numbered(600, classes=10), 10, 2, seed=0)
    for i in range(10):
        client = partition.at(i)
        assert len(client) == 60
        assert len(client.targets.unique()) <= 2
    assert any(len(partition.at(i).targets.unique()) == 2 for i in range(10))


def test_numbers_can_be_cut_into_shards_but_not_skewed_by_class():
    records = Records.from_arrays([[float(i)] for i in range(8)], [7.0 - i for i in range(8)])
    assert sorted(held(shards(records, 4, 1, 0))) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    refused(lambda: dirichlet(records, 2, 1.0, 0), "needs classes", "quantity")


def test_classes_may_have_any_numbers():
    records = Records.from_arrays([[0.0]] * 6, [-100, 7, 7, 2**40, -100, 7])
    assert sorted(index for part in held(dirichlet(records, 3, 1.0, 0)) for index in part) == list(range(6))


# Noise on features


def _looks_like(noise, scale):
    # 40,000 numbers: the standard deviation of their spread is scale / 283, so 3 % are eight of these.
    return abs(float(noise.std()) / scale - 1) < 0.03 and abs(float(noise.mean())) < 0.03 * scale


def test_each_client_has_the_noise_of_its_number():
    records = Records(torch.zeros(400, 400), torch.zeros(400, dtype=torch.int64))
    partition = feature_noise(records, 4, 2.0, seed=9)
    drawn = [partition.at(i).features for i in range(4)]
    for i, noise in enumerate(drawn):
        scale = 2.0 * (i + 1) / 4
        assert _looks_like(noise, scale)
        assert not _looks_like(noise, scale * 2 / 3)
        assert not _looks_like(noise, scale * 3 / 2)
        assert torch.equal(partition.at(i).features, noise)
    unit = [noise.flatten() / noise.std() for noise in drawn]
    for i in range(4):
        for j in range(i):
            # Independent: their correlation has a standard deviation of 1 / 200.
            assert abs(float((unit[i] * unit[j]).mean())) < 0.04
    assert records.features.abs().max() == 0
    assert not torch.equal(feature_noise(records, 4, 2.0, seed=10).at(3).features, drawn[3])


def test_no_noise_is_iid():
    records = numbered(20)
    quiet = feature_noise(records, 4, 0.0, seed=3)
    assert held(quiet) == held(iid(records, 4, seed=3))
    assert torch.equal(quiet.at(2).features, records.features[quiet.indices(2)])
    whole = Records.from_arrays([[1], [2]], [0, 1])
    refused(lambda: feature_noise(whole, 2, 1.0, 0), "floating features")


# By feature, by owner, by hand


def test_by_feature_sorts_by_name_or_number():
    records = numbered(10, feature_names=["up", "down"])
    assert held(by_feature(records, 2, "up")) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    assert held(by_feature(records, 2, "down")) == held(by_feature(records, 2, 1)) == [[5, 6, 7, 8, 9], [0, 1, 2, 3, 4]]
    refused(lambda: by_feature(records, 2, "dwon"), '"dwon"', 'Did you mean "down"?')
    refused(lambda: by_feature(records, 2, 2), "column must be below 2")
    refused(lambda: by_feature(records, 2, -1), "column")
    refused(lambda: by_feature(numbered(4), 2, "up"), 'no feature is called "up"')
    refused(lambda: by_feature(Records.from_arrays(torch.zeros(4, 2, 2), [0] * 4), 2, 0), "(n, features)")


def test_equal_values_stay_in_their_order():
    records = Records.from_arrays([[1.0], [0.0], [1.0], [0.0]], [0, 1, 2, 3])
    assert held(by_feature(records, 2, 0)) == [[1, 3], [0, 2]]


@settings(deadline=None)
@given(st.lists(st.sampled_from(["east", "west", "north"]), min_size=1))
def test_by_owner_gives_what_records_give(owners):
    names = list(dict.fromkeys(owners))
    records = numbered(len(owners), owners=owners)
    partition, whole = by_owner(records), records.by_owner()
    assert list(partition) == list(whole) == names
    for name in names:
        assert torch.equal(partition[name].features, whole[name].features)
        assert torch.equal(partition[name].targets, whole[name].targets)
        assert partition[name].name == whole[name].name == f"ward/{name}"
        assert [records.owner_names[code] for code in partition[name].owner_codes] == [name] * len(whole[name])


def test_owners_that_cannot_be():
    refused(lambda: by_owner(numbered(3)), "no owners")
    bare = numbered(3, owners=(["east", "west"], [0, 0, 0]))
    refused(lambda: by_owner(bare), 'client "west" has no records', "owners")
    refused(lambda: by_owner(numbered(1, owners=["all"])), '"all"')


def test_a_client_keeps_the_declarations_and_a_run_is_not_copied():
    plain = numbered(6, owners=list("aabbab"), feature_names=["x", "y"])
    records = dataclasses.replace(plain, classes=("0", "1", "2"))
    partition = Partition(records, torch.tensor([0, 0, 0, 1, 2, 1]), names=["u", "v", "w"])
    assert held(partition) == [[0, 1, 2], [3, 5], [4]]
    run, apart = partition["u"], partition["v"]
    assert run.features.data_ptr() == records.features.data_ptr()
    assert apart.features.tolist() == [[3.0, -3.0], [5.0, -5.0]]
    assert apart.owner_codes.tolist() == [1, 1]
    assert (apart.name, apart.classes, apart.feature_names) == ("ward/v", ("0", "1", "2"), ("x", "y"))
    partition.indices(1)[0] = 0
    assert held(partition)[1] == [3, 5]


def test_a_client_that_is_not_a_run_is_not_taken_for_one():
    records = numbered(4)
    assert Partition(records, torch.tensor([0, 1, 1, 0])).at(0).targets.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("holders", "more", "parts"),
    [
        ([0, 1, 0], {}, ("holders",)),
        ([0, 1, -1, 0], {}, ("holders",)),
        ([0.0, 1.0, 0.0, 1.0], {}, ("holders",)),
        ([0, 1, 2**40, 0], {}, ("holders",)),
        ([0, 2, 2, 0], {}, ('client "client-1" has no records', "gap")),
        ([0, 1, 1, 0], {"names": ["a"]}, ("1 names", "2 clients")),
        ([0, 1, 1, 0], {"names": ["a", "b", "c"]}, ('client "c" has no records',)),
        ([0, 1, 1, 0], {"names": ["a", "a"]}, ("Two clients",)),
        ([0, 1, 1, 0], {"noise": [1.0]}, ("noise",)),
        ([0, 1, 1, 0], {"noise": [1.0, math.nan]}, ("noise",)),
        ([0, 1, 1, 0], {"noise": [1.0, -1.0]}, ("noise",)),
        ([0, 1, 1, 0], {"seed": -1}, ("seed",)),
    ],
)
def test_holders_that_cannot_be(holders, more, parts):
    refused(lambda: Partition(numbered(4), torch.tensor(holders), **more), *parts)


def test_identity_covers_records_holders_names_and_noise():
    def told(records=None, holders=(0, 1, 1, 0), **more):
        return Partition(records or numbered(4), torch.tensor(holders), **more).identity()

    assert told() == told()
    others = [
        told(numbered(4, classes=2)),
        told(holders=(0, 0, 1, 1)),
        told(names=["a", "b"]),
        told(noise=[0.0, 1.0]),
        told(noise=[0.0, 1.0], seed=1),
    ]
    assert len({told(), *others}) == 6


@pytest.mark.parametrize(
    ("action", "parts"),
    [
        (lambda records: iid(records, 11, 0), ("too few records", "11 clients")),
        (lambda records: iid(records, 0, 0), ("clients",)),
        (lambda records: iid(records, 2.0, 0), ("clients",)),
        (lambda records: iid(records, 2, -1), ("seed",)),
        (lambda records: iid(records, 2, None), ("seed",)),
        (lambda records: iid([1, 2], 2, 0), ("must be of type Records, not list",)),
        (lambda records: iid(Records(torch.zeros(0, 1), torch.zeros(0)), 1, 0), ("no record",)),
        (lambda records: shards(records, 4, 3, 0), ("too few records",)),
        (lambda records: shards(records, 4, 0, 0), ("per_client",)),
        (lambda records: dirichlet(records, 4, 1.0, 0, minimum=3), ("too few records", "at least 3 each")),
        (lambda records: dirichlet(records, 4, 0.0, 0), ("alpha",)),
        (lambda records: dirichlet(records, 4, math.nan, 0), ("alpha",)),
        (lambda records: dirichlet(records, 4, math.inf, 0), ("alpha",)),
        (lambda records: dirichlet(records, 4, 1e308, 0), ("alpha", "1e+308")),
        (lambda records: quantity(records, 4, -1.0, 0), ("alpha",)),
        (lambda records: quantity(records, 11, 1.0, 0), ("too few records",)),
        (lambda records: feature_noise(records, 2, -1.0, 0), ("scale",)),
        (lambda records: feature_noise(records, 2, math.nan, 0), ("scale",)),
        (lambda records: by_feature(records, 11, 0), ("too few records",)),
    ],
)
def test_partitions_that_cannot_be(action, parts):
    refused(lambda: action(numbered(10)), *parts)
