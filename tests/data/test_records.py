"""Records: what is accepted, what is refused and how, and splits that are disjoint and repeatable."""

import math
import pickle
from fractions import Fraction

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import IterableDataset, TensorDataset

from sfumato.data.records import Records
from sfumato.errors import InputError


def refused(action, *parts):
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def numbered(n, owners=None):
    return Records.from_arrays([[float(i)] for i in range(n)], list(range(n)), owners)


@pytest.mark.parametrize("make", [torch.tensor, np.array, list], ids=["tensor", "numpy", "list"])
def test_every_kind_of_array_becomes_float32_and_int64(make):
    records = Records.from_arrays(make([[1.5, 2.0], [3.0, 4.0]]), make([0, 1]), name="two")
    assert len(records) == 2
    assert records.features.dtype == torch.float32
    assert records.targets.dtype == torch.int64
    assert records.features.tolist() == [[1.5, 2.0], [3.0, 4.0]]
    assert records.targets.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (np.array([[1, 2]], dtype=np.int16), torch.int64),
        (np.array([[1, 2]], dtype=np.uint8), torch.int64),
        (np.array([[True, False]]), torch.float32),
        (np.array([[1, 2]], dtype=np.float64), torch.float32),
        (torch.tensor([[1, 2]], dtype=torch.bfloat16), torch.float32),
        (torch.tensor([[1, 2]], dtype=torch.float64), torch.float32),
    ],
)
def test_feature_types(features, expected):
    assert Records.from_arrays(features, [0]).features.dtype == expected


@pytest.mark.parametrize(
    ("targets", "expected"),
    [([0.5, 1.0], torch.float32), ([True, False], torch.int64), (np.array([1, 2], np.uint8), torch.int64)],
)
def test_target_types(targets, expected):
    assert Records.from_arrays([[0.0], [1.0]], targets).targets.dtype == expected


@pytest.mark.parametrize("make", [torch.tensor, np.array], ids=["tensor", "numpy"])
def test_later_changes_to_the_arrays_do_not_reach_the_records(make):
    features, targets = make([[1.0], [2.0]]), make([0, 1])
    records = Records.from_arrays(features, targets)
    features[0, 0], targets[0] = math.nan, 7
    assert records.features.tolist() == [[1.0], [2.0]]
    assert records.targets.tolist() == [0, 1]


def test_a_read_only_array_is_taken():
    array = np.ones((2, 1))
    array.flags.writeable = False
    assert len(Records.from_arrays(array, [0, 1])) == 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_a_value_that_is_not_finite_names_row_and_column(bad):
    rows = [[1.0, 2.0], [3.0, bad], [bad, bad]]
    refused(lambda: Records.from_arrays(rows, [0, 1, 0], name="ward"), "ward", "row 1, column [1]", "Fix:")
    refused(
        lambda: Records.from_arrays(rows, [0, 1, 0], feature_names=["age", "dose"]),
        'row 1, column "dose"',
        "Fix:",
    )


def test_a_target_that_is_not_finite_names_its_row():
    refused(lambda: Records.from_arrays([[1.0], [2.0]], [0.0, math.nan]), "targets, row 1 ", "Fix:")


@pytest.mark.parametrize(
    ("features", "targets", "parts"),
    [
        ([], [], ("no record",)),
        (3.0, [1], ("no record",)),
        ([[1.0], [2.0]], [0], ("2 records", "targets hold 1")),
        ([[1.0], [2.0]], [[0], [1]], ("(n,)", "(2, 1)")),
        ([[1.0], [2.0, 3.0]], [0, 1], ("ragged",)),
        ([["a"], ["b"]], [0, 1], ("must be numbers",)),
        ([[1.0], [None]], [0, 1], ("must be numbers",)),
        (np.zeros((2, 1), dtype=complex), [0, 1], ("must be numbers",)),
        (torch.zeros(2, 1, dtype=torch.complex64), [0, 1], ("real numbers",)),
        (torch.zeros(2, 1).to_sparse(), [0, 1], ("dense",)),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), [0, 1], ("images", "declared range")),
        (np.zeros((2, 4, 4), dtype=np.uint8), [0, 1], ("images", "declared range")),
    ],
)
def test_refused_arrays(features, targets, parts):
    refused(lambda: Records.from_arrays(features, targets, name="ward"), "ward", "Fix:", *parts)


