"""Many similar paths in few words: ``layer_{0..25}/width_{16k,65k}/params.npz`` stands for 52 of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from itertools import product

_BRACES = re.compile(r"\{([^{}]*)\}")


def expand(pattern: str) -> Iterator[str]:
    """The paths that a pattern stands for, in order."""
    pieces = _BRACES.split(pattern)
    choices = [list(_members(piece)) if i % 2 else [piece] for i, piece in enumerate(pieces)]
    return ("".join(chosen) for chosen in product(*choices))


def _members(inside: str) -> Iterator[str]:
    for member in inside.split(","):
        run = re.fullmatch(r"(\d+)\.\.(\d+)", member)
        yield from map(str, range(int(run[1]), int(run[2]) + 1)) if run else (member,)


def compress(paths: Iterable[str]) -> list[str]:
    """Patterns that stand for these paths and no others; a path with braces in it is left out."""
    # A path is cut into words; two groups of paths that differ in one word only become one, word by word from the end.
    groups: set[tuple[tuple[str, ...], ...]] = set()
    groups |= {tuple((word,) for word in _words(path)) for path in paths if not re.search("[{},]", path)}
    for length in {len(group) for group in groups}:
        for slot in reversed(range(length)):
            merged: dict[tuple, set[str]] = {}
            for group in [g for g in groups if len(g) == length]:
                groups.remove(group)
                merged.setdefault((group[:slot], group[slot + 1 :]), set()).update(group[slot])
            for (before, after), words in merged.items():
                groups.add((*before, tuple(sorted(words, key=_order)), *after))
    return sorted("".join(_braces(words) for words in group) for group in groups)


def _words(path: str) -> list[str]:
    return re.findall(r"\d+|[A-Za-z]+|[^A-Za-z\d]", path)


def _order(word: str) -> tuple[int, int, str]:
    return (0, int(word), word) if word.isdigit() else (1, 0, word)


def _braces(words: tuple[str, ...]) -> str:
    if len(words) == 1:
        return words[0]
    runs: list[list[str]] = []
    for word in words:
        if runs and _plain(word) and _plain(runs[-1][-1]) and int(runs[-1][-1]) + 1 == int(word):
            runs[-1].append(word)
        else:
            runs.append([word])
    return "{" + ",".join(f"{r[0]}..{r[-1]}" if len(r) > 2 else ",".join(r) for r in runs) + "}"


def _plain(word: str) -> bool:
    return word.isdigit() and str(int(word)) == word


def natural(path: str) -> list[tuple[int, str]]:
    """A key to sort by: layer 2 comes before layer 10."""
    return [(int(word), "") if word.isdecimal() else (-1, word) for word in re.split(r"(\d+)", path)]
