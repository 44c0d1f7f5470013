"""What the CPU kernels share: compiling with numba, and running a compiled loop on torch's number of threads.

The kernels are plain serial loops over a range of rows that let go of the interpreter lock; :func:`run` hands ranges
to a few Python threads. numba's own parallel loops would bring a second thread pool that spins beside torch's OpenMP
threads, aborts when two Python threads enter it at once, and does not survive a fork.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

# Sums may be reordered and fused (that is what makes them fast); infinities keep their meaning. Kernels must stay
# inside their arrays whatever NaN does to a comparison: a broken loss is found, and reported, after the step.
_FASTMATH = {"reassoc", "contract", "nsz", "arcp", "nnan"}
_CHUNKS_PER_THREAD = 16
_HOME = os.getpid()
WORTH_A_THREAD = 2**18  # multiply-adds


def jit(function: Callable[..., Any]) -> Any:
    """Compile at the first call, and keep what was compiled on disk, if there is a place for it."""
    options = {"nogil": True, "fastmath": _FASTMATH, "error_model": "numpy"}
    try:
        compiled: Any = numba.njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's cache can be written to
        return numba.njit(**options)(function)
    with contextlib.suppress(AttributeError):
        # numba looks at the function's own file for changes, but not at the files of what it calls.
        kept = compiled._cache._cache_file
        kept._source_stamp = (kept._source_stamp, _sources())
    return compiled


@cache
def _sources() -> str:
    """What all kernels are made of."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


inline: Callable[[Callable[..., Any]], Any] = numba.njit(
    nogil=True, fastmath=_FASTMATH, error_model="numpy", inline="always"
)


def widen(value: Any) -> Any:
    """A score as float32: bfloat16 comes in as its bits (int16), float32 as itself."""
    raise NotImplementedError("for compiled code only")


@overload(widen, inline="always")
def _widen(value):
    if isinstance(value, types.Integer):
        return lambda value: np.int32(np.int32(value) << np.int32(16)).view(np.float32)
    return lambda value: value


