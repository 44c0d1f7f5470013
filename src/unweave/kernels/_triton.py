"""What the GPU kernels share: launching, block sizes, and the loops over entries that several kernels are made of.

Only ``gpu.py`` files import this, so Triton stays optional. Kernels never pad ``d`` to a power of two: they loop over
blocks of it. Indices are int32, offsets int64; where an index is multiplied by a width it is widened first. Masked
loads keep every access inside its array whatever NaN does to a comparison.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language
except ImportError as error:
    raise ImportError(f"the GPU kernels need Triton ({error}): pip install triton, or use the CPU kernels") from error

tl: Any = triton.language  # loosely typed: a kernel's values are tensors of the device, which Python's types don't see
if TYPE_CHECKING:
    constexpr = Any
else:
    constexpr = tl.constexpr  # a parameter of that type is part of the compiled kernel
jit: Callable[[Callable[..., Any]], Any] = triton.jit

LOWEST_KEY = tl.constexpr(-(2**31))  # below the key of every number

_TILE = 4096  # elements a program works on at once: 32 a thread with 4 warps
_INTERPRETED_PROGRAMS = 3  # more than one, so that the tests see programs take turns


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Run ``kernel`` on the device of the tensors; an empty grid is no work."""
    if min(grid) > 0:
        on = next(arg for arg in args if isinstance(arg, Tensor))
        with torch.cuda.device_of(on):
            kernel[grid](*args, **meta)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least ``n`` (and at least 1)."""
    return 1 << max(0, n - 1).bit_length()


def tile(d: int, entries: int) -> dict[str, int]:
    """Block sizes for work on ``entries`` rows of width ``d`` at a time, as the kernels' keyword arguments."""
    block_d = min(power_of_two(max(d, 16)), _TILE // entries)
    return {"BLOCK_E": entries, "BLOCK_D": block_d, "num_warps": 4}


def check_contiguous(*written: Tensor) -> None:
    """Kernels take what they only read in any layout; a copy of what they write would be written in its place."""
    for tensor in written:
        if not tensor.is_contiguous():
            raise ValueError(f"expected a contiguous tensor to write to, found strides {tensor.stride()}")


def n_persistent(on: Tensor, per_processor: int = 8) -> int:
    """How many programs fill the device, for kernels whose programs go on to the next piece of work."""
    if not on.is_cuda:
        return _INTERPRETED_PROGRAMS
    return per_processor * torch.cuda.get_device_properties(on.device).multi_processor_count


# ---- the error of bfloat16 scores ----------------------------------------------------------------------------------


class DeviceScreen:
    """The CPU's ``Screen`` for a GPU: it lives on the device, so neither consulting nor teaching it waits.

    Attributes, which do wait when read: ``tolerance``, ``n_redone``, ``n_rows``, as there.
    """

    def __init__(self, device: torch.device | str = "cuda") -> None:
        self._state = torch.tensor([2e-3, 0.0, 0.0], dtype=torch.float64, device=device)

    @property
    def tolerance(self) -> float:
        return float(self._state[0])

    @property
    def n_redone(self) -> int:
        return int(self._state[1])

    @property
    def n_rows(self) -> int:
        return int(self._state[2])

    def margin(self) -> Tensor:
        """``(1,)`` float32: the tolerance, on the device."""
        return self._state[:1].float()

    def teach(self, worst: Tensor, n_redone: Tensor, n_rows: int) -> None:
        """Follow a falling error slowly and a rising one at once. An error that is not a number teaches nothing."""
        worst = torch.where(worst.isfinite(), worst, 0).double()
        self._state[0] = torch.maximum(1.5 * worst, 0.9 * self._state[0])
        self._state[1] += n_redone
        self._state[2] += n_rows

    def state_dict(self) -> dict[str, float]:
        return {"tolerance": self.tolerance, "n_redone": self.n_redone, "n_rows": self.n_rows}

    def load_state_dict(self, state: dict[str, float]) -> None:
        values = [state[name] for name in ("tolerance", "n_redone", "n_rows")]
        self._state.copy_(torch.tensor(values, dtype=torch.float64))


def margin_of(screen: Any, device: torch.device) -> Tensor:
    """``(1,)`` float32: the tolerance of a screen of either kind, on the device."""
    if isinstance(screen, DeviceScreen):
        return screen.margin()
    return torch.full((1,), screen.tolerance, device=device)


def teach(screen: Any, worst: Tensor, n_redone: Tensor, n_rows: int) -> None:
    """A screen of the CPU's kind is taught too, at the price of a wait."""
    if isinstance(screen, DeviceScreen):
        screen.teach(worst, n_redone, n_rows)
    else:
        screen.update(float(torch.where(worst.isfinite(), worst, 0)), int(n_redone), n_rows)


# ---- numbers as integer keys of the same order: exact selection by counting ----------------------------------------


@jit
def key_of(score):
    """int32 keys in the order of the float32 scores, NaN above all (as torch.topk has it)."""
    bits = score.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(score != score, 0x7FFFFFFF, key)


@jit
def score_of(key):
    """The float32 score of a key."""
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key)
    return bits.to(tl.float32, bitcast=True)


