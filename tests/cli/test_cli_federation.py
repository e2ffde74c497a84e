"""Federations in TOML: every algorithm and its knobs, who the clients are, who is lost, when it stops, what it shows."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from arms import FEDERATED
from rich.console import Console
from torch.optim import SGD

import sfumato as sf
from sfumato import runs
from sfumato.config import Experiment
from sfumato.federation_config import DropOut, RollCall
from sfumato.learning.stopping import FirstOf, Plateau, Target

LOCAL = {"local_steps": 2, "local_batch_size": 5}
KNOBS = {
    "fedsgd": {},
    "fedavg": LOCAL | {"server_lr": 0.5},
    "fedprox": LOCAL | {"server_lr": 0.5, "mu": 0.1},
    "fedavgm": LOCAL | {"server_lr": 0.5, "server_momentum": 0.5},
    "fedadam": LOCAL | {"server_lr": 0.1, "beta1": 0.8, "beta2": 0.9, "tau": 0.01},
    "fedyogi": LOCAL | {"server_lr": 0.1, "beta1": 0.8, "beta2": 0.9, "tau": 0.01},
    "fedadagrad": LOCAL | {"server_lr": 0.1, "beta1": 0.8, "tau": 0.01},
    "scaffold": LOCAL | {"server_lr": 0.5},
    "fednova": LOCAL | {"server_lr": 0.5, "effective_steps": 3.0},
    "ditto": LOCAL | {"server_lr": 0.5, "pull": 0.3},
    "fedper": LOCAL | {"server_lr": 0.5, "personal_layers": ["3"]},
}
EVERY_KNOB = {key: value for knobs in KNOBS.values() for key, value in knobs.items() if key not in LOCAL}
HEADINGS = ("Who holds what", "Each client’s part")


def training(algorithm, **more):
    return {"mode": "federated", "algorithm": algorithm, "learning_rate": 0.1} | KNOBS[algorithm] | more


def plain(study, **more):
    """Let the two clinics train without a promise, each taking part in every round."""
    study.config["privacy"] = {"epsilon": "inf", "population": 60, "batch_size": 60, "steps": 4} | more


def of_clients(study, epsilon=2.0, clients=2, cohort=2, steps=4):
    study.config["privacy"] = {
        "epsilon": epsilon, "delta": 1e-4, "unit": "client", "population": clients, "batch_size": cohort, "steps": steps
    }  # fmt: skip


def page_of(study):
    return (study.out / "report.html").read_text()


@pytest.mark.parametrize("algorithm", KNOBS)
def test_every_algorithm_takes_its_knobs_and_trains(study, algorithm):
    study.config["model"] = {"kind": "mlp", "hidden": [3]}
    study.config["training"] = training(algorithm)
    plain(study)
    done = study.train()
    assert done.exit_code == 0, done.output
    (run,) = study.result()["runs"]
    assert run["mode"] == "federated"
    assert set(run["metrics"]["accuracy"]["per_owner"]) == {"north", "south"}


def test_what_is_written_is_what_runs(study):
    made = {}
    for algorithm in KNOBS:
        study.config["training"] = training(algorithm)
        study.write()
        experiment = Experiment(study.path)
        made[algorithm] = experiment.config.training.make_algorithm(partial(SGD, lr=0.1))
    assert {name: type(one) for name, one in made.items()} == {
        "fedsgd": sf.FedSGD, "fedavg": sf.FedAvg, "fedprox": sf.FedProx, "fedavgm": sf.FedAvgM, "fedadam": sf.FedAdam,
        "fedyogi": sf.FedYogi, "fedadagrad": sf.FedAdagrad, "scaffold": sf.Scaffold, "fednova": sf.FedNova,
        "ditto": sf.Ditto, "fedper": sf.FedPer,
    }  # fmt: skip
    for name, one in made.items():
        if name == "fedsgd":
            continue
        assert (one.local_steps, one.local_epochs, one.batch_size) == (2, None, 5)
        if hasattr(one, "server"):
            assert one.server([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["lr"] == 0.5
    assert (made["fedavgm"].server_lr, made["fedavgm"].momentum) == (0.5, 0.5)
    adam = made["fedadam"]
    assert (adam.server_lr, adam.beta1, adam.beta2, adam.tau) == (0.1, 0.8, 0.9, 0.01)
    assert (made["fedprox"].mu, made["fednova"].effective_steps, made["ditto"].pull) == (0.1, 3.0, 0.3)
    assert made["fedper"].personal_layers == ("3",)


def test_epochs_take_the_place_of_steps(study):
    study.config["training"] = {"mode": "federated", "algorithm": "fedavg", "learning_rate": 0.1, "local_epochs": 3}
    study.write()
    made = Experiment(study.path).config.training.make_algorithm(partial(SGD, lr=0.1))
    assert (made.local_steps, made.local_epochs) == (None, 3)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        (None, None),
        ("uniform", sf.Uniform()),
        ("records", sf.ByRecords()),
        ({"most": 9}, sf.UpTo(9)),
        ({"most": 9, "expected": 0.5}, sf.UpTo(9, 0.5)),
    ],
)
def test_weights_of_clients(study, written, meant):
    plain(study)
    study.config["training"] = training("fedavg") | ({} if written is None else {"weighting": written})
    study.write()
    assert Experiment(study.path).config.training.make_weighting() == meant


@pytest.mark.parametrize(
    ("key", "algorithm"),
    [(key, name) for key in EVERY_KNOB for name, knobs in KNOBS.items() if key not in knobs],
)
def test_a_knob_that_the_algorithm_does_not_have_is_refused_with_those_that_do(study, refused, key, algorithm):
    study.config["training"] = training(algorithm) | {key: EVERY_KNOB[key]}
    said = refused(study.train())
    assert f'key "training": {key} goes with algorithm = ' in said
    assert said.endswith("only; remove it.\n")
    named = re.findall(r'"(fed\w+|scaffold|ditto)"', said)
    assert named == [name for name, knobs in KNOBS.items() if key in knobs]
    assert not study.out.exists()


def federation(**keys):
    return lambda study: study.config.update(training=training("fedavg"), federation=keys)


def trained(algorithm="fedavg", **keys):
    return lambda study: (plain(study), study.config.update(training=training(algorithm) | keys))


def trained_with(section):
    return lambda study: study.config.update(training=section)


def private(**keys):
    return lambda study: (of_clients(study), study.config.update(training=training("fedavg") | keys))


BAD = {
    "local steps of one gradient": (
        trained("fedsgd", local_steps=2), 'local_steps goes with algorithm = "fedavg" and its relatives only'
    ),
    "steps and epochs": (trained(local_epochs=1), "local_steps and local_epochs are both given; remove one"),
    "no personal layers": (
        trained_with({"mode": "federated", "algorithm": "fedper", "learning_rate": 1}),
        "needs the layers that stay with the client",
    ),
    "empty personal layers": (trained("fedper", personal_layers=[]), "training.personal_layers"),
    "misspelt algorithm": (trained_with(FEDERATED | {"algorithm": "fedprx"}), 'Did you mean "fedprox"?'),
    "momentum of 1": (trained("fedavgm", server_momentum=1.0), "server_momentum must lie in [0, 1)"),
    "mu of 0": (trained("fedprox", mu=0.0), "mu must be a finite number above 0"),
    "scaffold with adam": (
        trained("scaffold", optimizer="adam"), "study.toml: [training] Scaffold reads a client's mean gradient"
    ),
    "misspelt weighting": (trained(weighting="uniforn"), 'Did you mean "uniform"?'),
    "misspelt weighting key": (trained(weighting={"mots": 3}), 'Did you mean "most"?'),
    "weighting most 0": (trained(weighting={"most": 0}), "most must be a whole number of at least 1"),
    "unbounded weights": (private(weighting="records"), 'weighting = "records" does not bound how much a client counts'),
    "weights of records": (
        trained_with(FEDERATED | {"weighting": "uniform"}),
        '[training] weighting goes with [privacy] unit = "client" only; remove it',
    ),
    "quorum of records": (
        trained_with(FEDERATED | {"quorum": 1}),
        '[training] quorum goes with [privacy] unit = "client" only; remove it',
    ),
    "quorum above the cohort": (private(quorum=3), "A quorum of 3 is more than the 2 clients"),
    "no workers": (trained(workers=0), "workers must be a whole number of at least 1"),
    "one curator's federation": (
        lambda study: study.config.update(federation={"by": "owner"}), '[federation] goes with [training] mode = "federated"'
    ),
    "one curator's quorum": (
        lambda study: study.config["training"].update(quorum=1), 'quorum goes with mode = "federated" only'
    ),
    "misspelt partition": (federation(partition="dirichle", clients=3), 'Did you mean "dirichlet"?'),
    "owners dealt out": (federation(by="owner", partition="iid", clients=3), "by and partition are both given"),
    "clients of owners": (federation(clients=3), "clients goes with partition only; remove it"),
    "no number of clients": (federation(partition="iid"), 'clients is missing, which goes with partition = "iid"'),
    "no alpha": (federation(partition="quantity", clients=3), 'alpha is missing, which goes with partition = "quantity"'),
    "no shards": (federation(partition="shards", clients=3), "per_client is missing"),
    "alpha of none": (
        federation(partition="iid", clients=3, alpha=1.0), 'alpha goes with partition = "dirichlet" or "quantity" only'
    ),
    "shards of none": (
        federation(partition="dirichlet", clients=3, alpha=1.0, per_client=2), 'per_client goes with partition = "shards" only'
    ),
    "too many clients": (
        lambda study: (
            plain(study), federation(partition="iid", clients=99)(study)
        ), "study.toml: [federation] study: there are too few records for 99 clients",
    ),
    "everybody lost": (federation(drop_out=1.0), "drop_out must lie in (0, 1)"),
    "stop without a rule": (federation(stop={"every": 2}), "the rule is missing; add target"),
    "stop above one": (federation(stop={"target": 95.0}), "target must lie in (0, 1], not 95.0"),
    "a rise of no plateau": (federation(stop={"target": 0.9, "by": 0.1}), "by goes with plateau only"),
    "misspelt rule": (federation(stop={"taget": 0.9}), 'Did you mean "target"?'),
    "a stop of personal layers": (
        lambda study: study.config.update(training=training("fedper"), federation={"stop": {"target": 0.9}}),
        "[federation] stop looks at the shared model, whose personal layers nobody trains",
    ),
    "a stop of numbers": (
        lambda study: (
            plain(study),
            study.config["data"]["columns"].update(
                ill={"kind": "ignore"}, age={"kind": "target", "low": 0, "high": 100}
            ),
            federation(stop={"target": 0.9})(study),
        ),
        "[federation] stop looks at the accuracy on the test part, and these targets are no classes",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), BAD.values(), ids=BAD)
def test_a_federation_that_does_not_fit_is_refused_in_one_line(study, refused, change, words):
    change(study)
    assert words in refused(study.train())
    assert not study.out.exists()


@pytest.mark.parametrize(
    ("algorithm", "key"), [("fedprox", "mu"), ("fedyogi", "beta2"), ("fednova", "effective_steps")]
)
def test_no_knob_lets_a_nan_through(study, command, refused, algorithm, key):
    trained(algorithm)(study)
    study.write()
    text = study.path.read_text()
    study.path.write_text(re.sub(rf"^{key} = .*$", f"{key} = nan", text, flags=re.MULTILINE))
    said = refused(command("train", str(study.path), "--out", str(study.out)))
    assert f"{key} must" in said
    assert said.endswith("not nan.\n")


@pytest.mark.parametrize(
    ("written", "least", "most"),
    [
        ({"partition": "iid", "clients": 6}, 10, 10),
        ({"partition": "dirichlet", "clients": 6, "alpha": 0.5}, 1, 59),
        ({"partition": "quantity", "clients": 6, "alpha": 0.5}, 1, 59),
        ({"partition": "shards", "clients": 6, "per_client": 2}, 10, 10),
    ],
)
def test_records_are_dealt_out_as_declared(study, written, least, most):
    study.config["training"] = training("fedavg")
    study.config["federation"] = written
    plain(study)
    study.write()
    experiment = Experiment(study.path)
    records, _ = experiment.records()
    clients = experiment.clients(records)
    sizes = [len(held) for held in clients.values()]
    assert len(sizes) == 6
    assert sum(sizes) == len(records) == 60
    assert least <= min(sizes) <= max(sizes) <= most
    again = experiment.clients(records)
    assert clients.identity() == again.identity()
    study.config["federation"]["seed"] = 1
    study.write()
    assert Experiment(study.path).clients(records).identity() != clients.identity()
    assert study.train().exit_code == 0


def test_owners_are_the_clients_unless_said_otherwise(study):
    study.config["training"] = training("fedavg")
    for section in ({}, {"federation": {"by": "owner"}}):
        study.config |= section
        study.write()
        experiment = Experiment(study.path)
        assert list(experiment.clients(experiment.records()[0])) == ["north", "south"]


def test_clients_dealt_out_are_protected_as_wholes(study):
    of_clients(study, clients=20, cohort=10)
    study.config["training"] = training("fedavg", quorum=1, weighting="uniform", workers=1)
    study.config["federation"] = {"partition": "iid", "clients": 20, "drop_out": 0.2}
    done = study.train()
    assert done.exit_code == 0, done.output
    privacy = study.result()["runs"][0]["privacy"]
    assert (privacy["unit"], privacy["sampling"]["rate"]) == ("client", 0.5)
    assert any("Whether a round was void" in sentence for sentence in privacy["not_covered"])


def test_clients_are_lost_by_chance_the_same_every_time_and_independently():
    lost = DropOut(0.3, seed=5)
    found = torch.tensor([[lost(step, f"client-{number}") for number in range(200)] for step in range(200)]).double()
    # 40,000 tosses: a share 0.0115 away from 0.3 is five standard deviations.
    assert abs(float(found.mean()) - 0.3) < 0.0115
    # Steps and clients spread like independent tosses: the variance of 200 means is 0.21 / 200, here within six deviations.
    for axis in (0, 1):
        assert 0.4 < float(found.mean(axis).var()) / (0.21 / 200) < 1.6
    again = DropOut(0.3, seed=5)
    assert [again(step, "client-0") for step in range(200)] == found[:, 0].bool().tolist()
    other = DropOut(0.3, seed=6)
    assert [other(step, "client-0") for step in range(200)] != found[:, 0].bool().tolist()


def test_the_roll_is_called_once_for_each_client_that_is_asked(study, monkeypatch):
    calls = []
    kept = RollCall.__call__
    monkeypatch.setattr(RollCall, "__call__", lambda self, *one: (calls.append(one), kept(self, *one))[1])
    study.config["training"] = training("fedavg")
    study.config["federation"] = {"drop_out": 0.5}
    plain(study, steps=10)
    assert study.train().exit_code == 0
    assert sorted(calls) == [(step, name) for step in range(10) for name in ("north", "south")]


def test_a_roll_tells_who_was_asked_and_who_answered():
    roll, lost = RollCall(DropOut(0.5)), DropOut(0.5)
    answers = [roll(step, "x") for step in range(50)]
    assert answers == [lost(step, "x") for step in range(50)]
    assert (roll.asked["x"], roll.answered["x"]) == (50, 50 - sum(answers))
    assert roll.asked["never"] == 0
    assert RollCall(None)(0, "x") is False


def test_a_run_stops_at_its_target_and_says_so(study):
    study.config["training"] = training("fedavg", learning_rate=0.5)
    study.config["federation"] = {"stop": {"target": 0.01, "every": 3}}
    plain(study, steps=50)
    done = study.train()
    assert done.exit_code == 0, done.output
    assert re.search(r"Stopped early: the score \S+ reached the target 0.01, at step 3 of 50\.", done.stdout)


def test_a_private_run_that_stops_early_is_charged_as_a_whole(study):
    study.config["training"] = dict(FEDERATED)
    # An accuracy cannot rise by more than 1, so the second look is the last, whatever the noise.
    study.config["federation"] = {"stop": {"plateau": 1, "by": 1.0}}
    done = study.train()
    assert done.exit_code == 0, done.output
    assert "at step 2 of 4" in done.stdout
    privacy = study.result()["runs"][0]["privacy"]
    assert 1.9 < privacy["epsilon"] <= 2
    assert any("the stopping rule looked at" in sentence for sentence in privacy["not_covered"])


def test_the_rule_is_what_is_written(study):
    def score(_):
        return 0.5

    study.config["training"] = training("fedavg")
    rules = []
    for written in ({"target": 0.9, "every": 2}, {"plateau": 4, "by": 0.01}, {"target": 0.9, "plateau": 4}):
        study.config["federation"] = {"stop": written}
        study.write()
        rules.append(Experiment(study.path).config.federation.make_stop(score))
    assert rules == [
        Target(score, 0.9, 2),
        Plateau(score, 4, 0.01),
        FirstOf((Target(score, 0.9), Plateau(score, 4))),
    ]


def test_rounds_with_too_few_answers_are_counted_and_told(study, command):
    of_clients(study, epsilon=2.0, steps=8)
    study.config["training"] = training("fedavg", quorum=2)
    study.config["federation"] = {"drop_out": 0.7, "seed": 1}
    lost = DropOut(0.7, 1)
    void = sum(any(lost(step, name) for name in ("north", "south")) for step in range(8))
    assert void > 0
    done = study.train()
    assert done.exit_code == 0, done.output
    assert f"Rounds in which too few clients answered: {void}. They are spent and released nothing." in done.stdout


def test_a_plain_federation_shows_its_clients(study, command):
    study.config["training"] = training("ditto")
    study.config["federation"] = {"drop_out": 0.5}
    plain(study, steps=10)
    assert study.train().exit_code == 0
    page = page_of(study)
    for heading in HEADINGS:
        assert f"<h2>{heading}</h2>" in page
    assert "The accuracy of a client was measured on its test records." in page
    assert "diamond: own" in page
    assert not re.search(r'(?:src|href)="(?!#)', page)
    # `result.json` holds none of it, so the page that is made from it does not either.
    assert command("report", str(study.out)).exit_code == 0
    for heading in HEADINGS:
        assert heading not in page_of(study)


def test_a_private_federation_shows_its_clients_to_the_owner_only(study):
    study.config["training"] = dict(FEDERATED)
    assert study.train().exit_code == 0
    for heading in HEADINGS:
        assert heading not in page_of(study)
    open_ones = study.result()["runs"][0]["privacy"]["not_covered"]
    study.out = study.folder / "owner"
    assert study.train("--owner-report").exit_code == 0
    for heading in HEADINGS:
        assert f"<h2>{heading}</h2>" in page_of(study)
    (more,) = set(study.result()["runs"][0]["privacy"]["not_covered"]) - set(open_ones)
    assert more.startswith("The sections for the data's owner")
    assert "owner" not in study.result()


def test_one_curator_has_no_clients_to_show(study, refused):
    assert 'mode = "central"; leave it out' in refused(study.train("--owner-report"))
    assert not study.out.exists()


def test_parts_that_were_dealt_out_are_scored_on_what_they_trained_on(study):
    plain(study)
    study.config["training"] = training("fedavg")
    study.config["federation"] = {"partition": "iid", "clients": 6}
    assert study.train().exit_code == 0
    assert "measured on the records it trained on" in page_of(study)


@pytest.mark.parametrize(("dealt", "scored"), [({}, True), ({"partition": "iid", "clients": 3}, False)])
def test_personal_layers_are_scored_with_their_owner_or_not_at_all(study, dealt, scored):
    study.config["model"] = {"kind": "mlp", "hidden": [3]}
    study.config["training"] = training("fedper", learning_rate=0.5, local_steps=5)
    study.config["federation"] = dealt
    plain(study, steps=40)
    done = study.train()
    assert done.exit_code == 0, done.output
    metrics = study.result()["runs"][0]["metrics"]
    assert bool(metrics) == scored
    if scored:
        assert metrics["accuracy"]["mean"] > 0.7


@pytest.fixture
def terminal(monkeypatch):
    """Let the progress bars believe that they are seen, and return what they showed."""
    shown = Console(force_terminal=True, width=250, record=True, file=open("/dev/null", "w", encoding="utf-8"))  # noqa: SIM115
    monkeypatch.setattr(runs, "Console", lambda **_: shown)
    yield shown.export_text
    shown.file.close()


def test_the_bar_shows_round_cohort_budget_accuracy_and_time(study, terminal):
    of_clients(study, clients=20, cohort=10, steps=40)
    study.config["training"] = training("fedavg")
    study.config["federation"] = {"partition": "iid", "clients": 20}
    assert study.train().exit_code == 0
    seen = terminal()
    assert re.search(
        r"round .*40/40 about 10 of 20 clients, epsilon 2 spent, \S+ left, test accuracy [\d.]+% "
        r"\(not covered by the budget\) \d+:\d\d:\d\d",
        seen,
    ), seen[-600:]
    assert not re.search(r"about (?!10 of 20 clients)", seen)


def test_the_bar_of_a_plain_run_promises_nothing(study, terminal):
    plain(study)
    study.config["training"] = training("fedavg")
    assert study.train().exit_code == 0
    seen = terminal()
    assert re.search(r"round .*4/4 2 clients, no privacy promised, test accuracy [\d.]+% ", seen), seen[-600:]
    assert "not covered" not in seen


def test_nothing_is_scored_for_a_bar_that_nobody_sees(study, monkeypatch):
    scored = []
    kept = runs.rights_of
    monkeypatch.setattr(runs, "rights_of", lambda *one: (scored.append(one), kept(*one))[1])
    study.config["training"] = dict(FEDERATED)
    assert study.train().exit_code == 0
    assert len(scored) == 1  # the accuracy at the end


def test_the_number_of_workers_changes_nothing(study):
    weights = []
    for workers in (1, 2):
        study.out = study.folder / f"out{workers}"
        plain(study, unit="client", population=6, batch_size=6)
        study.config["training"] = training("fedavg", workers=workers, local_batch_size=100)
        study.config["federation"] = {"partition": "iid", "clients": 6}
        assert study.train().exit_code == 0
        weights.append(torch.load(study.out / "model.pt", weights_only=True)["1.weight"])
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-6)
