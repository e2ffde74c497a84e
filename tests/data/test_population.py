"""Populations: clients by name and number, made when drawn, refused in one sentence, told apart by identity."""

import itertools
import json
import math
import tracemalloc
import weakref

import numpy as np
import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato.data import tabled_population as module
from sfumato.data.client_names import Numbered
from sfumato.data.population import Population
from sfumato.data.records import Records
from sfumato.data.schema import Category, Numeric, Owner, Schema, Target
from sfumato.errors import InputError


def refused(action, *parts):
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


def some(*numbers, columns=1):
    return Records.from_arrays([[float(n)] * columns for n in numbers], [n % 2 for n in numbers])


def pair():
    return {"east": some(0, 1), "west": some(2)}


def same(one, other):
    return torch.equal(one.features, other.features) and torch.equal(one.targets, other.targets)


def stacked(**changes):
    arrays = {
        "features": np.arange(12, dtype=np.float32).reshape(6, 2),
        "targets": np.array([0, 1, 0, 1, 0, 1]),
        "offsets": [0, 1, 4, 6],
    }
    return Population.from_arrays(**(arrays | changes))


SCHEMA = Schema(
    columns={
        "age": Numeric(low=0, high=100),
        "sex": Category(values=("f", "m")),
        "ward": Owner(values=("east", "west", "north"), aliases={"n": "north"}),
        "ill": Target(values=("no", "yes")),
    }
)


def wards(path, *, wards=("west", "east", "west", "n", "east"), first=0):
    rows = range(first, first + len(wards))
    frame = pl.DataFrame(
        {
            "age": [10.0 * (row % 10) for row in rows],
            "sex": ["fm"[row % 2] for row in rows],
            "ward": wards,
            "ill": [("no", "yes")[row % 3 == 0] for row in rows],
        }
    )
    frame.write_parquet(path, row_group_size=2)
    return path


# What every population has in common


@pytest.fixture(params=["of", "factory", "arrays", "folder", "parquet"])
def population(request, tmp_path):
    match request.param:
        case "of":
            return Population.of({"east": some(0, 1), "west": some(2), "north": some(3)})
        case "factory":
            return Population.from_factory(3, lambda i: some(*range(i + 1)))
        case "arrays":
            return stacked()
        case "folder":
            Population.write_folder(stacked(names=["a", "b", "c"]), tmp_path / "clients")
            return Population.from_folder(tmp_path / "clients")
        case _:
            return Population.from_parquet(wards(tmp_path / "wards.parquet"), SCHEMA)


def test_names_and_numbers_lead_to_the_same_clients(population):
    assert len(population) == 3
    names = list(population)
    assert names == [population.name_at(i) for i in range(3)]
    assert [population.index_of(name) for name in names] == [0, 1, 2]
    for i, name in enumerate(names):
        assert len(population[name])
        assert same(population[name], population.at(i))
        assert same(population.at(torch.tensor(i)), population.at(np.int64(i)))
    assert {name: len(records) for name, records in population.items()} == {
        name: len(population.at(i)) for i, name in enumerate(names)
    }


def test_what_is_not_there_is_refused(population):
    assert "all" not in population
    assert 0 not in population
    assert population.get("nobody") is None
    with pytest.raises(KeyError, match='No client is called "nobody"'):
        population["nobody"]
    near = population.name_at(1) + "s"
    with pytest.raises(KeyError, match=f'No client is called "{near}". Did you mean "'):
        population.index_of(near)
    with pytest.raises(KeyError, match="is a text, not int"):
        population.index_of(4711)
    for bad in (-1, 3, 10**9):
        refused(lambda bad=bad: population.at(bad), "[0, 3)", str(bad))
        refused(lambda bad=bad: population.name_at(bad), "[0, 3)")
    refused(lambda: population.at(1.0), "whole number", "float")
    refused(lambda: population.at("0"), "whole number", "str")


def test_a_missing_name_is_not_searched_for_among_a_million():
    many = Population.from_factory(10**6, some)
    with pytest.raises(KeyError, match='"ward-7"; the names run from "client-000000" to "client-999999"'):
        many["ward-7"]


