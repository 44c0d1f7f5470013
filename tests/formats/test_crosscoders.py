"""dictionary_learning's crosscoders of two parts: files made to their layout, against the equations of its fork."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from unweave import formats
from unweave.dictionaries import Dictionary
from unweave.errors import UnweaveError

D, M, K = 4, 12, 3
NORMS = {1: "CROSSCODER", 2: "SAE", 3: "MIXED", 4: "NONE", 5: "DECOUPLED"}


def weights() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    sizes = {"encoder.weight": (2, D, M), "encoder.bias": (M,), "decoder.weight": (2, M, D), "decoder.bias": (2, D)}
    return {name: torch.randn(*size, generator=g) for name, size in sizes.items()}


def save(place: Path, norm: int = 1, config: dict | None = None, **more: Tensor) -> dict[str, Tensor]:
    w = weights()
    save_file({**w, "code_normalization_id": torch.tensor(norm), **more}, place / "model.safetensors")
    (place / "config.json").write_text(
        json.dumps({"activation_dim": D, "dict_size": M, "num_layers": 2} | (config or {}))
    )
    return w


def rows() -> Tensor:
    return torch.randn(40, 2, D, generator=torch.Generator().manual_seed(1))


def u_of(w: dict[str, Tensor], x: Tensor) -> Tensor:
    return (torch.einsum("bld,ldf->bf", x, w["encoder.weight"]) + w["encoder.bias"]).relu()


def decode(w: dict[str, Tensor], z: Tensor) -> Tensor:
    """Of codes ``(n, F)``, or of each part ``(n, 2, F)``."""
    z = z if z.ndim == 3 else z[:, None].expand(-1, 2, -1)
    return torch.einsum("blf,lfd->bld", z, w["decoder.weight"]) + w["decoder.bias"]


def same(place: Path, code: Tensor, output: Tensor) -> Dictionary:
    dictionary, x = formats.load(place), rows().flatten(1)
    with torch.no_grad():
        assert 0 < int((code != 0).sum()) < code.numel()
        torch.testing.assert_close(dictionary.encode(x).dense(), code.flatten(1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dictionary(x), output.flatten(1), rtol=1e-4, atol=1e-5)
    facts = formats.inspect(place)
    assert (facts.format, facts.d_in, facts.architecture) == ("crosscoder", 2 * D, dictionary.name)
    assert (facts.n_features, facts.missing) == (dictionary.n_features, None)
    return dictionary


@pytest.mark.parametrize("norm", NORMS)
def test_without_a_threshold_norms_are_of_no_account(tmp_path: Path, norm: int) -> None:
    w = save(tmp_path, norm)
    z = u_of(w, rows())
    assert same(tmp_path, z, decode(w, z)).name == "crosscoder"


@pytest.mark.parametrize("norm", [1, 2, 3, 4])
def test_batch_topk_by_any_norm(tmp_path: Path, norm: int) -> None:
    t = torch.tensor(2.0)
    w = save(
        tmp_path, norm, {"code_normalization_alpha_cc": 0.3} if norm == 3 else None, k=torch.tensor(K), threshold=t
    )
    by_part, whole = w["decoder.weight"].norm(dim=2), w["decoder.weight"].norm(dim=(0, 2))
    norms = {1: by_part.sum(0), 2: whole, 3: whole + 0.3 * by_part.sum(0), 4: torch.ones(M)}[norm]
    z = u_of(w, rows())
    z = z * (z * norms > t)
    assert same(tmp_path, z, decode(w, z)).name == ("batch_topk_crosscoder" if norm == 1 else "jumprelu")


def test_a_code_for_each_part(tmp_path: Path) -> None:
    t = torch.tensor([2.0, 1.0])
    w = save(tmp_path, 5, k=torch.tensor(K), threshold=t)
    z = u_of(w, rows())[:, None]
    z = z * (z * w["decoder.weight"].norm(dim=2) > t[:, None])
    assert bool((z[:, 0] != z[:, 1]).any())
    assert same(tmp_path, z, decode(w, z)).n_features == 2 * M
    assert "l * (features / parts) + f" in formats.inspect(tmp_path).notes[1]


@pytest.mark.parametrize("ranked", [False, True])
def test_activations_that_are_centred_and_scaled(tmp_path: Path, ranked: bool) -> None:
    mean, scale = torch.randn(2, D, generator=torch.Generator().manual_seed(3)), torch.tensor([0.2, 3.0])
    more = {"k": torch.tensor(K), "threshold": torch.tensor(4.0)} if ranked else {}
    w = save(tmp_path, activation_mean=mean, activation_std=mean.abs(), activation_global_scale=scale, **more)
    z = u_of(w, (rows() - mean) * scale[:, None])
    if ranked:
        z = z * (z * w["decoder.weight"].norm(dim=2).sum(0) > 4.0)
    dictionary = same(tmp_path, z, decode(w, z) / scale[:, None] + mean)
    torch.testing.assert_close(dictionary.part_norms(), w["decoder.weight"].norm(dim=2).T)


def test_a_mean_that_was_never_set_is_none(tmp_path: Path) -> None:
    nothing = torch.full((2, D), float("nan"))
    w = save(tmp_path, activation_mean=nothing, activation_std=nothing + 1, activation_global_scale=torch.ones(2))
    z = u_of(w, rows())
    same(tmp_path, z, decode(w, z))


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    k, threshold = torch.tensor(K), torch.tensor(1.5)
    save(tmp_path, k=k, threshold=-threshold)
    with pytest.raises(UnweaveError, match="threshold was never set"):
        formats.load(tmp_path)
    save(tmp_path, 9)
    with pytest.raises(UnweaveError, match="normalization 9 is not known"):
        formats.load(tmp_path)
    mean = {"activation_mean": torch.zeros(2, D), "activation_global_scale": torch.ones(2)}
    save(tmp_path, 5, k=k, threshold=torch.ones(2), **mean)
    with pytest.raises(UnweaveError, match="subtracts activation_mean twice"):
        formats.load(tmp_path)
    save(tmp_path, **{**mean, "activation_global_scale": torch.zeros(2)})
    with pytest.raises(UnweaveError, match="expected scales above 0, found 0"):
        formats.load(tmp_path)
