"""The made-up study as fixtures; each test gets its own copy and may spoil it."""

from __future__ import annotations

from typing import Any

import pytest
from made_up_study import run, study

from sfumato.report import Result


@pytest.fixture
def mapping() -> dict[str, Any]:
    return study()


@pytest.fixture
def result(mapping: dict[str, Any]) -> Result:
    return Result.model_validate(mapping)


@pytest.fixture
def single() -> dict[str, Any]:
    return {"runs": [run()]}
