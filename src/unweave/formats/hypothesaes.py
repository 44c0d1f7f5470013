"""HypotheSAEs: one ``.pt`` with ``config`` and ``state_dict``."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from unweave.errors import UnweaveError
from unweave.formats._checkpoint import Checkpoint
from unweave.formats._facts import Facts
from unweave.formats._fold import Parts
from unweave.formats.containers import Settings, Tensors
from unweave.formats.registry import Format, register

_KEYS = {f"state_dict.{name}" for name in ("encoder.weight", "decoder.weight", "input_bias", "neuron_bias")}


@register("hypothesaes")
class HypotheSAEs(Format):
    """``encoder.weight (F, d)``, ``decoder.weight (d, F)``; ``input_bias`` is subtracted and added back.

    TopK by row, or with ``use_batch_topk`` by a threshold; nested prefixes only matter to training.
    """

    title = "HypotheSAEs"
    checked = "library"

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        return 0.95 if checkpoint.keys(checkpoint.weights(".pt", ".pth")) >= _KEYS else None

    def inspect(self, checkpoint: Checkpoint) -> Facts:
        config, tensors = _open(checkpoint)
        n_features, d = tensors.shape("state_dict.encoder.weight", 2)
        return Facts(
            self.name,
            _architecture(config),
            d_in=d,
            d_out=d,
            n_features=n_features,
            k=config.get("k_active_neurons", float),
            dtype=tensors.info["state_dict.encoder.weight"].dtype,
            context={"prefixes": config.get("prefix_lengths", object)},
            notes=("made for text embeddings, not for a site in a model",),
        )

    def parts(self, checkpoint: Checkpoint) -> Parts:
        config, tensors = _open(checkpoint)
        n_features, d = tensors.shape("state_dict.encoder.weight", 2)
        architecture, bias = _architecture(config), tensors.read("state_dict.input_bias", d)
        options: dict[str, Any] = {"k": config.size("k_active_neurons")}
        if architecture == "matryoshka":
            ends = [0, *_prefixes(config, n_features)]
            options["group_fractions"] = tuple((b - a) / n_features for a, b in pairwise(ends))
        return Parts(
            architecture,
            tensors.read("state_dict.encoder.weight", n_features, d),
            tensors.read("state_dict.decoder.weight", d, n_features).T,
            b_enc=tensors.read("state_dict.neuron_bias", n_features),
            b_dec=bias,
            b_pre=bias,
            threshold=None if architecture == "topk" else max(0.0, tensors.number("state_dict.threshold")),
            options=options,
        )


def _open(checkpoint: Checkpoint) -> tuple[Settings, Tensors]:
    tensors = checkpoint.tensors(checkpoint.weights(".pt", ".pth") or checkpoint.names[0])
    config = {k.removeprefix("config."): v for k, v in tensors.values_beside.items() if k.startswith("config.")}
    return Settings(config, f"{checkpoint.called}, config"), tensors


def _architecture(config: Settings) -> str:
    if not config.get("use_batch_topk", bool, False):
        return "topk"
    return "matryoshka" if config.get("prefix_lengths", object) else "batch_topk"


def _prefixes(config: Settings, n_features: int) -> list[int]:
    ends = config.need("prefix_lengths", list)
    if (
        not ends
        or any(not isinstance(e, int) for e in ends)
        or ends != sorted(set(ends))
        or ends[-1] != n_features
        or ends[0] < 1
    ):
        raise UnweaveError(
            f"{config.origin}: expected rising prefix_lengths that end at {n_features}, found {ends[:8]}"
        )
    return ends
