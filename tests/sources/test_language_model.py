"""Loading models, their tokens, and what directions write."""

from __future__ import annotations

import importlib.util
import shutil

import pytest
import torch

from unweave.errors import UnweaveError
from unweave.sources import LanguageModel


def test_facts(model, tiny_model):
    assert (model.n_layers, model.d_model, model.dtype, model.device.type) == (4, 32, torch.float32, "cpu")
    assert not model.model.training
    assert not any(p.requires_grad for p in model.model.parameters())
    assert model.bos_id == 0
    assert {0, 1} <= model.special_ids
    assert model.max_context == 256
    assert model.provenance["name"] == str(tiny_model)
    assert len(model.provenance["sha256"]) == 64
    assert "4 layers" in repr(model)
    assert len(model.sites()) == 20
    assert model.width("layers.1.attn.heads") == 32
    assert model.width("layers.1.mlp.down_proj:input") == 64


def test_sha256_tells_weights_apart(model, tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "same")
    same = LanguageModel.load(str(tmp_path / "same"), dtype="float32", device="cpu")
    assert same.sha256 == model.sha256
    for parameter in same.model.parameters():  # as a fine-tune does
        parameter.add_(1e-3)
    same.model.save_pretrained(tmp_path / "same")
    assert LanguageModel.load(str(tmp_path / "same"), device="cpu").sha256 != model.sha256


def test_run_to_gives_each_site(model):
    tokens = torch.tensor([[0, 5, 6, 7]])
    found = model.run_to(["layers.2", "layers.0.mlp"], tokens)
    assert set(found) == {"layers.2", "layers.0.mlp"}
    states = model.model(tokens, output_hidden_states=True).hidden_states
    torch.testing.assert_close(found["layers.2"], states[3])
    torch.testing.assert_close(model.run_to("layers.2", tokens)["layers.2"], states[3])


def test_bfloat16_stays_bfloat16(tiny_model):
    model = LanguageModel.load(str(tiny_model), device="cpu")
    assert model.dtype == torch.bfloat16
    assert model.run_to("layers.1", torch.tensor([[0, 5]]))["layers.1"].dtype == torch.bfloat16


def test_tokenize_adds_nothing_and_warns_of_nothing(model, caplog):
    ids = model.tokenize("the cat sees snow. " * 200)
    assert model.bos_id not in ids
    assert len(ids) > model.max_context
    assert not caplog.records
    assert model.tokenize_many(["the cat", "a sailor"]) == [model.tokenize("the cat"), model.tokenize("a sailor")]


@pytest.mark.parametrize(
    "text", ["the café 🎉🦊 sings\n\tof snow ❄ and 漢字", " leading and trailing ", "\x00\x7f\xa0é"]
)
def test_token_bytes_join_to_the_text(model, text):
    table = model.token_bytes()
    ids = model.tokenize(text)
    assert b"".join(table[i] for i in ids).decode() == text
    assert table[model.bos_id] == b"<bos>"
    assert len(table) == model.n_vocabulary


def test_an_emoji_is_split_over_tokens(model):
    ids = model.tokenize("🦊")
    assert len(ids) > 1
    assert all("�" in part for part in model.token_strings(ids))


def test_token_bytes_of_sentencepiece_and_wordpiece():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from unweave.sources._token_bytes import token_bytes

    vocabulary = {"<unk>": 0, "▁the": 1, "<0x0A>": 2, "▁": 3, "é": 4, "<0xF0>": 5}
    piece = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    piece.pre_tokenizer = pre_tokenizers.Metaspace()
    piece.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=piece, unk_token="<unk>")
    assert token_bytes(fast, 7) == [b"<unk>", b" the", b"\n", b" ", "é".encode(), b"\xf0", b"<id 6>"]

    word = Tokenizer(models.WordPiece({"[UNK]": 0, "sing": 1, "##ing": 2}, unk_token="[UNK]"))
    word.decoder = decoders.WordPiece()
    fast = PreTrainedTokenizerFast(tokenizer_object=word, unk_token="[UNK]")
    assert token_bytes(fast, 3) == [b"[UNK]", b" sing", b"ing"]


# ---- unembed ----------------------------------------------------------------------------------------------------


