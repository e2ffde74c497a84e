"""Errors that name the client and the step they come from, and never show what an error says of the records."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from sfumato.errors import InputError, SfumatoError


def blamed(error: Exception, client: str, step: int, stage: str = "") -> SfumatoError:
    """Return an error that names the client and what was done; of sfumato's errors alone it tells the words."""
    where = f'Client "{client}", step {step + 1}{stage and ", "}{stage}'
    if isinstance(error, SfumatoError):
        return type(error)(f"{where}: {error}")
    # Any other may hold values of the records.
    return InputError(f"{where}: it raised {type(error).__name__}; mend it.")


@contextlib.contextmanager
def naming(client: str, step: int, stage: str) -> Iterator[None]:
    """Name the client and the step in every error, and the stage where nothing else tells what was done.

    Raises:
        SfumatoError: of the same kind as the error.
    """
    try:
        yield
    except SfumatoError as error:
        raise blamed(error, client, step) from error
    except Exception as error:
        raise blamed(error, client, step, stage) from None
