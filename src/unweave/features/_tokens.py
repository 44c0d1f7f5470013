"""Tokens as text: a character cut over several tokens is shown whole, on the first of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from unweave.errors import UnweaveError


class Vocabulary:
    """The bytes of every token id, in two columns: all bytes joined, and where each token starts."""

    def __init__(self, data: np.ndarray, offsets: np.ndarray) -> None:
        self.data, self.offsets = data, offsets
        self.label = lru_cache(maxsize=1 << 16)(self._label)

    @classmethod
    def of(cls, token_bytes: Sequence[bytes]) -> Vocabulary:
        lengths = [len(b) for b in token_bytes]
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype("i8")
        return cls(np.frombuffer(b"".join(token_bytes), "u1"), offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def bytes_of(self, token: int) -> bytes:
        return self.data[self.offsets[token] : self.offsets[token + 1]].tobytes()

    def _label(self, token: int) -> str:
        """One token alone: its text, or its bytes in hexadecimal where they are part of a character."""
        raw = self.bytes_of(token)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "<" + " ".join(f"{b:02X}" for b in raw) + ">"

    def check(self, tokens: np.ndarray) -> None:
        """Raises UnweaveError when a token id is not in the vocabulary."""
        if len(tokens) and int(tokens.max()) >= len(self):
            raise UnweaveError(
                f"the data holds token {int(tokens.max())}, but token_bytes has only {len(self)} entries: give the "
                "vocabulary of the tokenizer the data was made with"
            )


def token_label(vocabulary: Vocabulary | None, token: int) -> str:
    """One token alone, for lists of tokens."""
    return vocabulary.label(token) if vocabulary is not None else f"⟨{token}⟩"


def decode_tokens(pieces: Sequence[bytes]) -> list[str]:
    """Text of each token, so that ``"".join`` of them is the text of all bytes together.

    A character whose bytes are spread over several tokens goes to the token its first byte is in; the others are
    "" (unless they hold more). Bytes that are no UTF-8 become U+FFFD.

    >>> decode_tokens([b"caf", b"\\xc3", b"\\xa9!"])
    ['caf', 'é', '!']
    """
    try:
        return [piece.decode("utf-8") for piece in pieces]
    except UnicodeDecodeError:
        pass
    owner = [i for i, piece in enumerate(pieces) for _ in piece]
    whole, out, at = b"".join(pieces), [""] * len(pieces), 0
    while at < len(whole):
        try:
            good, end, resume = whole[at:].decode("utf-8"), len(whole), len(whole)
        except UnicodeDecodeError as error:
            good, end, resume = whole[at : at + error.start].decode("utf-8"), at + error.start, at + error.end
        for character in good:
            out[owner[at]] += character
            at += len(character.encode("utf-8"))
        if end < resume:
            out[owner[end]] += "�"
        at = resume
    return out
