"""Documents from every kind of file, in an order that depends on the seed alone."""

from __future__ import annotations

import gzip
import json
import sys
import types

import pyarrow
import pytest
from pyarrow import csv, parquet

from unweave.errors import UnweaveError
from unweave.sources import documents as room
from unweave.sources.documents import Documents, read_documents

TEXTS = [f"document {n}, with a comma,\nan end of line and a café ☕" for n in range(40)]


def write(path, name):
    path = path / name
    table = pyarrow.table({"text": TEXTS, "n": list(range(40))})
    lines = "".join(json.dumps({"text": t, "n": n}) + "\n" for n, t in enumerate(TEXTS))
    if name.endswith(".parquet"):
        parquet.write_table(table, path)
    elif name.endswith(".csv"):
        csv.write_csv(table, path)
    elif name.endswith(".csv.zst"):
        with pyarrow.output_stream(str(path), compression="zstd") as stream:
            csv.write_csv(table, stream)
    elif name.endswith(".jsonl"):
        path.write_text(lines, encoding="utf-8")
    elif name.endswith(".jsonl.gz"):
        path.write_bytes(gzip.compress(lines.encode()))
    elif name.endswith(".jsonl.zst"):
        with pyarrow.output_stream(str(path), compression="zstd") as stream:
            stream.write(lines.encode())
    elif name.endswith(".json"):
        path.write_text(json.dumps([{"text": t} for t in TEXTS[:20]] + TEXTS[20:]), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "name", ["a.parquet", "a.csv", "a.csv.zst", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "A.JSONL"]
)
def test_every_kind_of_file(tmp_path, name):
    path = write(tmp_path, name) if name != "A.JSONL" else write(tmp_path, "a.jsonl").rename(tmp_path / name)
    read = read_documents(path, seed=3)
    assert list(read) == list(read)
    assert sorted(read) == sorted(TEXTS)
    assert list(read) != TEXTS
    assert len(read) == 40
    assert read[7] == list(read)[7]
    assert "40 documents" in read.describe()
    assert name in read.describe()
    assert list(read_documents(path, seed=3, limit=5)) == list(read)[:5]
    assert list(read_documents(path, seed=4)) != list(read)


def test_fingerprint_is_of_the_contents(tmp_path):
    path = write(tmp_path, "a.jsonl")
    fingerprint = read_documents(path, seed=0).fingerprint()
    assert fingerprint == read_documents(path, seed=1).fingerprint()
    assert len(fingerprint) == 64
    path.write_text(path.read_text("utf-8").replace("document 7", "document 8"), encoding="utf-8")
    assert read_documents(path).fingerprint() != fingerprint
    assert Documents.from_texts(TEXTS).fingerprint() != Documents.from_texts(TEXTS[1:]).fingerprint()


