"""Questions about values that change nothing that is computed: they are answered without a look at the records.

A decision on values cannot be followed for many records at once, and a batch has one answer, which would carry something from
record to record; vmap refuses it, and so it should. Hugging Face's transformers ask a few such questions all the same, to warn
of padding or to save work when no token is masked. Here these are told no, whatever the records hold: nothing is printed, the
mask is made even if all is seen, and the model computes what it would have.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from sfumato.gradients.rules.registry import together
from sfumato.gradients.tape import Tape

# Where they are asked. "No" must be the answer that is always right there.
_WARNS = frozenset({("transformers.modeling_utils", "warn_if_padding_and_no_attention_mask")})
_SAVES_WORK = frozenset(
    ("transformers.masking_utils", function)
    for function in ("_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa")
)


@together(Tensor.__contains__)
def contains(tape: Tape, values: Tensor, element: object) -> Any:
    """Answer `element in values`."""
    return False if _asked_by() in _WARNS else NotImplemented


@together(Tensor.__bool__)
def truth(tape: Tape, value: Tensor) -> Any:
    """Answer `bool(value)`."""
    return False if _asked_by() in _SAVES_WORK else NotImplemented


def _asked_by() -> tuple[str, str] | None:
    """Return the module and the function that asked."""
    frame = inspect.currentframe()
    while frame is not None:
        module = str(frame.f_globals.get("__name__"))
        if module.partition(".")[0] not in ("torch", "sfumato"):
            return module, frame.f_code.co_name
        frame = frame.f_back
    return None
