"""The bench of federated rounds: its arguments, its check of the work done, its table, and that the plain loop goes through."""

from __future__ import annotations

import importlib.util
import json
import random
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
    # A process of its own: this one may give back what earlier tests held meanwhile.
    code = "print(flush=True); input(); block = b'x' * 2**26; print(flush=True); input()"
    pipe = federation.subprocess.PIPE
    child = federation.subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True)
    try:
        child.stdout.readline()
        assert child.pid in list(federation._tree(me))
        before = federation._held(child.pid)
        print(file=child.stdin, flush=True)
        child.stdout.readline()
        assert 63 * 2**20 < federation._held(child.pid) - before < 66 * 2**20
    finally:
        child.communicate("\n\n")


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


def asked_for(federation: ModuleType, out: Path, *words: str) -> SimpleNamespace:
    return federation.parsed(["--quick", "--out", str(out), *words])


def made_up(turns: int = 1) -> SimpleNamespace:
    return SimpleNamespace(turns=turns, versions={"torch": "2"})


def test_rows_of_other_tasks_and_engines_stay_in_the_file_with_their_machine(
    federation: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "found.json"
    asked = asked_for(federation, out)
    kept = [{"task": "mlp", "engine": name, "round_s": 1.0} for name in ("plain", "sfumato")]
    monkeypatch.setattr(federation, "describe_machine", lambda: "the first")
    federation.write(asked, kept, {("mlp", name): made_up() for name in ("plain", "sfumato")})
    monkeypatch.setattr(federation, "describe_machine", lambda: "the second")
    new = [
        {"task": "mlp", "engine": "sfumato", "round_s": 2.0},
        {"task": "logistic", "engine": "plain", "round_s": 3.0},
    ]
    federation.write(asked, new, {("mlp", "sfumato"): made_up(), ("logistic", "plain"): made_up(5)})
    assert json.loads(out.read_text(encoding="utf-8")) == [kept[0], *new]
    about = json.loads((tmp_path / "found-machine.json").read_text(encoding="utf-8"))
    assert [(row["task"], row["engine"], row["machine"], row["turns"]) for row in about] == [
        ("mlp", "plain", "the first", 1), ("mlp", "sfumato", "the second", 1), ("logistic", "plain", "the second", 5),
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_engine_that_fails_leaves_its_last_good_row(federation: ModuleType, tmp_path: Path) -> None:
    asked = asked_for(federation, tmp_path / "found.json")
    good, bad = {"task": "mlp", "engine": "pfl", "round_s": 1.0}, {"task": "mlp", "engine": "pfl", "error": "no pfl"}
    for row in (bad, good, bad):
        federation.write(asked, [row], {("mlp", "pfl"): made_up(turns=3)})
    assert json.loads(asked.out.read_text(encoding="utf-8")) == [good]
    (about,) = json.loads((tmp_path / "found-machine.json").read_text(encoding="utf-8"))
    assert about["turns"] == 3
    assert "error" not in about


@pytest.mark.parametrize("said", ["{}", "[1]", "[{}]", "not JSON", '[{"task": "mlp"}]'])
@pytest.mark.parametrize("name", ["found.json", "found-machine.json"])
def test_a_file_of_something_else_is_refused_before_anything_runs(
    federation: ModuleType, tmp_path: Path, said: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / name).write_text(said, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["federation.py", "--memory", "--quick", "--out", str(tmp_path / "found.json")])
    monkeypatch.setattr(federation, "watch_memory", lambda asked: pytest.fail("it ran"))
    with pytest.raises(SystemExit, match=f"federation: .*{name} .*; move it, or name another with --out"):
        federation.main()
    assert (tmp_path / name).read_text(encoding="utf-8") == said


def test_the_rows_in_the_repository_are_rows_with_a_machine_each(federation: ModuleType) -> None:
    for stem in ("federation", "federation-memory"):
        out = BENCH / "results" / f"{stem}.json"
        rows, about = federation.kept_rows(out), federation.kept_rows(federation.machine_file(out))
        assert [(row["task"], row["engine"]) for row in rows] == [(row["task"], row["engine"]) for row in about]
        assert all("cores" in row["machine"] for row in about)


def test_rows_are_told_after_every_turn_without_the_engine_that_failed(federation: ModuleType) -> None:
    class Fails(SimpleNamespace):
        def turn(self) -> None:
            if self.left == 0:
                raise federation.StepError("it broke")
            self.left -= 1

        def watch(self) -> None:
            pass

    engines = {"sound": Fails(left=9), "broken": Fails(left=1)}
    errors: dict[str, str] = {}
    seen: list[tuple[list[str], int]] = []
    # `in_turns` calls the functions of the class, so that a stand-in needs to be one.
    real, federation.Engine = federation.Engine, Fails
    try:
        federation.in_turns(engines, 3, errors, lambda: seen.append((list(engines), len(errors))))
    finally:
        federation.Engine = real
    assert seen == [(["sound", "broken"], 0), (["sound"], 1), (["sound"], 1), (["sound"], 1)]
    assert errors == {"broken": "it broke"}


def test_memory_without_a_trend_has_none_however_it_wanders(federation: ModuleType) -> None:
    draw = random.Random(3)
    level = [500 + draw.uniform(-30, 30) for _ in range(1000)]
    level[:50] = [100.0] * 50  # what settles is not looked at
    level[99], level[999] = 470.0, 560.0  # nor does one round decide
    flat = federation.trend(level)
    assert abs(flat["growth_percent"]) < 2.5
    assert abs(flat["slope_mb_per_1000_rounds"]) < 15
    assert flat["rounds"] == 1000
    assert len(flat["held_mb"]) == 20
    assert flat["most_mb"] == 560.0
    leak = federation.trend([held + 0.1 * step for step, held in enumerate(level)])
    assert leak["growth_percent"] > 12
    assert 85 < leak["slope_mb_per_1000_rounds"] < 115


def test_a_steady_leak_is_told_exactly(federation: ModuleType) -> None:
    found = federation.trend([200 + 0.01 * step for step in range(250)])
    assert found["slope_mb_per_1000_rounds"] == 10.0
    assert found["settled_mb"] == pytest.approx(200.995, abs=0.01)  # rounds 51 to 150
    assert found["last_mb"] == pytest.approx(201.995, abs=0.01)  # rounds 151 to 250


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
    assert set(plain) >= {"task", "engine", "round_s", "peak_mb", "first_round_s", "start_s"}
    assert 0 < plain["start_s"] < plain["first_round_s"]
    assert "error" not in plain
    assert plain["loss"][1] < plain["loss"][0]
    assert pfl == {"task": "logistic", "engine": "pfl", "error": "pfl could not be made"}
    here, there = json.loads((tmp_path / "found-machine.json").read_text(encoding="utf-8"))
    assert (here["task"], here["engine"], here["turns"], here["threads"]) == ("logistic", "plain", 1, 1)
    assert "cores" in here["machine"]
    assert "torch" in here["libraries"]
    assert (there["engine"], "libraries" in there) == ("pfl", False)
    assert "failed: pfl could not be made" in capsys.readouterr().out
