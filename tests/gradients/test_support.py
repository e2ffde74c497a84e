"""Which models are refused, by name and with the fix."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sfumato.errors import UnsupportedModelError
from sfumato.gradients.support import check_model, trainable


@pytest.mark.parametrize("norm", [nn.BatchNorm1d(4), nn.BatchNorm2d(4), nn.BatchNorm3d(4), nn.SyncBatchNorm(4)])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_is_refused_by_name_with_group_norm_as_the_fix(norm: nn.Module, training: bool) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(norm)).train(training)
    with pytest.raises(UnsupportedModelError) as caught:
        check_model(model)
    message = str(caught.value)
    assert f'Module "1.0" is {type(norm).__name__}' in message
    assert "GroupNorm" in message


def test_a_model_that_is_itself_a_batch_norm_is_named_so() -> None:
    with pytest.raises(UnsupportedModelError, match=r'"\(the model itself\)" is BatchNorm1d'):
        check_model(nn.BatchNorm1d(4))


def test_instance_norm_is_refused_only_with_running_averages() -> None:
    check_model(nn.Sequential(nn.Conv1d(1, 4, 3), nn.InstanceNorm1d(4)))
    with pytest.raises(UnsupportedModelError, match=r'"1" is InstanceNorm1d.*use track_running_stats=False'):
        check_model(nn.Sequential(nn.Conv1d(1, 4, 3), nn.InstanceNorm1d(4, track_running_stats=True)))


def test_a_model_without_anything_to_train_is_refused() -> None:
    for model in (nn.ReLU(), nn.Linear(2, 2).requires_grad_(False)):
        with pytest.raises(UnsupportedModelError, match="nothing to train"):
            check_model(model)


def test_a_complex_parameter_is_refused_by_name() -> None:
    model = nn.Module()
    model.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(UnsupportedModelError, match=r'"phase" is torch\.complex64'):
        check_model(model)


@pytest.mark.parametrize("norm", [nn.GroupNorm(2, 4), nn.LayerNorm(4), nn.Dropout(0.5), nn.RMSNorm(4)])
def test_layers_that_keep_records_apart_are_accepted(norm: nn.Module) -> None:
    check_model(nn.Sequential(nn.Linear(3, 4), norm))


def test_only_what_requires_a_gradient_is_trained_in_order() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    assert list(trainable(model)) == ["0.bias", "1.weight", "1.bias"]
    assert trainable(model)["1.bias"] is model[1].bias
