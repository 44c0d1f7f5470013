"""TextSource: rows are what the model computes for each context alone, whoever asks, wherever one starts."""

from __future__ import annotations

import itertools

import pytest
import torch

from unweave.errors import UnweaveError
from unweave.sources import Documents, LanguageModel, TextSource
from unweave.sources._contexts import is_held_out


@pytest.fixture(scope="module")
def texts(documents) -> Documents:
    return Documents.from_texts(documents[:70], seed=1)


def source(model, texts, site="layers.1", **options) -> TextSource:
    return TextSource(model, texts, site, **{"context_size": 24, "batch_tokens": 200, **options})


def count_runs(model) -> tuple[list[int], object]:
    """Appends the number of sequences of every forward pass."""
    runs: list[int] = []
    handle = model.model.model.embed_tokens.register_forward_hook(lambda m, args, out: runs.append(len(args[0])))
    return runs, handle


def equal(a, b) -> bool:
    items = all(
        torch.equal(getattr(a.items, name), getattr(b.items, name))
        for name in ("tokens", "offsets", "document", "start")
    )
    return items and torch.equal(a.input, b.input) and torch.equal(a.row_token, b.row_token)


def test_rows_equal_those_of_each_context_alone(model, texts):
    """Packing and padding do not change a row."""
    lengths = set()
    for batch in source(model, texts).batches():
        padded = batch.items.offsets.diff()
        lengths.add((int(padded.min()), int(padded.max())))
        assert len(padded) * int(padded.max()) <= 200
        row = 0
        for i in range(len(batch.items)):
            tokens = batch.items[i : i + 1].tokens.long()[None]
            alone = model.run_to("layers.1", tokens)["layers.1"][0]
            mine = (batch.items.item_of_token[batch.row_token] == i).sum()
            assert mine == len(alone) - 1  # all but BOS
            torch.testing.assert_close(batch.input[row : row + mine], alone[1:], rtol=1e-5, atol=1e-5)
            row += int(mine)
        assert row == batch.n_rows
    assert any(low < high for low, high in lengths)  # some batch was padded


def test_items_hold_the_documents_tokens(model, texts):
    """Positions count the document's tokens from 0, and every token of a long enough piece is there once."""
    seen: dict[tuple[int, int], int] = {}
    for batch in source(model, texts, split="all").batches():
        assert (batch.items.tokens[batch.items.offsets[:-1]] == model.bos_id).all()
        assert ((batch.items.start == -1) | (batch.items.start % 23 == 22)).all()
        meta = batch.meta
        for document, position, token in zip(meta.document.tolist(), meta.position.tolist(), meta.token.tolist()):
            assert (document, position) not in seen
            seen[document, position] = token
    for number, text in enumerate(texts):
        ids = model.tokenize(text)
        rest = len(ids) % 23
        expected = ids[: len(ids) - rest] if rest < 8 else ids
        found = [seen.pop((number, position), None) for position in range(len(expected))]
        assert found == expected
    assert not seen


@pytest.mark.parametrize("skip", [0, 1, 2, 5, 1000])
def test_skipping_gives_the_same_batches_bit_for_bit(model, texts, skip):
    whole = list(source(model, texts).batches())
    assert len(whole) > 10
    rest = list(source(model, texts).batches(skip=skip))
    assert len(rest) == max(0, len(whole) - skip)
    assert all(equal(a, b) for a, b in zip(whole[skip:], rest))


def test_skipping_does_not_run_the_model(model, texts):
    n = len(list(source(model, texts).batches()))
    runs, handle = count_runs(model)
    list(source(model, texts, max_norm_ratio=None).batches(skip=n - 2))
    assert len(runs) == 2
    runs.clear()
    list(source(model, texts).batches(skip=n - 2))
    assert len(runs) == 3  # and the first batch once, for the reference norm
    handle.remove()


def test_seeds_change_the_order_only(model, documents):
    def tokens(seed):
        batches = source(model, Documents.from_texts(documents[:40], seed=seed)).batches()
        return [model.token_strings(b.items.tokens) for b in batches]

    a, b = tokens(1), tokens(2)
    assert a != b
    assert sorted(itertools.chain(*a)) == sorted(itertools.chain(*b))


def test_batches_mix_lengths_and_documents(model, texts):
    means = [float(b.items.offsets.diff().float().mean()) for b in source(model, texts).batches()]
    assert means != sorted(means)
    assert means != sorted(means, reverse=True)
    # The pieces of one document lie in several batches.
    batches_of = {}
    for n, batch in enumerate(source(model, texts).batches()):
        for document in batch.items.document.tolist():
            batches_of.setdefault(document, set()).add(n)
    assert max(len(found) for found in batches_of.values()) >= 3


def test_target_site(model, texts):
    transcoder = source(model, texts, "layers.1.mlp:input", target_site="layers.1.mlp")
    batch = next(transcoder.batches())
    torch.testing.assert_close(model.model.model.layers[1].mlp(batch.input), batch.target)
    assert (transcoder.d_in, transcoder.d_out) == (32, 32)
    assert source(model, texts, "layers.1.mlp.down_proj:input").d_in == 64
    same = next(source(model, texts).batches())
    assert same.target is same.input


