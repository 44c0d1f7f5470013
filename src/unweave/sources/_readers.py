"""Reading texts out of files: .txt, .md, .jsonl, .json, .csv, .tsv, .parquet, plain or compressed (.zst, .gz, ...).

Every reader is a generator of non-empty strings and holds little of its file at a time (.json excepted).
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unweave.errors import UnweaveError, near_names
from unweave.sources.chats import CHAT_FIELDS, to_chat

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


@dataclass(frozen=True)
class Reading:
    """What is read out of a record.

    Attributes:
        format: "text" or "chat". fields: the names its field may have, first choice first.
        bare: what a record may be instead of an object with such a field.
        words: what that is, in words.
        to_text: turns the field's value into a text (empty to leave it out), told where it stands.
    """

    format: str
    fields: tuple[str, ...]
    bare: type
    words: str
    to_text: Callable[[Any, str], str]

    @staticmethod
    def of(format: str, field: str) -> Reading:
        """How data of a format ("text" or "chat") is read.

        Dialogues lie under ``field``, or, where that is "text" (which no one calls them), under a usual name.

        Raises:
            UnweaveError: for another format.
        """
        if format == "text":
            return Reading("text", (field,), str, "a text", lambda value, where: _plain(value, field, where))
        if format == "chat":
            return Reading("chat", CHAT_FIELDS if field == "text" else (field,), list, "a list of turns", to_chat)
        raise UnweaveError(f"no data format {format!r}: {near_names(format, ['text', 'chat'])}")

    def field(self, names: Sequence[str], where: str) -> str:
        """The field to read, of those there are."""
        found = next((field for field in self.fields if field in names), None)
        if found is None:
            raise _no_field(where, self.fields, list(names))
        return found

    def of_record(self, record: Any, where: str) -> str:
        if isinstance(record, self.bare):
            return self.to_text(record, where)
        if not isinstance(record, dict):
            wanted = " or ".join(repr(field) for field in self.fields)
            raise UnweaveError(
                f"{where}: expected {self.words} or an object with a field {wanted}, found {type(record).__name__}"
            )
        return self.to_text(record[self.field(list(record), where)], where)


def texts_in(path: Path, reading: Reading) -> Iterator[str]:
    """The non-empty texts (or dialogues) of one file, in order.

    Raises:
        UnweaveError: when the file is binary, not UTF-8, broken, or has no such field (the fields found are listed).
    """
    import pyarrow

    kind = kind_of(path)
    if kind in _TEXT and reading.format != "text":
        raise UnweaveError(f"{path}: dialogues are read from .jsonl, .json, .csv, .tsv or .parquet, not plain text")
    if kind in _TEXT:
        texts = _passages(path)
    elif kind in _LINES:
        texts = _from_json_lines(path, reading)
    elif kind == ".json":
        texts = _from_json(path, reading)
    elif kind in _TABLES:
        texts = _from_csv(path, reading, "\t" if kind == ".tsv" else ",")
    elif kind == ".parquet":
        texts = _from_parquet(path, reading)
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


def _from_json_lines(path: Path, reading: Reading) -> Iterator[str]:
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UnweaveError(f"{path}, line {number}: not valid JSON ({error.msg})") from None
        yield reading.of_record(record, f"{path}, line {number}")


def _from_json(path: Path, reading: Reading) -> Iterator[str]:
    try:
        records = json.loads("".join(_pieces(path)))
    except json.JSONDecodeError as error:
        raise UnweaveError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(records, list):
        wanted = " or ".join(repr(field) for field in reading.fields)
        raise UnweaveError(f"{path}: expected a JSON list of {reading.words} or of objects with a field {wanted}")
    for number, record in enumerate(records):
        yield reading.of_record(record, f"{path}, entry {number}")


def _plain(value: Any, field: str, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UnweaveError(f"{where}: field {field!r} is no text but {type(value).__name__}")
    return value


# ---- tables -----------------------------------------------------------------------------------------------------


def _from_csv(path: Path, reading: Reading, delimiter: str) -> Iterator[str]:
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
    field = reading.field(names, str(path))
    with open_csv(include_columns=[field], column_types={field: pyarrow.string()}) as reader:
        for batch in reader:
            for text in batch.column(0).to_pylist():
                if text and "\0" in text:
                    raise UnweaveError(f"{path} holds binary data (a NUL byte): expected UTF-8 text")
                yield reading.to_text(text, str(path))


def _from_parquet(path: Path, reading: Reading) -> Iterator[str]:
    import pyarrow
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        field = reading.field(file.schema_arrow.names, str(path))
        kind = file.schema_arrow.field(field).type
        is_text = pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
        if reading.format == "text" and not is_text:
            raise UnweaveError(f"{path}: field {field!r} is no text but {kind}")
        for batch in file.iter_batches(batch_size=4096, columns=[field]):
            yield from (reading.to_text(value, str(path)) for value in batch.column(0).to_pylist())


def _no_field(where: str, fields: Sequence[str], names: list[str]) -> UnweaveError:
    found = ", ".join(repr(name) for name in names[:12]) or "none"
    hint = near_names(fields[0], names) if names else ""
    advice = f"; {hint}" if hint.startswith("did you") else ""
    wanted = " or ".join(repr(field) for field in fields)
    return UnweaveError(
        f"{where}: no field {wanted}; fields found: {found}{advice}. Name the field with text_field=..."
    )
