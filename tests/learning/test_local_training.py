from __future__ import annotations

import functools
import math

import pytest
import torch
from helpers import expected_steps
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sfumato.errors import InputError
from sfumato.learning import local_training
from sfumato.learning.local_training import Batches, LocalTraining, batches_of

SGD = functools.partial(torch.optim.SGD, lr=0.1)
SIZES = st.lists(st.integers(1, 23), min_size=1, max_size=6)
KEYS = st.integers(-(2**63), 2**63 - 1)


def drawn(training: LocalTraining, sizes: list[int], key: int = 5, clients: list[int] | None = None) -> Batches:
    numbers = torch.tensor(clients or list(range(len(sizes))))
    return batches_of(training, torch.tensor(sizes), key, numbers)


def steps_of(batches: Batches, row: int) -> list[list[int]]:
    """Return the records of each step that a client takes."""
    counts = batches.count[row].tolist()
    return [batches.index[row, step, :count].tolist() for step, count in enumerate(counts) if count]


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 25) | st.none(), st.integers(1, 3), KEYS)
def test_in_epochs_every_record_is_used_once_an_epoch(
    sizes: list[int], size: int | None, epochs: int, key: int
) -> None:
    training = LocalTraining(SGD, epochs=epochs, batch_size=size)
    batches = drawn(training, sizes, key)
    for row, records in enumerate(sizes):
        steps = steps_of(batches, row)
        full = min(size or records, records)
        per_epoch = math.ceil(records / full)
        assert len(steps) == per_epoch * epochs == expected_steps(training, records)
        for first in range(0, len(steps), per_epoch):
            epoch = steps[first : first + per_epoch]
            assert [len(step) for step in epoch[:-1]] == [full] * (per_epoch - 1)
            assert sorted(record for step in epoch for record in step) == list(range(records))


@settings(max_examples=60, deadline=None)
@given(SIZES, st.integers(1, 25) | st.none(), st.integers(1, 9), KEYS)
def test_in_steps_every_batch_is_full_and_the_rest_of_an_epoch_is_dropped(
    sizes: list[int], size: int | None, steps: int, key: int
) -> None:
    training = LocalTraining(SGD, steps=steps, batch_size=size)
    batches = drawn(training, sizes, key)
    for row, records in enumerate(sizes):
        taken = steps_of(batches, row)
        full = min(size or records, records)
        assert [len(step) for step in taken] == [full] * steps
        assert expected_steps(training, records) == steps
        per_epoch = records // full
        for first in range(0, steps, per_epoch):
            used = [record for step in taken[first : first + per_epoch] for record in step]
            assert len(set(used)) == len(used)
            assert set(used) <= set(range(records))


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 25), KEYS)
def test_places_beyond_the_count_repeat_the_first_record_and_steps_lie_in_front(
    sizes: list[int], size: int, key: int
) -> None:
    batches = drawn(LocalTraining(SGD, epochs=2, batch_size=size), sizes, key)
    beyond = torch.arange(batches.index.shape[2]) >= batches.count.unsqueeze(2)
    assert not bool(batches.index[beyond].any())
    assert bool((batches.count[:, 1:].gt(0) <= batches.count[:, :-1].gt(0)).all())
    assert int(batches.count.max()) == batches.index.shape[2]


@settings(max_examples=40, deadline=None)
@given(SIZES, st.integers(1, 25) | st.none(), st.booleans(), KEYS, st.data())
def test_a_clients_batches_do_not_depend_on_who_is_beside(
    sizes: list[int], size: int | None, in_steps: bool, key: int, data: st.DataObject
) -> None:
    training = LocalTraining(SGD, batch_size=size, **({"steps": 5} if in_steps else {"epochs": 2}))  # type: ignore[arg-type]
    numbers = data.draw(st.lists(st.integers(0, 10**9), min_size=len(sizes), max_size=len(sizes), unique=True))
    together = drawn(training, sizes, key, numbers)
    for row, records in enumerate(sizes):
        alone = steps_of(drawn(training, [records], key, [numbers[row]]), 0)
        if size is None or size >= records:  # a full batch: its order is no matter
            assert [set(step) for step in steps_of(together, row)] == [set(step) for step in alone]
        else:
            assert steps_of(together, row) == alone


