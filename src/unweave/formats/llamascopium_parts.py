"""llamascopium's crosscoders and cross-layer transcoders: the same files, of another ``sae_type``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unweave.dictionaries import Crosscoder, Dictionary, build
from unweave.errors import UnweaveError
from unweave.formats._checkpoint import Checkpoint
from unweave.formats._cross_layer import Layer, cross_layer, layers_of, one_part
from unweave.formats._facts import Facts
from unweave.formats._fold import Parts
from unweave.formats.containers import Settings, Tensors
from unweave.formats.llamascopium import BY_ROW, NORM, THRESHOLD, open_both, sae_type, settings, write_both
from unweave.formats.registry import Format, register

_TINY = 1e-30


@register("llamascopium-crosscoder")
class LlamascopiumCrosscoder(Format):
    """``W_E (n, d, F)``, ``b_E (n, F)``, ``W_D (n, F, d)``, ``b_D (n, d)``; nothing is subtracted.

    Every part has a code of its own, ``act(u ||d^l||) / ||d^l||`` of the u that they share. With ReLU these are all the
    same, and it is a crosscoder. With JumpReLU a feature may fire in one part and not in another: it is loaded as a
    ``jumprelu`` over all parts with a feature for each part of each of the file's, feature f of part l at
    ``l F + f``. TopK and BatchTopK choose for each part among its own, which unweave has no architecture for.
    """

    title = "llamascopium's crosscoders"
    checked = "library"

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        return 0.95 if sae_type(checkpoint) == "crosscoder" else None

    def inspect(self, checkpoint: Checkpoint) -> Facts:
        config, tensors, prefix = open_both(checkpoint)
        n, d, n_features = tensors.shape(f"{prefix}W_E", 3)
        activation = config.get("act_fn", str, "relu").lower()
        jumps = activation == "jumprelu"
        missing = _unscaled(config)
        if activation not in ("relu", "jumprelu"):
            missing = f"{activation} keeps the k largest of each part on its own, which unweave's crosscoders do not"
        notes = ("rows hold the parts side by side",)
        split = "every part has a code of its own: feature f of part l is l * (features / parts) + f"
        return Facts(
            self.name,
            "jumprelu" if jumps else "crosscoder",
            d_in=n * d,
            d_out=n * d,
            n_features=n_features * n if jumps else n_features,
            dtype=tensors.info[f"{prefix}W_D"].dtype if f"{prefix}W_D" in tensors else None,
            library_class="crosscoder",
            hook=", ".join(_hooks(config, "hook_points", n)),
            context={"parts": n, "activations": config.get("norm_activation", str)},
            notes=(*notes, split) if jumps else notes,
            missing=missing,
        )

    def parts(self, checkpoint: Checkpoint) -> Parts | Dictionary:
        config, tensors, prefix = open_both(checkpoint)
        n, d, n_features = tensors.shape(f"{prefix}W_E", 3)
        scales = _scales(config, tensors, prefix, _hooks(config, "hook_points", n), d)[:, None, None]
        W_enc = tensors.read(f"{prefix}W_E", n, d, n_features) * scales
        W_dec = tensors.read(f"{prefix}W_D", n, n_features, d)
        b_enc = tensors.read(f"{prefix}b_E", n, n_features).sum(0)
        b_dec = (tensors.read(f"{prefix}b_D", n, d) / scales[:, 0]).flatten()
        encoder = W_enc.permute(2, 0, 1).flatten(1)
        if config.get("act_fn", str, "relu").lower() == "relu":
            dictionary = build("crosscoder", n * d, n_features, n_parts=n)
            weights = {"W_enc": encoder, "W_dec": (W_dec / scales).permute(1, 0, 2).flatten(1)}
            state = {**weights, "b_enc": b_enc, "b_dec": b_dec, "part_rms": 1 / scales.flatten()}
            dictionary.load_state_dict({**dictionary.state_dict(), **state})
            return dictionary
        threshold = tensors.read(f"{prefix}{THRESHOLD}", n_features).exp() / W_dec.norm(dim=2).clamp_min(_TINY)
        atoms = torch.cat([one_part(block, part, n) for part, block in enumerate(W_dec / scales)])
        return Parts("jumprelu", encoder.repeat(n, 1), atoms, b_enc.repeat(n), b_dec, threshold=threshold.flatten())

    @torch.no_grad()
    def write(self, dictionary: Dictionary, folder: Path, facts: Facts) -> None:
        if type(dictionary) is not Crosscoder or dictionary.d_in != dictionary.d_out:
            raise UnweaveError(
                f"{self.title} cannot express this {dictionary.name!r} dictionary; they have crosscoder, whose target "
                "is its input"
            )
        coder: Any = dictionary
        coder.complete()
        n = coder.n_parts
        W_enc, W_dec, b_enc, b_dec = (
            t.detach().float().cpu() for t in (coder.W_enc, coder.W_dec, coder.b_enc, coder.b_dec)
        )
        atoms = W_dec.unflatten(1, (n, -1)).permute(1, 0, 2)
        if bool((atoms.norm(dim=2) == 0).any()):
            raise UnweaveError(f"{self.title} divide by the norms of atoms, and a feature here has none in some part")
        hooks = [f"part_{part}" for part in range(n)]
        config = settings("crosscoder", coder.d_in // n, coder.n_features, "relu", None)
        config |= {"sparsity_include_decoder_norm": True, "hook_points": hooks}
        biases = torch.cat([b_enc[None], torch.zeros(n - 1, len(b_enc))])  # they are added up
        tensors = {"W_E": W_enc.unflatten(1, (n, -1)).permute(1, 2, 0), "b_E": biases}
        write_both(folder, config, tensors | {"W_D": atoms, "b_D": b_dec.unflatten(0, (n, -1))}, hooks)


@register("llamascopium-clt")
class LlamascopiumCLT(Format):
    """``W_E (n, d, F)``, ``b_E (n, F)``, for every layer j ``W_D.j (j + 1, F, d)`` and ``b_D.j (d)``.

    ``W_D.j`` holds what the layers up to j write into layer j. With ``sparsity_include_decoder_norm`` it acts on u
    times the norm of all that a feature writes, but the code is u, here and there: thresholds can be divided by it, and
    unweave's TopK ranks by that product. TopK keeps k of each layer; BatchTopK, without a threshold in its files, of
    each layer of every row.
    """

    title = "llamascopium's CLT"
    checked = "library"

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        return 0.95 if sae_type(checkpoint) == "clt" else None

    def inspect(self, checkpoint: Checkpoint) -> Facts:
        config, tensors, prefix = open_both(checkpoint)
        n, d, per = tensors.shape(f"{prefix}W_E", 3)
        activation = config.get("act_fn", str, "relu").lower()
        ranks, missing = activation in ("topk", "batchtopk"), _unscaled(config)
        if activation in ("layertopk", "batchlayertopk"):
            missing = f"{activation} lets layers compete for one k, so that a code depends on later layers"
        elif activation not in ("relu", "jumprelu") and not ranks:
            missing = f"llamascopium's activation {activation!r} is not known"
        elif ranks and not config.get("sparsity_include_decoder_norm", bool, True):
            missing = "it ranks by pre-activations alone, unweave's clt by what they would write"
        notes = ("rows hold the layers side by side",)
        return Facts(
            self.name,
            "clt",
            d_in=n * d,
            d_out=n * d,
            n_features=n * per,
            k=n * min(config.size("top_k"), per) if ranks else None,
            dtype=tensors.info[f"{prefix}W_E"].dtype,
            library_class="clt",
            hook=", ".join(_hooks(config, "hook_points_in", n)),
            context={"layers": n, "writes to": ", ".join(_hooks(config, "hook_points_out", n))},
            notes=(*notes, BY_ROW) if activation == "batchtopk" else notes,
            missing=missing,
        )

    def parts(self, checkpoint: Checkpoint) -> Dictionary:
        config, tensors, prefix = open_both(checkpoint)
        n, d, per = tensors.shape(f"{prefix}W_E", 3)
        activation = config.get("act_fn", str, "relu").lower()
        into, out = (_scales(config, tensors, prefix, _hooks(config, f"hook_points_{w}", n), d) for w in ("in", "out"))
        W_enc, b_enc = tensors.read(f"{prefix}W_E", n, d, per), tensors.read(f"{prefix}b_E", n, per)
        W_dec = [tensors.read(f"{prefix}W_D.{j}", j + 1, per, d) for j in range(n)]
        thresholds: Tensor | None = None
        if activation == "jumprelu":
            thresholds = tensors.read(f"{prefix}{THRESHOLD}", n, per).exp()
            if config.get("sparsity_include_decoder_norm", bool, True):
                squares = [torch.stack([W_dec[j][i].square().sum(1) for j in range(i, n)]).sum(0) for i in range(n)]
                thresholds = thresholds / torch.stack(squares).sqrt().clamp_min(_TINY)
        layers = [
            Layer(
                W_enc[i].T * into[i],
                b_enc[i],
                (tensors.read(f"{prefix}b_D.{i}", d) if f"{prefix}b_D.{i}" in tensors else torch.zeros(d)) / out[i],
                torch.stack([W_dec[j][i] / out[j] for j in range(i, n)], dim=1),
                None if thresholds is None else thresholds[i],
            )
            for i in range(n)
        ]
        k = config.size("top_k") if "topk" in activation else None
        return cross_layer(layers, checkpoint.called, k, rms=(1 / out).tolist())

    def write(self, dictionary: Dictionary, folder: Path, facts: Facts) -> None:
        layers = layers_of(dictionary, self.title, "relu", "jumprelu", "topk")
        clt: Any = dictionary
        n, (per, d), activation, k = len(layers), layers[0].W_enc.shape, clt.config.activation, None
        if clt.d_in != clt.d_out:
            raise UnweaveError(f"{self.title} read and write one width, found {clt.d_in} and {clt.d_out}")
        if activation == "topk":
            k, left = divmod(clt.config.k, n)
            rms = clt.part_rms
            if left or float((rms.max() - rms.min()) / rms.max()) > 1e-5:
                raise UnweaveError(
                    f"{self.title} keep the same k in every layer and count what is written as it is, which this "
                    f"dictionary does not: k = {clt.config.k} of {n} layers, in units of {rms.tolist()}"
                )
        config = settings("clt", d, per, activation, k)
        hooks = {f"hook_points_{w}": [f"blocks.{i}.{name}" for i in range(n)] for w, name in _NAMES.items()}
        config |= {"sparsity_include_decoder_norm": k is not None, **hooks}
        tensors = {"W_E": torch.stack([layer.W_enc.T for layer in layers])}
        tensors["b_E"] = torch.stack([layer.b_enc for layer in layers])
        for j, layer in enumerate(layers):
            tensors[f"W_D.{j}"] = torch.stack([layers[i].W_dec[:, j - i] for i in range(j + 1)])
            tensors[f"b_D.{j}"] = layer.b_dec
        jumps = [layer.threshold for layer in layers if layer.threshold is not None]
        if jumps:
            tensors[THRESHOLD] = torch.stack(jumps).clamp_min(torch.finfo(torch.float32).tiny).log()
        write_both(folder, config, tensors, (hook for side in hooks.values() for hook in side))


_NAMES = {"in": "hook_resid_mid", "out": "hook_mlp_out"}


def _hooks(config: Settings, key: str, n: int) -> list[str]:
    hooks = config.need(key, list)
    if len(hooks) != n or not all(isinstance(hook, str) for hook in hooks):
        raise UnweaveError(f"{config.origin}: expected {key!r} to name {n} hooks, found {str(hooks)[:80]}")
    return hooks


def _unscaled(config: Settings) -> str | None:
    """Why its rows cannot be scaled as it wants; None if they can."""
    norm = config.get("norm_activation", str, "dataset-wise")
    if norm in ("dataset-wise", "inference"):
        return None
    return f"norm_activation = {norm!r} scales every part by rows or batches, which unweave does for one site only"


def _scales(config: Settings, tensors: Tensors, prefix: str, hooks: list[str], d: int) -> Tensor:
    """``(n,)``, what rows of these sites are multiplied with."""
    if config.get("norm_activation", str, "dataset-wise") == "inference":
        return torch.ones(len(hooks))
    norms = [tensors.number(f"{prefix}{NORM}{hook}") for hook in hooks]
    if not all(norm > 0 for norm in norms):
        raise UnweaveError(f"{tensors.path}: expected average norms above 0, found {min(norms)}")
    return d**0.5 / torch.tensor(norms)