@inline
def narrow(value):
    """The bits of a float32 as bfloat16, rounded to the nearest, ties to even."""
    bits = np.float32(value).view(np.int32)
    return np.int16((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)


def write_row(out: Any, row: Any) -> None:
    """``out = row``, rounded to the nearest where ``out`` is bfloat16 (ties to even)."""
    raise NotImplementedError("for compiled code only")


@overload(write_row, inline="always")
def _write_row(out, row):
    if isinstance(out.dtype, types.Integer):

        def rounded(out, row):
            for j in range(len(row)):
                out[j] = narrow(row[j])

        return rounded

    def exact(out, row):
        for j in range(len(row)):
            out[j] = row[j]

    return exact


@inline
def dot(a, b):
    total = np.float32(0)
    for j in range(len(a)):
        total += a[j] * widen(b[j])
    return total


@inline
def dots(x, W, indices, start, end, out):
    """``out[e] = x . W[indices[e]]``, eight rows of W at a time: memory is the limit, and they come in together.

    W may be bfloat16, here and below: half the memory.
    """
    e = start
    while e + 8 <= end:
        w0, w1, w2, w3 = W[indices[e]], W[indices[e + 1]], W[indices[e + 2]], W[indices[e + 3]]
        w4, w5, w6, w7 = W[indices[e + 4]], W[indices[e + 5]], W[indices[e + 6]], W[indices[e + 7]]
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = np.float32(0)
        for j in range(len(x)):
            v = x[j]
            s0 += v * widen(w0[j])
            s1 += v * widen(w1[j])
            s2 += v * widen(w2[j])
            s3 += v * widen(w3[j])
            s4 += v * widen(w4[j])
            s5 += v * widen(w5[j])
            s6 += v * widen(w6[j])
            s7 += v * widen(w7[j])
        out[e], out[e + 1], out[e + 2], out[e + 3] = s0, s1, s2, s3
        out[e + 4], out[e + 5], out[e + 6], out[e + 7] = s4, s5, s6, s7
        e += 8
    while e + 4 <= end:
        w0, w1, w2, w3 = W[indices[e]], W[indices[e + 1]], W[indices[e + 2]], W[indices[e + 3]]
        t0 = t1 = t2 = t3 = np.float32(0)
        for j in range(len(x)):
            v = x[j]
            t0 += v * widen(w0[j])
            t1 += v * widen(w1[j])
            t2 += v * widen(w2[j])
            t3 += v * widen(w3[j])
        out[e], out[e + 1], out[e + 2], out[e + 3] = t0, t1, t2, t3
        e += 4
    while e < end:
        out[e] = dot(x, W[indices[e]])
        e += 1


@inline
def add_rows(out, weights, order, rows, A, start, end):
    """``out += weights[order[e]] * A[rows[e]]`` for ``e`` from start to end, eight rows at a time."""
    e, d = start, len(out)
    while e + 8 <= end:
        a0, a1, a2, a3 = A[rows[e]], A[rows[e + 1]], A[rows[e + 2]], A[rows[e + 3]]
        a4, a5, a6, a7 = A[rows[e + 4]], A[rows[e + 5]], A[rows[e + 6]], A[rows[e + 7]]
        v0, v1, v2, v3 = weights[order[e]], weights[order[e + 1]], weights[order[e + 2]], weights[order[e + 3]]
        v4, v5, v6, v7 = weights[order[e + 4]], weights[order[e + 5]], weights[order[e + 6]], weights[order[e + 7]]
        for j in range(d):
            half = v0 * widen(a0[j]) + v1 * widen(a1[j]) + v2 * widen(a2[j]) + v3 * widen(a3[j])
            out[j] += half + (v4 * widen(a4[j]) + v5 * widen(a5[j]) + v6 * widen(a6[j]) + v7 * widen(a7[j]))
        e += 8
    while e + 4 <= end:
        a0, a1, a2, a3 = A[rows[e]], A[rows[e + 1]], A[rows[e + 2]], A[rows[e + 3]]
        v0, v1, v2, v3 = weights[order[e]], weights[order[e + 1]], weights[order[e + 2]], weights[order[e + 3]]
        for j in range(d):
            out[j] += v0 * widen(a0[j]) + v1 * widen(a1[j]) + v2 * widen(a2[j]) + v3 * widen(a3[j])
        e += 4
    while e < end:
        a, v = A[rows[e]], weights[order[e]]
        for j in range(d):
            out[j] += v * widen(a[j])
        e += 1


def array(tensor: Tensor) -> np.ndarray[Any, Any]:
    """The tensor's memory as numpy sees it; bfloat16 as int16."""
    tensor = tensor.detach()
    return (tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def run(
    kernel: Callable[..., Any], n: int, *args: Any, work: float, chunks_per_thread: int = _CHUNKS_PER_THREAD
) -> None:
    """Call ``kernel(lo, hi, *args)`` over ranges that cover ``0..n``, on as many threads as torch uses.

    Ranges are handed out as threads come free, so a kernel may write only what belongs to its rows.

    Args:
        work: multiply-adds a row, roughly. Passing the arguments of a call takes some 10 µs, so small work stays here.
    """
    grain = max(1, round(WORTH_A_THREAD / max(1.0, work)))
    threads = min(torch.get_num_threads(), max(1, n // grain))
    if threads == 1:
        kernel(0, n, *args)
        return
    _rest()
    chunks = min(threads * chunks_per_thread, n // grain)
    edges = [n * i // chunks for i in range(chunks + 1)]
    tickets = itertools.count()

    def take() -> None:
        while (i := next(tickets)) < chunks:
            kernel(edges[i], edges[i + 1], *args)

    helpers = [_pool(os.getpid()).submit(take) for _ in range(threads - 1)]
    try:
        take()
    finally:
        for helper in helpers:
            helper.result()


@cache
def _resting() -> Callable[[int], int] | None:
    """``omp_pause_resource_all`` of the OpenMP library that torch brought, if it is GNU's and new enough."""
    for library in sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*")):
        with contextlib.suppress(OSError, AttributeError):
            return ctypes.CDLL(str(library)).omp_pause_resource_all
    return None


def _rest() -> None:
    """Send torch's idle threads to sleep.

    After a parallel operation they spin for some ten milliseconds in case another one follows, on the cores that our
    threads are about to use: on two cores a whole training step took 38 ms with them and 33 without.
    """
    if os.getpid() == _HOME and (pause := _resting()) is not None:  # a forked process has no such threads to wait for
        pause(1)  # omp_pause_soft: this thread's helpers end, and are started again when torch next needs them


_lock = threading.Lock()


def _pool(pid: int) -> ThreadPoolExecutor:
    with _lock:
        return _make_pool(pid)


@cache
def _make_pool(pid: int) -> ThreadPoolExecutor:
    """One pool a process: threads do not survive a fork."""
    return ThreadPoolExecutor(max(1, (os.cpu_count() or 1) - 1), thread_name_prefix="unweave-kernels")