def test_special_rows(model, texts):
    plain = source(model, texts)
    batch = next(plain.batches())
    assert not torch.isin(batch.meta.token, torch.tensor([0, 1], dtype=torch.int32)).any()
    assert plain.dropped["special"] == len(batch.items)
    kept = next(source(model, texts, keep_special=True).batches())
    assert kept.n_rows == kept.items.n_tokens == batch.n_rows + len(batch.items)
    none = next(source(model, texts, bos=False).batches())
    assert none.n_rows == none.items.n_tokens
    assert int(none.items.start.min()) == 0
    assert source(model, texts, bos=False).provenance["bos"] is False


def test_special_tokens_inside_a_text_give_no_row(model):
    text = "the cat sees <eos> the river and buys snow"
    made = source(model, [text], split="all")
    batch = next(made.batches())
    assert 1 in batch.items.tokens
    assert 1 not in batch.meta.token
    assert made.dropped["special"] == 2


def test_high_norm_rows_are_dropped_wherever_one_resumes(model, texts):
    """One token's rows are made abnormally long, as attention sinks are."""
    sink = model.tokenize("the cat")[-1]
    weight = model.model.model.embed_tokens.weight
    before = weight[sink].clone()
    weight[sink] *= 1000
    try:
        filtered = source(model, texts)
        whole = list(filtered.batches())
        dropped = dict(filtered.dropped)
        everything = list(source(model, texts, max_norm_ratio=None).batches())
        reference = filtered.provenance["reference_norms"]["layers.1"]
        resumed = list(source(model, texts).batches(skip=3))
    finally:
        weight[sink] = before
    for kept, all_rows in zip(whole, everything):
        norms = all_rows.input.norm(dim=1)
        assert torch.equal(kept.row_token, all_rows.row_token[norms <= 10 * reference])
        assert kept.items.n_tokens == all_rows.items.n_tokens
    assert dropped["high_norm"] == sum(b.n_rows for b in everything) - sum(b.n_rows for b in whole) > 0
    assert all(equal(a, b) for a, b in zip(whole[3:], resumed))
    first = everything[0].input.norm(dim=1)
    assert reference == pytest.approx(float(first.median()), rel=0.05)
    assert source(model, texts, max_norm_ratio=None).provenance["reference_norms"] == {}


def test_the_high_norm_filter_looks_at_targets_too(model, texts):
    with model.site("layers.2").hook(lambda x: torch.cat([x[:, :5], 1000 * x[:, 5:6], x[:, 6:]], dim=1)):
        made = source(model, texts, "layers.1", target_site="layers.2", batch_tokens=100)
        for batch in made.batches():
            assert (batch.target.norm(dim=1) < 100).all()
        assert made.dropped["high_norm"] > 0


def test_split_is_one_in_twenty_and_goes_by_the_text(model, documents):
    many = Documents.from_texts([f"{text} {n}" for n in range(4) for text in documents], seed=0)
    split = {
        name: {int(d) for b in source(model, many, split=name, batch_tokens=4000).plan.batches() for d in
               (c.document for c in b)}
        for name in ("train", "held_out", "all")
    }  # fmt: skip
    assert split["train"] | split["held_out"] == split["all"]
    assert not split["train"] & split["held_out"]
    assert 0.02 < len(split["held_out"]) / len(split["all"]) < 0.09
    assert all(is_held_out(many[d]) for d in split["held_out"])


def test_max_tokens_is_never_passed(model, texts):
    made = source(model, texts, max_tokens=500)
    n = sum(batch.items.n_tokens for batch in made.batches())
    assert 500 - 24 <= n <= 500


def test_provenance_is_json_and_tells_settings_apart(model, texts):
    import json

    provenance = source(model, texts).provenance
    assert json.loads(json.dumps(provenance)) == provenance
    assert provenance == source(model, texts).provenance
    assert provenance["model"]["sha256"] == model.sha256
    assert provenance["data"]["fingerprint"] == texts.fingerprint()
    for change in ({"context_size": 20}, {"split": "all"}, {"site": "layers.2"}, {"bos": False}, {"max_tokens": 400}):
        assert source(model, texts, **change).provenance != provenance
    assert "layers.1" in repr(source(model, texts))


def test_bfloat16_rows(tiny_model, texts):
    model = LanguageModel.load(str(tiny_model), device="cpu")
    batch = next(source(model, texts).batches())
    assert batch.input.dtype == torch.bfloat16
    assert not batch.input.requires_grad
    assert not batch.input.is_inference()  # one can train on it


def test_bad_settings_are_refused(model, texts):
    for options, told in [
        ({"context_size": 1}, "context_size: expected 2 to 256"),
        ({"context_size": 512}, "context_size: expected 2 to 256"),
        ({"min_tokens": 30}, "min_tokens=30"),
        ({"split": "test"}, "no split 'test'"),
        ({"max_norm_ratio": 0.5}, "max_norm_ratio"),
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"bos": "yes"}, "bos: expected"),
        ({"site": "layers.9"}, "4 blocks"),
        ({"target_site": "layers.0.mpl"}, "did you mean"),
    ]:
        with pytest.raises(UnweaveError, match=told):
            source(model, texts, **options)
    with pytest.raises(UnweaveError, match="no text to run the model on"):
        next(source(model, ["too short"], split="all").batches())


def test_a_tokenizer_without_bos(model, texts):
    import copy

    tokenizer = copy.deepcopy(model.tokenizer)
    tokenizer.bos_token = None
    other = LanguageModel(model.model, tokenizer, name="no bos")
    batch = next(source(other, texts).batches())
    assert 0 not in batch.items.tokens
    with pytest.raises(UnweaveError, match="has no BOS"):
        source(other, texts, bos=True)