X, Y = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("records", "said"),
    [
        (Records(X.numpy(), Y), "features must be a tensor, not ndarray"),
        (Records(X, [0, 1, 0]), "targets must be a tensor, not list"),
        (Records(X, 3), "targets must be a tensor, not int"),
        (Records(X.byte(), Y), "features must be floating or int64, not uint8"),
        (Records(X, Y.int()), "targets must be floating or int64, not int32"),
        (Records(X, Y[:2]), "does not have one target per record"),
        (Records(X, Y[:, None]), "does not have one target per record"),
        (Records(X[0, 0], Y), "does not have one target per record"),
    ],
)
def test_records_that_nobody_checked_are_refused_when_the_client_is_opened(records, said):
    for action in (
        lambda: Population.of({"east": some(0, 1, columns=2), "west": records}),
        lambda: Population.from_factory(2, lambda number: records).at(0),
    ):
        refused(action, 'Client "', said, "Records.from_arrays")


def test_the_values_of_unchecked_records_are_not_looked_at():
    broken = Records(torch.full((3, 2), math.nan), Y)
    assert len(Population.of({"east": broken})) == 1


def test_repr_tells_the_number_of_clients_alone(population):
    assert repr(population).startswith("Population(clients=3, ")
    assert not set(repr(population).removeprefix("Population(clients=3")) & set("0123456789")


def test_comparing_makes_no_client_and_a_population_can_be_a_key(population):
    assert population == population  # noqa: PLR0124
    assert population != Population.of(pair())
    assert {population: 1}[population] == 1


def test_identity_is_stable(population):
    assert population.identity() == population.identity()
    assert len(population.identity()) == 64


def test_a_population_is_a_population_already(population):
    assert Population.of(population) is population


# In memory


def test_clients_in_memory_are_the_very_ones():
    clients = pair()
    population = Population.of(clients)
    assert list(population) == ["east", "west"]
    assert population["west"] is clients["west"]


@pytest.mark.parametrize(
    ("clients", "parts"),
    [
        ([some(0)], ("must be of type Mapping, not list", "by_owner")),
        ({}, ("at least one client",)),
        ({1: some(0)}, ("name of a client", "not int")),
        ({"": some(0)}, ("empty",)),
        ({"all": some(0)}, ('"all"', "another name")),
        ({"a\ud800": some(0)}, (r"'a\ud800'", "half of a character")),
        ({"a": [1.0, 2.0]}, ('clients["a"]', "not list")),
        ({"a": Records}, ('clients["a"]', "not the class Records")),
        ({"a": Records(torch.zeros(0, 1), torch.zeros(0, dtype=torch.int64))}, ('Client "a" has no records',)),
        ({"a": some(0), "b": some(0, columns=2)}, ('Client "b"', 'client "a"', "(n, 2)", "(n, 1)")),
        (
            {"a": some(0), "b": Records.from_arrays([[1]], [0])},
            ('Client "b"', "features (n, 1) int64", "features (n, 1) float32"),
        ),
        ({"a": some(0), "b": Records.from_arrays([[1.0]], [0.5])}, ('Client "b"', "targets (n) float32")),
        ({"a": Records(torch.zeros(2, 1), torch.zeros(1))}, ('Client "a"', "one target per record")),
        ({"a": Records(torch.zeros(2, 1), torch.zeros(2, 1))}, ('Client "a"', "one target per record")),
    ],
)
def test_clients_that_cannot_be(clients, parts):
    refused(lambda: Population.of(clients), *parts)


def test_identity_in_memory_covers_names_values_and_order():
    base = Population.of(pair()).identity()
    assert Population.of(pair()).identity() == base
    for other in (
        {"east": some(0, 1), "west": some(3)},
        {"east": some(0, 1), "south": some(2)},
        {"west": some(2), "east": some(0, 1)},
        {"east": some(0, 1)},
    ):
        assert Population.of(other).identity() != base


# By a factory


def test_a_million_clients_cost_nothing_until_they_are_drawn():
    made, records = [], some(0, 1)

    def make(index):
        made.append(index)
        return records

    tracemalloc.start()
    population = Population.from_factory(1_000_000, make)
    size, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000
    assert size < 10_000
    drawn = range(0, 1_000_000, 1_000)
    for index in drawn:
        assert population.at(index) is records
    assert made == list(drawn)
    assert population.name_at(17) == "client-000017"
    assert population.index_of("client-999999") == 999_999
    assert "client-123456" in population
    assert "client-1000000" not in population
    assert len(population.identity()) == 64
    assert list(itertools.islice(population, 2)) == ["client-000000", "client-000001"]
    assert len(made) == 1_000


