"""Other libraries' stores: activations into an ActivationStore, codes into a run, and a run's codes for delphi."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from unweave.activations import ActivationStore, harvest
from unweave.batch import ActivationBatch
from unweave.codes import SparseCode
from unweave.dictionaries import Dictionary
from unweave.errors import UnweaveError
from unweave.features import build_features_of_codes
from unweave.formats import stores
from unweave.formats.stores import ForeignRows, Latents
from unweave.runs import Run, load
from unweave.runs.provenance import environment, update_provenance

if TYPE_CHECKING:
    from torch import Tensor

    from unweave.sources import LanguageModel

Say = Callable[[str], None]


def import_store(
    folder: str | Path,
    out: str | Path,
    *,
    format: str | None = None,
    n_rows: int | None = None,
    dtype: Literal["int8"] | None = None,
    dictionary: str | Path | None = None,
    model: str | None = None,
    options: Mapping[str, Any] | None = None,
    say: Say = print,
) -> ActivationStore | Run:
    """Turn another library's store into unweave's own, which everything reads.

    Activations become an :class:`ActivationStore`, by way of :func:`harvest`: in bounded memory, the same rows in the
    same dtype, and an import that was killed goes on where it was. Codes become a run, for the browser and for
    whatever reads a run's features.

    Args:
        folder: what :func:`unweave.formats.stores.open_store` knows. out: the store, or the run, to write.
        format: which format, where the content does not tell.
        n_rows: how many rows of activations, in whole batches; None for all. dtype: as for :func:`harvest`.
        dictionary: of codes: the run or checkpoint that they came from; without it the run has features and no
            dictionary, so that nothing can be encoded.
        model: of activations: its name, where the files do not say. Of codes: the model to load, so that tokens show
            as text and (with a dictionary) features have output logits; ids alone without it.
        options: what the files do not say; each format has its own.

    Raises:
        UnweaveError: as for opening, for what does not fit the kind of store, and while reading for broken values.
    """
    named = {} if model is None else {"model": model}
    source = stores.open_store(folder, **{"format": format, **(options or {}), **named})
    if isinstance(source, Latents):
        if n_rows is not None or dtype is not None:
            raise UnweaveError(f"{folder} holds codes, and all of them are read: leave rows and dtype out")
        return _import_latents(source, Path(out), dictionary, model, say)
    assert isinstance(source, ForeignRows)
    if dictionary is not None:
        raise UnweaveError(
            f"{folder} holds activations: train a dictionary on them, or evaluate one; leave it out here"
        )
    say(f"{source!r}: at most {source.n_rows:,} rows of width {source.d_in}")
    return harvest(source, out, n_rows=min(n_rows or source.n_rows, source.n_rows), dtype=dtype)


def _import_latents(source: Latents, out: Path, dictionary: str | Path | None, model: str | None, say: Say) -> Run:
    trained = any((out / name).exists() for name in ("recipe.yaml", "training.json"))
    made_here = (out / "features").exists() and not trained
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not made_here):
        raise UnweaveError(f"{out} is not empty and holds no run of imported codes: choose a new folder")
    opened = None if dictionary is None else _dictionary(dictionary)
    if opened is not None and opened.n_features != source.n_features:
        raise UnweaveError(
            f"{dictionary} has {opened.n_features:,} features, the codes in {source.folder} are of "
            f"{source.n_features:,}: give the dictionary they came from"
        )
    known = None if model is None else _language_model(model, say)
    say(f"{source!r}: {source.n_entries:,} codes of {source.n_features:,} features")
    build_features_of_codes(
        out / "features",
        source.n_features,
        source.batches(),
        dictionary=opened,
        token_bytes=None if known is None else known.token_bytes(),
        unembed=None if known is None else _unembed(known, source.site),
        n_rows=source.n_rows,
        provenance=source.provenance,
    )
    if opened is not None:
        opened.save(out / "dictionary")
    update_provenance(out, **environment(), source=source.provenance)
    return Run(out)


def _dictionary(thing: str | Path) -> Dictionary:
    opened = load(thing)
    return opened.dictionary if isinstance(opened, Run) else opened


def _language_model(name: str, say: Say) -> LanguageModel:
    from unweave.sources import LanguageModel

    say(f"loading the model {name}")
    return LanguageModel.load(name)


def _unembed(model: LanguageModel, site: str | None) -> Callable[[Tensor], Tensor] | None:
    """What atoms do to the logits, where they are known to live in the residual stream."""
    return model.unembed if site in model.sites() and not site.endswith(".heads") else None


def export_latents(
    thing: str | Path,
    out: str | Path,
    *,
    store: str | Path | None = None,
    hookpoint: str | None = None,
    model: str | None = None,
    n_splits: int = 5,
    context_size: int | None = None,
    n_rows: int | None = None,
) -> Path:
    """Write codes as delphi caches them, so that its explainers and scorers can run on them.

    Args:
        thing: a run, whose feature store holds codes; or with ``store`` any run or checkpoint.
        out: the folder around delphi's hookpoints (its ``raw_dir``).
        store: activations to encode instead. n_rows: how many of them, in whole batches; None for all.
        hookpoint: the folder's name in ``out``; None for the site. model: whose tokenizer delphi loads; None for the
            one the activations came from.
        n_splits, context_size: see :func:`unweave.formats.stores.write_latents`.

    Returns:
        Path: the folder of the hookpoint.

    Raises:
        UnweaveError: for a run without features, a store of another width, a site that is unknown, and as for writing.
    """
    if store is None:
        opened = load(thing)
        features = opened.features if isinstance(opened, Run) else None
        if features is None:
            raise UnweaveError(f"{thing} holds no codes: run `unweave index` on a run, or give activations to encode")
        if n_rows is not None:
            raise UnweaveError("rows are those of activations to encode: leave the number out, or give a store")
        coded, provenance, n_features = features.batches(), features.manifest["provenance"], features.n_features
        n_rows = features.n_rows
    else:
        dictionary, rows = _dictionary(thing), ActivationStore.open(store)
        if rows.d_in != dictionary.d_in:
            raise UnweaveError(f"{store} holds rows of width {rows.d_in}, {thing} reads rows of {dictionary.d_in}")
        n_rows = min(n_rows or rows.n_rows, rows.n_rows)
        coded, provenance, n_features = _encoded(dictionary, rows, n_rows), rows.provenance, dictionary.n_features
    name = hookpoint or provenance.get("hookpoint") or provenance.get("site")
    if not name or name == ".." or Path(name).name != name:
        raise UnweaveError(f"expected the name of a hookpoint, such as layers.12, found {name!r}: give one")
    of = provenance.get("model")
    return stores.write_latents(
        Path(out) / name,
        coded,
        n_features,
        model=model or (of.get("name") if isinstance(of, Mapping) else None),
        data=_dataset(provenance.get("data")),
        n_splits=n_splits,
        context_size=context_size,
        n_rows=n_rows,
    )


def _dataset(data: Any) -> dict[str, str]:
    """What delphi's config calls the data, as far as it is known."""
    known = data if isinstance(data, Mapping) else {}
    kept = {key: str(value) for key, value in known.items() if key.startswith("dataset_")}
    return kept or {"dataset_repo": str(known.get("spec") or known.get("name") or "")}


@torch.no_grad()
def _encoded(
    dictionary: Dictionary, store: ActivationStore, n_rows: int
) -> Iterator[tuple[ActivationBatch, SparseCode]]:
    dictionary.eval()
    for batch in store.batches():
        if n_rows <= 0:
            return
        n_rows -= batch.n_rows
        yield batch, dictionary.encode(batch.input.float().to(dictionary.device)).detach().to("cpu")
