"""`sf.explain`: a row for each use of a layer, or a sentence for each thing that would be refused."""

from __future__ import annotations

import copy
import math
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from gradient_checks import normals, tokens
from torch import Tensor, nn
from torch.nn import functional as F

import sfumato as sf
from sfumato.errors import InputError, UnsupportedModelError
from sfumato.gradients.explain import Explanation, explain
from sfumato.gradients.terms.product import Product
from sfumato.gradients.terms.term import Strategy

RULES = {"linear", "convolution", "embedding", "normalisation", "recurrent"}
STRATEGIES = (
    {"outer product", "per record", "ghost norm", "in blocks", "rows read"}
    | {f"{how}, {kernel}" for how in ("per record", "in blocks") for kernel in ("grouped", "patches", "patches, channels last")}
)  # fmt: skip


class Text(nn.Module):
    """Tokens through one layer of each family; two tokens at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.reader = nn.LSTM(6, 6, batch_first=True)
        self.look = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.mix = nn.Conv1d(6, 4, 2)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.reader(self.table(x))
        y, _ = self.look(y, y, y)
        return self.head(self.mix(self.norm(y).transpose(1, 2)).mean(2))


class Branches(nn.Module):
    """Two layers side by side, a nested one that is used twice, and a parameter of the model's own."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"twice": nn.Linear(4, 4)})
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.left(x) + self.right(x)
        y = self.inner["twice"](torch.tanh(self.inner["twice"](y)))
        return y * self.scale


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor], list[str]]] = {
    "mlp": (
        lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)),
        lambda count: normals(1, count, 4).float(),
        ["0", "2"],
    ),
    "cnn": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3)
        ),
        lambda count: normals(1, count, 1, 6, 6).float(),
        ["0", "1", "4"],
    ),
    "text": (
        Text,
        lambda count: tokens(1, 9, count, 5),
        ["table", "reader", "reader", "look", "look.out_proj", "norm", "mix", "head"],
    ),
    "branches": (
        Branches,
        lambda count: normals(1, count, 4).float(),
        ["left", "right", "inner.twice", "inner.twice", "(the model itself)"],
    ),
}  # fmt: skip


def explained(name: str, count: int = 10) -> tuple[nn.Module, Explanation]:
    make, features, _ = MODELS[name]
    torch.manual_seed(0)
    model = make()
    return model, explain(model, features(count))


@pytest.mark.parametrize("name", MODELS)
def test_every_trained_layer_has_a_row_for_each_use(name: str) -> None:
    _, made = explained(name)
    assert sorted(row.layer for row in made.rows) == sorted(MODELS[name][2])
    assert made.refused == ()


@pytest.mark.parametrize("name", MODELS)
def test_rows_stand_in_the_order_of_the_forward(name: str) -> None:
    _, made = explained(name)
    # The two products of a recurrent layer, and layers side by side, are noted one after the other.
    assert [row.layer for row in made.rows] == MODELS[name][2]


@pytest.mark.parametrize("name", MODELS)
def test_rules_and_strategies_are_those_that_there_are(name: str) -> None:
    _, made = explained(name)
    for row in made.rows:
        assert row.rule in RULES or row.rule == f"reference ({row.operation})"
        assert row.strategy in STRATEGIES
        assert row.operation.isidentifier()


@pytest.mark.parametrize("name", ["mlp", "cnn", "text"])
def test_parameters_of_layers_that_are_used_once_add_up(name: str) -> None:
    model, made = explained(name)
    assert sum(row.parameters for row in made.rows) == sum(p.numel() for p in model.parameters())


def test_a_layer_that_is_used_twice_shows_its_parameters_each_time() -> None:
    model, made = explained("branches")
    assert isinstance(model, Branches)
    shown = {(row.layer, row.parameters) for row in made.rows}
    assert shown == {("left", 20), ("right", 20), ("inner.twice", 20), ("(the model itself)", 4)}


def test_frozen_parameters_are_not_counted_and_frozen_layers_not_shown() -> None:
    model = MODELS["mlp"][0]()
    model[0].requires_grad_(False)
    model[2].bias.requires_grad_(False)
    (row,) = explain(model, normals(1, 6, 4).float()).rows
    assert (row.layer, row.parameters) == ("2", 24)


@pytest.mark.parametrize("name", MODELS)
def test_shares_and_sizes_are_possible(name: str) -> None:
    _, made = explained(name)
    for row in made.rows:
        assert 0 <= row.share <= 1
        assert 0 <= row.memory_mb <= made.memory_mb
    assert 1 <= made.microbatch <= 10
    assert 0 < made.memory_mb < 10


