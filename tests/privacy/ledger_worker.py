"""A process that uses a ledger, for the tests that race, kill and fork one. It never imports torch.

Run as: python ledger_worker.py SOURCE COMMAND LEDGER [ARGUMENT], where SOURCE is the folder of `sfumato`.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import sys
import threading
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path


def import_without_torch(source: Path) -> None:
    """Make `sfumato` and `sfumato.privacy` importable without running their `__init__`."""
    for name, folder in (("sfumato", source), ("sfumato.privacy", source / "privacy")):
        package = types.ModuleType(name)
        package.__path__ = [str(folder)]
        sys.modules[name] = package


import_without_torch(Path(sys.argv[1]))

from sfumato.errors import BudgetExhaustedError, LedgerError  # noqa: E402
from sfumato.privacy.books import Cost  # noqa: E402
from sfumato.privacy.budget import Budget, Relation, Unit  # noqa: E402
from sfumato.privacy.ledger import Ledger  # noqa: E402


def cost(epsilon: float) -> Cost:
    return Cost(epsilon, 0.0, Unit.RECORD, Relation.ADD_OR_REMOVE_ONE)


def say(word: str) -> None:
    os.write(1, f"{word}\n".encode())  # one write, so that lines of several processes do not mix


def race(ledger: Ledger) -> None:
    """For each data set named on standard input, try to charge 0.1 once."""
    say("ready")
    for line in sys.stdin:
        try:
            ledger.charge(line.strip(), purpose="race", event="{}", cost=cost(0.1), draws=1)
            say("charged")
        except BudgetExhaustedError:
            say("refused")


def many(ledger: Ledger, times: int) -> None:
    """Charge 0.01 many times and say the names of the runs."""
    for _ in range(times):
        say(ledger.charge("a", purpose="many", event="{}", cost=cost(0.01), draws=1).run)


def drain(ledger: Ledger, times: int) -> None:
    """Try to charge 0.01 many times, take both draws of each charge, and say the run or that it was refused."""
    for _ in range(times):
        try:
            charge = ledger.charge("a", purpose="drain", event="{}", cost=cost(0.01), draws=2, lease=1)
        except BudgetExhaustedError:
            say("refused")
            continue
        say(f"{charge.run} {charge.take()} {charge.take()}")


def drain_renyi(order: int, times: int) -> None:
    """Eight forked children that charge one filter and settle most of it back, until nothing is left."""
    from sfumato.privacy import events

    whole, part = (events.to_json(events.RenyiFilterDpEvent(order, rdp)) for rdp in (0.05, 0.02))
    children = []
    for number in range(8):
        child = os.fork()
        if child:
            children.append(child)
            continue
        code = 1
        try:
            ledger = Ledger(sys.argv[3])
            for _ in range(times):
                try:
                    charge = ledger.charge(
                        "a", purpose="drain", event=whole, cost=cost(0.1), draws=4, lease=2, by=f"user {number % 2}"
                    )
                except BudgetExhaustedError:
                    say("refused")
                    continue
                index = charge.take()
                if number % 3:
                    charge.settle(part)
                say(f"{charge.run} {index}")
            code = 0
        finally:
            os._exit(code)
    if any(os.waitpid(child, 0)[1] for child in children):
        sys.exit(1)


def spend(ledger: Ledger, target: str, event: str) -> None:
    """Until killed: charge, take, and only then write run and index to a file, as a release would; at times settle."""
    chance = random.Random(os.getpid())
    file = os.open(target, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    ended = {entry.run for entry in ledger.history("a") if entry.kind == "settle" or entry.upto == entry.draws}
    open_runs = [entry.run for entry in ledger.history("a") if entry.kind == "charge" and entry.run not in ended]
    charge = ledger.resume(open_runs[-1], lease=3) if open_runs else None
    while True:
        if charge is None or charge.position == charge.draws:
            whole = f'{{"count": 8, "event": {event}, "type": "SelfComposedDpEvent"}}' if event else "{}"
            charge = ledger.charge("a", purpose="kill", event=whole, cost=cost(0.001), draws=8, lease=3)
        os.write(file, f"{charge.run} {charge.take()}\n".encode())  # one write: cut short by no kill
        say("released")
        if event and chance.random() < 0.1:
            charge.settle(f'{{"count": {charge.position}, "event": {event}, "type": "SelfComposedDpEvent"}}')
            charge = None


def nursery(noise: float) -> None:
    """For each ledger and target on standard input, fork a child that spends until killed; say its name and its end."""
    event = ""
    if noise:
        from sfumato.privacy import events, renyi

        event = events.to_json(events.gaussian(noise))
        renyi.cost(events.gaussian(noise), 2)
    for line in sys.stdin:
        path, target = json.loads(line)
        child = os.fork()
        if child == 0:
            try:
                say(f"born {os.getpid()}")
                spend(Ledger.existing(path), target, event)
            finally:
                traceback.print_exc()
                os._exit(1)
        say(f"dead {os.waitpid(child, 0)[1]}")


def in_child(work: Callable[[], object]) -> str:
    """Run `work` in a forked child; return the name of its error and its text, or what it returned."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = repr(work())
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    os.waitpid(child, 0)
    return answer


