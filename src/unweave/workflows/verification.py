"""A checkpoint on stored activations, against what it declares."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from unweave import formats
from unweave.activations import ActivationStore
from unweave.formats import Verdict

_DECLARED = ("average L0", "L0")  # as formats' facts call it


def verify(
    thing: str | Path,
    store: str | Path,
    others: Sequence[str | Path] = (),
    *,
    n_rows: int = 4096,
    l0: float | None = None,
    fvu: float | None = None,
    **options: Any,
) -> tuple[Verdict, dict[str, float | None]]:
    """:func:`unweave.formats.verify` on the first rows of an activation store.

    Args:
        store: of the checkpoint's site; with targets, for a transcoder. others: of sites it may be meant for instead.
        l0, fvu: declared; an L0 that the checkpoint itself states is taken where none is given.

    Raises:
        UnweaveError: when nothing is declared, a store is of another width, or the checkpoint cannot be loaded.
    """
    if l0 is None:
        context = formats.inspect(thing, **options).context
        stated = next((context[name] for name in _DECLARED if isinstance(context.get(name), int | float)), None)
        l0 = None if stated is None else float(stated)
    rows, target = _rows(store, n_rows)
    found = {str(path): _rows(path, n_rows) for path in others}
    verdict = formats.verify(thing, rows, target, l0=l0, fvu=fvu, others=found, **options)
    return verdict, {"l0": l0, "fvu": fvu}


def _rows(folder: str | Path, n_rows: int) -> tuple[Tensor, Tensor | None]:
    store = ActivationStore.open(folder)
    some = slice(0, min(n_rows, store.n_rows))
    return store.rows(some).float(), store.targets(some).float() if store.has_target else None
