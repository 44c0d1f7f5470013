"""The demo corpus: the prompts of many probing data sets, mixed evenly over kinds of text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from unweave.errors import UnweaveError
from unweave.files import atomic_path
from unweave.progress import track
from unweave.sources.documents import Documents, LoadedDocuments

_RECIPE = 1  # raise it when the texts below would come out differently: the cached copy is keyed by it
_SHORTEST = 40  # characters; shorter prompts (names of people and places, sums) make no context
_LONGEST = 2_000  # characters; of longer prompts a passage is taken, so that a few cannot fill the corpus


@dataclass(frozen=True)
class Kind:
    """A kind of text: its share of the mix (in characters), and the numbers of the data sets it is made of."""

    name: str
    weight: float
    files: frozenset[int]


def _numbers(*parts: int | range) -> frozenset[int]:
    return frozenset(n for part in parts for n in ([part] if isinstance(part, int) else part))


# Kinds whose texts are short (a sentence) get less: many of them make for short contexts. Left out are names and
# titles (2-20, 27-30, 108-109, 114-128, 154-156), too short for a context, and hate speech and obscene requests
# (95, 106, 107), which nobody wants to meet in a demo.
KINDS = (
    Kind("code (C, Python, HTML and others)", 1.0, _numbers(158, 159, 160)),
    Kind("news", 1.0, _numbers(89, 97, 100, range(139, 142), range(161, 164))),
    Kind("headlines", 0.25, _numbers(range(21, 27), 105)),
    Kind("stories and articles", 1.0, _numbers(45)),
    Kind("web pages about people", 1.0, _numbers(range(56, 65))),
    Kind("snippets of papers, patents, law and books", 0.5, _numbers(range(65, 70), range(71, 77), range(78, 86))),
    Kind("mathematics", 0.15, _numbers(37, 38, 70, 77, 129)),
    Kind("medicine", 1.0, _numbers(98, 101, range(142, 148))),
    Kind("reviews", 1.0, _numbers(92, range(111, 114), 157)),
    Kind("essays and machine-written text", 1.0, _numbers(94, 110)),
    Kind("forum posts and everyday morals", 1.0, _numbers(range(48, 53), 99)),
    Kind(
        "questions, answers and inference",
        1.0,
        _numbers(36, range(41, 45), 46, 47, 54, 55, range(86, 89), 90, 91, 93, range(130, 139)),
    ),
    Kind("tweets and text messages", 0.35, _numbers(96, 102, range(148, 151))),
    Kind("support tickets", 0.25, _numbers(103, range(151, 154))),
)
_NEWS_WITH_CODE = range(161, 164)  # their other class (target 0) is code


def mixed_documents(folder: Path, cache: Path, *, identity: str, seed: int, limit: int | None) -> Documents:
    """The documents of the data sets in ``folder``, in an order in which every kind keeps to its share.

    The de-duplicated texts are kept in ``cache`` as one Parquet file, so that only the first call reads the data sets.
    """
    from pyarrow import parquet

    key = hashlib.sha256(f"{identity} {_RECIPE}".encode()).hexdigest()
    path = cache / f"{key[:32]}.parquet"
    if not path.is_file():
        table = _read_all(folder)
        with atomic_path(path) as temporary:
            parquet.write_table(table, temporary, compression="zstd")
    table = parquet.read_table(path)
    texts, kinds = table["text"].combine_chunks(), table["kind"].to_numpy()
    order = _mix(texts, kinds, seed)[:limit]
    return LoadedDocuments(
        (texts[int(i)].as_py() for i in order),
        spec="wheel:sae-probes",
        seed=seed,
        limit=limit,
        shuffle=False,
        fingerprint=key,
        description=_describe(texts, kinds, order, seed),
    )


def _read_all(folder: Path) -> Any:
    """A table of ``text`` and ``kind`` (an index into KINDS), every text once."""
    import pyarrow

    kind_of = {number: index for index, kind in enumerate(KINDS) for number in kind.files}
    files = [
        (int(match[1]), path)
        for path in sorted(folder.glob("cleaned_data/*.csv.zst"))
        if (match := re.match(r"(\d+)_", path.name))
    ]
    if not files:
        raise UnweaveError(f"no data sets in {folder}: expected cleaned_data/*.csv.zst")
    seen: set[str] = set()
    texts: list[str] = []
    kinds: list[int] = []
    with track(len(files), "read the demo texts", unit="files") as progress:
        for number, path in sorted(files):
            progress.advance()
            if number not in kind_of:
                continue
            for prompt, target in _rows(path):
                text = _passage(prompt)
                if len(text) < _SHORTEST or text in seen:
                    continue
                seen.add(text)
                is_code = number in _NEWS_WITH_CODE and target == 0
                texts.append(text)
                kinds.append(kind_of[158 if is_code else number])
    return pyarrow.table(
        {"text": pyarrow.array(texts, pyarrow.large_string()), "kind": pyarrow.array(kinds, pyarrow.int8())}
    )


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    from pyarrow import csv

    with pyarrow.input_stream(str(path), compression="detect") as stream:
        table = csv.read_csv(
            stream,
            parse_options=csv.ParseOptions(newlines_in_values=True),
            convert_options=csv.ConvertOptions(column_types={"prompt": pyarrow.string()}),
        )
    for prompt, target in zip(table["prompt"].to_pylist(), table["target"].to_pylist()):
        yield prompt or "", target


def _passage(text: str) -> str:
    """The text, or of a long one a passage between white space; where it starts depends on the text alone.

    Not the beginning: half of the source files begin with the same licence.
    """
    text = text.strip()
    if len(text) <= _LONGEST:
        return text
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    start = int.from_bytes(digest, "little") % (len(text) - _LONGEST + 1)
    passage = text[start : start + _LONGEST]
    if start and (first := re.search(r"\s", passage[:200])):
        passage = passage[first.end() :]
    return re.sub(r"\S{1,200}$", "", passage).strip() or passage


def _mix(texts: Any, kinds: np.ndarray, seed: int) -> np.ndarray:
    """An order of all texts: each next one is of the kind that is furthest behind its share of characters."""
    import pyarrow.compute

    compute: Any = pyarrow.compute  # its functions are made at run time
    lengths = compute.utf8_length(texts).to_numpy(zero_copy_only=False)
    shuffled = np.random.default_rng(seed).permutation(len(kinds))
    shuffled = shuffled[np.argsort(kinds[shuffled], kind="stable")]
    # Text i of its kind comes when the kind has given (characters before it + half of it) / weight.
    due = np.empty(len(kinds))
    for index, kind in enumerate(KINDS):
        mine = shuffled[kinds[shuffled] == index]
        due[mine] = (np.cumsum(lengths[mine]) - lengths[mine] / 2) / kind.weight
    return np.argsort(due, kind="stable")


def _describe(texts: Any, kinds: np.ndarray, order: np.ndarray, seed: int) -> str:
    counts = np.bincount(kinds[order], minlength=len(KINDS))
    parts = ", ".join(f"{count:,} {kind.name}" for count, kind in zip(counts, KINDS) if count)
    return (
        f"{len(order):,} of {len(texts):,} short, mostly English documents from the data sets in sae-probes, "
        f"no text twice, long ones cut to {_LONGEST:,} characters, mixed with seed {seed}: {parts}"
    )
