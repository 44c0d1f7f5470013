from __future__ import annotations

import random

import pytest

from unweave.errors import UnweaveError
from unweave.features._tokens import Vocabulary, decode_tokens


def test_a_character_cut_over_tokens_is_shown_on_its_first():
    emoji = "🦊".encode()
    assert decode_tokens([b"a", emoji[:1], emoji[1:3], emoji[3:] + b"!", b"b"]) == ["a", "🦊", "", "!", "b"]
    assert decode_tokens([b"caf\xc3", b"\xa9 au lait"]) == ["café", " au lait"]


def test_joined_tokens_are_the_text_whatever_the_cuts():
    rng = random.Random(0)
    text = "naïve 🦊👩‍👩‍👧 snow❄ 日本語 e\u0301 \n\tend".encode()
    broken = bytes(rng.randrange(256) for _ in range(300))
    for whole in (text, text[1:-1], broken, text[5:] + b"\xf0\x9f" + text, b"\xf0\x9f"):
        for _ in range(50):
            cuts = sorted(rng.sample(range(len(whole) + 1), min(len(whole), rng.randrange(1, 20))))
            pieces = [whole[a:b] for a, b in zip([0, *cuts], [*cuts, len(whole)])]
            tokens = decode_tokens(pieces)
            assert len(tokens) == len(pieces)
            assert "".join(tokens) == whole.decode("utf-8", errors="replace")


def test_a_token_alone_shows_its_bytes_when_they_are_no_text():
    vocabulary = Vocabulary.of([b" cat", b"\xf0\x9f", b""])
    assert [vocabulary.label(i) for i in range(3)] == [" cat", "<F0 9F>", ""]


def test_tokens_outside_the_vocabulary_are_refused(planted, tmp_path):
    import torch

    from unweave.features import build_features

    dictionary = planted.dictionary(torch.ones(1, 1))
    batch = planted.batch([(0, 0, [7], [0])])
    with pytest.raises(UnweaveError, match="token 7, but token_bytes has only 2"):
        build_features(tmp_path / "f", dictionary, [batch], token_bytes=[b"a", b"b"])
    assert list(tmp_path.iterdir()) == []