def test_text_files_are_cut_at_blank_lines(tmp_path):
    paragraphs = [f"Paragraph {n}. " + "word " * 100 for n in range(20)]
    (tmp_path / "book.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    passages = list(read_documents(tmp_path / "book.txt"))
    assert len(passages) > 3
    assert all(1_000 <= len(p) <= 4_500 for p in passages)
    assert sorted("\n\n".join(passages).split()) == sorted("\n\n".join(paragraphs).split())
    assert all(p.startswith("Paragraph") for p in passages)

    (tmp_path / "log.txt").write_text("\r\n".join(["a line without end " * 5] * 500), encoding="utf-8")
    assert all(len(p) < 4_200 and "\r" not in p for p in read_documents(tmp_path / "log.txt"))


def test_a_character_across_read_blocks_is_kept(tmp_path):
    text = "a" + "é" * 1_200_000  # two bytes each: a block border of 1 MiB falls inside one
    (tmp_path / "long.txt").write_text(text, encoding="utf-8")
    assert list(read_documents(tmp_path / "long.txt")) == [text]


def test_a_folder_is_read_at_any_depth(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    (tmp_path / "deep" / "er" / "a.txt").write_text("one")
    (tmp_path / "b.txt").write_text("two")
    (tmp_path / ".hidden" / "c.txt").write_text("three")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    assert sorted(read_documents(tmp_path)) == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "contents", "told"),
    [
        ("a.jsonl", b"", "is empty"),
        ("a.csv", b"", "is empty"),
        ("a.txt", b" \n \n", "is empty"),
        ("a.jsonl", b'{"text": ""}\n', "is empty"),
        ("a.txt", b"abc\0def", "binary data .a NUL byte at byte 3"),
        ("a.txt", "caf\u00e9".encode("latin-1"), "not UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "line 2: not valid JSON"),
        ("a.jsonl", b'{"body": "a", "title": "b"}\n', "no field 'text'; fields found: 'body', 'title'"),
        ("a.jsonl", b'{"texts": "a"}\n', "did you mean 'texts'"),
        ("a.jsonl", b'{"text": 5}\n', "field 'text' is no text but int"),
        ("a.jsonl", b"5\n", "expected a text or an object"),
        ("a.json", b'{"text": "a"}', "expected a JSON list"),
        ("a.json", b'[{"text": "a"', "not valid JSON"),
        ("a.csv", b"body,title\na,b\n", "no field 'text'; fields found: 'body', 'title'"),
        ("a.csv", b"text\na\xff\n", "cannot read .*UTF8"),
        ("a.parquet", b"not a parquet file", "cannot read .*a.parquet"),
        ("a.jsonl.zst", b"not zstd at all", "cannot read .*a.jsonl.zst"),
        ("a.pdf", b"%PDF", r"expected a file of one of the kinds .*found .pdf"),
    ],
)
def test_bad_files_get_one_clear_error(tmp_path, name, contents, told):
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(UnweaveError, match=told):
        read_documents(tmp_path / name)


def test_bad_places_get_one_clear_error(tmp_path):
    with pytest.raises(UnweaveError, match="there is no such file or folder"):
        read_documents(tmp_path / "nowhere.jsonl")
    with pytest.raises(UnweaveError, match="found no files"):
        read_documents(tmp_path)
    (tmp_path / "a.png").write_bytes(b"x")
    with pytest.raises(UnweaveError, match=r"expected .txt.*found .png"):
        read_documents(tmp_path)
    with pytest.raises(UnweaveError, match="limit must be at least 1"):
        Documents.from_texts(TEXTS, limit=0)
    with pytest.raises(UnweaveError, match="found int at place 1"):
        Documents.from_texts(["a", 5])  # pyright: ignore
    with pytest.raises(UnweaveError, match="put it in a list"):
        Documents.from_texts("a text")
    parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "n.parquet")
    with pytest.raises(UnweaveError, match="no text but int64"):
        read_documents(tmp_path / "n.parquet")


def test_lone_surrogates_do_not_reach_the_tokenizer(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "half \\ud83d an emoji"}\n')
    assert list(read_documents(tmp_path / "a.jsonl")) == ["half ? an emoji"]


def test_large_data_is_streamed_in_bounded_memory(tmp_path, monkeypatch):
    for n in range(3):
        lines = "".join(json.dumps({"text": f"{n} {i} {TEXTS[i]}"}) + "\n" for i in range(40))
        (tmp_path / f"{n}.jsonl").write_text(lines, encoding="utf-8")
    loaded = sorted(read_documents(tmp_path))
    monkeypatch.setattr(room, "_LOADED_BYTES", 1000)
    monkeypatch.setattr(room, "_BUFFER_DOCUMENTS", 30)
    streamed = read_documents(tmp_path, seed=0)
    assert not hasattr(streamed, "__len__")
    first = list(streamed)
    assert sorted(first) == loaded
    assert list(streamed) == first
    assert first != list(read_documents(tmp_path, seed=1))
    assert len({text[0] for text in first[:40]}) > 1  # files are mixed where the buffer spans them
    assert list(read_documents(tmp_path, seed=0, limit=7)) == first[:7]
    assert "streamed" in streamed.describe()
    monkeypatch.setattr(room, "_BUFFER_CHARACTERS", 200)  # long documents bound the buffer too
    assert sorted(read_documents(tmp_path, seed=0)) == loaded
    fingerprint = streamed.fingerprint()
    (tmp_path / "2.jsonl").write_text('{"text": "other"}\n')
    assert read_documents(tmp_path, seed=0).fingerprint() != fingerprint


def test_hub_data_sets(monkeypatch):
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        if name == "owner/missing":
            raise FileNotFoundError("no such data set")
        return [{"text": t, "n": 1} for t in [*TEXTS, "", None]]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, __spec__="here"))
    read = read_documents("owner/name:en", seed=0)
    assert sorted(read) == sorted(TEXTS)
    assert list(read) == list(read)
    assert asked == [("owner/name", "en", "train", True)]
    assert list(read_documents("owner/name", limit=3, seed=0)) == list(read)[:3]
    with pytest.raises(UnweaveError, match="no such data set"):
        read_documents("owner/missing")
    with pytest.raises(UnweaveError, match="no text in 'body'; fields found: 'text', 'n'"):
        read_documents("owner/name", text_field="body")


def test_without_the_datasets_package_the_error_says_so():
    import importlib.util

    if importlib.util.find_spec("datasets"):
        pytest.skip("the datasets package is installed")
    with pytest.raises(UnweaveError, match=r"pip install 'unweave\[hub\]'"):
        read_documents("owner/name")
