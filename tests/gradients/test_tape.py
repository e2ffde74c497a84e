"""Parameters wherever a model puts them, what cannot be followed, and that nothing is left behind."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gradient_checks import DOUBLE, Case, check_agreement, normals, squares, tokens, with_values
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from sfumato.errors import UnsupportedModelError
from sfumato.gradients.clipping import KINDS, Clipping
from sfumato.gradients.compute import Compute
from sfumato.gradients.private import PrivateGradient

WIDTH, STEPS = 4, 3


class Own(nn.Module):
    """A model with parameters of its own and one layer; `run` says what it does with them."""

    def __init__(self, run: Callable[[Own, Tensor], Any], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.ones(shape)))
        self.run = run

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


class Product(torch.autograd.Function):
    """A function of the user's own that torch can vectorise."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x * w

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return gradient * w, (gradient * x).sum((0, 1))


def first_row(m: Any, x: Tensor) -> Tensor:
    rows = torch.zeros(STEPS, WIDTH, dtype=x.dtype)
    rows[0] = m.p
    return x + rows


def twice_in_place(m: Any, x: Tensor) -> Tensor:
    return m.layer(F.relu(m.layer(x) + m.p, inplace=True)).mul_(2.0).add_(x)


# Every way to use a parameter p of shape (WIDTH,), beside a linear layer.
USES: dict[str, Callable[[Any, Tensor], Any]] = {
    "added": lambda m, x: m.layer(x + m.p),
    "multiplied": lambda m, x: m.layer(x) * m.p,
    "divided by": lambda m, x: x / (m.p.square() + 1),
    "from the right": lambda m, x: (1 - m.p) * m.layer(x),
    "a matrix product": lambda m, x: m.layer(x) @ m.p,
    "a matrix made from it": lambda m, x: x @ torch.outer(m.p, m.p) @ m.layer.weight,
    "a product from the left": lambda m, x: torch.diag(m.p) @ x.transpose(1, 2),
    "einsum": lambda m, x: torch.einsum("btd,d,ed->bte", x, m.p, m.layer.weight),
    "a scalar": lambda m, x: x * m.p.mean() + m.p[0],
    "expanded and concatenated": lambda m, x: m.layer(torch.cat([m.p.expand(len(x), 1, -1), x], 1)),
    "stacked": lambda m, x: torch.stack([x, m.p.expand_as(x)]).prod(0),
    "chosen": lambda m, x: torch.where(x > 0, x, m.p),
    "a start for a sum": lambda m, x: torch.addcmul(m.p, x, m.layer(x)),
    "a keyword": lambda m, x: torch.add(input=x, other=m.p, alpha=2),
    "a bias of torch's function": lambda m, x: F.linear(x, m.layer.weight, m.p * 2),
    "a transposed weight": lambda m, x: F.linear(m.layer(x) + m.p, m.layer.weight.t()),
    "a scale of a norm": lambda m, x: F.layer_norm(x, (WIDTH,), m.p, m.p.flip(0)),
    "a part of it": lambda m, x: x[..., :2] * m.p[:2] + x[..., 2:] * m.p[2:],
    "only its shape and type": lambda m, x: (
        m.layer(x.to(m.p)).view_as(x) + torch.zeros_like(m.p).to(x) + x.new_ones(m.p.shape)
    ),
    "compared": lambda m, x: m.layer(x) * (x > m.p),
    "a row of a buffer": first_row,
    "in place afterwards": twice_in_place,
    "under no_grad too": lambda m, x: m.layer(x) + _without_gradient(m, x),
    "detached too": lambda m, x: m.layer(x) * m.p.detach() + m.p,
    "several outputs": lambda m, x: (m.layer(x), x * m.p),
    "two outputs of one operation": lambda m, x: torch.max(x * m.p, 1).values + (x + m.p).split(1, 1)[0].squeeze(1),
    "a function of one's own": lambda m, x: Product.apply(m.layer(x), m.p),
    "not at all": lambda m, x: m.layer(x),
    "only it": lambda m, x: x * m.p,
}


def _without_gradient(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        return m.layer(x) * m.p


def features(seed: int, count: int) -> Tensor:
    return normals(seed, count, STEPS, WIDTH)


@pytest.mark.parametrize("use", USES)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.sampled_from([0, 1, 3, 10]), kind=st.sampled_from(KINDS))
def test_a_parameter_is_followed_wherever_it_is_used(use: str, seed: int, count: int, kind: str) -> None:
    case = Case(with_values(Own(USES[use], p=(WIDTH,)), seed), features(seed + 1, count), normals(seed + 2, count))
    clipping = Clipping(0.3, kind)
    expected = case.loop(clipping)
    check_agreement(case.reference(clipping), expected, 1e-10)
    check_agreement(case.fast(clipping), expected, 1e-10)


