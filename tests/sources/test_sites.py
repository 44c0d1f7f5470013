"""Sites are the tensors their names say, in several architectures."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unweave.errors import UnweaveError
from unweave.sources.sites import capture, find_blocks, find_site, list_sites


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=32,
        )
    )  # fmt: skip


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=4, n_positions=32))


def gpt_neox():
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=32,
    )  # fmt: skip
    return GPTNeoXForCausalLM(config)


def gpt_neo():
    from transformers import GPTNeoConfig, GPTNeoForCausalLM

    config = GPTNeoConfig(
        vocab_size=50, hidden_size=16, num_layers=2, num_heads=4, max_position_embeddings=32,
        attention_types=[[["global"], 2]],
    )  # fmt: skip
    return GPTNeoForCausalLM(config)


def opt():
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, ffn_dim=24, num_attention_heads=4,
        max_position_embeddings=32, word_embed_proj_dim=16,
    )  # fmt: skip
    return OPTForCausalLM(config)


def gemma2():
    from transformers import Gemma2Config, Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=4, max_position_embeddings=32,
    )  # fmt: skip
    return Gemma2ForCausalLM(config)


MODELS = [llama, gpt2, gpt_neox, gpt_neo, opt, gemma2]
TOKENS = torch.arange(1, 15).reshape(2, 7)


@pytest.fixture(params=MODELS, ids=lambda make: make.__name__)
def model(request):
    torch.manual_seed(0)
    return request.param().eval()


def read(model, *names):
    found = capture([find_site(model, name) for name in names], lambda: model(input_ids=TOKENS, use_cache=False))
    return {name: rows.reshape(*TOKENS.shape, -1) for name, rows in found.items()}  # OPT's MLP works on (b * t, d)


def test_layers_are_the_hidden_states_of_transformers(model):
    with torch.no_grad():
        states = model(input_ids=TOKENS, output_hidden_states=True, use_cache=False).hidden_states
    n = len(find_blocks(model)[1])
    assert len(states) == n + 1
    for layer in range(n - 1):  # transformers' last hidden state is taken after the final norm
        torch.testing.assert_close(read(model, f"layers.{layer}")[f"layers.{layer}"], states[layer + 1])
    for layer in range(n):
        torch.testing.assert_close(read(model, f"layers.{layer}:input")[f"layers.{layer}:input"], states[layer])


def test_the_last_layer_is_read_before_the_final_norm():
    torch.manual_seed(0)
    model = llama().eval()
    with torch.no_grad():
        last = model(input_ids=TOKENS, output_hidden_states=True).hidden_states[-1]
        before = read(model, "layers.2")["layers.2"]
        torch.testing.assert_close(model.model.norm(before), last)
    assert not torch.allclose(before, last)


def test_a_block_adds_attention_and_mlp_to_the_stream(model):
    if type(model).__name__.startswith("Gemma2"):
        pytest.skip("Gemma 2 has norms between the parts and the stream")
    found = read(model, "layers.1:input", "layers.1.attn", "layers.1.mlp", "layers.1")
    total = found["layers.1:input"] + found["layers.1.attn"] + found["layers.1.mlp"]
    torch.testing.assert_close(total, found["layers.1"])


def test_heads_through_the_output_projection_are_the_attention(model):
    site = find_site(model, "layers.1.attn.heads")
    found = read(model, "layers.1.attn.heads", "layers.1.attn")
    with torch.no_grad():
        torch.testing.assert_close(site.module(found["layers.1.attn.heads"]), found["layers.1.attn"])


def test_every_canonical_site_exists_and_is_read(model):
    names = list_sites(model)
    assert {"layers.0:input", "layers.1.attn", "layers.1.attn.heads", "layers.1.mlp", "layers.1"} <= set(names)
    for name, tensor in read(model, *names).items():
        assert tensor.shape[:2] == TOKENS.shape, name
        assert not tensor.requires_grad


def test_blocks_behind_the_site_are_not_run():
    model = llama().eval()
    ran = []
    for n, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, n=n: ran.append(n))
    model.lm_head.register_forward_hook(lambda *_: ran.append("head"))
    read(model, "layers.1:input")
    assert ran == [0]
    ran.clear()
    read(model, "layers.0", "layers.1.mlp")
    assert ran == [0]  # block 1 was begun, and not ended
    ran.clear()
    model(input_ids=TOKENS)
    assert ran == [0, 1, 2, "head"]


def test_any_module_path_and_paths_inside_a_block():
    torch.manual_seed(0)
    model = llama().eval()
    found = read(model, "model.layers.1.self_attn.q_proj", "layers.1.self_attn.q_proj", "layers.1.mlp.down_proj:input")
    assert torch.equal(found["model.layers.1.self_attn.q_proj"], found["layers.1.self_attn.q_proj"])
    assert found["layers.1.mlp.down_proj:input"].shape[-1] == 24

    net = nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 2))
    x = torch.randn(4, 3)
    sites = [find_site(net, name) for name in ("0", "1", "2:input")]
    found = capture(sites, lambda: net(x))
    assert torch.equal(found["0"], net[0](x))  # not what the ReLU made of it in place
    assert torch.equal(found["1"], net[0](x).relu())
    assert torch.equal(found["2:input"], found["1"])
    assert list_sites(net) == []


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("layers.7", "3 blocks, layers.0 to layers.2"),
        ("layers.1.mpl", "did you mean 'layers.1.mlp'"),
        ("model.layer.1.mlp", "did you mean"),
        ("layers.1:out", "expected 'input'"),
        ("", "no site ''"),
    ],
)
def test_unknown_sites_name_the_near_ones(name, told):
    with pytest.raises(UnweaveError, match=told.replace(".", r"\.").replace("(", r"\(")):
        find_site(llama(), name)


def test_a_site_describes_itself():
    model = llama()
    assert find_site(model, "layers.1").describe() == (
        "the residual stream after block 1 (output of model.layers.1, LlamaDecoderLayer)"
    )
    assert "before block 1" in find_site(model, "layers.1:input").describe()
    assert "before the output projection" in find_site(model, "layers.1.attn.heads").describe()


@pytest.mark.parametrize("name", ["layers.1", "layers.1:input", "layers.1.attn", "layers.1.attn.heads", "layers.1.mlp"])
def test_a_hook_replaces_the_tensor_and_goes_away(model, name):
    site = find_site(model, name)
    with torch.no_grad():
        before = model(input_ids=TOKENS).logits
        with site.hook(lambda tensor: None):
            assert torch.equal(model(input_ids=TOKENS).logits, before)
        with site.hook(lambda tensor: torch.zeros_like(tensor).double()):  # cast back to the model's dtype
            changed = model(input_ids=TOKENS).logits
            assert (changed - before).abs().max() > 1e-6
            assert torch.equal(read(model, name)[name], torch.zeros_like(read(model, name)[name]))
        with pytest.raises(ZeroDivisionError), site.hook(lambda tensor: 1 / 0):
            model(input_ids=TOKENS)
        assert torch.equal(model(input_ids=TOKENS).logits, before)
        with pytest.raises(UnweaveError, match="shape"), site.hook(lambda tensor: tensor[:1]):
            model(input_ids=TOKENS)
    assert not site.module._forward_hooks
    assert not site.module._forward_pre_hooks


def test_replacing_a_block_output_is_seen_by_the_next_block(model):
    noise = torch.randn(2, 7, 16)
    with find_site(model, "layers.0").hook(lambda tensor: tensor + noise):
        found = read(model, "layers.0", "layers.1:input")
    torch.testing.assert_close(found["layers.0"], found["layers.1:input"])
    torch.testing.assert_close(found["layers.1:input"], read(model, "layers.1:input")["layers.1:input"] + noise)


def test_a_site_the_model_never_computes_is_an_error():
    net = nn.Sequential(nn.Linear(3, 3))
    net.unused = nn.Linear(3, 3)  # pyright: ignore
    net.forward = lambda x: net[0](x)
    with pytest.raises(UnweaveError, match="not computed"):
        capture([find_site(net, "unused")], lambda: net(torch.randn(1, 3)))
