"""Time of a million normal draws: the secure source against torch.randn, alternating in one run.

Usage: python bench/randomness.py [--out bench/results/randomness.json]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from sfumato import SecureSource
from sfumato.report.describe import describe_machine

DRAWS = 1_000_000
REPEATS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/randomness.json"))
    out = parser.parse_args().out
    source = SecureSource()
    candidates: dict[str, Callable[[], object]] = {
        "torch.randn float32": lambda: torch.randn(DRAWS),
        "secure float32": lambda: source.normal(DRAWS, dtype=torch.float32),
        "torch.randn float64": lambda: torch.randn(DRAWS, dtype=torch.float64),
        "secure float64": lambda: source.normal(DRAWS),
    }
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for repeat in range(REPEATS + 5):
        for name, draw in candidates.items():
            begun = time.perf_counter()
            draw()
            if repeat >= 5:
                times[name].append(time.perf_counter() - begun)
    medians = {name: statistics.median(values) * 1e3 for name, values in times.items()}
    rows = [
        {"what": name, "draws": DRAWS, "median_ms": round(median, 3), "ratio": round(median / medians[peer], 3)}
        for name, median in medians.items()
        for peer in [f"torch.randn {name.split()[-1]}"]
    ]
    print(describe_machine())
    for row in rows:
        print(f"{row['what']:22} {row['median_ms']:8.2f} ms  {row['ratio']:5.2f} x torch.randn of the same dtype")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"machine": describe_machine(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
