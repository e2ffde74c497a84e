"""The report a data-protection officer reads: one HTML page, no network, no script, no other file."""

from __future__ import annotations

import json
import math
import re
import shlex
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Final

from jinja2 import Environment, StrictUndefined

from sfumato._numbers import bound, number, percent, percent_bound
from sfumato.errors import InputError
from sfumato.privacy.budget import Relation, Unit
from sfumato.privacy.meaning import FALSE_POSITIVE_RATES, in_words, share_bound
from sfumato.report import plots
from sfumato.report.client_plots import ForOwner
from sfumato.report.result import LedgerEntry, Privacy, Result, Run, exact_sum, write_text_atomically

FILE_NAME: Final = "report.html"
LONG_TABLE: Final = 12
MOST_COLUMNS: Final = 5

_MODES: Final = {
    "alone": "each owner trains alone",
    "pooled": "all records in one place",
    "pooled-private": "all records in one place, with privacy",
    "federated": "the owners train together, records stay where they are",
    "federated-private": "the owners train together, records stay where they are, with privacy",
    "central": "one curator",
    "central-private": "one curator, with privacy",
}
_UNITS: Final = {
    Unit.RECORD: "one record (one row of the data)",
    Unit.CLIENT: "one owner, with every record that owner holds",
}
_NEIGHBOURS: Final = {
    Relation.ADD_OR_REMOVE_ONE: "the same data with {one} more or less",
    Relation.REPLACE_ONE: "the same data with {one} exchanged for any other",
}


def render(result: Result, owner: ForOwner | None = None) -> str:
    """Return the whole page as text; the same arguments always give the same page.

    Args:
        result: What the page tells.
        owner: Pictures of private records for the data's owner, which no `result.json` holds; None for a page without.
    """
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "bound": bound,
        "number": number,
        "percent": percent,
        "percent_bound": percent_bound,
        "share_bound": share_bound,
        "exact": repr,
        "tied": tied,
    }
    page = resources.files("sfumato.report").joinpath("page.html").read_text("utf-8")
    ledger = result.ledger
    return environment.from_string(page).render(
        result=result,
        owner=owner,
        title=result.title or "Privacy report",
        summary=summary(result),
        private=result.private_runs,
        modes={mode: words for mode, words in _MODES.items() if mode in {run.mode for run in result.runs}},
        columns=_columns(len(result.private_runs)),
        units=_UNITS,
        neighbours=_neighbours(result.private_runs),
        promises=_promises(result.private_runs),
        rates=FALSE_POSITIVE_RATES,
        weakest=_weakest(result.private_runs),
        together=_together(result.private_runs),
        gaps=_gaps(result.private_runs),
        plots=_plots(result),
        scored=[run for run in result.runs if run.metrics.accuracy is not None],
        spending=_of_kind(ledger.entries, {"grant", "charge"}) if ledger else [],
        bookkeeping=_of_kind(ledger.entries, {"lease", "pause", "settle"}) if ledger else [],
        verify=f"sfumato ledger verify {shlex.quote(ledger.path)} --digest {ledger.digest}" if ledger else "",
        long_table=LONG_TABLE,
        event_json=lambda privacy: json.dumps(privacy.event, indent=2, ensure_ascii=False),
        is_public=lambda privacy: _kinds(privacy.event) <= _PUBLIC_KINDS,
    )


# What the PLD accountant of `dp-accounting` knows.
_PUBLIC_KINDS: Final = {
    *("NoOpDpEvent", "GaussianDpEvent", "LaplaceDpEvent", "PoissonSampledDpEvent"),
    *("SelfComposedDpEvent", "ComposedDpEvent", "TruncatedSubsampledGaussianDpEvent"),
}