def random_model(kind, **options):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=40, **options)
    names = (f"{kind}ForCausalLM", f"{kind}LMHeadModel")
    model = next(getattr(transformers, name) for name in names if hasattr(transformers, name))(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_f" in name:
                parameter.normal_(0.5, 1.0)
    return LanguageModel(model, tokenizer=None, name=kind)


SMALL = {"num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 8, "max_position_embeddings": 16}
UNEMBEDS = {
    "Llama": lambda m: (m.model.norm.weight, False),
    "Gemma2": lambda m: (1 + m.model.norm.weight, False),
    "GPT2": lambda m: (m.transformer.ln_f.weight, True),
    "GPTNeoX": lambda m: (m.gpt_neox.final_layer_norm.weight, True),
}


@pytest.mark.parametrize("kind", UNEMBEDS)
@pytest.mark.parametrize("d", [12, 15])
def test_unembed_uses_the_linear_part_of_the_final_norm(kind, d):
    if kind == "GPT2":
        model = random_model(kind, n_embd=d, n_layer=2, n_head=3, n_positions=16)
    elif kind == "Gemma2":
        model = random_model(kind, hidden_size=d, head_dim=4, num_key_value_heads=3, **SMALL)
    else:
        options = {"num_key_value_heads": 3} if kind == "Llama" else {}
        width = d if kind == "Llama" else 12  # NeoX needs an even rotary width
        model = random_model(
            kind, hidden_size=width, **({**SMALL, "head_dim": 4} if kind == "Llama" else SMALL), **options
        )
    scale, centred = UNEMBEDS[kind](model.model)
    directions = torch.randn(5, model.d_model)
    rows = directions - directions.mean(1, keepdim=True) if centred else directions
    expected = (rows * scale) @ model.model.get_output_embeddings().weight.T
    logits = model.unembed(directions)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_unembed_predicts_the_change_of_the_logits(model):
    """A step along a direction (across the stream, so that its norm stays) moves the logits as unembed says."""
    from unweave.sources.sites import find_site

    tokens = torch.tensor([[0, 5, 6, 7, 8]])
    stream = model.run_to("layers.3", tokens)["layers.3"][0, -1]
    direction = torch.randn(32, generator=torch.Generator().manual_seed(0))
    direction -= (direction @ stream) / (stream @ stream) * stream
    small = 1e-2 * stream.norm() * direction / direction.norm()
    before = model.model(tokens).logits[0, -1]
    with find_site(model.model, "layers.3").hook(lambda x: x + small):
        after = model.model(tokens).logits[0, -1]
    predicted = model.unembed(small[None])[0] / stream.pow(2).mean().sqrt()
    assert torch.corrcoef(torch.stack([after - before, predicted]))[0, 1] > 0.999


def test_unembed_refuses_other_widths(model):
    with pytest.raises(UnweaveError, match=r"\(m, 32\)"):
        model.unembed(torch.randn(3, 64))


# ---- errors -----------------------------------------------------------------------------------------------------


def test_errors_say_what_is_missing(tmp_path, tiny_model, monkeypatch):
    def load(name, **options):
        return LanguageModel.load(str(name), device="cpu", **options)

    with pytest.raises(UnweaveError, match="the path does not exist"):
        load(tmp_path / "nowhere")
    with pytest.raises(UnweaveError, match=r"no model in .*expected config.json"):
        load(tmp_path)
    with pytest.raises(UnweaveError, match="hub cannot be reached"):
        load("nobody/no-such-model")
    with pytest.raises(UnweaveError, match="no dtype 'bf16'"):
        load(tiny_model, dtype="bf16")
    with pytest.raises(UnweaveError, match="no device 'gpu'"):
        LanguageModel.load(str(tiny_model), device="gpu")
    (tmp_path / "a.gguf").write_bytes(b"GGML....")
    with pytest.raises(UnweaveError, match="not a GGUF file"):
        load(tmp_path)
    (tmp_path / "b.gguf").write_bytes(b"GGUF....")
    with pytest.raises(UnweaveError, match=r"2 GGUF files \(a.gguf, b.gguf\)"):
        load(tmp_path)
    monkeypatch.setenv("UNWEAVE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UnweaveError, match=r"cannot read .*b.gguf"):
        load(tmp_path / "b.gguf")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else find_spec(name, *a))
    with pytest.raises(UnweaveError, match=r"pip install 'unweave\[text\]'"):
        load(tmp_path / "b.gguf")


def test_damaged_weights_are_told(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(UnweaveError, match="cannot load a causal language model from"):
        LanguageModel.load(str(tmp_path / "cut"), device="cpu")


def test_gguf_is_unpacked_once_into_the_cache(tiny_model, tmp_path, monkeypatch, capfd):
    """A GGUF made of the tiny model: the same weights (in bfloat16), quietly, and from the cache the second time."""
    gguf = pytest.importorskip("gguf")
    from unweave.sources import _loading

    reference = LanguageModel.load(str(tiny_model), dtype="bfloat16", device="cpu")
    path = tmp_path / "tiny.gguf"
    write_llama_gguf(gguf, reference, path)
    monkeypatch.setenv("UNWEAVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        "transformers.AutoTokenizer.from_pretrained",
        lambda *a, original=reference.tokenizer, **k: original,  # a GGUF tokenizer is transformers' business
    )
    import transformers.utils.logging as logging

    state = logging.get_verbosity(), logging.is_progress_bar_enabled()
    first = LanguageModel.load(str(path), device="cpu")
    monkeypatch.setattr(_loading, "_dequantise", None)  # would fail if it were called again
    again = LanguageModel.load(str(tmp_path), device="cpu")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == state
    shown = capfd.readouterr()
    assert "it/s" not in shown.err + shown.out
    assert first.sha256 == again.sha256
    tokens = torch.tensor([[0, 5, 6, 7]])
    expected = reference.run_to("layers.2", tokens)["layers.2"]
    for model in (first, again):
        assert model.dtype == torch.bfloat16
        torch.testing.assert_close(model.run_to("layers.2", tokens)["layers.2"], expected)


def write_llama_gguf(gguf, model, path):
    """The tiny Llama in the layout of llama.cpp (whose query and key rows are permuted)."""
    config, state = model.model.config, model.model.float().state_dict()
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)

    def permuted(weight, heads):
        return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)

    names = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for n in range(config.num_hidden_layers):
        names |= {f"model.layers.{n}.{ours}": f"blk.{n}.{theirs}" for ours, theirs in parts.items()}
    for key, weight in state.items():
        weight = weight.numpy()
        if "q_proj" in key:
            weight = permuted(weight, config.num_attention_heads)
        if "k_proj" in key:
            weight = permuted(weight, config.num_key_value_heads)
        writer.add_tensor(names[key.removesuffix(".weight")] + ".weight", weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model.model.bfloat16()
