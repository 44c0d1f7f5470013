"""Attribution through attention adds up exactly, on real model classes; and finds what an induction feature reads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from unweave.analysis import (
    AttentionAttribution,
    head_weights,
    recursive_attribution,
    top_features_of_heads,
    trace_attention,
)
from unweave.dictionaries import build
from unweave.errors import UnweaveError
from unweave.interventions import reconstruct, splice
from unweave.sources import LanguageModel

FEATURES = [0, 7, 40]


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,  # grouped queries
        max_position_embeddings=64,
    )
    return _uneven(LlamaForCausalLM(config))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=3, n_head=4, n_positions=64))
    return _uneven(model)


def qwen2():
    """Llama's kind with biases on queries, keys and values."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return _uneven(Qwen2ForCausalLM(config))


def _uneven(model: nn.Module) -> nn.Module:
    """First weights hide mistakes: biases of 0, norms of 1, even attention, and heads of next to nothing."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            elif "wte" not in name and "embed" not in name:
                parameter *= 10
    return model


@pytest.fixture(scope="module", params=[llama, gpt2, qwen2], ids=lambda make: make.__name__)
def model(request) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(request.param().float().requires_grad_(False), None, name=request.param.__name__)


@pytest.fixture(scope="module")
def tokens() -> Tensor:
    return torch.randint(2, 97, (17,), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def trace(model, tokens):
    return trace_attention(model, tokens)


def dictionary_of(seed: int, arch: str = "topk", **options):
    torch.manual_seed(seed)
    dictionary = build(arch, d_in=32, n_features=64, **({"k": 6} | options)).eval()
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return dictionary


@pytest.fixture(scope="module")
def dictionaries():
    return {n: dictionary_of(n) for n in range(3)}


def test_the_trace_is_what_the_model_computes_and_leaves_no_trace(model, trace, tokens):
    clean = model.model(tokens[None]).logits
    implementation = model.model.config._attn_implementation
    for n, layer in enumerate(trace.layers):
        found = model.run_to([f"layers.{n}:input", f"layers.{n}.attn.heads"], tokens[None])
        torch.testing.assert_close(layer.stream, found[f"layers.{n}:input"][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.heads, found[f"layers.{n}.attn.heads"][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.pattern.sum(2), torch.ones(4, 17))
    assert model.model.config._attn_implementation == implementation
    assert torch.equal(model.model(tokens[None]).logits, clean)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.model.modules())
    assert len(trace_attention(model, tokens.tolist(), last_layer=1).layers) == 2


@pytest.mark.parametrize("subtract_bias", [True, False])
def test_a_heads_and_bias_are_the_pre_activation(trace, subtract_bias):
    for n in range(3):
        attribution = AttentionAttribution(trace, n, dictionary_of(n, subtract_bias=subtract_bias))
        expected = attribution.pre_activations()
        for feature in FEATURES:
            for q in (0, 5, -1):
                total = attribution.by_head(feature, q).sum() + attribution.bias(feature)
                torch.testing.assert_close(total, expected[q, feature], rtol=1e-4, atol=1e-5)


def test_b_sources_are_the_same_number_and_nothing_comes_from_behind(trace, dictionaries):
    for n, dictionary in dictionaries.items():
        attribution = AttentionAttribution(trace, n, dictionary)
        for feature in FEATURES:
            for q in (0, 5, 16):
                by_source = attribution.by_source(feature, q)
                assert (by_source[q + 1 :] == 0).all()
                torch.testing.assert_close(by_source.sum(), attribution.by_head(feature, q).sum(), rtol=1e-4, atol=1e-5)
                each = attribution.by_source(feature, q, by_head=True)
                torch.testing.assert_close(each.sum(1), attribution.by_head(feature, q), rtol=1e-4, atol=1e-5)
                assert float(by_source.abs().sum()) > 0.01


def test_c_components_are_the_sources(trace, dictionaries):
    for n, dictionary in dictionaries.items():
        attribution = AttentionAttribution(trace, n, dictionary)
        for feature in FEATURES:
            names, parts = attribution.by_component(feature, 11)
            assert len(names) == len(parts) == len(set(names))
            assert names[0] == "embedding"
            assert ("layers.1.attn.heads.3" in names) == (n == 2)
            torch.testing.assert_close(parts.sum(0), attribution.by_source(feature, 11), rtol=1e-4, atol=1e-5)
            one = attribution.by_component(feature, 11, source=4)
            assert one[0] == names
            torch.testing.assert_close(one[1], parts[:, 4], rtol=1e-5, atol=1e-6)


def test_features_upstream_are_the_attention_component_but_for_bias_and_error(trace, dictionaries):
    """With a dictionary that reconstructs exactly, its features add up to what the attention layer itself adds."""
    exact = build("topk", d_in=32, n_features=64, k=64, subtract_bias=False).eval()
    with torch.no_grad():
        both = torch.cat([torch.eye(32), -torch.eye(32)])
        exact.W_enc.copy_(both)
        exact.W_dec.copy_(both)
    made = {0: AttentionAttribution(trace, 0, exact), 2: AttentionAttribution(trace, 2, dictionaries[2])}
    names, parts = made[2].by_component(7, 11, source=4)
    heads = sum(float(parts[i]) for i, name in enumerate(names) if name.startswith("layers.0.attn.heads."))
    found = made[2].by_feature(7, 11, 4, made)
    assert {layer for layer, _, _ in found} == {0}
    amounts = [float(by_head.sum()) for _, _, by_head in found]
    assert amounts == sorted(amounts, reverse=True)
    assert abs(sum(amounts) - heads) < 1e-4
    assert sum(abs(amount) for amount in amounts) > 0.01


@torch.no_grad()
def test_d_a_splice_with_the_error_term_and_no_edit_changes_nothing(model, tokens, dictionaries):
    clean = model.model(tokens[None]).logits
    for n, dictionary in dictionaries.items():
        with splice(model, f"layers.{n}.attn.heads", reconstruct(dictionary, keep_error=True)):
            kept = model.model(tokens[None]).logits
        assert float((kept - clean).abs().max()) < 1e-5
        with splice(model, f"layers.{n}.attn.heads", reconstruct(dictionary)):
            assert float((model.model(tokens[None]).logits - clean).abs().max()) > 1e-3


def test_e_head_weights_are_shares(dictionaries):
    weights = head_weights(dictionaries[0], 4)
    assert weights.shape == (64, 4)
    torch.testing.assert_close(weights.sum(1), torch.ones(64))
    best = top_features_of_heads(dictionaries[0], 4, n=5)
    assert best.shape == (4, 5)
    assert torch.equal(weights[best[2], 2], weights[:, 2].sort(descending=True).values[:5])
    with pytest.raises(UnweaveError, match="5 equal blocks, found a width of 32"):
        head_weights(dictionaries[0], 5)


def test_f_a_feature_of_one_head_has_weight_1_there():
    dictionary = dictionary_of(0)
    with torch.no_grad():
        dictionary.W_dec[9] = 0
        dictionary.W_dec[9, 16:24] = torch.randn(8)
        dictionary.W_dec[10] = 0
    weights = head_weights(dictionary, 4)
    assert weights[9].tolist() == [0, 0, 1, 0]
    assert weights[10].isnan().all()
    assert int(top_features_of_heads(dictionary, 4, n=1)[2]) == 9


def test_the_tree_is_made_of_the_attributions(trace, dictionaries):
    made = {n: AttentionAttribution(trace, n, dictionary) for n, dictionary in dictionaries.items()}
    fires, _ = made[2].fires(-1)
    root = recursive_attribution(trace, dictionaries, 2, int(fires[0]), -1, n_sources=2, n_features=2)
    assert root.position == 16
    assert root.value != 0
    seen = 0

    def check(node):
        nonlocal seen
        for child in node.children:
            seen += 1
            assert child.layer < node.layer
            assert child.position in [s for s, _ in node.sources]
            parts = made[node.layer].by_feature(node.feature, node.position, child.position, made)
            by_head = next(p for n, i, p in parts if (n, i) == (child.layer, child.feature))
            assert child.contribution == pytest.approx(float(by_head.sum()))
            assert child.head == int(by_head.argmax())
            check(child)

    check(root)
    assert seen >= 2
    assert str(root).count("\n") == seen


def test_what_it_refuses(trace, model, dictionaries, tiny_model):
    with pytest.raises(UnweaveError, match="layers 0 to 2"):
        trace_attention(model, [1, 2], last_layer=3)
    with pytest.raises(UnweaveError, match="at least one token"):
        trace_attention(model, [])
    with pytest.raises(UnweaveError, match="heads of layer 0 are 32 wide, the dictionary takes 16"):
        AttentionAttribution(trace, 0, build("topk", d_in=16, n_features=8, k=2))
    with pytest.raises(UnweaveError, match="'standardised_topk' does something else to its rows first"):
        AttentionAttribution(trace, 0, build("standardised_topk", d_in=32, n_features=8, k=2))
    attribution = AttentionAttribution(trace, 0, dictionaries[0])
    with pytest.raises(UnweaveError, match="no feature 64"):
        attribution.by_head(64, 0)
    with pytest.raises(UnweaveError, match="no position 17"):
        attribution.by_source(0, 17)
    with pytest.raises(UnweaveError, match="no dictionary of layer 1: found 0"):
        recursive_attribution(trace, {0: dictionaries[0]}, 1, 0, 0)


def test_a_model_that_works_otherwise_is_refused(tokens):
    """Gemma 2 has norms behind attention and MLP: the stream is not the sum of what the two put out."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
    )
    torch.manual_seed(0)
    gemma = LanguageModel(Gemma2ForCausalLM(config), None, name="gemma")
    with pytest.raises(UnweaveError, match="works in another way"):
        trace_attention(gemma, tokens)


def test_a_text_gets_its_bos(tiny_model):
    model = LanguageModel.load(str(tiny_model), dtype="float32", device="cpu")
    trace = trace_attention(model, "the cat sees a red house")
    assert trace.tokens.tolist() == [model.bos_id, *model.tokenize("the cat sees a red house")]
