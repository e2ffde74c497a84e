"""A federation on this machine: the clients of a round run here, stacked or one by one, in one thread or several."""

from __future__ import annotations

import contextlib
import inspect
import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar, final

import torch

from sfumato import _checks
from sfumato.data.client_names import kind_of
from sfumato.data.records import Records
from sfumato.engines.choosing import Choice, Chooser
from sfumato.engines.dropping import DropOut
from sfumato.engines.surroundings import Surroundings
from sfumato.errors import InputError, SfumatoError
from sfumato.learning.blame import blamed, naming
from sfumato.learning.federated import Answer, Task
from sfumato.learning.group_data import ALONE, STACKED

Result = TypeVar("Result")

_SORTED = 4  # chunks of clients that are sorted by size together


@final
@dataclass(frozen=True)
class Simulation:
    """Runs the clients of a round on this machine, in the way that measures fastest.

    While the first clients of a run are trained, ways to train them are timed against each other: many clients stacked along
    one more dimension, or one after the other; in chunks of several sizes; in one thread or in all, be they workers or
    torch's own. Before a way is used, it is compared in float64 with what one by one gives for some of the clients: it has to
    agree to 1e-6 of the size of their updates. In one round, from the same model, ways, workers and chunks therefore differ by
    the rounding of the model's own number type and the order of sums, for float32 usually below 1e-6 of a weight. Training may
    amplify that from round to round, as it does any rounding, most of all where a gradient is divided by a small number (Adam's
    first steps, a normalisation over few values). With `debug`, a run on the same machine repeats itself to the last digit.

    Clients whose model draws from torch's random numbers (dropout, wherever it is called) are seeded one by one, and take
    turns. Workers compute under the caller's autocast and default device. Clients are made when their chunk is due, so memory
    holds some chunks and one model for each worker.

    An error of one client ends the run, and names it: the round is not used, the model and what clients keep are those before
    it, and the run can go on from its checkpoint once the cause is mended. Only an update that is NaN or infinite, or has
    other names or shapes than the round's, is passed over, and counted in the result.

    Args:
        drop_out: Called with (step, client); True means that this client is lost in this step. It must not look at
            records: who is lost is not covered by any budget. Or the chance in [0, 1) that a client is lost in a step, the
            same clients in every run.
        delay: Called with (step, client); the seconds that pass until the client would answer, in simulated time.
        deadline: Seconds after which the server no longer waits; later clients are lost in this step.
        workers: Threads that train at a time; None for the fastest of 1 and the number of cores.
        way: "stacked" or "alone"; None for the faster one.
        debug: One client at a time, one by one, so that every error names its client; slow.

    Raises:
        InputError: an argument is out of range or of the wrong kind, or only one of delay and deadline is given.
    """

    drop_out: Callable[[int, str], bool] | float | None = None
    delay: Callable[[int, str], float] | None = None
    deadline: float | None = None
    workers: int | None = None
    way: str | None = None
    debug: bool = False

    def __post_init__(self) -> None:
        if (self.delay is None) != (self.deadline is None):
            raise InputError("delay and deadline go together; give both or neither.")
        for name, asked in (("drop_out", self._drop_out), ("delay", self.delay)):
            if asked is not None:
                _check_called(name, asked)
        if self.deadline is not None:
            _checks.positive("deadline", self.deadline)
        if self.workers is not None:
            _checks.count("workers", self.workers)
        if self.way is not None and self.way not in (STACKED, ALONE):
            raise InputError(
                f'There is no way "{self.way}" to run clients.{_checks.did_you_mean(str(self.way), (STACKED, ALONE))}'
            )

    def run(self, work: Callable[[str], Result], clients: Sequence[str], step: int) -> dict[str, Result]:
        """Return the answers of the clients that were not lost, computed in their order.

        Raises:
            SfumatoError: of the same kind as the client's error, naming client and step.
        """
        answers: dict[str, Result] = {}
        for name in clients:
            if self.loses(step, name):
                continue
            with naming(name, step, "its part"):
                answers[name] = work(name)
        return answers

    def start(self, task: Task) -> Crew:
        """Return what runs the rounds of one run."""
        return Crew(self, task)

    def loses(self, step: int, name: str) -> bool:
        """Whether a client does not answer, or too late.

        Raises:
            SfumatoError: `drop_out` or `delay` failed; names client and step.
        """
        asked = "drop_out"
        try:
            if self._drop_out is not None and self._drop_out(step, name):
                return True
            asked = "delay"
            return self.delay is not None and self.deadline is not None and self.delay(step, name) > self.deadline
        except Exception as error:  # the cause may be shown, because neither may look at records
            raise blamed(error, name, step, asked) from error

    @cached_property
    def _drop_out(self) -> Callable[[int, str], bool] | None:
        return DropOut(self.drop_out) if isinstance(self.drop_out, (int, float)) else self.drop_out

    @property
    def answering(self) -> float | None:
        """The share of the clients asked that answer; None where a function decides."""
        if self.delay is not None:
            return None
        lost = 0.0 if self._drop_out is None else getattr(self._drop_out, "share", None)
        return None if lost is None else 1 - lost

    @property
    def looks_at_names(self) -> bool:
        """Whether anybody can be lost."""
        return self.drop_out is not None or self.delay is not None


