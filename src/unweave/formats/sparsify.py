"""sparsify (EleutherAI): a folder per hookpoint with ``cfg.json`` and ``sae.safetensors``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import ClassVar

from unweave.dictionaries import Dictionary
from unweave.errors import UnweaveError
from unweave.files import write_json, write_tensors
from unweave.formats._checkpoint import Checkpoint
from unweave.formats._facts import Facts, site_of_module
from unweave.formats._fold import Parts, skip_name, with_skip
from unweave.formats._plain import plain
from unweave.formats.catalogue import Entry
from unweave.formats.catalogue.entry import binary
from unweave.formats.containers import Settings
from unweave.formats.registry import Format, register

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"


@register("sparsify")
class Sparsify(Format):
    """``encoder.weight (F, d)``, ``encoder.bias``, ``W_dec (F, d)``, ``b_dec``, with a skip ``W_skip``.

    The encoder subtracts ``b_dec`` unless it transcodes. ``num_latents: 0`` means ``d_in`` times ``expansion_factor``.
    Settings from before ``activation`` may say ``signed``: the k of largest magnitude, of either sign.
    ``groupmax`` keeps the largest of each of k groups. All of them may have a skip.
    """

    title = "sparsify"
    checked = "library"
    repositories: ClassVar[dict[str, str]] = {
        "EleutherAI/sae-llama-3-8b-32x": "meta-llama/Meta-Llama-3-8B",
        "EleutherAI/sae-llama-3-8b-32x-v2": "meta-llama/Meta-Llama-3-8B",
        "EleutherAI/sae-Llama-3.2-1B-131k": "meta-llama/Llama-3.2-1B",
        "EleutherAI/sae-DeepSeek-R1-Distill-Qwen-1.5B-65k": "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        "EleutherAI/sae-pythia-160m-32k": "EleutherAI/pythia-160m",
        "EleutherAI/sae-pythia-160m-deduped-32k": "EleutherAI/pythia-160m-deduped",
        "EleutherAI/sae-pythia-410m-65k": "EleutherAI/pythia-410m",
    }

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        return 0.95 if checkpoint.find(CONFIG) and checkpoint.find(WEIGHTS) else None

    def inspect(self, checkpoint: Checkpoint) -> Facts:
        config, tensors = checkpoint.settings(CONFIG), checkpoint.tensors(WEIGHTS)
        n_features, d = _sizes(checkpoint)
        activation, missing = _activation(config), None
        if activation not in ("topk", "abs_topk", "group_max"):
            missing = f"sparsify's activation {activation!r} is not known"
        elif "W_skip" in tensors:
            activation = str(skip_name(activation))
        transcodes = config.get("transcode", bool, False)
        hookpoint = Path(checkpoint.called).name
        site = site_of_module(hookpoint)
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
            site=f"{site}:input" if site and transcodes else site,
            target_site=site if transcodes else None,
            hook=hookpoint,
            context={"dataset": run.get("dataset", object), "context size": run.get("ctx_len", object)},
            notes=("from the input of that module to its output",) if transcodes else (),
            missing=missing,
        )

    def named(self, repository: str, file: str) -> Entry | None:
        """Whether it transcodes, which decides between site and target site, stands in its settings alone."""
        place, _, last = file.rpartition("/")
        layer = re.search(r"\b(?:layers|h)\.(\d+)", place)
        if not place or last != WEIGHTS:
            return None
        width = re.search(r"-(\d+k)$", repository)
        return Entry(
            self.name,
            repository,
            place,
            layer=int(layer[1]) if layer else None,
            width=binary(width[1]) if width else None,
        )

    def parts(self, checkpoint: Checkpoint) -> Parts:
        config, tensors = checkpoint.settings(CONFIG), checkpoint.tensors(WEIGHTS)
        n_features, d = _sizes(checkpoint)
        b_dec = tensors.read("b_dec", d)
        parts = Parts(
            _activation(config),
            tensors.read("encoder.weight", n_features, d),
            tensors.read("W_dec", n_features, d),
            b_enc=tensors.read("encoder.bias", n_features),
            b_dec=b_dec,
            b_pre=None if config.get("transcode", bool, False) else b_dec,
            options={"k": config.size("k")},
        )
        return with_skip(parts, tensors.read("W_skip", d, d).T) if "W_skip" in tensors else parts

    def write(self, dictionary: Dictionary, folder: Path, facts: Facts) -> None:
        p = plain(dictionary, self.title, "topk", "group_max", "skip")
        if p.d_in != p.d_out or p.n_features < 1:
            raise UnweaveError(f"sparsify wants equal widths of input and output, found {p.d_in} and {p.d_out}")
        if p.activation == "group_max" and p.n_features % (p.k or 1):
            raise UnweaveError(f"sparsify wants groups of one size, found {p.n_features} features in {p.k} groups")
        activation = "groupmax" if p.activation == "group_max" else "topk"
        config = {
            "activation": activation,
            "expansion_factor": max(1, p.n_features // p.d_in),
            "normalize_decoder": True,
        }
        config |= {"num_latents": p.n_features, "k": p.k, "multi_topk": False, "skip_connection": p.W_skip is not None}
        config |= {"transcode": not p.subtracts, "d_in": p.d_in}
        tensors = {"encoder.weight": p.W_enc, "encoder.bias": p.b_enc, "W_dec": p.W_dec, "b_dec": p.b_dec}
        if p.W_skip is not None:
            tensors["W_skip"] = p.W_skip.T
        write_tensors(folder / WEIGHTS, tensors)
        write_json(folder / CONFIG, config)


def _activation(config: Settings) -> str:
    activation = config.get("activation", str, "topk")
    if activation == "topk" and config.get("signed", bool, False):
        return "abs_topk"
    return "group_max" if activation == "groupmax" else activation


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
    return checkpoint.at(above).settings("config.json") if above.is_file() else Settings({}, "config.json")