class Transformer(nn.Module):
    """Positions added, a class token in front, tied input and output tables."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(5, WIDTH), nn.Embedding(9, WIDTH)
        self.token = nn.Parameter(torch.ones(1, 1, WIDTH))
        self.body = nn.TransformerEncoderLayer(WIDTH, 2, 6, 0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, 5, bias=False)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        read = self.table(x) + self.places(torch.arange(x.shape[1]))
        return self.head(self.body(torch.cat([self.token.expand(len(x), -1, -1), read], 1)))


class Adapted(nn.Module):
    """A frozen layer with a trained low-rank adapter (LoRA)."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.each = torch.func.vmap(self.base)  # frozen, so a vmap of the model's own may use it
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.base(x) + self.up(self.down(x))) + self.base(x) - self.each(x).cos()


def shared() -> nn.Module:
    one, other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
    other.weight = one.weight
    return nn.Sequential(one, nn.Tanh(), other, nn.ReLU(inplace=True), one)


def repeated() -> nn.Module:
    conv, norm = nn.Conv1d(STEPS, STEPS, 3, padding=1), nn.GroupNorm(1, STEPS)
    return nn.Sequential(conv, norm, nn.ReLU(inplace=True), conv, norm, conv)


def weight_normed() -> nn.Module:
    return nn.Sequential(
        parametrizations.weight_norm(nn.Linear(WIDTH, WIDTH)),
        nn.Tanh(),
        parametrizations.weight_norm(nn.Conv1d(STEPS, 2, 3), dim=None),
    )


MODELS: dict[str, Callable[[], nn.Module]] = {
    "tied transformer": Transformer,
    "adapters": Adapted,
    "shared layers": shared,
    "repeated layers": repeated,
    "weight norm": weight_normed,
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(WIDTH, WIDTH), use_trivialization=False),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(WIDTH, WIDTH)).eval(),
    "image net": lambda: nn.Sequential(
        nn.Unflatten(1, (1, STEPS)), nn.Conv2d(1, 4, 2), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.MaxPool2d((2, 1)),
        nn.Flatten(), nn.Linear(12, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.sampled_from([0, 1, 4, 11]), kind=st.sampled_from(KINDS))
def test_a_whole_model_agrees_with_the_oracle(name: str, seed: int, count: int, kind: str) -> None:
    torch.manual_seed(seed)
    model = MODELS[name]().double() if name in ("orthogonal", "spectral norm") else with_values(MODELS[name](), seed)
    inputs = tokens(seed, 5, count, STEPS) if name == "tied transformer" else features(seed + 1, count)
    case = Case(model, inputs, normals(seed + 2, count))
    clipping = Clipping(0.3, kind)
    expected = case.loop(clipping)
    check_agreement(case.fast(clipping), expected, 1e-10)
    check_agreement(case.reference(clipping), expected, 1e-10)


def test_the_reference_path_leaves_a_layer_that_stands_in_two_places_as_it_was() -> None:
    model = with_values(repeated(), 0)
    parameters = [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)]
    case = Case(model, features(1, 3), normals(2, 3))
    before = case.fast(Clipping(0.3))
    case.reference(Clipping(0.3))
    assert [(name, id(p)) for name, p in model.named_parameters(remove_duplicate=False)] == parameters
    check_agreement(case.fast(Clipping(0.3)), before, 1e-12)


def test_a_recurrent_layer_called_twice_agrees_with_a_loop() -> None:
    gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
    model = Own(lambda m, x: m.gru(m.gru(x)[0])[0])
    model.gru = gru
    case = Case(with_values(model, 0), features(1, 4), normals(2, 4))
    check_agreement(case.fast(Clipping(0.3)), case.loop(Clipping(0.3)), 1e-10)


def test_a_penalty_on_the_weights_in_the_loss_counts_for_every_record() -> None:
    model = with_values(nn.Linear(WIDTH, 2), 0)

    def loss(out: Tensor, target: Tensor) -> Tensor:
        return out.square().mean() + model.weight.square().sum()

    case = Case(model, features(1, 4), normals(2, 4), loss)
    check_agreement(case.fast(Clipping(0.3)), case.loop(Clipping(0.3)), 1e-10)


