"""dictionary_learning's crosscoders, of its fork for comparing models: ``CrossCoder`` and ``BatchTopKCrossCoder``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unweave.dictionaries import BatchTopKCrosscoder, Crosscoder, Dictionary, build
from unweave.errors import UnweaveError
from unweave.files import write_json, write_tensors
from unweave.formats._checkpoint import Checkpoint
from unweave.formats._facts import Facts
from unweave.formats.containers import Settings, Tensors
from unweave.formats.registry import Format, register

CONFIG, WEIGHTS = "config.json", "model.safetensors"
_KEYS = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}
_RANKED, _DECOUPLED = 1, 5
_NORMALISATIONS = {_RANKED: "CROSSCODER", 2: "SAE", 3: "MIXED", 4: "NONE", _DECOUPLED: "DECOUPLED"}


@register("crosscoder")
class Crosscoders(Format):
    """``encoder.weight (n_parts, d, F)``, ``decoder.weight (n_parts, F, d)``, ``decoder.bias (n_parts, d)``.

    The library takes rows as ``(n, n_parts, d)``, unweave has the parts side by side. BatchTopK keeps
    ``z sum_l ||d^l|| > threshold``, both here and there; its threshold has to be set, for without one the library's
    codes depend on the whole batch, and norms must be counted as crosscoders do. What a part's typical norm was is not
    in the file: ``part_norms`` counts norms as they are.
    """

    title = "dictionary_learning's crosscoders"

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        name = _weights(checkpoint)
        if not (name and checkpoint.keys(name) >= _KEYS):
            return None
        info = checkpoint.tensors(name).info
        return 0.9 if len(info["encoder.weight"].shape) == 3 and len(info["decoder.bias"].shape) == 2 else None

    def inspect(self, checkpoint: Checkpoint) -> Facts:
        tensors, config = _open(checkpoint)
        n, d, n_features = tensors.shape("encoder.weight", 3)
        ranked, norms = "threshold" in tensors, _normalisation(tensors)
        missing = None
        if norms == _DECOUPLED:
            missing = "a code for each part (DECOUPLED) is not one code, which unweave's crosscoders have"
        elif ranked and norms != _RANKED:
            missing = f"BatchTopK with the norms of {_NORMALISATIONS.get(norms, norms)} selects in another way"
        elif ranked and tensors.number("threshold") < 0:
            missing = "its threshold was never set: the library's codes then depend on the whole batch"
        if tensors.shape("decoder.weight", 3)[0] != n:
            missing = "it reads and writes different numbers of parts, which unweave has no architecture for"
        return Facts(
            self.name,
            "batch_topk_crosscoder" if ranked else "crosscoder",
            d_in=n * d,
            d_out=n * d,
            n_features=n_features,
            k=tensors.number("k") if "k" in tensors else None,
            dtype=tensors.info["encoder.weight"].dtype,
            library_class="BatchTopKCrossCoder" if ranked else "CrossCoder",
            context={"parts": n, "code normalization": config.get("code_normalization", object)},
            notes=("rows hold the parts side by side",),
            missing=missing,
        )

    def parts(self, checkpoint: Checkpoint) -> Dictionary:
        tensors, _ = _open(checkpoint)
        n, d, n_features = tensors.shape("encoder.weight", 3)
        options = {"k": max(1, int(tensors.number("k")))} if "threshold" in tensors else {}
        arch = "batch_topk_crosscoder" if options else "crosscoder"
        dictionary = build(arch, n * d, n_features, n_parts=n, **options)
        state = dictionary.state_dict()
        state["W_enc"] = tensors.read("encoder.weight", n, d, n_features).permute(2, 0, 1).flatten(1)
        state["W_dec"] = tensors.read("decoder.weight", n, n_features, d).permute(1, 0, 2).flatten(1)
        state["b_enc"] = tensors.read("encoder.bias", n_features)
        state["b_dec"] = tensors.read("decoder.bias", n, d).flatten()
        if options:
            state["threshold"] = torch.tensor(tensors.number("threshold"))
        dictionary.load_state_dict(state)
        return dictionary

    @torch.no_grad()
    def write(self, dictionary: Dictionary, folder: Path, facts: Facts) -> None:
        if type(dictionary) not in (Crosscoder, BatchTopKCrosscoder):
            raise UnweaveError(
                f"{self.title} cannot express a {dictionary.name!r} dictionary; it has crosscoder and "
                "batch_topk_crosscoder"
            )
        if dictionary.d_in != dictionary.d_out:
            raise UnweaveError(f"{self.title} read what they write, found widths {dictionary.d_in}, {dictionary.d_out}")
        coder: Any = dictionary
        coder.complete()
        n, d = coder.n_parts, coder.d_in // coder.n_parts
        W_enc, W_dec, b_enc, b_dec = (
            t.detach().float().cpu() for t in (coder.W_enc, coder.W_dec, coder.b_enc, coder.b_dec)
        )
        config = {"activation_dim": d, "dict_size": coder.n_features, "num_layers": n}
        extra: dict[str, Tensor] = {"code_normalization_id": torch.tensor(_RANKED)}
        if isinstance(coder, BatchTopKCrosscoder):
            if float(coder.threshold) < 0:
                raise UnweaveError("this dictionary has no threshold yet: train it for at least a step")
            config["k"] = coder.config.k
            extra["k"] = torch.tensor(int(coder.config.k), dtype=torch.int32)
            extra["threshold"] = coder.threshold.float().cpu() * _count_norms_alike(coder, self.title)
        tensors = {
            "encoder.weight": W_enc.unflatten(1, (n, d)).permute(1, 2, 0),
            "encoder.bias": b_enc,
            "decoder.weight": W_dec.unflatten(1, (n, d)).permute(1, 0, 2),
            "decoder.bias": b_dec.unflatten(0, (n, d)),
        }
        write_tensors(folder / WEIGHTS, tensors | extra)
        write_json(folder / CONFIG, config | {"code_normalization": _NORMALISATIONS[_RANKED]})


def _count_norms_alike(coder: Any, title: str) -> float:
    """What the threshold has to be multiplied with there, where norms count as they are."""
    rms = coder.part_rms
    if float((rms.max() - rms.min()) / rms.max()) > 1e-5:
        raise UnweaveError(
            f"{title} cannot express this dictionary: it ranks features by norms in units of each part's typical norm "
            f"({', '.join(f'{float(r):.3g}' for r in rms)}), theirs count norms as they are"
        )
    return float(rms[0])


def _normalisation(tensors: Tensors) -> int:
    return int(tensors.number("code_normalization_id")) if "code_normalization_id" in tensors else _RANKED


def _weights(checkpoint: Checkpoint) -> str | None:
    return checkpoint.find(WEIGHTS) or checkpoint.weights(".pt", ".pth", ".bin")


def _open(checkpoint: Checkpoint) -> tuple[Tensors, Settings]:
    config = checkpoint.settings(CONFIG) if checkpoint.beside(CONFIG) else Settings({}, CONFIG)
    return checkpoint.tensors(_weights(checkpoint) or checkpoint.names[0]), config
