"""The float32 product of rows and encoder, by one of the libraries at hand.

Which is fastest depends on the processor: what torch uses by itself on x86, MKL, leaves much of AMD's processors idle;
numpy's OpenBLAS leaves less of some of them, oneDNN of others. The calibration finds out.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

Library = Literal["torch", "numpy", "onednn"]
LIBRARIES: tuple[Library, ...] = get_args(Library)
_STRETCHES = 2  # of rows for each thread: few, for every call packs the weights; not one, for threads differ in speed
_one_at_a_time = threading.Lock()


def multiply(x: Tensor, W: Tensor, out: Tensor, library: Library = "torch") -> Tensor:
    """``x W^T``, on a processor.

    Args:
        x: ``(n, d)``. W: ``(n_features, d)``. Float32 but for torch's own, which takes any type.
        out: ``(n, n_features)``, contiguous, where the product may be written.

    Returns:
        The product; in ``out``, unless the library cannot write there.
    """
    if library == "numpy":
        return _by_numpy(x, W, out)
    if library == "onednn":
        return torch.ops.mkldnn._linear_pointwise(x, W, None, "none", [], "")
    return torch.mm(x, W.T, out=out)


@cache
def why_not(library: Library) -> str | None:
    """Why a library cannot be used here; None when it can."""
    if library == "numpy" and not _openblas().lib_controllers:
        return "numpy's matrix library is not OpenBLAS"
    if library == "onednn" and not (
        torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        return "this torch has no oneDNN"
    return None


def _by_numpy(x: Tensor, W: Tensor, out: Tensor) -> Tensor:
    """On our threads, OpenBLAS' own would wait busily for more on the cores that the kernels are about to use."""
    from unweave.kernels._jit import run  # late: numba takes a while to import

    # The limit is the process's: two that set it and set it back at once could leave it there.
    with _one_at_a_time, _openblas().limit(limits=1):
        arrays = x.numpy(), W.numpy().T, out.numpy()
        run(_multiply_rows, len(x), *arrays, work=W.numel(), chunks_per_thread=_STRETCHES)
    return out


def _multiply_rows(lo: int, hi: int, x: Any, W: Any, out: Any) -> None:
    np.dot(x[lo:hi], W, out=out[lo:hi])  # lets go of the interpreter lock


@cache
def _openblas() -> Any:
    from threadpoolctl import ThreadpoolController

    return ThreadpoolController().select(internal_api="openblas")
