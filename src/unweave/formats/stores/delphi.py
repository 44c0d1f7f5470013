"""delphi: a folder for each hookpoint, of ``START_END.safetensors`` (a range of latents each) and ``config.json``."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from unweave.batch import ActivationBatch
from unweave.codes import SparseCode
from unweave.errors import UnweaveError
from unweave.files import atomic_path, write_json
from unweave.formats._facts import site_of_module
from unweave.formats.containers import Settings, Tensors, open_tensors, read_settings
from unweave.formats.stores._base import ForeignStore, check_size, check_tokens, contexts, names_in, numbered
from unweave.formats.stores.registry import register
from unweave.progress import track

_CONFIG, _SPLIT = "config.json", r"(\d+)_(\d+)\.safetensors"
_ENTRIES = 1 << 20  # codes handled at once
_WINDOW = 32  # tokens of an example, delphi's default: its contexts are cut into such windows
_MAX_CONTEXTS = 1 << 24  # where no tokens say how many there are
_SMALLEST = 1e-5  # delphi keeps no code nearer to zero
_ENTRY = np.dtype([("place", "i8"), ("latent", "i4"), ("value", "f4")])


@register("delphi")
class Latents(ForeignStore):
    """Codes: ``locations (n, 3)`` (context, position, latent - START), ``activations (n,)``, ``tokens (contexts, t)``.

    What delphi caches is every token's code, so every token has a row; the rows themselves are not there.

    Attributes:
        n_features: as many as the splits reach to. n_contexts, context_size: of the tokens. n_entries: codes stored.
    """

    title = "delphi"
    holds = "codes"
    options: ClassVar[dict[str, str]] = {"context_size": "tokens of a context, where none are stored"}

    @classmethod
    def recognise(cls, folder: Path) -> bool:
        names = names_in(folder)
        try:
            splits = list(numbered(names, _SPLIT).values())
            return _CONFIG in names and {"locations", "activations"} <= set(open_tensors(folder / splits[0]))
        except (UnweaveError, IndexError):
            return False

    def _open(self) -> None:
        path = self.folder / _CONFIG
        config = read_settings(path) if path.is_file() else Settings({}, str(path))
        splits = numbered(names_in(self.folder), _SPLIT)
        wanted = config.get("n_splits", int)
        if not splits or (wanted is not None and wanted != len(splits)):
            raise UnweaveError(
                f"{self.folder}: expected {wanted or 'at least one'} START_END.safetensors, found {len(splits)}: copy "
                "the folder again, with all of them"
            )
        self._splits: list[tuple[int, int, Tensors]] = []
        tokens, end = None, 0
        for (start, last), name in splits.items():
            if start != end or last < start:
                raise UnweaveError(
                    f"{self.folder}: expected a split from latent {end} on, found {name}: one is missing"
                )
            tensors, end = open_tensors(self.folder / name), last + 1
            shape = self._check(tensors)
            if shape is not None and tokens not in (None, shape):
                raise UnweaveError(f"{tensors.path}: expected tokens of shape {tokens} as in the others, found {shape}")
            tokens = tokens or shape
            self._splits.append((start, end, tensors))
        self.n_features, self.n_entries = end, sum(t.info["activations"].shape[0] for _, _, t in self._splits)
        self.tokens = "unknown" if tokens is None else "kept"
        if tokens is None:
            found = (
                self.given.get("context_size", int) or config.get("cache_ctx_len", int) or config.get("ctx_len", int)
            )
            if found is None:
                raise UnweaveError(f"{self.folder} holds no tokens: say how long a context is, with context_size=")
            self.context_size, self._n_contexts = found, None
        else:
            self._n_contexts, self.context_size = tokens
        check_size(self.folder, "contexts", self.context_size, self.n_features)
        self.config = config
        self.model, self.hookpoint = config.get("model_name", str), self.folder.resolve().name
        self.site = site_of_module(self.hookpoint)

    def _check(self, tensors: Tensors) -> tuple[int, int] | None:
        """The shape of a split's tokens, if it has some."""
        info, path = tensors.info, tensors.path
        for name in ("locations", "activations"):
            if name not in info:
                raise UnweaveError(f"{path}: expected a tensor {name!r}, found {', '.join(info) or 'none'}")
        n = info["activations"].shape[0] if len(info["activations"].shape) == 1 else -1
        kinds = info["locations"].dtype, info["activations"].dtype
        if info["locations"].shape != (n, 3) or kinds[0][0] not in "IU" or kinds[1] not in ("F16", "F32", "BF16"):
            raise UnweaveError(
                f"{path}: expected 'locations' to be whole numbers (n, 3) and 'activations' floats (n,), found "
                f"{kinds[0]} of {info['locations'].shape} and {kinds[1]} of {info['activations'].shape}"
            )
        if "tokens" not in info:
            return None
        shape = info["tokens"].shape
        if len(shape) != 2 or 0 in shape or info["tokens"].dtype[0] not in "IU":
            raise UnweaveError(f"{path}: expected 'tokens' to be ids (contexts, t), found {info['tokens']}")
        return shape[0], shape[1]

    @property
    def n_contexts(self) -> int:
        return len(self._ends[0])

    @property
    def n_rows(self) -> int:
        """Tokens, each of which has a code."""
        return self.n_contexts * self.context_size

    @property
    def provenance(self) -> dict[str, Any]:
        """Where the codes came from, as far as the files say."""
        data = {key: value for key, value in self.config.items() if key.startswith("dataset_")}
        return self._origin(hookpoint=self.hookpoint, data={"name": data.get("dataset_repo") or None, **data})

    def facts(self) -> list[tuple[str, str]]:
        n = "" if self._n_contexts is None else f" over {self._n_contexts * self.context_size:,} tokens"
        return [
            *super().facts(),
            ("codes", f"{self.n_entries:,} of {self.n_features:,} features{n}"),
            *((key, str(value)[:200]) for key, value in self.config.items() if key.startswith("dataset_") and value),
            ("files", f"{len(self._splits)} splits"),
        ]

    @cached_property
    def _ends(self) -> list[np.ndarray]:
        """For each split the entries up to the end of every context, from one pass over the locations.

        Raises:
            UnweaveError: for locations outside the contexts or the split, or not in the order of contexts.
        """
        counts = []
        for start, end, tensors in self._splits:
            of = np.zeros(self._n_contexts or 0, "i8")
            before = 0
            for a in range(0, tensors.info["locations"].shape[0], _ENTRIES):
                found = tensors.rows("locations", a, a + _ENTRIES).numpy()
                numbers = found[:, 0]
                limit = (self._n_contexts or _MAX_CONTEXTS, self.context_size, end - start)
                if (found < 0).any() or (found >= limit).any():
                    bad = int(((found < 0) | (found >= limit)).any(1).argmax())
                    raise UnweaveError(
                        f"{tensors.path}: expected locations below {limit} (context, position, latent), found "
                        f"{tuple(found[bad].tolist())} as entry {a + bad}: it is damaged or of another cache"
                    )
                if numbers[0] < before or (np.diff(numbers) < 0).any():
                    raise UnweaveError(f"{tensors.path}: expected locations in the order of contexts, as delphi writes")
                before = int(numbers[-1])
                more = np.bincount(numbers, minlength=len(of))
                of = np.pad(of, (0, len(more) - len(of))) + more
            counts.append(of)
        n = max(map(len, counts))
        if n == 0:
            raise UnweaveError(f"{self.folder} holds neither tokens nor codes")
        return [np.pad(of, (0, n - len(of))).cumsum() for of in counts]

    def batches(self) -> Iterator[tuple[ActivationBatch, SparseCode]]:
        """Whole contexts, about a million codes at a time: items with rows of no width, and ``(n_rows, n_features)``.

        Raises:
            UnweaveError: for locations that do not fit, a place that is there twice, values that are not finite.
        """
        ends = self._ends
        total, t = np.sum(ends, axis=0), self.context_size
        a = 0
        while a < self.n_contexts:
            base = int(total[a - 1]) if a else 0
            b = max(a + 1, int(np.searchsorted(total, base + _ENTRIES, side="right")))
            b = min(b, a + max(1, _ENTRIES // t), self.n_contexts)
            tokens = self._tokens(a, b)
            rows = torch.empty((b - a), t, 0)
            yield contexts(rows, tokens, a), self._codes(a, b)
            a = b

    def _tokens(self, a: int, b: int) -> Tensor | None:
        for _, _, tensors in self._splits:
            if "tokens" in tensors:
                return check_tokens(tensors.path, tensors.rows("tokens", a, b))
        return None

    def _codes(self, a: int, b: int) -> SparseCode:
        places, features, values = [], [], []
        for (start, _, tensors), ends in zip(self._splits, self._ends):
            first, stop = int(ends[a - 1]) if a else 0, int(ends[b - 1])
            where = tensors.rows("locations", first, stop).long()
            places.append((where[:, 0] - a) * self.context_size + where[:, 1])
            features.append(where[:, 2] + start)
            values.append(tensors.rows("activations", first, stop).float())
            if not bool(torch.isfinite(values[-1]).all()):
                raise UnweaveError(f"{tensors.path}: its activations hold NaN or infinity, of contexts {a} to {b - 1}")
        place, feature, value = torch.cat(places), torch.cat(features), torch.cat(values)
        key, order = (place * self.n_features + feature).sort()
        if bool((key.diff() == 0).any()):
            raise UnweaveError(f"{self.folder}: a latent stands twice at one token, in contexts {a} to {b - 1}")
        offsets = torch.zeros((b - a) * self.context_size + 1, dtype=torch.int64)
        offsets[1:] = torch.bincount(place, minlength=len(offsets) - 1).cumsum(0)
        return SparseCode(feature[order], value[order], offsets, self.n_features)


def write_latents(
    folder: str | Path,
    coded: Iterable[tuple[ActivationBatch, SparseCode]],
    n_features: int,
    *,
    model: str | None = None,
    data: Mapping[str, str] | None = None,
    n_splits: int = 5,
    context_size: int | None = None,
    n_rows: int | None = None,
) -> Path:
    """Write what delphi caches, in the folder of one hookpoint: ``LatentDataset(folder.parent, ...)`` reads it.

    delphi's contexts are of one length. Items that are not are joined one behind the other and cut anew, as delphi
    itself joins documents; what is left at the end and fills no context is left out. Tokens without a row have no code.

    Args:
        folder: new, its name the hookpoint, such as ``latents/layers.12``; it is there when it is whole.
        coded: batches of items, and the ``(n_rows, n_features)`` code of their rows.
        model: whose tokenizer delphi is to load. data: its ``dataset_`` settings, kept in the config.
        n_splits: files to write; delphi, and this, hold one in memory.
        context_size: tokens of a context; None for that of the items, or where they differ of the longest, rounded up
            to whole windows of delphi's (32 tokens).
        n_rows: rows to expect, for the progress bar.

    Returns:
        Path: the folder.

    Raises:
        UnweaveError: for a folder that is not empty, items without token ids, too few tokens for one context, a full
            disk.
    """
    folder = Path(folder)
    if context_size is not None and context_size < 1:
        raise UnweaveError(f"expected contexts of at least one token, found context_size {context_size}")
    if not 1 <= n_splits <= n_features:
        raise UnweaveError(f"expected 1 to {n_features:,} splits, one for each feature at most, found {n_splits}")
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise UnweaveError(f"{folder} is not empty: choose a new folder")
    building = folder.parent / f".{folder.name}.making"
    shutil.rmtree(building, ignore_errors=True)  # what a killed writer left
    scratch = building / "scratch"
    try:
        scratch.mkdir(parents=True)
        edges = torch.linspace(0, n_features, steps=n_splits + 1).long().tolist()  # delphi's own rounding
        with track(n_rows, "latents") as progress:
            lengths, n_tokens = _spread(scratch, coded, n_features, edges, progress.advance)
        t = context_size or _common(lengths)
        n_contexts = n_tokens // t
        if n_contexts == 0:
            raise UnweaveError(f"{n_tokens:,} tokens are not one context of {t}: give more, or a smaller context_size")
        tokens = np.fromfile(scratch / "tokens", "i8")[: n_contexts * t].reshape(n_contexts, t)
        for start, end in pairwise(edges):
            with atomic_path(building / f"{start}_{end - 1}.safetensors") as path:
                _write_split(path, scratch / str(start), start, end, tokens)
        config = {"dataset_repo": "", "dataset_split": "", "dataset_name": "", "dataset_column": "", **(data or {})}
        config |= {"batch_size": 1, "cache_ctx_len": t, "n_tokens": n_contexts * t, "n_splits": n_splits}
        write_json(building / _CONFIG, {**config, "model_name": model or ""})
        shutil.rmtree(scratch)
        os.replace(building, folder)
    except OSError as error:
        raise UnweaveError(f"cannot write {folder}: {error.strerror or error}. Free some space and try again") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def _spread(
    scratch: Path,
    coded: Iterable[tuple[ActivationBatch, SparseCode]],
    n_features: int,
    edges: list[int],
    advance: Callable[[int], None],
) -> tuple[set[int], int]:
    """Put the codes of every split in a file of its own, in order; the lengths of items and the number of tokens."""
    borders = np.array(edges[1:])
    lengths, n_tokens = set(), 0
    files = {start: open(scratch / str(start), "wb") for start in edges[:-1]}  # noqa: SIM115
    try:
        with open(scratch / "tokens", "wb") as ids:
            for batch, code in coded:
                if code.shape != (batch.n_rows, n_features):
                    raise UnweaveError(f"expected a code of {(batch.n_rows, n_features)}, found {code.shape}")
                if len(batch.items.tokens) and int(batch.items.tokens.min()) < 0:
                    raise UnweaveError("delphi explains text, and these items have no token ids")
                lengths |= set(batch.items.offsets.diff().unique().tolist())
                ids.write(batch.items.tokens.numpy().astype("i8").tobytes())
                value = code.values.float().numpy()
                if not np.isfinite(value).all():
                    raise UnweaveError("the codes hold NaN or infinity: look at the dictionary's weights and its input")
                kept = np.abs(value) > _SMALLEST
                entries = np.empty(int(kept.sum()), _ENTRY)
                entries["place"] = (batch.row_token[code.rows].numpy() + n_tokens)[kept]
                entries["latent"], entries["value"] = code.indices.numpy()[kept], value[kept]
                entries = entries[np.lexsort((entries["latent"], entries["place"]))]
                split = np.searchsorted(borders, entries["latent"], side="right")
                for i, file in enumerate(files.values()):
                    file.write(entries[split == i].tobytes())
                n_tokens += batch.items.n_tokens
                advance(batch.n_rows)
    finally:
        for file in files.values():
            file.close()
    return lengths, n_tokens


def _write_split(path: Path, codes: Path, start: int, end: int, tokens: np.ndarray) -> None:
    from safetensors.numpy import save_file

    n, t = tokens.shape
    entries = np.fromfile(codes, _ENTRY)
    entries = entries[entries["place"] < n * t]
    small = n <= 1 << 16 and t <= 1 << 16 and end - start <= 1 << 16
    locations = np.empty((len(entries), 3), "u2" if small else "u4")
    locations[:, 0], locations[:, 1] = np.divmod(entries["place"], t)
    locations[:, 2] = entries["latent"] - start
    values = entries["value"]
    half = not len(values) or float(np.abs(values).max()) <= float(
        np.finfo("f2").max
    )  # float16 as delphi, where it can
    save_file({"locations": locations, "activations": values.astype("f2" if half else "f4"), "tokens": tokens}, path)


def _common(lengths: set[int]) -> int:
    lengths.discard(0)
    if len(lengths) <= 1:
        return max(lengths, default=1)
    return -(-max(lengths) // _WINDOW) * _WINDOW
