"""The registry of rules, and what a rule promises.

A rule stands for a torch function (`torch.nn.functional.linear`, not `nn.Linear`), so it serves every module that calls the
function, with whatever parameters: tied, used twice, owned by a custom module. It is called in place of the function, with the
tape first and then the function's own arguments, and must

1. return `NotImplemented` if it does not cover these arguments (the reference path for single operations then takes over);
2. open what differs by record (`tape.open`: records first), and compute the function for all records at once with the values of
   `tape.weight(...)` in place of the parameters, to the same result;
3. hand each kernel's inputs and its fresh output, no view of it, to `tape.note` with a function from output gradients to terms,
   one or more for each parameter whose name is not empty, with gradients of shape (records, *shape of the parameter). Tensors
   needed there are wrapped in `Kept`;
4. return what the function returns, closed (`tape.close`).

A rule that notes nothing for a trained parameter, or gives no term for what it noted, is refused when it runs. The terms must
add up to each record's gradient; how they are measured and summed is theirs (`sfumato.gradients.terms`).
"""

from __future__ import annotations

from collections.abc import Callable
from types import (
    BuiltinFunctionType,
    FunctionType,
    MethodDescriptorType,
    MethodWrapperType,
    WrapperDescriptorType,
)
from typing import Any

from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from sfumato.errors import InputError
from sfumato.gradients.support import name_of
from sfumato.gradients.tape import Rule

RULES: dict[Any, Rule] = {}
TOGETHER: dict[Any, Rule] = {}


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Register a rule for torch functions that take parameters.

    Raises:
        InputError: there is no function, or one that torch does not announce when it is called.
    """
    return _into(RULES, functions)


def together(*functions: Any) -> Callable[[Rule], Rule]:
    """Register how functions without parameters are run on all records at once, where vmap would be slow.

    Raises:
        InputError: as for `rule`.
    """
    return _into(TOGETHER, functions)


def _into(table: dict[Any, Rule], functions: tuple[Any, ...]) -> Callable[[Rule], Rule]:
    if not functions:
        raise InputError(f"A rule needs the torch functions that it stands for; {_EXAMPLE}.")
    for function in functions:
        if not _is_announced(function):
            shown = repr(function) if isinstance(function, str) else name_of(function)
            raise InputError(f"A rule stands for torch functions, and {shown} is none; {_EXAMPLE}.")

    def register(made: Rule) -> Rule:
        table.update(dict.fromkeys(functions, made))
        return made

    return register


_EXAMPLE = "write @rule(torch.nn.functional.prelu), say, with the function that the module calls"


def _is_announced(function: Any) -> bool:
    """Tell whether torch says when a function is called, without which no rule would ever run."""
    if isinstance(function, FunctionType):
        # Also functions outside of torch that take part in its protocol.
        return _is_in_torch(function.__module__) or "handle_torch_function" in function.__code__.co_names
    if isinstance(function, (MethodDescriptorType, WrapperDescriptorType)):
        return issubclass(Tensor, function.__objclass__)
    if isinstance(function, MethodWrapperType):  # the getter of a property of tensors
        owner = function.__self__
        if isinstance(owner, property):
            return _is_in_torch(owner.fget.__module__)
        return issubclass(Tensor, getattr(owner, "__objclass__", type(None)))
    if isinstance(function, BuiltinFunctionType):
        return _is_in_torch(function.__module__)
    return isinstance(function, (OpOverload, OpOverloadPacket))


def _is_in_torch(module: str | None) -> bool:
    return (module or "").partition(".")[0] == "torch"
