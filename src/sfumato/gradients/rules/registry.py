"""The registry of rules, and what a rule promises.

A rule stands for a torch function (`torch.nn.functional.linear`, not `nn.Linear`), so it serves every module that calls the
function, with whatever parameters: tied, used twice, owned by a custom module. It is called in place of the function, with the
tape first and then the function's own arguments, and must

1. return `NotImplemented` if it does not cover these arguments (the reference path for single operations then takes over);
2. open what differs by record (`tape.open`: records first), and compute the function for all records at once with the values of
   `tape.weight(...)` in place of the parameters, to the same result;
3. hand each kernel's inputs and its fresh output, no view of it, to `tape.note` with a function from output gradients to terms,
   one or more for each parameter whose name is not empty. Tensors needed there are wrapped in `Kept`;
4. return what the function returns, closed (`tape.close`).

The terms must add up to each record's gradient; how they are measured and summed is theirs (`sfumato.gradients.terms`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sfumato.gradients.tape import Rule

RULES: dict[Any, Rule] = {}
TOGETHER: dict[Any, Rule] = {}


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Register a rule for torch functions that take parameters."""
    return _into(RULES, functions)


def together(*functions: Any) -> Callable[[Rule], Rule]:
    """Register how functions without parameters are run on all records at once, where vmap would be slow."""
    return _into(TOGETHER, functions)


def _into(table: dict[Any, Rule], functions: tuple[Any, ...]) -> Callable[[Rule], Rule]:
    def register(made: Rule) -> Rule:
        table.update(dict.fromkeys(functions, made))
        return made

    return register