@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: x * 2,
        lambda m, x: m.layer(x).detach(),
        lambda m, x: m.layer(x).argmax(1).to(DOUBLE),
        lambda m, x: m.layer(x).detach() * nn.Parameter(torch.ones(1, dtype=DOUBLE)),  # somebody else's
        lambda m, x: torch.no_grad()(m.layer)(x),
    ],
)
def test_a_loss_that_depends_on_no_parameter_is_refused_by_name(run: Callable[..., Tensor], count: int) -> None:
    case = Case(with_values(Own(run), 0), features(1, count), normals(2, count))
    with pytest.raises(
        UnsupportedModelError, match=r"The loss \(squares\) does not depend on any trained parameter of Own"
    ):
        case.fast(Clipping(1.0))


@pytest.mark.parametrize("count", [0, 1, 20])
def test_one_parameter_that_is_not_used_adds_zero(count: int) -> None:
    case = Case(with_values(Own(lambda m, x: x @ m.layer.weight.T), 0), features(1, count), normals(2, count))
    result = case.fast(Clipping(1.0))
    assert list(result.bounded.value) == ["layer.weight", "layer.bias"]
    assert not bool(result.bounded.value["layer.bias"].any())
    assert bool(result.bounded.value["layer.weight"].any()) == (count > 0)


def test_an_empty_batch_adds_zero_whatever_the_loss() -> None:
    case = Case(with_values(Own(lambda m, x: x * 2), 0), features(1, 0), normals(2, 0))
    assert not any(bool(tensor.any()) for tensor in case.fast(Clipping(1.0)).bounded.value.values())


def test_a_parameter_of_the_loss_is_a_constant() -> None:
    scale = nn.Parameter(torch.tensor([3.0], dtype=DOUBLE))
    given = [with_values(nn.Linear(WIDTH, 2), 0), features(1, 5), normals(2, 5)]
    trained = Case(*given, lambda out, target: squares(out * scale, target))
    constant = Case(*given, lambda out, target: squares(out * 3.0, target))
    check_agreement(trained.fast(Clipping(0.3)), constant.fast(Clipping(0.3)), 1e-12)


@pytest.mark.parametrize("result", [1.5, None, (torch.zeros(1),)])
def test_a_loss_that_returns_no_tensor_is_refused(result: Any) -> None:
    case = Case(with_values(nn.Linear(WIDTH, 2), 0), features(1, 3), normals(2, 3), lambda *_: result)
    kind = type(result).__name__
    with pytest.raises(UnsupportedModelError, match=rf"The loss \(<lambda>\) returned {kind}; it must return a tensor"):
        case.fast(Clipping(1.0))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.enable_grad])
def test_it_does_not_matter_whether_gradients_are_switched_on_outside(mode: Callable[[], Any]) -> None:
    case = Case(with_values(nn.Linear(WIDTH, 2), 0), features(1, 3), normals(2, 3))
    expected = case.loop(Clipping(0.3))
    with mode():
        result = case.fast(Clipping(0.3))
    check_agreement(result, expected, 1e-10)


def test_each_record_draws_its_own_dropout_mask() -> None:
    model = Own(lambda m, x: F.dropout(x * m.p, 0.5))
    model.p = nn.Parameter(torch.ones(64, dtype=DOUBLE))
    inputs = torch.ones(40, 64, dtype=DOUBLE)
    result = PrivateGradient(model, lambda out, _: out.sum(), Clipping(1e6)).sum(inputs, torch.zeros(40))
    hits = result.bounded.value["p"] / 2
    assert bool(((hits > 0) & (hits < 40)).all())


# What cannot be followed is refused: the operation or module, and the fix.


def adds_in_place(m: Any, x: Tensor) -> Tensor:
    x = x * 1
    x += m.p
    return x


def writes_a_part(m: Any, x: Tensor) -> Tensor:
    x = x * 1
    x[:, 0] = m.p
    return x


def changes_what_a_layer_read(m: Any, x: Tensor) -> Tensor:
    x = x * 1
    out = m.layer(x)
    x.mul_(2)
    return out + x


def changes_what_an_operation_read(m: Any, x: Tensor) -> Tensor:
    x = x * 1
    out = x + m.p
    x.mul_(2)
    return out + x


def changes_what_torch_needs(m: Any, x: Tensor) -> Tensor:
    out = torch.exp(m.layer(x))
    kept = out * 1
    out.add_(1)
    return out + kept


def changes_the_start_of_a_recurrence(m: Any, x: Tensor) -> Tensor:
    start = (x[:, 0] * 2).unsqueeze(0)
    out, _ = m.gru(x, start)
    start.zero_()
    return out


def with_gru(run: Callable[[Any, Tensor], Any]) -> Own:
    model = Own(run)
    model.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
    return model


def with_p(run: Callable[[Any, Tensor], Any]) -> Own:
    return Own(run, p=(WIDTH,))


