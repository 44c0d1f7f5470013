"""dictionary_learning (saprmarks): ``ae.pt`` and ``config.json``, one class of the library each; the 2023 zips too."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from unweave.dictionaries import Dictionary
from unweave.errors import UnweaveError
from unweave.files import atomic_path, write_json
from unweave.formats._checkpoint import Checkpoint
from unweave.formats._facts import Facts, site_of_module
from unweave.formats._fold import Parts
from unweave.formats._plain import plain
from unweave.formats.catalogue import Entry
from unweave.formats.containers import Settings, Tensors
from unweave.formats.registry import Format, lacking, register

CONFIG, WEIGHTS = "config.json", "ae.pt"
_BENCH = "saebench_gemma-2-2b_width-2pow"
# What tells the classes apart is the names of their tensors.
_KEYS = {
    "AutoEncoder": {"bias", "encoder.weight", "encoder.bias", "decoder.weight"},
    "AutoEncoderNew": {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"},
    "GatedAutoEncoder": {"decoder_bias", "encoder.weight", "r_mag", "gate_bias", "mag_bias", "decoder.weight"},
    "JumpReluAutoEncoder": {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"},
    "AutoEncoderTopK": {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec"},
    "BatchTopKSAE": {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "k", "threshold"},
    "MatryoshkaBatchTopKSAE": {"W_enc", "W_dec", "b_enc", "b_dec", "k", "threshold", "group_sizes"},
}
_ARCHITECTURES = {"AutoEncoder": "relu", "AutoEncoderNew": "relu", "JumpReluAutoEncoder": "jumprelu"}
_ARCHITECTURES |= {"AutoEncoderTopK": "topk", "BatchTopKSAE": "batch_topk", "MatryoshkaBatchTopKSAE": "matryoshka"}
_ARCHITECTURES |= {"GatedAutoEncoder": "gated"}
_BIASES = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias", "GatedAutoEncoder": "decoder_bias"}
_BY_THRESHOLD = ("BatchTopKSAE", "MatryoshkaBatchTopKSAE")
_NORMS_FOLDED = "AutoEncoder"  # whose loader normalises the decoder; no other class's does


@register("dictionary_learning")
class DictionaryLearning(Format):
    """``nn.Linear`` names for some classes (``encoder.weight (F, d)``, ``decoder.weight (d, F)``), matrices for others.

    TopK and BatchTopK share their tensors, so the class has to stand in ``config.json``. BatchTopK and Matryoshka
    encode with their threshold. One that was never set (-1) lets every positive value through in the library, and here.
    """

    title = "dictionary_learning"
    checked = "library"
    options: ClassVar[dict[str, str]] = {
        "dict_class": f"the library's class, where config.json does not say: {', '.join(_KEYS)}"
    }

    repositories: ClassVar[dict[str, str]] = {
        "canrager/lm_sae": "EleutherAI/pythia-70m-deduped",
        "andyrdt/saes-llama-3.1-8b-instruct": "meta-llama/Llama-3.1-8B-Instruct",
        "andyrdt/saes-qwen2.5-7b-instruct": "Qwen/Qwen2.5-7B-Instruct",
        "andyrdt/saes-gpt-oss-20b": "openai/gpt-oss-20b",
        f"adamkarvonen/{_BENCH}12_date-0108": "google/gemma-2-2b",
    }
    repositories |= dict.fromkeys((f"canrager/{_BENCH}{n}_date-1109" for n in (12, 14, 16)), "google/gemma-2-2b")
    repositories |= dict.fromkeys((f"canrager/{_BENCH}{n}_date-0107" for n in (14, 16)), "google/gemma-2-2b")

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        name = self._weights(checkpoint)
        if checkpoint.file is not None and not checkpoint.file.name.endswith((".pt", ".pth", ".bin")):
            return None
        keys = checkpoint.keys(name)
        if name and "encoder.weight" in keys and len(checkpoint.tensors(name).info["encoder.weight"].shape) != 2:
            return None  # a crosscoder
        declared = checkpoint.quiet_settings(CONFIG).get("trainer", object)
        if name and isinstance(declared, dict) and "dict_class" in declared and any(k <= keys for k in _KEYS.values()):
            return 0.95
        fits = [kind for kind, needs in _KEYS.items() if needs <= keys]
        return 0.6 if fits and name == WEIGHTS else 0.3 if fits else None

    def inspect(self, checkpoint: Checkpoint, dict_class: str | None = None) -> Facts:
        tensors, trainer, buffer = self._open(checkpoint)
        kind = self._class(checkpoint, tensors, trainer, dict_class)
        n_features, d = _sizes(tensors)
        layer, module = trainer.get("layer", int), trainer.get("submodule_name", str)
        notes, missing = [], None
        if kind not in _ARCHITECTURES:
            missing = lacking(kind, f"dictionary_learning's {kind}")
        if kind in _BY_THRESHOLD and tensors.number("threshold") < 0:
            notes.append("its threshold was never set: the library, and so unweave, keeps every positive feature")
        site = site_of_module(module) or (None if layer is None or module else f"layers.{layer}")
        if module and not site and layer is not None:
            end = {"resid_post": "", "mlp_out": ".mlp", "attn_out": ".attn"}.get(module.partition("_layer")[0])
            site = None if end is None else f"layers.{layer}{end}"
        io = buffer.get("io", str)
        site, target = (f"{site}:input" if site and io and io.startswith("in") else site), site
        return Facts(
            self.name,
            _ARCHITECTURES.get(kind, kind),
            d_in=d,
            d_out=d,
            n_features=n_features,
            k=trainer.get("k", float) or (tensors.number("k") if "k" in tensors else None),
            dtype=next(i.dtype for n, i in tensors.info.items() if n in ("encoder.weight", "W_enc")),
            library_class=kind,
            model=trainer.get("lm_name", str),
            site=site,
            target_site=target if io and io.startswith("in_") else None,
            hook=module,
            context={"context size": buffer.get("ctx_len", int), "steps": trainer.get("steps", int)},
            notes=tuple(notes),
            missing=missing,
        )

    def named(self, repository: str, file: str) -> Entry | None:
        """What was saved during training, beside the finished ones, is left out."""
        match = re.fullmatch(rf"((?:.*/)?resid_post_layer_(\d+)/trainer_\d+)/{re.escape(WEIGHTS)}", file)
        if not match:
            return None
        place, layer = match.groups()
        width = re.search(r"width-2pow(\d+)", repository)
        facts = {"site": f"layers.{layer}", "layer": int(layer), "width": 2 ** int(width[1]) if width else None}
        return Entry(self.name, repository, place, **facts)

    def parts(self, checkpoint: Checkpoint, dict_class: str | None = None) -> Parts:
        tensors, trainer, _ = self._open(checkpoint)
        kind = self._class(checkpoint, tensors, trainer, dict_class)
        n_features, d = _sizes(tensors)
        if "W_enc" in tensors:
            W_enc, W_dec = tensors.read("W_enc", d, n_features).T, tensors.read("W_dec", n_features, d)
            b_enc = tensors.read("b_enc", n_features)
        else:
            W_enc, W_dec = (
                tensors.read("encoder.weight", n_features, d),
                tensors.read("decoder.weight", d, n_features).T,
            )
            b_enc = tensors.read("gate_bias" if kind == "GatedAutoEncoder" else "encoder.bias", n_features)
        b_dec = tensors.read(_BIASES.get(kind, "b_dec"), d)
        gated = {}
        if kind == "GatedAutoEncoder":
            gated["log_magnitude"] = tensors.read("r_mag", n_features)
            gated["b_mag"] = tensors.read("mag_bias", n_features)
        subtracts = kind not in ("AutoEncoderNew", "JumpReluAutoEncoder")
        return Parts(
            _ARCHITECTURES[kind],
            W_enc,
            W_dec,
            b_enc=b_enc,
            b_dec=b_dec,
            b_pre=b_dec if subtracts else None,
            threshold=_threshold(kind, tensors, n_features),
            options=self._options(checkpoint, kind, tensors, trainer, n_features),
            norms="in_codes" if kind == _NORMS_FOLDED else "apart",
            **gated,
        )

    def _open(self, checkpoint: Checkpoint) -> tuple[Tensors, Settings, Settings]:
        name = self._weights(checkpoint)
        if name is None:
            raise UnweaveError(
                f"{checkpoint.called}: expected {WEIGHTS}, found {', '.join(checkpoint.names[:8]) or 'nothing'}"
            )
        config = checkpoint.settings(CONFIG) if checkpoint.beside(CONFIG) else Settings({}, CONFIG)
        return checkpoint.tensors(name), config.section("trainer"), config.section("buffer")

    def _weights(self, checkpoint: Checkpoint) -> str | None:
        return checkpoint.find(WEIGHTS) or (checkpoint.file.name if checkpoint.file else None)

    def _class(self, checkpoint: Checkpoint, tensors: Tensors, trainer: Settings, said: str | None) -> str:
        kind = said or trainer.get("dict_class", str)
        fits = [name for name, needs in _KEYS.items() if needs <= tensors.keys()]
        if kind is None and "AutoEncoderNew" in fits and "AutoEncoder" in fits:
            fits.remove("AutoEncoderNew")
        if kind is None and "JumpReluAutoEncoder" in fits and "MatryoshkaBatchTopKSAE" in fits:
            fits.remove("JumpReluAutoEncoder")
        if kind is None and len(fits) == 1:
            return fits[0]
        if kind is None:
            raise UnweaveError(
                f"{checkpoint.called} does not say which class it is, and its tensors fit {', '.join(fits) or 'none'}: "
                "say which, with dict_class="
            )
        if kind in _KEYS and kind not in fits:
            raise UnweaveError(
                f"{checkpoint.called} is called a {kind}, which has {', '.join(sorted(_KEYS[kind]))}; found "
                f"{', '.join(sorted(tensors))}"
            )
        return kind

    def _options(
        self, checkpoint: Checkpoint, kind: str, tensors: Tensors, trainer: Settings, n_features: int
    ) -> dict[str, Any]:
        if "TopK" not in kind:
            return {}
        declared = trainer.get("k", float)
        k = tensors.number("k") if "k" in tensors else declared
        if k is None or k < 1 or (declared is not None and declared != k):
            raise UnweaveError(
                f"{checkpoint.called}: expected one k for {kind}, found {declared} in {CONFIG}, {k} in {WEIGHTS}"
            )
        options: dict[str, Any] = {"k": int(k)}
        if "group_sizes" in tensors:
            sizes = tensors["group_sizes"].flatten().double()
            if float(sizes.sum()) != n_features:
                raise UnweaveError(
                    f"{checkpoint.called}: expected group_sizes to add up to {n_features}, found {sizes.tolist()}"
                )
            options["group_fractions"] = tuple((sizes / n_features).tolist())
        return options

    def write(self, dictionary: Dictionary, folder: Path, facts: Facts) -> None:
        p = plain(dictionary, self.title, "relu", "topk", "jumprelu", "gated")
        if p.d_in != p.d_out:
            raise UnweaveError(f"dictionary_learning has no transcoders; this one maps {p.d_in} to {p.d_out}")
        kind = {"relu": "AutoEncoderNew", "topk": "AutoEncoderTopK", "jumprelu": "JumpReluAutoEncoder"}
        kind = {**kind, "gated": "GatedAutoEncoder"}[p.activation]
        b_enc = p.encoder_bias(kind in ("AutoEncoderTopK", "GatedAutoEncoder"), self.title)
        state: dict[str, Tensor] = {"encoder.weight": p.W_enc, "encoder.bias": b_enc, "decoder.weight": p.W_dec.T}
        if kind == "AutoEncoderNew":
            state["decoder.bias"] = p.b_dec
        elif kind == "AutoEncoderTopK":
            assert p.k is not None
            state |= {"b_dec": p.b_dec, "k": torch.tensor(p.k, dtype=torch.int32), "threshold": torch.tensor(-1.0)}
        elif kind == "GatedAutoEncoder":
            assert p.log_magnitude is not None
            del state["encoder.bias"]
            state |= {"decoder_bias": p.b_dec, "gate_bias": b_enc, "r_mag": p.log_magnitude}
            state["mag_bias"] = p.magnitude_bias(True)
        else:
            assert p.threshold is not None
            state = {"W_enc": p.W_enc.T, "W_dec": p.W_dec, "b_enc": b_enc, "b_dec": p.b_dec, "threshold": p.threshold}
        with atomic_path(folder / WEIGHTS) as temporary:
            torch.save({name: tensor.contiguous() for name, tensor in state.items()}, temporary)
        trainer = {"dict_class": kind, "activation_dim": p.d_in, "dict_size": p.n_features, "lm_name": facts.model}
        trainer["submodule_name"] = facts.hook or facts.site
        if p.k is not None:
            trainer["k"] = p.k
        write_json(folder / CONFIG, {"trainer": trainer, "buffer": {}})


def _sizes(tensors: Tensors) -> tuple[int, int]:
    """Features and width."""
    if "W_dec" in tensors:
        n_features, d = tensors.shape("W_dec", 2)
    else:
        n_features, d = tensors.shape("encoder.weight", 2)
    return n_features, d


def _threshold(kind: str, tensors: Tensors, n_features: int) -> Tensor | float | None:
    if kind == "JumpReluAutoEncoder":
        return tensors.read("threshold", n_features)
    return max(0.0, tensors.number("threshold")) if kind in _BY_THRESHOLD else None
