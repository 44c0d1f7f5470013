"""Fewer threads where waking them costs more than the work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

_WORTH_A_THREAD = 2**18  # numbers


@contextmanager
def serial(tensor: Tensor) -> Iterator[None]:
    """Run torch's operations on one thread if ``tensor`` is small.

    torch splits what has more than 32,768 numbers. Between two kernels its threads have gone to sleep, and waking
    them takes up to half a millisecond, many times the operation itself.
    """
    threads = torch.get_num_threads()
    if tensor.device.type != "cpu" or tensor.numel() > _WORTH_A_THREAD or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
