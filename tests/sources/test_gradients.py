"""Gradients beside the rows: those of the model's loss by each activation, whatever is batched together."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from unweave.activations import harvest
from unweave.batch import Items
from unweave.errors import UnweaveError
from unweave.sources import LanguageModel, TextSites, TextSource, _running

OPTIONS = {"context_size": 24, "batch_tokens": 200, "side": "gradient", "max_norm_ratio": None}


def load(folder, dtype="float32") -> LanguageModel:
    return LanguageModel.load(str(folder), dtype=dtype, device="cpu")


def by_place(source: TextSource) -> dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]:
    """Row and gradient by document and position."""
    found = {}
    for batch in source.batches():
        meta = batch.meta
        for i in range(batch.n_rows):
            found[int(meta.document[i]), int(meta.position[i])] = batch.input[i], batch.side[i]
    return found


def loss_of(model: LanguageModel, tokens: torch.Tensor) -> torch.Tensor:
    """Summed over a context that is alone, as simply as it can be written."""
    return F.cross_entropy(model.model(tokens[None]).logits[0, :-1].double(), tokens[1:], reduction="sum")


@pytest.mark.parametrize("site", ["layers.1", "layers.2:input", "layers.0.mlp", "layers.3.attn.heads"])
def test_it_is_the_derivative_of_the_loss(model, texts, site):
    """Against autograd on each context alone, through a value added at the site."""
    batches = TextSource(model, texts, site, keep_special=True, **OPTIONS).batches()
    batch = next(b for b in batches if b.items.offsets.diff().unique().numel() > 1)  # one with padding
    assert batch.side.shape == batch.input.shape
    for i in range(0, len(batch.items), 3):
        tokens = batch.items[i : i + 1].tokens.long()
        added = torch.zeros(1, len(tokens), batch.input.shape[1], requires_grad=True)
        with model.site(site).hook(lambda tensor, added=added: tensor + added):
            (expected,) = torch.autograd.grad(loss_of(model, tokens), added)
        mine = batch.side[batch.items.item_of_token == i]
        torch.testing.assert_close(mine, expected[0], rtol=1e-4, atol=1e-5)
        assert float(expected.abs().max()) > 1e-3


@pytest.mark.parametrize("kind", ["GPT2", "OPT", "GPTNeoX", "Gemma2"])
def test_other_models_too(kind):
    """Parts that work in place or on flattened rows, parallel blocks, capped logits."""
    import transformers

    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"intermediate_size": 24, "max_position_embeddings": 32}
    special = {
        "GPT2": {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 32, "vocab_size": 50},
        "OPT": {**sizes, "ffn_dim": 24, "word_embed_proj_dim": 16},
        "Gemma2": {**sizes, "num_key_value_heads": 2, "head_dim": 4, "final_logit_softcapping": 1.0},
    }
    config = getattr(transformers, f"{kind}Config")(**special.get(kind, sizes))
    name = {"GPT2": "GPT2LMHeadModel"}.get(kind, f"{kind}ForCausalLM")
    torch.manual_seed(0)
    model = LanguageModel(getattr(transformers, name)(config), None, name=kind)
    lengths = torch.tensor([0, 9, 14])
    items = Items(torch.randint(3, 50, (14,)).int(), lengths, torch.arange(2), torch.zeros(2).int())
    sites = [model.site(name) for name in ("layers.0", "layers.1.mlp", "layers.1")]
    rows, gradients = _running.run_with_gradients(model, sites[:1], sites, items)
    assert list(rows) == ["layers.0"]
    torch.testing.assert_close(rows["layers.0"], _running.run_items(model, sites, items)["layers.0"])
    for i in range(2):
        tokens = items[i : i + 1].tokens.long()
        for site in sites:
            added = torch.zeros(len(tokens), 16, requires_grad=True)
            with site.hook(lambda tensor, added=added: tensor + added.reshape(tensor.shape)):
                (expected,) = torch.autograd.grad(loss_of(model, tokens), added)
            torch.testing.assert_close(
                gradients[site.name][lengths[i] : lengths[i + 1]], expected, rtol=1e-4, atol=1e-5
            )


def test_a_small_step_against_it_lowers_the_loss_by_as_much(model, texts):
    batch = next(TextSource(model, texts, "layers.1", keep_special=True, **OPTIONS).batches())
    tokens, g = batch.items[:1].tokens.long(), batch.side[batch.items.item_of_token == 0]
    with torch.no_grad():
        before = loss_of(model, tokens)
        with model.site("layers.1").hook(lambda tensor: tensor - 1e-3 * g):
            after = loss_of(model, tokens)
    assert float(before - after) == pytest.approx(1e-3 * float(g.square().sum()), rel=0.05)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_context_has_its_gradient_whatever_it_is_batched_with(tiny_model, texts, monkeypatch, dtype):
    model = load(tiny_model, dtype)
    whole = by_place(TextSource(model, texts, "layers.1", **OPTIONS))
    one_by_one = by_place(TextSource(model, texts, "layers.1", **{**OPTIONS, "batch_tokens": 24}))
    monkeypatch.setattr(_running, "_LOGIT_BYTES", 4 * model.n_vocabulary * 24 * 2)  # two contexts at a time
    monkeypatch.setattr(_running, "_CHUNK_BYTES", 4 * model.n_vocabulary * 7)
    in_pieces = by_place(TextSource(model, texts, "layers.1", **OPTIONS))
    assert whole.keys() == one_by_one.keys() == in_pieces.keys()
    tolerance = 1e-6 if dtype == "float32" else 0.01  # measured: 2e-8, and 1e-3 where bfloat16 rounds otherwise
    for others in (one_by_one, in_pieces):
        wrong = torch.stack([whole[place][1].float() - others[place][1].float() for place in whole])
        size = torch.stack([whole[place][1].float() for place in whole]).norm()
        assert float(wrong.norm() / size) < tolerance
    assert next(iter(whole.values()))[1].dtype == model.dtype


def test_rows_are_those_of_the_unmodified_model(model, texts):
    plain = TextSource(model, texts, "layers.1", **{**OPTIONS, "side": None})
    for found, expected in zip(TextSource(model, texts, "layers.1", **OPTIONS).batches(), plain.batches(), strict=True):
        torch.testing.assert_close(found.input, expected.input, rtol=1e-5, atol=1e-6)
        assert torch.equal(found.row_token, expected.row_token)
    assert not any(p.requires_grad or p.grad is not None for p in model.model.parameters())


def test_the_last_token_of_a_context_predicts_nothing(model, texts):
    batch = next(TextSource(model, texts, "layers.1", keep_special=True, **OPTIONS).batches())
    zero = (batch.side == 0).all(1)
    last = torch.zeros_like(zero)
    last[batch.items.offsets[1:] - 1] = True
    assert torch.equal(zero, last)


def test_the_target_and_every_part_of_it_have_theirs(model, texts):
    options = {**OPTIONS, "target_site": "layers.1..2"}
    joined = TextSource(model, texts, "layers.0.mlp:input", **options)
    assert (joined.d_in, joined.d_out, joined.d_side) == (32, 64, 64)
    assert joined.provenance["side"] == "gradient"
    first, second = (TextSource(model, texts, f"layers.{n}", **OPTIONS) for n in (1, 2))
    for batch, a, b in zip(joined.batches(), first.batches(), second.batches(), strict=True):
        torch.testing.assert_close(batch.side, torch.cat([a.side, b.side], 1), rtol=1e-4, atol=1e-6)


def test_several_sites_from_one_pass(model, texts, tmp_path):
    sites = ["layers.0", "layers.2.mlp"]
    group = TextSites(model, texts, sites, **OPTIONS)
    stores = harvest(group, {site: tmp_path / site for site in sites}, n_rows=300)
    for site, store in stores.items():
        alone = harvest(TextSource(model, texts, site, **OPTIONS), tmp_path / "alone" / site, n_rows=300)
        torch.testing.assert_close(store.sides(slice(None)), alone.sides(slice(None)), rtol=1e-4, atol=1e-6)


def test_what_has_no_gradient_is_refused(tiny_model, model, texts):
    with pytest.raises(UnweaveError, match="side: expected 'gradient', 'previous' or None, found 'hessian'"):
        TextSource(model, texts, "layers.1", side="hessian")
    with pytest.raises(UnweaveError, match="gradients in float16 underflow"):
        TextSource(load(tiny_model, "float16"), texts, "layers.1", side="gradient")
