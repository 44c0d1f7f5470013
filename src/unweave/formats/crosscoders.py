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
from unweave.formats._cross_layer import one_part
from unweave.formats._facts import Facts
from unweave.formats._fold import Parts
from unweave.formats.containers import Settings, Tensors
from unweave.formats.registry import Format, register

CONFIG, WEIGHTS, _MEAN = "config.json", "model.safetensors", "activation_mean"
_KEYS = {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"}
_RANKED, _SAE, _MIXED, _NONE, _DECOUPLED = range(1, 6)
_NORMALISATIONS = {_RANKED: "CROSSCODER", _SAE: "SAE", _MIXED: "MIXED", _NONE: "NONE", _DECOUPLED: "DECOUPLED"}
_TINY = 1e-30


@register("crosscoder")
class Crosscoders(Format):
    """``encoder.weight (n_parts, d, F)``, ``decoder.weight (n_parts, F, d)``, ``decoder.bias (n_parts, d)``.

    The library takes rows as ``(n, n_parts, d)``, unweave has the parts side by side. BatchTopK keeps
    ``z sum_l ||d^l|| > threshold``, both here and there; its threshold has to be set, for without one the library's
    codes depend on the whole batch. Where it counts norms in another way (``code_normalization``), a feature's
    threshold is divided by its norm, and what comes back is a ``jumprelu`` over all parts; with DECOUPLED a feature
    may fire in one part and not in another, and it has a feature for each part of each of the file's, feature f of
    part l at ``l F + f``. Later versions may subtract ``activation_mean (n_parts, d)`` from rows and multiply every
    part by ``activation_global_scale (n_parts)``; where they do not, ``part_norms`` counts norms as they are.
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
        if norms not in _NORMALISATIONS:
            missing = f"its code normalization {norms} is not known"
        elif ranked and float(tensors["threshold"].min()) < 0:
            missing = "its threshold was never set: the library's codes then depend on the whole batch"
        elif ranked and norms == _DECOUPLED and not tensors.unset(_MEAN):
            missing = "the library subtracts activation_mean twice with DECOUPLED, which unweave does not"
        if tensors.shape("decoder.weight", 3)[0] != n:
            missing = "it reads and writes different numbers of parts, which unweave has no architecture for"
        split = ("every part has a code of its own: feature f of part l is l * (features / parts) + f",)
        decoupled = ranked and norms == _DECOUPLED
        return Facts(
            self.name,
            _architecture(tensors),
            d_in=n * d,
            d_out=n * d,
            n_features=n_features * n if decoupled else n_features,
            k=tensors.number("k") if "k" in tensors else None,
            dtype=tensors.info["encoder.weight"].dtype,
            library_class="BatchTopKCrossCoder" if ranked else "CrossCoder",
            context={"parts": n, "code normalization": config.get("code_normalization", object)},
            notes=("rows hold the parts side by side", *(split if decoupled else ())),
            missing=missing,
        )

    def parts(self, checkpoint: Checkpoint) -> Parts | Dictionary:
        tensors, config = _open(checkpoint)
        n, d, n_features = tensors.shape("encoder.weight", 3)
        W_enc, b_enc = tensors.read("encoder.weight", n, d, n_features), tensors.read("encoder.bias", n_features)
        atoms, b_dec = tensors.read("decoder.weight", n, n_features, d), tensors.read("decoder.bias", n, d)
        W_dec, rms = atoms, torch.ones(n)
        if not tensors.unset(_MEAN):
            mean, scale = tensors.read(_MEAN, n, d), tensors.read("activation_global_scale", n)
            if float(scale.min()) <= 0:
                raise UnweaveError(f"{checkpoint.called}: expected scales above 0, found {float(scale.min()):.3g}")
            W_enc = W_enc * scale[:, None, None]
            b_enc = b_enc - torch.einsum("ld,ldf->f", mean.double(), W_enc.double()).float()
            W_dec, b_dec, rms = W_dec / scale[:, None, None], b_dec / scale[:, None] + mean, 1 / scale
        encoder, architecture = W_enc.permute(2, 0, 1).flatten(1), _architecture(tensors)
        if architecture == "jumprelu":
            threshold = tensors["threshold"].reshape(-1, 1) / _norms(atoms, _normalisation(tensors), config)
            if len(threshold) == 1:
                W_dec = W_dec.permute(1, 0, 2).flatten(1)
            else:
                W_dec = torch.cat([one_part(block, part, n) for part, block in enumerate(W_dec)])
                encoder, b_enc = encoder.repeat(n, 1), b_enc.repeat(n)
            return Parts("jumprelu", encoder, W_dec, b_enc, b_dec.flatten(), threshold=threshold.flatten())
        options = {"k": max(1, int(tensors.number("k")))} if "threshold" in tensors else {}
        dictionary = build(architecture, n * d, n_features, n_parts=n, **options)
        state = {"W_enc": encoder, "W_dec": W_dec.permute(1, 0, 2).flatten(1), "b_enc": b_enc, "b_dec": b_dec.flatten()}
        if options:
            state["threshold"] = torch.tensor(tensors.number("threshold"))
        dictionary.load_state_dict({**dictionary.state_dict(), **state, "part_rms": rms})
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


def _architecture(tensors: Tensors) -> str:
    if "threshold" not in tensors:
        return "crosscoder"
    return "batch_topk_crosscoder" if _normalisation(tensors) == _RANKED else "jumprelu"


def _norms(atoms: Tensor, how: int, config: Settings) -> Tensor:
    """``(1 or n_parts, F)``: what a feature's value is multiplied with before it is compared with the threshold."""
    by_part, whole = atoms.norm(dim=2), atoms.norm(dim=(0, 2))[None]
    if how == _MIXED:
        alpha_sae = config.get("code_normalization_alpha_sae", float, 1.0)
        alpha_parts = config.get("code_normalization_alpha_cc", float, 0.1)
        norms = alpha_sae * whole + alpha_parts * by_part.sum(0, keepdim=True)
    else:
        norms = {_SAE: whole, _NONE: torch.ones_like(whole), _DECOUPLED: by_part}[how]
    return norms.clamp_min(_TINY)


def _normalisation(tensors: Tensors) -> int:
    return int(tensors.number("code_normalization_id")) if "code_normalization_id" in tensors else _RANKED


def _weights(checkpoint: Checkpoint) -> str | None:
    return checkpoint.find(WEIGHTS) or checkpoint.weights(".pt", ".pth", ".bin")


def _open(checkpoint: Checkpoint) -> tuple[Tensors, Settings]:
    config = checkpoint.settings(CONFIG) if checkpoint.beside(CONFIG) else Settings({}, CONFIG)
    return checkpoint.tensors(_weights(checkpoint) or checkpoint.names[0]), config
