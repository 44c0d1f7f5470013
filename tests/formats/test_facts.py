"""What files call sites, and what they state of themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import unweave
from unweave import formats
from unweave.formats import Facts, sites_called


@pytest.mark.parametrize(
    ("called", "first"),
    [
        ("blocks.3.hook_resid_post", "layers.3"),
        ("blocks.3.hook_resid_pre", "layers.3:input"),
        ("blocks.3.hook_mlp_out", "layers.3.mlp"),
        ("blocks.3.mlp.hook_in", "layers.3.mlp:input"),
        ("blocks.3.hook_attn_out", "layers.3.attn"),
        ("blocks.3.attn.hook_z", "layers.3.attn.heads"),
        ("transformer.h.3", "layers.3"),
        ("gpt_neox.layers.3.attention", "layers.3.attn"),
        ("model.layers.3.self_attn.output", "layers.3.attn"),
        ("model.layers.3.mlp.input", "layers.3.mlp:input"),
        ("model.layers.3.pre_feedforward_layernorm.output", "layers.3.pre_feedforward_layernorm"),
        ("layers.3.mlp.act_fn", "layers.3.mlp.act_fn"),
        ("layers.3:input", "layers.3:input"),
        ("model.embed_tokens", "model.embed_tokens"),
    ],
)
def test_a_site_by_another_library_s_name(called: str, first: str) -> None:
    assert sites_called(called)[0] == first


def test_what_its_context_states_by_whatever_name() -> None:
    one = Facts("x", "relu", context={"average L0": 71, "context size": 64})
    other = Facts("x", "relu", context={"L0": None, "context_size": 128, "prepend_bos": False})
    assert (one.l0, one.context_size, one.prepends_bos) == (71.0, 64, None)
    assert (other.l0, other.context_size, other.prepends_bos) == (None, 128, False)
    assert Facts("x", "relu", context={"L0": "small", "context_size": True, "prepend_bos": "yes"}).l0 is None


def test_the_dictionary_of_a_run_knows_where_it_is_from(tmp_path: Path) -> None:
    unweave.build("topk", 8, 16, k=2).save(tmp_path / "dictionary")
    assert unweave.load(tmp_path / "dictionary").trained_on == {"model": None, "site": None, "target_site": None}
    source = {"model": {"name": "owner/small"}, "site": "layers.3.mlp:input", "target_site": "layers.3.mlp"}
    of = json.loads((tmp_path / "dictionary" / "config.json").read_text())
    del of["format"]
    (tmp_path / "training.json").write_text(json.dumps({"data": source, "dictionary": of}))
    facts = formats.inspect(tmp_path / "dictionary")
    assert (facts.model, facts.site, facts.target_site) == ("owner/small", "layers.3.mlp:input", "layers.3.mlp")
    assert unweave.load(tmp_path / "dictionary").trained_on == facts.origin
