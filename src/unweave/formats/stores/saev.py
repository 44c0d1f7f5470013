"""saev: ``metadata.json``, ``shards.json`` since protocol 1, raw ``acts000000.bin`` (example, layer, token, d)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch

from unweave.batch import ActivationBatch
from unweave.errors import UnweaveError
from unweave.formats.containers import Settings, read_settings
from unweave.formats.stores._base import ForeignRows, check_size, contexts, names_in
from unweave.formats.stores.registry import register

_METADATA, _SHARDS = "metadata.json", "shards.json"
# The same number under the names of each protocol, the newest first.
_CONTENT = ("content_tokens_per_example", "patches_per_ex", "n_patches_per_img")
_WIDTH = ("d_model", "d_vit")
_EXAMPLES = ("n_examples", "n_ex", "n_imgs")
_BUDGET = ("max_tokens_per_shard", "max_patches_per_shard", "patches_per_shard", "n_patches_per_shard")
_CHECKPOINT = ("ckpt", "vit_ckpt")
_ITEM = 4  # bytes of a float32


@register("saev")
class SaevShards(ForeignRows):
    """Every example has a position for each patch, the CLS token before them; examples have no token ids.

    A shard file has its full length also where the last examples of the last one are missing: how many there are
    ``shards.json`` says, or before it the metadata. The pickled data set in the metadata is never opened.
    """

    title = "saev"
    tokens: Literal["kept", "unknown", "none"] = "none"
    options: ClassVar[dict[str, str]] = {
        "layer": "which layer, of several",
        "cls": "true: rows of the CLS token too, which are left out else",
    }

    @classmethod
    def recognise(cls, folder: Path) -> bool:
        try:
            metadata = read_settings(folder / _METADATA)
        except UnweaveError:
            return False
        return all(any(name in metadata for name in names) for names in (_CONTENT, _WIDTH, _EXAMPLES, _CHECKPOINT))

    def _open(self) -> None:
        metadata = read_settings(self.folder / _METADATA)
        protocol = metadata.get("protocol", str, "0")
        if protocol.split(".")[0] not in ("0", "1", "2"):
            raise UnweaveError(
                f"{metadata.origin}: expected a protocol up to 2, found {protocol[:40]!r}: a newer saev?"
            )
        if (dtype := metadata.get("dtype", str, "float32")) != "float32":
            raise UnweaveError(f"{metadata.origin}: expected float32 activations, found {dtype[:40]!r}")
        layers = metadata.need("layers", list)
        if not layers or not all(type(layer) is int for layer in layers) or len(set(layers)) < len(layers):
            raise UnweaveError(f"{metadata.origin}: expected the numbers of layers, found {str(layers)[:80]}")
        layer = self.given.get("layer", int)
        if layer is None and len(layers) > 1:
            raise UnweaveError(f"{self.folder} holds the layers {layers}: say which, as layer=")
        self.layer = layers[0] if layer is None else layer
        if self.layer not in layers:
            raise UnweaveError(f"{self.folder} holds no layer {self.layer}: it holds {layers}")
        self.at, self.n_layers = layers.index(self.layer), len(layers)
        self.cls_token = metadata.need("cls_token", bool)
        self.content, self.width = (metadata.size(_known(metadata, names)) for names in (_CONTENT, _WIDTH))
        self.context_size = self.content + self.cls_token
        self.with_cls = self.given.get("cls", bool, False)
        if self.with_cls and not self.cls_token:
            raise UnweaveError(f"{self.folder} holds no CLS tokens: leave cls out")
        check_size(self.folder, "an example", self.n_layers, self.context_size, self.width)
        self._shards = self._find_shards(metadata)
        self.dtype = "float32"
        self.model = metadata.get(_known(metadata, _CHECKPOINT), str)
        self.site = f"layers.{self.layer}" if self.layer >= 0 else None  # -2: counted from an end nobody names
        self.n_rows = sum(n for _, n in self._shards) * (self.content + self.with_cls)
        self.data = {"layer": self.layer, "protocol": protocol, "name": Path(metadata.get("dataset", str, "")).name}
        self.data = {key: value for key, value in self.data.items() if value != ""}

    def _find_shards(self, metadata: Settings) -> list[tuple[Path, int]]:
        """Every shard and its examples, each file there in full length."""
        wanted = metadata.size(_known(metadata, _EXAMPLES))
        budget = metadata.size(_known(metadata, _BUDGET))
        per_shard = budget // (self.context_size * self.n_layers)
        if per_shard < 1:
            raise UnweaveError(f"{metadata.origin}: {budget:,} tokens a shard are not one example")
        if (self.folder / _SHARDS).is_file():
            counts = _listed(self.folder / _SHARDS, per_shard)
        else:
            if "protocol" in metadata:
                raise UnweaveError(f"{self.folder / _SHARDS} is missing: the dump was not finished or not copied whole")
            n_files = sum(name.startswith("acts") for name in names_in(self.folder))
            if wanted > n_files * per_shard:
                raise UnweaveError(
                    f"{self.folder}: expected shards for {wanted:,} examples as {_METADATA} says, found {n_files} of "
                    f"{per_shard:,} each: copy the folder again, with all its acts files"
                )
            counts = [min(per_shard, wanted - first) for first in range(0, wanted, per_shard)]
        if (there := sum(counts)) != wanted:
            raise UnweaveError(
                f"{self.folder}: expected {wanted:,} examples as {_METADATA} says, found {there:,} in its shards: the "
                "dump was cut off. Run it to its end, or change the number in the metadata to keep these"
            )
        shards, example = [], self.n_layers * self.context_size * self.width * _ITEM
        for i, n in enumerate(counts):
            path = self.folder / f"acts{i:06d}.bin"
            size = path.stat().st_size if path.is_file() else None
            if n and size not in (per_shard * example, n * example):
                found = "no file" if size is None else f"{size:,} bytes"
                raise UnweaveError(
                    f"{path}: expected {per_shard * example:,} bytes for {per_shard:,} examples, found {found}: it is "
                    "missing or cut short, copy it again"
                )
            shards += [(path, n)] if n else []
        return shards

    def _files(self) -> list[Path]:
        return [self.folder / _METADATA, *(path for path, _ in self._shards)]

    def _stretches(self) -> Iterator[tuple[Path, int, int]]:
        first = 0
        for path, n in self._shards:
            yield path, n, first
            first += n

    def _read(self, path: Path, n: int, first: int, skip: int) -> Iterator[ActivationBatch]:
        shape = (n, self.n_layers, self.context_size, self.width)
        try:
            shard = np.memmap(path, dtype="<f4", mode="r", shape=shape)
        except (OSError, ValueError) as error:
            raise UnweaveError(f"cannot read {path}: {error}") from None
        for a in range(skip * self.per_batch, n, self.per_batch):
            rows = torch.from_numpy(np.array(shard[a : a + self.per_batch, self.at], dtype=np.float32))
            empty = (rows == 0).flatten(1).all(1).nonzero()
            if len(empty):
                raise UnweaveError(
                    f"{path}: every value of example {first + a + int(empty[0]):,} is 0: nothing was written there, "
                    "the dump was cut off. Run it to its end"
                )
            keep = torch.ones(rows.shape[:2], dtype=torch.bool)
            keep[:, : self.cls_token and not self.with_cls] = False
            yield contexts(rows, None, first + a, keep)


def _known(metadata: Settings, names: tuple[str, ...]) -> str:
    return next((name for name in names if name in metadata), names[0])


def _listed(path: Path, per_shard: int) -> list[int]:
    """The examples of every shard, as ``shards.json`` lists them."""
    try:
        listed = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UnweaveError(f"{path} is not valid JSON ({str(error)[:120]}); it may be cut short") from None
    if not isinstance(listed, list) or not all(isinstance(entry, dict) for entry in listed):
        raise UnweaveError(f"{path}: expected a list of shards, found {str(listed)[:60]}")
    counts = []
    for i, entry in enumerate(listed):
        known = Settings(entry, f"{path}, shard {i}")
        n = known.need(_known(known, _EXAMPLES), int)
        if known.need("name", str) != f"acts{i:06d}.bin" or not 0 <= n <= per_shard:
            raise UnweaveError(f"{path}: expected acts{i:06d}.bin with at most {per_shard:,} examples, found {entry}")
        counts.append(n)
    return counts
