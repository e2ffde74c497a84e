"""Images in a configuration: trained on, or refused in one line; the kinds of clipping; the tanh CNN."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato import Records
from sfumato.config import Experiment
from sfumato.errors import InputError
from sfumato.gradients.clipping import KINDS
from sfumato.gradients.support import check_model
from sfumato.learning.models import build
from sfumato.report import read_result

EXAMPLES = Path(__file__).parents[2] / "examples"
SIDE = 14
SOURCE = {"images": "images.gz", "labels": "labels.idx", "classes": 2, "test_fraction": 0.25}
TEST = {"test_images": "test-images.idx", "test_labels": "test-labels.gz"}


def write(path, values, shape):
    head = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
    content = head + bytes(values)
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


@pytest.fixture
def pictures(study):
    """The study of the other tests, on forty squares that are dark (0) or bright (1); six more are for the test."""
    for count, images, labels in ((40, "images.gz", "labels.idx"), (6, "test-images.idx", "test-labels.gz")):
        answers = [index % 2 for index in range(count)]
        pixels = [20 + 200 * answer for answer in answers for _ in range(SIDE * SIDE)]
        write(study.folder / images, pixels, (count, SIDE, SIDE))
        write(study.folder / labels, answers, (count,))
    study.config["data"] = {**SOURCE}
    study.config["privacy"] |= {"population": 30, "batch_size": 30, "delta": 1e-3}
    return study


def test_images_with_a_test_part_of_their_own(pictures):
    pictures.config["data"] |= TEST
    pictures.config["privacy"] |= {"epsilon": "inf", "steps": 30}
    done = pictures.train()
    assert done.exit_code == 0, done.output
    result = read_result(pictures.out / "result.json")
    assert result.runs[0].metrics.accuracy.mean == 1
    training, test = Experiment(pictures.path).records()
    assert (len(training), len(test)) == (40, 6)
    assert training.classes == test.classes == ("0", "1")


def test_images_are_split_where_there_is_no_test_part(pictures):
    pictures.write()
    training, test = Experiment(pictures.path).records()
    assert (len(training), len(test)) == (30, 10)
    assert training.name == "study"


def test_the_tanh_cnn_trains_privately_on_images(pictures):
    pictures.config["model"] = {"kind": "tanh-cnn", "hidden": [5]}
    done = pictures.train()
    assert done.exit_code == 0, done.output
    weights = torch.load(pictures.out / "model.pt", weights_only=True)
    assert [tuple(weights[f"{layer}.weight"].shape) for layer in (0, 3, 7, 9)] == [
        (16, 1, 8, 8), (32, 16, 4, 4), (5, 32), (2, 5)
    ]  # fmt: skip


def changed(**keys):
    return lambda study: study.config["data"].update(keys)


def without(*keys):
    return lambda study: [study.config["data"].pop(key) for key in keys]


def kept(*keys, **more):
    def change(study):
        study.config["data"] = {key: SOURCE[key] for key in keys} | more

    return change


def cut(study):
    content = (study.folder / "labels.idx").read_bytes()
    (study.folder / "labels.idx").write_bytes(content[:-1])


def small(study):
    write(study.folder / "images.gz", [0] * 40 * 13 * 14, (40, 13, 14))
    study.config["model"] = {"kind": "tanh-cnn"}


ONE_SOURCE = 'study.toml: key "data": give either builtin, path or images, and only one of them.'
BAD = {
    "two sources": (changed(builtin="digits"), ONE_SOURCE),
    "images and a table": (changed(path="a.csv", columns={"a": {"kind": "ignore"}}), ONE_SOURCE),
    "no source": (kept("classes"), ONE_SOURCE),
    "labels alone": (kept("labels"), ONE_SOURCE),
    "classes of a builtin": (kept("classes", builtin="heart"), 'key "data": classes goes with images only; remove it.'),
    "test images of a builtin": (kept(**TEST, builtin="heart"), "test_images goes with images only; remove it."),
    "no labels": (without("labels"), 'study.toml: key "data": labels is missing, which goes with images; add it.'),
    "no classes": (without("classes"), "classes is missing, which goes with images; add it."),
    "one class": (changed(classes=1), 'key "data.classes": classes must be a whole number of at least 2, not 1.'),
    "half a test part": (changed(test_images="images.gz"), "test_images and test_labels go together"),
    "columns": (changed(columns={"a": {"kind": "ignore"}}), "images have no columns"),
    "test_path": (changed(test_path="a.csv"), "images have no columns"),
    "misspelt": (changed(test_image="a"), 'key "data.test_image" is unknown. Did you mean "test_images"?'),
    "unset variable": (changed(images="${SFUMATO_NOT_SET}/images.gz"), "set SFUMATO_NOT_SET in the environment"),
    "no file": (changed(images="none.gz"), "none.gz does not exist. Fix: check the path."),
    "labels as images": (changed(images="labels.idx"), "labels.idx is an IDX file of dimension 1"),
    "other test labels": (changed(**TEST | {"test_labels": "labels.idx"}), "test-images.idx holds 6 images but "),
    "cut off": (cut, "labels.idx holds fewer bytes than its header says"),
    "too small": (small, 'study.toml: [model] A "tanh-cnn" model takes images'),
    "no owners": (
        lambda study: study.config.update(training={"mode": "federated", "algorithm": "fedsgd", "learning_rate": 1}),
        "study.toml: [data] study: the records have no owners",
    ),
    "misspelt clipping": (
        lambda study: study.config["privacy"].update(clipping="normalized"),
        'study.toml: key "privacy.clipping": There is no clipping "normalized". Did you mean "normalised"?',
    ),
}  # fmt: skip


@pytest.mark.parametrize(("change", "words"), BAD.values(), ids=BAD)
def test_bad_images_are_refused_in_one_line_and_write_nothing(pictures, refused, change, words):
    change(pictures)
    assert words in refused(pictures.train())
    assert not pictures.out.exists()


def test_the_untouched_pictures_are_sound(pictures):
    """So that every refusal above comes from its own change."""
    done = pictures.train()
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_clips_as_the_configuration_says(study, kind):
    study.config["privacy"]["clipping"] = kind
    study.write()
    assert Experiment(study.path).plan().clipping == kind
    assert study.train().exit_code == 0


def test_clipping_is_flat_unless_told(study):
    study.write()
    assert Experiment(study.path).plan().clipping == "flat"


@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(1, 3), st.integers(14, 40), st.integers(14, 40)), st.integers(1, 5))
def test_the_tanh_cnn_fits_every_size_that_it_takes(shape, outputs):
    model = build("tanh-cnn", shape, outputs)
    check_model(model)
    assert model(torch.zeros(2, *shape)).shape == (2, outputs)


def test_the_tanh_cnn_has_the_size_of_the_literature():
    assert sum(parameter.numel() for parameter in build("tanh-cnn", (1, 28, 28), 10).parameters()) == 26_010


@pytest.mark.parametrize("shape", [(1, 13, 28), (1, 28, 13), (784,)])
def test_the_tanh_cnn_refuses_sizes_that_do_not_fit(shape):
    with pytest.raises(InputError, match="at least 14 by 14 pixels"):
        build("tanh-cnn", shape, 10)


def test_the_mnist_example_is_sound(monkeypatch):
    monkeypatch.setenv("SFUMATO_DATA", "somewhere")
    experiment = Experiment(EXAMPLES / "mnist.toml")
    plan = experiment.plan()
    assert 2.99 < plan.spending.epsilon <= 3
    assert plan.budget.delta == 1e-5
    assert plan.population == 60_000
    digits = Records.from_arrays(torch.zeros(3, 1, 28, 28), [0, 1, 2], classes=[str(n) for n in range(10)])
    assert experiment.model(digits)(digits.features).shape == (3, 10)
