"""What both READMEs say in Python runs as it stands, and the two say the same."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import sfumato as sf
from sfumato.config import Experiment, TrainingSection
from sfumato.federation_config import FederatedTraining, FederationSection, StopSection, UpToSection
from sfumato.gradients.rules import RULES

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh-CN.md")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks_of(name: str) -> list[tuple[str, str]]:
    return FENCE.findall(text_of(name))


def prose_of(name: str) -> str:
    return FENCE.sub("", text_of(name))


def heading_levels(name: str) -> list[int]:
    return [len(marks) for marks in re.findall(r"^(#+) ", prose_of(name), re.MULTILINE)]


def table_numbers(name: str) -> list[list[str]]:
    rows = [line for line in prose_of(name).splitlines() if line.startswith("|")]
    return [re.findall(r"\d+(?:\.\d+)?", row) for row in rows]


@pytest.fixture
def rules() -> Iterator[None]:
    """Forget the rules that a test registers."""
    before = dict(RULES)
    yield
    RULES.clear()
    RULES.update(before)


@pytest.mark.usefixtures("rules")
# peft calls what transformers has deprecated.
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("name", READMES)
def test_python_blocks_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = [code for language, code in blocks_of(name) if language == "python"]
    assert blocks
    namespace: dict[str, object] = {"__name__": "readme"}
    for number, code in enumerate(blocks, 1):
        exec(compile(code, f"{name}, Python block {number}", "exec"), namespace)
    # The text says that two of the three runs fit and the last is refused.
    with sf.Ledger.existing("ledger.sqlite") as ledger:
        assert [entry.kind for entry in ledger.history("heart")] == ["grant", "charge", "charge"]
    assert isinstance(namespace["result"], sf.TrainingResult)


@pytest.mark.parametrize("name", READMES)
def test_every_fence_is_a_block(name: str) -> None:
    assert "```" not in prose_of(name)


def test_both_have_the_same_code_blocks() -> None:
    english, chinese = (blocks_of(name) for name in READMES)
    assert len(english) == len(chinese)
    assert english == chinese


def test_both_have_the_same_headings() -> None:
    english, chinese = (heading_levels(name) for name in READMES)
    assert len(english) > 3
    assert english == chinese


def test_both_have_the_same_numbers_in_their_table() -> None:
    english, chinese = (table_numbers(name) for name in READMES)
    assert any(english)
    assert english == chinese


@pytest.mark.parametrize("name", [*READMES, "CONTRIBUTING.md", "CHANGELOG.md"])
def test_linked_files_exist(name: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", prose_of(name)):
        assert target.startswith("https://") or (ROOT / target).is_file(), target


def test_the_configuration_in_the_readme_is_a_valid_one(tmp_path: Path) -> None:
    (code,) = [code for language, code in blocks_of("README.md") if language == "toml"]
    (tmp_path / "visits.toml").write_text(code, encoding="utf-8")
    (tmp_path / "visits.csv").write_text("age,smoker,clinic,ill\n" + "30,no,north,yes\n40,yes,south,no\n" * 6)
    experiment = Experiment(tmp_path / "visits.toml")
    assert experiment.plan().spending.epsilon <= 1.0
    training, test = experiment.records()
    assert experiment.model(training)(test.features).shape == (4, 2)


def test_the_configuration_in_the_readme_tells_every_key_of_a_federation() -> None:
    (code,) = [code for language, code in blocks_of("README.md") if language == "toml"]
    known = {"training": TrainingSection.model_fields, "federation": FederationSection.model_fields}
    sections = re.findall(r"^\[(\w+)\][^\n]*\n(.*?)(?=^\[|\Z)", code, re.MULTILINE | re.DOTALL)
    offered = {name: re.findall(r"^# (\w+ = .*)$", lines, re.MULTILINE) for name, lines in sections}
    for section, keys in known.items():
        assert offered[section]
        for line in offered[section]:
            (key,) = tomllib.loads(line)
            assert key in keys, line
    for section in (FederatedTraining, FederationSection, StopSection, UpToSection):
        for key in section.model_fields:
            assert re.search(rf"\b{key}\b( =|,)", code), f"{section.__name__}: {key}"
