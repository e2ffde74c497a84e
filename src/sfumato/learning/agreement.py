"""Whether clients that are trained in some way get what each gets alone: compared in float64, before the way is used."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import nn

from sfumato.data.records import Records
from sfumato.learning.group_data import ALONE, STACKED
from sfumato.learning.groups import Group, Hints
from sfumato.privacy.bounded import Tensors

_LOOKED_AT = 64  # records among which different ones are looked for
_FEW = 8  # records of a client that is made to compare ways
_AGREEMENT = 1e-6  # of an update's size: far above float64's rounding, far below what a fault would do

Compute = Callable[[Group], Tensors]
"""What clients hand in, by name, (clients, ...)."""


def agrees(group: Group, compute: Compute) -> bool:
    """Return whether the group's way gives for these clients what one by one gives, computed in float64.

    Stacked, clients are also made of the largest one's records, of one size and of several; what is found out about batches
    of different sizes goes to `group.hints`. Numbers are moved a little, so that no two of those records are equal; of what
    cannot be moved, such as words, too few different ones rule such batches out.

    Args:
        group: A small and a large client.
        compute: What the clients do, given a group like this one.
    """
    if group.way != STACKED:
        return _is_same(group, compute)
    largest = max(group.records, key=len)
    # Later groups may be padded or not, whatever these clients are.
    most = min(len(largest), _FEW)
    try:
        unlike = _unlike(largest, max(3, most))
        sizes = [len(unlike), len(unlike) - 1, 1]
        group.hints.padding = len(unlike) >= 3 and _is_same(_made_of(group, unlike, sizes), compute)
    except Exception:
        group.hints.padding = False
    sound = group.hints.padding or _is_same(_made_of(group, largest, [most] * 2), compute)
    return sound and _is_same(group, compute)


def _is_same(group: Group, compute: Compute) -> bool:
    """Whether a way gives for these clients what one by one gives; who is not finite there is passed over."""
    model = copy.deepcopy(group.model).double()
    loss = copy.deepcopy(group.loss).double() if isinstance(group.loss, nn.Module) else group.loss
    wide = [_double(one) for one in group.records]
    found = []
    for way in (ALONE, group.way):
        hints = Hints(padding=group.hints.padding)
        vectors = compute(dataclasses.replace(group, model=model, loss=loss, records=wide, way=way, hints=hints))
        found.append(torch.cat([value.unsqueeze(-1).flatten(1) for value in vectors.values()], 1))
    sound = torch.isfinite(found[0]).all(1)
    apart = float((found[1] - found[0])[sound].square().sum())
    return bool(sound.any()) and apart <= _AGREEMENT**2 * float(found[0][sound].square().sum())


def _unlike(records: Records, most: int) -> Records:
    """Return up to so many records of which no two are equal: what a model makes of equal ones, mixing them does not change."""
    features = records.features
    if features.is_floating_point():
        rows = torch.arange(most) % len(records)
        features = features[rows]
        shift = torch.arange(features.numel(), device=features.device).double().sin().view(features.shape)
        features = features + (0.1 + 0.1 * features.abs().max()) * shift.to(features.dtype)
        return Records(features, records.targets[rows])
    _, kinds = features[:_LOOKED_AT].flatten(1).unique(dim=0, return_inverse=True)
    first = {kind: row for row, kind in reversed([*enumerate(kinds.tolist())])}
    rows = torch.tensor(sorted(first.values())[:most])
    return Records(features[rows], records.targets[rows])


def _made_of(group: Group, records: Records, sizes: Sequence[int]) -> Group:
    """Return clients with so many of these records, repeated where there are not as many."""
    rows = [torch.arange(size) % len(records) for size in sizes]
    made = [Records(records.features[index], records.targets[index]) for index in rows]
    return dataclasses.replace(group, clients=range(group.clients[0], group.clients[0] + len(sizes)), records=made)


def _double(records: Records) -> Records:
    features, targets = (
        value.double() if value.is_floating_point() else value for value in (records.features, records.targets)
    )
    return dataclasses.replace(records, features=features, targets=targets)
