"""sparsify (EleutherAI): a folder per hookpoint with ``cfg.json`` and ``sae.safetensors``."""

from __future__ import annotations

from pathlib import Path

from unweave.dictionaries import Dictionary
from unweave.errors import UnweaveError
from unweave.files import write_json, write_tensors
from unweave.formats._checkpoint import Checkpoint
from unweave.formats._facts import Facts, site_of_module
from unweave.formats._fold import Parts
from unweave.formats._plain import plain
from unweave.formats.containers import Settings
from unweave.formats.registry import Format, lacking, register

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


@register("sparsify")
class Sparsify(Format):
    """``encoder.weight (F, d)``, ``encoder.bias``, ``W_dec (F, d)``, ``b_dec``, with a skip ``W_skip``.

    The encoder subtracts ``b_dec`` unless it transcodes. ``num_latents: 0`` means ``d_in`` times ``expansion_factor``.
    Settings from before ``activation`` may say ``signed``: the k of largest magnitude, of either sign.
    """

    title = "sparsify"
    checked = "library"

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        return 0.95 if checkpoint.find(CONFIG) and checkpoint.find(WEIGHTS) else None

    def inspect(self, checkpoint: Checkpoint) -> Facts:
        config, tensors = checkpoint.settings(CONFIG), checkpoint.tensors(WEIGHTS)
        n_features, d = _sizes(checkpoint)
        activation, missing = _activation(config), None
        if "W_skip" in tensors:
            missing = lacking("skip_transcoder", "a sparsify transcoder with a skip connection")
        elif activation == "groupmax":
            missing = lacking("group_max", "sparsify's groupmax")
        elif activation not in ("topk", "abs_topk"):
            missing = f"sparsify's activation {activation!r} is not known"
        transcodes = config.get("transcode", bool, False)
        hookpoint = Path(checkpoint.called).name
        run = _run_settings(checkpoint)
        return Facts(
            self.name,
            activation,
            d_in=d,
            d_out=d,
            n_features=n_features,
            k=config.get("k", float),
            dtype=tensors.info["encoder.weight"].dtype,
            library_class="transcoder" if transcodes else "sae",
            model=run.get("model", str),
            site=None if transcodes else site_of_module(hookpoint),
            target_site=site_of_module(hookpoint) if transcodes else None,
            hook=hookpoint,
            context={"dataset": run.get("dataset", object), "context size": run.get("ctx_len", object)},
            notes=("from the input of that module to its output",) if transcodes else (),
            missing=missing,
        )

    def parts(self, checkpoint: Checkpoint) -> Parts:
        config, tensors = checkpoint.settings(CONFIG), checkpoint.tensors(WEIGHTS)
        n_features, d = _sizes(checkpoint)
        b_dec = tensors.read("b_dec", d)
        return Parts(
            _activation(config),
            tensors.read("encoder.weight", n_features, d),
            tensors.read("W_dec", n_features, d),
            b_enc=tensors.read("encoder.bias", n_features),
            b_dec=b_dec,
            b_pre=None if config.get("transcode", bool, False) else b_dec,
            options={"k": config.size("k")},
        )

    def write(self, dictionary: Dictionary, folder: Path, facts: Facts) -> None:
        p = plain(dictionary, self.title, "topk")
        if p.d_in != p.d_out or p.n_features < 1:
            raise UnweaveError(f"sparsify wants equal widths of input and output, found {p.d_in} and {p.d_out}")
        config = {"activation": "topk", "expansion_factor": max(1, p.n_features // p.d_in), "normalize_decoder": True}
        config |= {"num_latents": p.n_features, "k": p.k, "multi_topk": False, "skip_connection": False}
        config |= {"transcode": not p.subtracts, "d_in": p.d_in}
        tensors = {"encoder.weight": p.W_enc, "encoder.bias": p.b_enc, "W_dec": p.W_dec, "b_dec": p.b_dec}
        write_tensors(folder / WEIGHTS, tensors)
        write_json(folder / CONFIG, config)


def _activation(config: Settings) -> str:
    activation = config.get("activation", str, "topk")
    return "abs_topk" if activation == "topk" and config.get("signed", bool, False) else activation


def _sizes(checkpoint: Checkpoint) -> tuple[int, int]:
    config = checkpoint.settings(CONFIG)
    n_features, d = checkpoint.tensors(WEIGHTS).shape("encoder.weight", 2)
    declared = config.get("num_latents", int, 0) or d * config.get("expansion_factor", int, 0)
    if config.size("d_in") != d or declared not in (0, n_features):
        raise UnweaveError(
            f"{checkpoint.called}: {CONFIG} says d_in = {config.size('d_in')} and {declared} latents, the encoder has "
            f"{d} and {n_features}"
        )
    return n_features, d


def _run_settings(checkpoint: Checkpoint) -> Settings:
    above = checkpoint.folder.parent / "config.json"
    return Checkpoint(above).settings("config.json") if above.is_file() else Settings({}, "config.json")
