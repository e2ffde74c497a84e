"""Tables: exact encodings, and one sentence with file, row, column and fix for everything that is refused."""

import math
import struct

import numpy as np
import polars as pl
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from sfumato.data import tables
from sfumato.data.schema import Category, Ignore, Numeric, Owner, Schema, Target
from sfumato.data.tables import TableFormat, read_csv, read_parquet
from sfumato.errors import InputError

SCHEMA = Schema(
    columns={
        "age": Numeric(low=20, high=90),
        "dose": Numeric(low=-1, high=3, clamp=True, missing="indicator", missing_values=("0",)),
        "sex": Category(values=("female", "male")),
        "grade": Category(values=("1", "2", "3"), missing="indicator", aliases={"one": "1"}),
        "site": Owner(values=("east", "west")),
        "ill": Target(values=("no", "yes"), aliases={"no.": "no"}),
        "note": Ignore(),
    }
)
HEADER = "age,dose,sex,grade,site,ill,note"
GOOD = "55,1.5,male,2,west,yes,free text"


def refused(action, *parts):
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.fixture
def write(tmp_path):
    def to_file(*lines, name="ward.csv", end="\n"):
        path = tmp_path / name
        path.write_bytes(end.join([*lines, ""]).encode())
        return path

    return to_file


def test_every_kind_of_column_encodes_exactly(write):
    path = write(
        HEADER,
        "20,-1,female,1,east,no,",
        "90,3,male,3,west,yes,x",
        "55,1,male,?,east,no.,y",
        "37.5,?,female,one,west,yes,z",
        "55,0.0,female,2.0,west,no,0",
        "55,-7,female,2,west,no,0",
        "55,1e9,female,,west,no,0",
    )
    table = read_csv(path, SCHEMA)
    assert SCHEMA.feature_names == (
        *("age", "dose", "dose=missing", "sex=female", "sex=male"),
        *("grade=1", "grade=2", "grade=3", "grade=missing"),
    )
    assert table.features.dtype == np.float32
    assert table.features.tolist() == [
        [-1, -1, 0, 1, 0, 1, 0, 0, 0],
        [1, 1, 0, 0, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 0, 0, 0, 1],
        [-0.5, 0, 1, 1, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 1, 0, 0],
        [0, -1, 0, 1, 0, 0, 1, 0, 0],
        [0, 1, 0, 1, 0, 0, 0, 0, 1],
    ]
    assert table.targets.dtype == np.int64
    assert table.targets.tolist() == [0, 1, 0, 1, 0, 0, 0]
    names, codes = table.owners
    assert names == ("east", "west")
    assert codes.tolist() == [0, 1, 0, 1, 1, 1, 1]


def simple(target, **column):
    return Schema(columns={"x": Numeric(low=0, high=1), "y": target})


def test_targets_above_a_threshold_and_targets_in_bounds(write):
    path = write("x,y", "0,0", "0,0.5", "0,4.0")
    above = read_csv(path, simple(Target(positive_above=0.5)))
    assert above.targets.dtype == np.int64
    assert above.targets.tolist() == [0, 0, 1]
    within = read_csv(path, simple(Target(low=0, high=4)))
    assert within.targets.dtype == np.float32
    assert within.targets.tolist() == [0, 0.5, 4]


def test_columns_are_found_by_name_not_by_place(write):
    table = read_csv(write("y,x", "b,1"), simple(Target(values=("a", "b"))))
    assert table.features.tolist() == [[1]]
    assert table.targets.tolist() == [1]


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_layout_options_spaces_quotes_and_blank_lines(write, end):
    schema = simple(Target(values=("a;b", 'say "c"')))
    path = write("# made by hand", "", ' 0.5 ; "a;b" ', "", '1;  "say ""c"""', "", end=end)
    layout = TableFormat(separator=";", header=False, column_names=("x", "y"), skip_lines=1)
    refused(lambda: read_csv(path, schema, layout), "ward.csv, row 3 ", "valid CSV", "Fix:")
    path = write("# made by hand", "", ' 0.5 ; "a;b"', "", '1;  "say ""c"""', "", end=end)
    table = read_csv(path, schema, layout)
    assert table.features.tolist() == [[0], [1]]
    assert table.targets.tolist() == [0, 1]


def test_a_byte_order_mark_and_tabs_are_fine(write):
    path = write("\ufeffx\ty", "1\ta")
    layout = TableFormat(separator="\t")
    assert read_csv(path, simple(Target(values=("a", "b"))), layout).features.tolist() == [[1]]


