"""What a batch must satisfy before it may enter a store."""

from __future__ import annotations

import torch

from unweave.activations._manifest import Manifest, dtype_name
from unweave.batch import ActivationBatch
from unweave.errors import UnweaveError

_CONVERTS = {False: "a store never converts", True: "an int8 store gives back rows of the dtype it was given"}


def check_batch(batch: ActivationBatch, manifest: Manifest, n_items: int, n_batches: int) -> None:
    """Refuse a batch that does not fit the store or holds NaN or infinity.

    Args:
        n_items, n_batches: how many came before, so that a message can say where in the whole store a row is.
    """
    n, items = batch.n_rows, batch.items
    widths = (("input", batch.input, manifest.d_in), ("target", batch.target, manifest.d_out or manifest.d_in))
    for name, rows, width in widths:
        if tuple(rows.shape) != (n, width):
            raise UnweaveError(f"batch.{name}: expected shape ({n}, {width}), found {tuple(rows.shape)}")
        if rows.dtype != manifest.read_dtype:
            raise UnweaveError(
                f"batch.{name}: expected {dtype_name(manifest.read_dtype)} rows, found {dtype_name(rows.dtype)}. Cast "
                f"them, or make the store with their dtype: {_CONVERTS[manifest.dtype == 'int8']}"
            )
    _check_side(batch, manifest)
    if batch.target is not batch.input and manifest.d_out is None:
        raise UnweaveError("the batch has a separate target, but the store was made without one (d_out=None)")
    tokens = batch.row_token
    fits = (
        tuple(tokens.shape) == (n,)
        and tuple(items.offsets.shape) == (len(items) + 1,)
        and len(items.start) == len(items)
        and int(items.offsets[0]) == 0
        and int(items.offsets[-1]) == items.n_tokens
        and bool((items.offsets.diff() >= 0).all())
        and bool((tokens.diff() > 0).all())
        and (n == 0 or 0 <= int(tokens[0]) <= int(tokens[-1]) < items.n_tokens)
    )
    if not fits:
        raise UnweaveError(
            f"the batch's rows do not fit its items: expected row_token ({n},), rising, within the {items.n_tokens} "
            f"tokens of its {len(items)} items, and item offsets rising from 0 to {items.n_tokens}"
        )
    _check_finite(batch, n_items, n_batches)


def _check_side(batch: ActivationBatch, manifest: Manifest) -> None:
    expected = None if manifest.d_side is None else ((batch.n_rows, manifest.d_side), manifest.side_dtype)
    found = None if batch.side is None else (tuple(batch.side.shape), dtype_name(batch.side.dtype))
    if expected != found:
        words = [f"{pair[1]} side inputs of shape {pair[0]}" if pair else "none" for pair in (expected, found)]
        raise UnweaveError(f"batch.side: expected {words[0]}, found {words[1]}")


def _check_finite(batch: ActivationBatch, n_items: int, n_batches: int) -> None:
    for name, rows in (("input", batch.input), ("target", batch.target), ("side", batch.side)):
        if rows is None or bool(torch.isfinite(rows.sum())):  # one cheap pass; look closer only when it overflows
            continue
        bad = (~torch.isfinite(rows).all(dim=1)).nonzero().flatten().cpu()
        if len(bad):
            first = int(bad[0])
            item = int(batch.items.item_of_token[batch.row_token[first]])
            raise UnweaveError(
                f"{len(bad)} of {len(rows)} {name} rows of batch {n_batches} hold NaN or infinity. The first is of "
                f"item {n_items + item}, document {int(batch.meta.document[first])}, position "
                f"{int(batch.meta.position[first])}. Look for an overflow in the model's dtype (float32 may help), "
                "or drop such rows in the source. Shards already finished are kept."
            )