@settings(deadline=None)
@given(st.integers(1, 10_000), st.data())
def test_the_rule_of_names_can_be_turned_round(count, data):
    names = Numbered("site", count)
    index = data.draw(st.integers(0, count - 1))
    assert names.index_of(names.at(index)) == index
    assert len(names.at(index)) == len(names.at(0))


@pytest.mark.parametrize(
    "name",
    ["client-1", "client-100", "client-0x", "client--1", "client-+1", "client-٠١", "client-1 ", "01", "", "Client-01"],
)
def test_only_names_of_the_rule_are_names(name):
    population = Population.from_factory(100, lambda _: some(0))
    assert name not in population
    assert "client-01" in population


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ((0, some), ("number of clients", "at least 1")),
        ((2.0, some), ("number of clients", "2.0")),
        ((2, some(0)), ("make must be a function", "Records")),
    ],
)
def test_factories_that_cannot_be(arguments, parts):
    refused(lambda: Population.from_factory(*arguments), *parts)
    refused(lambda: Population.from_factory(2, some, name=""), "name of a population")
    refused(lambda: Population.from_factory(2, some, version=3), "version", "int")


@pytest.mark.parametrize(
    ("second", "parts"),
    [
        ([1.0, 2.0], ("not Records but list",)),
        (None, ("not Records but NoneType",)),
        (Records(torch.zeros(0, 1), torch.zeros(0)), ("no record",)),
        (some(1, columns=2), ('client "client-0"', "(n, 2)")),
        (Records(torch.zeros(2, 1), torch.zeros(1)), ("one target per record",)),
    ],
)
def test_what_a_factory_may_not_give(second, parts):
    population = Population.from_factory(2, lambda i: second if i else some(0))
    population.at(0)
    refused(lambda: population.at(1), '"client-1"', *parts)


def test_identity_of_a_factory_is_what_its_user_declares():
    def told(count=3, name="client", version="1"):
        return Population.from_factory(count, lambda _: some(0), name=name, version=version).identity()

    assert told() == told()
    assert len({told(), told(count=4), told(name="site"), told(version="2")}) == 4


# Slices of arrays


def test_clients_are_slices_and_are_not_copied():
    features = np.arange(12, dtype=np.float32).reshape(6, 2)
    population = stacked(features=features, classes=["no", "yes"], feature_names=["a", "b"])
    client = population.at(1)
    assert client.features.tolist() == [[2, 3], [4, 5], [6, 7]]
    assert client.targets.tolist() == [1, 0, 1]
    assert client.name == "client-1"
    assert client.classes == ("no", "yes")
    assert client.feature_names == ("a", "b")
    assert np.shares_memory(client.features.numpy(), features)


def test_tensors_and_read_only_arrays_are_taken():
    tensor = torch.arange(12.0).reshape(6, 2)
    assert stacked(features=tensor).at(0).features.data_ptr() == tensor.data_ptr()
    fixed = tensor.numpy().copy()
    fixed.flags.writeable = False
    client = stacked(features=fixed).at(2)
    client.features.zero_()
    assert fixed[5, 1] == 11


@pytest.mark.parametrize(
    ("features", "expected"),
    [(np.float64, torch.float32), (np.float16, torch.float32), (np.int32, torch.int64), (np.bool_, torch.float32)],
)
def test_types_are_converted_as_records_convert_them(features, expected):
    client = stacked(features=np.ones((6, 2), features), targets=np.zeros(6, np.uint8)).at(0)
    assert client.features.dtype == expected
    assert client.targets.dtype == torch.int64


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"targets": np.zeros(5, np.int64)}, ("same number of records",)),
        ({"features": np.float32(1)}, ("same number of records",)),
        ({"offsets": [0, 1, 5]}, ("offsets", "end with")),
        ({"offsets": [1, 6]}, ("offsets", "begin with 0")),
        ({"offsets": [0.0, 6.0]}, ("offsets", "whole numbers")),
        ({"offsets": [[0, 6]]}, ("offsets",)),
        ({"offsets": [0]}, ("offsets",)),
        ({"offsets": [0, 2, 2, 6]}, ('"client-1" has no records',)),
        ({"offsets": np.array([0, 4, 2, 6], np.uint8)}, ('"client-1" has no records',)),
        ({"offsets": [[0], [1, 6]]}, ("offsets are ragged",)),
        ({"names": ["a", "b"]}, ("2 names", "3 clients")),
        ({"names": ["a", "b", "a"]}, ('Two clients are called "a"',)),
        ({"names": ["a", "b", "all"]}, ('"all"',)),
        ({"names": ["a", "b", 3]}, ("name of a client", "int")),
        ({"names": "abc"}, ("list of texts",)),
        ({"name": ""}, ("name of a population",)),
        ({"name": "\udfff"}, ("half of a character",)),
        ({"features": np.array([["a"]] * 6)}, ("features must be numbers",)),
        ({"features": np.zeros((6, 2), ">f4")}, ("features must be numbers",)),
        ({"features": np.zeros((6, 2, 2), np.uint8)}, ("images of whole numbers",)),
        ({"targets": np.zeros((6, 1))}, ("targets must have shape (n,)",)),
        ({"targets": np.zeros(6, np.float32), "classes": ["a"]}, ("classes are declared but",)),
        ({"feature_names": ["a"]}, ("1 feature_names",)),
    ],
)
def test_arrays_that_cannot_be(changes, parts):
    refused(lambda: stacked(**changes), *parts)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", ["features", "targets"])
