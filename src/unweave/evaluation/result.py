"""Evaluation: the numbers, their intervals, their rivals, and the file they live in."""

from __future__ import annotations

import html
import io
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unweave.errors import UnweaveError
from unweave.evaluation import registry
from unweave.evaluation.bootstrap import Estimate
from unweave.files import read_json, write_json

if TYPE_CHECKING:
    from rich.table import Table

FORMAT = "unweave.evaluation/1"


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` returns.

    Attributes:
        metrics: name to :class:`Estimate` (value, 95 % interval over documents, version of the definition).
        baselines: name of the rival to the same, at the dictionary's L0 (``data["baseline_l0"]``).
        data: what was measured on: split, n_tokens, n_documents, n_rows, n_loss_tokens, fit_rows, fit_from, ...
    """

    metrics: dict[str, Estimate]
    baselines: dict[str, dict[str, Estimate]] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, name: str) -> float:
        """The value of a metric."""
        if name not in self.metrics:
            raise UnweaveError(f"this evaluation holds no {name!r}; it holds {', '.join(self.metrics)}")
        return self.metrics[name].value

    def outdated(self) -> list[str]:
        """Metrics that were measured by another version of their definition than the one installed."""
        known = {name: registry.of(name) for name in self.metrics}
        return [name for name, metric in known.items() if metric and metric.version != self.metrics[name].version]

    # ---- files ------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; a value that is not defined (nan) is null."""
        return {
            "format": FORMAT,
            "data": self.data,
            "metrics": _plain(self.metrics),
            "baselines": {name: _plain(metrics) for name, metrics in self.baselines.items()},
        }

    @classmethod
    def from_dict(cls, values: Any, where: str = "evaluation") -> Evaluation:
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else type(values).__name__
            raise UnweaveError(f"{where} is not of format {FORMAT!r}, found {found!r}")
        try:
            return cls(
                _estimates(values["metrics"]),
                {name: _estimates(metrics) for name, metrics in values["baselines"].items()},
                dict(values["data"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise UnweaveError(f"{where} is damaged: {type(error).__name__} {error}") from None

    def save(self, path: str | Path) -> None:
        """Write ``evaluation.json``."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> Evaluation:
        """Read what ``save`` wrote.

        Raises:
            UnweaveError: for a missing, damaged or foreign file.
        """
        return cls.from_dict(read_json(path), str(path))

    # ---- for people -------------------------------------------------------------------------------------------

    def caption(self) -> str:
        """What was measured on, in one line."""
        d = self.data
        parts = [f"{d.get('n_rows', 0):,} rows of {d.get('n_documents', 0):,} documents"]
        if d.get("split"):
            parts[0] += f" ({d['split']})"
        if d.get("n_loss_tokens"):
            parts.append(f"loss on {d['n_loss_tokens']:,} tokens")
        if self.baselines:
            parts.append(f"baselines use {d.get('baseline_l0')} numbers a row, fitted on {d.get('fit_from')}")
        parts.append("95 % intervals over documents")
        parts += [f"{label}: {name}" for label, name in d.get("parts", {}).items()]
        if note := d.get("note"):
            parts.append(note)
        if old := self.outdated():
            parts.append(f"measured by an older definition: {', '.join(old)}")
        return "; ".join(parts)

    def table(self) -> Table:
        """A rich table: one metric a line, the baselines beside the dictionary."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), caption=self.caption())
        table.caption_justify = "left"
        for column in self._header():
            table.add_column(column, no_wrap=True, justify="left" if column == "metric" else "right")
        for row in self._rows():
            table.add_row(*row)
        return table

    def __repr__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=120, color_system=None).print(self.table())
        return text.getvalue().rstrip()

    def __rich__(self) -> Table:
        return self.table()

    def _repr_html_(self) -> str:
        def line(cells: list[str], tag: str) -> str:
            return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

        body = "".join(line(row, "td") for row in self._rows())
        return f"<table><caption>{html.escape(self.caption())}</caption>{line(self._header(), 'th')}{body}</table>"

    def _header(self) -> list[str]:
        return ["metric", "value", "95 % interval", *self.baselines]

    def _rows(self) -> list[list[str]]:
        arrows = {"low": " ↓", "high": " ↑", "": ""}
        rows = []
        for name, value in self.metrics.items():
            metric = registry.of(name)
            arrow = arrows[metric.better] if metric else ""
            others = [metrics[name].shown if name in metrics else "" for metrics in self.baselines.values()]
            rows.append([name + arrow, value.shown, value.interval, *others])
        return rows


def _plain(metrics: dict[str, Estimate]) -> dict[str, dict[str, Any]]:
    def number(x: float) -> float | None:
        return float(x) if math.isfinite(x) else None

    return {
        name: {"value": number(e.value), "low": number(e.low), "high": number(e.high), "version": e.version}
        for name, e in metrics.items()
    }


def _estimates(metrics: dict[str, dict[str, Any]]) -> dict[str, Estimate]:
    def number(x: float | None) -> float:
        return math.nan if x is None else float(x)

    return {
        name: Estimate(number(e["value"]), number(e["low"]), number(e["high"]), int(e["version"]))
        for name, e in metrics.items()
    }
