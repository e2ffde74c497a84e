"""A federation on this machine: every client runs here, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, final

from sfumato.errors import SfumatoError

Answer = TypeVar("Answer")


@final
@dataclass(frozen=True)
class Simulation:
    """Runs the clients of a round in this process, in their order.

    Args:
        drop_out: Called with (step, client); True means that this client is lost in this step. It must not look at
            records: who is lost is not covered by any budget.
    """

    drop_out: Callable[[int, str], bool] | None = None

    def run(self, work: Callable[[str], Answer], clients: Sequence[str], step: int) -> dict[str, Answer]:
        """Return the answers of the clients that were not lost.

        Raises:
            SfumatoError: of the same kind as the client's error, naming client and step.
        """
        answers: dict[str, Answer] = {}
        for name in clients:
            if self.drop_out is not None and self.drop_out(step, name):
                continue
            try:
                answers[name] = work(name)
            except SfumatoError as error:
                raise type(error)(f'Client "{name}", step {step + 1}: {error}') from error
        return answers
