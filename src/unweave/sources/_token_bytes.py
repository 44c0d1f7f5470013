"""The bytes each token of a vocabulary stands for."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any


def token_bytes(tokenizer: Any, n_vocabulary: int) -> list[bytes]:
    """Per id below ``n_vocabulary`` the bytes of the token.

    Byte-level BPE tokens are mapped back to raw bytes, so a character split over tokens comes together again when
    they are joined. SentencePiece tokens turn ``▁`` into a space and ``<0x0A>`` into its byte (so the first word of a
    text gets a space before it); WordPiece tokens get a space where a word begins. Special and added tokens
    stand for their name, ids without a token for ``<id N>``.
    """
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    convert = _CONVERTERS[_style(tokenizer, tokens)]
    found = []
    for index in range(max(n_vocabulary, len(tokenizer))):
        if index in added:
            found.append(added[index].encode())
        elif index in tokens:
            found.append(convert(tokens[index]))
        else:
            found.append(f"<id {index}>".encode())
    return found


def _style(tokenizer: Any, tokens: dict[int, str]) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        pipeline = json.loads(backend.to_str())
        text = json.dumps([pipeline.get("pre_tokenizer"), pipeline.get("decoder")])
        for marker, style in (("ByteLevel", "bytes"), ("WordPiece", "wordpiece")):
            if f'"type": "{marker}"' in text:
                return style
        return "sentencepiece"
    return "bytes" if any(token.startswith("Ġ") for token in tokens.values()) else "sentencepiece"


def _from_byte_level(token: str) -> bytes:
    table = _byte_of_character()
    try:
        return bytes(table[character] for character in token)
    except KeyError:  # not written in the byte alphabet
        return token.encode()


def _from_sentencepiece(token: str) -> bytes:
    if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):
        return bytes([int(match[1], 16)])
    return token.replace("▁", " ").encode()


def _from_wordpiece(token: str) -> bytes:
    return token[2:].encode() if token.startswith("##") else f" {token}".encode()


_CONVERTERS = {"bytes": _from_byte_level, "sentencepiece": _from_sentencepiece, "wordpiece": _from_wordpiece}


@cache
def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the rest for the characters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    table = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in printable]
    return table | {chr(256 + n): byte for n, byte in enumerate(others)}
