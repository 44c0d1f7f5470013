"""The float32 product of rows and encoder, by one of the libraries at hand.

Which is fastest depends on the processor: what torch uses by itself on x86, MKL, leaves much of AMD's processors idle;
numpy's OpenBLAS leaves less of some of them, oneDNN of others. The calibration finds out.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

Library = Literal["torch", "numpy", "onednn"]
LIBRARIES: tuple[Library, ...] = get_args(Library)
_STRETCHES = 2  # of rows for each thread: few, for every call packs the weights; not one, for threads differ in speed


def multiply(x: Tensor, W: Tensor, place: Callable[[], Tensor], library: Library = "torch") -> Tensor:
    """``x W^T``.

    Args:
        x: ``(n, d)``. W: ``(n_features, d)``. Float32 on a processor; torch takes any type and device.
        place: gives contiguous memory ``(n, n_features)`` for the product, to a library that can write into it.
    """
    if library == "numpy":
        return _by_numpy(x, W, place())
    if library == "onednn":
        return torch.ops.mkldnn._linear_pointwise(x, W, None, "none", [], "")
    return torch.mm(x, W.T, out=place())


@cache
def why_not(library: Library) -> str | None:
    """Why a library cannot be used here; None when it can."""
    if library == "numpy" and _openblas() is None:
        return "numpy did not bring an OpenBLAS of its own, as it does from PyPI"
    if library == "onednn" and not (
        torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        return "this torch has no oneDNN"
    return None


def at_hand() -> tuple[Library, ...]:
    """The libraries that can be used here."""
    return tuple(library for library in LIBRARIES if why_not(library) is None)


def _by_numpy(x: Tensor, W: Tensor, out: Tensor) -> Tensor:
    """On our threads, OpenBLAS' own would wait busily for more on the cores that the kernels are about to use."""
    from unweave.kernels._jit import run  # late: numba takes a while to import

    with _alone:
        arrays = x.numpy(), W.numpy().T, out.numpy()
        run(_multiply_rows, len(x), *arrays, work=W.numel(), chunks_per_thread=_STRETCHES)
    return out


def _multiply_rows(lo: int, hi: int, x: Any, W: Any, out: Any) -> None:
    np.dot(x[lo:hi], W, out=out[lo:hi])  # lets go of the interpreter lock


class _OneThread:
    """While anybody is inside, OpenBLAS works on the thread that calls it: the limit is the whole process's."""

    def __init__(self) -> None:
        self.lock, self.users, self.before = threading.Lock(), 0, 1

    def __enter__(self) -> None:
        openblas = _openblas()
        assert openblas is not None
        with self.lock:
            if self.users == 0:
                self.before = openblas.get()
                openblas.set(1)
            self.users += 1

    def __exit__(self, *_: object) -> None:
        openblas = _openblas()
        assert openblas is not None
        with self.lock:
            self.users -= 1
            if self.users == 0:
                openblas.set(self.before)

    def after_fork(self) -> None:
        """Whoever was inside is not in this process."""
        self.lock = threading.Lock()
        if self.users > 0:
            self.users = 1
            self.__exit__()


_alone = _OneThread()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_alone.after_fork)


class _Threads(NamedTuple):
    """Of OpenBLAS: their number, and how to change it."""

    get: Callable[[], int]
    set: Callable[[int], None]


@cache
def _openblas() -> _Threads | None:
    """The library in numpy's wheel. (threadpoolctl finds others too, but lets no second Python thread change them.)"""
    for file in sorted((Path(np.__file__).parents[1] / "numpy.libs").glob("*openblas*")):
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(str(file))  # loaded already: this is the same one
            for name in ("scipy_openblas_{}_num_threads64_", "openblas_{}_num_threads64_", "openblas_{}_num_threads"):
                with contextlib.suppress(AttributeError):
                    return _Threads(*(getattr(library, name.format(verb)) for verb in ("get", "set")))
    return None
