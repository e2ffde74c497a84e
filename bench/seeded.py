"""The arguments that benches over several seeds share, and the file that they write."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

QUICK_SEEDS = 2  # the fewest that give an interval


def arguments(about: str | None, *, quick: str, threads: str) -> argparse.ArgumentParser:
    """Return a parser with --seeds, --quick, --threads and --out; `quick` and `threads` say what these two mean."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--threads", type=int, default=1, help=threads)
    parser.add_argument("--out", type=Path)
    return parser


def parsed(
    parser: argparse.ArgumentParser, words: Sequence[str] | None, *, name: str, seeds: int
) -> argparse.Namespace:  # fmt: skip
    """Return the checked arguments.

    Args:
        parser: Of `arguments`.
        words: Of the command line.
        name: Of the file of results, where no other is asked for.
        seeds: How many, where neither a number nor --quick is asked for.
    """
    asked = parser.parse_args(words)
    if asked.seeds is None:
        asked.seeds = QUICK_SEEDS if asked.quick else seeds
    if asked.out is None and not asked.quick:
        asked.out = Path(__file__).parent / "results" / f"{name}.json"
    if asked.seeds < QUICK_SEEDS:
        raise SystemExit(f"--seeds must be at least {QUICK_SEEDS}, for an interval.")
    if asked.threads < 1:
        raise SystemExit("--threads must be at least 1.")
    return asked


def write(asked: argparse.Namespace, content: dict[str, Any]) -> None:
    """Write what was found to the file that was asked for, if any was."""
    if asked.out is not None:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
