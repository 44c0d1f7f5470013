"""Running a language model on items: activations at some sites, and gradients of its loss at some of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from unweave.batch import Items
from unweave.errors import UnweaveError
from unweave.sources._contexts import pad
from unweave.sources.language_model import LanguageModel
from unweave.sources.sites import Site

_LOGIT_BYTES = 1 << 28  # of the contexts that go forward and back together, as float32
_CHUNK_BYTES = 1 << 25  # of the logits turned into their gradient at a time, as float32


def run_items(model: LanguageModel, sites: Sequence[Site], items: Items) -> dict[str, Tensor]:
    """``(n_tokens, d)`` activations of every token of the items, by site, on the CPU."""
    tokens, mask = pad(items)
    found = model.run_to(sites, tokens, None if bool(mask.all()) else mask.long())
    return {name: rows[mask.to(rows.device)].cpu() for name, rows in found.items()}


def run_with_gradients(
    model: LanguageModel, sites: Sequence[Site], written: Sequence[Site], items: Items
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The activations at ``sites``, and at the ``written`` ones among them the gradients of the model's loss.

    The loss is the cross-entropy of every token but the first of its item, summed: an item's gradient does not depend
    on what it is batched with. The activations are those of the unmodified forward pass. Items go through the model a
    few at a time, so that their logits take at most a quarter of a GB (or what one item takes).

    Returns:
        Two mappings from a site's name to ``(n_tokens, d)``, on the CPU, in the model's dtype.
    """
    if not written:
        return run_items(model, sites, items), {}
    n_columns = int(items.offsets.diff().max())
    step = max(1, _LOGIT_BYTES // (4 * model.n_vocabulary * n_columns))
    parts = [_run(model, sites, written, items[i : i + step]) for i in range(0, len(items), step)]
    rows, gradients = ({name: torch.cat([p[i][name] for p in parts]) for name in parts[0][i]} for i in (0, 1))
    return rows, gradients


def _run(
    model: LanguageModel, sites: Sequence[Site], written: Sequence[Site], items: Items
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    tokens, mask = (tensor.to(model.device) for tensor in pad(items))
    whole = None if bool(mask.all()) else mask.long()
    wanted = {site.name for site in written}
    found: dict[str, Tensor] = {}

    def reader(site: Site) -> Callable[[Tensor], Tensor | None]:
        def read(tensor: Tensor) -> Tensor | None:
            if site.name in found:
                return None
            if site.name not in wanted:
                found[site.name] = tensor.detach().clone()  # what comes behind might work in place
                return None
            # Nothing before the first site needs a graph; from there on autograd follows. The model goes on with a
            # copy, since it may work in place.
            here = tensor.clone() if tensor.requires_grad else tensor.detach().clone().requires_grad_()
            found[site.name] = here
            return here.clone()

        return read

    with ExitStack() as stack, torch.enable_grad():
        for site in {site.name: site for site in (*sites, *written)}.values():
            stack.enter_context(site.hook(reader(site)))
        logits = model.model(input_ids=tokens, attention_mask=whole, use_cache=False).logits
    for site in (*sites, *written):
        if site.name not in found:
            raise UnweaveError(
                f"site {site.name!r} was not computed in a forward pass ({site.describe()}): the model does not call "
                "this module. Choose another site."
            )
    places = [found[site.name] for site in written]
    grads = torch.autograd.grad(logits, places, _loss_gradient(logits.detach(), tokens, mask), allow_unused=True)

    def real(rows: Tensor) -> Tensor:
        return rows.detach().reshape(*tokens.shape, -1)[mask].cpu()

    activations = {site.name: real(found[site.name]) for site in sites}
    return activations, {site.name: real(_given(grad, site)) for site, grad in zip(written, grads)}


def _loss_gradient(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Of the summed cross-entropy by the ``(b, t, vocabulary)`` logits: ``softmax - one-hot`` where a token follows."""
    out = torch.zeros_like(logits)
    follows = mask.clone()
    follows[:, :-1] = mask[:, 1:]
    follows[:, -1] = False
    places, targets = follows.nonzero(), tokens.roll(-1, 1)[follows]
    step = max(1, _CHUNK_BYTES // (4 * logits.shape[-1]))
    for (row, column), target in zip(((p[:, 0], p[:, 1]) for p in places.split(step)), targets.split(step)):
        share = logits[row, column].float().softmax(-1)
        share[torch.arange(len(target), device=target.device), target] -= 1
        out[row, column] = share.to(out.dtype)
    return out


def _given(grad: Tensor | None, site: Site) -> Any:
    if grad is None:
        raise UnweaveError(
            f"site {site.name!r} ({site.describe()}) has no part in the model's logits, so there is no gradient there: "
            "choose another site, or leave the side inputs out"
        )
    return grad
