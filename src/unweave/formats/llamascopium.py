"""llamascopium (lm-saes), version 2: ``config.json`` with ``sae_type`` and ``sae_weights.safetensors``."""

from __future__ import annotations

from pathlib import Path

import torch

from unweave.dictionaries import Dictionary
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
_NORM = "dataset_average_activation_norm."
_THRESHOLD = "activation_function.log_jumprelu_threshold"


@register("llamascopium")
class Llamascopium(Format):
    """``W_E (d, F)``, ``b_E``, ``W_D (F, d)``, ``b_D``; nothing is subtracted; in and out may be two sites.

    With ``norm_activation: dataset-wise`` rows are scaled to a norm of ``sqrt(d)`` on average, input and output by
    norms of their own; thresholds belong to scaled rows (the library's own fold forgets them). With
    ``sparsity_include_decoder_norm`` it acts on ``u ||atom||``, but its code is u: thresholds can be divided by the
    norm, so ReLU and JumpReLU give its codes; TopK needs the norms in the codes, which are the library's times the
    norm of the atom. BatchTopK has no threshold in its files and keeps the k largest of every row here.
    """

    title = "llamascopium"
    checked = "library"

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        kind = checkpoint.quiet_settings(CONFIG).get("sae_type", object)
        return 0.95 if isinstance(kind, str) and checkpoint.find(*_WEIGHTS) else None

    def inspect(self, checkpoint: Checkpoint) -> Facts:
        config, tensors, prefix = self._open(checkpoint)
        kind, activation = config.need("sae_type", str), config.get("act_fn", str, "relu").lower()
        norm = config.get("norm_activation", str, "dataset-wise")
        missing = None
        if kind != "sae":
            missing = lacking({"crosscoder": "crosscoder", "clt": "clt"}.get(kind, kind), f"llamascopium's {kind}")
        elif config.get("use_glu_encoder", bool, False):
            missing = lacking("glu encoder", "an encoder with a second matrix (GLU)")
        elif activation not in _ARCHITECTURES:
            missing = f"llamascopium's activation {activation!r} is not known"
        elif norm not in ("dataset-wise", "inference"):
            missing = lacking("row normalisation", f"norm_activation = {norm!r}")
        hook, target = config.get("hook_point_in", str), config.get("hook_point_out", str)
        sizes = tensors.info[f"{prefix}W_D"] if f"{prefix}W_D" in tensors else None
        notes = ("BatchTopK without a threshold: unweave keeps the k largest of every row",)
        return Facts(
            self.name,
            _ARCHITECTURES.get(activation, activation) if kind == "sae" else kind,
            d_in=config.get("d_model", int),
            d_out=config.get("d_model", int),
            n_features=sizes.shape[0] if sizes and len(sizes.shape) == 2 else None,
            k=config.get("top_k", float) if "topk" in activation else None,
            dtype=sizes.dtype if sizes else None,
            library_class=kind,
            site=site_of_hook(hook),
            target_site=site_of_hook(target) if target != hook else None,
            hook=hook,
            context={"activations": norm},
            notes=notes if activation == "batchtopk" else (),
            missing=missing,
        )

    def parts(self, checkpoint: Checkpoint) -> Parts:
        config, tensors, prefix = self._open(checkpoint)
        d, n_features = tensors.shape(f"{prefix}W_E", 2)
        activation = config.get("act_fn", str, "relu").lower()
        into = out = 1.0
        if config.get("norm_activation", str, "dataset-wise") == "dataset-wise":
            hooks = config.need("hook_point_in", str), config.need("hook_point_out", str)
            into, out = (d**0.5 / tensors.number(f"{prefix}{_NORM}{hook}") for hook in hooks)
        norms: Norms = "apart"
        if config.get("sparsity_include_decoder_norm", bool, True):
            norms = _NORMS.get(activation, "apart")
        return Parts(
            _ARCHITECTURES[activation],
            tensors.read(f"{prefix}W_E", d, n_features).T,
            tensors.read(f"{prefix}W_D", n_features, d),
            b_enc=tensors.read(f"{prefix}b_E", n_features),
            b_dec=tensors.read(f"{prefix}b_D", d) if f"{prefix}b_D" in tensors else None,
            threshold=tensors.read(f"{prefix}{_THRESHOLD}", n_features).exp() if activation == "jumprelu" else None,
            options={"k": config.size("top_k")} if "topk" in activation else {},
            in_scale=into,
            out_scale=out,
            norms=norms,
        )

    def _open(self, checkpoint: Checkpoint) -> tuple[Settings, Tensors, str]:
        name = checkpoint.find(*_WEIGHTS)
        if name is None:
            raise UnweaveError(f"{checkpoint.called}: expected {' or '.join(_WEIGHTS)}")
        return checkpoint.settings(CONFIG), checkpoint.tensors(name), "sae." if name.endswith(".pt") else ""

    def write(self, dictionary: Dictionary, folder: Path, facts: Facts) -> None:
        p = plain(dictionary, self.title, "relu", "topk", "jumprelu")
        if p.d_in != p.d_out:
            raise UnweaveError(f"llamascopium wants equal widths of input and output, found {p.d_in} and {p.d_out}")
        hook = facts.hook or hook_of_site(facts.site) or "unknown"
        config = {
            "sae_type": "sae",
            "d_model": p.d_in,
            "expansion_factor": p.n_features / p.d_in,
            "use_decoder_bias": True,
            "act_fn": p.activation,
            "norm_activation": "inference",
            "sparsity_include_decoder_norm": False,
            "top_k": p.k or 50,
            "hook_point_in": hook,
            "hook_point_out": hook_of_site(facts.target_site) or hook,
            "use_glu_encoder": False,
        }
        if int(p.d_in * config["expansion_factor"]) != p.n_features:  # the library works its size out from the factor
            raise UnweaveError(f"llamascopium cannot express {p.n_features} features at a width of {p.d_in}")
        tensors = {"W_E": p.W_enc.T, "b_E": p.encoder_bias(False, self.title), "W_D": p.W_dec, "b_D": p.b_dec}
        if p.threshold is not None:
            tensors[_THRESHOLD] = p.threshold.clamp_min(torch.finfo(torch.float32).tiny).log()
        for name in {config["hook_point_in"], config["hook_point_out"]}:
            tensors[f"{_NORM}{name}"] = torch.tensor(p.d_in**0.5)
        write_tensors(folder / _WEIGHTS[0], tensors, {"version": "2.0.0b34"})
        write_json(folder / CONFIG, config)
