"""Declarations: what they name, what contradicts itself, and the one sentence said about a wrong key."""

import math

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from sfumato.data.schema import (
    Category,
    Numeric,
    Owner,
    Schema,
    Target,
    canonical,
    declared,
    label_codes,
    validated,
)
from sfumato.errors import InputError

AGE = {"kind": "numeric", "low": 0, "high": 100}
SITE = {"kind": "owner", "values": ["x"]}
ILL = {"kind": "target", "values": ["no", "yes"]}


def refused(action, *parts):
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    assert "Value error" not in message
    for part in parts:
        assert part in message, message


def refused_columns(columns, *parts, **rest):
    refused(lambda: validated(Schema, {"columns": columns, **rest}, "plan.toml"), "plan.toml", *parts)


def test_feature_names_follow_the_declared_order():
    schema = Schema(
        columns={
            "dose": Numeric(low=0, high=1, missing="indicator"),
            "ill": Target(values=("no", "yes")),
            "sex": Category(values=("f", "m")),
            "site": Owner(values=("east", "west")),
            "grade": Category(values=(1, 2), missing="indicator"),
            "age": Numeric(low=0, high=1),
        }
    )
    assert schema.feature_names == (
        "dose",
        "dose=missing",
        "sex=f",
        "sex=m",
        "grade=1",
        "grade=2",
        "grade=missing",
        "age",
    )
    assert schema.target[0] == "ill"
    assert schema.owner == ("site", Owner(values=("east", "west")))


def test_missing_texts_join_the_tables_own():
    schema = validated(
        Schema, {"columns": {"a": {**AGE, "missing_values": [0]}, "y": ILL}, "missing_values": ["-"]}, "x"
    )
    assert schema.missing_texts("a") == ("-", "0")
    assert schema.missing_texts("y") == ("-",)


def test_class_names():
    assert Target(values=("no", "yes")).class_names == ("no", "yes")
    assert Target(positive_above=0, classes=("healthy", "disease")).class_names == ("healthy", "disease")
    assert Target(positive_above=2.5).class_names == ("at most 2.5", "above 2.5")
    assert Target(low=0, high=1).class_names is None


def test_numbers_are_one_label_however_they_are_written():
    assert canonical("1") == canonical("1.0") == canonical("1e0") == canonical("+1")
    assert canonical("1") != canonical("2")
    assert canonical("1_0") == "1_0"
    assert canonical("nan") == "nan"
    assert canonical("9007199254740993") != canonical("9007199254740992")  # equal as floats
    codes = label_codes(["no", "1"], {"non": "no"})
    assert [codes[canonical(text)] for text in ("no", "1.0", "non")] == [0, 1, 0]


def test_declarations_are_frozen():
    with pytest.raises(ValidationError):
        Numeric(low=0, high=1).low = 5


def test_declared_takes_a_schema_or_a_mapping():
    schema = Schema(columns={"a": Numeric(low=0, high=100), "y": Target(values=("no", "yes"))})
    assert declared(schema) is schema
    assert declared({"columns": {"a": AGE, "y": ILL}}) == schema
    refused(lambda: declared({"columns": {"a": AGE}}), "schema", "target")
    refused(lambda: declared([1]), "schema", "table of keys")


def test_the_widest_and_the_narrowest_bounds():
    assert Numeric(low=-1.7e308, high=1.7e308)
    for low, high in ((1, 1), (2, 1), (0.0, 5e-324)):
        refused_columns({"a": {**AGE, "low": low, "high": high}, "y": ILL}, "columns.a", "low must be below high")


@pytest.mark.parametrize("bound", [math.nan, math.inf, "3", True, None])
def test_a_bound_must_be_a_finite_number(bound):
    refused_columns({"a": {**AGE, "low": bound}, "y": ILL}, '"columns.a.low"', "number", "not ")


