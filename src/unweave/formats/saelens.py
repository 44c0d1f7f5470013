"""SAELens: ``cfg.json`` and ``sae_weights.safetensors``, of version 6 or with the flat settings before it."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from unweave.dictionaries import MP, Dictionary, build, names
from unweave.dictionaries.transcoder import Skip
from unweave.errors import UnweaveError
from unweave.files import write_json, write_tensors
from unweave.formats._checkpoint import Checkpoint
from unweave.formats._facts import Facts, hook_of_site, site_of_hook
from unweave.formats._fold import Parts
from unweave.formats._plain import plain
from unweave.formats.catalogue import Entry
from unweave.formats.catalogue.entry import number
from unweave.formats.containers import Settings
from unweave.formats.registry import Format, lacking, register

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
_VERSION = "6.54.12"  # whose layout is written
# The library's architecture and the registry's.
_ARCHITECTURES = {"standard": "relu", "topk": "topk", "abstopk": "abs_topk", "jumprelu": "jumprelu"}
_ARCHITECTURES |= {"transcoder": "relu", "jumprelu_transcoder": "jumprelu"}
_ARCHITECTURES |= {"batchtopk": "batch_topk", "matryoshka_batchtopk": "matryoshka"}
_ARCHITECTURES |= {"gated": "gated", "matching_pursuit": "mp"}
_ARCHITECTURES |= {"skip_transcoder": "skip_transcoder", "jumprelu_skip_transcoder": "jumprelu_skip_transcoder"}
_TEMPORAL = (
    "its temporal dictionaries predict a row by attention over all rows before it and encode what is left, so a row "
    "alone has no code; unweave's 'temporal' is another method"
)
_PER_ROW = {"layer_norm": "layer_norm", "constant_norm_rescale": "length"}
_CONTEXT = (
    "context_size",
    "prepend_bos",
    "dataset_path",
    "training_architecture",
    "sae_lens_version",
    "neuronpedia_id",
)
# Repositories on the hub: the model, and the hook where their folders name only the layer.
_GPT2, _PYTHIA, _GEMMA_2 = "openai-community/gpt2", "EleutherAI/pythia-70m-deduped", "google/gemma-2-2b"
_REPOSITORIES = {
    "jbloom/GPT2-Small-SAEs-Reformatted": (_GPT2, None),
    "jbloom/GPT2-Small-Feature-Splitting-Experiment-Layer-8": (_GPT2, None),
    "tommmcgrath/gpt2-small-mlp-out-saes": (_GPT2, None),
    "jbloom/Gemma-2b-Residual-Stream-SAEs": ("google/gemma-2b", None),
    "jbloom/Gemma-2b-IT-Residual-Stream-SAEs": ("google/gemma-2b-it", None),
    "Juliushanhanhan/llama-3-8b-it-res": ("meta-llama/Meta-Llama-3-8B-Instruct", None),
    "chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40": (_GEMMA_2, None),
    "chanind/gemma-2-9b-batch-topk-matryoshka-saes-w-32k-l0-60": ("google/gemma-2-9b", None),
    "chanind/gemma-3-1b-batch-topk-matryoshka-saes-w-32k-l0-40": ("google/gemma-3-1b-pt", None),
}
_REPOSITORIES |= {
    f"jbloom/GPT2-Small-OAI-v5-{width}k-{part}-SAEs": (_GPT2, f"hook_{part.replace('-', '_')}")
    for width in (32, 128)
    for part in ("attn-out", "mlp-out", "resid-mid", "resid-post")
}
_REPOSITORIES |= {
    f"neuronpedia/gpt2-small__res_{kind}-ajt": (_GPT2, "hook_resid_pre")
    for kind in ("sce", "scefr", "scl", "sle", "slefr", "sll")
}
_REPOSITORIES |= {
    f"ctigges/pythia-70m-deduped__{part}-sm_processed": (_PYTHIA, hook)
    for part, hook in (("att", "hook_attn_out"), ("mlp", "hook_mlp_out"), ("res", "hook_resid_post"))
}


@register("saelens")
class SAELens(Format):
    """``W_enc (d, F)``, ``W_dec (F, d)``, ``b_enc``, ``b_dec``, ``threshold (F)``; transposed here.

    ``apply_b_dec_to_input`` says whether the encoder subtracts ``b_dec``. With ``rescale_acts_by_decoder_norm`` the
    library acts on ``u ||atom||`` and decodes with unit atoms: the norms go into the codes. BatchTopK and Matryoshka
    dictionaries are written by the library as ``jumprelu`` with one threshold; unfinished ones keep their names.
    Matching pursuit has no encoder, and no decoder bias either where none is subtracted. The library lets a row make
    its first pick however small it is; a row that is below ``residual_threshold`` from the start has no code here.
    """

    title = "SAELens"
    checked = "library"
    options: ClassVar[dict[str, str]] = {
        "norm_scaling_factor": "what activations were multiplied with, for expected_average_only_in that is not folded"
    }

    repositories: ClassVar[dict[str, str]] = {name: model for name, (model, _) in _REPOSITORIES.items()}

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        return 0.95 if checkpoint.find(CONFIG) and checkpoint.find(WEIGHTS) else None

    def inspect(self, checkpoint: Checkpoint, norm_scaling_factor: float | None = None) -> Facts:
        config = _Config(checkpoint.settings(CONFIG))
        tensors, architecture = checkpoint.tensors(WEIGHTS), config.architecture
        n_features, d_out = tensors.shape("W_dec", 2)
        notes, missing = [], None
        if architecture == "temporal":
            missing = _TEMPORAL
        elif architecture not in _ARCHITECTURES:
            missing = f"SAELens's architecture {architecture!r} is not known"
        elif config.normalisation in _PER_ROW and config.registered not in names():
            missing = lacking(
                config.registered, f"{architecture} with normalize_activations = {config.normalisation!r}"
            )
        elif config.activation not in ("relu", "topk"):
            missing = f"the activation {config.activation!r} is not known"
        if config.normalisation == "expected_average_only_in" and norm_scaling_factor is None:
            notes.append("trained on scaled activations; from a folder SAELens takes the scale as folded, and so do we")
        if config.hook and config.hook.endswith("hook_z"):
            notes.append("rows are all heads side by side")
        return Facts(
            self.name,
            config.registered,
            d_in=tensors.shape("W_enc", 2)[0] if "W_enc" in tensors else d_out,
            d_out=d_out,
            n_features=n_features,
            k=config.k if config.registered != "mp" else config.picks(d_out),
            dtype=tensors.info["W_dec"].dtype,
            library_class=architecture,
            model=config.word("model_name"),
            site=site_of_hook(config.hook),
            target_site=site_of_hook(config.word("hook_name_out")),
            hook=config.hook,
            context={name: config.any(name) for name in _CONTEXT},
            notes=tuple(notes),
            missing=missing,
        )

    def named(self, repository: str, file: str) -> Entry | None:
        place, _, last = file.rpartition("/")
        if not place or last != WEIGHTS:
            return None
        hook = re.search(r"blocks\.(\d+)\.(hook_[a-z]+_[a-z]+)(?:_(\d+))?", place)
        layer = hook or re.search(r"(?:^|layer_)(\d+)(?:$|-|\.)", place)
        declared = _REPOSITORIES[repository][1]
        name = hook[2] if hook else declared
        width = re.search(r"(?:^v5_|-w-)(\d+)k", place) or re.search(r"-w-(\d+)k", repository)
        l0 = re.search(r"-l0-(\d+)$", repository)
        return Entry(
            self.name,
            repository,
            place,
            site=site_of_hook(f"blocks.{layer[1]}.{name}") if layer else None,
            layer=int(layer[1]) if layer else None,
            width=number(hook[3]) if hook and hook[3] else 1024 * int(width[1]) if width else None,
            l0=number(l0[1]) if l0 else None,
            declared=() if hook or not layer else ("site",),
        )

    def parts(self, checkpoint: Checkpoint, norm_scaling_factor: float | None = None) -> Parts | Dictionary:
        config = _Config(checkpoint.settings(CONFIG))
        tensors = checkpoint.tensors(WEIGHTS)
        n_features, d_out = tensors.shape("W_dec", 2)
        pursuit = config.registered == "mp"
        d_in = d_out if pursuit else tensors.shape("W_enc", 2)[0]
        for key, found in (("d_in", d_in), ("d_sae", n_features), ("d_out", d_out)):
            declared = config.settings.get(key, int)
            if declared is not None and declared != found:
                raise UnweaveError(f"{checkpoint.called}: {CONFIG} says {key} = {declared}, the weights have {found}")
        W_dec, b_dec = tensors.read("W_dec", n_features, d_out), tensors.read("b_dec", d_out)
        if "scaling_factor" in tensors:  # of files finetuned to undo shrinkage: codes are multiplied before decoding
            W_dec = W_dec * tensors.read("scaling_factor", n_features)[:, None]
        scale = 1.0 if norm_scaling_factor is None else float(norm_scaling_factor)
        if pursuit:
            return _pursuit(config, W_dec, b_dec, scale)
        gated = config.architecture == "gated"
        more: dict[str, Any] = {}
        if gated:
            more = {ours: tensors.read(name, n_features) for ours, name in (("log_magnitude", "r_mag"), ("b_mag",) * 2)}
        if "skip" in config.architecture:
            more["W_skip"] = tensors.read("W_skip", d_out, d_in).T
        return Parts(
            config.registered,
            tensors.read("W_enc", d_in, n_features).T,
            W_dec,
            b_enc=tensors.read("b_gate" if gated else "b_enc", n_features),
            b_dec=b_dec,
            b_pre=b_dec if config.subtracts else None,
            threshold=self._threshold(config, tensors, n_features),
            options=config.options(n_features),
            in_scale=scale,
            out_scale=scale,
            norms="in_codes" if config.settings.get("rescale_acts_by_decoder_norm", bool, False) else "apart",
            **more,
        )

    def _threshold(self, config: _Config, tensors: Any, n_features: int) -> Any:
        if config.architecture.startswith("jumprelu"):
            if "log_threshold" in tensors:
                return tensors.read("log_threshold", n_features).exp()
            return tensors.read("threshold", n_features)
        return tensors.number("topk_threshold") if "batchtopk" in config.architecture else None

    def write(self, dictionary: Dictionary, folder: Path, facts: Facts) -> None:
        if isinstance(dictionary, MP):
            config, tensors = _written_pursuit(dictionary)
        else:
            config, tensors = self._written(dictionary)
        hook = facts.hook or hook_of_site(facts.site)
        metadata = {"sae_lens_version": _VERSION, "model_name": facts.model, "hook_name": hook}
        metadata["hook_name_out"] = hook_of_site(facts.target_site)
        config |= {
            "d_in": dictionary.d_in,
            "d_sae": dictionary.n_features,
            "dtype": "float32",
            "device": "cpu",
            "reshape_activations": "hook_z" if (hook or "").endswith("hook_z") else "none",
            "metadata": {name: value for name, value in metadata.items() if value is not None},
        }
        write_tensors(folder / WEIGHTS, tensors)
        write_json(folder / CONFIG, config)

    def _written(self, dictionary: Dictionary) -> tuple[dict[str, Any], dict[str, Tensor]]:
        skips = isinstance(dictionary, Skip)
        transcodes = skips or dictionary.d_in != dictionary.d_out
        whole = ("relu", "topk", "abs_topk", "jumprelu", "gated", "standardise")
        can = ("relu", "jumprelu", "skip") if transcodes else whole
        p = plain(dictionary, "SAELens's transcoder" if transcodes else "SAELens", *can)
        subtracts = p.subtracts and not transcodes
        named = {"relu": "standard", "topk": "topk", "abs_topk": "abstopk", "jumprelu": "jumprelu", "gated": "gated"}
        kind = "skip_transcoder" if skips else "transcoder"
        architecture = {"relu": kind, "jumprelu": f"jumprelu_{kind}"} if transcodes else named
        config: dict[str, Any] = {"architecture": architecture[p.activation], "apply_b_dec_to_input": subtracts}
        config["normalize_activations"] = next((n for n, how in _PER_ROW.items() if how == p.standardise), "none")
        if transcodes:
            config["d_out"] = p.d_out
        if p.k is not None:
            config.update(k=p.k, rescale_acts_by_decoder_norm=False)
        b_enc = p.encoder_bias(subtracts, self.title)
        tensors = {"W_enc": p.W_enc.T, "W_dec": p.W_dec, "b_dec": p.b_dec}
        if p.log_magnitude is not None:
            tensors |= {"b_gate": b_enc, "r_mag": p.log_magnitude, "b_mag": p.magnitude_bias(subtracts)}
        else:
            tensors["b_enc"] = b_enc
        if p.threshold is not None:
            tensors["threshold"] = p.threshold
        if p.W_skip is not None:
            tensors["W_skip"] = p.W_skip.T
        return config, tensors


@register("temporal-sae")
class TemporalSAE(Format):
    """The files of those whose temporal dictionaries SAELens has too: recognised, and said not to be loaded."""

    title = "Temporal SAE"
    _FILES = ("conf.yaml", "latest_ckpt.safetensors")

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        found = all(checkpoint.find(name) for name in self._FILES)
        return 0.95 if found and checkpoint.keys(self._FILES[1]) >= {"D", "b"} else None

    def inspect(self, checkpoint: Checkpoint) -> Facts:
        config, tensors = checkpoint.settings(self._FILES[0]), checkpoint.tensors(self._FILES[1])
        n_features, d = tensors.shape("D", 2)
        k = config.section("sae").get("kval_topk", int)
        dtype = tensors.info["D"].dtype
        return Facts(self.name, "temporal", d, d, n_features, k=k, dtype=dtype, missing=_TEMPORAL)


def _pursuit(config: _Config, W_dec: Tensor, b_dec: Tensor, scale: float) -> Dictionary:
    n_features, d = W_dec.shape
    tolerance = config.settings.get("residual_threshold", float, 0.01)
    dictionary = build(
        "mp",
        d,
        n_features,
        k=config.picks(d),
        variant="adaptive" if config.settings.get("stop_on_duplicate_support", bool, True) else "fixed",
        tolerance=tolerance if tolerance > 0 else None,
        subtract_bias=config.subtracts,
    )
    dictionary.load_state_dict(
        {**dictionary.state_dict(), "W_dec": W_dec, **({"b_dec": b_dec} if config.subtracts else {})}
    )
    if scale != 1:
        dictionary.fold_scale(scale)
    return dictionary


def _written_pursuit(dictionary: MP) -> tuple[dict[str, Any], dict[str, Tensor]]:
    W_dec, b_dec = dictionary.W_dec.detach().float().cpu(), dictionary.b_dec
    config = {
        "architecture": "matching_pursuit",
        "normalize_activations": "none",
        "residual_threshold": dictionary.stop_at() or 0.0,
        "max_iterations": dictionary.config.k,
        "stop_on_duplicate_support": dictionary.config.variant == "adaptive",
        "apply_b_dec_to_input": b_dec is not None,
    }
    bias = torch.zeros(dictionary.d_in) if b_dec is None else b_dec.detach().float().cpu()
    return config, {"W_dec": W_dec, "b_dec": bias}


class _Config:
    """The settings of version 6 (site and model in ``metadata``) and the flat ones before it, read alike."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.metadata = settings, settings.section("metadata")
        self.activation = settings.get("activation_fn", str) or settings.get("activation_fn_str", str) or "relu"
        self.architecture = settings.get("architecture", str, "standard")
        if self.activation == "topk" and self.k is not None:
            self.architecture = "topk"
        normalisation = settings.get("normalize_activations", object)
        if normalisation is None or isinstance(normalisation, bool):
            normalisation = "expected_average_only_in" if normalisation else "none"
        self.normalisation = str(normalisation)[:40]
        default = "transcoder" not in self.architecture
        self.subtracts = settings.get("apply_b_dec_to_input", bool, default)
        self.hook = self.word("hook_name") or self.word("hook_point")

    @property
    def registered(self) -> str:
        """Its name in unweave's registry, whether or not it is there."""
        name = _ARCHITECTURES.get(self.architecture, self.architecture)
        return f"standardised_{name}" if self.normalisation in _PER_ROW else name

    @property
    def k(self) -> float | None:
        return self.settings.get("k", float) or self.settings.section("activation_fn_kwargs").get("k", float)

    def picks(self, d_in: int) -> int:
        """Of matching pursuit: the most that a row may make."""
        return self.settings.size("max_iterations") if self.settings.get("max_iterations", int) is not None else d_in

    def any(self, name: str) -> Any:
        value = self.metadata.get(name, object)
        return self.settings.get(name, object) if value is None else value

    def word(self, name: str) -> str | None:
        value = self.any(name)
        return value if isinstance(value, str) else None

    def options(self, n_features: int) -> dict[str, Any]:
        how = _PER_ROW.get(self.normalisation)
        standardise = {} if how is None else {"standardise": how}
        if self.architecture == "skip_transcoder":
            return {**standardise, "activation": "relu"}
        if "topk" not in self.architecture:
            return standardise
        if self.k is None:
            raise UnweaveError(f"{self.settings.origin}: expected k for the architecture {self.architecture!r}")
        options: dict[str, Any] = {"k": max(1, round(self.k)), **standardise}
        if self.architecture == "matryoshka_batchtopk":
            ends = [0, *self.settings.get("matryoshka_widths", list, []), n_features]
            ends = [end for i, end in enumerate(ends) if i == 0 or end > ends[i - 1]]
            options["group_fractions"] = tuple((b - a) / n_features for a, b in pairwise(ends))
        return options
