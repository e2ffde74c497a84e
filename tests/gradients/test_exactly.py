"""Full precision for norms and sums, also while other threads come and go."""

from __future__ import annotations

import threading

import torch

from sfumato.gradients.terms.term import exactly

CPU = torch.device("cpu")


def test_the_user_s_precision_is_back_afterwards() -> None:
    place = torch.backends.mkldnn.matmul
    before = place.fp32_precision
    place.fp32_precision = "bf16"
    try:
        with exactly(CPU):
            assert place.fp32_precision == "ieee"
        assert place.fp32_precision == "bf16"
    finally:
        place.fp32_precision = before


def test_a_thread_that_leaves_first_does_not_take_full_precision_from_the_others() -> None:
    place = torch.backends.mkldnn.matmul
    before = place.fp32_precision
    place.fp32_precision = "bf16"
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with exactly(CPU):
            inside.set()
            leave.wait()

    thread = threading.Thread(target=first)
    try:
        thread.start()
        inside.wait()
        with exactly(CPU):
            leave.set()
            thread.join()
            assert place.fp32_precision == "ieee"
        assert place.fp32_precision == "bf16"
    finally:
        leave.set()
        thread.join()
        place.fp32_precision = before


def test_autocast_is_off_inside() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16), exactly(CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is torch.float32
