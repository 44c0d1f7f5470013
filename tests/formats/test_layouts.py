"""Formats whose weights cannot be had here: files made to their documented layout, against their equations."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from unweave import formats
from unweave.errors import UnweaveError

D, M, K = 8, 24, 4


@pytest.fixture
def w() -> dict[str, Tensor]:
    """Weights by the names of the equations: rows of W_enc are features, rows of W_dec atoms."""
    g = torch.Generator().manual_seed(0)
    sizes = {"W_enc": (M, D), "W_dec": (M, D), "b_enc": (M,), "b_dec": (D,), "theta": (M,)}
    made = {name: torch.randn(*size, generator=g) for name, size in sizes.items()}
    return made | {"theta": made["theta"].abs() + 0.2}


@pytest.fixture
def x() -> Tensor:
    return 1.5 * torch.randn(40, D, generator=torch.Generator().manual_seed(1)) + 0.2


def same(place: Path, x: Tensor, code: Tensor, output: Tensor, **options: object) -> formats.Facts:
    dictionary = formats.load(place, **options)
    with torch.no_grad():
        torch.testing.assert_close(dictionary.encode(x).dense(), code, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dictionary(x), output, rtol=1e-4, atol=1e-5)
    facts = formats.inspect(place, **options)
    assert (facts.d_in, facts.d_out, facts.n_features, facts.missing) == (D, D, M, None)
    return facts


def topk(u: Tensor) -> Tensor:
    best = u.topk(K, dim=1)
    return torch.zeros_like(u).scatter(1, best.indices, best.values.relu())


def folder(tmp_path: Path, name: str) -> Path:
    path = tmp_path / name
    path.mkdir(parents=True)
    return path


def save_npz(path: Path, w: dict[str, Tensor]) -> None:
    arrays = {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    np.savez(path / "params.npz", threshold=w["theta"].numpy(), **{k: v.numpy() for k, v in arrays.items()})


def test_gemma_scope(tmp_path: Path, w: dict[str, Tensor], x: Tensor) -> None:
    place = folder(tmp_path, "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_71")
    save_npz(place, w)
    u = x @ w["W_enc"].T + w["b_enc"]
    z = u * (u > w["theta"])
    facts = same(place, x, z, z @ w["W_dec"] + w["b_dec"])
    assert (facts.format, facts.model, facts.site) == ("gemma-scope", "google/gemma-2-2b", "layers.12")
    assert facts.context["average L0"] == 71
    same(place / "params.npz", x, z, z @ w["W_dec"] + w["b_dec"])


def test_gemma_scope_of_the_embedding(tmp_path: Path, w: dict[str, Tensor], x: Tensor) -> None:
    place = folder(tmp_path, "embedding/width_4k/average_l0_6")
    save_npz(place, w)
    u = x @ (w["W_enc"] / D**0.5).T + w["b_enc"]
    z = u * (u > w["theta"])
    same(place, x, z, z @ (w["W_dec"] * D**0.5) + w["b_dec"])


def test_gemma_scope_somewhere_else_has_no_model_and_no_site(tmp_path: Path, w: dict[str, Tensor]) -> None:
    save_npz(tmp_path, w)
    facts = formats.inspect(tmp_path)
    assert (facts.model, facts.site) == (None, None)
    assert ("site", "unknown") in facts.rows()


def save_gemma_2(place: Path, w: dict[str, Tensor], **more: Tensor) -> None:
    tensors = {"w_enc": w["W_enc"].T.contiguous(), "w_dec": w["W_dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    save_file({**tensors, "threshold": w["theta"], **more}, place / "params.safetensors")
    hook = {"hf_hook_point_in": "model.layers.9.output", "model_name": "gemma-v3-1b-pt", "architecture": "jump_relu"}
    (place / "config.json").write_text(json.dumps(hook))


def test_gemma_scope_2(tmp_path: Path, w: dict[str, Tensor], x: Tensor) -> None:
    place = folder(tmp_path, "resid_post/layer_9_width_16k_l0_small")
    save_gemma_2(place, w)
    u = x @ w["W_enc"].T + w["b_enc"]
    z = u * (u > w["theta"])
    facts = same(place, x, z, z @ w["W_dec"] + w["b_dec"])
    assert (facts.format, facts.model, facts.site) == ("gemma-scope-2", "gemma-v3-1b-pt", "layers.9")


def test_gemma_scope_2_with_an_affine_skip(tmp_path: Path, w: dict[str, Tensor], x: Tensor) -> None:
    place, W_skip = folder(tmp_path, "transcoder/layer_9_width_16k_l0_small_affine"), torch.randn(D, D)
    save_gemma_2(place, w, affine_skip_connection=W_skip)
    u = x @ w["W_enc"].T + w["b_enc"]
    z = u * (u > w["theta"])
    facts = same(place, x, z, z @ w["W_dec"] + w["b_dec"] + x @ W_skip)
    assert facts.architecture == "jumprelu_skip_transcoder"


# ---- cross-layer transcoders: three layers, each with M features ----------------------------------------------------

N = 3


def layers(seed: int = 5) -> list[dict[str, Tensor]]:
    """What each layer reads with, its threshold, and what it writes into all layers, earlier ones too."""
    g = torch.Generator().manual_seed(seed)
    sizes = {"W_enc": (M, D), "W_dec": (M, N, D), "b_enc": (M,), "b_dec": (D,), "theta": (M,)}
    made = [{name: torch.randn(*size, generator=g) for name, size in sizes.items()} for _ in range(N)]
    return [layer | {"theta": layer["theta"].abs() + 0.2} for layer in made]


def crossed(made: list[dict[str, Tensor]], x: Tensor, jumps: bool) -> tuple[Tensor, Tensor]:
    """Codes and outputs of ``(n, N, D)`` rows, layers side by side, from the definition."""
    codes, out = [], [w["b_dec"].expand(len(x), D).clone() for w in made]
    for i, w in enumerate(made):
        u = x[:, i] @ w["W_enc"].T + w["b_enc"]
        codes.append(u * (u > (w["theta"] if jumps else 0)))
        for j in range(i, N):
            out[j] += codes[i] @ w["W_dec"][:, j]
    return torch.cat(codes, 1), torch.cat(out, 1)


def same_layers(place: Path, jumps: bool) -> formats.Facts:
    x = torch.randn(40, N, D, generator=torch.Generator().manual_seed(6))
    code, output = crossed(layers(), x, jumps)
    dictionary = formats.load(place)
    with torch.no_grad():
        torch.testing.assert_close(dictionary.encode(x.flatten(1)).dense(), code, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dictionary(x.flatten(1)), output, rtol=1e-4, atol=1e-4)
    facts = formats.inspect(place)
    assert (facts.d_in, facts.d_out, facts.n_features, facts.architecture) == (N * D, N * D, N * M, "clt")
    return facts


def test_gemma_scope_2_across_layers(tmp_path: Path) -> None:
    place = folder(tmp_path, "clt/width_262k_l0_big")
    for i, w in enumerate(layers()):
        tensors = {"w_enc": w["W_enc"].T.contiguous(), "w_dec": w["W_dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
        save_file({**tensors, "threshold": w["theta"]}, place / f"params_layer_{i}.safetensors")
    assert same_layers(place, True).format == "gemma-scope-2-clt"
    with pytest.raises(UnweaveError, match="one layer of a cross-layer transcoder: name the folder"):
        formats.load(place / "params_layer_1.safetensors")
    with pytest.raises(UnweaveError, match=r"the layers from 0 on, found those of \[\]"):
        formats.inspect(tmp_path, format="gemma-scope-2-clt")
    affine = {"affine_skip_connection": torch.ones(D, D)}
    save_file({**tensors, "threshold": w["theta"], **affine}, place / "params_layer_0.safetensors")
    with pytest.raises(UnweaveError, match="is a file of a layer missing"):  # or a skip in one layer alone
        formats.load(place)
    (place / "params_layer_1.safetensors").rename(place / "params_layer_7.safetensors")
    with pytest.raises(UnweaveError, match=r"the layers from 0 on, found those of \[0, 2, 7\]"):
        formats.load(place)


@pytest.mark.parametrize("jumps", [False, True])
def test_circuit_tracer_across_layers(tmp_path: Path, jumps: bool) -> None:
    for i, w in enumerate(layers()):
        tensors = {f"{name}_{i}": w[name] for name in ("W_enc", "b_enc", "b_dec")}
        save_file(tensors | ({f"threshold_{i}": w["theta"]} if jumps else {}), tmp_path / f"W_enc_{i}.safetensors")
        save_file({f"W_dec_{i}": w["W_dec"][:, i:].contiguous()}, tmp_path / f"W_dec_{i}.safetensors")
    (tmp_path / "config.yaml").write_text("model_name: google/gemma-2-2b\nfeature_input_hook: hook_resid_mid\n")
    facts = same_layers(tmp_path, jumps)
    assert (facts.format, facts.model) == ("circuit-tracer-clt", "google/gemma-2-2b")
    if jumps:
        save_file(tensors | {"threshold_2": w["theta"][:3].clone()}, tmp_path / "W_enc_2.safetensors")
        with pytest.raises(UnweaveError, match="expected 24 thresholds in layer 2, found 3"):
            formats.load(tmp_path)
        save_file(tensors | {"threshold_2": -w["theta"]}, tmp_path / "W_enc_2.safetensors")
        with pytest.raises(UnweaveError, match="thresholds of 0 or more"):
            formats.load(tmp_path)
    (tmp_path / "W_enc_2.safetensors").unlink()
    with pytest.raises(UnweaveError, match=r"write \(24, 2, 8\) as layer 0 does.*is a file of a layer missing"):
        formats.load(tmp_path)


@pytest.mark.parametrize("norms", [(3.0, 3.0), (3.0, 0.7)])
def test_llama_scope(tmp_path: Path, w: dict[str, Tensor], x: Tensor, norms: tuple[float, float]) -> None:
    place = folder(tmp_path, "Llama3_1-8B-Base-L7R-8x")
    tensors = {"encoder.weight": w["W_enc"], "encoder.bias": w["b_enc"], "decoder.bias": w["b_dec"]}
    (place / "checkpoints").mkdir()
    save_file(tensors | {"decoder.weight": w["W_dec"].T.contiguous()}, place / "checkpoints/final.safetensors")
    config = {"d_model": D, "d_sae": M, "jump_relu_threshold": 0.9, "hook_point_in": "blocks.7.hook_resid_post"}
    config |= {"hook_point_out": "blocks.7.hook_resid_post", "act_fn": "jumprelu"}
    config["dataset_average_activation_norm"] = {"in": norms[0], "out": norms[1]}
    (place / "hyperparams.json").write_text(json.dumps(config))
    into, out = (D**0.5 / n for n in norms)
    u = into * x @ w["W_enc"].T + w["b_enc"]
    z = u * (u > 0.9 * into)  # the threshold is stored for rows that are not scaled
    facts = same(place, x, z / out, (z @ w["W_dec"] + w["b_dec"]) / out)
    assert facts.site == "layers.7"


def test_llama_scope_r1(tmp_path: Path, w: dict[str, Tensor], x: Tensor) -> None:
    tensors = {"encoder.weight": w["W_enc"], "encoder.bias": w["b_enc"], "decoder.bias": w["b_dec"]}
    tensors |= {"decoder.weight": w["W_dec"].T.contiguous(), "log_jumprelu_threshold": w["theta"].log()}
    save_file(tensors, tmp_path / "sae_weights.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"d_model": D, "hook_point_in": "blocks.7.hook_resid_post"}))
    with pytest.raises(UnweaveError, match="give norm="):
        formats.load(tmp_path)
    scale = D**0.5 / 5.0
    u = scale * x @ w["W_enc"].T + w["b_enc"]
    z = u * (u > w["theta"])  # this one is for scaled rows
    same(tmp_path, x, z / scale, (z @ w["W_dec"] + w["b_dec"]) / scale, norm=5.0)


@pytest.mark.parametrize("tied", [False, True])
def test_openai_relu(tmp_path: Path, w: dict[str, Tensor], x: Tensor, tied: bool) -> None:
    place = folder(tmp_path, "resid_delta_mlp/autoencoders")
    state = {"pre_bias": w["b_dec"], "encoder.weight": w["W_enc"], "latent_bias": w["b_enc"], "activation": "ReLU"}
    state |= {"activation_state_dict": {}, "stats_last_nonzero": torch.zeros(M, dtype=torch.long)}
    torch.save(state if tied else state | {"decoder.weight": w["W_dec"].T}, place / "6.pt")
    z = ((x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]).relu()
    facts = same(place / "6.pt", x, z, z @ (w["W_enc"] if tied else w["W_dec"]) + w["b_dec"])
    assert (facts.format, facts.site) == ("openai", "layers.6.mlp")


def test_openai_topk_standardises_every_row(tmp_path: Path, w: dict[str, Tensor], x: Tensor) -> None:
    state = {"pre_bias": w["b_dec"], "encoder.weight": w["W_enc"], "latent_bias": w["b_enc"], "activation": "TopK"}
    state |= {"decoder.weight": w["W_dec"].T, "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
    torch.save(state, tmp_path / "6.pt")
    mean, size = x.mean(1, keepdim=True), x.std(1, keepdim=True)
    z = topk(((x - mean) / (size + 1e-5) - w["b_dec"]) @ w["W_enc"].T + w["b_enc"])
    facts = same(tmp_path / "6.pt", x, z, (z @ w["W_dec"] + w["b_dec"]) * size + mean)
    assert facts.k == K
    torch.save(state | {"activation_state_dict": {}}, tmp_path / "6.pt")
    with pytest.raises(UnweaveError, match="does not say its k"):
        formats.load(tmp_path / "6.pt")


def test_qwen_scope(tmp_path: Path, w: dict[str, Tensor], x: Tensor) -> None:
    state = {"W_enc": w["W_enc"], "W_dec": w["W_dec"].T, "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    torch.save(state, tmp_path / "layer5.sae.pt")
    with pytest.raises(UnweaveError, match="k is not in the file"):
        formats.load(tmp_path / "layer5.sae.pt")
    z = topk(x @ w["W_enc"].T + w["b_enc"])
    same(tmp_path / "layer5.sae.pt", x, z, z @ w["W_dec"] + w["b_dec"], k=K)
    place = folder(tmp_path, f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}")
    torch.save(state, place / "layer5.sae.pt")
    facts = same(place / "layer5.sae.pt", x, z, z @ w["W_dec"] + w["b_dec"])
    assert (facts.model, facts.site, facts.k) == ("Qwen/Qwen3-1.7B-Base", "layers.5", K)


def linear_pair(w: dict[str, Tensor], encoder: str, decoder: str) -> dict[str, Tensor]:
    state = {f"{encoder}.weight": w["W_enc"], f"{encoder}.bias": w["b_enc"]}
    return state | {f"{decoder}.weight": w["W_dec"].T, f"{decoder}.bias": w["b_dec"]}


@pytest.mark.parametrize(
    ("name", "encoder", "decoder", "format", "site"),
    [
        ("Llama-3.1-8B-Instruct-SAE-l19.pth", "encoder_linear", "decoder_linear", "goodfire", "layers.19"),
        ("DeepSeek-R1-Distill-Llama-8B-SAE-l19.pt", "encoder", "decoder", "deepseek-r1", "layers.19"),
    ],
)
def test_pairs_of_linear_layers(
    tmp_path: Path, w: dict[str, Tensor], x: Tensor, name: str, encoder: str, decoder: str, format: str, site: str
) -> None:
    torch.save(linear_pair(w, encoder, decoder), tmp_path / name)
    z = (x @ w["W_enc"].T + w["b_enc"]).relu()
    facts = same(tmp_path / name, x, z, z @ w["W_dec"] + w["b_dec"])
    assert (facts.format, facts.site) == (format, site)


def test_hook_z(tmp_path: Path, w: dict[str, Tensor], x: Tensor) -> None:
    state = {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    torch.save(state, tmp_path / "L3.pt")
    config = {"act_size": D, "dict_size": M, "act_name": "blocks.3.attn.hook_z"}
    (tmp_path / "L3_cfg.json").write_text(json.dumps(config))
    z = ((x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]).relu()
    facts = same(tmp_path / "L3.pt", x, z, z @ w["W_dec"] + w["b_dec"])
    assert (facts.format, facts.site) == ("hook-z", "layers.3.attn.heads")


def test_circuit_tracer(tmp_path: Path, w: dict[str, Tensor], x: Tensor) -> None:
    tensors = {"W_enc": w["W_enc"], "W_dec": w["W_dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    save_file(tensors, tmp_path / "layer_2.safetensors")
    (tmp_path / "config.yaml").write_text("model_name: Qwen/Qwen3-4B\nfeature_input_hook: mlp.hook_in\n")
    u = x @ w["W_enc"].T + w["b_enc"]
    facts = same(tmp_path / "layer_2.safetensors", x, u.relu(), u.relu() @ w["W_dec"] + w["b_dec"])
    assert (facts.format, facts.model, facts.target_site) == ("circuit-tracer", "Qwen/Qwen3-4B", "layers.2.mlp")
    save_file(tensors | {"activation_function.threshold": w["theta"]}, tmp_path / "layer_2.safetensors")
    z = u * (u > w["theta"])
    same(tmp_path / "layer_2.safetensors", x, z, z @ w["W_dec"] + w["b_dec"])
    save_file(tensors | {"activation_function.threshold": -w["theta"]}, tmp_path / "layer_2.safetensors")
    with pytest.raises(UnweaveError, match="thresholds of 0 or more"):
        formats.load(tmp_path / "layer_2.safetensors")
    W_skip = torch.randn(D, D)
    output = x @ W_skip.T + w["b_dec"]
    save_file(tensors | {"W_skip": W_skip}, tmp_path / "layer_2.safetensors")
    facts = same(tmp_path / "layer_2.safetensors", x, u.relu(), u.relu() @ w["W_dec"] + output)
    assert facts.architecture == "skip_transcoder"
    save_file(
        tensors | {"W_skip": W_skip, "activation_function.threshold": w["theta"]}, tmp_path / "layer_2.safetensors"
    )
    facts = same(tmp_path / "layer_2.safetensors", x, z, z @ w["W_dec"] + output)
    assert facts.architecture == "jumprelu_skip_transcoder"
    save_file(tensors, tmp_path / "layer_10.safetensors")
    with pytest.raises(UnweaveError, match=r"2 layers, each of them a dictionary: name one .*layer_2.safetensors"):
        formats.load(tmp_path)


def test_circuit_tracer_names_hooks_without_their_layer(tmp_path: Path) -> None:
    place = Path(__file__).parent / "golden" / "llamascopium-clt" / "random_relu"
    facts = formats.inspect(place)
    assert facts.hook == "blocks.0.hook_resid_mid, blocks.1.hook_resid_mid"
    formats.write(formats.load(place), "circuit-tracer-clt", tmp_path / "clt", facts)
    assert formats.inspect(tmp_path / "clt").hook == "hook_resid_mid"


def test_circuit_tracer_topk(tmp_path: Path, w: dict[str, Tensor], x: Tensor) -> None:
    tensors = {"W_enc": w["W_enc"], "W_dec": w["W_dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    z = topk(x @ w["W_enc"].T + w["b_enc"])
    save_file(tensors | {"k": torch.tensor(K)}, tmp_path / "layer_2.safetensors")
    assert same(tmp_path, x, z, z @ w["W_dec"] + w["b_dec"]).k == K
    save_file(tensors, tmp_path / "layer_2.safetensors")
    (tmp_path / "config.yaml").write_text("activation: topk\n")
    with pytest.raises(UnweaveError, match="k is not in the file: give k="):
        formats.load(tmp_path)
    same(tmp_path, x, z, z @ w["W_dec"] + w["b_dec"], k=K)
    (tmp_path / "config.yaml").write_text(f"activation: topk\nk: {K}\n")
    same(tmp_path, x, z, z @ w["W_dec"] + w["b_dec"])


def sparsify(place: Path, w: dict[str, Tensor], **config: object) -> None:
    tensors = {"encoder.weight": w["W_enc"], "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    save_file(tensors, place / "sae.safetensors")
    (place / "cfg.json").write_text(json.dumps({"d_in": D, "k": K, "expansion_factor": 3, "num_latents": 0} | config))


def test_sparsify_with_the_settings_of_before(tmp_path: Path, w: dict[str, Tensor], x: Tensor) -> None:
    sparsify(tmp_path, w, signed=True)
    u = (x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]
    best = u.abs().topk(K, dim=1).indices
    z = torch.zeros_like(u).scatter(1, best, u.gather(1, best))
    facts = same(tmp_path, x, z, z @ w["W_dec"] + w["b_dec"])
    assert facts.architecture == "abs_topk"


def test_sparsify_of_either_sign_with_a_skip(tmp_path: Path, w: dict[str, Tensor], x: Tensor) -> None:
    sparsify(tmp_path, w, signed=True, transcode=True)
    tensors = {"encoder.weight": w["W_enc"], "encoder.bias": w["b_enc"], "W_dec": w["W_dec"], "b_dec": w["b_dec"]}
    W_skip = torch.randn(D, D, generator=torch.Generator().manual_seed(3))
    save_file(tensors | {"W_skip": W_skip}, tmp_path / "sae.safetensors")
    u = x @ w["W_enc"].T + w["b_enc"]
    best = u.abs().topk(K, dim=1).indices
    z = torch.zeros_like(u).scatter(1, best, u.gather(1, best))
    facts = same(tmp_path, x, z, z @ w["W_dec"] + w["b_dec"] + x @ W_skip.T)
    assert facts.architecture == "abs_topk_skip_transcoder"


@pytest.mark.parametrize("name", ["saelens", "temporal"])
def test_dictionaries_of_whole_sequences_are_named_and_refused(tmp_path: Path, w: dict[str, Tensor], name: str) -> None:
    if name == "saelens":
        save_file({"W_dec": w["W_dec"], "b_dec": w["b_dec"]}, tmp_path / "sae_weights.safetensors")
        (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "temporal", "d_in": D, "d_sae": M}))
    else:
        save_file({"D": w["W_dec"], "b": w["b_dec"]}, tmp_path / "latest_ckpt.safetensors")
        (tmp_path / "conf.yaml").write_text(f"llm: {{dimin: {D}}}\nsae: {{kval_topk: {K}}}\n")
    facts = formats.inspect(tmp_path)
    assert (facts.architecture, facts.d_in, facts.n_features) == ("temporal", D, M)
    with pytest.raises(UnweaveError, match=r"attention over all rows before it.*is another method"):
        formats.load(tmp_path)


def test_a_state_whose_codes_are_not_sparse_is_refused(tmp_path: Path, w: dict[str, Tensor]) -> None:
    state = {
        "dictionary._weights": w["W_dec"],
        "dictionary.multiplier": torch.tensor(0.0),
        "Q": torch.linspace(0, 1, 4),
    }
    torch.save(state | {"encoder.final_block.0.weight": w["W_enc"]}, tmp_path / "qsae.pt")
    with pytest.raises(UnweaveError, match=r"QSAE gives every feature a value.*not sparse"):
        formats.load(tmp_path / "qsae.pt")


def test_saelens_pursuits_of_scaled_rows(tmp_path: Path, w: dict[str, Tensor], x: Tensor) -> None:
    """Codes, and the residual at which a row is done, are those of scaled rows; here without a decoder bias."""
    scale, atoms = 0.2, torch.nn.functional.normalize(w["W_dec"], dim=1)
    save_file({"W_dec": atoms, "b_dec": w["b_dec"]}, tmp_path / "sae_weights.safetensors")
    config = {"architecture": "matching_pursuit", "d_in": D, "d_sae": M, "apply_b_dec_to_input": False}
    config |= {"residual_threshold": 0.3, "stop_on_duplicate_support": False}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    left, z = scale * x, torch.zeros(len(x), M)
    for _ in range(D):  # as many picks as dimensions, where the file does not say
        value, at = (left @ atoms.T).max(1)
        value = value * (left.norm(dim=1) > 0.3)
        z.scatter_add_(1, at[:, None], value[:, None])
        left = left - value[:, None] * atoms[at]
    same(tmp_path, x, z / scale, z / scale @ atoms, norm_scaling_factor=scale)


def test_saelens_that_was_finetuned_against_shrinkage(tmp_path: Path, w: dict[str, Tensor], x: Tensor) -> None:
    tensors = {"W_enc": w["W_enc"].T.contiguous(), "W_dec": w["W_dec"], "b_enc": w["b_enc"], "b_dec": w["b_dec"]}
    save_file(tensors | {"scaling_factor": w["theta"]}, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": D, "d_sae": M, "hook_point": "blocks.0.hook_mlp_out"}))
    z = ((x - w["b_dec"]) @ w["W_enc"].T + w["b_enc"]).relu()
    facts = same(tmp_path, x, z, (z * w["theta"]) @ w["W_dec"] + w["b_dec"])
    assert facts.site == "layers.0.mlp"


# ---- what files say, and what they leave out ------------------------------------------------------------------------

MISDECLARED: dict[str, tuple[Callable[[Path, dict], None], str]] = {
    "sparsify without k": (lambda p, w: sparsify(p, w, k=None), "expected a key 'k'"),
    "sparsify of another width": (lambda p, w: sparsify(p, w, d_in=9), "says d_in = 9"),
    "sparsify of another size": (lambda p, w: sparsify(p, w, num_latents=48), "48 latents"),
    "sparsify transposed": (lambda p, w: sparsify(p, w | {"W_enc": w["W_enc"].T.contiguous()}), "says d_in = 8"),
    "a decoder transposed": (
        lambda p, w: sparsify(p, w | {"W_dec": w["W_dec"].T.contiguous()}),
        "'W_dec' to be floats",
    ),
}


@pytest.mark.parametrize("what", MISDECLARED)
def test_files_that_contradict_themselves(what: str, tmp_path: Path, w: dict[str, Tensor]) -> None:
    make, says = MISDECLARED[what]
    make(tmp_path, w)
    with pytest.raises(UnweaveError, match=says):
        formats.load(tmp_path)


def test_a_state_that_does_not_say_its_class_asks_for_it() -> None:
    place = Path(__file__).parent / "golden" / "overcomplete" / "random_topk"
    with pytest.raises(UnweaveError, match="does not say its class: give arch="):
        formats.load(place / "sae.pt")
    with pytest.raises(UnweaveError, match="k is not in the file"):
        formats.load(place / "sae.pt", arch="topk")
    with pytest.raises(UnweaveError, match="takes no option 'size'"):
        formats.load(place / "sae.pt", size=3)


def test_topk_and_batch_topk_share_their_tensors(tmp_path: Path) -> None:
    case = Path(__file__).parent / "golden" / "dictionary_learning" / "trained_BatchTopKSAE"
    (tmp_path / "ae.pt").write_bytes((case / "ae.pt").read_bytes())
    with pytest.raises(UnweaveError, match="fit AutoEncoderTopK, BatchTopKSAE: say which, with dict_class="):
        formats.load(tmp_path)
    assert formats.load(tmp_path, dict_class="BatchTopKSAE").name == "batch_topk"
    assert formats.load(tmp_path, dict_class="AutoEncoderTopK").name == "topk"


def test_nothing_and_something_else(tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match="no file or folder"):
        formats.load(tmp_path / "none")
    with pytest.raises(UnweaveError, match="holds no dictionary in a format that unweave knows"):
        formats.load(tmp_path)
    save_file({"lm_head.weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    with pytest.raises(UnweaveError, match=r"model.safetensors holds lm_head.weight"):
        formats.load(tmp_path)
    with pytest.raises(UnweaveError, match="no format 'saelen': did you mean 'saelens'"):
        formats.load(tmp_path, format="saelen")