def test_names_and_classes_are_checked():
    rows = [[1.0, 2.0], [3.0, 4.0]]
    refused(lambda: Records.from_arrays(rows, [0, 1], feature_names=["a"]), "1 feature_names", "Fix:")
    refused(lambda: Records.from_arrays(rows, [0, 2], classes=["a", "b"]), "row 1 ", "2 is not one", "Fix:")
    refused(lambda: Records.from_arrays(rows, [0, -1], classes=["a", "b"]), "-1 is not one", "Fix:")
    refused(lambda: Records.from_arrays(rows, [0.0, 1.0], classes=["a", "b"]), "floating", "Fix:")


def test_owners_by_name_keep_the_order_of_appearance():
    records = numbered(4, ["b", "a", "b", "c"])
    assert records.owner_names == ("b", "a", "c")
    assert {name: part.targets.tolist() for name, part in records.by_owner().items()} == {
        "b": [0, 2],
        "a": [1],
        "c": [3],
    }


@pytest.mark.parametrize("owners", [[7, 3, 7], np.array([7, 3, 7]), torch.tensor([7, 3, 7])])
def test_owners_may_be_whole_numbers(owners):
    assert numbered(3, owners).owner_names == ("7", "3")


def test_two_owners_in_a_tuple_are_two_records():
    assert numbered(2, ("a", "b")).owner_names == ("a", "b")
    assert numbered(2, (np.int64(4), np.int64(5))).owner_names == ("4", "5")


def test_declared_owners_keep_their_order_and_each_part_its_name():
    records = numbered(3, (["x", "y"], [1, 0, 1]))
    parts = records.by_owner()
    assert list(parts) == ["x", "y"]
    assert parts["y"].name == "records/y"
    assert parts["y"].targets.tolist() == [0, 2]
    assert list(parts["y"].by_owner()) == ["y"]


@pytest.mark.parametrize(
    "owners",
    [
        "abc",
        ["a", "b"],
        ["a", None, "b"],
        ["a", 1.5, "b"],
        ["a", "", "b"],
        (["x", "x"], [0, 1, 0]),
        (["x", "y"], [0, 1, 2]),
        (["x", "y"], [0, -1, 1]),
        (["x", "y"], [0.0, 1.0, 1.0]),
        (["x", 3], [0, 1, 1]),
    ],
)
def test_refused_owners(owners):
    refused(lambda: numbered(3, owners), "records", "owner")


def test_by_owner_needs_owners_and_a_record_for_each():
    refused(lambda: numbered(3).by_owner(), "no owners", "Fix:")
    refused(lambda: numbered(3, (["x", "empty"], [0, 0, 0])).by_owner(), '"empty"', "no records", "Fix:")


def test_batch_picks_in_order_and_may_be_empty():
    records = numbered(5)
    features, targets = records.batch(torch.tensor([3, 0, 3]))
    assert features.tolist() == [[3.0], [0.0], [3.0]]
    assert targets.tolist() == [3, 0, 3]
    features, targets = records.batch(torch.tensor([], dtype=torch.int64))
    assert features.shape == (0, 1)
    assert targets.shape == (0,)
    features, _ = records.batch(torch.tensor([2]))
    features.zero_()
    assert records.features[2] == 2.0


@pytest.mark.parametrize(
    "indices",
    [
        torch.tensor([5]),
        torch.tensor([-1]),
        torch.tensor([1.0]),
        torch.tensor([[1]]),
        torch.ones(5, dtype=torch.bool),
        [1, 2],
    ],
)
def test_refused_indices(indices):
    refused(lambda: numbered(5).batch(indices), "records", "indices must")


def test_select_keeps_every_declaration():
    records = Records.from_arrays(
        [[1.0], [2.0], [3.0]],
        [0, 1, 0],
        (["x", "y"], [0, 1, 0]),
        name="ward",
        feature_names=["dose"],
        classes=["no", "yes"],
    )
    part = records.select(torch.tensor([1]))
    assert (part.name, part.feature_names, part.classes) == ("ward", ("dose",), ("no", "yes"))
    assert part.owner_names == ("x", "y")
    assert part.owner_codes.tolist() == [1]
    refused(lambda: records.select(torch.tensor([], dtype=torch.int64)), "ward", "Fix:")


def test_repr_tells_neither_values_nor_how_many():
    records = Records.from_arrays(torch.full((7919, 3), 4242.0), torch.zeros(7919), name="ward")
    assert repr(records) == (
        "Records(name='ward', features=(n, 3) float32, targets=(n) float32, classes=None, owners=0)"
    )


