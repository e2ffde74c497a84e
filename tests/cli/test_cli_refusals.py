"""Bad input to `sfumato train`: exit code 2, one line that names the thing, and nothing written."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from arms import FEDERATED

from sfumato import Budget, Ledger
from sfumato.config import Experiment

EXAMPLES = Path(__file__).parents[2] / "examples"


def put(*keys, value):
    def change(study):
        section = study.config
        for key in keys[:-1]:
            section = section.setdefault(key, {})
        section[keys[-1]] = value

    return change


def drop(*keys):
    def change(study):
        section = study.config
        for key in keys[:-1]:
            section = section[key]
        del section[keys[-1]]

    return change


def row(text):
    return lambda study: study.rows.append(text)


def only(*rows):
    def change(study):
        study.rows = list(rows)

    return change


def poor_ledger(study):
    with Ledger(study.folder / "l.db") as ledger:
        ledger.grant("clinics", Budget(1.0, 1e-3))
    study.config["ledger"] = {"path": "l.db", "dataset": "clinics"}


def corrupt_ledger(study):
    (study.folder / "l.db").write_bytes(b"not a ledger" * 100)
    study.config["ledger"] = {"path": "l.db", "dataset": "clinics"}


def ungranted(study):
    with Ledger(study.folder / "l.db") as ledger:
        ledger.grant("clinics", Budget(9.0, 1e-3))
    study.config["ledger"] = {"path": "l.db", "dataset": "clinic"}


def both(*changes):
    return lambda study: [change(study) for change in changes]


def semicolons(study):
    study.rows = [row.replace(",", ";") for row in study.rows]


AVERAGED = FEDERATED | {"algorithm": "fedavg"}
COLUMNS = ("data", "columns")
BAD = {
    "misspelt key": (put("privacy", "epsilom", value=1), 'Did you mean "epsilon"?'),
    "key of no kind": (put("training", "zzz", value=1), '"server_momentum", "tau", "tolerate", "weighting", "workers".'),
    "misspelt section": (put("trainig", "mode", value="central"), 'Did you mean "training"?'),
    "misspelt column key": (put(*COLUMNS, "age", "hihg", value=1), 'Did you mean "high"?'),
    "missing key": (drop("privacy", "population"), "population"),
    "missing column": (put(*COLUMNS, "weight", value={"kind": "numeric", "low": 0, "high": 9}), "weight"),
    "undeclared column": (drop(*COLUMNS, "smoker"), "smoker"),
    "text for a number": (row("old,no,north,no"), "row 82, column \"age\": 'old' is not a number"),
    "NaN": (row("nan,no,north,no"), "age"),
    "missing value": (row(",no,north,no"), "age"),
    "out of bounds": (row("101,no,north,no"), "age"),
    "unknown category": (row("50,maybe,north,no"), "maybe"),
    "unknown owner": (row("50,no,east,no"), "east"),
    "short row": (row("50,no"), "row 82"),
    "empty file": (only(), "clinics.csv"),
    "header alone": (only("age,smoker,clinic,ill"), "clinics.csv"),
    "no file": (put("data", "path", value="none.csv"), "none.csv"),
    "unset variable": (put("data", "path", value="${SFUMATO_NOT_SET}/a.csv"), "SFUMATO_NOT_SET"),
    "two sources": (put("data", "builtin", value="heart"), "builtin"),
    "epsilon 0": (put("privacy", "epsilon", value=0), 'study.toml: key "privacy.epsilon": epsilon must be a number above 0'),
    "epsilon a word": (put("privacy", "epsilon", value="one"), "epsilon"),
    "epsilon true": (put("privacy", "epsilon", value=True), "epsilon"),
    "delta too large": (put("privacy", "delta", value=0.1), "1/60"),
    "clip 0": (put("privacy", "clip", value=0), "clip"),
    "epsilon below what is resolved": (put("privacy", "epsilon", value=1e-5), "study.toml: [privacy] epsilon"),
    "delta missing": (drop("privacy", "delta"), 'key "privacy.delta": the key is missing; add it'),
    "delta 1": (put("privacy", "delta", value=1), "privacy.delta"),
    "steps and epochs": (put("privacy", "epochs", value=1), "both given; remove one"),
    "no steps": (drop("privacy", "steps"), "neither steps nor epochs is given; add one"),
    "steps 1.5": (put("privacy", "steps", value=1.5), "privacy.steps"),
    "epochs 0": (both(drop("privacy", "steps"), put("privacy", "epochs", value=0)), "epochs must be"),
    "unknown unit": (put("privacy", "unit", value="recrd"), 'study.toml: [privacy] unit \'recrd\' is unknown'),
    "unknown sampling": (put("privacy", "sampling", value="poison"), 'Did you mean "poisson"?'),
    "no table": (put("privacy", value=3), "must be a table of keys and values, not 3"),
    "path a number": (put("data", "path", value=3), 'key "data.path": '),
    "unknown set": (put("data", value={"builtin": "hart"}), 'study.toml: [data] There is no data set "hart"'),
    "test part above all": (put("data", "test_fraction", value=1.5), "test_fraction must lie in (0, 1), not 1.5"),
    "test part too small": (put("data", "test_fraction", value=1e-4), "study.toml: [data] test_fraction"),
    "two separators": (put("data", "separator", value=",,"), 'study.toml: key "data": separator'),
    "semicolons": (semicolons, 'set separator = ";"'),
    "seed -1": (put("training", "seed", value=-1), "training.seed"),
    "split seed -1": (put("data", "split_seed", value=-1), "data.split_seed"),
    "misspelt mode": (put("training", "mode", value="centrl"), 'Did you mean "central"?'),
    "learning rate a word": (put("training", "learning_rate", value="fast"), "training.learning_rate"),
    "hidden 0": (put("model", value={"kind": "mlp", "hidden": [0]}), "model.hidden[0]"),
    "owner without records": (
        both(put(*COLUMNS, "clinic", "values", value=["north", "south", "east"]), put("training", value=FEDERATED)),
        'study.toml: [data] study: the declared owner "east" has no records',
    ),
    "no owners": (
        both(put(*COLUMNS, "clinic", value={"kind": "ignore"}), put("training", value=FEDERATED)),
        "study.toml: [data] study: the records have no owners",
    ),
    "every client lost": (
        put("training", value=FEDERATED | {"noise": "shared", "tolerate": 2}), "study.toml: the run was refused: "
    ),
    "populations missing": (put("training", value=AVERAGED), "study.toml: [privacy.populations] has no entry for north"),
    "one population missing": (
        both(put("privacy", "populations", value={"north": 30}), put("training", value=AVERAGED)),
        "[privacy.populations] has no entry for south",
    ),
    "misspelt population": (
        both(put("privacy", "populations", value={"north": 30, "suoth": 30}), put("training", value=AVERAGED)),
        'Did you mean "south"?',
    ),
    "batch above population": (put("privacy", "batch_size", value=61), "batch_size"),
    "learning rate 0": (put("training", "learning_rate", value=0), "learning_rate"),
    "noise for one curator": (put("training", "noise", value="local"), 'mode = "federated"'),
    "no algorithm": (put("training", value={"mode": "federated", "learning_rate": 1}), "algorithm"),
    "tolerate alone": (put("training", value=FEDERATED | {"tolerate": 1}), 'noise = "shared"'),
    "clients of one curator": (put("privacy", "unit", value="client"), 'choose mode = "federated"'),
    "hidden layers of a line": (put("model", "hidden", value=[3]), "hidden"),
    "cnn on a table": (put("model", "kind", value="cnn"), "cnn"),
    "unknown factory": (put("model", value={"factory": "no_such_module:make"}), "no_such_module"),
    "too small a grant": (poor_ledger, "left"),
    "corrupt ledger": (corrupt_ledger, "l.db"),
    "no grant": (ungranted, "clinic"),
    "no ledger": (put("ledger", value={"path": "none.db", "dataset": "d"}), "There is no ledger"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_one_line_and_writes_nothing(study, refused, change, words):
    change(study)
    assert words in refused(study.train())
    assert not study.out.exists()


@pytest.mark.parametrize("word", ["nan", "-inf"])
def test_toml_numbers_that_are_none_are_refused(study, refused, command, word):
    study.write()
    study.path.write_text(study.path.read_text().replace("epsilon = 2.0", f"epsilon = {word}"))
    assert "epsilon" in refused(command("train", str(study.path), "--out", str(study.out)))
    assert not study.out.exists()


def test_a_value_outside_its_bounds_counts_as_the_bound_where_the_schema_says_so(study):
    study.rows.append("101,no,north,yes")
    study.config["data"]["columns"]["age"]["clamp"] = True
    assert study.train().exit_code == 0


def test_without_a_promise_delta_may_be_left_out(study):
    study.config["privacy"]["epsilon"] = "inf"
    del study.config["privacy"]["delta"]
    assert study.train().exit_code == 0


def test_the_untouched_study_is_sound(study):
    """So that every refusal above comes from its own change."""
    assert study.train().exit_code == 0


def test_files_that_are_no_configuration_are_refused(command, refused, tmp_path):
    assert "does not exist" in refused(command("train", str(tmp_path / "none.toml")))
    broken = tmp_path / "broken.toml"
    broken.write_text("[data\n")
    assert "not valid TOML" in refused(command("train", str(broken)))
    assert "result.json" in refused(command("report", str(tmp_path)))


def test_a_folder_that_is_in_use_is_left_alone(study, refused):
    study.out.mkdir()
    (study.out / "thesis.txt").write_text("keep")
    assert "not empty" in refused(study.train())
    assert [path.name for path in study.out.iterdir()] == ["thesis.txt"]
    assert "[checkpoint]" in refused(study.train("--resume"))


@pytest.mark.parametrize("name", ["heart", "adult"])
def test_the_examples_are_sound(name):
    plan = Experiment(EXAMPLES / f"{name}.toml").plan()
    assert plan.spending.epsilon <= 1
    assert math.isclose(plan.spending.epsilon, 1, rel_tol=1e-3)


def test_the_heart_example_brings_records_and_a_model():
    experiment = Experiment(EXAMPLES / "heart.toml")
    training, test = experiment.records()
    assert len(training) + len(test) == 920
    assert experiment.model(training)(training.features[:3]).shape == (3, 2)
