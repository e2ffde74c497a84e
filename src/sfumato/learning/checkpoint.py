"""Checkpoints: model, optimiser, sampler position and the run's place in the ledger, in one file, written at once or not."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sfumato._files import replace_file
from sfumato.errors import CheckpointError

_VERSION = 1
_KEYS = {"plan", "secret", "dataset", "data", "run", "position", "model", "procedure"}


@dataclass(frozen=True)
class Checkpoint:
    """Where and how often to save a run, and whether to go on with what is there.

    A checkpoint belongs to the data: it may hold the secret order of the records. The noise key is never in it.

    Args:
        path: The file.
        every: Steps between two saves. After a crash the run goes on behind the last step that may have been noised, so
            at most `every` steps are lost; they stay charged.
        resume: Go on with the run in the file; without it an existing file is refused. The optimiser's settings are then
            those that were saved.
    """

    path: str | Path
    every: int = 50
    resume: bool = False


def write(path: Path, content: dict[str, Any]) -> None:
    """Write `content` to `path` atomically.

    Raises:
        CheckpointError: the folder cannot be written.
    """
    try:
        replace_file(path, lambda file: torch.save({"version": _VERSION, **content}, file))
    except OSError as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot be written ({error.strerror}); choose another folder."
        ) from error
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"The checkpoint {path} cannot hold this model or optimiser ({str(error).splitlines()[0]}); train without one."
        ) from error


def check(path: Path, content: dict[str, Any]) -> None:
    """Write and read back a trial beside `path`, so that nothing is paid for a run that could not be saved.

    Raises:
        CheckpointError: it cannot be written, or holds something that only executing a file could bring back.
    """
    trial = path.with_name(f".{path.name}.trial")
    try:
        write(trial, content)
        read(trial)
    except CheckpointError as error:
        raise CheckpointError(
            f"The run cannot be saved to {path}, so it was not started and nothing was charged: use a folder that can be "
            f"written, and plain Python numbers for the optimiser's settings. {error}"
        ) from error
    finally:
        trial.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """Return what `write` wrote; nothing in the file is executed.

    Raises:
        CheckpointError: there is no such file, or it is not a checkpoint of this version.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint {path}; start without resume, or give the right path.")
    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} is not a readable checkpoint; restore it from a copy or start a new run."
        ) from error
    if not isinstance(content, dict) or content.get("version") != _VERSION or not set(content) >= _KEYS:
        raise CheckpointError(f"{path} is not a checkpoint of this version of sfumato; start a new run.")
    return content