def test_records_are_frozen_and_survive_pickling():
    records = numbered(3, ["a", "b", "a"])
    with pytest.raises(AttributeError):
        records.name = "other"
    again = pickle.loads(pickle.dumps(records))
    assert torch.equal(again.features, records.features)
    assert again.owner_names == records.owner_names


owner_lists = st.lists(st.sampled_from("abc"), min_size=2, max_size=60)
decimals = st.integers(1, 99).map(lambda percent: percent / 100)


@given(owner_lists, decimals, st.integers(0, 2**63 - 1), st.booleans())
def test_a_split_is_disjoint_complete_repeatable_and_exact(owners, fraction, seed, within):
    records = numbered(len(owners), owners)
    share = Fraction(repr(fraction))
    groups = [owners.count(owner) for owner in records.owner_names] if within else [len(owners)]
    expected = sum(math.floor(share * n) for n in groups)
    state = torch.get_rng_state()
    if expected == 0:
        refused(lambda: records.split(fraction, seed=seed, within_owner=within), "empty", "Fix:")
        return
    first, second = records.split(fraction, seed=seed, within_owner=within)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(first) == expected
    assert sorted(first.targets.tolist() + second.targets.tolist()) == list(range(len(owners)))
    for part in (first, second):
        assert part.targets.tolist() == sorted(part.targets.tolist())
        assert [records.owner_names[code] for code in part.owner_codes] == [owners[i] for i in part.targets]
    if within:
        for code, owner in enumerate(records.owner_names):
            held = int((first.owner_codes == code).sum())
            assert held == math.floor(share * owners.count(owner))
    again, _ = records.split(fraction, seed=seed, within_owner=within)
    assert torch.equal(first.targets, again.targets)


def test_a_split_depends_on_the_seed_and_reads_decimals():
    records = numbered(100)
    first, other = (records.split(0.29, seed=seed)[0] for seed in (1, 2))
    assert len(first) == 29  # 0.29 * 100 is below 29 in floating point
    assert first.targets.tolist() != other.targets.tolist()


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, math.nan, "0.5", True])
def test_refused_fractions(fraction):
    refused(lambda: numbered(10).split(fraction, seed=0), "fraction", "(0, 1)")


@pytest.mark.parametrize("seed", [-1, 1.5, 2**63, None])
def test_refused_seeds(seed):
    refused(lambda: numbered(10).split(0.5, seed=seed), "seed")


def test_from_dataset_stacks_pairs():
    data = TensorDataset(torch.arange(6.0).reshape(3, 1, 2), torch.tensor([2, 0, 1]))
    records = Records.from_dataset(data, owners=["a", "b", "a"], name="stack")
    assert records.features.shape == (3, 1, 2)
    assert records.targets.tolist() == [2, 0, 1]
    assert records.name == "stack"
    assert records.owner_names == ("a", "b")


class Endless(IterableDataset):
    def __iter__(self):
        return iter([])


@pytest.mark.parametrize(
    ("data", "part"),
    [
        (Endless(), "no length"),
        ([], "no record"),
        ([(torch.zeros(2), 0), torch.zeros(3)], "item 1"),
        ([(torch.zeros(2), 0), ("text", 1)], "item 1"),
        ([(torch.zeros(2), 0), (torch.zeros(3), 1)], "item 1"),
    ],
)
def test_refused_datasets(data, part):
    refused(lambda: Records.from_dataset(data, name="stack"), "stack", part, "Fix:")


def test_tables_bring_names_classes_and_owners(tmp_path):
    columns = {
        "age": {"kind": "numeric", "low": 0, "high": 100},
        "site": {"kind": "owner", "values": ["east", "west"]},
        "ill": {"kind": "target", "values": ["no", "yes"]},
    }
    frame = pl.DataFrame({"age": [0, 100], "site": ["west", "east"], "ill": ["yes", "no"]})
    frame.write_csv(tmp_path / "t.csv")
    frame.write_parquet(tmp_path / "t.parquet")
    for records in (
        Records.from_csv(tmp_path / "t.csv", {"columns": columns}, name="ward"),
        Records.from_parquet(tmp_path / "t.parquet", {"columns": columns}, name="ward"),
    ):
        assert records.name == "ward"
        assert records.features.tolist() == [[-1.0], [1.0]]
        assert records.targets.tolist() == [1, 0]
        assert records.feature_names == ("age",)
        assert records.classes == ("no", "yes")
        assert records.owner_names == ("east", "west")
        assert records.owner_codes.tolist() == [1, 0]