def test_the_memory_estimate_grows_with_what_is_allowed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 10))
    features = normals(2, 64, 3, 8, 8).float()
    made = [explain(model, features, compute=sf.Compute(memory_mb=megabytes)) for megabytes in (1e-6, 0.1, 0.25, 100)]
    sizes = [one.microbatch for one in made]
    assert sizes[0] == 1
    assert sizes == sorted(set(sizes))
    assert sizes[-1] == 64
    memory = [one.memory_mb for one in made]
    assert memory == sorted(memory)
    assert memory[0] > 0
    for one, allowed in zip(made[1:], (0.1, 0.25, 100), strict=True):
        assert one.memory_mb <= allowed


def test_an_operation_without_a_rule_is_shown_as_the_reference_path() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.matrix = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(4, 4))

        def forward(self, x: Tensor) -> Tensor:
            return (x * self.scale) @ self.matrix

    made = explain(nn.Sequential(Own(), nn.PReLU()), normals(1, 5, 4).float())
    assert [(row.layer, row.rule) for row in made.rows] == [
        ("0", "reference (mul)"),
        ("0", "linear"),
        ("1", "reference (prelu)"),
    ]


@pytest.mark.parametrize(
    ("make", "layer"),
    [
        (lambda: nn.Sequential(nn.Tanh(), nn.utils.parametrizations.weight_norm(nn.Linear(4, 3, bias=False))), "1"),
        (lambda: Beside(nn.MultiheadAttention(4, 2, batch_first=True)), "look"),
    ],
)
def test_a_layer_whose_weight_is_computed_from_parameters_keeps_its_name(
    make: Callable[[], nn.Module], layer: str
) -> None:
    made = explain(make(), normals(1, 5, 3, 4).float())
    assert {row.layer.split(".parametrizations")[0] for row in made.rows} - {"look.out_proj"} == {layer}


class Beside(nn.Module):
    """Attention from one thing to another, for which torch cuts one parameter in three."""

    def __init__(self, look: nn.Module) -> None:
        super().__init__()
        self.look = look

    def forward(self, x: Tensor) -> Tensor:
        return self.look(torch.tanh(x), x, x)[0]


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


class Decides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y if y.sum() > 0 else -y


class AddsInPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.shift = nn.Linear(4, 4), nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        y += self.shift
        return y


class Overwrites(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x).sigmoid()
        out = self.last(y)
        y.zero_()
        return out


REFUSED: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "batch norm": (
        lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), [r'"1" is BatchNorm1d.*GroupNorm or .*LayerNorm'],
    ),
    "nothing to train": (lambda: frozen(nn.Linear(4, 2)), ["no trainable parameter.*requires_grad=True"]),
    "a decision on values": (Decides, ["Decides .*decision on a tensor's value"]),
    "a parameter added in place": (AddsInPlace, ["trained parameter .* in place.*returns a new tensor"]),
    "an input overwritten": (Overwrites, ["in place.*inplace=False"]),
    "an embedding with max_norm": (
        lambda: nn.Sequential(nn.Flatten(), Cast(), nn.Embedding(3, 2, max_norm=1.0)), ["max_norm=None"],
    ),
    "several": (
        lambda: frozen(
            nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True))
        ),
        ['"1" is BatchNorm1d', '"2" is BatchNorm1d', '"3" is InstanceNorm1d.*track_running_stats=False', "no trainable"],
    ),
}  # fmt: skip


class Cast(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x.abs() > 0.5).long()


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_be_refused_is_told_in_a_sentence_with_the_fix(case: str) -> None:
    make, expected = REFUSED[case]
    made = explain(make(), normals(1, 5, 4).float())
    assert (made.rows, made.microbatch, made.memory_mb) == ((), 0, 0.0)
    assert len(made.refused) == len(expected)
    for sentence, pattern in zip(made.refused, expected, strict=True):
        assert re.search(pattern, sentence)
        assert sentence.endswith(".")
        assert "\n" not in sentence
    assert str(made) == "\n".join(f"refused: {sentence}" for sentence in made.refused)