def test_rows_beyond_one_chunk_keep_order_and_line(write, monkeypatch):
    monkeypatch.setattr(tables, "_CHUNK", 3)
    schema = Schema(columns={"x": Numeric(low=0, high=10), "y": Target(low=0, high=100)})
    table = read_csv(write("x,y", *(f"5,{i}" for i in range(8))), schema)
    assert table.targets.tolist() == list(range(8))
    path = write("x,y", *(f"{i if i < 7 else 99},{i}" for i in range(8)))
    refused(lambda: read_csv(path, schema), "row 9,", '"x"')


@pytest.mark.parametrize(
    ("row", "column", "value", "problem"),
    [
        ("abc,1,male,1,east,no,", "age", "'abc'", "not a number"),
        ("1_0,1,male,1,east,no,", "age", "'1_0'", "not a number"),
        ("nan,1,male,1,east,no,", "age", "'nan'", "not a finite number"),
        ("55,inf,male,1,east,no,", "dose", "'inf'", "not a finite number"),
        ("55,1e999,male,1,east,no,", "dose", "'1e999'", "not a finite number"),
        ("55,NaN,male,1,east,no,", "dose", "'NaN'", "not a finite number"),
        ("?,1,male,1,east,no,", "age", "'?'", "missing value"),
        ("  ,1,male,1,east,no,", "age", "''", "missing value"),
        ("19.9,1,male,1,east,no,", "age", "'19.9'", "outside the declared bounds [20, 90]"),
        ("90.1,1,male,1,east,no,", "age", "'90.1'", "outside the declared bounds [20, 90]"),
        ("55,1,mael,1,east,no,", "sex", "'mael'", 'not a declared category value. Did you mean "male"?'),
        ("55,1,?,1,east,no,", "sex", "'?'", "missing value"),
        ("55,1,male,4,east,no,", "grade", "'4'", "not a declared category value"),
        ("55,1,male,nan,east,no,", "grade", "'nan'", "not a declared category value"),
        ("55,1,male,1,eastt,no,", "site", "'eastt'", 'not a declared owner value. Did you mean "east"?'),
        ("55,1,male,1,,no,", "site", "''", "missing owner"),
        ("55,1,male,1,east,?,", "ill", "'?'", "missing target"),
        ("55,1,male,1,east,maybe,", "ill", "'maybe'", "not a declared target value"),
    ],
)
def test_a_bad_value_names_file_row_column_value_and_fix(write, row, column, value, problem):
    path = write("a line to skip", HEADER, GOOD, "", row, GOOD)
    refused(
        lambda: read_csv(path, SCHEMA, TableFormat(skip_lines=1)),
        f'{path}, row 5, column "{column}": {value} ',
        problem,
        "Fix:",
    )


@pytest.mark.parametrize(
    ("target", "value", "problem"),
    [
        (Target(positive_above=0), "?", "missing target"),
        (Target(positive_above=0), "nan", "not a finite number"),
        (Target(positive_above=0), "yes", "not a number"),
        (Target(low=0, high=1), "", "missing target"),
        (Target(low=0, high=1), "1.01", "outside the declared bounds [0, 1]"),
    ],
)
def test_a_bad_number_as_target(write, target, value, problem):
    path = write("x,y", "1,1", f"1,{value}")
    refused(lambda: read_csv(path, simple(target)), 'ward.csv, row 3, column "y":', problem, "Fix:")


def test_a_row_after_a_field_of_several_lines_is_counted_in_lines(write):
    path = write(HEADER, '55,1,male,1,east,no,"two\nlines"', "abc,1,male,1,east,no,")
    refused(lambda: read_csv(path, SCHEMA), "row 4,", "'abc'")


def test_a_long_value_is_cut_and_stays_on_one_line(write):
    path = write(HEADER, f'"{"x" * 200}\nmore",1,male,1,east,no,')
    refused(lambda: read_csv(path, SCHEMA), "row 2,", f"'{'x' * 57}...'")


