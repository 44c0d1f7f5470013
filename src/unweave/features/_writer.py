"""Streams items and codes to disk while the tally counts them."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

import numpy as np

from unweave.batch import ActivationBatch
from unweave.codes import SparseCode
from unweave.errors import UnweaveError
from unweave.features._columns import Columns, ColumnWriter
from unweave.features._tally import Block, Tally, token_keys
from unweave.features._tokens import Vocabulary

_BLOCK_ENTRIES = 1 << 20  # codes counted together: large enough to be fast, small enough to be light
_HALF_MAX, _HALF_MIN = 65504.0, 2.0**-14  # the range in which half precision keeps 11 bits

_DTYPES = {
    "tokens": "i4",
    "has_row": "u1",
    "item_offsets": "i8",
    "item_document": "i8",
    "item_start": "i4",
    "code_offsets": "i8",
    "code_indices": "i4",
    "code_values": "f4",
}


class CodeWriter:
    """Appends batches to the columns of a folder; a context manager that closes them.

    The codes of all tokens are kept, a token without a row having none. Values are written in float32 and turned
    into float16 at the end, if all of them fit.
    """

    def __init__(self, folder: Path, tally: Tally | None, vocabulary: Vocabulary | None) -> None:
        self.folder, self.tally, self.vocabulary = folder, tally, vocabulary
        self.n_rows = self.n_tokens = self.n_entries = 0
        self._largest, self._smallest = 0.0, np.inf
        self._columns = {name: ColumnWriter(folder / f"{name}.npy", dtype) for name, dtype in _DTYPES.items()}
        self._columns["item_offsets"].append(np.zeros(1))
        self._columns["code_offsets"].append(np.zeros(1))
        self._waiting: list[tuple[np.ndarray, ...]] = []
        self._n_waiting = 0
        self._counted = 0  # tokens the tally has seen

    def __enter__(self) -> CodeWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._count()
                for column in self._columns.values():
                    column.close()
        finally:
            for column in self._columns.values():
                column.abandon()
        if kind is not None:
            return
        if self._largest <= _HALF_MAX and self._smallest >= _HALF_MIN:
            self._halve()

    def add(self, batch: ActivationBatch, code: SparseCode) -> None:
        """Append a batch and its code, ``(n_rows, n_features)`` on the CPU."""
        code = code.nonzero()
        feature = code.indices.numpy()
        value = code.values.float().numpy()
        if not np.isfinite(value).all():
            raise UnweaveError("the dictionary gave codes that are NaN or infinite: look at its weights and its input")
        items = batch.items
        item_offsets, document, start = items.offsets.numpy(), items.document.numpy(), items.start.numpy()
        tokens, row_token = items.tokens.numpy(), batch.row_token.numpy()
        self._check(batch, item_offsets, document, start, tokens, row_token)
        per_token = np.zeros(len(tokens), "i8")
        per_token[row_token] = np.diff(code.offsets.numpy())
        offsets = np.concatenate([[0], per_token.cumsum()])
        has_row = np.zeros(len(tokens), "u1")
        has_row[row_token] = 1
        self._append(tokens, has_row, item_offsets, document, start, offsets, feature, value)
        self.n_rows += batch.n_rows
        key = token_keys(item_offsets, document, start)
        self._waiting.append((feature, value, offsets, item_offsets, key))
        self._n_waiting += len(feature)
        if self._n_waiting >= _BLOCK_ENTRIES:
            self._count()

    def copy(self, columns: Columns, step: int) -> None:
        """Append the columns of another store, a piece at a time; the tally is not told."""
        base_token, base_entry = self.n_tokens, self.n_entries
        for name, writer in self._columns.items():
            values = columns[name]
            base = {"item_offsets": base_token, "code_offsets": base_entry}.get(name)
            values = values if base is None else values[1:]
            for a in range(0, len(values), step):
                piece = np.asarray(values[a : a + step])
                if name == "code_values":
                    self._measure(piece.astype("f4"))
                writer.append(piece if base is None else piece + base)
        self.n_tokens += len(columns["tokens"])
        self.n_entries += len(columns["code_indices"])

    def _append(
        self,
        tokens: np.ndarray,
        has_row: np.ndarray,
        item_offsets: np.ndarray,
        document: np.ndarray,
        start: np.ndarray,
        offsets: np.ndarray,
        feature: np.ndarray,
        value: np.ndarray,
    ) -> None:
        columns = self._columns
        columns["tokens"].append(tokens)
        columns["has_row"].append(has_row)
        columns["item_offsets"].append(item_offsets[1:] + self.n_tokens)
        columns["item_document"].append(document)
        columns["item_start"].append(start)
        columns["code_offsets"].append(offsets[1:] + self.n_entries)
        columns["code_indices"].append(feature)
        columns["code_values"].append(value)
        self.n_tokens += len(tokens)
        self.n_entries += len(feature)
        self._measure(value)

    def _measure(self, value: np.ndarray) -> None:
        if len(value):
            size = np.abs(value)
            self._largest = max(self._largest, float(size.max()))
            self._smallest = min(self._smallest, float(size.min()))

    def _check(
        self,
        batch: ActivationBatch,
        item_offsets: np.ndarray,
        document: np.ndarray,
        start: np.ndarray,
        tokens: np.ndarray,
        row_token: np.ndarray,
    ) -> None:
        if len(row_token) != batch.n_rows or (
            len(row_token) and (row_token[0] < 0 or row_token[-1] >= len(tokens) or (np.diff(row_token) <= 0).any())
        ):
            raise UnweaveError(f"row_token: expected {batch.n_rows} rising numbers of {len(tokens)} tokens")
        if len(document) and (document.min() < 0 or document.max() >= 2**31 or start.min() < -1):
            raise UnweaveError(
                f"documents: expected numbers from 0 to 2^31 - 1 and starts of -1 (a BOS) or more, found documents "
                f"{document.min()}..{document.max()}, starts from {start.min()}"
            )
        if self.vocabulary is not None:
            self.vocabulary.check(tokens)

    def _count(self) -> None:
        """Hand what waits to the tally as one block of whole items."""
        if self.tally is None or not self._waiting:
            return
        feature, value, offsets, item_offsets, key = zip(*self._waiting)
        n_tokens = sum(map(len, key))
        self.tally.add(
            Block(
                np.concatenate(feature),
                np.concatenate(value),
                _chain(offsets),
                _chain(item_offsets),
                np.concatenate(key),
                self._counted,
            )
        )
        self._waiting, self._n_waiting = [], 0
        self._counted += n_tokens

    def _halve(self) -> None:
        source = self.folder / "code_values.npy"
        values = np.load(source, mmap_mode="r")
        half = ColumnWriter(self.folder / "half.npy", "f2")
        try:
            for a in range(0, len(values), _BLOCK_ENTRIES):
                half.append(values[a : a + _BLOCK_ENTRIES])
        finally:
            half.close()
        del values
        half.path.replace(source)


def _chain(offsets: tuple[np.ndarray, ...]) -> np.ndarray:
    """Offsets of concatenated parts."""
    parts, base = [np.zeros(1, "i8")], 0
    for part in offsets:
        parts.append(part[1:] + base)
        base += int(part[-1])
    return np.concatenate(parts)