@pytest.mark.parametrize("case", REFUSED)
def test_training_refuses_what_explain_says_it_would(case: str) -> None:
    model = REFUSED[case][0]()
    records = sf.Records.from_arrays(normals(1, 20, 4), torch.zeros(20))
    plan = sf.Plan.calibrate(sf.Budget(1.0, 1e-3), population=20, batch_size=20, steps=1)
    with pytest.raises(UnsupportedModelError) as refusal:
        sf.train(
            model, records, plan, loss=lambda out, _: out.sum(), optimizer=torch.optim.SGD(model.parameters(), 0.1)
        )
    assert str(refusal.value) == explain(model, records.features).refused[0]


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "attributes": {name: sorted(module.__dict__) for name, module in model.named_modules()},
        "training": [module.training for module in model.modules()],
        "gradients": [parameter.grad is None for parameter in model.parameters()],
        "trained": [parameter.requires_grad for parameter in model.parameters()],
        "versions": [parameter._version for parameter in model.parameters()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
    }


UNTOUCHED: Mapping[str, tuple[Callable[[], nn.Module], Callable[[int], Tensor]]] = {
    **{name: (make, features) for name, (make, features, _) in MODELS.items()},
    "batch norm": (lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)), MODELS["mlp"][1]),
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)), MODELS["mlp"][1]),
    "spectral norm": (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), MODELS["mlp"][1]),
}


@pytest.mark.parametrize("evaluating", [False, True])
@pytest.mark.parametrize("name", UNTOUCHED)
def test_the_model_is_not_changed(name: str, evaluating: bool) -> None:
    make, features = UNTOUCHED[name]
    model = make().train(not evaluating)
    values, state = copy.deepcopy(model.state_dict()), state_of(model)
    parameters = [id(parameter) for parameter in model.parameters()]
    explain(model, features(9))
    assert list(model.state_dict()) == list(values)
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, values[key])]
    assert changed == []
    assert state_of(model) == state
    assert [id(parameter) for parameter in model.parameters()] == parameters


@pytest.mark.parametrize("name", MODELS)
def test_it_prints_a_table_whose_lines_fit(name: str) -> None:
    _, made = explained(name)
    lines = str(made).splitlines()
    assert len(lines) == len(made.rows) + 2
    assert lines[0].split() == ["layer", "operation", "rule", "strategy", "parameters", "MB", "time"]
    assert max(len(line) for line in lines) <= 120
    for column in ("operation", "rule", "strategy"):
        start = lines[0].index(column)
        for line, row in zip(lines[1:], made.rows, strict=False):
            assert line[start:].startswith(getattr(row, column))
            assert line[start - 2 : start] == "  "
    ends = lines[0].index("parameters") + len("parameters")
    for line, row in zip(lines[1:], made.rows, strict=False):
        assert line[:ends].endswith(f" {row.parameters:,}")
        assert line.endswith(f"{row.share:.1%}")
    assert lines[-1].startswith(f"{made.microbatch} records at a time")


def test_numbers_of_the_table_are_told_as_people_write_them() -> None:
    _, made = explained("mlp")
    rows = (replace(made.rows[0], parameters=1_234_567, memory_mb=12.34, share=0.256), made.rows[1])
    text = str(Explanation(rows, (), 32, 1234.5))
    assert "1,234,567" in text
    assert " 12.3 " in text
    assert " 25.6%" in text
    assert text.endswith("32 records at a time take about 1234 MB besides the model.")


def test_the_time_that_is_shown_is_that_of_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only moves while one layer's gradients are measured."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    honest = Product.strategies

    def slow(self: Product) -> Mapping[str, Strategy]:
        def make(way: Strategy) -> Callable[[], Any]:
            def run() -> Any:
                now[0] += 1.0 if self.m == 3 else 0.0
                return way.make()

            return run

        return {name: Strategy(make(way), way.bytes) for name, way in honest(self).items()}

    monkeypatch.setattr(Product, "strategies", slow)
    _, made = explained("mlp", 6)
    assert [row.share for row in made.rows] == [0.0, 1.0]


@pytest.mark.parametrize(
    "batch",
    [
        torch.zeros(0, 4),
        torch.tensor(1.0),
        "records",
        None,
        {"features": torch.zeros(3, 4)},
        (torch.zeros(3, 4),),
        (torch.zeros(3, 4), torch.zeros(2)),
        (torch.zeros(3, 4), torch.zeros(4)),
        (torch.zeros(3, 4), 3),
        (torch.zeros(3, 4), [0, 1, 0]),
        (torch.zeros(3, 4), torch.tensor(1)),
        (torch.zeros(0, 4), torch.zeros(0)),
        (torch.zeros(3, 4), torch.zeros(3), torch.zeros(3)),
    ],
    ids=[
        "empty", "a number", "text", "nothing", "dict", "one of a pair", "fewer targets", "more targets", "number for targets",
        "list of targets", "one target", "empty pair", "three",
    ],
)  # fmt: skip
def test_what_is_no_batch_is_refused(batch: Any) -> None:
    with pytest.raises(InputError, match=r"batch .*\.$"):
        explain(nn.Linear(4, 2), batch)