def write_report(result: Result, folder: str | Path, owner: ForOwner | None = None) -> Path:
    """Write the page as `report.html` into `folder` (made if missing), whole or not at all; return its path.

    Args:
        result: What the page tells.
        folder: Where to write it.
        owner: As for `render`.

    Raises:
        InputError: the folder cannot be made or written.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder} cannot be made a folder ({error.strerror}); choose another one.") from None
    return write_text_atomically(folder / FILE_NAME, render(result, owner))


def tied(text: str) -> str:
    """Return the text with no line break before a number or a percent sign: "epsilon 0.5" stays on one line."""
    return re.sub(r" (?=[\d%])", "\N{NO-BREAK SPACE}", text)


def guess_bound(epsilon: float, delta: float) -> float:
    """Return the largest chance of telling rightly, from a 50:50 prior, whether one unit was in the data.

    At most e^epsilon / (1 + e^epsilon) + delta: the hypothesis-testing view of differential privacy
    (Kairouz, Oh and Viswanath 2015), rounded up.
    """
    return min(1.0, math.nextafter(1 / (1 + math.exp(-epsilon)), math.inf) + delta)


def summary(result: Result) -> list[str]:
    """Return the sentences of the opening paragraph: what was trained, who is protected, at what cost."""
    return [_what(result), *_who_and_promise(result), *_price(result)]


def _what(result: Result) -> str:
    count = len(result.runs)
    runs = "one training run" if count == 1 else f"{count} training runs"
    data = f" on the data set “{result.dataset.name}”" if result.dataset else ""
    owners = result.owners
    held = f", held by {len(owners)} owners ({_listed(owners, 8)})" if len(owners) > 1 else ""
    return f"This page reports {runs}{data}{held}."


def _who_and_promise(result: Result) -> list[str]:
    statements = [run.privacy for run in result.private_runs if run.privacy is not None]
    alone = len(result.runs) == 1
    if not statements:
        subject = "It is not" if alone else "None of them is"
        return [f"{subject} private: nothing is promised to anybody whose records were used."]
    units = " or ".join(_UNITS[unit] for unit in dict.fromkeys(p.unit for p in statements))
    verb = "is" if len(statements) == 1 else "are"
    subject = "It is private and" if alone else f"Of these, {len(statements)} {verb} private; each"
    strict, loose = (pick(statements, key=lambda p: (p.epsilon, p.delta)) for pick in (min, max))
    guesses = f"at most {_guess(strict)} of the time"
    if loose.epsilon > strict.epsilon:
        guesses += f" at epsilon {bound(strict.epsilon)} and {_guess(loose)} at epsilon {bound(loose.epsilon)}"
        epsilon = f"epsilon between {bound(strict.epsilon)} and {bound(loose.epsilon)}"
    else:
        epsilon = f"epsilon {bound(loose.epsilon)}"
    return [
        f"{subject} protects any {units}.",
        f"The promise is {epsilon} (delta at most {bound(max(p.delta for p in statements))}): somebody who "
        f"sees the trained model and must tell whether {_one(statements)} was used is right {guesses}, "
        "where a coin is right 50 %.",
    ]


def _guess(privacy: Privacy) -> str:
    return percent_bound(_chance(privacy))


def _chance(privacy: Privacy) -> float:
    """Return the bound on a right guess: of the whole trade-off curve if it is known, else of epsilon and delta."""
    return guess_bound(privacy.epsilon, privacy.delta) if privacy.risk is None else privacy.risk.guess


def _price(result: Result) -> list[str]:
    pairs = [(run, result.counterpart(run)) for run in result.private_runs]
    losses = [
        round(100 * (plain.metrics.accuracy.mean - run.metrics.accuracy.mean), 1) + 0.0
        for run, plain in pairs
        if plain and plain.metrics.accuracy and run.metrics.accuracy
    ]
    if not losses:
        return []
    low, high = min(losses), max(losses)
    if low == high:
        size = f"{abs(low):.1f} percentage points of accuracy {'lower' if low >= 0 else 'higher'}"
        return [f"Privacy made the result {size} than the same training without it."]
    note = " (minus: the private run came out better)" if low < 0 else ""
    return [
        f"Privacy cost between {low:.1f} and {high:.1f} percentage points of accuracy against the same "
        f"training without it{note}."
    ]


def _one(statements: list[Privacy]) -> str:
    units = {p.unit for p in statements}
    if len(units) > 1:
        return "one of them"
    return "one record" if Unit.RECORD in units else "one owner"


def _neighbours(private: list[Run]) -> list[tuple[str, str, str]]:
    pairs = dict.fromkeys((run.privacy.unit, run.privacy.relation) for run in private if run.privacy)
    return [(unit, relation, _NEIGHBOURS[relation].format(one=_UNITS[unit])) for unit, relation in pairs]


def _promises(private: list[Run]) -> list[tuple[list[str], Privacy, float]]:
    """Group run names by what is promised, most private first, each with the bound on an attacker's guess."""
    groups: dict[tuple[object, ...], tuple[list[str], Privacy]] = {}
    for run in private:
        if run.privacy:
            same = (run.privacy.epsilon, run.privacy.delta, run.privacy.risk)
            groups.setdefault(same, ([], run.privacy))[0].append(run.name)
    ordered = sorted(groups.values(), key=lambda group: (group[1].epsilon, group[1].delta))
    return [(names, privacy, _chance(privacy)) for names, privacy in ordered]


