"""The same clipped sums as Opacus, layer by layer: its gradients of each record, clipped and added up by hand."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable

import pytest
import torch
from gradient_checks import First
from torch import Tensor, nn

from sfumato.gradients.clipping import Clipping
from sfumato.gradients.private import PrivateGradient

opacus = pytest.importorskip(
    "opacus", reason="Opacus is not installed; `bench/requirements-opacus.txt` has its version"
)

RECORDS, STEPS, WIDTH = 5, 3, 4


class StepsFirst(First):
    """Opacus tells the records of its attention apart only if they are the second dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1)).transpose(0, 1)


def lstm() -> tuple[nn.Module, nn.Module]:
    """Return our model and the twin that Opacus wants, with the same parameters in the same order."""
    from opacus.layers import DPLSTM

    ours = nn.LSTM(WIDTH, 3, num_layers=2, bidirectional=True, batch_first=True)
    theirs = DPLSTM(WIDTH, 3, num_layers=2, bidirectional=True, batch_first=True)
    theirs.load_state_dict(ours.state_dict())
    return First(ours), First(theirs)


def attention() -> tuple[nn.Module, nn.Module]:
    from opacus.layers import DPMultiheadAttention

    ours = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    theirs = DPMultiheadAttention(WIDTH, 2)
    theirs.load_state_dict(ours.state_dict())
    return First(ours, 3), StepsFirst(theirs, 3)


def same(make: Callable[[], nn.Module]) -> Callable[[], tuple[nn.Module, nn.Module]]:
    def both() -> tuple[nn.Module, nn.Module]:
        model = make()
        return model, copy.deepcopy(model)

    return both


def floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(RECORDS, *shape, dtype=torch.float64)


LAYERS: dict[str, tuple[Callable[[], tuple[nn.Module, nn.Module]], Callable[[], Tensor]]] = {
    "linear": (same(lambda: nn.Linear(WIDTH, 3)), floats(WIDTH)),
    "linear over steps": (same(lambda: nn.Linear(WIDTH, 3)), floats(STEPS, WIDTH)),
    "convolution": (
        same(lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2), groups=2)), floats(4, 6, 5),
    ),
    "embedding": (same(lambda: nn.Embedding(5, WIDTH)), lambda: torch.randint(5, (RECORDS, 7))),
    "layer norm": (same(lambda: nn.LayerNorm(WIDTH)), floats(STEPS, WIDTH)),
    "group norm": (same(lambda: nn.GroupNorm(2, 4)), floats(4, 3, 3)),
    "lstm": (lstm, floats(STEPS, WIDTH)),
    "attention": (attention, floats(STEPS, WIDTH)),
    "a small network": (
        same(
            lambda: nn.Sequential(
                nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)
            )
        ),
        floats(1, 6, 6),
    ),
}  # fmt: skip


def loss(out: Tensor, target: Tensor) -> Tensor:
    rows = out.flatten(1)
    ramp = torch.linspace(0.5, 1.5, rows.shape[1], dtype=rows.dtype)
    return ((rows - target.view(-1, 1)) * ramp).square().sum()


def theirs_of_ours(theirs: nn.Module, ours: nn.Module, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return Opacus's gradients under our names.

    A twin's `state_dict` has torch's names. Each of its parameters in turn is filled with marks, and where these show up
    in the `state_dict` is where the gradient belongs.
    """
    found = {name: torch.zeros(RECORDS, *p.shape, dtype=torch.float64) for name, p in ours.named_parameters()}
    with torch.no_grad():
        for own, parameter in theirs.named_parameters():
            for other in theirs.parameters():
                other.zero_()
            parameter.copy_(torch.arange(1, parameter.numel() + 1).view(parameter.shape))
            # Only the layer itself translates its names, not a module around it.
            inner, prefix = (theirs.layer, "layer.") if isinstance(theirs, First) else (theirs, "")
            for name, values in ((prefix + name, values) for name, values in inner.state_dict().items()):
                if name in found and bool(values.any()):
                    place = values.flatten().long()
                    row = grads[own].double().flatten(1)
                    hit = place > 0
                    found[name].flatten(1)[:, hit] += row[:, place[hit] - 1]
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layer", LAYERS)
def test_the_sum_equals_that_of_opacus(layer: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    make, inputs = LAYERS[layer]
    ours, theirs = (model.to(dtype) for model in make())
    features = inputs()
    features = features.to(dtype) if features.is_floating_point() else features
    targets = torch.randn(RECORDS, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = opacus.GradSampleModule(theirs, batch_first=not isinstance(theirs, StepsFirst), loss_reduction="sum")
        loss(wrapped(features), targets).backward()
    grads = {name: p.grad_sample.detach().clone() for name, p in theirs.named_parameters()}
    samples = theirs_of_ours(theirs, ours, grads)
    norms = torch.stack([g.flatten(1).square().sum(1) for g in samples.values()]).sum(0).sqrt()
    assert len(norms) == RECORDS
    assert float(norms.min()) > 0
    clip = float(norms.median())  # some records are clipped, some are not
    # We clip to a little under the clip norm, by 2**-11, so that rounding stays within it.
    factors = (clip * (1 - 2.0**-11) / norms).clamp(max=1.0)
    assert 0 < int((factors < 1).sum()) < RECORDS
    tolerance = 1e-10 if dtype is torch.float64 else 1e-4
    result = PrivateGradient(ours, loss, Clipping(clip)).sum(features, targets)
    assert result.nonfinite == 0
    assert list(samples) == list(result.bounded.value)
    expected = {name: torch.tensordot(factors, g, 1) for name, g in samples.items()}
    size = sum(float(tensor.square().sum()) for tensor in expected.values()) ** 0.5
    for name, tensor in result.bounded.value.items():
        assert float((tensor.double() - expected[name]).norm()) <= tolerance * size