def test_features_that_do_not_fit_the_model_are_told() -> None:
    made = explain(nn.Linear(4, 2), torch.zeros(3, 5))
    assert made.rows == ()
    assert len(made.refused) == 1
    assert "shape" in made.refused[0]


@pytest.mark.parametrize("as_list", [False, True])
def test_a_pair_with_the_loss_of_the_training(as_list: bool) -> None:
    model, batch = MODELS["mlp"][0](), (MODELS["mlp"][1](6), torch.arange(6) % 3)
    made = explain(model, list(batch) if as_list else batch, loss=F.cross_entropy)  # type: ignore[arg-type]
    assert [row.layer for row in made.rows] == ["0", "2"]


def test_the_loss_that_is_given_is_used() -> None:
    """With a loss that looks at one output alone, the layer that makes the other has no row."""
    model = Pair(lambda one, other: (one, other))
    everything = explain(model, normals(1, 4, 4).float())
    assert {row.layer for row in everything.rows} == {"one", "other"}
    part = explain(model, (normals(1, 4, 4).float(), torch.zeros(4)), loss=lambda out, _: out[0].sum())
    assert [row.layer for row in part.rows] == ["one"]


def test_a_loss_that_raises_is_told_without_the_values_of_the_records() -> None:
    def loss(out: Tensor, target: Tensor) -> Tensor:
        raise ValueError("the diagnosis is 31337")

    made = explain(nn.Linear(4, 2), (torch.zeros(3, 4), torch.full((3,), 31337)), loss=loss)
    assert len(made.refused) == 1
    assert "31337" not in str(made)


@dataclass
class Scores:
    scores: Tensor
    other: Tensor


@dataclass
class Logits:
    logits: Tensor
    loss: Tensor | None = None


class Pair(nn.Module):
    """Two layers side by side, returned as something."""

    def __init__(self, wrap: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.one, self.other, self.wrap = nn.Linear(4, 2), nn.Linear(4, 3), wrap

    def forward(self, x: Tensor) -> Any:
        return self.wrap(self.one(x), self.other(x))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda one, other: (one, other),
        lambda one, other: [one, other],
        lambda one, other: {"scores": one, "more": {"other": other}},
        lambda one, other: (one, None, 3, (other,)),
        lambda one, other: (one, other.to(torch.bfloat16), (one > 0).sum()),
        Scores,
    ],
    ids=["tuple", "list", "dict", "nested", "dtypes", "dataclass"],
)
def test_without_a_loss_any_kind_of_outputs_will_do(wrap: Callable[[Tensor, Tensor], Any]) -> None:
    made = explain(Pair(wrap), normals(1, 5, 4).float())
    assert made.refused == ()
    assert {row.layer for row in made.rows} == {"one", "other"}


def test_outputs_with_logits_will_do() -> None:
    made = explain(Pair(lambda one, other: Logits(one)), normals(1, 5, 4).float())
    assert [row.layer for row in made.rows] == ["one"]


def test_outputs_without_any_tensor_ask_for_the_loss() -> None:
    made = explain(Pair(lambda one, other: "nothing"), normals(1, 5, 4).float())
    assert made.rows == ()
    assert "loss" in str(made)


@pytest.mark.parametrize("count", [1, 7, 8, 9, 300])
def test_batches_of_any_size(count: int) -> None:
    _, made = explained("mlp", count)
    assert len(made.rows) == 2
    assert made.microbatch == count


def test_autocast_and_half_precision_are_explained_too() -> None:
    features = normals(1, 6, 4).float()
    assert len(explain(MODELS["mlp"][0](), features, compute=sf.Compute(autocast=True)).rows) == 2
    assert len(explain(MODELS["mlp"][0]().bfloat16(), features.bfloat16()).rows) == 2
    assert len(explain(MODELS["mlp"][0]().double(), features.double()).rows) == 2


def test_what_is_held_is_what_the_strategy_holds() -> None:
    """16 records of 3 positions, whose gradients (2, 4) are held in single precision, and no bias."""
    (row,) = explain(nn.Linear(4, 2, bias=False), normals(1, 16, 3, 4).float()).rows
    assert row.strategy == "per record"
    assert math.isclose(row.memory_mb, 16 * 2 * 4 * 4 / 1e6)