@jit
def kth_largest(keys, k, BITS: constexpr):
    """The k-th largest key, rounded down to its first ``BITS`` bits (32: exactly), found bit by bit.

    If there are fewer than k keys other than LOWEST_KEY, that is the answer.
    """
    cut = tl.where(tl.sum((keys >= 0).to(tl.int32)) >= k, 0, LOWEST_KEY)
    for i in range(BITS - 1):
        trial = cut | (1 << (30 - i))
        cut = tl.where(tl.sum((keys >= trial).to(tl.int32)) >= k, trial, cut)
    return cut


@jit
def count_above(ranks, n, key, SIGNED: constexpr, BLOCK: constexpr):
    """How many of ``n`` float32 numbers in memory have a larger key (of their absolute value, if signed)."""
    count = 0
    for at in range(0, n, BLOCK):
        c = at + tl.arange(0, BLOCK)
        rank = tl.load(ranks + c, mask=c < n, other=0.0)
        if SIGNED:
            rank = tl.abs(rank)
        count += tl.sum(((c < n) & (key_of(rank) > key)).to(tl.int32))
    return count


@jit
def kth_largest_stored(ranks, n, k, SIGNED: constexpr, BLOCK: constexpr):
    """The key of the k-th largest of ``n`` float32 numbers in memory; LOWEST_KEY if there are fewer than k."""
    cut = tl.where(count_above(ranks, n, -1, SIGNED, BLOCK) >= k, 0, LOWEST_KEY)
    for i in range(31):
        trial = cut | (1 << (30 - i))
        cut = tl.where(count_above(ranks, n, trial - 1, SIGNED, BLOCK) >= k, trial, cut)
    return cut


# ---- the two loops over entries -------------------------------------------------------------------------------------


@jit
def weighted_sum(
    A, rows, order, weights, start, end, column, d, HAS_ORDER: constexpr, BLOCK_E: constexpr,
    BLOCK_D: constexpr,
):  # fmt: skip
    """``sum of weight * A[row]`` over the entries from start to end, in columns ``column`` to ``column + BLOCK_D``.

    The weight of entry ``e`` is ``weights[order[e]]``, or ``weights[e]`` without an order. A tile of entries is loaded
    at once, so that many reads are in flight; its lanes are added up at the end, always in the same order.
    """
    columns = column + tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
    for at in range(start, end, BLOCK_E):
        entry = at + tl.arange(0, BLOCK_E)
        here = entry < end
        row = tl.load(rows + entry, mask=here, other=0).to(tl.int64)
        if HAS_ORDER:
            weight = tl.load(weights + tl.load(order + entry, mask=here, other=0), mask=here, other=0.0)
        else:
            weight = tl.load(weights + entry, mask=here, other=0.0)
        inside = here[:, None] & (columns < d)[None, :]
        a = tl.load(A + row[:, None] * d + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        total += weight.to(tl.float32)[:, None] * a
    return tl.sum(total, 0)


@jit
def write_dots(x, W, features, start, end, out, d, BLOCK_E: constexpr, BLOCK_D: constexpr):
    """``out[e] = x . W[features[e]]`` for the entries from start to end."""
    for at in range(start, end, BLOCK_E):
        entry = at + tl.arange(0, BLOCK_E)
        here = entry < end
        feature = tl.load(features + entry, mask=here, other=0).to(tl.int64)
        total = tl.zeros([BLOCK_E, BLOCK_D], tl.float32)
        for column in range(0, d, BLOCK_D):
            columns = column + tl.arange(0, BLOCK_D)
            inside = here[:, None] & (columns < d)[None, :]
            w = tl.load(W + feature[:, None] * d + columns[None, :], mask=inside, other=0.0).to(tl.float32)
            total += tl.load(x + columns, mask=columns < d, other=0.0).to(tl.float32)[None, :] * w
        tl.store(out + entry, tl.sum(total, 1), mask=here)