def _weakest(private: list[Run]) -> dict[str, object] | None:
    """Return the name of the run whose promise an attack can do most with, and what it means in two languages."""
    known = [(run.name, run.privacy, run.privacy.risk) for run in private if run.privacy and run.privacy.risk]
    if not known:
        return None
    name, privacy, risk = max(known, key=lambda entry: (entry[2].guess, entry[2].shown))
    english, chinese = (
        in_words(language, privacy.unit, privacy.relation, risk.guess, risk.shown) for language in ("en", "zh")
    )
    return {"name": name, "alone": len(private) == 1, "en": english, "zh": chinese, "basis": risk.basis}


def _kinds(tree: object) -> set[str]:
    """Return the types of all events of an event tree."""
    if isinstance(tree, list | tuple):
        return {kind for part in tree for kind in _kinds(part)}
    if not isinstance(tree, dict):
        return set()
    inner = {kind for part in tree.values() for kind in _kinds(part)}
    return inner | {str(tree["type"])} if "type" in tree else inner


def _together(private: list[Run]) -> tuple[float, float, int] | None:
    """Return what releasing every model of every seed costs (basic composition), and how many there are."""
    statements = [(run.privacy, run.metrics.accuracy.seeds if run.metrics.accuracy else 1) for run in private]
    same = len({(p.unit, p.relation) for p, _ in statements if p}) == 1
    models = sum(seeds for _, seeds in statements)
    if models < 2 or not same:
        return None
    epsilon = exact_sum((p.epsilon, seeds) for p, seeds in statements if p)
    delta = exact_sum((p.delta, seeds) for p, seeds in statements if p)
    return epsilon, delta, models


def _columns(runs: int) -> int:
    """Return how many runs stand side by side so that the tables are about equally wide."""
    tables = max(1, math.ceil(runs / MOST_COLUMNS))
    return max(1, math.ceil(runs / tables))


def _gaps(private: list[Run]) -> list[str]:
    sentences = (" ".join(text.split()) for run in private if run.privacy for text in run.privacy.not_covered)
    return [sentence for sentence in dict.fromkeys(sentences) if sentence]


def _plots(result: Result) -> dict[str, str | None]:
    return {
        "steps": plots.epsilon_over_steps(result),
        "noise": plots.noise_over_steps(result),
        "trade_off": plots.trade_off(result),
        "runs": plots.accuracy_by_run(result),
        "epsilon": plots.accuracy_over_epsilon(result),
        "owners": plots.accuracy_by_owner(result),
    }


def _of_kind(entries: Iterable[LedgerEntry], kinds: set[str]) -> list[LedgerEntry]:
    return [entry for entry in entries if entry.kind in kinds]


def _listed(names: list[str], limit: int) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
