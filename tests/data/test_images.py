"""IDX files as records: what is read back, and what is said when a file is not what it should be."""

import gzip
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sfumato import Records
from sfumato.errors import InputError


def idx(values, *, kind=0x08, shape=None):
    values = np.asarray(values, np.uint8)
    sizes = values.shape if shape is None else shape
    return bytes([0, 0, kind, len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes) + values.tobytes()


def squeezed(data):
    return gzip.compress(data, mtime=0)


IMAGES = np.arange(5 * 3 * 4, dtype=np.uint8).reshape(5, 3, 4) * 4
LABELS = [0, 2, 1, 2, 0]


class Files:
    """A folder with five small images and their labels."""

    def __init__(self, folder):
        self.images, self.labels = folder / "images.idx", folder / "labels.idx"
        self.images.write_bytes(idx(IMAGES))
        self.labels.write_bytes(idx(LABELS))

    def read(self, classes=3):
        return Records.from_idx(self.images, self.labels, classes=classes, name="shapes")

    def refused(self, *parts, classes=3):
        with pytest.raises(InputError) as caught:
            self.read(classes)
        message = str(caught.value)
        assert "\n" not in message
        for part in parts:
            assert part in message, message


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


@settings(max_examples=50, deadline=None)
@given(
    st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 5)),
    st.integers(2, 256), st.integers(0, 2**32 - 1), st.booleans(), st.booleans(),
)  # fmt: skip
def test_what_was_written_is_read_back(tmp_path_factory, shape, classes, seed, zip_images, zip_labels):
    draw = np.random.default_rng(seed)
    pixels, labels = draw.integers(0, 256, shape, np.uint8), draw.integers(0, classes, shape[0])
    files = Files(tmp_path_factory.mktemp("idx"))
    files.images.write_bytes(squeezed(idx(pixels)) if zip_images else idx(pixels))
    files.labels.write_bytes(squeezed(idx(labels)) if zip_labels else idx(labels))
    records = files.read(classes)
    assert records.features.shape == (shape[0], 1, *shape[1:])
    assert records.features.dtype == torch.float32
    assert np.array_equal(np.round(records.features.numpy()[:, 0] * 255), pixels)
    assert np.allclose(records.features.numpy()[:, 0], pixels / 255, rtol=1e-6, atol=0)
    assert records.targets.tolist() == labels.tolist()
    assert records.targets.dtype == torch.int64
    assert records.classes == tuple(map(str, range(classes)))


def test_scale_and_classes_do_not_depend_on_the_records(files):
    files.images.write_bytes(idx(np.full((5, 2, 2), 51)))
    files.labels.write_bytes(idx([0] * 5))
    records = files.read(classes=10)
    assert records.features.unique().tolist() == [pytest.approx(0.2)]
    assert len(records.classes) == 10
    assert records.name == "shapes"
    assert not records.owner_names


def test_text_paths_are_taken(files):
    records = Records.from_idx(str(files.images), str(files.labels), classes=3)
    assert torch.equal(records.features, files.read().features)


SOUND = idx(IMAGES)
ZIPPED = squeezed(SOUND)
BAD_IMAGES = {
    "empty": (b"", "is not an IDX file. Fix: give the IDX file of the images."),
    "text": (b"5,0,4,1,9,2", "is not an IDX file"),
    "labels": (idx(LABELS), "is an IDX file of dimension 1, but images have dimension 3"),
    "colour": (idx(np.zeros((5, 3, 2, 2))), "is an IDX file of dimension 4"),
    "floats": (idx(IMAGES, kind=0x0D), "is an IDX file of values of type 0x0d, but images are unsigned bytes"),
    "half a header": (SOUND[:9], "ends within its header"),
    "cut off": (
        SOUND[:-1],
        "holds fewer bytes than its header says (5 x 3 x 4 of them). Fix: download or copy it again.",
    ),
    "too long": (SOUND + b"\0", "holds more bytes than its header says"),
    "no record": (idx([], shape=(0, 3, 4)), "holds no image."),
    "no row": (idx([], shape=(5, 0, 4)), "holds no row."),
    "no column": (idx([], shape=(5, 3, 0)), "holds no column."),
    "gzip of text": (squeezed(b"pixels"), "is not an IDX file"),
    "gzip cut off": (ZIPPED[:-9], "is a broken gzip file. Fix: download or copy it again."),
    "gzip cut off in its header": (ZIPPED[:5], "is a broken gzip file"),
    "gzip with a wrong sum": (ZIPPED[:-8] + b"\0" * 8, "is a broken gzip file"),
    "gzip with damaged content": (ZIPPED[:10] + b"\xff" * 9 + ZIPPED[19:], "is a broken gzip file"),
    "gzip of a cut file": (squeezed(SOUND[:-1]), "holds fewer bytes"),
    "gzip of a longer file": (squeezed(SOUND + b"\0"), "holds more bytes"),
    "other counts": (idx(IMAGES[:4]), "holds 4 images but "),
}


@pytest.mark.parametrize(("content", "words"), BAD_IMAGES.values(), ids=BAD_IMAGES)
def test_images_that_are_none_are_refused_by_name(files, content, words):
    files.images.write_bytes(content)
    files.refused(f"{files.images} {words}", "Fix: ")


def test_images_are_no_labels(files):
    files.labels.write_bytes(idx(IMAGES))
    files.refused(
        f"{files.labels} is an IDX file of dimension 3, but labels have dimension 1", "the IDX file of the labels"
    )


def test_the_counts_of_both_files_are_told(files):
    files.labels.write_bytes(idx([0, 1]))
    files.refused(
        f"{files.images} holds 5 images but {files.labels} holds 2 labels. Fix: give the two files of one set."
    )


def test_a_label_beyond_the_declared_classes_is_refused(files):
    files.refused(
        f"{files.labels}, label 1 (counted from 0): 2 is not one of the 2 declared classes, 0 to 1.", classes=2
    )


@pytest.mark.parametrize("classes", [1, 0, -1, 2.0, float("nan"), True, None])
def test_the_number_of_classes_is_a_whole_number_of_at_least_two(files, classes):
    files.refused("classes must be a whole number of at least 2", classes=classes)


def test_files_that_cannot_be_read_are_named(files, tmp_path):
    files.labels = tmp_path / "none.gz"
    files.refused(f"{files.labels} does not exist. Fix: check the path.")
    files.images = tmp_path
    files.refused(f"{tmp_path} cannot be read (")


@pytest.mark.parametrize("zipped", [False, True])
def test_a_false_header_takes_no_memory(files, zipped):
    content = idx(IMAGES, shape=(2**31, 2**15, 2**15))
    files.images.write_bytes(squeezed(content) if zipped else content)
    tracemalloc.start()
    try:
        files.refused("holds fewer bytes than its header says")
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()
