"""Build a FeatureStore in one pass over activations, or merge stores of parts of the data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from unweave.batch import ActivationBatch
from unweave.codes import SparseCode
from unweave.dictionaries._base import Dictionary
from unweave.dictionaries._origin import check_origin
from unweave.errors import UnweaveError
from unweave.features import _derive
from unweave.features._columns import Columns, new_folder, write_column, write_manifest
from unweave.features._tally import COLUMNS, Tally, token_keys
from unweave.features._tokens import Vocabulary
from unweave.features._writer import CodeWriter
from unweave.features.config import IndexConfig
from unweave.features.feature import Origin
from unweave.features.store import SNIPPET_AFTER, SNIPPET_BEFORE, FeatureStore
from unweave.progress import track

_COPY = 1 << 22  # elements copied at a time

FROM_DICTIONARY = (
    "part_norms",
    "origin_document",
    "origin_position",
    "origin_text",
    "origin_offsets",
    "similar_feature",
    "similar_cosine",
    "positive_logit_token",
    "positive_logit_value",
    "negative_logit_token",
    "negative_logit_value",
)
VOCABULARY = ("vocabulary", "vocabulary_offsets")


def build_features(
    folder: str | Path,
    dictionary: Dictionary,
    batches: Iterable[ActivationBatch],
    *,
    token_bytes: Sequence[bytes] | None = None,
    unembed: Callable[[Tensor], Tensor] | None = None,
    origins: Mapping[int, Origin] | None = None,
    config: IndexConfig | None = None,
    n_rows: int | None = None,
    provenance: dict[str, Any] | None = None,
    force: bool = False,
) -> FeatureStore:
    """Encode batches once and write everything there is to know about each feature.

    The store appears in ``folder`` when it is whole; a store that was there is replaced then.

    Args:
        folder: where to. dictionary: what encodes. batches: of whole items, in any order.
        token_bytes: the bytes of each token id; None for data without text.
        unembed: ``(m, d_out)`` directions to ``(m, vocabulary)`` logits; None where there are no output logits.
        origins: by feature, the row of the data that its atom is, for a dictionary whose atoms are rows.
        config: how much to keep. n_rows: rows to expect, for the progress bar.
        provenance: of the rows, kept in the manifest.
        force: go on with a dictionary that was loaded and is not known to be for that model and site.

    Raises:
        UnweaveError: no rows, a dictionary of another model or site, rows the dictionary refuses, codes that are not
            finite, tokens outside the vocabulary, document numbers outside 0 .. 2^31, a folder that holds something
            else, a full disk.
    """
    if not force:
        check_origin(dictionary.trained_on, provenance or {}, "indexed on")
    return build_features_of_codes(
        folder,
        dictionary.n_features,
        ((batch, _encode(dictionary, batch)) for batch in batches),
        dictionary=dictionary,
        token_bytes=token_bytes,
        unembed=unembed,
        origins=origins,
        config=config,
        n_rows=n_rows,
        provenance=provenance,
    )


def build_features_of_codes(
    folder: str | Path,
    n_features: int,
    coded: Iterable[tuple[ActivationBatch, SparseCode]],
    *,
    dictionary: Dictionary | None = None,
    token_bytes: Sequence[bytes] | None = None,
    unembed: Callable[[Tensor], Tensor] | None = None,
    origins: Mapping[int, Origin] | None = None,
    config: IndexConfig | None = None,
    n_rows: int | None = None,
    provenance: dict[str, Any] | None = None,
) -> FeatureStore:
    """The same from codes that are there already, as other libraries store them.

    Args:
        coded: batches, of which only items and places of rows are read, with the ``(n_rows, n_features)`` code of
            their rows. dictionary: whose codes they are; without it nothing is said of similar features and logits.
        folder, token_bytes, unembed, origins, config, n_rows, provenance: as for :func:`build_features`.

    Raises:
        UnweaveError: as for :func:`build_features`; when the dictionary has another number of features.
    """
    if dictionary is not None and dictionary.n_features != n_features:
        raise UnweaveError(f"the codes are of {n_features:,} features, the dictionary has {dictionary.n_features:,}")
    config = config or IndexConfig()
    vocabulary = None if token_bytes is None else Vocabulary.of(token_bytes)
    with new_folder(folder) as building:
        tally = Tally(n_features, config.n_top, config.n_sample, config.seed)
        with CodeWriter(building, tally, vocabulary) as writer, track(n_rows, "features") as progress:
            for batch, code in coded:
                writer.add(batch, code)
                progress.advance(batch.n_rows)
        if writer.n_rows == 0:
            raise UnweaveError("expected at least one activation row, found none: is the source empty?")
        if vocabulary is not None:
            write_column(building, "vocabulary", vocabulary.data)
            write_column(building, "vocabulary_offsets", vocabulary.offsets)
        if dictionary is not None:
            _write_dictionary_columns(building, dictionary, unembed, vocabulary, config)
        for name, values in _derive.origins(origins, n_features).items() if origins else ():
            write_column(building, name, values)
        of = {"arch": "unknown"} if dictionary is None else fingerprint(dictionary)
        _finish(
            building, tally, writer.n_rows, config, vocabulary, {"dictionary": of, "provenance": provenance or {}},
        )  # fmt: skip
    return FeatureStore.open(folder)


def merge(stores: Sequence[FeatureStore], folder: str | Path) -> FeatureStore:
    """The store of all items of several stores: what building over all their data would have given.

    Raises:
        UnweaveError: when the stores are not of one dictionary, vocabulary and config.
    """
    if not stores:
        raise UnweaveError("merge: expected at least one feature store, found none")
    first = stores[0]
    for store in stores[1:]:
        for what in ("dictionary", "config"):
            if store.manifest[what] != first.manifest[what]:
                raise UnweaveError(f"cannot merge {store.folder} into {first.folder}: they differ in {what}")
        if any(_column_entry(store, name) != _column_entry(first, name) for name in VOCABULARY):
            raise UnweaveError(f"cannot merge {store.folder} into {first.folder}: they differ in vocabulary")
    config = first.config
    with new_folder(folder) as building:
        tally = Tally(first.n_features, config.n_top, config.n_sample, config.seed)
        with CodeWriter(building, None, None) as writer:
            for store in stores:
                before = writer.n_tokens
                writer.copy(store.columns, _COPY)
                tally.merge(_tally_of(store), before)
        kept = [name for name in (*VOCABULARY, *FROM_DICTIONARY) if name in first.manifest["columns"]]
        for name in kept:
            write_column(building, name, first.columns[name])
        parts = [store.manifest["provenance"] for store in stores]
        provenance = parts[0] if all(part == parts[0] for part in parts) else {"merged": parts}
        _finish(
            building, tally, sum(store.n_rows for store in stores), config, first.vocabulary,
            {"dictionary": first.manifest["dictionary"], "provenance": provenance},
        )  # fmt: skip
    return FeatureStore.open(folder)


def fingerprint(dictionary: Dictionary) -> dict[str, str]:
    """Architecture and sha256 over config and weights: tells whether a store belongs to a dictionary."""
    digest = hashlib.sha256(json.dumps(dictionary.config.to_dict(), sort_keys=True).encode())
    for name, tensor in sorted(dictionary.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return {"arch": getattr(dictionary, "name", type(dictionary).__name__), "sha256": digest.hexdigest()}


# ---- parts -----------------------------------------------------------------------------------------------------


def _encode(dictionary: Dictionary, batch: ActivationBatch) -> SparseCode:
    training = dictionary.training
    dictionary.eval()
    try:
        with torch.no_grad():
            code = dictionary.encode(batch.input.float()).detach().to("cpu")
    finally:
        dictionary.train(training)
    if code.shape != (batch.n_rows, dictionary.n_features):
        raise UnweaveError(f"encode gave a code of {code.shape}, expected {(batch.n_rows, dictionary.n_features)}")
    return code


def _write_dictionary_columns(
    building: Path,
    dictionary: Dictionary,
    unembed: Callable[[Tensor], Tensor] | None,
    vocabulary: Vocabulary | None,
    config: IndexConfig,
) -> None:
    with torch.no_grad():
        directions = dictionary.decoder_directions().detach().float()
        columns = _derive.similar(directions, config.n_similar)
        if unembed is not None:
            columns |= _derive.logits(directions, unembed, config.n_logits, vocabulary)
        if (norms := dictionary.part_norms()) is not None:
            columns["part_norms"] = norms.float().cpu().numpy()
    for name, values in columns.items():
        write_column(building, name, values)


def _finish(
    building: Path,
    tally: Tally,
    n_rows: int,
    config: IndexConfig,
    vocabulary: Vocabulary | None,
    facts: dict[str, Any],
) -> None:
    """Write what the tally holds, what follows from it and the codes, and the manifest."""
    disk = Columns(building)
    columns = tally.columns()
    columns |= _derive.top_tokens(
        columns["sample_offsets"], columns["sample_token"], disk["tokens"], config.n_top_tokens
    )
    columns |= _derive.cofiring(
        columns["sample_offsets"],
        columns["sample_token"],
        disk["code_offsets"],
        disk["code_indices"],
        columns["n_firing"] / max(n_rows, 1),
        config.n_cofiring,
    )
    item_offsets = disk["item_offsets"]

    def window(token: int) -> tuple[int, int]:
        item = int(np.searchsorted(item_offsets, token, side="right")) - 1
        return (
            max(int(item_offsets[item]), token - SNIPPET_BEFORE),
            min(int(item_offsets[item + 1]), token + SNIPPET_AFTER + 1),
        )

    searched = {name: disk[name] for name in FROM_DICTIONARY if name in disk and not name.endswith("value")}
    columns |= _derive.search_text({**columns, **searched, "tokens": disk["tokens"]}, vocabulary, window)
    for name, values in columns.items():
        write_column(building, name, values)
    counts = {
        "n_features": tally.n_features,
        "n_rows": n_rows,
        "n_items": len(disk["item_document"]),
        "n_tokens": len(disk["tokens"]),
        "n_entries": len(disk["code_indices"]),
    }
    write_manifest(building, {"counts": counts, "config": config.to_dict(), **facts})


def _tally_of(store: FeatureStore) -> Tally:
    columns = store.columns
    key = token_keys(columns["item_offsets"], columns["item_document"], columns["item_start"])
    config = store.config
    return Tally.from_columns(
        {name: columns[name] for name in COLUMNS}, key, config.n_top, config.n_sample, config.seed
    )


def _column_entry(store: FeatureStore, name: str) -> Any:
    return store.manifest["columns"].get(name)
