from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from sfumato import Budget, Ledger, demo
from sfumato.errors import InputError
from sfumato.report import read_result

QUIET = Console(quiet=True)


def test_the_demo_never_touches_a_folder_that_is_not_its_own(tmp_path: Path) -> None:
    with Ledger(tmp_path / "ledger.sqlite") as ledger:
        ledger.grant("oncology", Budget(4.0, 1e-4))
    with pytest.raises(InputError, match="not an earlier demo's"):
        demo.run_demo(tmp_path, 1, QUIET)
    assert Ledger.existing(tmp_path / "ledger.sqlite").has_grant("oncology")


def test_a_stopped_demo_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "_test", stop)
    with pytest.raises(KeyboardInterrupt):
        demo.run_demo(tmp_path / "out", 1, QUIET)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_the_demo_can_be_repeated_and_every_arm_keeps_its_promise(tmp_path: Path) -> None:
    for _ in range(2):
        demo.run_demo(tmp_path / "out", 1, QUIET)
    result = read_result(tmp_path / "out" / "result.json")
    assert [run.mode for run in result.runs].count("federated-private") == len(demo.EPSILONS)
    for run in result.runs:
        if run.privacy is not None:
            assert run.privacy.epsilon <= float(run.name.split()[-1])
            assert run.privacy.accountants.pld == run.privacy.epsilon
            assert run.metrics.accuracy is not None
            assert set(run.metrics.accuracy.per_owner) == set(demo.POPULATIONS)
    assert result.ledger is not None
    with Ledger.existing(tmp_path / "out" / "ledger.sqlite") as ledger:
        assert ledger.verify(result.ledger.digest) == result.ledger.digest
