"""The bench of federated rounds: its arguments, its check of the work done, its table, and that the plain loop goes through."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"


@pytest.fixture(scope="module")
def federation() -> Iterator[ModuleType]:
    before = list(sys.path)
    sys.path.insert(0, str(BENCH))  # as for a script: it imports what lies beside it
    try:
        spec = importlib.util.spec_from_file_location("bench_federation", BENCH / "federation.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path[:] = before


def engine(start: float, after_one: float) -> SimpleNamespace:
    return SimpleNamespace(loss_at_start=start, loss_after_one=after_one)


def test_the_defaults_are_all_tasks_and_all_engines(federation: ModuleType) -> None:
    asked = federation.parsed([])
    assert asked.tasks == ["logistic", "mlp", "leaf-cnn", "mnist-writers"]
    assert asked.engines == ["plain", "sfumato", "pfl", "pfl-2", "flower"]
    assert asked.out == BENCH / "results" / "federation.json"


@pytest.mark.parametrize(
    ("words", "name"), [(["--population"], "federation-population.json"), (["--memory"], "federation-memory.json")]
)
def test_each_part_has_a_file_of_its_own_and_a_quick_run_none(
    federation: ModuleType, words: list[str], name: str
) -> None:
    assert federation.parsed(words).out == BENCH / "results" / name
    assert federation.parsed([*words, "--quick"]).out is None
    assert federation.parsed([*words, "--quick", "--out", "a.json"]).out == Path("a.json")


@pytest.mark.parametrize(
    "words", [["--tasks", "cnn"], ["--engines", "tff"], ["--population", "--memory"], ["--turns", "x"]]
)
def test_unknown_words_are_refused(federation: ModuleType, words: list[str]) -> None:
    with pytest.raises(SystemExit) as refusal:
        federation.parsed(words)
    assert refusal.value.code == 2


def test_turns_below_one_are_refused_in_one_line(federation: ModuleType) -> None:
    with pytest.raises(SystemExit, match="--turns must be at least 1"):
        federation.parsed(["--turns", "0"])


def test_an_engine_that_does_not_train_is_told(federation: ModuleType) -> None:
    plain = engine(2.3, 2.2)
    assert federation.idle(engine(2.3, 2.2), plain, 0.05) is None
    assert federation.idle(engine(2.3, 2.204), plain, 0.05) is None
    assert "first round" in federation.idle(engine(2.3, 2.3), plain, 0.05)
    assert "the plain loop's by" in federation.idle(engine(2.3, 2.21), plain, 0.05)  # a tenth of the clients left out
    assert "the plain loop's by" in federation.idle(engine(2.3, 2.19), plain, 0.05)
    assert federation.idle(engine(2.3, float("nan")), plain, 0.05) is not None
    assert federation.idle(engine(2.3, 2.25), None, 0.05) is None


def test_engines_of_peers_have_environments_with_requirements(federation: ModuleType) -> None:
    for name in federation.ENGINES:
        folder = federation.environment_of(name)
        if name in federation.OURS:
            assert folder is None
        else:
            assert f"torch=={torch.__version__.partition('+')[0]}\n" in (
                BENCH / f"requirements-{folder.name}.txt"
            ).read_text(encoding="utf-8")
    assert federation.processes_of("pfl") == 1
    assert federation.processes_of("pfl-2") == 2
    assert federation.python_of("pfl-2") == federation.python_of("pfl")


def test_a_process_holds_its_own_memory_and_its_children(federation: ModuleType) -> None:
    me = federation.os.getpid()
    if not Path(f"/proc/{me}/smaps_rollup").exists():
        pytest.skip("no /proc/PID/smaps_rollup here")
    before = federation._held(me)
    block = torch.ones(64 * 2**18)  # 64 MiB
    grown = federation._held(me) - before
    assert 60 * 2**20 < grown < 70 * 2**20
    assert block.sum() == len(block)
    child = federation.subprocess.Popen([sys.executable, "-c", "input()"], stdin=federation.subprocess.PIPE)
    try:
        assert child.pid in list(federation._tree(me))
    finally:
        child.communicate(b"\n")


def test_the_table_tells_how_many_of_ours_go_into_one_of_theirs(federation: ModuleType) -> None:
    common = {"task": "mlp", "fastest_s": 0.1, "first_round_s": 1.0, "peak_mb": None}
    rows = [
        {**common, "engine": "sfumato", "round_s": 0.1},
        {**common, "engine": "pfl", "round_s": 0.35},
        {"task": "mlp", "engine": "flower", "error": "no Ray"},
    ]
    ours, pfl, flower = federation.table(rows).splitlines()
    assert ours.endswith("1.00")
    assert pfl.endswith("3.50")
    assert flower.endswith("failed: no Ray")


def test_clients_of_a_population_are_made_of_the_pool(federation: ModuleType, tmp_path: Path) -> None:
    models = sys.modules["federation_models"]
    models.write_synthetic(tmp_path, clients=3, records=4)
    features, targets, offsets = models.load(tmp_path)
    assert features.shape == (12, 1, 28, 28)
    assert offsets == [0, 4, 8, 12]
    (second, wanted) = models.clients_of(tmp_path)[1]
    assert torch.equal(second, features[4:8])
    assert torch.equal(wanted, targets[4:8])
    assert sum(p.numel() for p in models.leaf_cnn().parameters()) == 1_663_370


def test_the_plain_loop_goes_through_beside_an_engine_that_cannot(
    federation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(federation, "set_up", lambda folder, *_: f"{folder.name} could not be made")
    monkeypatch.setattr(federation, "SECONDS", 0.1)
    monkeypatch.setattr(federation, "THREADS", 1)  # two would wait for each other where the cores are busy
    out = tmp_path / "found.json"
    federation.compare_engines(
        federation.parsed(["--quick", "--tasks", "logistic", "--engines", "plain", "pfl", "--out", str(out)])
    )
    plain, pfl = json.loads(out.read_text(encoding="utf-8"))
    assert set(plain) >= {"task", "engine", "round_s", "peak_mb", "first_round_s"}
    assert "error" not in plain
    assert plain["loss"][1] < plain["loss"][0]
    assert pfl == {"task": "logistic", "engine": "pfl", "error": "pfl could not be made"}
    assert "torch" in json.loads((tmp_path / "found-machine.json").read_text(encoding="utf-8"))["libraries"]["plain"]
    assert "failed: pfl could not be made" in capsys.readouterr().out
