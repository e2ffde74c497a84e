"""Which models can be trained privately: refuses, by name and with the fix, what would mix records."""

from __future__ import annotations

import contextlib
import functools
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from sfumato.errors import SfumatoError, UnsupportedModelError


def check_model(model: nn.Module, *, mixing: bool = False) -> None:
    """Refuse a model in which the gradient of one record would depend on other records, or nothing is trainable.

    Args:
        model: To be trained.
        mixing: Whether it may mix the records of a batch, because all of them belong to one unit.

    Raises:
        UnsupportedModelError: names the first such module and what to use in its place.
    """
    for problem in problems(model, mixing=mixing):
        raise UnsupportedModelError(problem)


def problems(model: nn.Module, *, mixing: bool = False) -> Iterator[str]:
    """Yield a sentence for everything that makes `check_model` refuse, with what to do about it."""
    for name, module in model.named_modules():
        where = f'Module "{name or "(the model itself)"}" is {type(module).__name__}'
        if isinstance(module, _BatchNorm) and not mixing:
            yield (
                f"{where}, which mixes the records of a batch, so no record's part can be bounded; "
                "use torch.nn.GroupNorm or torch.nn.LayerNorm in its place."
            )
        if isinstance(module, _InstanceNorm) and module.track_running_stats:
            yield (
                f"{where} with track_running_stats=True, which keeps un-noised averages of the records; "
                "use track_running_stats=False."
            )
        if module._backward_hooks or module._backward_pre_hooks:
            yield f"{where} with a backward hook, which private training would pass by; remove the hook."
    for name, parameter in model.named_parameters():
        if parameter._backward_hooks or getattr(parameter, "_post_accumulate_grad_hooks", None):
            yield f'Parameter "{name}" has a gradient hook, which private training would pass by; remove the hook.'
    if not trainable(model):
        yield "The model has no trainable parameter (requires_grad=True), so there is nothing to train."
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.is_floating_point():
            yield f'Parameter "{name}" is {parameter.dtype}; only real floating-point parameters can be trained.'


_functorch = torch._C._functorch
_PLAIN = frozenset({bool, int, float, str, type(None)})
_CONTAINERS = frozenset({dict, OrderedDict, list, tuple, set})
_TORCHS_OWN = frozenset({"_parameters", "_buffers", "_modules", "_non_persistent_buffers_set"})


@contextlib.contextmanager
def running(model: nn.Module, how: str, *, quote: bool) -> Iterator[None]:
    """Turn whatever the user's model or loss raises into one sentence.

    Args:
        model: Named in the sentence.
        how: What was tried, for example "one record at a time".
        quote: Whether to pass on the error's own text. It may hold values of the records, so only where nothing is
            promised.

    Raises:
        UnsupportedModelError: in place of any error but sfumato's own.
    """
    try:
        yield
    except SfumatoError:
        raise
    except Exception as error:
        if known := _known(error, type(model).__name__):
            raise UnsupportedModelError(known) from None
        said = f" ({str(error).splitlines()[0]})" if quote and str(error) else ""
        raise UnsupportedModelError(
            f"{type(model).__name__} with this loss cannot be run {how}{said}. It raised {type(error).__name__}. Usual causes: "
            "an input or target of the wrong shape or range, a buffer or activation changed in place, or a decision on a "
            f"tensor's value. {_TRY}"
        ) from (error if quote else None)


@contextlib.contextmanager
def following(operation: str, rule: Callable[..., Any], how: str, model: nn.Module) -> Iterator[None]:
    """Turn whatever a rule raises into one sentence, which never quotes the error: it may hold values of the records.

    Args:
        operation: The torch function that the rule stands for.
        rule: Named in the sentence if it is not one of sfumato's.
        how: As for `running`.
        model: Named where the model is what has to change.

    Raises:
        UnsupportedModelError: in place of any error but sfumato's own.
    """
    try:
        yield
    except SfumatoError:
        raise
    except Exception as error:
        if known := _known(error, type(model).__name__):
            raise UnsupportedModelError(known) from None
        failed = f"The rule for {operation} failed with {type(error).__name__}"
        if str(getattr(rule, "__module__", "")).partition(".")[0] != "sfumato":
            raise UnsupportedModelError(
                f"{failed}; it is your {name_of(rule)}, so mend it, or return NotImplemented for what it does not cover. "
                "On made-up records the __context__ of this error tells more."
            ) from None
        raise UnsupportedModelError(
            f"{failed} in {type(model).__name__}, run {how}; the usual cause is an input or target of the wrong shape, type or "
            f"range. {_TRY}"
        ) from None


def name_of(function: object) -> str:
    """Return what people call a function, a loss or a rule."""
    if isinstance(function, functools.partial):
        return name_of(function.func)
    return str(getattr(function, "__name__", type(function).__name__))


_TRY = "Run loss(model(features[:1]), targets[:1]) on made-up records to see torch's message."


def _known(error: Exception, model: str) -> str:
    """Return the sentence for an error whose text torch words the same whatever the records hold; else nothing."""
    said = str(error)
    if "inplace operation" in said:  # it quotes shapes alone
        return (
            f"{model} changes a tensor in place that its gradient needs; use operations that return a new tensor "
            "(inplace=False)."
        )
    if not said.startswith("vmap: It looks like you're"):
        return ""
    if "calling .item()" in said:
        return (
            f"{model} or the loss takes a number out of a tensor (.item(), float(), int()), maybe for a decision on a tensor's "
            "value, which has no answer for many records at once; keep it a tensor, or use torch.where."
        )
    return (
        f"{model} or the loss makes a decision on a tensor's value (if, while, and, or), which has no answer for many records "
        "at once; use torch.where."
    )


def refuse_memories(model: nn.Module, loss: object) -> None:
    """Refuse a model, or a loss that is a module, that keeps a value of the records after its forward under vmap.

    Raises:
        UnsupportedModelError: names the module and the attribute.
    """
    for root in (model, loss):
        for path, module in root.named_modules() if isinstance(root, nn.Module) else ():
            for key, value in (*vars(module).items(), *module._buffers.items()):
                if type(value) in _PLAIN or key in _TORCHS_OWN or (type(value) in _CONTAINERS and not value):
                    continue
                if any(map(_functorch.is_functorch_wrapped_tensor, _tensors_in(value))):
                    raise UnsupportedModelError(
                        memory_of(
                            f'Module "{path or "(the model itself)"}" ({type(module).__name__}), attribute "{key}",'
                        )
                    )


def memory_of(who: str) -> str:
    """Return the sentence that refuses what is kept of the records."""
    return (
        f"{who} keeps a value of the records after the forward, and would carry it to the records that come next, which no "
        "budget covers; make it a local variable, or keep nothing in training."
    )


def _tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple, set)):
        for item in value:
            yield from _tensors_in(item)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters that are trained, by name, in the order of `named_parameters`."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
