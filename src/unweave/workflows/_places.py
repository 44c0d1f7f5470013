"""Where in a model a checkpoint belongs, and where it may belong instead."""

from __future__ import annotations

import re

from unweave.errors import UnweaveError
from unweave.formats import sites_called
from unweave.sources import LanguageModel

Pair = tuple[str, str | None]  # a site, and the target's if it is another


def find_place(model: LanguageModel, name: str) -> str:
    """The site of this model that a checkpoint, or a user, calls ``name``.

    Raises:
        UnweaveError: when it has none, with the near ones.
    """
    joined = any(mark in name for mark in ("+", "*", ".."))
    for one in [] if joined else sites_called(name):
        if _is_site(model, one):
            return one
    return model.composite(name).name


def _is_site(model: LanguageModel, name: str) -> bool:
    try:
        model.site(name)
    except UnweaveError:
        return False
    return True


def neighbours(model: LanguageModel, site: str, target: str | None, d_in: int, d_out: int) -> dict[str, Pair]:
    """Sites that may be meant instead of ``site`` (to ``target``), by name, of those widths.

    They are the same site a layer before and behind, and those of the same layer; of a transcoder also the target's
    layer for the site, and the site's for the target. None for a site that lies in no layer.
    """
    layer = _layer(site)
    if layer is None:
        return {}
    pairs: list[Pair] = []
    for n in (layer - 1, layer + 1):
        pairs.append((_moved(site, n - layer), target and _moved(target, n - layer)))
    parts = ("", ":input", ".mlp", ".mlp:input", ".attn", ".attn.heads")
    pairs += [(f"layers.{layer}{part}", target) for part in parts]
    if target is not None and (there := _layer(target)) not in (None, layer):
        pairs += [(_moved(site, there - layer), target), (site, _moved(target, layer - there))]
    found: dict[str, Pair] = {}
    tried = {(_tensor(site), _tensor(target or site))}
    for read, written in ((_tensor(a), b and _tensor(b)) for a, b in pairs):
        if (read, written or read) not in tried and _fits(model, read, d_in) and _fits(model, written or read, d_out):
            found[read if written is None else f"{read} to {written}"] = (read, written)
        tried.add((read, written or read))
    return found


def _layer(site: str) -> int | None:
    match = re.match(r"layers\.(\d+)\b", site)
    return int(match[1]) if match and "+" not in site else None


def _moved(site: str, by: int) -> str:
    return re.sub(r"\d+", lambda n: str(int(n[0]) + by), site, count=1)


def _tensor(site: str) -> str:
    """One name for each tensor: what goes into a block is what comes out of the one before it."""
    into = re.fullmatch(r"layers\.([1-9]\d*):input", site)
    return f"layers.{int(into[1]) - 1}" if into else site


def _fits(model: LanguageModel, site: str, width: int) -> bool:
    try:
        return model.width(site) == width
    except UnweaveError:  # no such site, or one that the model does not compute
        return False