def fork(ledger: Ledger) -> None:
    """Say, as JSON, how a charge and two ledgers behave in a forked child."""
    ledger.grant("a", Budget(1.0, 0.5))
    charge = ledger.charge("a", purpose="fork", event="{}", cost=cost(0.1), draws=5)
    charge.take()
    memory = Ledger.in_memory()
    memory.grant("a", Budget(1.0, 0.5))

    def charge_again() -> str:
        return ledger.charge("a", purpose="child", event="{}", cost=cost(0.1), draws=1).dataset

    answers = {
        "take": in_child(charge.take),
        "pause": in_child(charge.pause),
        "memory": in_child(lambda: memory.balance("a")),
        "file": in_child(charge_again),
        "parent": repr(charge.take()),
        "spent": ledger.balance("a").spent_epsilon,
    }
    try:
        pickle.dumps(charge)
    except TypeError as error:
        answers["pickle"] = f"TypeError: {error}"
    say(json.dumps(answers))


def fork_in_a_transaction(ledger: Ledger) -> None:
    """Fork while another thread is writing; say how many handles on the file the child inherits."""
    entered = threading.Event()

    def write() -> None:
        with ledger._store.transaction(write=True):
            entered.set()
            time.sleep(0.2)

    def handles() -> int:
        links = [os.path.join("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return sum(os.readlink(link).startswith(sys.argv[3]) for link in links if os.path.islink(link))

    thread = threading.Thread(target=write)
    thread.start()
    entered.wait()
    during = handles()
    say(f"{during > 0} {in_child(handles)}")
    thread.join()


def forked_family(ledger: Ledger, times: int) -> None:
    """Fork four children while a connection was in use before; parent and children charge at once."""
    ledger.grant("a", Budget(100.0, 0.5))
    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            try:
                many(ledger, times)
                many(Ledger(sys.argv[3]), times)
            except LedgerError as error:
                print(error, file=sys.stderr)
                os._exit(1)
            os._exit(0)
        children.append(child)
    many(ledger, times)
    if any(os.waitpid(child, 0)[1] for child in children):
        sys.exit(1)


if __name__ == "__main__":
    with Ledger(sys.argv[3]) as opened:
        match sys.argv[2]:
            case "race":
                race(opened)
            case "many":
                many(opened, int(sys.argv[4]))
            case "drain":
                drain(opened, int(sys.argv[4]))
            case "drain-renyi":
                drain_renyi(int(sys.argv[4]), int(sys.argv[5]))
            case "nursery":
                nursery(float(sys.argv[4]))
            case "fork":
                fork(opened)
            case "fork-in-a-transaction":
                fork_in_a_transaction(opened)
            case "family":
                forked_family(opened, int(sys.argv[4]))
            case unknown:
                sys.exit(f"unknown command {unknown}")