@pytest.mark.parametrize(
    ("column", "parts"),
    [
        ({**AGE, "hihg": 3}, ('"columns.a.hihg" is unknown', 'Did you mean "high"?')),
        ({"kind": "numeric", "low": 1, "hihg": 3}, ('"columns.a.hihg" is unknown', 'Did you mean "high"?')),
        ({"kind": "numeric", "low": 1}, ('"columns.a.high" is missing', "Fix:")),
        ({"low": 1, "high": 2}, ('"columns.a" has no kind', "choose kind = one of numeric, category")),
        ({"kind": "numerc"}, ('"columns.a"', 'kind "numerc"', 'Did you mean "numeric"?')),
        ({**AGE, "missing": "drop"}, ('"columns.a.missing"', "value 'drop'", '"indicator", "refuse"')),
        ({**AGE, "missing": "refsue"}, ('"columns.a.missing"', 'Did you mean "refuse"?')),
        ({"kind": "category", "values": []}, ('"columns.a.values"', "at least 1")),
        ({"kind": "category", "values": "abc"}, ('"columns.a.values"', "tuple")),
        ({"kind": "category", "values": ["x", True]}, ('"columns.a.values[1]"', "string", "not True")),
        ({"kind": "category", "values": ["x", "x"]}, ('"columns.a"', "'x' and 'x' are the same")),
        ({"kind": "category", "values": ["1", "1.0"]}, ('"columns.a"', "'1' and '1.0' are the same")),
        (
            {"kind": "category", "values": ["left"], "aliases": {"l": "lefd"}},
            ('"columns.a"', "'lefd'", 'Did you mean "left"?'),
        ),
        ({"kind": "category", "values": ["x"], "aliases": {"x": "x"}}, ('"columns.a"', "are the same")),
        ({"kind": "owner", "values": []}, ('"columns.a.values"', "at least 1")),
        (7, ('"columns.a"',)),
    ],
)
def test_a_wrong_column_is_told_in_one_sentence(column, parts):
    refused_columns({"a": column, "b": AGE, "y": ILL}, *parts)


@pytest.mark.parametrize(
    ("target", "part"),
    [
        ({}, "exactly one of"),
        ({"values": ["a", "b"], "positive_above": 0}, "exactly one of"),
        ({"positive_above": 0, "low": 0, "high": 1}, "exactly one of"),
        ({"low": 0}, "give both"),
        ({"low": 1, "high": 0}, "below high"),
        ({"values": ["a"]}, "at least 2"),
        ({"values": ["a", "a"]}, "are the same"),
        ({"values": ["a", "b"], "classes": ["c", "d"]}, "positive_above only"),
        ({"positive_above": 0, "classes": ["c", "c"]}, "same name"),
        ({"positive_above": 0, "aliases": {"a": "b"}}, "values only"),
        ({"positive_above": math.nan}, "finite number"),
    ],
)
def test_a_wrong_target_is_told_in_one_sentence(target, part):
    refused_columns({"a": AGE, "y": {"kind": "target", **target}}, "columns.y", part)


@pytest.mark.parametrize(
    ("columns", "part"),
    [
        ({"a": AGE}, "exactly one column"),
        ({"a": AGE, "y": ILL, "z": ILL}, '"y" and "z"'),
        ({"y": ILL}, "no column is a feature"),
        ({"a": AGE, "y": ILL, "o": SITE, "p": SITE}, '"o" and "p"'),
        ({"a": {"kind": "category", "values": ["missing"], "missing": "indicator"}, "y": ILL}, '"a=missing"'),
        ({"a": {"kind": "category", "values": ["x", "?"]}, "y": ILL}, "'?'"),
        ({"a": {"kind": "category", "values": ["0"], "missing_values": ["0.0"]}, "y": ILL}, "'0'"),
        ({"a": AGE, "y": {"kind": "target", "values": ["?", "yes"]}}, "'?'"),
    ],
)
def test_a_table_that_contradicts_itself(columns, part):
    refused_columns(columns, part)


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")
    size: int
    schema_: Schema | None = None


class Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")
    inner: Inner
    steps: list[Inner] = []
    rate: float | str = 0.0


@pytest.mark.parametrize(
    ("mapping", "parts"),
    [
        ({"innr": {"size": 1}}, ('"innr" is unknown', 'Did you mean "inner"?')),
        ({"inner": {"szie": 1}}, ('"inner.szie" is unknown', 'Did you mean "size"?')),
        ({"inner": {"size": 1}, "steps": [{"size": 1}, {"szie": 2}]}, ('"steps[1].szie"', '"size"')),
        ({"inner": {"size": "x"}}, ('"inner.size"', "integer", "not 'x'")),
        ({"inner": {"size": 1}, "rate": [1]}, ('"rate"', "not [1]")),
        ({"inner": {"size": "y" * 500}}, ('"inner.size"', "yyy...")),
        (
            {"inner": {"size": 1, "schema_": {"columns": {"a": {**AGE, "lwo": 1}, "y": ILL}}}},
            ('"inner.schema_.columns.a.lwo" is unknown', 'Did you mean "low"?'),
        ),
        (
            {"inner": {"size": 1, "schema_": {"columns": {"a": AGE}}}},
            ('"inner.schema_"', 'kind = "target"'),
        ),
    ],
)
def test_validated_serves_any_model(mapping, parts):
    refused(lambda: validated(Outer, mapping, "run.toml"), "run.toml: key ", *parts)


def test_validated_returns_the_model():
    assert validated(Outer, {"inner": {"size": 3}}, "run.toml").inner.size == 3
