"""How long accounting takes, and how far above the exact figure it lies: sfumato beside dp-accounting, in one run.

The plan is MNIST's: batches of 256 of 60,000, delta 1e-5. "uneven" is a noise that falls along a cosine, one value a step.

Usage: python bench/accounting.py [--quick] [--out bench/results/accounting.json]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dp_accounting
from dp_accounting import pld

from sfumato import Budget, Cosine
from sfumato.privacy import accounting, composition, events
from sfumato.privacy.calibration import calibrate
from sfumato.report.describe import describe_machine

HERE = Path(__file__).parent
RATE, DELTA = 256 / 60_000, 1e-5
CONSTANT_STEPS = 14_040
SHAPE = Cosine(2.0, 1.0)


def uneven(steps: int, base: float) -> events.Event:
    factors = SHAPE.factors(steps)
    return events.composed([events.poisson_sampled(RATE, events.gaussian(base * factor)) for factor in factors])


def constant(noise: float) -> events.Event:
    return events.repeated(events.poisson_sampled(RATE, events.gaussian(noise)), CONSTANT_STEPS)


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    composition._one.cache_clear()
    accounting._spending.cache_clear()
    begun = time.perf_counter()
    found = work()
    return found, time.perf_counter() - begun


def exact(event: events.Event) -> float:
    accountant = pld.PLDAccountant()
    accountant.compose(event)
    return float(accountant.get_epsilon(DELTA))


def peers_noise() -> float:
    bracket = dp_accounting.ExplicitBracketInterval(0.5, 2.0)
    found = dp_accounting.calibrate_dp_mechanism(pld.PLDAccountant, constant, 3.0, DELTA, bracket, tol=1e-4)
    return float(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave out the exact composition of 1,000 steps")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "accounting.json")
    asked = parser.parse_args()
    calibrate(events.gaussian, Budget(1.0, DELTA))  # so that no library is loaded while something is timed
    rows: list[dict[str, Any]] = []

    def note(work: str, who: str, answer: float, seconds: float) -> None:
        rows.append({"work": work, "who": who, "answer": answer, "seconds": round(seconds, 3)})
        print(f"{work:42} {who:14} {answer:10.5f} {seconds:9.2f} s", flush=True)

    print(describe_machine())
    work = "epsilon of 200 uneven steps"
    quick, ours = timed(lambda: accounting.spending(uneven(200, 0.9), DELTA).epsilon)
    note(work, "sfumato", quick, ours)
    slow, theirs = timed(lambda: exact(uneven(200, 0.9)))
    note(work, "dp-accounting", slow, theirs)
    print(f"  {theirs / ours:.0f} times faster, {100 * (quick / slow - 1):.2f} % above")
    work = "noise for epsilon 3, 14,040 equal steps"
    found, ours = timed(lambda: calibrate(constant, Budget(3.0, DELTA)).noise_multiplier)
    note(work, "sfumato", found, ours)
    found, theirs = timed(peers_noise)
    note(work, "dp-accounting", found, theirs)
    work = "noise for epsilon 1, 1,000 uneven steps"
    found, ours = timed(lambda: calibrate(lambda base: uneven(1000, base), Budget(1.0, DELTA)))
    note(work, "sfumato", found.noise_multiplier, ours)
    if not asked.quick:
        slow, theirs = timed(lambda: exact(uneven(1000, found.noise_multiplier)))
        note("epsilon of the 1,000 steps found", "dp-accounting", slow, theirs)
        print(f"  {100 * (found.spending.epsilon / slow - 1):.2f} % above")
        assert math.isfinite(slow)
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    asked.out.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
