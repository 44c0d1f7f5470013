"""As ``make.py``, for circuit-tracer (which reads Gemma Scope as well), for what has parts or layers, and for saev.

Run in an environment that has the libraries::

    python tests/formats/golden/make_parts.py [LIBRARY ...]

Two parts (or layers) of width 4 with 12 features each make up rows of width 8 and 24 features.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from make import HERE, STEPS, D, K, M, bare, batch, keep, scramble
from safetensors.torch import save_file
from torch import Tensor

N, PER, WIDE = 2, M // 2, D // 2


def draw(seed: int, **shapes: tuple[int, ...]) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {name: 0.5 * torch.randn(*shape, generator=g) for name, shape in shapes.items()}


def side_by_side(layers: Tensor) -> Tensor:
    """``(n, N, d)`` as rows."""
    return layers.flatten(1)


def transcoder(jumps: bool) -> dict[str, Tensor]:
    """Matrices and biases of a transcoder by the names of its equations, a threshold for those that jump."""
    made = draw(3, W_enc=(M, D), W_dec=(M, D), b_enc=(M,), b_dec=(D,), threshold=(M,))
    return {**made, "threshold": made["threshold"].abs() + 0.1} if jumps else {**made, "threshold": torch.empty(0)}


# ---- circuit-tracer -----------------------------------------------------------------------------------------------


def circuit_tracer() -> None:
    for package in ("circuit_tracer", "circuit_tracer.transcoder", "circuit_tracer.utils"):
        bare(package)
    sys.modules["circuit_tracer.utils"].get_default_device = lambda: torch.device("cpu")
    from circuit_tracer.transcoder import cross_layer_transcoder as across
    from circuit_tracer.transcoder import single_layer_transcoder as single
    from circuit_tracer.transcoder.activation_functions import JumpReLU, TopK

    def measure(format: str, case: str, save: Callable[[Path], Any], load: Callable[[Path], Any], **options: Any):
        place = HERE / format / ".making"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        save(place)
        loaded = load(place)
        with torch.no_grad():
            code = loaded.encode(batch())
            keep(format, case, save, code, loaded.decode(code, batch()), **options)
        shutil.rmtree(place)

    activations = {"relu": torch.relu, "jumprelu": None, "topk": TopK(K)}
    for name, activation in activations.items():
        for skip in (False, True):
            w = transcoder(name == "jumprelu")
            module = single.SingleLayerTranscoder(
                D, M, activation or JumpReLU(w["threshold"].clone()), 3, skip, dtype=torch.float32
            )
            scramble(module, 0.5)
            if name == "jumprelu":
                module.activation_function.threshold.data.copy_(w["threshold"])
            file, options = "layer_3.safetensors", {"k": K} if name == "topk" else {}

            def save(folder: Path, module: Any = module, file: str = file) -> None:
                module.to_safetensors(str(folder / file))

            def load(folder: Path, module: Any = module, name: str = name, file: str = file) -> Any:
                if name == "topk":  # its files do not say so, its reader does not know it
                    return module
                return single.load_relu_transcoder(str(folder / file), 3, lazy_encoder=False, lazy_decoder=False)

            measure("circuit-tracer", f"{'skip_' if skip else ''}{name}", save, load, **options)

    # ---- Gemma Scope 1 and 2, by circuit-tracer's readers

    def save_npz(folder: Path) -> None:
        w = transcoder(True)
        np.savez(folder / "params.npz", **{k: (v.T if k == "W_enc" else v).numpy() for k, v in w.items()})

    measure("gemma-scope", "transcoder", save_npz, lambda f: single.load_gemma_scope_transcoder(f / "params.npz", 3))

    for case in ("transcoder", "transcoder_affine"):

        def save_second(folder: Path, case: str = case) -> None:
            w = {k.lower(): v for k, v in transcoder(True).items()}
            w["w_enc"] = w["w_enc"].T.contiguous()
            if "affine" in case:
                w["affine_skip_connection"] = draw(5, W=(D, D))["W"]
            save_file(w, folder / "params.safetensors")

        def load_second(folder: Path) -> Any:
            return single.load_gemma_scope_2_transcoder(str(folder / "params.safetensors"), 3)

        measure("gemma-scope-2", case, save_second, load_second)

    # ---- cross-layer transcoders

    def measure_layers(format: str, case: str, save: Callable[[Path], Any], load: Callable[[Path], Any]) -> None:
        place = HERE / format / ".making"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        save(place)
        loaded, x = load(place), batch().view(-1, N, WIDE).transpose(0, 1)
        with torch.no_grad():
            codes = loaded.encode(x)
            output = loaded.decode(codes, x)
            keep(format, case, save, *(side_by_side(t.transpose(0, 1)) for t in (codes, output)))
        shutil.rmtree(place)

    for name in ("relu", "jump_relu"):
        clt = across.CrossLayerTranscoder(N, PER, WIDE, name, lazy_decoder=False, dtype=torch.float32)
        scramble(clt, 0.5)
        if name == "jump_relu":
            clt.activation_function.threshold.data.abs_()

        def save_clt(folder: Path, clt: Any = clt) -> None:
            clt.to_safetensors(str(folder))

        def load_clt(folder: Path) -> Any:
            return across.load_clt(str(folder), dtype=torch.float32, lazy_decoder=False)

        measure_layers("circuit-tracer-clt", name.replace("_", ""), save_clt, load_clt)

    for case in ("plain", "affine"):

        def save_affine(folder: Path, case: str = case) -> None:
            for layer in range(N):
                w = draw(7 + layer, w_enc=(WIDE, PER), w_dec=(PER, N, WIDE), b_enc=(PER,), b_dec=(WIDE,))
                w["threshold"] = draw(17 + layer, t=(PER,))["t"].abs() + 0.1
                if case == "affine":
                    w["affine_skip_connection"] = draw(27 + layer, W=(WIDE, WIDE))["W"]
                save_file(w, folder / f"params_layer_{layer}.safetensors")

        def load_affine(folder: Path) -> Any:
            paths = {layer: str(folder / f"params_layer_{layer}.safetensors") for layer in range(N)}
            # Its reader stops before the last path, so there has to be one more.
            return across.load_gemma_scope_2_clt({**paths, N: ""}, dtype=torch.float32)

        measure_layers("gemma-scope-2-clt", case, save_affine, load_affine)


# ---- llamascopium's crosscoders and CLTs --------------------------------------------------------------------------


def llamascopium() -> None:
    from llamascopium.models.clt import CLTConfig, CrossLayerTranscoder
    from llamascopium.models.crosscoder import Crosscoder, CrosscoderConfig
    from llamascopium.models.sparse_dictionary import SparseDictionary

    ins, outs = [f"blocks.{i}.hook_resid_mid" for i in range(N)], [f"blocks.{i}.hook_mlp_out" for i in range(N)]
    common = {"d_model": WIDE, "expansion_factor": PER / WIDE, "top_k": K // N}

    def measure(format: str, case: str, module: Any, into: list[str], out: list[str], trained: bool = False) -> None:
        torch.manual_seed(9)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.5 - (1.0 if "threshold" in name else 0.0))
        norms = {hook: 2.0 + 1.5 * i for i, hook in enumerate(dict.fromkeys([*into, *out]))}
        module.set_dataset_average_activation_norm(norms)
        scaled = module.cfg.norm_activation == "dataset-wise"
        s_in, s_out = (
            torch.tensor([WIDE**0.5 / norms[hook] if scaled else 1.0 for hook in side])[:, None] for side in (into, out)
        )
        kind = type(module).__name__
        made = {"batch_first": True} if kind == "CrossLayerTranscoder" else {}
        if trained:
            optimiser = torch.optim.Adam(module.parameters(), lr=1e-2)
            for step in range(STEPS):
                optimiser.zero_grad()
                x = batch(256, 100 + step).view(-1, N, WIDE)
                (module.decode(module.encode(x * s_in), **made) - x * s_out).square().sum((1, 2)).mean().backward()
                optimiser.step()

        def save(folder: Path) -> None:
            module.save_pretrained(folder)
            module.cfg.save_hyperparameters(folder)

        place = HERE / format / ".making"
        place.mkdir(parents=True, exist_ok=True)
        save(place)
        loaded = SparseDictionary.from_pretrained(str(place))
        shutil.rmtree(place)
        with torch.no_grad():
            rows = batch().view(-1, N, WIDE) * s_in
            code = torch.cat([loaded.encode(row[None]) for row in rows])  # BatchTopK on its own is TopK
            output = loaded.decode(code, **made) / s_out
        if format == "llamascopium-crosscoder" and "relu" in case and "jump" not in case:
            torch.testing.assert_close(code[:, 0], code[:, 1])
            code = code[:, :1]
        keep(format, case, save, side_by_side(code), side_by_side(output))

    for activation in ("relu", "jumprelu"):
        for norm in ("dataset-wise", "inference"):
            size = {"expansion_factor": (M if activation == "relu" else PER) / WIDE}
            config = CrosscoderConfig(hook_points=outs, act_fn=activation, norm_activation=norm, **{**common, **size})
            name = f"{'random' if norm == 'inference' else 'trained'}_{activation}"
            trained = norm != "inference"
            measure("llamascopium-crosscoder", name, Crosscoder(config), outs, outs, trained)
    for activation in ("relu", "jumprelu", "topk", "batchtopk"):
        for include in (True, False) if "topk" not in activation else (True,):
            for norm in ("dataset-wise", "inference"):
                config = CLTConfig(
                    hook_points_in=ins, hook_points_out=outs, act_fn=activation, norm_activation=norm,
                    sparsity_include_decoder_norm=include, **common,
                )  # fmt: skip
                name = f"{activation}{'' if include else '_no_norm'}{'' if norm == 'inference' else '_scaled'}"
                measure("llamascopium-clt", f"random_{name}", CrossLayerTranscoder(config), ins, outs)
    config = CLTConfig(hook_points_in=ins, hook_points_out=outs, act_fn="topk", **common)
    measure("llamascopium-clt", "trained_topk", CrossLayerTranscoder(config), ins, outs, True)


# ---- saev ---------------------------------------------------------------------------------------------------------


def saev() -> None:
    bare("saev")
    from saev import config, nn

    def measure(case: str, trained: bool) -> None:
        torch.manual_seed(11)
        module = nn.SparseAutoencoder(config.SparseAutoencoder(d_vit=D, exp_factor=M // D, sparsity_coeff=0.01))
        scramble(module)
        if trained:
            optimiser = torch.optim.Adam(module.parameters(), lr=1e-2)
            for step in range(STEPS):
                optimiser.zero_grad()
                module(batch(256, 100 + step))[2].loss.backward()
                optimiser.step()
        place = HERE / "saev" / ".making" / "sae.pt"
        nn.dump(str(place), module)
        loaded = nn.load(str(place))
        shutil.rmtree(place.parent)
        with torch.no_grad():
            output, code, _ = loaded(batch())
        keep("saev", case, lambda folder: nn.dump(str(folder / "sae.pt"), module), code, output)

    measure("random_relu", False)
    measure("trained_relu", True)


LIBRARIES = (circuit_tracer, llamascopium, saev)

if __name__ == "__main__":
    torch.set_num_threads(1)
    for make in LIBRARIES:
        if len(sys.argv) > 1 and make.__name__ not in sys.argv[1:]:
            continue
        try:
            make()
            print(f"{make.__name__}: done")
        except ImportError as error:
            print(f"{make.__name__}: left alone, {error}")
