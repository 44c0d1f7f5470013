"""Composite sites: several sites of a model, whose rows are one row, concatenated in the order written.

    layers.6+layers.12     two sites
    layers.2..6            the residual stream after blocks 2, 3, 4, 5 and 6; layers.2..6.mlp their MLPs
    layers.*.mlp           the MLP of every block that has one
    encoder.*.norm         every module of such a path; a star stands for one part of it

Patterns are spelled out when a source is opened; a composite site is called by the names of its parts.
"""

from __future__ import annotations

import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn

from unweave.errors import UnweaveError, near_names
from unweave.sources.sites import Site, find_blocks, find_site, list_sites


@dataclass(frozen=True)
class CompositeSite:
    """Several sites of one model, read in one forward pass; see the top of this file.

    Attributes:
        parts: two sites or more, all different, in the order of their columns.
    """

    parts: tuple[Site, ...]

    @property
    def name(self) -> str:
        """The names of the parts: what was written as a pattern is spelled out."""
        return "+".join(part.name for part in self.parts)

    def describe(self) -> str:
        return "; ".join(part.describe() for part in self.parts)

    def __repr__(self) -> str:
        return f"CompositeSite({self.name!r})"


AnySite = Site | CompositeSite


def find_sites(root: nn.Module, name: str) -> AnySite:
    """The site called ``name``, or the composite site where it has a ``+`` or is a pattern.

    Raises:
        UnweaveError: for a name the model does not have, a pattern that matches nothing, a part named twice.
    """
    parts = tuple(find_site(root, one) for written in name.split("+") for one in _expand(root, written))
    names = [part.name for part in parts]
    if len(set(names)) < len(names):
        twice = next(one for one in names if names.count(one) > 1)
        raise UnweaveError(f"site {name!r} has the part {twice!r} twice: each may be there once")
    return parts[0] if len(parts) == 1 else CompositeSite(parts)


def join_parts(site: AnySite, rows: Mapping[str, Tensor], keep: Tensor | None = None) -> Tensor:
    """``(n, d)`` rows of a site from the rows of its parts by name, or of those that ``keep`` says."""
    found = [rows[part.name] if keep is None else rows[part.name][keep] for part in site.parts]
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def parts_facts(names: Sequence[str], widths: Sequence[int]) -> list[dict[str, Any]]:
    """What provenance says of the parts of a composite site."""
    return [{"site": name, "width": width} for name, width in zip(names, widths)]


def target_parts(provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What provenance says of the parts of the target rows; nothing for rows of one part."""
    tied = provenance.get("target_site") in (None, provenance.get("site"))
    return provenance.get("parts" if tied else "target_parts") or []


def part_labels(provenance: Mapping[str, Any]) -> list[str]:
    """What the parts of target rows are called, in the order of their columns; nothing for rows of one part.

    The sites where they tell the parts apart; letters, from "a", for rows of several models, or of one site twice.
    """
    sites = [str(part["site"]) for part in target_parts(provenance)]
    one_model = "sources" not in provenance or "model" in provenance
    return sites if one_model and len(set(sites)) == len(sites) else list(string.ascii_lowercase[: len(sites)])


def part_names(provenance: Mapping[str, Any]) -> dict[str, str]:
    """What letters among the labels of parts stand for: model and site."""
    each, found = provenance.get("sources", []), {}
    for label, part, source in zip(part_labels(provenance), target_parts(provenance), each):
        model = source.get("model")
        name = str(model.get("name") or "") if isinstance(model, Mapping) else ""
        name = PurePath(name).name if PurePath(name).is_absolute() else name
        if label != part["site"]:
            found[label] = f"{name}, {part['site']}" if name else str(part["site"])
    return found


def _expand(root: nn.Module, written: str) -> list[str]:
    """The sites one pattern stands for, in the model's order; a name is itself."""
    path, colon, side = written.partition(":")
    blocks = re.fullmatch(r"layers\.(\*|\d+\.\.\d+)(\.[^*]+)?", path)
    if not blocks and "*" not in path:
        if not path:
            raise UnweaveError("expected a site between, before and behind each +, found none")
        return [written]
    if blocks and (n_blocks := len(find_blocks(root)[1])):
        part = (blocks[2] or "") + colon + side
        if blocks[1] != "*":
            first, last = map(int, blocks[1].split(".."))
            if not first <= last < n_blocks:
                raise UnweaveError(
                    f"site {written!r}: expected blocks from 0 to {n_blocks - 1}, the lower number first"
                )
            return [f"layers.{n}{part}" for n in range(first, last + 1)]
        found = [f"layers.{n}{part}" for n in range(n_blocks) if _exists(root, f"layers.{n}{part}")]
    else:
        pattern = re.compile(r"[^.]+".join(map(re.escape, path.split("*"))))
        found = [name + colon + side for name, _ in root.named_modules() if pattern.fullmatch(name)]
    if not found:
        known = sorted({re.sub(r"^layers\.\d+", "layers.*", name) for name in list_sites(root)})
        raise UnweaveError(f"site {written!r} matches nothing in this {type(root).__name__}: {near_names(path, known)}")
    return found


def _exists(root: nn.Module, name: str) -> bool:
    try:
        find_site(root, name)
    except UnweaveError:
        return False
    return True