REFUSED: dict[str, tuple[Any, str, str]] = {
    "x += p": (with_p(adds_in_place), "add", "returns a new tensor"),
    "x[:, 0] = p": (with_p(writes_a_part), "__setitem__", "returns a new tensor"),
    "x.mul_(p)": (with_p(lambda m, x: (x * 1).mul_(m.p)), "mul_", "returns a new tensor"),
    "x.masked_fill_(p)": (with_p(lambda m, x: (x * 1).masked_fill_(x > 0, m.p[0])), "masked_fill_", "returns a new tensor"),
    "an input changed": (with_p(changes_what_a_layer_read), "changed in place", "inplace=False"),
    "an operand changed": (with_p(changes_what_an_operation_read), "changed in place", "inplace=False"),
    "an activation changed": (with_p(changes_what_torch_needs), "in place|in-place|inplace", "new tensor|inplace=False"),
    "a start changed": (with_gru(changes_the_start_of_a_recurrence), "in place|in-place|inplace", "new tensor|inplace=False"),
    "dropout of a parameter": (with_p(lambda m, x: x * F.dropout(m.p)), '"p"', "input or output"),
    "noise with a parameter": (with_p(lambda m, x: F.rrelu(x * m.p, training=True)), "Own", ""),
    "a decision on a value": (with_p(lambda m, x: x * m.p if (x * m.p).sum() > 0 else x), "Own", "decision on a tensor"),
    "item()": (with_p(lambda m, x: x * m.p + (x * m.p).sum().item()), "Own", "decision on a tensor"),
    "vmap of its own": (with_p(lambda m, x: torch.func.vmap(m.layer)(x)), "linear", "outside of that, or freeze"),
    "grad of its own": (
        with_p(lambda m, x: torch.func.grad(lambda y: (y * m.p).square().sum())(x)), "torch.func", "outside of that, or freeze",
    ),
    "a start that is trained": (
        with_gru(lambda m, x: m.gru(x, m.layer.bias.expand(1, len(x), -1))[0]), "start state", "use zeros",
    ),
    "BatchNorm": (nn.Sequential(nn.Conv1d(STEPS, 2, 1), nn.BatchNorm1d(2)), '"1" is BatchNorm1d', "GroupNorm"),
    "running averages": (
        nn.Sequential(nn.Conv1d(STEPS, 2, 1), nn.InstanceNorm1d(2, track_running_stats=True)),
        '"1" is InstanceNorm1d', "track_running_stats=False",
    ),
}  # fmt: skip


def refused(model: nn.Module, inputs: Tensor) -> str:
    case = Case(with_values(model, 0), inputs, normals(2, len(inputs)))
    with pytest.raises(UnsupportedModelError) as caught:
        case.fast(Clipping(1.0))
    assert torch.overrides._get_current_function_mode_stack() == []
    return str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_followed_is_refused_with_the_fix(name: str) -> None:
    model, what, fix = REFUSED[name]
    message = refused(model, features(1, 3))
    for wanted in (what, fix):
        assert any(part in message for part in wanted.split("|")), message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("layer", "what"),
    [
        (nn.Embedding(5, WIDTH, max_norm=1.0), "max_norm=None"),
        (nn.Embedding(5, WIDTH, scale_grad_by_freq=True), "scale_grad_by_freq=False"),
        (nn.EmbeddingBag(5, WIDTH, max_norm=1.0), "max_norm=None"),
        (nn.EmbeddingBag(5, WIDTH, scale_grad_by_freq=True), "scale_grad_by_freq=False"),
    ],
)
def test_tables_that_depend_on_who_reads_them_are_refused(layer: nn.Module, what: str) -> None:
    assert what in refused(layer, tokens(1, 5, 3, 4))


def test_bags_with_offsets_are_refused() -> None:
    bag = nn.EmbeddingBag(5, WIDTH)

    class Offsets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = bag

        def forward(self, x: Tensor) -> Tensor:
            return self.bag(x.flatten(), torch.tensor([0, 2]))

    message = refused(Offsets(), tokens(1, 5, 3, 4))
    assert "offsets" in message
    assert "padding_idx" in message


def test_packed_sequences_are_refused() -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        sizes = torch.full((STEPS,), len(x))
        return m.gru(nn.utils.rnn.PackedSequence(x.transpose(0, 1).flatten(0, 1), sizes))[0].data

    assert "padded tensor" in refused(with_gru(run), features(1, 3))


# Nothing is left behind, also where something went wrong half-way.