@pytest.mark.parametrize(
    ("lines", "parts"),
    [
        ((), ("is empty", "Fix:")),
        (("", ""), ("is empty", "Fix:")),
        ((HEADER,), ("no rows", "Fix:")),
        ((HEADER, "", ""), ("no rows", "Fix:")),
        ((HEADER, GOOD, "55,1,male"), ("row 3 has 3 fields where 7", "Fix:")),
        ((HEADER, GOOD, GOOD + ",1"), ("row 3 has 8 fields where 7", "Fix:")),
        ((HEADER, GOOD, '55,1,"male,1,east,no,', GOOD), ("row 3 is not valid CSV", "Fix:")),
        ((HEADER, '55,1,"ma"le,1,east,no,'), ("row 2 is not valid CSV", "Fix:")),
        ((HEADER.replace(",", ";"), GOOD.replace(",", ";")), ('no column "age"', 'set separator = ";"')),
        ((HEADER.replace(",", "\t"), GOOD.replace(",", "\t")), ('no column "age"', 'set separator = "\\t"')),
        ((HEADER.replace(",", "|"), GOOD.replace(",", "|")), ('no column "age"', 'set separator = "|"')),
        ((HEADER.replace(",", ";"), "5,5;1"), ("row 2 has 2 fields", 'set separator = ";"')),
        ((HEADER.replace("dose", "dosis"), GOOD), ('no column "dose"', 'Did you mean "dosis"?', "Fix:")),
        ((HEADER + ",dose", GOOD + ",1"), ('the column "dose" twice', "Fix:")),
        ((HEADER + ",extra", GOOD + ",1"), ('the column "extra"', 'kind = "ignore"', "Fix:")),
    ],
)
def test_a_bad_file_is_named_with_its_fix(write, lines, parts):
    path = write(*lines)
    refused(lambda: read_csv(path, SCHEMA), str(path), *parts)


def test_an_ignored_column_may_be_absent(write):
    path = write(HEADER.removesuffix(",note"), "55,1.5,male,2,west,yes")
    assert len(read_csv(path, SCHEMA).targets) == 1


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"age,ill\n\xff\xfe,1\n", "not UTF-8"),
        ("age,ill\n1,2\n".encode("utf-16"), "not a text file"),
        (b"PAR1\x15\x04", "from_parquet"),
    ],
)
def test_a_file_that_is_not_utf8_csv(tmp_path, content, part):
    path = tmp_path / "odd.csv"
    path.write_bytes(content)
    refused(lambda: read_csv(path, SCHEMA), str(path), part, "Fix:")


@pytest.mark.parametrize("read", [read_csv, read_parquet])
def test_paths_that_cannot_be_read(tmp_path, read):
    refused(lambda: read(tmp_path / "no.csv", SCHEMA), "no.csv does not exist", "Fix:")
    refused(lambda: read(tmp_path, SCHEMA), str(tmp_path), "cannot be read", "Fix:")
    refused(lambda: read([], SCHEMA), "No file", "Fix:")


def test_several_files_are_read_one_after_another(write):
    schema = simple(Target(low=0, high=9))
    one, two = write("x,y", "0,1", "1,2", name="one.csv"), write("y,x", "3,1", name="two.csv")
    table = read_csv([two, str(one)], schema)
    assert table.targets.tolist() == [3, 1, 2]
    assert table.owners is None
    bad = write("x,y", "0,1", "7,1", name="bad.csv")
    refused(lambda: read_csv([one, bad], schema), 'bad.csv, row 3, column "x"')
    refused(lambda: read_csv([one, two, str(one)], schema), "one.csv is listed twice", "Fix:")


def test_owners_of_several_files_keep_the_declared_order(write):
    one = write(HEADER, GOOD, name="one.csv")
    two = write(HEADER, GOOD.replace("west", "east"), name="two.csv")
    assert read_csv([one, two], SCHEMA).owners[1].tolist() == [1, 0]


def test_one_file_per_owner_declares_the_owners(write):
    schema = simple(Target(low=0, high=9))
    one, two = write("x,y", "0,1", "1,2", name="one.csv"), write("x,y", "1,3", name="two.csv")
    names, codes = read_csv({"south": one, "north": two}, schema).owners
    assert names == ("south", "north")
    assert codes.tolist() == [0, 0, 1]
    path = write(HEADER, GOOD)
    refused(lambda: read_csv({"south": path}, SCHEMA), '"site"', "given twice", "Fix:")


def test_a_mapping_is_as_good_as_a_schema(write):
    path = write("x,y", "1,b")
    columns = {"x": {"kind": "numeric", "low": 0, "high": 1}, "y": {"kind": "target", "values": ["a", "b"]}}
    assert read_csv(path, {"columns": columns}).targets.tolist() == [1]
    columns["x"]["hihg"] = 1
    refused(lambda: read_csv(path, {"columns": columns}), '"columns.x.hihg"', '"high"')


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"separator": ",,"}, "separator"),
        ({"separator": '"'}, "separator"),
        ({"separator": "\n"}, "separator"),
        ({"skip_lines": -1}, "skip_lines"),
        ({"header": False}, "column_names"),
        ({"column_names": ("a",)}, "column_names"),
    ],
)
def test_a_layout_that_contradicts_itself(values, part):
    refused(lambda: TableFormat(**values), part)


