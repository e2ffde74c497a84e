"""The statement: everything that must stand beside an epsilon."""

from __future__ import annotations

import math

import pytest

from sfumato.privacy import events
from sfumato.privacy.accounting import Spending
from sfumato.privacy.budget import Budget, Relation, Unit
from sfumato.privacy.statement import PrivacyStatement

SPENDING = Spending(epsilon=0.98765, delta=1e-5, pld=0.98765, rdp=1.23456)


def statement(**changes: object) -> PrivacyStatement:
    fields: dict[str, object] = {
        "budget": Budget(1.0, 1e-5),
        "spending": SPENDING,
        "event": events.gaussian(4.0),
        "not_covered": ("the number of records", "the loss that was watched"),
    }
    return PrivacyStatement(**(fields | changes))  # type: ignore[arg-type]


def test_the_claim_is_what_was_spent() -> None:
    made = statement()
    assert (made.epsilon, made.delta) == (0.98765, 1e-5)
    assert (made.unit, made.relation) == (Unit.RECORD, Relation.ADD_OR_REMOVE_ONE)


def test_the_text_names_epsilon_delta_unit_relation_and_both_accountants() -> None:
    text = str(statement())
    for words in (
        "(0.9877, 10⁻⁵)-differentially private",
        "for one record",
        "adding or removing one record",
        "Declared budget: epsilon 1.",
        "PLD 0.9877 (the claim)",
        "RDP 1.235 (second opinion)",
    ):
        assert words in text


@pytest.mark.parametrize("unit", list(Unit))
def test_the_text_says_who_is_protected_and_against_which_neighbours(unit: Unit) -> None:
    text = str(statement(budget=Budget(1.0, 1e-5, unit, Relation.REPLACE_ONE)))
    assert f"replacing one {unit} by another" in text
    assert "adding or removing" not in text


def test_everything_that_is_not_covered_is_listed() -> None:
    lines = str(statement()).splitlines()
    at = lines.index("  Not covered:")
    assert lines[at + 1 :] == ["  - the number of records", "  - the loss that was watched"]


def test_a_run_without_privacy_promises_nothing() -> None:
    spent = Spending(math.inf, 0.0, math.inf, math.inf)
    text = str(statement(budget=Budget(math.inf), spending=spent, event=events.non_private()))
    assert text.startswith("No privacy is promised")
    assert "differentially private" not in text
    assert "the number of records" in text


def test_noise_from_a_known_seed_is_called_a_rehearsal() -> None:
    assert str(statement(secret_noise=False)).startswith("A rehearsal, not a private release")
    assert "rehearsal" not in str(statement())
