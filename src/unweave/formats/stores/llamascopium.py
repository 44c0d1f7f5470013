"""llamascopium (lm-saes): a folder for each hook, of ``chunk-00000000.safetensors`` (or .pt) with their tokens."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from unweave.batch import ActivationBatch
from unweave.errors import UnweaveError
from unweave.formats._facts import site_of_hook
from unweave.formats.containers import Tensors, open_tensors
from unweave.formats.stores._base import ForeignRows, check_size, check_tokens, contexts, names_in, numbered
from unweave.formats.stores.registry import register

_CHUNK = r"(?:shard-(\d+)-)?chunk-(\d+)\.(?:safetensors|pt)"
_FLOATS = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_WHOLE = ("I64", "I32", "I16", "U16", "U32")
_MAX_META = 1 << 26
Kind = tuple[str, int, int]


@register("llamascopium")
class LlamascopiumChunks(ForeignRows):
    """``activation (n, context, d)`` or ``(n, d)``, ``tokens`` and, beside them, ``mask`` and ``attention_mask``.

    Tokens whose mask is 0 (BOS, padding) give no row, as when the library trains; those behind the last real token of
    a context are padding, and are no tokens here.
    """

    title = "llamascopium"

    @classmethod
    def recognise(cls, folder: Path) -> bool:
        chunks = numbered(names_in(folder), _CHUNK)
        try:
            return bool(chunks) and {"activation", "tokens"} <= set(open_tensors(folder / next(iter(chunks.values()))))
        except UnweaveError:
            return False

    def _open(self) -> None:
        chunks = numbered(names_in(self.folder), _CHUNK)
        if not chunks:
            raise UnweaveError(f"{self.folder} holds no chunk-00000000.safetensors: name the folder of one hook")
        for shard, last in dict(list(chunks)).items():
            missing = next((number for number in range(last) if (shard, number) not in chunks), None)
            if missing is not None:
                raise UnweaveError(f"{self.folder}: chunk {missing} of {last + 1} is missing: copy the folder again")
        if len(chunks) < sum(re.fullmatch(_CHUNK, name) is not None for name in names_in(self.folder)):
            raise UnweaveError(f"{self.folder} holds a chunk twice, under two names or as .pt and .safetensors")
        self._chunks: list[tuple[Path, int]] = []
        kinds: list[Kind] = []
        for name in chunks.values():
            n, kind = _kind(open_tensors(self.folder / name))
            self._chunks.append((self.folder / name, n))
            kinds.append(kind)
            if kind != kinds[0]:
                raise UnweaveError(
                    f"{self.folder / name}: expected {kinds[0][0]} contexts of {kinds[0][1:]} as in the chunks before "
                    f"it, found {kind[0]} of {kind[1:]}: chunks of two caches in one folder?"
                )
        self.dtype, self.context_size, self.width = kinds[0]
        check_size(self.folder, "contexts", self.context_size, self.width)
        self.tokens = "kept"
        self.n_rows = sum(n for _, n in self._chunks) * self.context_size
        meta = _meta(self._chunks[0][0])
        self.model = meta.get("model_name") if isinstance(meta.get("model_name"), str) else None
        self.site, self.data = site_of_hook(self.folder.name), {"hook": self.folder.name}
        if isinstance(meta.get("dataset_name"), str):
            self.data["name"] = meta["dataset_name"]

    def _files(self) -> list[Path]:
        return [path for path, _ in self._chunks]

    def _stretches(self) -> Iterator[tuple[Path, int, int]]:
        first = 0
        for path, n in self._chunks:
            yield path, n, first
            first += n

    def _read(self, path: Path, n: int, first: int, skip: int) -> Iterator[ActivationBatch]:
        tensors = open_tensors(path)
        if _kind(tensors)[0] != n:
            raise UnweaveError(f"{path} changed while it was read")
        t = self.context_size
        for a in range(skip * self.per_batch, n, self.per_batch):
            b = min(a + self.per_batch, n)
            rows = tensors.rows("activation", a, b).reshape(b - a, t, self.width)
            tokens = check_tokens(path, tensors.rows("tokens", a, b)).reshape(b - a, t)
            masks = {
                name: tensors.rows(name, a, b).reshape(b - a, t) != 0 if name in tensors else torch.ones(b - a, t) > 0
                for name in ("mask", "attention_mask")
            }
            real = masks["mask"] | masks["attention_mask"]
            lengths = (real * torch.arange(1, t + 1)).amax(1)
            yield contexts(rows, tokens, first + a, masks["mask"], lengths)


def _meta(chunk: Path) -> dict[str, Any]:
    """What is said of the first context of a chunk; nothing where nothing is."""
    path = chunk.with_suffix(".meta.json")
    try:
        if path.stat().st_size > _MAX_META:
            return {}
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found[0] if isinstance(found, list) and found and isinstance(found[0], dict) else {}


def _kind(tensors: Tensors) -> tuple[int, Kind]:
    """The number of contexts of a chunk whose tensors fit together, and the dtype, length and width of all of them."""
    path, info = tensors.path, tensors.info
    for name in ("activation", "tokens"):
        if name not in info:
            raise UnweaveError(f"{path}: expected a tensor {name!r}, found {', '.join(info) or 'none'}")
    dtype, shape = info["activation"]
    if dtype not in _FLOATS or len(shape) not in (2, 3) or 0 in shape:
        raise UnweaveError(
            f"{path}: expected 'activation' to be floats (n, context, d) or (n, d), found {dtype} of {shape}"
        )
    for name in info.keys() & {"tokens", "mask", "attention_mask"}:
        fits = info[name].dtype in _WHOLE or (name != "tokens" and info[name].dtype in ("BOOL", "U8", "I8"))
        if info[name].shape != shape[:-1] or not fits:
            raise UnweaveError(
                f"{path}: expected {name!r} to be whole numbers of shape {shape[:-1]}, found {info[name].dtype} of "
                f"{info[name].shape}"
            )
    return shape[0], (_FLOATS[dtype], shape[1] if len(shape) == 3 else 1, shape[-1])
