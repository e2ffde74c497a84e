from __future__ import annotations

import subprocess
import sys

import pytest

import sfumato


@pytest.mark.parametrize("name", [name for name in sfumato.__all__ if name != "__version__"])
def test_every_public_name_is_there(name: str) -> None:
    found = getattr(sfumato, name)
    assert getattr(found, "__module__", getattr(found, "__name__", "")).startswith("sfumato.")
    assert name in dir(sfumato)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="Bugdet"):
        _ = sfumato.Bugdet


def test_the_command_line_answers_without_loading_torch() -> None:
    code = "import sys, sfumato.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
