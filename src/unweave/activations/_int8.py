"""Rows as 8-bit integers: half the disk of bfloat16, with one scale a row and one a channel."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST = 127
_CHUNK = 512  # rows turned at a time: their float32 copies stay in the processor's cache


def quantise(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``rows`` as ``values * channel * scale[:, None]``.

    A row's own scale keeps outlier rows to themselves. The channels' scales, shared by all rows of a shard, are for
    residual streams: a few of their channels are tens of times the others, and with a row scale alone those would
    leave the others two or three bits (measured on SmolLM2-135M: 16 times the squared error).

    Args:
        rows: ``(n, d)``, finite.

    Returns:
        values ``(n, d)`` int8 from -127 to 127, scale ``(n,)`` float32, channel ``(d,)`` float32 in (0, 1]. A row of
        zeros has scale 0. The same rows give the same bits.
    """
    channel = _channel_scale(rows)
    values, scale = torch.empty(rows.shape, dtype=torch.int8), torch.empty(len(rows))
    for first in range(0, len(rows), _CHUNK):
        part = rows[first : first + _CHUNK]
        unit, size = _unit(part)
        unit /= channel
        peak = unit.abs().amax(1)
        scale[first : first + _CHUNK] = size * (peak / LARGEST)
        values[first : first + _CHUNK] = (unit * (LARGEST / peak.clamp(min=1e-30))[:, None]).round_()
        if float(size.max()) > torch.finfo(rows.dtype).max / 2:  # rounding up must not end in infinity
            _keep_finite(values[first : first + _CHUNK], scale[first : first + _CHUNK], channel, rows.dtype)
    return values, scale, channel


def dequantise(values: Tensor, scale: Tensor, channel: Tensor, dtype: torch.dtype) -> Tensor:
    """``(n, d)`` rows in ``dtype``, a new tensor. Worked out in float32, whatever ``dtype`` is."""
    rows = torch.empty(values.shape, dtype=dtype)
    for first in range(0, len(rows), _CHUNK):
        part = slice(first, first + _CHUNK)
        # In this order nothing overflows on the way.
        rows[part] = values[part].float().mul_(channel).mul_(scale[part, None])
    return rows


def is_sound(scale: Tensor, channel: Tensor) -> bool:
    """Whether scales are what :func:`quantise` gives: finite, none negative, no channel zero."""
    good = torch.isfinite(scale).all() & (scale >= 0).all() & torch.isfinite(channel).all() & (channel > 0).all()
    return bool(good)


def _unit(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 rows with largest entry 1 (or all 0), and what they were divided by."""
    rows = rows.float()
    size = rows.abs().amax(1)
    return rows / torch.where(size > 0, size, 1.0)[:, None], size


def _channel_scale(rows: Tensor) -> Tensor:
    """``(d,)``: the fourth root of the mean fourth power of each channel, over rows brought to largest entry 1.

    Of the norms tried (mean, root mean square, this, maximum) this one left the least error; rows of any size weigh
    alike. Rounded to bfloat16, so that the order of a sum, which depends on the number of threads, does not show.
    """
    total = torch.zeros(rows.shape[1], dtype=torch.float64)
    for first in range(0, len(rows), _CHUNK):
        total += _unit(rows[first : first + _CHUNK])[0].square_().square_().sum(0, dtype=torch.float64)
    channel = (total / max(1, len(rows))).sqrt().sqrt().bfloat16().float()
    return torch.where(channel > 1e-9, channel, 1.0)


def _keep_finite(values: Tensor, scale: Tensor, channel: Tensor, dtype: torch.dtype) -> None:
    """Bring values that would decode to infinity one step nearer to zero, in place."""
    while not bool((finite := torch.isfinite(dequantise(values, scale, channel, dtype))).all()):
        values -= values.sign() * ~finite
