"""llamascopium (lm-saes), version 2: ``config.json`` with ``sae_type`` and ``sae_weights.safetensors``.

Its ``sae`` is a transcoder where the two hooks differ. Crosscoders and CLTs are in ``llamascopium_parts``.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from unweave.dictionaries import Dictionary, names
from unweave.errors import UnweaveError
from unweave.files import write_json, write_tensors
from unweave.formats._checkpoint import Checkpoint
from unweave.formats._facts import Facts, hook_of_site, site_of_hook
from unweave.formats._fold import Norms, Parts
from unweave.formats._plain import plain
from unweave.formats.containers import Settings, Tensors
from unweave.formats.registry import Format, lacking, register

CONFIG = "config.json"
_WEIGHTS = ("sae_weights.safetensors", "sae_weights.pt")
_ARCHITECTURES = {"relu": "relu", "jumprelu": "jumprelu", "topk": "topk", "batchtopk": "batch_topk"}
_NORMS: dict[str, Norms] = {"topk": "in_codes", "batchtopk": "in_codes", "jumprelu": "in_threshold"}
_OTHERS = {
    "molt": "a MOLT is a mixture of linear maps that are switched on and off, no dictionary of directions",
    "lorsa": "a Lorsa replaces attention and reads whole sequences, which no dictionary of rows does",
}
PARTS = ("crosscoder", "clt")
NORM = "dataset_average_activation_norm."
THRESHOLD = "activation_function.log_jumprelu_threshold"
BY_ROW = "BatchTopK without a threshold: unweave keeps the k largest of every row"


@register("llamascopium")
class Llamascopium(Format):
    """``W_E (d, F)``, ``b_E``, ``W_D (F, d)``, ``b_D``; nothing is subtracted; in and out may be two sites.

    With ``norm_activation: dataset-wise`` rows are scaled to a norm of ``sqrt(d)`` on average, input and output by
    norms of their own; thresholds belong to scaled rows (the library's own fold forgets them). With ``token-wise``
    every row is scaled to that norm itself, as ``standardised_relu`` and its like do; with ``batch-wise`` by the
    average of its batch, which a row alone does not know. With ``sparsity_include_decoder_norm`` it acts on
    ``u ||atom||``, but its code is u: thresholds can be divided by the norm, so ReLU and JumpReLU give its codes; TopK
    needs the norms in the codes, which are the library's times the norm of the atom. BatchTopK has no threshold in its
    files and keeps the k largest of every row here. With ``use_glu_encoder`` u is multiplied by
    ``sigmoid(x W_E_glu + b_E_glu)``.
    """

    title = "llamascopium"
    checked = "library"
    options: ClassVar[dict[str, str]] = {"norm": "the average norm of rows, for norm_activation = 'batch-wise'"}

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        kind = sae_type(checkpoint)
        return 0.95 if kind is not None and kind not in PARTS else None

    def inspect(self, checkpoint: Checkpoint, norm: float | None = None) -> Facts:
        config, tensors, prefix = open_both(checkpoint)
        kind, activation = config.need("sae_type", str), config.get("act_fn", str, "relu").lower()
        architecture, scaled = _architecture(config), config.get("norm_activation", str, "dataset-wise")
        hook, target = config.get("hook_point_in", str), config.get("hook_point_out", str)
        missing = None
        if kind != "sae":
            missing = _OTHERS.get(kind, f"llamascopium's {kind!r} is not known")
        elif activation not in _ARCHITECTURES:
            missing = f"llamascopium's activation {activation!r} is not known"
        elif architecture not in names():
            missing = lacking(architecture, f"{activation} with norm_activation = {scaled!r} or a GLU encoder")
        elif scaled in ("token-wise", "batch-wise") and target != hook:
            missing = f"norm_activation = {scaled!r} scales its output by the norm of the target, which is not known"
        elif scaled == "batch-wise" and norm is None:
            missing = "rows are scaled by the average norm of their batch, which is not in its files: give norm="
        elif scaled not in ("dataset-wise", "inference", "token-wise", "batch-wise"):
            missing = f"norm_activation = {scaled!r} is not known"
        sizes = tensors.info[f"{prefix}W_D"] if f"{prefix}W_D" in tensors else None
        return Facts(
            self.name,
            architecture if kind == "sae" else kind,
            d_in=config.get("d_model", int),
            d_out=config.get("d_model", int),
            n_features=sizes.shape[0] if sizes and len(sizes.shape) == 2 else None,
            k=config.get("top_k", float) if "topk" in activation else None,
            dtype=sizes.dtype if sizes else None,
            library_class=kind,
            site=site_of_hook(hook),
            target_site=site_of_hook(target) if target != hook else None,
            hook=hook,
            context={"activations": scaled},
            notes=(BY_ROW,) if activation == "batchtopk" else (),
            missing=missing,
        )

    def parts(self, checkpoint: Checkpoint, norm: float | None = None) -> Parts:
        config, tensors, prefix = open_both(checkpoint)
        d, n_features = tensors.shape(f"{prefix}W_E", 2)
        activation, architecture = config.get("act_fn", str, "relu").lower(), _architecture(config)
        options: dict[str, Any] = {"k": config.size("top_k")} if "topk" in activation else {}
        scaled, into, out = config.get("norm_activation", str, "dataset-wise"), 1.0, 1.0
        if scaled == "dataset-wise":
            hooks = config.need("hook_point_in", str), config.need("hook_point_out", str)
            into, out = (d**0.5 / tensors.number(f"{prefix}{NORM}{hook}") for hook in hooks)
        elif scaled == "batch-wise" and norm:
            into = out = d**0.5 / norm
        elif scaled == "token-wise":
            options["standardise"] = "length"
        more: dict[str, Any] = {}
        if architecture == "glu":
            options["activation"] = "topk" if "topk" in activation else "relu"
            more["W_gate"] = tensors.read(f"{prefix}W_E_glu", d, n_features).T
            more["b_gate"] = tensors.read(f"{prefix}b_E_glu", n_features)
        norms: Norms = "apart"
        if config.get("sparsity_include_decoder_norm", bool, True):
            norms = _NORMS.get(activation, "apart")
        return Parts(
            architecture,
            tensors.read(f"{prefix}W_E", d, n_features).T,
            tensors.read(f"{prefix}W_D", n_features, d),
            b_enc=tensors.read(f"{prefix}b_E", n_features),
            b_dec=tensors.read(f"{prefix}b_D", d) if f"{prefix}b_D" in tensors else None,
            threshold=tensors.read(f"{prefix}{THRESHOLD}", n_features).exp() if activation == "jumprelu" else None,
            options=options,
            in_scale=into,
            out_scale=out,
            norms=norms,
            **more,
        )

    def write(self, dictionary: Dictionary, folder: Path, facts: Facts) -> None:
        p = plain(dictionary, self.title, "relu", "topk", "jumprelu")
        if p.d_in != p.d_out:
            raise UnweaveError(f"llamascopium wants equal widths of input and output, found {p.d_in} and {p.d_out}")
        hook = facts.hook or hook_of_site(facts.site)
        if hook is None:
            raise UnweaveError(
                f"{self.title} names what it reads by TransformerLens's hooks, and none is known for the site "
                f"{facts.site or '(unknown)'}: say the site, with site= (--site layers.12)"
            )
        hooks = {"hook_point_in": hook, "hook_point_out": hook_of_site(facts.target_site) or hook}
        config = settings("sae", p.d_in, p.n_features, p.activation, p.k) | hooks | {"use_glu_encoder": False}
        tensors = {"W_E": p.W_enc.T, "b_E": p.encoder_bias(False, self.title), "W_D": p.W_dec, "b_D": p.b_dec}
        if p.threshold is not None:
            tensors[THRESHOLD] = p.threshold.clamp_min(torch.finfo(torch.float32).tiny).log()
        write_both(folder, config, tensors, set(hooks.values()))


def sae_type(checkpoint: Checkpoint) -> str | None:
    """What llamascopium calls it, or None where it is none of its checkpoints."""
    kind = checkpoint.quiet_settings(CONFIG).get("sae_type", object)
    return kind if isinstance(kind, str) and checkpoint.find(*_WEIGHTS) else None


def open_both(checkpoint: Checkpoint) -> tuple[Settings, Tensors, str]:
    """Settings, weights, and what stands before the names of the weights."""
    name = checkpoint.find(*_WEIGHTS)
    if name is None:
        raise UnweaveError(f"{checkpoint.called}: expected {' or '.join(_WEIGHTS)}")
    return checkpoint.settings(CONFIG), checkpoint.tensors(name), "sae." if name.endswith(".pt") else ""


def settings(kind: str, d: int, n_features: int, activation: str, k: int | None) -> dict[str, Any]:
    """What ``config.json`` holds for all kinds; d and n_features are of one part or layer."""
    if int(d * (n_features / d)) != n_features:  # the library works its size out from the factor
        raise UnweaveError(f"llamascopium cannot express {n_features} features at a width of {d}")
    return {
        "sae_type": kind,
        "d_model": d,
        "expansion_factor": n_features / d,
        "use_decoder_bias": True,
        "act_fn": activation,
        "norm_activation": "inference",
        "sparsity_include_decoder_norm": False,
        "top_k": k or 50,
    }


def write_both(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor], hooks: Iterable[str]) -> None:
    """Settings and weights, with an average norm of ``sqrt(d)`` at every hook."""
    norms = {f"{NORM}{hook}": torch.tensor(config["d_model"] ** 0.5) for hook in hooks}
    write_tensors(folder / _WEIGHTS[0], tensors | norms, {"version": "2.0.0b34"})
    write_json(folder / CONFIG, config)


def _architecture(config: Settings) -> str:
    """Its name in unweave's registry, whether or not it is there."""
    activation = config.get("act_fn", str, "relu").lower()
    name = _ARCHITECTURES.get(activation, activation)
    if config.get("use_glu_encoder", bool, False):
        name = f"glu_{name}" if name == "jumprelu" else "glu"
    if config.get("norm_activation", str, "dataset-wise") == "token-wise":
        name = f"standardised_{'topk' if name == 'batch_topk' else name}"
    return name
