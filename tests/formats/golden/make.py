"""Lets the real libraries make dictionaries, and keeps their files with what they compute on a fixed batch.

Run in an environment that has the libraries (any of them; the others' files are left alone); ``make_parts.py`` does the
same for more of them::

    python tests/formats/golden/make.py [LIBRARY ...]

Every case is a folder ``LIBRARY/CASE`` as the library writes it, with ``expected.safetensors`` beside it (x, code,
reconstruction) and, where the files do not say enough, ``options.json`` for ``unweave.formats.load``. Cases that start
with ``trained`` went through the library's own loss for a few dozen steps.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HERE = Path(__file__).parent
D, M, K, STEPS = 8, 24, 4, 60


def batch(n: int = 32, seed: int = 1) -> Tensor:
    """Rows that are sums of a few directions, with a mean, of a norm of about 5."""
    generator = torch.Generator().manual_seed(0)
    atoms = torch.nn.functional.normalize(torch.randn(2 * D, D, generator=generator), dim=1)
    mean = torch.randn(D, generator=generator)
    generator = torch.Generator().manual_seed(seed)
    codes = 3 * torch.rand(n, 2 * D, generator=generator) * (torch.rand(n, 2 * D, generator=generator) < 0.25)
    return codes @ atoms + mean + 0.05 * torch.randn(n, D, generator=generator)


def scramble(module: torch.nn.Module, size: float = 0.3) -> None:
    """Move every weight, so that no bias is zero and no norm is one."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.is_floating_point() and parameter.ndim:
                parameter.add_(size * torch.randn(parameter.shape, generator=generator))


def train(loss: Callable[[Tensor], Tensor], parameters: Any) -> None:
    optimiser = torch.optim.Adam(list(parameters), lr=1e-2)
    for step in range(STEPS):
        optimiser.zero_grad()
        loss(batch(256, 100 + step)).backward()
        optimiser.step()


def keep(library: str, case: str, save: Callable[[Path], Any], code: Tensor, output: Tensor, **options: Any) -> None:
    folder = HERE / library / case
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    save(folder)
    tensors = {"x": batch(), "code": code, "reconstruction": output}
    tensors = {name: t.detach().float().contiguous() for name, t in tensors.items()}
    assert tensors["code"].shape == (32, M), f"{case}: {tensors['code'].shape}"
    assert all(bool(torch.isfinite(t).all()) for t in tensors.values())
    save_file(tensors, folder / "expected.safetensors")
    if options:
        (folder / "options.json").write_text(json.dumps(options) + "\n")