def test_a_value_that_is_not_finite_is_refused_when_its_client_is_drawn(bad, place):
    arrays = {"features": np.ones((6, 2), np.float32), "targets": np.ones(6, np.float32)}
    arrays[place][5] = bad
    population = stacked(**arrays)
    population.at(1)
    refused(lambda: population.at(2), "client-2", place, "row 1", "not a finite")


def test_large_finite_values_are_taken_though_their_sum_is_not_finite():
    client = stacked(features=np.full((6, 2), 3e38, np.float32)).at(1)
    assert not client.features.sum().isfinite()
    refused(lambda: stacked(features=np.full((6, 2), 1e300)).at(1), "client-1", "not a finite")


def test_a_target_that_is_no_declared_class_is_refused_when_drawn():
    population = stacked(classes=["only"])
    population.at(0)
    refused(lambda: population.at(1), "client-1", "not one of the 1 declared classes")


def test_identity_of_arrays_covers_values_cuts_names_and_declarations():
    base = stacked().identity()
    assert stacked().identity() == base
    others = [
        stacked(features=np.ones((6, 2), np.float32)),
        stacked(targets=np.zeros(6, np.int64)),
        stacked(offsets=[0, 2, 4, 6]),
        stacked(names=["a", "b", "c"]),
        stacked(name="site"),
        stacked(classes=["no", "yes"]),
    ]
    assert len({base, *(other.identity() for other in others)}) == 7


def test_two_parts_of_one_mapped_file_differ(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(12, dtype=np.float32))
    whole = np.load(tmp_path / "x.npy", mmap_mode="r")
    parts = [stacked(features=whole[start : start + 6, None]) for start in (0, 6)]
    assert parts[0].identity() != parts[1].identity()


# Folders


@pytest.mark.parametrize("names", [None, ["b", "a", "ü\n-"]], ids=["numbered", "listed"])
def test_a_folder_gives_back_what_was_written(tmp_path, names):
    before = stacked(names=names, name="site", classes=["no", "yes"], feature_names=["a", "b"])
    Population.write_folder(before, tmp_path / "clients")
    after = Population.from_folder(tmp_path / "clients")
    assert list(after) == list(before)
    for name, records in before.items():
        assert same(after[name], records)
        assert after[name].classes == ("no", "yes")
        assert after[name].feature_names == ("a", "b")
    assert (tmp_path / "clients" / "names.txt").exists() == (names is not None)
    assert [path.name for path in tmp_path.iterdir()] == ["clients"]


def test_a_folder_is_mapped_not_read_and_never_written(tmp_path):
    Population.write_folder(stacked(), tmp_path / "clients")
    before = (tmp_path / "clients" / "features.npy").read_bytes()
    population = Population.from_folder(tmp_path / "clients")
    assert all(isinstance(part, np.memmap) for part in population._arrays)
    population.at(0).features.zero_()
    assert population.at(0).features.tolist() == [[0, 1]]
    assert (tmp_path / "clients" / "features.npy").read_bytes() == before


def test_three_arrays_alone_are_a_folder(tmp_path):
    for part, values in {"features": np.eye(4), "targets": np.arange(4), "offsets": np.array([0, 1, 4])}.items():
        np.save(tmp_path / f"{part}.npy", values)
    population = Population.from_folder(tmp_path)
    assert list(population) == ["client-0", "client-1"]
    assert population.at(1).features.dtype == torch.float32