def test_orders_differ_by_key_client_and_epoch() -> None:
    training = LocalTraining(SGD, epochs=2, batch_size=30)
    orders = set()
    for key in (0, 7 << 32, -(2**62), 2**63 - 1):
        for client in (0, 1, 999_999):
            first, second, third, fourth = steps_of(drawn(training, [60], key, [client]), 0)
            orders |= {tuple(first + second), tuple(third + fourth)}
    assert len(orders) == 4 * 3 * 2


def _shares(count: int, stream: str) -> Tensor:
    """Return how often each of 4 records came first, in the middle or last, over many clients, rounds or epochs."""
    if stream == "clients":
        index = drawn(LocalTraining(SGD, epochs=1, batch_size=1), [4] * count).index[:, :, 0]
    elif stream == "keys":
        training = LocalTraining(SGD, epochs=1, batch_size=1)
        index = torch.cat([drawn(training, [4], key, [3]).index[:, :, 0] for key in range(count)])
    else:
        index = drawn(LocalTraining(SGD, epochs=count, batch_size=1), [4]).index[0, :, 0].view(count, 4)
    return torch.nn.functional.one_hot(index, 4).double().mean(0)


@pytest.mark.parametrize(("stream", "count"), [("clients", 4000), ("keys", 2000), ("epochs", 2000)])
def test_every_record_is_as_likely_in_every_place(stream: str, count: int) -> None:
    shares = _shares(count, stream)
    # A share of 1/4 over 2,000 orders has a standard deviation below 0.0097: 0.06 is six of them, 16 shares are looked at.
    assert float((shares - 0.25).abs().max()) < 0.06


def test_the_uniformity_test_has_power(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = local_training._order

    def sometimes_as_they_lie(sizes: Tensor, key: int, clients: Tensor, epoch: int) -> Tensor:
        orders = honest(sizes, key, clients, epoch)
        return torch.where((clients % 5 == 0)[:, None], torch.arange(orders.shape[1]), orders)

    monkeypatch.setattr(local_training, "_order", sometimes_as_they_lie)
    with pytest.raises(AssertionError):
        test_every_record_is_as_likely_in_every_place("clients", 4000)


def test_neighbouring_clients_and_epochs_have_unrelated_orders() -> None:
    index = drawn(LocalTraining(SGD, epochs=1, batch_size=1), [4] * 4001).index[:, :, 0]
    both = torch.nn.functional.one_hot(index[:-1, 0] * 4 + index[1:, 0], 16).double().mean(0)
    assert float((both - 1 / 16).abs().max()) < 0.025  # over six standard deviations of 0.0038
    epochs = drawn(LocalTraining(SGD, epochs=4001, batch_size=1), [4]).index[0, :, 0].view(-1, 4)
    both = torch.nn.functional.one_hot(epochs[:-1, 0] * 4 + epochs[1:, 0], 16).double().mean(0)
    assert float((both - 1 / 16).abs().max()) < 0.025


@pytest.mark.parametrize(
    ("optimizer", "rate"),
    [
        (SGD, 0.1),
        (functools.partial(torch.optim.SGD, lr=1), 1.0),
        (functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9), None),
        (functools.partial(torch.optim.SGD, lr=0.1, weight_decay=0.1), None),
        (functools.partial(torch.optim.SGD, lr=0.1, maximize=True), None),
        (functools.partial(torch.optim.Adam, lr=0.1), None),
    ],
)
def test_only_plain_sgd_has_a_plain_rate(
    optimizer: functools.partial[torch.optim.Optimizer], rate: float | None
) -> None:
    assert LocalTraining(optimizer, steps=1).plain_rate() == rate
    assert LocalTraining(optimizer, steps=1, proximal=0.1).plain_rate() is None


def test_what_is_out_of_range_is_refused() -> None:
    for arguments, message in [
        ({}, "either local_steps or local_epochs"),
        ({"steps": 1, "epochs": 1}, "only one of them"),
        ({"steps": 0}, "local_steps"),
        ({"epochs": 1.5}, "local_epochs"),
        ({"steps": 1, "batch_size": 0}, "batch_size"),
        ({"steps": 1, "proximal": -1.0}, "proximal"),
        ({"steps": 1, "proximal": math.nan}, "proximal"),
    ]:
        with pytest.raises(InputError, match=message):
            LocalTraining(SGD, **arguments)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"functools\.partial"):
        LocalTraining(0.1, steps=1)  # type: ignore[arg-type]