def bare(package: str) -> None:
    """Let modules of a package be imported without its ``__init__``, which wants packages for models and pictures."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.submodule_search_locations is None:
        raise ImportError(f"No module named {package!r}")
    module = ModuleType(package)
    module.__path__ = list(spec.submodule_search_locations)
    sys.modules.setdefault(package, module)


def alone(package: str, file: str) -> Any:
    """One module of a package whose ``__init__`` wants API clients."""
    for folder in map(Path, sys.path):
        if (folder / package / file).is_file():
            spec = importlib.util.spec_from_file_location(f"{package}_alone", folder / package / file)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise ImportError(f"No module named {package!r}")


# ---- SAELens ------------------------------------------------------------------------------------------------------


def saelens() -> None:
    from sae_lens import SAE
    from sae_lens.registry import get_sae_class, get_sae_training_class
    from sae_lens.saes.sae import SAEMetadata, TrainStepInput

    def metadata(**more: Any) -> SAEMetadata:
        hook = {"hook_name": "blocks.3.hook_resid_post", "model_name": "gpt2", "context_size": 128, "prepend_bos": True}
        return SAEMetadata(**{**hook, **more})

    def measure(case: str, save: Callable[[Path], Any]) -> None:
        place = HERE / "saelens" / ".making"
        shutil.rmtree(place, ignore_errors=True)
        save(place)
        loaded = SAE.load_from_disk(place)
        with torch.no_grad():
            code = loaded.encode(batch())
            output = loaded.decode(code)
            if "skip" in case:
                output = loaded(batch())
        shutil.rmtree(place)
        keep("saelens", case, save, code, output)

    def random(case: str, architecture: str, **options: Any) -> None:
        kind, config = get_sae_class(architecture)
        torch.manual_seed(3)
        sae = kind(config(d_in=D, d_sae=M, metadata=metadata(), **options))
        scramble(sae)
        if hasattr(sae, "threshold"):
            sae.threshold.data.abs_().mul_(3)
            sae.threshold.data[:3] = 0
        measure(case, sae.save_model)

    random("standard", "standard")
    random("standard_no_subtraction", "standard", apply_b_dec_to_input=False)
    random("topk", "topk", k=K)
    random("topk_rescaled", "topk", k=K, rescale_acts_by_decoder_norm=True)
    random("abstopk", "abstopk", k=K)
    random("jumprelu", "jumprelu")
    random("gated", "gated")
    random("topk_layer_norm", "topk", k=K, normalize_activations="layer_norm")
    random("topk_length", "topk", k=K, normalize_activations="constant_norm_rescale")
    for architecture in ("standard", "jumprelu", "gated"):
        random(f"{architecture}_layer_norm", architecture, normalize_activations="layer_norm")
    random("abstopk_layer_norm", "abstopk", k=K, normalize_activations="layer_norm")
    random("transcoder", "transcoder", d_out=D, apply_b_dec_to_input=False)
    random("jumprelu_transcoder", "jumprelu_transcoder", d_out=D, apply_b_dec_to_input=False)
    random("skip_transcoder", "skip_transcoder", d_out=D, apply_b_dec_to_input=False)

    random("jumprelu_skip_transcoder", "jumprelu_skip_transcoder", d_out=D, apply_b_dec_to_input=False)
    pursuit = {"max_iterations": K, "residual_threshold": 0.5}
    random("matching_pursuit", "matching_pursuit", **pursuit)
    random("matching_pursuit_repeats", "matching_pursuit", stop_on_duplicate_support=False, **pursuit)

    def trained(case: str, architecture: str, **options: Any) -> None:
        kind, config = get_sae_training_class(architecture)
        torch.manual_seed(4)
        sae = kind(config(d_in=D, d_sae=M, metadata=metadata(), **options))
        scramble(sae, 0.05)

        def loss(x: Tensor) -> Tensor:
            coefficients = {name: getattr(c, "value", c) for name, c in sae.get_coefficients().items()}
            return sae.training_forward_pass(TrainStepInput(x, coefficients, None, 0, False)).loss

        train(loss, sae.parameters())
        measure(case, sae.save_inference_model)

    trained("trained_standard", "standard", l1_coefficient=0.1)
    trained("trained_gated", "gated", l1_coefficient=0.1)
    trained("trained_topk", "topk", k=K)
    trained("trained_abstopk", "abstopk", k=K)
    trained("trained_jumprelu", "jumprelu", jumprelu_bandwidth=0.5, jumprelu_init_threshold=0.2, l0_coefficient=0.1)
    trained("trained_batchtopk", "batchtopk", k=float(K), topk_threshold_lr=0.1)
    trained(
        "trained_matryoshka", "matryoshka_batchtopk", k=float(K), matryoshka_widths=[6, 12, M], topk_threshold_lr=0.1
    )
    trained("trained_matching_pursuit", "matching_pursuit", max_iterations=K)

    def flat(case: str, architecture: str, **settings: Any) -> None:
        """The settings before version 6, over weights of today."""
        kind, config = get_sae_class(architecture)
        torch.manual_seed(5)
        sae = kind(config(d_in=D, d_sae=M, **({"k": K} if architecture == "topk" else {})))
        scramble(sae)

        def save(folder: Path) -> None:
            sae.save_model(folder)
            values = {
                "d_in": D,
                "d_sae": M,
                "dtype": "torch.float32",
                "device": "cpu",
                "model_name": "gpt2",
                **settings,
            }
            values |= {"hook_layer": 3, "context_size": 128, "prepend_bos": True, "sae_lens_training_version": "3.9.1"}
            (folder / "cfg.json").write_text(json.dumps(values))

        measure(case, save)

    flat("flat_standard", "standard", hook_point="blocks.3.hook_resid_pre", normalize_activations=False)
    flat(
        "flat_topk",
        "topk",
        hook_name="blocks.3.hook_resid_pre",
        activation_fn_str="topk",
        activation_fn_kwargs={"k": K},
        apply_b_dec_to_input=False,
        normalize_activations="none",
    )


# ---- dictionary_learning ------------------------------------------------------------------------------------------


def dictionary_learning() -> None:
    from dictionary_learning import dictionary as classes
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
    from dictionary_learning.trainers.gdm import GatedSAETrainer
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE, MatryoshkaBatchTopKTrainer
    from dictionary_learning.trainers.standard import StandardTrainer
    from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer
    from dictionary_learning.utils import load_dictionary

    def measure(case: str, module: Any, **more: Any) -> None:
        kind = type(module).__name__
        trainer = {
            "dict_class": kind,
            "activation_dim": D,
            "dict_size": M,
            "layer": 3,
            "lm_name": "EleutherAI/pythia-70m",
        }
        trainer |= {"submodule_name": "resid_post_layer_3", **more}

        def save(folder: Path) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            torch.save(module.state_dict(), folder / "ae.pt")
            buffer = {"ctx_len": 128, "d_submodule": D, "io": "out"}
            (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": buffer}))

        place = HERE / "dictionary_learning" / ".making"
        shutil.rmtree(place, ignore_errors=True)
        save(place)
        loaded, _ = load_dictionary(str(place), "cpu")
        shutil.rmtree(place)
        with torch.no_grad():
            code = loaded.encode(batch())
            keep("dictionary_learning", case, save, code, loaded.decode(code))

    torch.manual_seed(6)
    for kind in (classes.AutoEncoder, classes.AutoEncoderNew, classes.GatedAutoEncoder, classes.JumpReluAutoEncoder):
        module = kind(D, M)
        scramble(module)
        if hasattr(module, "threshold"):
            module.threshold.data.abs_().mul_(3)
        measure(f"random_{kind.__name__}", module)
    groups = {"group_sizes": [4, 8, 12]}
    for kind, options in ((AutoEncoderTopK, {}), (BatchTopKSAE, {}), (MatryoshkaBatchTopKSAE, groups)):
        module = kind(D, M, k=K, **options)
        scramble(module)
        measure(f"random_{kind.__name__}", module, k=K)

    common = {"activation_dim": D, "dict_size": M, "layer": 3, "lm_name": "EleutherAI/pythia-70m", "device": "cpu"}
    common |= {"steps": STEPS, "lr": 1e-2, "warmup_steps": 1, "seed": 0}
    topk = {"k": K, "threshold_start_step": 5, "threshold_beta": 0.9}
    fractions = {"group_fractions": [0.25, 0.25, 0.5]}
    trainers = {
        "trained_AutoEncoder": StandardTrainer(l1_penalty=0.1, sparsity_warmup_steps=1, **common),
        "trained_GatedAutoEncoder": GatedSAETrainer(l1_penalty=0.1, sparsity_warmup_steps=1, **common),
        "trained_AutoEncoderTopK": TopKTrainer(**common, **topk),
        "trained_BatchTopKSAE": BatchTopKTrainer(**common, **topk),
        "trained_MatryoshkaBatchTopKSAE": MatryoshkaBatchTopKTrainer(**common, **topk, **fractions),
        "trained_JumpReluAutoEncoder": JumpReluTrainer(target_l0=K, bandwidth=0.5, sparsity_warmup_steps=1, **common),
    }
    for case, trainer in trainers.items():
        for step in range(STEPS):
            trainer.update(step, batch(256, 100 + step))
        measure(case, trainer.ae, **({"k": K} if "TopK" in case else {}))


# ---- sparsify -----------------------------------------------------------------------------------------------------


def sparsify() -> None:
    from sparsify import SparseCoder
    from sparsify.config import SparseCoderConfig

    def measure(case: str, trained: bool = False, **options: Any) -> None:
        torch.manual_seed(7)
        module = SparseCoder(D, SparseCoderConfig(k=K, **options))
        scramble(module, 0.1 if trained else 0.3)
        if trained:
            train(lambda x: module(x).fvu, module.parameters())
        name = f"{case}/layers.3.mlp" if options.get("transcode") else f"{case}/layers.3"
        place = HERE / "sparsify" / ".making"
        module.save_to_disk(place)
        loaded = SparseCoder.load_from_disk(place)
        shutil.rmtree(place)
        with torch.no_grad():
            values, indices, _ = loaded.encode(batch())
            code = torch.zeros(32, M).scatter_(1, indices, values)
            keep("sparsify", name, module.save_to_disk, code, loaded(batch()).sae_out)

    measure("random", expansion_factor=3)
    measure("random_num_latents", num_latents=M)
    measure("random_transcoder", num_latents=M, transcode=True)
    measure("random_skip_transcoder", num_latents=M, transcode=True, skip_connection=True)
    measure("random_groupmax", num_latents=M, activation="groupmax")
    skip = {"transcode": True, "skip_connection": True}
    measure("random_groupmax_skip", num_latents=M, activation="groupmax", **skip)
    measure("trained", True, num_latents=M)
    measure("trained_transcoder", True, num_latents=M, transcode=True)
    measure("trained_skip_transcoder", True, num_latents=M, transcode=True, skip_connection=True)
    measure("trained_groupmax", True, num_latents=M, activation="groupmax")


# ---- overcomplete -------------------------------------------------------------------------------------------------


def overcomplete() -> None:
    bare("overcomplete")
    from overcomplete.sae import OMPSAE, SAE, BatchTopKSAE, JumpSAE, MpSAE, RAJumpSAE, RATopKSAE, TopKSAE

    def measure(case: str, module: Any, trained: bool = False, **options: Any) -> None:
        scramble(module, 0.1)
        module.train()
        if trained:
            train(lambda x: (x - module(x)[2]).square().sum(1).mean(), module.parameters())
        module(batch(256, 5))  # brings the dictionary to its norm, and BatchTopK to a threshold
        threshold = getattr(module, "running_threshold", None)
        if threshold is not None:
            options["threshold"] = float(threshold)
        module.eval()
        with torch.no_grad():
            _, code, output = module(batch())
        state = module.state_dict()
        keep("overcomplete", case, lambda folder: torch.save(state, folder / "sae.pt"), code, output, **options)

    torch.manual_seed(8)
    scaled = {"use_multiplier": True}
    for trained in (False, True):
        name = "trained" if trained else "random"
        measure(f"{name}_sae", SAE(D, M), trained, arch="relu")
        measure(f"{name}_topk", TopKSAE(D, M, top_k=K, dictionary_params=scaled), trained, arch="topk", k=K)
        measure(f"{name}_batchtopk", BatchTopKSAE(D, M, top_k=256 * K), trained, arch="batch_topk", k=K)
        measure(f"{name}_jump", JumpSAE(D, M, bandwidth=0.1), trained)
        measure(f"{name}_tied", TopKSAE(D, M, top_k=K).tied(bias=True), trained, arch="topk", k=K)
        measure(f"{name}_untied", TopKSAE(D, M, top_k=K).untied(), trained, arch="topk", k=K)
    for how in ("max_l2", "l1", "max_l1", "identity"):
        module = TopKSAE(D, M, top_k=K, dictionary_params={"normalization": how})
        measure(f"random_{how}", module, arch="topk", k=K, normalization=how)
    measure("random_mp", MpSAE(D, M, k=K), arch="mp", k=K)
    for trained in (False, True):
        name = "trained" if trained else "random"
        points = batch(40, 9)
        measure(f"{name}_archetypal", RATopKSAE(D, M, points=points, top_k=K), trained, arch="topk", k=K)
        measure(f"{name}_archetypal_jump", RAJumpSAE(D, M, points=points), trained)
        # With its default of 10 steps the library's least squares are off by a tenth.
        measure(f"{name}_omp", OMPSAE(D, M, k=K, max_iter=3000), trained, arch="omp", k=K)
    measure("trained_mp", MpSAE(D, M, k=K), True, arch="mp", k=K)


# ---- llamascopium -------------------------------------------------------------------------------------------------


def llamascopium() -> None:
    from llamascopium.models.sae import SAEConfig, SparseAutoEncoder
    from llamascopium.models.sparse_dictionary import SparseDictionary

    hooks = {"hook_point_in": "blocks.3.hook_resid_post", "hook_point_out": "blocks.3.hook_resid_post"}
    apart = {"hook_point_in": "blocks.3.hook_resid_mid", "hook_point_out": "blocks.3.hook_mlp_out"}

    def measure(case: str, trained: bool = False, **options: Any) -> None:
        options = {**hooks, "d_model": D, "expansion_factor": M / D, "top_k": K, **options}
        torch.manual_seed(9)
        module = SparseAutoEncoder(SAEConfig(**options))
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                parameter.copy_(torch.randn_like(parameter) * 0.4 - (1.0 if "threshold" in name else 0.0))
        norms = {options["hook_point_in"]: 5.0, options["hook_point_out"]: 5.0}
        if options["hook_point_in"] != options["hook_point_out"]:
            norms[options["hook_point_out"]] = 2.0
        module.set_dataset_average_activation_norm(norms)
        scale = {
            hook: 1.0 if options.get("norm_activation") == "inference" else D**0.5 / n for hook, n in norms.items()
        }
        into, out = scale[options["hook_point_in"]], scale[options["hook_point_out"]]
        if options.get("norm_activation") == "token-wise":
            into = out = D**0.5 / batch().norm(dim=1, keepdim=True)
        if trained:
            train(lambda x: (out * x - module(into * x)).square().sum(1).mean(), module.parameters())

        def save(folder: Path) -> None:
            module.save_pretrained(folder)
            module.cfg.save_hyperparameters(folder)

        place = HERE / "llamascopium" / ".making"
        place.mkdir(parents=True, exist_ok=True)
        save(place)
        loaded = SparseDictionary.from_pretrained(str(place))
        shutil.rmtree(place)
        with torch.no_grad():
            code = torch.cat([loaded.encode(row[None]) for row in into * batch()])  # BatchTopK on its own is TopK
            output = loaded.decode(code) / out
            # unweave's codes are in units of the output; where norms decide who is in the top k, times the norm
            expected = code if isinstance(out, Tensor) else code / out
            if "topk" in options.get("act_fn", "") and options.get("sparsity_include_decoder_norm", True):
                expected = expected * loaded.decoder_norm()
        keep("llamascopium", case, save, expected, output)

    for activation in ("relu", "jumprelu", "topk"):
        measure(f"random_{activation}", act_fn=activation)
        measure(f"random_{activation}_no_norm", act_fn=activation, sparsity_include_decoder_norm=False)
        measure(f"random_{activation}_inference", act_fn=activation, norm_activation="inference")
        measure(f"random_{activation}_two_sites", act_fn=activation, **apart)
        measure(f"trained_{activation}", True, act_fn=activation)
    measure("random_no_decoder_bias", act_fn="topk", use_decoder_bias=False)
    measure("random_glu", act_fn="topk", use_glu_encoder=True)
    measure("random_glu_relu", act_fn="relu", use_glu_encoder=True, **apart)
    measure("trained_glu", True, act_fn="topk", use_glu_encoder=True)
    measure("random_batchtopk", act_fn="batchtopk")
    for activation in ("relu", "jumprelu", "topk"):
        measure(f"random_{activation}_by_token", act_fn=activation, norm_activation="token-wise")


# ---- HypotheSAEs --------------------------------------------------------------------------------------------------


def hypothesaes() -> None:
    SparseAutoencoder = alone("hypothesaes", "sae.py").SparseAutoencoder

    def measure(case: str, trained: bool, **options: Any) -> None:
        torch.manual_seed(10)
        module = SparseAutoencoder(D, M, K, device="cpu", **options)
        scramble(module)
        if trained:
            train(lambda x: module.compute_loss(x, *module(x), 1 / 32, 0.0), module.parameters())
        elif options.get("use_batch_topk"):
            module.threshold.fill_(0.7)
        module.eval()
        with torch.no_grad():
            output, info = module(batch())
        keep("hypothesaes", case, lambda folder: module.save(str(folder / "sae.pt")), info["activations"], output)

    for trained in (False, True):
        name = "trained" if trained else "random"
        measure(f"{name}_topk", trained)
        measure(f"{name}_matryoshka_topk", trained, prefix_lengths=[6, M])
        measure(f"{name}_batch_topk", trained, use_batch_topk=True)
        measure(f"{name}_matryoshka", trained, use_batch_topk=True, prefix_lengths=[6, 12, M])


LIBRARIES = (saelens, dictionary_learning, sparsify, overcomplete, llamascopium, hypothesaes)

if __name__ == "__main__":
    torch.set_num_threads(1)
    for make in LIBRARIES:
        if len(sys.argv) > 1 and make.__name__ not in sys.argv[1:]:
            continue
        try:
            make()
            print(f"{make.__name__}: {len(list((HERE / make.__name__).rglob('expected.safetensors')))} cases")
        except ImportError as error:
            print(f"{make.__name__}: left alone, {error}")
