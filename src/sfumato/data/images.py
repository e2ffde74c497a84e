"""Images and labels from IDX files, the format of MNIST, plain or gzipped. Every refusal names the file and the fix."""

from __future__ import annotations

import gzip
import math
import zlib
from io import BufferedIOBase
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sfumato import _checks
from sfumato.errors import InputError

_BYTES = 0x08  # the type code of unsigned bytes
_BRIGHTEST = 255
_GZIP = b"\x1f\x8b"
_CHUNK = 2**20


def read_images(images: str | Path, labels: str | Path, classes: int) -> tuple[Tensor, Tensor]:
    """Read a file of grey images and the file of their labels.

    Pixels are scaled by the public constant 1 / 255, and the number of classes is declared: nothing is learnt from the
    records.

    Args:
        images: An IDX file of unsigned bytes, shape (n, height, width).
        labels: An IDX file of unsigned bytes, shape (n,).
        classes: Number of classes, at least 2; labels are 0 .. classes - 1.

    Returns:
        Pixels, shape (n, 1, height, width), float32 in [0, 1]; and labels, shape (n,), int64.

    Raises:
        InputError: a file cannot be read, is no IDX file of this shape or is cut off, the two hold different numbers of
            records, or a label is not one of the classes.

    Source: http://yann.lecun.com/exdb/mnist, "The IDX file format".
    """
    _checks.count("classes", classes, minimum=2)
    pixels = _read(Path(images), ("image", "row", "column"))
    numbers = _read(Path(labels), ("label",)).to(torch.int64)  # 256 classes do not fit into a byte
    if len(pixels) != len(numbers):
        raise InputError(
            f"{images} holds {len(pixels)} images but {labels} holds {len(numbers)} labels. "
            "Fix: give the two files of one set."
        )
    unknown = numbers >= classes
    if unknown.any():
        place = int(unknown.to(torch.uint8).argmax())
        raise InputError(
            f"{labels}, label {place} (counted from 0): {int(numbers[place])} is not one of the {classes} declared classes, "
            f"0 to {classes - 1}. Fix: declare all classes, or correct the file."
        )
    return pixels.unsqueeze(1).to(torch.float32).div_(_BRIGHTEST), numbers


def _read(path: Path, axes: tuple[str, ...]) -> Tensor:
    """Return the bytes of an IDX file as a tensor with one dimension for each of `axes`."""
    try:
        with path.open("rb") as raw:
            zipped = raw.read(len(_GZIP)) == _GZIP
            raw.seek(0)
            file: BufferedIOBase = gzip.GzipFile(fileobj=raw) if zipped else raw
            return _values(path, file, _shape(path, file.read(4 + 4 * len(axes)), axes))
    except (gzip.BadGzipFile, zlib.error, EOFError):
        raise InputError(f"{path} is a broken gzip file. Fix: download or copy it again.") from None
    except FileNotFoundError:
        raise InputError(f"{path} does not exist. Fix: check the path.") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}). Fix: give the path of a readable file.") from None


def _shape(path: Path, head: bytes, axes: tuple[str, ...]) -> tuple[int, ...]:
    wanted = f"Fix: give the IDX file of the {axes[0]}s."
    if len(head) < 4 or head[:2] != b"\0\0":
        raise InputError(f"{path} is not an IDX file. {wanted}")
    kind, dimensions = head[2], head[3]
    if kind != _BYTES:
        raise InputError(
            f"{path} is an IDX file of values of type 0x{kind:02x}, but {axes[0]}s are unsigned bytes (0x08). {wanted}"
        )
    if dimensions != len(axes):
        raise InputError(
            f"{path} is an IDX file of dimension {dimensions}, but {axes[0]}s have dimension {len(axes)}. {wanted}"
        )
    if len(head) < 4 + 4 * len(axes):
        raise InputError(f"{path} ends within its header. Fix: download or copy it again.")
    shape = tuple(int(size) for size in np.frombuffer(head, ">u4", offset=4))
    for axis, size in zip(axes, shape, strict=True):
        if size == 0:
            raise InputError(f"{path} holds no {axis}. Fix: give a file with at least one.")
    return shape


def _values(path: Path, file: BufferedIOBase, shape: tuple[int, ...]) -> Tensor:
    """Return the values after the header. A false header cannot ask for more memory than the file fills."""
    size = math.prod(shape)
    content = bytearray()
    while len(content) <= size and (more := file.read(min(_CHUNK, size + 1 - len(content)))):
        content += more
    if len(content) != size:
        told = "more" if len(content) > size else "fewer"
        raise InputError(
            f"{path} holds {told} bytes than its header says ({' x '.join(map(str, shape))} of them). "
            "Fix: download or copy it again."
        )
    return torch.frombuffer(content, dtype=torch.uint8).reshape(shape)
