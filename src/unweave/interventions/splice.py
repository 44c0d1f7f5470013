"""Splice: replace the activations of a site, at chosen positions, while a model runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unweave.dictionaries._base import Dictionary
from unweave.dictionaries._origin import check_origin
from unweave.errors import UnweaveError
from unweave.interventions.edits import Reconstruct, RowEdit
from unweave.sources.sites import Site, find_site


@contextmanager
def splice(
    model: Any,
    site: Site | str,
    fn: RowEdit,
    positions: Tensor | None = None,
    *,
    read: Site | str | None = None,
    force: bool = False,
) -> Iterator[None]:
    """Within the ``with`` block, every forward of ``model`` has the rows of ``site`` replaced by ``fn(rows)``.

    Only the chosen positions change; all others, padding included, pass through untouched. The replaced tensor keeps
    its shape, dtype and device, and gradients flow through ``fn``. The hooks are gone when the block ends, also when
    it ends with an error.

    >>> with splice(model, "layers.12", ablate_zero, positions=mask):     # doctest: +SKIP
    ...     logits = model.model(tokens, attention_mask=mask).logits

    Args:
        model: a :class:`~unweave.sources.LanguageModel` or any ``nn.Module``; only asked to look up names.
        site: where, by name or as a Site.
        fn: ``(n, d)`` rows to ``(n, d)`` rows, in the order of the positions (row-major).
        positions: boolean mask with the shape of the activations without their last dimension, usually ``(b, t)``;
            None means every position.
        read: take the rows given to ``fn`` from this site instead, which must run before ``site``. A transcoder
            reads the input of an MLP and writes its output.
        force: go on where ``fn`` reconstructs with a dictionary that was loaded and is for another model or site, or
            is not known to be for this one.

    Raises:
        UnweaveError: for an unknown site, a dictionary that may be for another, and during the forward for a mask or a
            result of the wrong shape.
    """
    target = _site(model, site)
    source = target if read is None else _site(model, read)
    made_by = fn.dictionary if isinstance(fn, Reconstruct) else fn
    if isinstance(made_by, Dictionary) and not force:
        place = {"model": getattr(model, "provenance", None), "site": source.name, "target_site": target.name}
        check_origin(made_by.trained_on, place, "spliced into")
    held: list[Tensor] = []

    def keep(activation: Tensor) -> None:
        held[:] = [activation[_mask(activation, positions, source)]]

    def replace(activation: Tensor) -> Tensor | None:
        mask = _mask(activation, positions, target)
        rows = activation[mask]
        if source is not target:
            if not held:
                raise UnweaveError(f"splice: {source.name!r} is read but did not run before {target.name!r}")
            given = held.pop()
        else:
            given = rows
        if len(rows) == 0:
            return None
        new = fn(given)
        if new.shape != rows.shape:
            raise UnweaveError(
                f"splice at {target.name!r}: expected rows of shape {tuple(rows.shape)}, found {tuple(new.shape)}"
            )
        out = activation.clone()
        out[mask] = new.to(activation)
        return out

    with ExitStack() as stack:
        if source is not target:
            stack.enter_context(source.hook(keep))
        stack.enter_context(target.hook(replace))
        yield


def _site(model: Any, site: Site | str) -> Site:
    if isinstance(site, Site):
        return site
    return find_site(model, site) if isinstance(model, nn.Module) else model.site(site)


def _mask(activation: Tensor, positions: Tensor | None, site: Site) -> Tensor:
    shape = activation.shape[:-1]
    if positions is None:
        return torch.ones(shape, dtype=torch.bool, device=activation.device)
    flat = len(shape) == 1 and shape[0] == positions.numel()  # some models flatten (b, t) inside a block
    mask = positions.reshape(shape) if flat else positions
    if mask.shape != shape or mask.dtype != torch.bool:
        raise UnweaveError(
            f"splice at {site.name!r}: expected a boolean mask of shape {tuple(shape)}, one entry per position, "
            f"found {positions.dtype} of shape {tuple(positions.shape)}"
        )
    return mask.to(activation.device)
