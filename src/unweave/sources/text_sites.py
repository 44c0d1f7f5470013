"""Activations of a language model at several sites, from one forward pass over each batch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from unweave.batch import ActivationBatch
from unweave.errors import UnweaveError
from unweave.sources._base import SourceGroup
from unweave.sources._running import run_items, run_with_gradients
from unweave.sources.documents import Documents
from unweave.sources.language_model import LanguageModel
from unweave.sources.sites import Site
from unweave.sources.text import TextSource


class TextSites(SourceGroup):
    """A :class:`TextSource` for each of several sites, fed by one forward pass that ends at the deepest of them.

    Each site keeps its own rows: where one site's norm is abnormally high, only that site leaves the row out (with
    ``max_norm_ratio=None`` all sites have the same rows). So what comes out for a site is what its TextSource alone
    would give, and a store harvested from it can be continued either way.

    Args:
        model: the language model. documents: what it reads.
        sites: names of sites, all different; or, by names of one's own, each site with its target site (or None).
        options: as for :class:`TextSource`, but no ``target_site``.

    Raises:
        UnweaveError: as :class:`TextSource`; for no sites, or one named twice.
    """

    def __init__(
        self,
        model: LanguageModel,
        documents: Documents | Sequence[str],
        sites: Sequence[str] | Mapping[str, tuple[str, str | None]],
        **options: Any,
    ) -> None:
        if not sites or len(set(sites)) < len(sites):
            raise UnweaveError(f"expected one site or more, all different, found {', '.join(sites) or 'none'}")
        if options.pop("target_site", None) is not None:
            raise UnweaveError("several sites have no target_site in common: give {name: (site, target_site)}")
        if not isinstance(documents, Documents):
            documents = Documents.from_texts(documents)  # once, so that all read the same
        self.model = model
        named = sites if isinstance(sites, Mapping) else {site: (site, None) for site in sites}
        self._sources = {
            name: TextSource(model, documents, site, target_site=target, **options)
            for name, (site, target) in named.items()
        }

    @property
    def sources(self) -> Mapping[str, TextSource]:
        """The sources by name. Runs the model on the first batch once, for the reference norms of all."""
        sources = list(self._sources.values())
        missing = [source for source in sources if source.needs_references]
        if missing:
            items = sources[0].first_items()
            rows = run_items(self.model, _all([source.measured for source in missing]), items)
            for source in missing:
                source.reference_norms(items, rows)
        return self._sources

    def __repr__(self) -> str:
        first = next(iter(self._sources.values()))
        return f"TextSites({self.model.name} at {', '.join(self._sources)}, {first.documents.describe()})"

    def batches(self, skip: int = 0, names: Collection[str] | None = None) -> Iterator[dict[str, ActivationBatch]]:
        """Batches by name from number ``skip`` on; the model runs to the deepest of ``names``, no further."""
        wanted = {name: source for name, source in self.sources.items() if names is None or name in names}
        for source in wanted.values():
            source.forget_dropped()
        sites = _all([source.sites for source in wanted.values()])
        written = _all([source.gradient_sites for source in wanted.values()])
        for items in next(iter(wanted.values())).planned(skip) if wanted else ():
            rows, gradients = run_with_gradients(self.model, sites, written, items)
            yield {name: source.batch(items, rows, gradients) for name, source in wanted.items()}


def _all(groups: list[list[Site]]) -> list[Site]:
    """The sites of all groups, each once."""
    return list({site.name: site for group in groups for site in group}.values())
