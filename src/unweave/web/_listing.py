"""The feature list's state: what its address asks for, kept within what the store can answer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import urlencode

LIMIT = 50
SORTS = {
    "density": "density",
    "max_value": "largest value",
    "mean_value": "mean value",
    "relative": "share of the second part",
    "index": "number",
}
_STEPS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


@dataclass(frozen=True)
class ListView:
    """What of the list is shown."""

    q: str = ""
    sort: str = "density"
    descending: bool = True
    min_density: float | None = None
    max_density: float | None = None
    dead: bool = False
    page: int = 1
    limit: int = LIMIT
    problems: list[str] = field(default_factory=list)
    second: str = ""  # of rows of two parts what the second is called
    origins: bool = False  # whether atoms are rows of the data

    @classmethod
    def of(cls, query: Mapping[str, str], store: Any) -> ListView:
        """Read an address leniently: what makes no sense is left out and said so in ``problems``."""
        problems: list[str] = []

        def share(name: str, words: str) -> float | None:
            text = query.get(name, "").strip()
            if not text:
                return None
            try:
                number = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
            except ValueError:
                number = math.nan
            if not 0 <= number <= 1:
                problems.append(f"The {words} density must lie between 0 and 1 (or 0% and 100%), found {text!r}.")
                return None
            return number

        sort = query.get("sort") or "density"
        if sort not in SORTS or sort not in store.sort_keys:
            problems.append(f"The list cannot be sorted by {sort!r}; it is sorted by density.")
            sort = "density"
        low, high = share("min_density", "lowest"), share("max_density", "highest")
        if low is not None and high is not None and low > high:
            problems.append("The lowest density is above the highest one, so nothing can match.")
        page = query.get("page", "1")
        order = query.get("order") or "desc"
        return cls(
            q=query.get("q", "")[:200].strip("\r\n"),
            sort=sort,
            descending=order != "asc",
            min_density=low,
            max_density=high,
            dead=query.get("dead") in ("1", "true", "on"),
            page=max(1, int(page)) if page.isdecimal() and len(page) < 10 else 1,
            problems=problems,
            second=store.part_labels[1] if "relative" in store.sort_keys else "",
            origins="origin_document" in store.columns,
        )

    @property
    def sorts(self) -> list[tuple[str, str]]:
        """What the list can be sorted by, with its name."""
        return [(key, text) for key, text in SORTS.items() if key != "relative" or self.second]

    @property
    def offset(self) -> int:
        return (self.page - 1) * self.limit

    @property
    def sort_label(self) -> str:
        return SORTS[self.sort]

    @property
    def filtered(self) -> bool:
        return bool(self.q.strip()) or self.min_density is not None or self.max_density is not None

    def pages(self, total: int) -> int:
        return max(1, math.ceil(total / self.limit))

    def ask(self, store: Any) -> Any:
        """The store's page of this view."""
        return store.list(
            sort=self.sort,
            descending=self.descending,
            search=self.q.strip() or None,
            min_density=self.min_density,
            max_density=self.max_density,
            include_dead=self.dead,
            offset=self.offset,
            limit=self.limit,
        )

    def link(self, **changes: Any) -> str:
        """The address of this view with some things changed; anything but a page number goes back to page one."""
        view = replace(self, **{"page": 1, **changes})
        pairs = {
            "q": view.q,
            "sort": view.sort if view.sort != "density" else "",
            "order": "" if view.descending else "asc",
            "min_density": "" if view.min_density is None else f"{view.min_density:.6g}",
            "max_density": "" if view.max_density is None else f"{view.max_density:.6g}",
            "dead": "1" if view.dead else "",
            "page": str(view.page) if view.page > 1 else "",
        }
        query = urlencode({k: v for k, v in pairs.items() if v})
        return f"/features?{query}" if query else "/features"

    # ---- what the form and the table head offer ---------------------------------------------------------------

    @property
    def min_choices(self) -> list[tuple[Any, str]]:
        return self._choices(self.min_density)

    @property
    def max_choices(self) -> list[tuple[Any, str]]:
        return self._choices(self.max_density)

    def _choices(self, chosen: float | None) -> list[tuple[Any, str]]:
        steps: set[float] = {*_STEPS} if chosen is None else {*_STEPS, chosen}
        return [("", "any")] + [(step, f"{100 * step:.4g}%") for step in sorted(steps)]

    @property
    def heads(self) -> list[Head]:
        columns = [("index", "Feature", "num idx"), ("density", "Density", "num dens"), ("max_value", "Max", "num max")]
        if self.second:
            columns.append(("relative", f"In {self.second}", "num rel"))
        heads = [self._head(key, text, css) for key, text, css in columns]
        about = Head("The row it is", "tops") if self.origins else Head("Tokens it fires on", "tops")
        return [*heads, about, Head("Strongest context", "snippet")]

    def _head(self, key: str, text: str, css: str) -> Head:
        if key == self.sort:
            order = "descending" if self.descending else "ascending"
            return Head(text, css, self.link(descending=not self.descending), order)
        return Head(text, css, self.link(sort=key, descending=key != "index"), "none")


@dataclass(frozen=True)
class Head:
    """One table head; ``order`` is its ``aria-sort``, empty for a column that does not sort."""

    text: str
    css: str
    href: str = ""
    order: str = ""
