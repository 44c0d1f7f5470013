"""One dictionary on the hub, as far as names tell; and the formats that can read such names."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Protocol

_SUFFIX = re.compile(r"(\.sae)?\.(pt|pth|npz|safetensors)$")
FACTS = ("model", "site", "target_site", "layer", "width", "l0", "k")


@dataclass(frozen=True)
class Entry:
    """None is for what the names do not say. It is not known of any of it whether it is true of the weights.

    Attributes:
        format: of the registry. repository: ``owner/name`` on the hub. place: its folder or file there, "" for all.
        name: short, for :func:`unweave.load`; by itself the repository without its owner, and the place.
        model: that it was trained on. site, target_site: in unweave's names. layer: from 0.
        width: how many features, of a cross-layer transcoder those of one layer. l0: features a row on average, as
            declared. k: features a row, of TopK.
        options: what :func:`unweave.load` needs and the files do not say. revision: that was listed, None if unknown.
        listed: by whom and when. declared: those facts that no name says, but the format's list of repositories.
    """

    format: str
    repository: str
    place: str = ""
    name: str = ""
    model: str | None = None
    site: str | None = None
    target_site: str | None = None
    layer: int | None = None
    width: int | None = None
    l0: float | None = None
    k: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    revision: str | None = None
    listed: str = ""
    declared: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.name:
            name = self.repository.partition("/")[2] + (f"/{self.place}" if self.place else "")
            object.__setattr__(self, "name", _SUFFIX.sub("", name))

    @property
    def hub_id(self) -> str:
        """``owner/repository/folder``, which :func:`unweave.load` takes as well."""
        return f"{self.repository}/{self.place}" if self.place else self.repository

    def to_dict(self) -> dict[str, Any]:
        """All of it, and for each known fact who says so: a name on the hub, or unweave's list of repositories."""
        said = {fact: "list" if fact in self.declared else "name" for fact in FACTS if getattr(self, fact) is not None}
        values = asdict(self)
        del values["declared"]
        return {"hub_id": self.hub_id, **values, "facts_from": said}


class Lists(Protocol):
    """What the catalogue asks of a format."""

    repositories: ClassVar[Mapping[str, str | None]]

    def named(self, repository: str, file: str) -> Entry | None: ...


KNOWN: dict[str, Lists] = {}  # the registered formats, by name


def number(text: str | None) -> int | None:
    return None if text is None else int(text)


def binary(text: str | None) -> int | None:
    """The power of two that a rounded number is short for: ``16k`` is 16,384, ``65k`` 65,536, ``1m`` 1,048,576."""
    match = re.fullmatch(r"(\d+)([km]?)", text or "")
    if not match:
        return None
    return 2 ** round(math.log2(int(match[1]) * {"": 1, "k": 1e3, "m": 1e6}[match[2]]))
