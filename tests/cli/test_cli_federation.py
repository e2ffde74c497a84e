"""Federations in TOML: every algorithm and its knobs, who the clients are, who is lost, when it stops, what it shows."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from itertools import pairwise

import pytest
import torch
from arms import FEDERATED
from rich.console import Console
from torch.optim import SGD

import sfumato as sf
from sfumato import runs
from sfumato.config import Experiment
from sfumato.engines.dropping import DropOut
from sfumato.errors import InputError
from sfumato.federation_config import Delay, RollCall
from sfumato.learning.stopping import FirstOf, Plateau, Rounds, Target
from sfumato.personal_models import write_personal_models

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
    plain(study)
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


def apart(privacy=None, **keys):
    """Let twelve clients take part twice each at most, three rounds or more apart, under noise that takes itself back."""

    def change(study):
        of_clients(study, clients=12, cohort=2, steps=8)
        study.config["privacy"] |= {"sampling": "min-separation", "separation": 3, "participations": 2} | (
            privacy or {}
        )
        study.config["training"] = training("fedavg") | {"noise": "correlated"} | keys
        study.config["federation"] = {"partition": "iid", "clients": 12}

    return change


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
    "scaffold by records": (
        trained("scaffold", weighting="records"), '"scaffold" needs every client to count the same; remove weighting.'
    ),
    "scaffold with a promise": (
        lambda study: (of_clients(study), study.config.update(training=training("scaffold"))),
        '[training] algorithm = "scaffold" keeps the noise of every round in its control variates',
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
    "a quantile out of reach": (
        lambda study: (
            of_clients(study), study.config["privacy"].update(clips={"kind": "adaptive", "quantile": 0.9}),
            study.config.update(training=training("fedavg"), federation={"drop_out": 0.3})
        ), "With 0.7 of the clients answering, the share within the clip norm would be told as 0.15 to 0.85",
    ),
    "a share of answers above 1": (
        lambda study: (
            private()(study), study.config["privacy"].update(clips={"kind": "adaptive", "answering": 1.5}),
        ), "answering must lie in (0, 1]",
    ),
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
    "no column": (
        federation(partition="by-feature", clients=3), 'column is missing, which goes with partition = "by-feature"; add it'
    ),
    "a column of none": (
        federation(partition="iid", clients=3, column="age"), 'column goes with partition = "by-feature" only; remove it'
    ),
    "a column that is not there": (
        lambda study: (plain(study), federation(partition="by-feature", clients=3, column="aeg")(study)),
        'study.toml: [federation] study: no feature is called "aeg". Did you mean "age"?',
    ),
    "a column beyond": (
        lambda study: (plain(study), federation(partition="by-feature", clients=3, column=9)(study)),
        "study.toml: [federation] study: column must be below",
    ),
    "a column below": (
        federation(partition="by-feature", clients=3, column=-1), "the name of a feature, or its number from 0, not -1"
    ),
    "a column in between": (
        federation(partition="by-feature", clients=3, column=1.5), "the name of a feature, or its number from 0, not 1.5"
    ),
    "no scale": (
        federation(partition="feature-noise", clients=3), 'scale is missing, which goes with partition = "feature-noise"'
    ),
    "a scale of none": (
        federation(partition="by-feature", clients=3, column=0, scale=1.0),
        'scale goes with partition = "feature-noise" only; remove it',
    ),
    "a scale below": (federation(partition="feature-noise", clients=3, scale=-0.5), "scale must be"),
    "a deadline alone": (federation(deadline=2.0), "delay is missing, which goes with deadline; add it, in seconds"),
    "a delay alone": (federation(delay=2.0), "deadline is missing, which goes with delay; add it, in seconds"),
    "a deadline of 0": (federation(delay=2.0, deadline=0.0), "deadline must be a finite number above 0"),
    "bands of none": (trained(bands=2), 'bands goes with noise = "correlated" only; remove it'),
    "no bands": (apart(bands=0), "bands must be a whole number of at least 1"),
    "too many bands": (apart(bands=4), "[training] bands is 4, more than the [privacy] separation of 3; lower it, or leave"),
    "correlated without separation": (
        private(noise="correlated"),
        '[training] noise = "correlated" needs clients that keep apart; add [privacy] sampling = "min-separation"',
    ),
    "correlated under a schedule": (
        apart(privacy={"clips": {"kind": "adaptive", "quantile": 0.5}}),
        '[privacy] clips changes over the rounds, which [training] noise = "correlated" does not allow; remove it',
    ),
    "correlated under a policy": (
        apart(privacy={"noise": {"kind": "cosine", "start": 2, "end": 1}}), "[privacy] noise changes over the rounds"
    ),
    "no separation": (
        lambda study: (of_clients(study), study.config["privacy"].update(sampling="min-separation")),
        'separation is missing, which goes with sampling = "min-separation"; add it',
    ),
    "a separation of Poisson": (
        lambda study: (of_clients(study), study.config["privacy"].update(separation=2)),
        'separation goes with sampling = "min-separation" only; remove it',
    ),
    "participations of Poisson": (
        lambda study: (of_clients(study), study.config["privacy"].update(participations=2)),
        'participations goes with sampling = "min-separation" only; remove it',
    ),
    "records kept apart": (
        lambda study: study.config["privacy"].update(sampling="min-separation", separation=2),
        'sampling = "min-separation" keeps clients apart; choose unit = "client", or another sampling',
    ),
    "too few clients to keep apart": (apart(privacy={"separation": 9}), "[privacy] 9 steps with cohorts of 2 need 18"),
    "everybody lost": (federation(drop_out=1.0), "drop_out must lie in (0, 1)"),
    "stop without a rule": (federation(stop={"every": 2}), "the rule is missing; add target"),
    "stop above one": (federation(stop={"target": 95.0}), "target must lie in (0, 1], not 95.0"),
    "looks of no score": (federation(stop={"rounds": 9, "every": 2}), "every goes with target or plateau only"),
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
        ({"partition": "feature-noise", "clients": 6, "scale": 0.5}, 10, 10),
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


@pytest.mark.parametrize("column", ["age", 0])
def test_clients_are_cut_by_a_feature(study, column):
    study.config["training"] = training("fedavg")
    study.config["federation"] = {"partition": "by-feature", "clients": 6, "column": column}
    plain(study)
    study.write()
    experiment = Experiment(study.path)
    records, _ = experiment.records()
    ages = [held.features[:, 0] for held in experiment.clients(records).values()]
    assert [len(held) for held in ages] == [10] * 6
    assert all(float(low.max()) <= float(high.min()) for low, high in pairwise(ages))
    assert study.train().exit_code == 0


def test_noise_on_features_is_as_large_as_declared(study):
    study.config["training"] = training("fedavg")
    sizes = []
    for scale in (0.0, 2.0):
        study.config["federation"] = {"partition": "feature-noise", "clients": 2, "scale": scale}
        plain(study)
        study.write()
        experiment = Experiment(study.path)
        (_, last) = experiment.clients(experiment.records()[0]).values()
        sizes.append(last.features.std().item())
    assert sizes[1] > 2 * sizes[0]


def test_noise_that_takes_itself_back_is_what_is_written(study):
    for keys, bands in (({}, 3), ({"bands": 2}, 2)):
        apart(**keys)(study)
        study.write()
        experiment = Experiment(study.path)
        separation = experiment.config.privacy.separation
        assert experiment.config.training.make_noise(separation) == sf.CorrelatedNoise(bands)
        sampler = experiment.plan().sampler
        assert sampler == sf.MinSeparation(2, 12, 3, 2)
    done = study.train()
    assert done.exit_code == 0, done.output
    privacy = study.result()["runs"][0]["privacy"]
    assert privacy["sampling"]["kind"] == "min-separation"
    assert 1.9 < privacy["epsilon"] <= 2.0
    assert any("keeps, also in checkpoints, the noise of the last rounds" in said for said in privacy["not_covered"])


def test_participations_are_as_many_as_fit_unless_declared(study):
    apart(privacy={"participations": None})(study)
    del study.config["privacy"]["participations"]
    study.write()
    assert Experiment(study.path).plan().sampler.participations == 3  # 8 steps, 3 apart


def test_clients_that_are_late_are_lost_and_told(study, monkeypatch):
    engines = []
    kept = runs.Simulation
    monkeypatch.setattr(runs, "Simulation", lambda **more: engines.append(kept(**more)) or engines[-1])
    plain(study, steps=20)
    study.config["training"] = training("fedavg")
    study.config["federation"] = {"delay": 2.0, "deadline": 2.0, "seed": 3}
    assert study.train().exit_code == 0
    (engine,) = engines
    assert (engine.delay, engine.deadline) == (Delay(2.0, 3), 2.0)
    asked, answered = (sum(count.values()) for count in (engine.drop_out.asked, engine.drop_out.answered))
    lost = [engine.loses(step, name) for step in range(20) for name in ("north", "south")]
    assert 0 < sum(lost) < 40
    assert (asked, answered) == (40, 40 - sum(lost))


def test_delays_are_exponential_the_same_every_time_and_apart_from_who_drops_out():
    late, lost = Delay(3.0, seed=5), DropOut(0.5, seed=5)
    pairs = [(step, f"client-{number}") for step in range(200) for number in range(200)]
    found = torch.tensor([late(*pair) for pair in pairs], dtype=torch.float64)
    # 40,000 draws: the mean's standard deviation is 0.015, a share's at most 0.0025.
    assert abs(float(found.mean()) - 3.0) < 0.09
    for quantile in (0.1, 0.5, 0.9):
        assert abs(float((found <= -3.0 * math.log(1 - quantile)).double().mean()) - quantile) < 0.0125
    assert float(found.min()) >= 0
    dropped = torch.tensor([lost(*pair) for pair in pairs])
    assert abs(float(found[dropped].mean()) - 3.0) < 0.13  # half of them
    assert [Delay(3.0, seed=5)(*pair) for pair in pairs[:50]] == found[:50].tolist()
    assert [Delay(3.0, seed=6)(*pair) for pair in pairs[:50]] != found[:50].tolist()


def test_a_roll_counts_a_step_that_is_done_once_more_once():
    roll = RollCall(DropOut(0.5), Delay(1.0), 0.5)
    first = [roll(step, "x") for step in range(30)]
    again = RollCall(DropOut(0.5), Delay(1.0), 0.5)
    twice = [(again(step, "x"), again(step, "x")) for step in range(30)]
    assert twice == [(one, one) for one in first]
    assert (again.asked, again.answered) == (roll.asked, roll.answered)
    assert roll.asked["x"] == 30


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
    assert "(2 of 4 steps were taken" in done.stdout
    assert "at step" not in done.stdout
    privacy = study.result()["runs"][0]["privacy"]
    assert 1.9 < privacy["epsilon"] <= 2
    assert any("the stopping rule looked at" in sentence for sentence in privacy["not_covered"])


def test_the_rule_is_what_is_written(study):
    def score(_):
        return 0.5

    study.config["training"] = training("fedavg")
    rules = []
    for written in (
        {"target": 0.9, "every": 2},
        {"plateau": 4, "by": 0.01},
        {"target": 0.9, "plateau": 4},
        {"rounds": 7},
        {"rounds": 7, "target": 0.9},
    ):
        study.config["federation"] = {"stop": written}
        study.write()
        rules.append(Experiment(study.path).config.federation.make_stop(score))
    assert rules == [
        Target(score, 0.9, 2),
        Plateau(score, 4, 0.01),
        FirstOf((Target(score, 0.9), Plateau(score, 4))),
        Rounds(7),
        FirstOf((Target(score, 0.9), Rounds(7))),
    ]


def test_rounds_alone_stop_personal_layers_too_and_look_at_nothing(study):
    of_clients(study, epsilon=2.0, steps=6)
    study.config["model"] = {"kind": "mlp", "hidden": [3]}
    study.config["training"] = training("fedper")
    study.config["federation"] = {"stop": {"rounds": 2}}
    done = study.train()
    assert done.exit_code == 0, done.output
    assert "2 rounds were asked for (2 of 6 steps were taken" in done.stdout
    assert not any("the stopping rule" in sentence for sentence in study.result()["runs"][0]["privacy"]["not_covered"])


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


@pytest.mark.parametrize("algorithm", ["ditto", "fedper"])
@pytest.mark.parametrize("private", [True, False])
def test_own_models_are_written_when_asked_for_only(study, algorithm, private):
    study.config["model"] = {"kind": "mlp", "hidden": [3]}
    study.config["training"] = training(algorithm)
    of_clients(study) if private else plain(study)
    assert study.train().exit_code == 0
    assert not (study.out / "personal").exists()
    study.out = study.folder / "again"
    done = study.train("--personal-models")
    assert done.exit_code == 0, done.output
    assert "personal: each client's own model, for that client alone. No budget covers what they tell." in done.stdout
    folder = study.out / "personal"
    assert json.loads((folder / "clients.json").read_text()) == {"north": "000000-north.pt", "south": "000001-south.pt"}
    assert sorted(path.name for path in folder.iterdir()) == ["000000-north.pt", "000001-south.pt", "clients.json"]
    assert folder.stat().st_mode & 0o077 == 0
    assert not [path for path in study.out.iterdir() if path.name.startswith(".")]
    served = torch.load(study.out / "model.pt", weights_only=True)
    own = [
        torch.load(folder / f"00000{row}-{name}.pt", weights_only=True) for row, name in enumerate(("north", "south"))
    ]
    assert served.keys() == own[0].keys() == own[1].keys()
    apart = {key for key in served if not torch.equal(own[0][key], own[1][key])}
    assert apart == ({"3.weight", "3.bias"} if algorithm == "fedper" else set(served))
    told = study.result()
    assert "personal" not in told
    if private:
        said = told["runs"][0]["privacy"]["not_covered"]
        assert any(sentence.startswith("The clients' own models in the folder personal") for sentence in said)
    assert "000000-north" not in page_of(study)


def test_own_models_score_what_the_report_tells(study):
    study.config["model"] = {"kind": "mlp", "hidden": [3]}
    study.config["training"] = training("fedper")
    plain(study, steps=20)
    assert study.train("--personal-models").exit_code == 0
    experiment = Experiment(study.path)
    training_part, test = experiment.records()
    model, scores = experiment.model(training_part), study.result()["runs"][0]["metrics"]["accuracy"]["per_owner"]
    for row, name in enumerate(("north", "south")):
        model.load_state_dict(torch.load(study.out / "personal" / f"00000{row}-{name}.pt", weights_only=True))
        mine = test.select((test.owner_codes == row).nonzero().flatten())
        assert (model(mine.features).argmax(1) == mine.targets).double().mean().item() == pytest.approx(scores[name])


@pytest.mark.parametrize("section", [training("fedavg"), {"mode": "central", "learning_rate": 0.1}])
def test_one_model_for_all_has_no_own_ones_to_write(study, refused, section):
    study.config["training"] = section
    said = refused(study.train("--personal-models"))
    assert 'trains one model for all; leave it out, or choose algorithm = "ditto" or "fedper"' in said
    assert not study.out.exists()


ODD = [
    "../../etc/x",
    "a/b",
    "a\\b",
    "..",
    "CON",
    "\u5317\u4eac \U0001f3e5",
    "x" * 300,
    "A",
    "a",
    'quote" and\nline',
    ".",
]


def test_odd_names_of_clients_stay_in_the_folder(tmp_path):
    models = {name: torch.nn.Linear(1, 1) for name in ODD}
    out = tmp_path / "out"
    out.mkdir()
    written = write_personal_models(out, ODD, models.__getitem__)
    assert written == out / "personal"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in out.iterdir()] == ["personal"]
    files = json.loads((written / "clients.json").read_text(encoding="utf-8"))
    assert list(files) == ODD
    assert len({name.lower() for name in files.values()}) == len(ODD)
    for name, file in files.items():
        assert re.fullmatch(r"\d{6}-[A-Za-z0-9_-]{0,40}\.pt", file)
        assert torch.equal(torch.load(written / file, weights_only=True)["weight"], models[name].weight)


def test_own_models_are_there_as_a_whole_or_not_at_all(tmp_path):
    def model_of(name):
        if name == "south":
            raise OSError(28, "No space left on device")
        return torch.nn.Linear(1, 1)

    write_personal_models(tmp_path, ["old"], lambda name: torch.nn.Linear(1, 1))
    with pytest.raises(InputError, match=r"personal cannot be written .No space left on device.; make room"):
        write_personal_models(tmp_path, ["north", "south"], model_of)
    assert [path.name for path in tmp_path.iterdir()] == ["personal"]
    assert sorted(path.name for path in (tmp_path / "personal").iterdir()) == ["000000-old.pt", "clients.json"]
    write_personal_models(tmp_path, ["north"], lambda name: torch.nn.Linear(1, 1))
    assert sorted(path.name for path in (tmp_path / "personal").iterdir()) == ["000000-north.pt", "clients.json"]