def test_parquet_types_encode_as_their_text_would(tmp_path):
    path = tmp_path / "ward.parquet"
    frame = pl.DataFrame(
        {
            "age": [20, 55, 90],
            "dose": [0.0, None, 2.0],
            "sex": pl.Series(["male", "female", "male"], dtype=pl.Categorical),
            "grade": [1.0, None, 3.0],
            "site": ["east", " west ", "east"],
            "ill": ["no", "yes", "no"],
            "note": [[1], [2], [3]],
        }
    )
    frame.write_parquet(path)
    table = read_parquet(path, SCHEMA)
    assert table.features.tolist() == [
        [-1, 0, 1, 0, 1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0, 0, 0, 1],
        [1, 0.5, 0, 0, 1, 0, 0, 1, 0],
    ]
    assert table.owners[1].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("columns", "parts"),
    [
        ({"x": [0.5, math.nan], "y": [1, 1]}, ("row 2, column \"x\": 'NaN'", "finite")),
        ({"x": [0.5, None], "y": [1, 1]}, ("row 2, column \"x\": ''", "missing value")),
        ({"x": [[0.5], [1.0]], "y": [1, 1]}, ('column "x" holds List', "one value per row")),
        ({"x": [b"a", b"b"], "y": [1, 1]}, ('column "x" holds Binary',)),
        ({"x": [0.5, 0.5]}, ('no column "y"',)),
        ({"x": [], "y": []}, ("no rows",)),
    ],
)
def test_refused_parquet(tmp_path, columns, parts):
    path = tmp_path / "ward.parquet"
    pl.DataFrame(columns).write_parquet(path)
    refused(lambda: read_parquet(path, simple(Target(low=0, high=1))), str(path), "Fix:", *parts)


@pytest.mark.parametrize("content", [b"", b"x,y\n1,2\n", b"PAR1" + b"\0" * 40 + struct.pack("<I", 9) + b"PAR1"])
def test_a_file_that_is_not_parquet(tmp_path, content):
    path = tmp_path / "odd.parquet"
    path.write_bytes(content)
    refused(lambda: read_parquet(path, SCHEMA), str(path), "not a readable Parquet file", "Fix:")


finite = st.floats(-1e6, 1e6, allow_nan=False)


@given(st.tuples(finite, finite).map(sorted), st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_scaling_can_be_undone_and_stays_in_range(tmp_path_factory, bounds, shares):
    low, high = bounds
    assume(high - low > 1e-3)
    values = [min(max(low + share * (high - low), low), high) for share in shares]
    path = tmp_path_factory.mktemp("t") / "t.csv"
    path.write_text("\n".join(["x,y", *(f"{value!r},0" for value in values)]))
    schema = Schema(columns={"x": Numeric(low=low, high=high), "y": Target(low=0, high=1)})
    scaled = read_csv(path, schema).features[:, 0].astype(float)
    assert (np.abs(scaled) <= 1).all()
    undone = (low + high) / 2 + scaled * (high - low) / 2
    assert np.abs(undone - values).max() <= 1e-6 * (high - low) + 1e-9


labels = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=5)


@given(st.data())
def test_one_hot_can_be_undone(tmp_path_factory, data):
    values = data.draw(st.lists(labels, min_size=1, max_size=6, unique_by=lambda text: text.casefold()))
    try:
        column = Category(values=values, missing="indicator")
    except ValueError:  # two spellings of one number
        assume(False)
    drawn = data.draw(st.lists(st.sampled_from([*values, "?"]), min_size=1, max_size=20))
    path = tmp_path_factory.mktemp("t") / "t.csv"
    path.write_text("\n".join(["x,y", *(f"{value},0" for value in drawn)]), encoding="utf-8")
    schema = Schema(columns={"x": column, "y": Target(low=0, high=1)})
    try:
        features = read_csv(path, schema).features
    except InputError as error:
        raise AssertionError(drawn) from error
    assert (features.sum(axis=1) == 1).all()
    order = [*values, "?"]
    assert [order[index] for index in features.argmax(axis=1)] == drawn
