"""Rules that a user wrote: what torch never announces, and what does not do what a rule must, is refused in a sentence."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from gradient_checks import Case, check_agreement, normals, squares, with_values
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.errors import InputError, UnsupportedModelError
from sfumato.gradients.clipping import Clipping
from sfumato.gradients.explain import explain
from sfumato.gradients.private import PrivateGradient
from sfumato.gradients.rules import RULES, TOGETHER
from sfumato.gradients.rules.registry import rule, together
from sfumato.gradients.tape import Kept
from sfumato.gradients.terms.held import Given

SECRET = "4711"


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    """Forget the rules that a test registers."""
    before, others = dict(RULES), dict(TOGETHER)
    yield
    for table, kept in ((RULES, before), (TOGETHER, others)):
        table.clear()
        table.update(kept)


class Bent(nn.Module):
    """A layer without a rule of sfumato's, between two that have one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.bend, self.last = nn.Linear(4, 3), nn.PReLU(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.bend(self.first(x)))


def case() -> Case:
    return Case(with_values(Bent(), 0), normals(1, 6, 4), normals(2, 6))


def follow(
    change: Callable[..., Iterator[Any]] | None = None, *, noted: bool = True, view: bool = False, breaks: Any = None
) -> None:
    """Register a rule for `prelu`, right unless told otherwise."""

    @rule(F.prelu)
    def my_prelu(tape: Any, input: Tensor, weight: Tensor) -> Any:
        x, slope = tape.open(input), tape.weight(weight)
        if breaks is not None:
            raise breaks
        kept, out = Kept(x), F.prelu(x, slope.value)

        def terms(gradients: Any) -> Iterator[Any]:
            gradient = (gradients[0] * kept.get().clamp(max=0)).flatten(1).sum(1, keepdim=True)
            yield from change(slope, gradient) if change else (Given(slope.name, gradient),)

        if noted:
            tape.note("prelu", (slope,), (x,), (out.view(out.shape) if view else out,), terms)
        return tape.close(out)


def refused(example: Case | None = None) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        (example or case()).fast(Clipping(0.5))
    assert torch.overrides._get_current_function_mode_stack() == []
    assert SECRET not in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_rule_of_ones_own_gives_what_the_reference_path_gives() -> None:
    without = case().fast(Clipping(0.5))
    follow()
    check_agreement(case().fast(Clipping(0.5)), without, 1e-12)
    check_agreement(case().fast(Clipping(0.5)), case().loop(Clipping(0.5)), 1e-12)
    assert "prelu" in [row.rule for row in explain(case().model, (case().features, case().targets), loss=squares).rows]


def test_a_rule_that_notes_nothing_is_refused_with_function_parameter_and_fix() -> None:
    follow(noted=False)
    message = refused()
    for wanted in ("The rule for prelu", '"bend.weight"', "tape.note"):
        assert wanted in message


@pytest.mark.parametrize("computed", [False, True])
def test_a_rule_that_notes_one_of_two_parameters_is_refused(computed: bool) -> None:
    @rule(F.linear)
    def without_bias(tape: Any, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
        x, w, b = tape.open(input), tape.weight(weight), tape.weight(bias)
        kept, out = Kept(x), F.linear(x, w.value, b.value.detach()).clone()

        def terms(gradients: Any) -> Iterator[Any]:
            yield Given(w.name, torch.einsum("rpo,rpi->roi", gradients[0], kept.get()))

        tape.note("mine", (w,), (x,), (out,), terms)
        return tape.close(out)

    class Shifted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight, self.bias * 2 if computed else self.bias)

    message = refused(Case(with_values(Shifted(4, 2), 0), normals(1, 6, 4), normals(2, 6)))
    assert 'The rule for linear was given the parameter "bias" and noted nothing for it' in message


TERMS: dict[str, tuple[Callable[..., Any], str]] = {
    "none": (lambda slope, gradient: (), 'noted "bend.weight" and gave no term for it'),
    "unknown": (lambda slope, gradient: (Given("slope", gradient),), '"slope", which is no trained parameter'),
    "summed": (lambda slope, gradient: (Given(slope.name, gradient.sum(0)),), "wrong shape"),
    "a scalar": (lambda slope, gradient: (Given(slope.name, gradient[:, 0]),), r"shape (records, 1)"),
    "too wide": (lambda slope, gradient: (Given(slope.name, gradient.expand(-1, 2)),), r"shape (records, 1)"),
    "fewer records": (lambda slope, gradient: (Given(slope.name, gradient[1:]),), "wrong shape"),
    "no terms": (lambda slope, gradient: (gradient,), "The rule for prelu gave Tensor in place of a term"),
    "an error": (lambda slope, gradient: int(f"records {SECRET}"), "prelu failed with ValueError; it is your my_prelu"),
}  # fmt: skip


@pytest.mark.parametrize("name", TERMS)
def test_terms_that_are_not_what_was_promised_are_refused(name: str) -> None:
    change, wanted = TERMS[name]
    follow(change)
    message = refused()
    assert wanted in message
    assert "prelu" in message


def test_an_output_that_is_a_view_is_refused() -> None:
    follow(view=True)
    assert "The rule for prelu noted an output that is a view" in refused()


@pytest.mark.parametrize("error", [TypeError(SECRET), ValueError(f"inplace {SECRET}"), RuntimeError(f"vmap: {SECRET}")])
def test_an_error_in_a_rule_names_the_function_and_the_kind_of_error_and_quotes_nothing(error: Exception) -> None:
    follow(breaks=error)
    message = refused()
    assert message.startswith(f"The rule for prelu failed with {type(error).__name__}; it is your my_prelu")
    assert "NotImplemented" in message


