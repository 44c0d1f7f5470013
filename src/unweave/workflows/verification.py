"""A checkpoint on its model, or on stored activations, against what it declares."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unweave import formats
from unweave.activations import ActivationStore
from unweave.batch import ActivationBatch
from unweave.dictionaries._origin import check_origin, same_model
from unweave.errors import UnweaveError
from unweave.evaluation import Evaluation
from unweave.formats import Facts, Verdict
from unweave.formats.verify import NOTHING_DECLARED
from unweave.runs.opening import open_documents, open_model
from unweave.runs.recipe import Recipe
from unweave.sources import Source, TextSites, TextSource
from unweave.sources.text import TEXT_DEFAULTS
from unweave.workflows._places import find_place, neighbours
from unweave.workflows.pipeline import first_rows

if TYPE_CHECKING:
    from unweave.dictionaries import Dictionary

Say = Callable[[str], None]
_DECLARED = ("l0", "fvu", "ce_recovered")


def verify(
    thing: str | Path,
    store: str | Path,
    others: Sequence[str | Path] = (),
    *,
    n_rows: int = 4096,
    force: bool = False,
    **declared_and_options: Any,
) -> Verdict:
    """:func:`unweave.formats.verify` on the first rows of an activation store.

    Args:
        thing: a checkpoint; or a run folder, which declares what its evaluation measured unless told otherwise.
        store: of the checkpoint's site; with targets, for a transcoder. others: of sites it may be meant for instead.
        force: go on where its files name another model or site than the store does.
        declared_and_options: as for :func:`unweave.formats.verify`.

    Raises:
        UnweaveError: when nothing is declared, a store is of another width, model or site, or the checkpoint cannot be
            loaded.
    """
    thing, declared_and_options = _of_run(thing, declared_and_options, ("l0", "fvu"))  # no model: no loss
    if not force:
        options = {n: value for n, value in declared_and_options.items() if n not in _DECLARED}
        known = {name: value for name, value in formats.inspect(thing, **options).origin.items() if value}
        provenance = ActivationStore.open(store).provenance
        check_origin(known, {name: provenance.get(name) for name in known}, "verified on")
    rows, target = _stored(store, n_rows)
    found = {str(path): _stored(path, n_rows) for path in others}
    return formats.verify(thing, rows, target, others=found, **declared_and_options)


def verify_in_model(
    thing: str | Path,
    *,
    model: str | None = None,
    data: str | None = None,
    site: str | None = None,
    target_site: str | None = None,
    context_size: int | None = None,
    bos: bool | None = None,
    text_field: str | None = None,
    n_rows: int = 4096,
    say: Say = lambda line: None,
    **declared_and_options: Any,
) -> Verdict:
    """:func:`unweave.formats.verify` on activations of its model, with the share of the model's loss recovered.

    Unless the numbers are close the sites next to its own are tried as well, on the same text, from one pass of the
    model.

    Args:
        thing: as there.
        model, site, target_site, context_size, bos: what the checkpoint's files say of these, where nothing is given.
            Sites may be called as in TransformerLens (``blocks.3.hook_resid_post``), by a module's path, or as here.
            Where nobody knows them, contexts have 128 tokens and begin with BOS if the tokenizer has it.
        data: text, as for ``unweave train``. text_field: the field that holds it.
        n_rows: activation rows to measure on, and tokens to measure the loss on.
        say: gets a line on what is measured. declared_and_options: as for :func:`unweave.formats.verify`.

    Raises:
        UnweaveError: for a model or site that nobody knows, a site of another width, and as formats.verify.
    """
    thing, declared_and_options = _of_run(thing, declared_and_options)
    declared = {name: declared_and_options.pop(name, None) for name in _DECLARED}
    options = declared_and_options
    facts = formats.inspect(thing, **options)
    if all(said is None for said in (*declared.values(), facts.l0, facts.k)):
        raise UnweaveError(NOTHING_DECLARED)  # before the model is loaded
    wanted = {"model": model or facts.model, "data": data, "site": site or facts.site or facts.hook}
    target_site = target_site or facts.target_site
    if facts.d_in != facts.d_out:
        wanted["target_site"] = target_site
    if missing := [name for name, value in wanted.items() if value is None]:
        flags = ", ".join(f"{name}= (--{name.replace('_', '-')})" for name in missing)
        raise UnweaveError(f"{thing}: its files do not say all that it takes to run it in its model. Give {flags}")
    recipe = Recipe.read(
        None,
        {
            "model": {"name": wanted["model"]},
            "data": {"documents": data, "text_field": text_field or "text"},
            "source": {"site": wanted["site"], "target_site": target_site},
        },
        [],
    )
    opened, documents = open_model(recipe), open_documents(recipe)
    pair = find_place(opened, str(wanted["site"])), target_site and find_place(opened, target_site)
    size = context_size or facts.context_size or TEXT_DEFAULTS["context_size"]
    settings = {
        "context_size": min(size, opened.max_context or size),
        "batch_tokens": max(size, min(2048, n_rows // 4)),
        "bos": next((said for said in (bos, facts.prepends_bos) if said is not None), "auto"),
        "split": "all",
    }
    source = TextSource(opened, documents, pair[0], target_site=pair[1], **settings)
    _check_widths(thing, facts, source)
    here = _Kept(source, first_rows(source.batches(), n_rows))
    say(
        f"{opened.name} at {' to '.join(filter(None, pair))}: {len(here.rows):,} rows, contexts of "
        f"{settings['context_size']} tokens{', each with BOS' if source.plan.prefix else ''}; text: {data}"
    )
    if facts.model and same_model(facts.model, opened.provenance) is not True:
        say(f"note: its files name the model {facts.model}")
    kept: dict[str | None, _Kept] = {None: here}

    def others() -> dict[str, tuple[Tensor, Tensor | None]]:
        pairs = neighbours(opened, *pair, here.d_in, here.d_out)
        if pairs:
            say(f"trying {', '.join(pairs)} as well")
            group = TextSites(opened, documents, pairs, **settings)
            some = list(_until(group.batches(), n_rows))
            kept.update({name: _Kept(one, [b[name] for b in some]) for name, one in group.sources.items()})
        return {name: (one.rows, one.targets) for name, one in kept.items() if name is not None}

    def recovered(dictionary: Dictionary, name: str | None) -> float | None:
        from unweave.evaluation import evaluate

        one = kept[name]
        found = evaluate(
            dictionary,
            one,
            model=opened,
            fit=one.rows if one.targets is None else one.targets,
            n_rows=len(one.rows),
            n_loss_tokens=n_rows,
            baselines=False,
            n_bootstrap=0,
            force=True,  # what is asked here is whether it fits
        )
        return found["ce_loss_recovered"] if "ce_loss_recovered" in found.metrics else None

    return formats.verify(thing, here.rows, here.targets, others=others, recovered=recovered, **declared, **options)


def _of_run(
    thing: str | Path, declared: dict[str, Any], names: Sequence[str] = _DECLARED
) -> tuple[str | Path, dict[str, Any]]:
    """The dictionary in a run folder, and what the run declares of it: its evaluation, unless something else is."""
    folder = Path(thing)
    if not (folder / "dictionary" / "config.json").is_file():
        return thing, declared
    if all(declared.get(name) is None for name in _DECLARED) and (folder / "evaluation.json").is_file():
        measured = Evaluation.load(folder / "evaluation.json")
        called = {name: {"ce_recovered": "ce_loss_recovered"}.get(name, name) for name in names}
        declared = {**declared, **{ours: measured[name] for ours, name in called.items() if name in measured.metrics}}
    return folder / "dictionary", declared


class _Kept(Source):
    """Some batches of a source, in memory."""

    def __init__(self, source: TextSource, batches: Iterable[ActivationBatch]) -> None:
        self._source, self._batches = source, list(batches)
        self.rows = torch.cat([batch.input for batch in self._batches]).float()
        tied = source.target_site.name == source.site.name
        self.targets = None if tied else torch.cat([batch.target for batch in self._batches]).float()

    @property
    def d_in(self) -> int:
        return self._source.d_in

    @property
    def d_out(self) -> int:
        return self._source.d_out

    @property
    def provenance(self) -> dict[str, Any]:
        return self._source.provenance

    def batches(self, skip: int = 0) -> Iterator[ActivationBatch]:
        yield from self._batches[skip:]


def _until(batches: Iterator[dict[str, ActivationBatch]], n_rows: int) -> Iterator[dict[str, ActivationBatch]]:
    """As many as give every site its rows."""
    seen = 0
    for batch in batches:
        yield batch
        seen += min(one.n_rows for one in batch.values())
        if seen >= n_rows:
            return


def _check_widths(thing: str | Path, facts: Facts, source: TextSource) -> None:
    for what, width, found in (("reads", facts.d_in, source.d_in), ("writes", facts.d_out, source.d_out)):
        if width is not None and width != found:
            place = source.site.name if what == "reads" else source.target_site.name
            raise UnweaveError(
                f"{thing} {what} rows of width {width}, {place} of {source.model.name} has width {found}: it is for "
                "another site or model. Give site= (--site), target_site= (--target-site) or model= (--model)"
            )


def _stored(folder: str | Path, n_rows: int) -> tuple[Tensor, Tensor | None]:
    store = ActivationStore.open(folder)
    some = slice(0, min(n_rows, store.n_rows))
    return store.rows(some).float(), store.targets(some).float() if store.has_target else None
