"""Each client's own model as a file, for its client alone."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import uuid
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from sfumato._files import replace_file
from sfumato.errors import InputError

FOLDER, INDEX = "personal", "clients.json"
_ODD = re.compile(r"[^A-Za-z0-9_-]+")
_LONGEST = 40  # characters of a name within a file's name


def write_personal_models(folder: Path, names: Iterable[str], model_of: Callable[[str], nn.Module]) -> Path:
    """Write the state of each client's own model into the folder `personal`, which takes the place of an older one.

    `clients.json` in it says which file is whose. The folder is there whole or not at all, and only its user may read it: such
    a model is made from one client's records without any noise.

    Args:
        folder: Where the folder is made.
        names: The clients; a file is named by its number and what is harmless of the name.
        model_of: Returns a client's model.

    Raises:
        InputError: the folder cannot be written.
    """
    target, temporary = folder / FOLDER, folder / f".{FOLDER}.{uuid.uuid4().hex}"
    files: dict[str, str] = {}
    try:
        temporary.mkdir(mode=0o700)
        for number, name in enumerate(names):
            files[name] = f"{number:06d}-{_ODD.sub('_', name)[:_LONGEST]}.pt"
            replace_file(temporary / files[name], partial(torch.save, model_of(name).state_dict()))
        index = json.dumps(files, indent=2, ensure_ascii=False) + "\n"
        replace_file(temporary / INDEX, lambda file: file.write(index.encode()))
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    except OSError as error:
        raise InputError(f"{target} cannot be written ({error.strerror}); make room.") from None
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary)
    return target
