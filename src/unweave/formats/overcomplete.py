"""overcomplete: the ``state_dict()`` of one of its SAEs, in a ``.pt`` of any name."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from unweave.dictionaries import Dictionary, build
from unweave.errors import UnweaveError
from unweave.formats._checkpoint import Checkpoint
from unweave.formats._facts import Facts
from unweave.formats._fold import Parts
from unweave.formats.containers import Tensors
from unweave.formats.registry import Format, register

_ATOMS, _LINEAR = "dictionary._weights", "encoder.final_block.0.weight"
_POINTS, _WEIGHTS, _RELAX = "dictionary.C", "dictionary.W", "dictionary.Relax"
_PURSUITS = ("mp", "omp")
_NORMALISATIONS = ("l2", "max_l2", "l1", "max_l1", "identity")


@register("overcomplete")
class Overcomplete(Format):
    """Atoms are ``normalised(dictionary._weights) exp(dictionary.multiplier)``; no decoder bias, nothing subtracted.

    A state says neither its class nor its k nor how atoms are normalised; a JumpSAE alone is known by its thresholds.
    Archetypal atoms are ``(W C + Relax) exp(multiplier)``, with rows of W that are weights of the points C and rows of
    Relax no longer than ``delta``. One without an encoder is a pursuit. Where no atom correlates positively with a
    residual, the library's MpSAE takes a pick of negative value, unweave's ends the row. OMPSAE approximates
    nonnegative least squares by ``max_iter`` steps (10 if not told otherwise), which unweave solves exactly.
    """

    title = "overcomplete"
    checked = "library"
    options: ClassVar[dict[str, str]] = {
        "arch": "relu, topk, batch_topk, mp or omp: which class the state is of (a JumpSAE is known without)",
        "k": "features a row, for topk, batch_topk, mp and omp",
        "threshold": "running_threshold, for batch_topk: it is not in the state",
        "normalization": f"of the atoms, {', '.join(_NORMALISATIONS)}; l2 when not given, as in the library",
        "delta": "of archetypal atoms, how long their Relax may be; 1 when not given, as in the library",
    }

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        keys = checkpoint.keys(_weights(checkpoint))
        return 0.9 if "dictionary.multiplier" in keys else None

    def inspect(self, checkpoint: Checkpoint, **options: Any) -> Facts:
        tensors = _open(checkpoint)
        arch, missing, notes = options.get("arch"), None, []
        archetypal = _ATOMS not in tensors and _RELAX in tensors
        atoms = tensors.info.get(_RELAX if archetypal else _ATOMS)
        encodes = any(name.startswith("encoder.") for name in tensors)
        if "thresholds" in tensors:
            arch = "jumprelu"
        if atoms is None:
            missing = f"expected atoms in {_ATOMS}, or archetypal ones in {_RELAX}, found neither"
        elif "Q" in tensors:
            missing = (
                "overcomplete's QSAE gives every feature a value, a mean of its levels, so its codes are not sparse; "
                "whether it takes the nearest level instead is not in the state"
            )
        elif any(
            name.startswith(("encoder.mlp_blocks", "encoder.final_block.1", "encoder.attention")) for name in tensors
        ):
            missing = "its encoder is not linear, which unweave has no architecture for"
        elif not encodes and arch not in _PURSUITS:
            missing = (
                "a state without an encoder is a pursuit, and does not say which: give arch=mp or arch=omp, with k="
            )
        elif arch is None:
            missing = (
                "a state does not say its class: give arch= (relu, topk with k=, batch_topk with k= and threshold=)"
            )
        elif arch not in ("relu", "topk", "batch_topk", "jumprelu", *_PURSUITS) or (encodes and arch in _PURSUITS):
            missing = f"overcomplete has no class like {arch!r} with an encoder: expected relu, topk or batch_topk"
        elif arch in ("topk", "batch_topk", *_PURSUITS) and not options.get("k"):
            missing = "k is not in the file: give k="
        if arch == "omp":
            notes.append("least squares are exact here; the library's are as good as its max_iter")
        if "normalization" not in options and not archetypal:
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

    def parts(self, checkpoint: Checkpoint, **options: Any) -> Parts | Dictionary:
        tensors = _open(checkpoint)
        if _ATOMS in tensors:
            n_features, d = tensors.shape(_ATOMS, 2)
            atoms = _normalised(tensors.read(_ATOMS, n_features, d), options.get("normalization", "l2"))
        else:
            n_features, d = tensors.shape(_RELAX, 2)
            atoms = _archetypes(checkpoint, tensors, options.get("delta"))
        atoms = atoms * torch.as_tensor(tensors.number("dictionary.multiplier")).exp()
        arch, threshold = options.get("arch"), options.get("threshold")
        if arch in _PURSUITS:
            pursuit = build(arch, d, n_features, k=options["k"])
            pursuit.load_state_dict({**pursuit.state_dict(), "W_dec": atoms})
            return pursuit
        W_enc = atoms.clone()  # tied
        if "encoder.tied_to._weights" not in tensors:
            W_enc = tensors.read(_LINEAR if _LINEAR in tensors else "encoder.weight", n_features, d)
        bias = next((name for name in ("encoder.final_block.0.bias", "encoder.bias") if name in tensors), None)
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


def _archetypes(checkpoint: Checkpoint, tensors: Tensors, delta: float | None) -> Tensor:
    (n_features, d), n_points = tensors.shape(_RELAX, 2), tensors.shape(_POINTS, 2)[0]
    weights = tensors.read(_WEIGHTS, n_features, n_points).relu()
    relax = tensors.read(_RELAX, n_features, d)
    lengths = relax.norm(dim=1, keepdim=True)
    if delta is None and float(lengths.max()) > 1 + 1e-5:
        raise UnweaveError(
            f"{checkpoint.called}: atoms lie up to {float(lengths.max()):.3g} from their archetypes, farther than the "
            "library's delta of 1, and delta is not in the file: give delta="
        )
    relax = relax * ((1.0 if delta is None else delta) / lengths.clamp_min(1e-30)).clamp_max(1)
    return weights / (weights.sum(1, keepdim=True) + 1e-8) @ tensors.read(_POINTS, n_points, d) + relax


def _weights(checkpoint: Checkpoint) -> str | None:
    return checkpoint.weights(".pt", ".pth", ".bin")


def _open(checkpoint: Checkpoint) -> Tensors:
    return checkpoint.tensors(_weights(checkpoint) or checkpoint.names[0])
