"""TextSites: one forward pass for all, and for each site exactly what its TextSource alone gives."""

from __future__ import annotations

import pytest
import torch

from unweave.activations import harvest
from unweave.errors import NoText, UnweaveError
from unweave.sources import Documents, TextSites, TextSource

SITES = ["layers.2", "layers.0.mlp", "layers.1:input"]
OPTIONS = {"context_size": 24, "batch_tokens": 200, "max_norm_ratio": 1.2}  # so low that sites differ in their rows


@pytest.fixture(scope="module")
def texts(documents) -> Documents:
    return Documents.from_texts(documents[:70], seed=1)


def blocks_run(model) -> tuple[list[int], list]:
    """Appends the number of every block that runs."""
    ran: list[int] = []
    handles = [
        block.register_forward_pre_hook(lambda m, args, i=i: ran.append(i))
        for i, block in enumerate(model.model.model.layers)
    ]
    return ran, handles


@pytest.mark.parametrize("skip", [0, 1, 4])
def test_each_site_is_its_source_alone(model, texts, skip):
    group = TextSites(model, texts, SITES, **OPTIONS)
    alone = {site: TextSource(model, texts, site, **OPTIONS) for site in SITES}
    assert list(group.sources) == SITES
    kept = set()
    n = 0
    for batches, *expected in zip(group.batches(skip), *(alone[site].batches(skip) for site in SITES), strict=True):
        for site, wanted in zip(SITES, expected, strict=True):
            found = batches[site]
            assert torch.equal(found.input, wanted.input)
            assert found.target is found.input
            assert torch.equal(found.row_token, wanted.row_token)
            assert torch.equal(found.items.tokens, wanted.items.tokens)
        kept.add(tuple(batch.n_rows for batch in batches.values()))
        n += 1
    assert n > 3
    assert any(len(set(rows)) > 1 for rows in kept), "the sites were meant to leave different rows out"
    for site, source in group.sources.items():
        assert source.provenance == alone[site].provenance
        assert source.dropped == alone[site].dropped
        assert (source.d_in, source.d_out) == (32, 32)


def test_one_pass_to_the_deepest_site_wanted(model, texts):
    group = TextSites(model, texts, SITES, **OPTIONS)
    ran, handles = blocks_run(model)
    try:
        assert [source.reference_norms() for source in group.sources.values()]
        assert ran == [0, 1, 2]  # the reference norms of all sites, from one pass
        ran.clear()
        n = sum(1 for _ in group.batches())
        assert ran == [0, 1, 2] * n
        ran.clear()
        for batches in group.batches(names=["layers.0.mlp"]):
            assert list(batches) == ["layers.0.mlp"]
        assert ran == [0] * n
    finally:
        for handle in handles:
            handle.remove()


def test_stores_of_several_sites_are_those_of_each_alone(model, texts, tmp_path):
    folders = {site: tmp_path / f"together-{i}" for i, site in enumerate(SITES)}
    stores = harvest(TextSites(model, texts, SITES, **OPTIONS), folders, n_rows=600, shard_rows=150)
    for site in SITES:
        one = harvest(TextSource(model, texts, site, **OPTIONS), tmp_path / "alone" / site, n_rows=600, shard_rows=150)
        assert one.manifest == stores[site].manifest  # hashes of every shard included
        assert one.n_rows >= 600


def test_sites_with_targets_of_their_own(model, texts):
    pairs = {"a": ("layers.1.mlp:input", "layers.1.mlp"), "b": ("layers.2", None)}
    group = TextSites(model, texts, pairs, **OPTIONS)
    together = next(group.batches())
    for name, (site, target) in pairs.items():
        alone = next(TextSource(model, texts, site, target_site=target, **OPTIONS).batches())
        assert torch.equal(together[name].input, alone.input)
        assert torch.equal(together[name].target, alone.target)


def test_texts_are_documents_once(model, documents):
    group = TextSites(model, documents[:30], SITES[:2])
    first, second = group.sources.values()
    assert first.documents is second.documents
    assert "layers.2, layers.0.mlp" in repr(group)


def test_what_makes_no_group_is_refused(model, texts):
    for sites in ([], ["layers.1", "layers.2", "layers.1"]):
        with pytest.raises(UnweaveError, match="one site or more, all different"):
            TextSites(model, texts, sites)
    with pytest.raises(UnweaveError, match=r"no site 'layers.77'"):
        TextSites(model, texts, ["layers.1", "layers.77"])
    with pytest.raises(UnweaveError, match="no target_site"):
        TextSites(model, texts, ["layers.1", "layers.2"], target_site="layers.3")
    with pytest.raises(NoText):
        list(TextSites(model, ["a b"], ["layers.1", "layers.2"], min_tokens=20).batches())
