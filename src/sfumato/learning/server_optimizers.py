"""Adaptive optimisers for the server of a federation (Reddi et al. 2021, "Adaptive federated optimization", algorithm 2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from sfumato import _checks
from sfumato.errors import InputError

KINDS = ("adagrad", "adam", "yogi")


@final
class AdaptiveServer(Optimizer):
    """Takes the mean update for a gradient, with a step size for each coordinate, and without Adam's bias correction.

    m becomes beta1 * m + (1 - beta1) * g; v becomes v + g**2 ("adagrad"), beta2 * v + (1 - beta2) * g**2 ("adam") or
    v - (1 - beta2) * g**2 * sign(v - g**2) ("yogi"); the parameter moves by -lr * m / (sqrt(v) + tau). v begins at tau**2.

    Args:
        parameters: The server's.
        kind: "adagrad", "adam" or "yogi".
        lr: Above 0.
        beta1: In [0, 1).
        beta2: In [0, 1); "adagrad" has none.
        tau: The degree of adaptivity, above 0: smaller means more.

    Raises:
        InputError: the kind is unknown, or a number is out of range.
    """

    def __init__(
        self, parameters: Iterable[Tensor], kind: str = "adam", *, lr: float = 0.01, beta1: float = 0.9, beta2: float = 0.99,
        tau: float = 1e-3,
    ) -> None:  # fmt: skip
        if kind not in KINDS:
            raise InputError(f'There is no server optimiser "{kind}".{_checks.did_you_mean(kind, KINDS)}')
        _checks.positive("lr", lr)
        _checks.fraction("beta1", beta1, allow_zero=True)
        _checks.fraction("beta2", beta2, allow_zero=True)
        _checks.positive("tau", tau)
        super().__init__(parameters, {"kind": kind, "lr": lr, "beta1": beta1, "beta2": beta2, "tau": tau})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, parameter.grad, group)

    def _move(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["m"] = torch.zeros_like(parameter)
            state["v"] = torch.full_like(parameter, group["tau"] ** 2)
        m, v, beta2 = state["m"], state["v"], group["beta2"]
        m.lerp_(gradient, 1 - group["beta1"])
        squared = gradient.square()
        match group["kind"]:
            case "adagrad":
                v.add_(squared)
            case "adam":
                v.lerp_(squared, 1 - beta2)
            case _:
                v.sub_(squared * torch.sign(v - squared), alpha=1 - beta2)
        parameter.addcdiv_(m, v.sqrt().add_(group["tau"]), value=-group["lr"])