def test_writing_holds_one_client_at_a_time(tmp_path):
    made, alive = [], []

    def make(index):
        alive.append(sum(client() is not None for client in made))
        client = some(index, index + 1)
        made.append(weakref.ref(client))
        return client

    Population.write_folder(Population.from_factory(20, make), tmp_path / "clients")
    assert len(made) == 20
    assert max(alive) <= 1
    assert Population.from_folder(tmp_path / "clients").at(19).features.tolist() == [[19], [20]]


def test_a_folder_is_not_written_over(tmp_path):
    (tmp_path / "clients").mkdir()
    refused(lambda: Population.write_folder(pair(), tmp_path / "clients"), "is there already")
    refused(lambda: Population.write_folder(pair(), tmp_path / "no" / "clients"), "cannot be written")
    refused(lambda: Population.write_folder({}, tmp_path / "new"), "at least one client")
    assert [path.name for path in tmp_path.iterdir()] == ["clients"]


@pytest.mark.parametrize(
    ("third", "part"),
    [
        (some(1, columns=2), "(n, 2)"),
        (Records.from_arrays([[1.0]], [1], classes=["no", "yes"]), "other classes"),
        (3, "not int"),
        (RuntimeError, "stop"),
    ],
)
def test_a_folder_is_written_whole_or_not_at_all(tmp_path, third, part):
    class Clients(dict):
        def items(self):
            for name, value in super().items():
                if value is RuntimeError:
                    raise InputError("stop")
                yield name, value

    refused(lambda: Population.write_folder(Clients(a=some(0), b=some(1), c=third), tmp_path / "clients"), part)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("file", "text", "parts"),
    [
        ("features.npy", None, ("features.npy", "cannot be read")),
        ("offsets.npy", b"nonsense", ("offsets.npy", "not a readable array")),
        ("targets.npy", b"", ("targets.npy", "not a readable array")),
        ("declared.json", b"{", ("declared.json", "damaged")),
        ("declared.json", b"[]", ("declared.json", "damaged")),
        ("declared.json", b'{"classes": "no"}', ("lists of texts",)),
        ("declared.json", b'{"classes": ["no"]}', ()),
        ("names.txt", b"a\n", ("names.txt", "damaged")),
        ("names.txt", b'"a"\n', ("1 names", "3 clients")),
        ("names.txt", b"1\n2\n3\n", ("name of a client",)),
    ],
)
def test_folders_that_cannot_be(tmp_path, file, text, parts):
    folder = tmp_path / "clients"
    Population.write_folder(stacked(), folder)
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(text)
    if not parts:
        population = Population.from_folder(folder)
        refused(lambda: population.at(1), "declared classes")
    else:
        refused(lambda: Population.from_folder(folder), str(folder), *parts)


def test_a_shortened_array_file_is_refused(tmp_path):
    Population.write_folder(stacked(), tmp_path / "clients")
    file = tmp_path / "clients" / "features.npy"
    file.write_bytes(file.read_bytes()[:-4])
    refused(lambda: Population.from_folder(tmp_path / "clients"), "features.npy", "not a readable array")


def test_identity_of_a_folder_is_that_of_its_files(tmp_path):
    for name in ("one", "two"):
        Population.write_folder(stacked(), tmp_path / name)
    one, two = (Population.from_folder(tmp_path / name) for name in ("one", "two"))
    assert one.identity() == Population.from_folder(tmp_path / "one").identity()
    assert one.identity() != two.identity()
    declared = json.loads((tmp_path / "one" / "declared.json").read_text())
    assert declared == {"classes": None, "feature_names": [], "name": "client"}


# Parquet


@pytest.mark.parametrize("window", [1, 2, 3, 100])
def test_a_client_has_its_rows_of_every_file_in_order(tmp_path, monkeypatch, window):
    monkeypatch.setattr(module, "_WINDOW", window)
    files = [wards(tmp_path / "one.parquet"), wards(tmp_path / "two.parquet", wards=["west", "north"], first=7)]
    population = Population.from_parquet(files, SCHEMA)
    whole = Records.from_parquet(files, SCHEMA).by_owner()
    assert list(population) == list(whole) == ["east", "west", "north"]
    for name, records in whole.items():
        assert same(population[name], records)
        assert population[name].classes == ("no", "yes")
        assert population[name].feature_names == records.feature_names


