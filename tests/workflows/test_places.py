"""Sites that a checkpoint may be meant for instead of the one it names."""

from __future__ import annotations

from pathlib import Path

import pytest

from unweave.errors import UnweaveError
from unweave.sources import LanguageModel
from unweave.workflows._places import find_place, neighbours


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> LanguageModel:
    return LanguageModel.load(str(tiny_model), dtype="float32", device="cpu")


def test_places_by_any_name(model: LanguageModel) -> None:
    for called, place in {
        "blocks.2.hook_resid_post": "layers.2",
        "model.layers.2.mlp": "layers.2.mlp",
        "model.layers.2.post_attention_layernorm.output": "layers.2.post_attention_layernorm",
        "layers.1..2": "layers.1+layers.2",
        "layers.2.mlp:input": "layers.2.mlp:input",
        "model.embed_tokens": "model.embed_tokens",
    }.items():
        assert find_place(model, called) == place
    with pytest.raises(UnweaveError, match=r"no site 'blocks.2.hook_resid_mid'"):
        find_place(model, "blocks.2.hook_resid_mid")


def test_neighbours_are_other_tensors_of_fitting_width(model: LanguageModel) -> None:
    parts = {"layers.1.mlp", "layers.1.mlp:input", "layers.1.attn", "layers.1.attn.heads"}
    assert set(neighbours(model, "layers.1", None, 32, 32)) == {"layers.0", "layers.2", *parts}
    assert set(neighbours(model, "layers.2:input", None, 32, 32)) >= {"layers.0", "layers.2"}
    assert "layers.1" not in neighbours(model, "layers.2:input", None, 32, 32)  # the same tensor
    assert "layers.0:input" in neighbours(model, "layers.0", None, 32, 32)
    assert neighbours(model, "layers.1.mlp.up_proj", None, 64, 64).keys() == {
        "layers.0.mlp.up_proj",
        "layers.2.mlp.up_proj",
    }
    assert neighbours(model, "model.embed_tokens", None, 32, 32) == {}
    assert neighbours(model, "layers.1+layers.2", None, 64, 64) == {}


def test_a_transcoder_moves_with_its_target(model: LanguageModel) -> None:
    found = neighbours(model, "layers.1.mlp:input", "layers.1.mlp", 32, 32)
    assert found["layers.2.mlp:input to layers.2.mlp"] == ("layers.2.mlp:input", "layers.2.mlp")
    assert ("layers.1.attn", "layers.1.mlp") in found.values()
    crossed = neighbours(model, "layers.1.mlp:input", "layers.2.mlp", 32, 32)
    assert ("layers.2.mlp:input", "layers.2.mlp") in crossed.values()
    assert ("layers.1.mlp:input", "layers.1.mlp") in crossed.values()
