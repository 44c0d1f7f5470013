"""Composite sites: the rows of their parts side by side, from one pass."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unweave.activations import harvest
from unweave.errors import UnweaveError
from unweave.sources import CompositeSite, ModuleSource, TextSites, TextSource, find_sites

OPTIONS = {"context_size": 24, "batch_tokens": 200}


@pytest.mark.parametrize(
    ("written", "names"),
    [
        ("layers.1", "layers.1"),
        ("layers.2+layers.0.mlp", "layers.2+layers.0.mlp"),
        ("layers.1..3", "layers.1+layers.2+layers.3"),
        ("layers.2..2", "layers.2"),
        ("layers.*.mlp", "layers.0.mlp+layers.1.mlp+layers.2.mlp+layers.3.mlp"),
        ("layers.1..2:input+layers.3.attn", "layers.1:input+layers.2:input+layers.3.attn"),
        ("layers.*.mlp.up_proj+layers.0", "+".join(f"layers.{n}.mlp.up_proj" for n in range(4)) + "+layers.0"),
        ("model.layers.*.mlp.act_fn:input", "+".join(f"model.layers.{n}.mlp.act_fn:input" for n in range(4))),
    ],
)
def test_names_and_patterns(model, written, names):
    site = model.composite(written)
    assert site.name == names
    assert isinstance(site, CompositeSite) == ("+" in names)
    assert model.composite(site.name).name == names  # spelled out it means the same
    assert all(part.describe() in site.describe() for part in site.parts)


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("layers.*.nothing", r"site 'layers.\*.nothing' matches nothing in this LlamaForCausalLM"),
        ("model.*.nothing", "matches nothing"),
        ("layers.2..9", "expected blocks from 0 to 3"),
        ("layers.3..1", "the lower number first"),
        ("layers.1+layers.77", "no site 'layers.77'"),
        ("layers.1+", "between, before and behind each"),
        ("layers.1+layers.0..2", "has the part 'layers.1' twice"),
    ],
)
def test_what_is_no_composite_site_is_told_at_once(model, texts, written, message):
    with pytest.raises(UnweaveError, match=message):
        TextSource(model, texts, written)


def test_rows_are_those_of_the_parts_in_order_from_one_pass(model, texts):
    runs = []
    handle = model.model.model.embed_tokens.register_forward_hook(lambda *_: runs.append(1))
    try:
        joined = TextSource(model, texts, "layers.2+layers.0.mlp.up_proj", max_norm_ratio=None, **OPTIONS)
        assert (joined.d_in, joined.d_out) == (96, 96)
        n_before = len(runs)
        batches = list(joined.batches())
        assert len(runs) - n_before == len(batches)
    finally:
        handle.remove()
    alone = [
        TextSource(model, texts, site, max_norm_ratio=None, **OPTIONS) for site in ("layers.2", "layers.0.mlp.up_proj")
    ]
    for batch, *parts in zip(batches, *(source.batches() for source in alone), strict=True):
        assert torch.equal(batch.input, torch.cat([part.input for part in parts], 1))
        assert batch.target is batch.input


def test_a_norm_too_high_at_one_part_drops_the_row(model, texts):
    options = {**OPTIONS, "max_norm_ratio": 1.2}
    sites = ("layers.2", "layers.0.mlp", "layers.3")
    alone = [TextSource(model, texts, site, **options) for site in sites]
    joined = TextSource(model, texts, "layers.2+layers.0.mlp", target_site="layers.2..3", **options)
    assert joined.reference_norms() == {k: v for one in alone for k, v in one.reference_norms().items()}
    for batch, *parts in zip(joined.batches(), *(one.batches() for one in alone), strict=True):
        common = set.intersection(*(set(part.row_token.tolist()) for part in parts))
        assert batch.row_token.tolist() == sorted(common)
    assert all(one.dropped["high_norm"] < joined.dropped["high_norm"] for one in alone)


def test_provenance_says_the_parts_and_single_sites_have_none(model, texts):
    source = TextSource(model, texts, "layers.1+layers.0.mlp.up_proj", target_site="layers.2..3", **OPTIONS)
    told = source.provenance
    assert told["parts"] == [{"site": "layers.1", "width": 32}, {"site": "layers.0.mlp.up_proj", "width": 64}]
    assert told["target_parts"] == [{"site": "layers.2", "width": 32}, {"site": "layers.3", "width": 32}]
    assert (told["site"], told["target_site"]) == ("layers.1+layers.0.mlp.up_proj", "layers.2+layers.3")
    assert not {"parts", "target_parts", "side"} & TextSource(model, texts, "layers.1", **OPTIONS).provenance.keys()
    same = TextSource(model, texts, "layers.1..2", **OPTIONS).provenance
    assert same == TextSource(model, texts, "layers.1+layers.2", **OPTIONS).provenance


def test_stores_of_composite_sites_from_one_pass(model, texts, tmp_path):
    sites = ["layers.0+layers.2", "layers.1"]
    stores = harvest(TextSites(model, texts, sites, **OPTIONS), {s: tmp_path / s for s in sites}, n_rows=300)
    alone = harvest(TextSource(model, texts, sites[0], **OPTIONS), tmp_path / "alone", n_rows=300)
    assert alone.manifest == stores[sites[0]].manifest
    assert alone.d_in == 64
    assert dict(alone.describe())["parts"] == "site layers.0, width 32; site layers.2, width 32"


def test_any_module_has_composite_sites():
    net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(10, 4)
    source = ModuleSource(net, [x], "0+2")
    assert source.d_in == 9
    batch = next(source.batches())
    with torch.no_grad():
        torch.testing.assert_close(batch.input, torch.cat([net[0](x), net(x)], 1))
    assert [part["width"] for part in source.provenance["parts"]] == [6, 3]
    assert find_sites(net, "*:input").name == "0:input+1:input+2:input"