def test_the_own_error_of_a_rule_is_found_in_the_context() -> None:
    """People may look at it; it is not shown."""
    follow(breaks=TypeError(SECRET))
    with pytest.raises(UnsupportedModelError) as caught:
        case().fast(Clipping(0.5))
    assert isinstance(caught.value.__context__, TypeError)
    assert caught.value.__suppress_context__


def test_an_error_of_sfumatos_in_a_rule_stays_as_it_is() -> None:
    follow(breaks=UnsupportedModelError("use zeros."))
    assert refused() == "use zeros."


def test_an_input_that_does_not_fit_a_layer_names_the_layers_function() -> None:
    message = refused(Case(with_values(Bent(), 0), normals(1, 6, 5), normals(2, 6)))
    assert message.startswith("The rule for linear failed with RuntimeError in Bent")
    assert "wrong shape" in message
    assert "your" not in message


def test_a_target_that_does_not_fit_the_loss_names_the_losss_function() -> None:
    message = refused(Case(with_values(Bent(), 0), normals(1, 6, 4), torch.full((6,), 2), F.cross_entropy))
    assert message.startswith("The rule for cross_entropy failed with IndexError in Bent")


def test_any_other_error_is_told_by_its_kind_alone() -> None:
    def loss(out: Tensor, target: Tensor) -> Tensor:
        raise LookupError(SECRET)

    message = refused(Case(with_values(Bent(), 0), normals(1, 6, 4), normals(2, 6), loss))
    assert "Bent with this loss cannot be run one record at a time. It raised LookupError." in message


DECIDES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "item": (lambda y: y * y.sum().item(), ".item(), float(), int()"),
    "float": (lambda y: y * float(y.sum()), ".item(), float(), int()"),
    "range": (lambda y: y * len(range(int(y.sum()))), ".item(), float(), int()"),
    "if": (lambda y: y if y.sum() > 0 else -y, "(if, while, and, or)"),
    "and": (lambda y: (y.sum() > 0 and y) * y, "(if, while, and, or)"),
}


@pytest.mark.parametrize("name", DECIDES)
@pytest.mark.parametrize("where", ["model", "loss"])
def test_a_number_taken_out_of_a_tensor_and_a_decision_have_sentences_of_their_own(name: str, where: str) -> None:
    decide, wanted = DECIDES[name]
    model, loss = nn.Linear(4, 2), squares
    if where == "model":
        model = nn.Sequential(model, type("Decides", (nn.Module,), {"forward": lambda self, y: decide(y)})())
    else:
        loss = lambda out, target: squares(decide(out), target)  # noqa: E731
    message = refused(Case(with_values(model, 0), normals(1, 6, 4), normals(2, 6), loss))
    assert wanted in message
    assert "torch.where" in message
    assert "raised" not in message


@pytest.mark.parametrize("make", [lambda: nn.Linear(4, 2), lambda: nn.PReLU(3)])
def test_views_that_do_not_fit_the_model_name_augment(make: Callable[[], nn.Module]) -> None:
    gradient = PrivateGradient(with_values(make(), 0), squares, Clipping(1.0), views=True)
    with pytest.raises(UnsupportedModelError, match="on the views that augment returned"):
        gradient.sum(normals(1, 6, 2, 5), normals(2, 6))


def mine(x: Tensor, weight: Tensor) -> Tensor:
    return x * weight


NO_FUNCTION = {
    "nothing": ((), "needs the torch functions"),
    "a name": (("prelu",), "'prelu' is none"),
    "a layer's class": ((nn.PReLU,), "PReLU is none"),
    "a layer": ((nn.PReLU(),), "PReLU is none"),
    "a class of tensors": ((Tensor,), "Tensor is none"),
    "a function of one's own": ((mine,), "mine is none"),
    "one of torch's, with arguments": ((functools.partial(F.prelu),), "none"),
    "Python's": ((len,), "len is none"),
    "a method of Python's": ((str.upper,), "upper is none"),
    "a number": ((3,), "int is none"),
    "None": ((None,), "NoneType is none"),
    "one of two": ((F.prelu, "linear"), "'linear' is none"),
}


@pytest.mark.parametrize("name", NO_FUNCTION)
@pytest.mark.parametrize("register", [rule, together])
def test_what_is_no_torch_function_gets_no_rule(name: str, register: Callable[..., Any]) -> None:
    functions, wanted = NO_FUNCTION[name]
    before = dict(RULES), dict(TOGETHER)
    with pytest.raises(InputError) as caught:
        register(*functions)(lambda tape, *args: NotImplemented)
    assert wanted in str(caught.value)
    assert "@rule(torch.nn.functional.prelu)" in str(caught.value)
    assert before == (RULES, TOGETHER)


def test_a_rule_without_its_parentheses_is_refused() -> None:
    with pytest.raises(InputError, match="mine is none"):
        rule(mine)


def protocol(x: Tensor) -> Any:
    """Take part in torch's protocol, as functions outside of torch may."""
    return torch.overrides.handle_torch_function(protocol, (x,), x)


def test_every_function_that_torch_announces_may_have_a_rule() -> None:
    announced = [f for group in torch.overrides.get_overridable_functions().values() for f in group]
    functions = [f for f in announced if not isinstance(f, type)]
    assert len(functions) > 1000
    rule(*functions, Tensor.__matmul__, torch.ops.aten.mm, torch.ops.aten.mm.default, torch.lstm_cell, protocol)(
        lambda tape, *args: NotImplemented
    )
    assert set(functions) <= set(RULES)
    assert protocol in RULES
