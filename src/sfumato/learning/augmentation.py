"""Several views of each record (crops, flips), whose mean gradient is clipped once (De et al. 2022)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sfumato.errors import InputError

Augment = Callable[[Tensor], Tensor]
"""Maps one record's features, shape (...), to its views, shape (views, ...)."""


def views_of(features: Tensor, augment: Augment) -> Tensor:
    """Return the views of every record, shape (batch, views, ...).

    `augment` is called with one record at a time, so no record can reach another's views.

    Raises:
        InputError: it fails, or does not return the same number of views for every record.
    """
    if not len(features):
        return features.unsqueeze(1)
    try:
        # A copy, so that an augmentation in place does not change the records.
        views = [augment(record.clone()) for record in features]
        shapes = {tuple(view.shape) for view in views}
    except Exception:
        # Its message may quote the record.
        raise InputError(
            "augment failed on a record; it takes one record's features and returns its views, shape (views, ...)."
        ) from None
    if len(shapes) != 1 or len(shape := shapes.pop()) != features.dim() or shape[0] < 1:
        raise InputError(
            "augment must return the same number of views for every record, at least one, shape (views, ...); "
            "use torch.stack on a list of views."
        )
    return torch.stack(views)
