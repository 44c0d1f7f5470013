"""Mixes of data sets, and data without near copies."""

from __future__ import annotations

import random
from itertools import islice

import numpy as np
import pytest

from unweave.errors import UnweaveError
from unweave.sources import DistinctDocuments, Documents, MixedDocuments
from unweave.sources.chats import turns
from unweave.sources.mixing import _Seen


def words(*numbers: int) -> str:
    return " ".join(f"w{n}" for n in numbers)


def texts(name: str, n: int, length: int) -> Documents:
    return Documents.from_texts([f"{name}{i} " + "x" * (length - len(f"{name}{i} ")) for i in range(n)], spec=name)


# ---- de-duplication -----------------------------------------------------------------------------------------------


def test_five_dialogues_of_which_two_go():
    """The oracle, worked out by hand for 20-grams."""

    def dialogue(*contents: str) -> list[dict[str, str]]:
        return [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]

    given = [
        dialogue(words(*range(30)), words(*range(100, 130))),  # kept: the first
        dialogue("other " + words(*range(5, 25)), "short"),  # 20 words in a row of the first: dropped
        dialogue(words(*range(19)), words(*range(100, 119))),  # 19 in a row, in both turns: kept
        dialogue(words(*range(11, 30)), words(100, *range(200, 240))),  # 19 of the first, a turn's end between: kept
        dialogue("x " + words(*range(205, 225))),  # 20 of the fourth's second turn: dropped
    ]
    documents = Documents.from_chats(given, shuffle=False)
    distinct = DistinctDocuments(documents, 20)
    assert [turns(chat) for chat in distinct] == [given[i] for i in (0, 2, 3)]
    assert [turns(chat) for chat in distinct] == [given[i] for i in (0, 2, 3)]  # now from memory
    assert "2 left out" in distinct.describe()
    assert [turns(chat) for chat in DistinctDocuments(documents, 19)] == [given[i] for i in (0, 4)]


def test_what_was_dropped_does_not_count_as_seen():
    given = [words(*range(25)), words(*range(10, 60)), words(*range(40, 90))]
    assert list(DistinctDocuments(Documents.from_texts(given, shuffle=False), 10)) == [given[0], given[2]]


def test_against_sets_of_tuples():
    rng = random.Random(0)
    given = [words(*(rng.randint(0, 12) for _ in range(rng.randint(1, 40)))) for _ in range(400)]
    seen: set[tuple[str, ...]] = set()
    expected = []
    for text in given:
        parts = text.split()
        grams = {tuple(parts[i : i + 4]) for i in range(len(parts) - 3)}
        if not grams & seen:
            seen |= grams
            expected.append(text)
    documents = Documents.from_texts(given, shuffle=False)
    assert list(DistinctDocuments(documents, 4)) == expected
    assert 20 < len(expected) < 380
    assert list(DistinctDocuments(documents, 4, limit=9)) == expected[:9]


def test_a_pass_left_early_forgets_nothing():
    given = [words(*range(30)), words(*range(30)), words(*range(50, 80))]
    distinct = DistinctDocuments(Documents.from_texts(given, shuffle=False), 20)
    assert list(islice(distinct, 1)) == given[:1]
    assert list(distinct) == [given[0], given[2]]


def test_scripts_without_spaces_have_words_too():
    sentence = "这是一个很长的句子它没有任何空格但是它有很多汉字"
    distinct = DistinctDocuments(Documents.from_texts([sentence, "前" + sentence], shuffle=False), 20)
    assert len(list(distinct)) == 1


def test_the_set_of_numbers():
    rng = np.random.default_rng(0)
    ours, theirs = _Seen(), set()
    for _ in range(200):
        numbers = np.unique(rng.integers(0, 20_000, size=int(rng.integers(0, 60))).astype(np.uint64))
        assert ours.any_of(numbers) == bool(theirs & set(numbers.tolist()))
        new = numbers[[n not in theirs for n in numbers.tolist()]] if len(numbers) else numbers
        ours.add(new)
        theirs |= set(new.tolist())
    assert sum(map(len, ours._runs)) == len(theirs)
    assert len(ours._runs) < 15


# ---- mixing -------------------------------------------------------------------------------------------------------


def test_a_mix_keeps_its_shares_of_text_all_along():
    parts = [texts("a", 300, 40), texts("b", 300, 400), texts("c", 300, 100)]
    mix = MixedDocuments(parts, [2, 1, 1])
    assert list(mix) == list(mix)
    given = {"a": 0, "b": 0, "c": 0}
    for text in mix:
        given[text[0]] += len(text)
        total = sum(given.values())
        assert abs(given["a"] - total / 2) <= 400  # never further off than the longest document
        assert abs(given["b"] - total / 4) <= 400
        if given["a"] == 300 * 40:
            break  # it has ended; the others go on without it
    assert sorted(mix) == sorted(text for part in parts for text in part)  # a pass gives every document once
    assert list(MixedDocuments(parts, [2, 1, 1], limit=7)) == list(mix)[:7]


def test_a_mix_says_what_it_is():
    parts = [texts("a", 3, 40), texts("b", 3, 40)]
    mix = MixedDocuments(parts, [3, 1], seed=5)
    assert mix.seed == 5
    assert mix.spec == "a=3, b=1"
    assert mix.describe().startswith("a mix of 75% 3 documents")
    assert mix.fingerprint() == MixedDocuments(parts, [3, 1]).fingerprint()
    others = [MixedDocuments(parts, [3, 2]), MixedDocuments(parts[::-1], [3, 1]), DistinctDocuments(mix, 20)]
    assert len({mix.fingerprint(), *(other.fingerprint() for other in others)}) == 4


def test_wrong_mixes():
    a, chat = texts("a", 3, 40), Documents.from_chats([[{"role": "user", "content": "hi"}]])
    with pytest.raises(UnweaveError, match="weights above 0, found 1, 0"):
        MixedDocuments([a, a], [1, 0])
    with pytest.raises(UnweaveError, match="a weight for each"):
        MixedDocuments([a], [1, 2])
    with pytest.raises(UnweaveError, match="of texts or of dialogues"):
        MixedDocuments([a, chat], [1, 1])
    with pytest.raises(UnweaveError, match="at least 1 word"):
        DistinctDocuments(a, 0)
