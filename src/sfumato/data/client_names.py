"""The names of a population: by a rule, or as they are listed."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from typing_extensions import override

from sfumato import _checks
from sfumato.errors import InputError

MAPPING_FIX = "pass a mapping of name to Records, for example records.by_owner()"


class ClientNames(ABC):
    """The names of a population in their order."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def at(self, index: int) -> str:
        """Return the name at an index that lies within the population."""

    @abstractmethod
    def index_of(self, name: object) -> int | None:
        """Return the index of a name, or None where no client has it."""

    @abstractmethod
    def text(self) -> str:
        """Return what tells these names from others."""


@final
@dataclass(frozen=True)
class Numbered(ClientNames):
    """Names by a rule, `client-000017`, with as many digits as the last one needs.

    Raises:
        InputError: prefix is no text, is empty or cannot be written to a file, or count is no whole number of at least 1.
    """

    prefix: str
    count: int

    def __post_init__(self) -> None:
        if not isinstance(self.prefix, str) or not self.prefix:
            raise InputError('The name of a population must be a text such as "client".')
        check_name(f"{self.prefix}-0")
        _checks.count("The number of clients", self.count)

    @override
    def __len__(self) -> int:
        return self.count

    @override
    def at(self, index: int) -> str:
        return f"{self.prefix}-{index:0{len(str(self.count - 1))}d}"

    @override
    def index_of(self, name: object) -> int | None:
        if not isinstance(name, str):
            return None
        digits = name.removeprefix(f"{self.prefix}-")
        if not (digits.isascii() and digits.isdigit() and len(digits) <= len(str(self.count))):
            return None
        index = int(digits)
        return index if index < self.count and self.at(index) == name else None

    @override
    def text(self) -> str:
        return f"numbered {self.count} {self.prefix}"


@final
class Listed(ClientNames):
    """Names as they are given; they take memory for every client.

    Raises:
        InputError: there is none, one is no text or empty, comes twice, or is "all".
    """

    def __init__(self, names: Sequence[str]) -> None:
        if isinstance(names, str):
            raise InputError("The names of the clients must be a list of texts, not one text.")
        self._names = tuple(names)
        if not self._names:
            raise InputError("A federation needs at least one client; pass a mapping of name to Records.")
        for name in self._names:
            check_name(name)
        self._places = {name: index for index, name in enumerate(self._names)}
        if len(self._places) < len(self._names):
            twice = next(name for index, name in enumerate(self._names) if self._places[name] != index)
            raise InputError(f'Two clients are called "{twice}"; give each a name of its own.')

    @override
    def __len__(self) -> int:
        return len(self._names)

    @override
    def at(self, index: int) -> str:
        return self._names[index]

    @override
    def index_of(self, name: object) -> int | None:
        return self._places.get(name) if isinstance(name, str) else None

    @override
    def text(self) -> str:
        return f"listed {json.dumps(self._names)}"


def check_name(name: object) -> None:
    """Refuse what cannot be the name of a client.

    Raises:
        InputError: it is no text, is empty, is "all", or cannot be written to a file.
    """
    if not isinstance(name, str):
        raise InputError(f"The name of a client must be of type str, not {kind_of(name)}; {MAPPING_FIX}.")
    if not name:
        raise InputError("The name of a client is empty; give every client a name.")
    if name == "all":
        raise InputError('"all" is what the sum over the clients is called; give the client another name.')
    try:
        name.encode()
    except UnicodeEncodeError:
        raise InputError(
            f"The name of a client, {name!a}, holds half of a character, which no file takes; read it as UTF-8."
        ) from None


def kind_of(value: object) -> str:
    """Return what a value is, never what it holds: it may be records."""
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
