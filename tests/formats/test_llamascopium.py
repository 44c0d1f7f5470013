"""llamascopium: what of it has no dictionary of unweave's is said, with the reason, before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from unweave import formats
from unweave.errors import UnweaveError

GOLDEN = Path(__file__).parent / "golden"


def changed(place: Path, case: str, **settings: object) -> Path:
    """A copy of a golden case with other settings."""
    shutil.copytree(GOLDEN / case, place / "copy", dirs_exist_ok=True)
    config = json.loads((place / "copy" / "config.json").read_text())
    (place / "copy" / "config.json").write_text(json.dumps(config | settings))
    return place / "copy"


@pytest.mark.parametrize(
    ("case", "settings", "says"),
    [
        ("llamascopium/random_relu", {"sae_type": "molt"}, "a mixture of linear maps"),
        ("llamascopium/random_relu", {"sae_type": "lorsa"}, "replaces attention and reads whole sequences"),
        ("llamascopium/random_relu", {"sae_type": "other"}, "'other' is not known"),
        ("llamascopium/random_relu", {"norm_activation": "batch-wise"}, "not in its files: give norm="),
        ("llamascopium/random_relu_two_sites", {"norm_activation": "token-wise"}, "by the norm of the target"),
        ("llamascopium/random_glu", {"act_fn": "jumprelu"}, "'glu_jumprelu', which unweave does not load"),
        ("llamascopium/random_glu", {"norm_activation": "token-wise"}, "needs the architecture 'standardised_glu'"),
        ("llamascopium-crosscoder/random_relu", {"act_fn": "topk"}, "the k largest of each part on its own"),
        ("llamascopium-crosscoder/random_relu", {"norm_activation": "token-wise"}, "by rows or batches"),
        ("llamascopium-crosscoder/random_relu", {"hook_points": ["one"]}, "to name 2 hooks"),
        ("llamascopium-clt/random_topk", {"act_fn": "layertopk"}, "a code depends on later layers"),
        ("llamascopium-clt/random_topk", {"sparsity_include_decoder_norm": False}, "ranks by pre-activations alone"),
        ("llamascopium-clt/random_relu", {"norm_activation": "batch-wise"}, "by rows or batches"),
    ],
)
def test_what_cannot_be_loaded_is_named(tmp_path: Path, case: str, settings: dict, says: str) -> None:
    with pytest.raises(UnweaveError, match=says):
        formats.load(changed(tmp_path, case, **settings))


def test_rows_scaled_by_the_norm_of_their_batch_need_that_norm(tmp_path: Path) -> None:
    """With the average norm that was measured, it is the same dictionary as one scaled by the data set's."""
    place = changed(tmp_path, "llamascopium/random_jumprelu", norm_activation="batch-wise")
    norms = load_file(place / "sae_weights.safetensors")
    (norm,) = (float(value) for name, value in norms.items() if "average" in name)
    x = load_file(place / "expected.safetensors")["x"]
    given, expected = formats.load(place, norm=norm), formats.load(GOLDEN / "llamascopium" / "random_jumprelu")
    with torch.no_grad():
        torch.testing.assert_close(given(x), expected(x))
        assert not torch.allclose(formats.load(place, norm=2 * norm)(x), expected(x))


def test_parts_keep_their_scales_apart() -> None:
    """A crosscoder's norms are those of the library, which sees every part scaled; raw atoms are of two sizes."""
    place = GOLDEN / "llamascopium-crosscoder" / "trained_relu"
    stored = load_file(place / "sae_weights.safetensors")["W_D"]
    dictionary = formats.load(place)
    torch.testing.assert_close(dictionary.part_norms(), stored.norm(dim=2).T)
    assert not torch.allclose(dictionary.part_atoms().norm(dim=2), stored.norm(dim=2).T)


def test_a_feature_without_an_atom_somewhere_is_not_written(tmp_path: Path) -> None:
    dictionary = formats.load(GOLDEN / "llamascopium-crosscoder" / "random_relu")
    with torch.no_grad():
        dictionary.get_parameter("W_dec")[3, :4] = 0
    with pytest.raises(UnweaveError, match="divide by the norms of atoms"):
        formats.write(dictionary, "llamascopium-crosscoder", tmp_path / "out")
