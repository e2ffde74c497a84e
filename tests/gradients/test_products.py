"""Products with a weight of shape (in, out), as in GPT-2's Conv1D: the rule of linear layers, not the reference path."""

from __future__ import annotations

import pytest
import torch
from gradient_checks import Case, check_agreement, normals, with_values
from torch import Tensor, nn

import sfumato as sf
from sfumato.gradients.clipping import Clipping


class Times(nn.Module):
    def __init__(self, how: str, frozen: str | None) -> None:
        super().__init__()
        self.first, self.how = nn.Linear(3, 4), how
        self.w, self.b = nn.Parameter(torch.ones(4, 5)), nn.Parameter(torch.ones(5))
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name != frozen)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        match self.how:
            case "addmm":
                flat = x.view(-1, 4)
                return torch.addmm(self.b, flat, self.w).view(*x.shape[:-1], 5)
            case "addmm, scaled":
                return torch.addmm(self.b, x.view(-1, 4), self.w, beta=2, alpha=3).view(*x.shape[:-1], 5)
            case "@":
                return x @ self.w + self.b
            case "mm":
                return torch.mm(x.view(-1, 4), self.w).view(*x.shape[:-1], 5) + self.b
            case "weight first":
                return (self.w.t() @ x.transpose(-1, -2)).transpose(-1, -2) + self.b
            case _:
                return torch.matmul(x, self.w) * self.b


HOW = ["addmm", "addmm, scaled", "@", "mm", "weight first", "matmul"]


@pytest.mark.parametrize("frozen", [None, "w", "b", "first.weight"])
@pytest.mark.parametrize("positions", [1, 6])
@pytest.mark.parametrize("how", HOW)
def test_a_product_with_a_weight_equals_a_loop(how: str, positions: int, frozen: str | None) -> None:
    model = with_values(Times(how, frozen), 2)
    case = Case(model, normals(1, 5, positions, 3), normals(2, 5))
    for clipping in (Clipping(0.05), Clipping(100.0)):
        check_agreement(case.fast(clipping), case.loop(clipping), 1e-10)


@pytest.mark.parametrize("how", ["addmm", "@", "mm", "matmul"])
def test_it_takes_the_rule_of_linear_layers(how: str) -> None:
    rows = sf.explain(Times(how, None), torch.randn(4, 6, 3)).rows
    assert [row.rule for row in rows[:2]] == ["linear", "linear"]
