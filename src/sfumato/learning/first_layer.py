"""What the first layer of a model expects, told where records of another shape are given to it."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd


def misfit(model: nn.Module, records: Tensor) -> str:
    """Return a sentence if the first layer can hardly take such records, else "". It tells shapes and types, no values.

    Args:
        model: Its first layer with parameters, in the order of its modules, is looked at if it is linear or convolves.
        records: Features, (n, ...).
    """
    features = records.shape[1:]
    layers = ((name, one) for name, one in model.named_modules() if list(one.parameters(recurse=False)))
    name, layer = next(layers, ("", None))
    weights = None if layer is None else next(layer.parameters(recurse=False))
    if weights is not None and records.is_floating_point() and records.dtype != weights.dtype:
        given, own = (str(dtype).removeprefix("torch.") for dtype in (records.dtype, weights.dtype))
        return f" The features are {given} and the model is {own}; make the records with Records.from_arrays."
    if isinstance(layer, nn.Linear):
        wanted = layer.in_features
        fits, expected = wanted in (features[-1:].numel(), math.prod(features)), f"(n, {wanted})"
    elif isinstance(layer, _ConvNd) and not layer.transposed:
        expected = f"(n, {', '.join([str(layer.in_channels), *['any'] * len(layer.kernel_size)])})"
        fits = len(features) == 1 + len(layer.kernel_size) and features[0] == layer.in_channels
    else:
        return ""
    shape = f"(n{''.join(f', {size}' for size in features)})"
    where = f'The layer "{name}"' if name else "The model"
    return "" if fits else f" {where} expects features of shape {expected}, and these are of shape {shape}."
