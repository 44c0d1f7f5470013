"""Reading texts out of files: .txt, .md, .jsonl, .json, .csv, .tsv, .parquet, plain or compressed (.zst, .gz, ...).

Every reader is a generator of non-empty strings and holds little of its file at a time (.json excepted).
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from unweave.errors import UnweaveError, near_names

_COMPRESSED = (".zst", ".gz", ".bz2", ".lz4")
_TEXT = (".txt", ".md")
_LINES = (".jsonl", ".ndjson")
_TABLES = (".csv", ".tsv")
SUFFIXES = (*_TEXT, *_LINES, ".json", *_TABLES, ".parquet")

# A text file is cut into passages: at the first blank line after the first of these numbers of characters, or at
# the first line end after the second.
_PASSAGE, _LONG_PASSAGE = 2_000, 4_000


def kind_of(path: Path) -> str | None:
    """The suffix that says how to read a file, without ``.zst`` and the like; None for files of no known kind."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in SUFFIXES else None


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in (*_COMPRESSED, ".parquet")


def texts_in(path: Path, field: str) -> Iterator[str]:
    """The non-empty texts of one file, in order.

    Raises:
        UnweaveError: when the file is binary, not UTF-8, broken, or has no such field (the fields found are listed).
    """
    import pyarrow

    kind = kind_of(path)
    if kind in _TEXT:
        texts = _passages(path)
    elif kind in _LINES:
        texts = _from_json_lines(path, field)
    elif kind == ".json":
        texts = _from_json(path, field)
    elif kind in _TABLES:
        texts = _from_csv(path, field, "\t" if kind == ".tsv" else ",")
    elif kind == ".parquet":
        texts = _from_parquet(path, field)
    else:
        raise UnweaveError(f"{path}: expected a file of one of the kinds {', '.join(SUFFIXES)} (also .zst, .gz)")
    try:
        yield from (clean(text) for text in texts if text.strip())
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UnweaveError(
            f"cannot read {path}: {reason}. It may be damaged, cut short, or not what it is named"
        ) from None


def clean(text: str) -> str:
    """Without lone surrogates (half an emoji, escaped in JSON), which are no Unicode text: tokenizers refuse them."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


# ---- plain text -------------------------------------------------------------------------------------------------


def _pieces(path: Path) -> Iterator[str]:
    """The decoded contents in pieces of about a megabyte."""
    import pyarrow

    decode = codecs.getincrementaldecoder("utf-8-sig")()
    seen = 0
    with pyarrow.input_stream(str(path), compression="detect") as stream:
        while True:
            block = stream.read(1 << 20)
            if b"\0" in block:
                raise UnweaveError(
                    f"{path} holds binary data (a NUL byte at byte {seen + block.index(0):,}): expected UTF-8 text"
                )
            try:
                yield decode.decode(block, final=not block)
            except UnicodeDecodeError as error:
                raise UnweaveError(
                    f"{path} is not UTF-8 text (near byte {seen + error.start:,}: {error.reason}). "
                    "Convert it, for example with: iconv -t utf-8"
                ) from None
            seen += len(block)
            if not block:
                return


def _lines(path: Path) -> Iterator[str]:
    rest = ""
    for piece in _pieces(path):
        *lines, rest = (rest + piece).split("\n")
        yield from (line.removesuffix("\r") for line in lines)
    if rest:
        yield rest


def _passages(path: Path) -> Iterator[str]:
    lines: list[str] = []
    length = 0
    for line in _lines(path):
        if (length >= _PASSAGE and not line.strip()) or length >= _LONG_PASSAGE:
            yield "\n".join(lines).strip("\n")
            lines, length = [], 0
        lines.append(line)
        length += len(line) + 1
    yield "\n".join(lines).strip("\n")


# ---- JSON -------------------------------------------------------------------------------------------------------


def _from_json_lines(path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UnweaveError(f"{path}, line {number}: not valid JSON ({error.msg})") from None
        yield _text_of(record, field, f"{path}, line {number}")


def _from_json(path: Path, field: str) -> Iterator[str]:
    try:
        records = json.loads("".join(_pieces(path)))
    except json.JSONDecodeError as error:
        raise UnweaveError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(records, list):
        raise UnweaveError(f"{path}: expected a JSON list of texts or of objects with a field {field!r}")
    for number, record in enumerate(records):
        yield _text_of(record, field, f"{path}, entry {number}")


def _text_of(record: Any, field: str, where: str) -> str:
    if isinstance(record, str):
        return record
    if not isinstance(record, dict):
        raise UnweaveError(
            f"{where}: expected a text or an object with a field {field!r}, found {type(record).__name__}"
        )
    if field not in record:
        raise _no_field(where, field, list(record))
    text = record[field]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise UnweaveError(f"{where}: field {field!r} is no text but {type(text).__name__}")
    return text


# ---- tables -----------------------------------------------------------------------------------------------------


def _from_csv(path: Path, field: str, delimiter: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import csv

    def open_csv(**convert: Any) -> Any:
        return csv.open_csv(
            pyarrow.input_stream(str(path), compression="detect"),
            read_options=csv.ReadOptions(block_size=1 << 24),
            parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
            convert_options=csv.ConvertOptions(**convert),
        )

    with pyarrow.input_stream(str(path), compression="detect") as stream:
        if not stream.read(1):
            return
    with open_csv() as reader:
        names = reader.schema.names
    if field not in names:
        raise _no_field(str(path), field, names)
    with open_csv(include_columns=[field], column_types={field: pyarrow.string()}) as reader:
        for batch in reader:
            for text in batch.column(0).to_pylist():
                if text and "\0" in text:
                    raise UnweaveError(f"{path} holds binary data (a NUL byte): expected UTF-8 text")
                yield text or ""


def _from_parquet(path: Path, field: str) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if field not in names:
            raise _no_field(str(path), field, names)
        kind = file.schema_arrow.field(field).type
        if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise UnweaveError(f"{path}: field {field!r} is no text but {kind}")
        for batch in file.iter_batches(batch_size=4096, columns=[field]):
            yield from (text or "" for text in batch.column(0).to_pylist())


def _no_field(where: str, field: str, names: list[str]) -> UnweaveError:
    found = ", ".join(repr(name) for name in names[:12]) or "none"
    hint = near_names(field, names) if names else ""
    advice = f"; {hint}" if hint.startswith("did you") else ""
    return UnweaveError(
        f"{where}: no field {field!r}; fields found: {found}{advice}. Name the field with text_field=..."
    )
