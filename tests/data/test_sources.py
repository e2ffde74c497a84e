"""The public data sets: counts, owners, ranges, and what is said when they cannot be loaded."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from sfumato.data import sources
from sfumato.data.sources import HEART_SCHEMA, load
from sfumato.errors import InputError


def refused(action, *parts):
    with pytest.raises(InputError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message


@pytest.fixture(scope="module")
def heart():
    return load("heart")


def column(records, name):
    return records.features[:, records.feature_names.index(name)]


def test_heart_counts_owners_and_classes(heart):
    assert len(heart) == 920
    assert heart.name == "heart"
    assert {name: len(part) for name, part in heart.by_owner().items()} == {
        "cleveland": 303,
        "hungary": 294,
        "switzerland": 123,
        "long-beach": 200,
    }
    assert list(heart.by_owner()) == ["cleveland", "hungary", "switzerland", "long-beach"]
    assert heart.classes == ("healthy", "disease")
    healthy = [int((part.targets == 0).sum()) for part in heart.by_owner().values()]
    assert healthy == [164, 188, 8, 51]


def test_heart_features_are_bounded_and_named(heart):
    assert heart.features.shape == (920, 38)
    assert heart.features.dtype == torch.float32
    assert heart.feature_names == HEART_SCHEMA.feature_names
    assert heart.features.isfinite().all()
    assert heart.features.abs().max() <= 1


def test_heart_missing_values_are_found(heart):
    missing = {
        name.removesuffix("=missing"): [int(column(part, name).sum()) for part in heart.by_owner().values()]
        for name in heart.feature_names
        if name.endswith("=missing")
    }
    assert missing == {
        "trestbps": [0, 1, 2, 57],
        "chol": [0, 23, 123, 56],
        "fbs": [0, 8, 75, 7],
        "restecg": [0, 1, 1, 0],
        "thalach": [0, 1, 1, 53],
        "exang": [0, 1, 1, 53],
        "oldpeak": [0, 0, 6, 56],
        "slope": [0, 190, 17, 102],
        "ca": [4, 291, 118, 198],
        "thal": [2, 266, 52, 166],
    }
    for name in missing:
        block = [i for i, f in enumerate(heart.feature_names) if f.split("=")[0] == name]
        absent = column(heart, f"{name}=missing") == 1
        assert (heart.features[absent][:, block].sum(dim=1) == 1).all()


def test_heart_records_encode_as_written(heart):
    # Cleveland's first line: 63.0,1.0,1.0,145.0,233.0,1.0,2.0,150.0,0.0,2.3,3.0,0.0,6.0,0
    expected = {
        "age": (63 - 55) / 35,
        "sex=1": 1,
        "cp=1": 1,
        "trestbps": (145 - 140) / 80,
        "chol": (233 - 350) / 270,
        "fbs=1": 1,
        "restecg=2": 1,
        "thalach": (150 - 135) / 85,
        "exang=0": 1,
        "oldpeak": (2.3 - 2) / 6,
        "slope=3": 1,
        "ca=0": 1,
        "thal=6": 1,
    }
    wanted = torch.tensor([expected.get(name, 0.0) for name in heart.feature_names])
    torch.testing.assert_close(heart.features[0], wanted)
    assert heart.targets[0] == 0


def test_heart_bounds_clamp_no_reading(heart):
    for name in ("age", "trestbps", "chol", "thalach", "oldpeak"):
        assert column(heart, name).abs().max() < 1


@pytest.mark.parametrize("file", ["processed.va.data", "processed.cleveland.data"])
def test_a_changed_or_missing_heart_file_is_refused(tmp_path, monkeypatch, file):
    folder = tmp_path / "heart"
    shutil.copytree(Path(sources.__file__).parent / "heart", folder)
    monkeypatch.setattr(sources, "_heart_folder", lambda: folder)
    assert len(load("heart")) == 920
    text = (folder / file).read_text()
    (folder / file).write_text(text.replace("?", "0"))  # the size stays the same
    refused(lambda: load("heart"), file, "reinstall")
    (folder / file).unlink()
    refused(lambda: load("heart"), file, "reinstall")


def test_digits():
    pytest.importorskip("sklearn")
    digits = load("digits")
    assert digits.features.shape == (1797, 1, 8, 8)
    assert digits.features.dtype == torch.float32
    assert (float(digits.features.min()), float(digits.features.max())) == (-1.0, 1.0)
    assert digits.targets.dtype == torch.int64
    assert torch.equal(digits.targets.bincount().sum(), torch.tensor(1797))
    assert digits.classes == tuple("0123456789")
    # The first image is a zero whose top row reads 0 0 5 13 9 1 0 0.
    assert digits.targets[0] == 0
    assert (digits.features[0, 0, 0] * 8 + 8).tolist() == [0, 0, 5, 13, 9, 1, 0, 0]


def test_digits_without_scikit_learn_name_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    refused(lambda: load("digits"), '"digits"', 'pip install "sfumato[digits]"')


def test_an_unknown_name_is_refused():
    refused(lambda: load("haert"), '"haert"', 'Did you mean "heart"?')
    refused(lambda: load("mnist"), '"mnist"', '"digits", "heart"')