def snapshot(model: nn.Module) -> dict[str, Any]:
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return {
        "state": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modules": [(id(m), type(m), sorted(vars(m))) for m in model.modules()],
        "hooks": [len(getattr(m, name)) for m in model.modules() for name in hooks],
        "parameters": [
            (id(p), type(p), sorted(vars(p)), p.requires_grad, p.is_leaf, p.grad, p._version, p._backward_hooks)
            for p in model.parameters()
        ],
        "training": [m.training for m in model.modules()],
        "grad": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "modes": list(torch.overrides._get_current_function_mode_stack()),
        "level": torch._C._functorch.peek_interpreter_stack(),
    }


def check_untouched(model: nn.Module, before: dict[str, Any]) -> None:
    after = snapshot(model)
    state, was = after.pop("state"), dict(before)
    old = was.pop("state")
    assert list(state) == list(old)
    assert all(torch.equal(state[name], old[name]) for name in old)
    assert after == was
    again = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    torch.save(model.state_dict(), io.BytesIO())
    buffer.seek(0)
    again.append(torch.load(buffer, weights_only=False))
    for other in again:
        assert list(other.state_dict()) == list(old)
        assert all(p.is_leaf for p in other.parameters())


class Breaks(nn.Module):
    """Raises in the forward when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.broken = False

    def forward(self, x: Tensor) -> Tensor:
        if self.broken:
            raise ValueError("no")
        return x


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv, self.norm = nn.Embedding(5, WIDTH), nn.Conv1d(STEPS, STEPS, 1), nn.GroupNorm(1, STEPS)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.gru = nn.GRU(WIDTH, WIDTH, batch_first=True)
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.normed = nn.RMSNorm(WIDTH)
        self.spare, self.breaks = nn.Linear(1, 1), Breaks()
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.1)
        self.conv.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.relu(self.norm(self.conv(self.table(x))))
        y = self.attention(y, y, y)[0]
        return self.drop(self.breaks(self.normed(self.gru(y * self.scale)[0])))


def whole_case(count: int = 12) -> Case:
    return Case(with_values(Whole(), 0), tokens(1, 5, count, STEPS), normals(2, count))


@pytest.mark.parametrize("compute", [Compute(), Compute(memory_mb=1e-6)])
def test_the_model_is_left_as_it_was(compute: Compute) -> None:
    case = whole_case()
    before = snapshot(case.model)
    gradient = PrivateGradient(case.model, case.loss, Clipping(1.0), compute=compute)
    for _ in range(2):
        gradient.sum(case.features, case.targets)
        check_untouched(case.model, before)


def test_gradients_that_were_there_stay_as_they_are() -> None:
    case = whole_case()
    marks = [torch.full_like(p, 7.0) for p in case.model.parameters()]
    for parameter, mark in zip(case.model.parameters(), marks, strict=True):
        parameter.grad = mark
    case.fast(Clipping(1.0))
    assert all(
        p.grad is mark and bool((mark == 7).all()) for p, mark in zip(case.model.parameters(), marks, strict=True)
    )


def test_the_model_is_left_as_it_was_after_a_loss_that_raises() -> None:
    case = whole_case()
    before = snapshot(case.model)
    calls: list[int] = []

    def loss(out: Tensor, target: Tensor) -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise ValueError("secret")
        return out.square().sum()

    with pytest.raises(UnsupportedModelError, match="Whole with this loss cannot be run") as caught:
        PrivateGradient(case.model, loss, Clipping(1.0)).sum(case.features, case.targets)
    assert len(calls) == 2
    assert "secret" not in str(caught.value)
    check_untouched(case.model, before)


def test_the_model_is_left_as_it_was_after_a_forward_that_raises_the_second_time() -> None:
    case = whole_case()
    gradient = PrivateGradient(case.model, case.loss, Clipping(1.0))
    first = gradient.sum(case.features, case.targets)
    case.model.breaks.broken = True
    before = snapshot(case.model)
    with pytest.raises(UnsupportedModelError, match="Whole with this loss cannot be run"):
        gradient.sum(case.features, case.targets)
    check_untouched(case.model, before)
    case.model.breaks.broken = False
    again = gradient.sum(case.features, case.targets)
    assert [t.shape for t in again.bounded.value.values()] == [t.shape for t in first.bounded.value.values()]


@pytest.mark.parametrize("name", ["an input changed", "dropout of a parameter", "x += p", "vmap of its own"])
def test_the_model_is_left_as_it_was_after_a_refusal(name: str) -> None:
    model = copy.copy(with_values(REFUSED[name][0], 0))
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError):
        Case(model, features(1, 3), normals(2, 3)).fast(Clipping(1.0))
    model.run = None  # a lambda cannot be pickled
    check_untouched(model, before)
