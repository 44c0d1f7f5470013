"""One progress bar for everything that takes more than two seconds: rate, elapsed, time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Progress:
    """What :func:`track` yields: ``advance(n)`` and, for a live note after the bar, ``note(text)``."""

    def __init__(self, total: int | None, description: str, unit: str) -> None:
        self.total, self.description, self.unit = total, description, unit
        self.done = 0
        self.started = time.monotonic()
        self._bar: Any = None
        self._task: Any = None
        self._note = ""
        self._next_line = 30.0

    @property
    def rate(self) -> float:
        """Units per second since the start."""
        return self.done / max(time.monotonic() - self.started, 1e-9)

    def advance(self, n: int = 1) -> None:
        self.done += n
        self._show()

    def note(self, text: str) -> None:
        self._note = text
        if self._bar is not None:
            self._bar.update(self._task, note=text)

    def _show(self) -> None:
        elapsed = time.monotonic() - self.started
        if not sys.stderr.isatty():
            # A log file gets a line every half minute instead of a bar.
            if elapsed >= self._next_line:
                self._next_line += 30.0
                share = f" ({self.done / self.total:.0%})" if self.total else ""
                line = f"{self.description}: {self.done:,} {self.unit}{share}, {self.rate:,.0f}/s {self._note}"
                print(line.rstrip(), file=sys.stderr, flush=True)
            return
        if self._bar is None and elapsed > 0.5:
            self._open()
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, rate=f"{self.rate:,.0f} {self.unit}/s")

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=Console(stderr=True),
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task(self.description, total=self.total, rate="", note=self._note)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()


@contextmanager
def track(total: int | None, description: str, unit: str = "rows") -> Iterator[Progress]:
    """``with track(n, "harvest") as progress: progress.advance(k)``. Silent for what ends within half a second."""
    progress = Progress(total, description, unit)
    try:
        yield progress
    finally:
        progress.close()
