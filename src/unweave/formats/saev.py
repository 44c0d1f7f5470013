"""saev: one file, a line of JSON with its settings and then the weights as ``torch.save`` writes them."""

from __future__ import annotations

from typing import Any, ClassVar

from unweave.errors import UnweaveError
from unweave.formats._checkpoint import Checkpoint
from unweave.formats._facts import Facts
from unweave.formats._fold import Parts
from unweave.formats.containers import Settings, Tensors
from unweave.formats.registry import Format, register

_KEYS = {"W_enc", "b_enc", "W_dec", "b_dec"}
_THRESHOLD = "activation.threshold"
_ARCHITECTURES = {"Relu": "relu", "TopK": "topk", "BatchTopK": "batch_topk"}
_UNSURE = (
    "files of schema 1 do not say whether the encoder subtracts b_dec, which changed while it was in use: give "
    "subtract=true or subtract=false, and see which explains more of your rows"
)


@register("saev")
class Saev(Format):
    """``W_enc (d, F)``, ``b_enc``, ``W_dec (F, d)``, ``b_dec``, for BatchTopK ``activation.threshold``.

    The line says which ``schema`` it is of. Without one it is of version 0.1, ReLU, and subtracts ``b_dec``. Schema 1
    names its activation in ``cls`` (and may or may not subtract) or, later, in ``cfg.activation``. From there on, up to
    schema 5, nothing is subtracted. BatchTopK keeps what exceeds its threshold; files before schema 3 have none, and
    keep the k largest of every row here. TopK lets negative values through there where fewer than k are positive.
    """

    title = "saev"
    checked = "library"
    options: ClassVar[dict[str, str]] = {"subtract": "whether the encoder subtracts b_dec, for files of schema 1"}

    def recognise(self, checkpoint: Checkpoint) -> float | None:
        name = _weights(checkpoint)
        if name is None or not checkpoint.keys(name) >= _KEYS:
            return None
        return 0.95 if "header" in checkpoint.tensors(name).values_beside else None

    def inspect(self, checkpoint: Checkpoint, subtract: bool | None = None) -> Facts:
        tensors, header, config = _open(checkpoint)
        d, n_features = tensors.shape("W_enc", 2)
        activation, k, unsure = _activation(header, config)
        missing = None
        if header.get("schema", int, 0) not in range(6):
            missing = f"saev's schema {header.get('schema', int)} is not known"
        elif activation not in _ARCHITECTURES:
            missing = f"saev's activation {activation!r} is not known, or depends on the whole batch"
        elif unsure and subtract is None:
            missing = _UNSURE
        by_row = activation == "BatchTopK" and _THRESHOLD not in tensors
        return Facts(
            self.name,
            _ARCHITECTURES.get(activation, activation),
            d_in=d,
            d_out=d,
            n_features=n_features,
            k=k if "TopK" in activation else None,
            dtype=tensors.info["W_enc"].dtype,
            library_class=activation,
            context={"schema": header.get("schema", int, 0), "saev": header.get("lib", object)},
            notes=("BatchTopK without a threshold: unweave keeps the k largest of every row",) if by_row else (),
            missing=missing,
        )

    def parts(self, checkpoint: Checkpoint, subtract: bool | None = None) -> Parts:
        tensors, header, config = _open(checkpoint)
        d, n_features = tensors.shape("W_enc", 2)
        declared = config.get("d_model", int) or config.get("d_vit", int)
        if declared not in (None, d):
            raise UnweaveError(f"{checkpoint.called}: its first line says a width of {declared}, the weights have {d}")
        activation, k, unsure = _activation(header, config)
        b_dec, threshold = tensors.read("b_dec", d), None
        if activation == "BatchTopK" and _THRESHOLD in tensors:
            threshold = max(0.0, tensors.number(_THRESHOLD))  # one that was never set passes what is positive
        subtracts = subtract if unsure else header.get("schema", int) is None
        return Parts(
            _ARCHITECTURES[activation],
            tensors.read("W_enc", d, n_features).T,
            tensors.read("W_dec", n_features, d),
            b_enc=tensors.read("b_enc", n_features),
            b_dec=b_dec,
            b_pre=b_dec if subtracts else None,
            threshold=threshold,
            options={"k": min(k, n_features)} if "TopK" in activation else {},
        )


def _activation(header: Settings, config: Settings) -> tuple[str, int, bool]:
    """The activation, its k (the library's default where nothing says it), whether b_dec may be subtracted or not."""
    schema, named = header.get("schema", int), config.get("activation", object)
    if schema is None:
        return "Relu", 0, False
    if schema == 1 and not isinstance(named, dict):
        cls = header.get("cls", str, "Relu")
        first = cls in _ARCHITECTURES
        return cls if first else "Relu", config.get("top_k", int, 32), first
    activation = config.section("activation")
    return activation.get("cls", str, "Relu"), activation.section("params").get("top_k", int, 32), False


def _weights(checkpoint: Checkpoint) -> str | None:
    return checkpoint.weights(".pt", ".pth")


def _open(checkpoint: Checkpoint) -> tuple[Tensors, Settings, Settings]:
    tensors = checkpoint.tensors(_weights(checkpoint) or checkpoint.names[0])
    values: Any = tensors.values_beside.get("header")
    if not isinstance(values, dict):
        raise UnweaveError(f"{checkpoint.called}: expected a first line of JSON, as saev writes it, found none")
    header = Settings(values, f"{tensors.path}, its first line")
    return tensors, header, header if header.get("schema", int) is None else header.section("cfg")