@settings(deadline=None)
@given(st.lists(st.sampled_from(["east", "west", "north"]), min_size=1, max_size=40), st.integers(1, 8))
def test_parquet_gives_what_records_by_owner_give(tmp_path_factory, owners, window):
    owners = [*owners, "east", "west", "north"]
    path = wards(tmp_path_factory.mktemp("rows") / "wards.parquet", wards=owners)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_WINDOW", window)
        population = Population.from_parquet(path, SCHEMA.model_dump())
        whole = Records.from_parquet(path, SCHEMA).by_owner()
        assert all(same(population[name], whole[name]) for name in whole)


def test_scattered_rows_are_read_a_window_at_a_time(tmp_path, monkeypatch):
    population = Population.from_parquet(wards(tmp_path / "w.parquet", wards=["west", "east", "north"] * 40), SCHEMA)
    read, asked = module._read, []

    def watched(file, first, rows, columns):
        asked.append(rows)
        return read(file, first, rows, columns)

    monkeypatch.setattr(module, "_WINDOW", 30)
    monkeypatch.setattr(module, "_read", watched)
    assert len(population["east"]) == 40
    assert len(asked) == 4
    assert max(asked) <= 30


def test_only_the_owner_column_is_read_before_a_client_is_drawn(tmp_path):
    path = wards(tmp_path / "wards.parquet")
    pl.read_parquet(path).with_columns(age=pl.Series([10.0, 500.0, 10.0, 10.0, 10.0])).write_parquet(path)
    population = Population.from_parquet(path, SCHEMA)
    population["west"]
    refused(lambda: population["east"], str(path), "row 2", '"age"', "outside the declared bounds")


@pytest.mark.parametrize(
    ("owners", "parts"),
    [
        (["east", "west"], ('declared owner "north" has no records',)),
        (["east", "west", "north", "south"], ("row 4", "'south'", "not a declared owner")),
        (["east", None, "west", "north"], ("row 2", "missing owner")),
    ],
)
def test_owners_that_cannot_be(tmp_path, owners, parts):
    path = wards(tmp_path / "wards.parquet", wards=owners)
    refused(lambda: Population.from_parquet(path, SCHEMA), *parts)


def test_files_that_cannot_be(tmp_path):
    path = wards(tmp_path / "wards.parquet")
    other = tmp_path / "other.parquet"
    refused(lambda: Population.from_parquet(other, SCHEMA), str(other), "cannot be read")
    refused(lambda: Population.from_parquet([], SCHEMA), "at least one path")
    refused(lambda: Population.from_parquet([path, path], SCHEMA), "each file once")
    refused(lambda: Population.from_parquet({"east": path}, SCHEMA), "list of paths")
    other.write_bytes(b"PAR1 nonsense")
    refused(lambda: Population.from_parquet(other, SCHEMA), str(other), "not a readable Parquet file")
    pl.read_parquet(path).drop("ward").write_parquet(other)
    refused(lambda: Population.from_parquet(other, SCHEMA), str(other), 'no column "ward"')
    pl.read_parquet(path).clear().write_parquet(other)
    refused(lambda: Population.from_parquet(other, SCHEMA), str(other), "no rows")
    alone = {name: column for name, column in SCHEMA.columns.items() if name != "ward"}
    refused(lambda: Population.from_parquet(path, Schema(columns=alone)), "declares no owner")


def test_a_file_that_changed_is_refused_and_has_another_identity(tmp_path):
    path = wards(tmp_path / "wards.parquet")
    population = Population.from_parquet(path, SCHEMA)
    before = population.identity()
    wards(path, wards=("east", "west", "n", "n"))
    refused(lambda: population.at(0), str(path), "has changed")
    assert Population.from_parquet(path, SCHEMA).identity() != before


def test_a_path_with_signs_of_a_pattern_is_one_file(tmp_path):
    path = wards(tmp_path / "ward[1]*.parquet")
    assert len(Population.from_parquet(path, SCHEMA)["west"]) == 2


def test_parquet_becomes_a_folder(tmp_path):
    table = Population.from_parquet(wards(tmp_path / "wards.parquet"), SCHEMA)
    Population.write_folder(table, tmp_path / "clients")
    folder = Population.from_folder(tmp_path / "clients")
    assert all(same(folder[name], table[name]) for name in table)