@final
class Crew:
    """The workers of one run."""

    def __init__(self, engine: Simulation, task: Task) -> None:
        self._engine, self._task = engine, task
        if not self._ways():
            raise InputError(
                f'This federation cannot run its clients "{engine.way}": the model draws random numbers, or the optimiser of '
                "the clients is not known to treat each weight alone, whatever its shape. Leave way out."
            )
        self._chooser = self._choices()
        self._pools: dict[int, ThreadPoolExecutor] = {}
        self._sound: set[str] = {ALONE}

    def _choices(self) -> Chooser:
        """Return the ways to try, which are fewer where clients have to take turns."""
        engine, task, inner = self._engine, self._task, torch.get_num_threads()
        self._in_turns = bool(task.draws.found)
        cores = 1 if self._in_turns or engine.debug else engine.workers or (os.cpu_count() or 1)
        counts = {cores} if engine.workers or engine.debug else {1, cores}
        # Where other programs keep the cores busy, torch's threads wait for one another: one of them may be far faster.
        alone = {inner} if engine.debug else {1, inner}
        workers = {count: sorted(alone) if count == 1 else [max(1, inner // count)] for count in sorted(counts)}
        return Chooser(self._ways() or [ALONE], workers, task.size)

    def _ways(self) -> list[str]:
        wanted, in_turns = self._engine.way, bool(self._task.draws.found)
        if self._engine.debug:
            return [ALONE]
        here = [way for way in self._task.ways if not (in_turns and way == STACKED)]
        return [way for way in here if wanted is None or way.startswith(wanted)]

    def answers(self, clients: Sequence[int], step: int) -> Iterator[Answer]:
        """Yield answers that together are those of all clients that were not lost.

        Raises:
            SfumatoError: of the same kind as a client's error, naming the client, or those trained beside it, and the step.
        """
        present: Sequence[int] = clients
        if self._engine.looks_at_names:
            name_at = self._task.population.name_at
            present = [number for number in clients if not self._engine.loses(step, name_at(number))]
        left = 0
        if self._task.draws.found is None and present:
            yield self._first(present[0], step)
            left = 1
        if self._task.draws.found and not self._in_turns:
            self._chooser = self._choices()
        while left < len(present):
            choice = self._chooser.choice
            if self._chooser.settled:
                yield from self._all(present[left:], step, choice)
                return
            some = present[left : left + choice.chunk * choice.workers]
            with self._chooser.timed() as watch:
                records = self._records(some, step)
                watch.records = sum(len(one) for one in records)
                answers = self._tried(some, records, step, choice)
            left += len(some)
            yield from answers

    def _first(self, number: int, step: int) -> Answer:
        """Let one client work while no other does: what it draws, it draws for all, and so does what makes its records."""
        draws, before = self._task.draws, torch.get_rng_state()
        records = self._made([number], step)
        draws.trusted = torch.equal(torch.get_rng_state(), before)
        torch.set_rng_state(before)
        answer = self._work([number], records, step, ALONE)
        draws.found = bool(draws.found)
        return answer

    def _tried(self, clients: Sequence[int], records: Sequence[Records], step: int, choice: Choice) -> list[Answer]:
        if choice.way not in self._sound:
            if not self._is_sound(clients, records, choice.way):
                self._chooser.refuse(choice.way)
                return [self._work(clients, records, step, ALONE)]
            self._sound.add(choice.way)
        size = self._chunk(choice, len(clients))
        chunks = [slice(start, start + size) for start in range(0, len(clients), size)]
        jobs = [self._submit(choice, clients[chunk], records[chunk], step) for chunk in chunks]
        return [job.result() for job in jobs]

    def _is_sound(self, clients: Sequence[int], records: Sequence[Records], way: str) -> bool:
        """Whether a way can run the smallest and the largest of some clients, and agrees with one by one."""
        order = sorted(range(len(clients)), key=lambda row: len(records[row]))
        rows = [order[0], order[-1]] if len(order) > 1 else order
        try:
            return self._task.agrees([clients[row] for row in rows], [records[row] for row in rows], way)
        except Exception:
            return False

    def _all(self, clients: Sequence[int], step: int, choice: Choice) -> Iterator[Answer]:
        waiting: deque[Future[Answer]] = deque()
        window = choice.chunk * choice.workers * _SORTED
        for start in range(0, len(clients), window):
            some = clients[start : start + window]
            while waiting and not self._task.draws.trusted:  # nobody may work while clients are made
                yield waiting.popleft().result()
            records = self._records(some, step)
            # Clients of like size are stacked together, so that less is computed only to be left out.
            order = sorted(range(len(some)), key=lambda row: (-len(records[row]), row))
            size = self._chunk(choice, len(order))
            for first in range(0, len(order), size):
                rows = order[first : first + size]
                chunk, held = [some[row] for row in rows], [records[row] for row in rows]
                waiting.append(self._submit(choice, chunk, held, step))
                if len(waiting) > 2 * choice.workers:
                    yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    @staticmethod
    def _chunk(choice: Choice, clients: int) -> int:
        """Return how many clients a chunk holds where so few are there that every worker should get some."""
        return min(choice.chunk, math.ceil(clients / choice.workers))

    def _records(self, clients: Sequence[int], step: int) -> list[Records]:
        """Make clients; if that draws from torch's stream of random numbers, put it back, so that work can be watched."""
        if self._task.draws.trusted:
            return self._made(clients, step)
        with torch.random.fork_rng(devices=[]):
            return self._made(clients, step)

    def _made(self, clients: Sequence[int], step: int) -> list[Records]:
        made = []
        for number in clients:
            try:
                made.append(self._task.population.at(number))
            except SfumatoError as error:
                name = self._task.population.name_at(number)
                raise blamed(error, name, step, "making its records") from error
            except Exception as error:
                name = self._task.population.name_at(number)
                raise blamed(error, name, step, "making its records") from None
        return made

    def _submit(self, choice: Choice, clients: Sequence[int], records: Sequence[Records], step: int) -> Future[Answer]:
        if choice.workers == 1:
            done: Future[Answer] = Future()
            with _torch_threads(choice.threads):
                done.set_result(self._work(clients, records, step, choice.way))
            return done
        if choice.workers not in self._pools:
            self._pools[choice.workers] = ThreadPoolExecutor(
                choice.workers, "sfumato-client", initializer=torch.set_num_threads, initargs=(choice.threads,)
            )
        here = Surroundings.here()

        def work() -> Answer:
            with here.entered():
                return self._work(clients, records, step, choice.way)

        return self._pools[choice.workers].submit(work)

    def _work(self, clients: Sequence[int], records: Sequence[Records], step: int, way: str) -> Answer:
        if way != STACKED and len(clients) > 1:
            one_by_one = zip(clients, records, strict=True)
            return Answer.joined(self._work([number], [held], step, way) for number, held in one_by_one)
        try:
            return self._task.work(clients, records, way)
        except SfumatoError as error:
            if way != ALONE:  # the sure way goes through, or its error names one client
                return self._work(clients, records, step, ALONE)
            raise blamed(error, self._task.population.name_at(clients[0]), step) from error


def _check_called(name: str, asked: object) -> None:
    """Refuse what cannot be called with (step, client)."""
    number = "a number in [0, 1) or " if name == "drop_out" else ""
    if isinstance(asked, type) or not callable(asked):
        raise InputError(f"{name} must be {number}a function of (step, client), not {kind_of(asked)}.")
    try:
        takes = inspect.signature(asked)
    except (TypeError, ValueError):  # some that are not written in Python do not tell
        return
    try:
        takes.bind(0, "client")
    except TypeError:
        raise InputError(
            f"{name} is called with (step, client), which it cannot take; write it as a function of these two."
        ) from None


@contextlib.contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    """Let torch use so many threads of its own meanwhile."""
    before = torch.get_num_threads()
    if before == count:
        yield
        return
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
