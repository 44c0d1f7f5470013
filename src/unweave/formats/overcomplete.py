"""overcomplete: the ``state_dict()`` of one of its SAEs, in a ``.pt`` of any name."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from unweave.errors import UnweaveError
from unweave.formats._checkpoint import Checkpoint
from unweave.formats._facts import Facts
from unweave.formats._fold import Parts
from unweave.formats.containers import Tensors
from unweave.formats.registry import Format, lacking, register

_ATOMS, _LINEAR = "dictionary._weights", "encoder.final_block.0.weight"
_NORMALISATIONS = ("l2", "max_l2", "l1", "max_l1", "identity")


@register("overcomplete")
class Overcomplete(Format):
    """Atoms are ``normalised(dictionary._weights) exp(dictionary.multiplier)``; no decoder bias, nothing subtracted.

    A state says neither its class nor its k nor how atoms are normalised; a JumpSAE alone is known by its thresholds.
    """

    title = "overcomplete"
    checked = "library"
    options: ClassVar[dict[str, str]] = {
        "arch": "relu, topk or batch_topk: which class the state is of (a JumpSAE is known without)",
        "k": "features a row, for topk and batch_topk",
        "threshold": "running_threshold, for batch_topk: it is not in the state",
        "normalization": f"of the atoms, {', '.join(_NORMALISATIONS)}; l2 when not given, as in the library",
    }

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        keys = checkpoint.keys(_weights(checkpoint))
        return 0.9 if "dictionary.multiplier" in keys else None

    def inspect(self, checkpoint: Checkpoint, **options: Any) -> Facts:
        tensors = _open(checkpoint)
        arch, missing, notes = options.get("arch"), None, []
        atoms = tensors.info.get(_ATOMS)
        if "thresholds" in tensors:
            arch = "jumprelu"
        if atoms is None:
            missing = lacking("archetypal", "overcomplete's archetypal dictionary")
        elif "Q" in tensors:
            missing = lacking("quantised", "overcomplete's QSAE")
        elif any(
            name.startswith(("encoder.mlp_blocks", "encoder.final_block.1", "encoder.attention")) for name in tensors
        ):
            missing = "its encoder is not linear, which unweave has no architecture for"
        elif not any(name.startswith("encoder.") for name in tensors):
            missing = lacking("mp", "a state without an encoder (overcomplete's MpSAE or OMPSAE)")
        elif arch is None:
            missing = (
                "a state does not say its class: give arch= (relu, topk with k=, batch_topk with k= and threshold=)"
            )
        elif arch not in ("relu", "topk", "batch_topk", "jumprelu"):
            missing = f"overcomplete has no class like {arch!r}: expected relu, topk or batch_topk"
        elif "topk" in arch and not options.get("k"):
            missing = "k is not in the file: give k="
        if "normalization" not in options:
            notes.append("takes atoms as l2-normalised, the library's default; the file does not say")
        return Facts(
            self.name,
            arch or "unknown",
            d_in=atoms.shape[1] if atoms and len(atoms.shape) == 2 else None,
            d_out=atoms.shape[1] if atoms and len(atoms.shape) == 2 else None,
            n_features=atoms.shape[0] if atoms and atoms.shape else None,
            k=options.get("k"),
            dtype=atoms.dtype if atoms else None,
            notes=tuple(notes),
            missing=missing,
        )

    def parts(self, checkpoint: Checkpoint, **options: Any) -> Parts:
        tensors = _open(checkpoint)
        n_features, d = tensors.shape(_ATOMS, 2)
        atoms = _normalised(tensors.read(_ATOMS, n_features, d), options.get("normalization", "l2"))
        atoms = atoms * torch.as_tensor(tensors.number("dictionary.multiplier")).exp()
        W_enc = atoms.clone()  # tied
        if "encoder.tied_to._weights" not in tensors:
            W_enc = tensors.read(_LINEAR if _LINEAR in tensors else "encoder.weight", n_features, d)
        bias = next((name for name in ("encoder.final_block.0.bias", "encoder.bias") if name in tensors), None)
        arch, threshold = options.get("arch"), options.get("threshold")
        if "thresholds" in tensors:
            arch, threshold = "jumprelu", tensors.read("thresholds", n_features).exp()
        assert arch is not None
        return Parts(
            arch,
            W_enc,
            atoms,
            b_enc=tensors.read(bias, n_features) if bias else None,
            threshold=threshold,
            options={"k": options["k"]} if "topk" in arch else {},
        )


def _normalised(weights: Tensor, how: str) -> Tensor:
    if how not in _NORMALISATIONS:
        raise UnweaveError(f"expected normalization to be one of {', '.join(_NORMALISATIONS)}, found {how!r}")
    p = 1.0 if how.endswith("l1") else 2.0
    if how.startswith("max"):
        return weights / weights.norm(p=p, dim=1).max()
    return weights if how == "identity" else F.normalize(weights, p=p, dim=1)


def _weights(checkpoint: Checkpoint) -> str | None:
    return checkpoint.weights(".pt", ".pth", ".bin")


def _open(checkpoint: Checkpoint) -> Tensors:
    return checkpoint.tensors(_weights(checkpoint) or checkpoint.names[0])
