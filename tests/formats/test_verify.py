"""Traps: a checkpoint read wrongly is caught by its numbers, and what is wrong with it is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import unweave
from unweave import formats
from unweave.dictionaries import Dictionary
from unweave.errors import UnweaveError
from unweave.formats import Facts, Parts, fold, verify
from unweave.metrics import fvu

D = 16


def directions() -> Tensor:
    """Sixteen orthogonal unit vectors, as rows."""
    return torch.linalg.qr(torch.randn(D, D, generator=torch.Generator().manual_seed(3)))[0]


def offset() -> Tensor:
    return 6 * torch.randn(D, generator=torch.Generator().manual_seed(4))


@pytest.fixture(scope="module")
def rows() -> Tensor:
    """Sums of three of sixteen directions around a mean, with a little noise, of a norm of about 35."""
    g = torch.Generator().manual_seed(0)
    codes = torch.zeros(4000, D).scatter(1, torch.rand(4000, D, generator=g).topk(3, dim=1).indices, 1.0)
    sums = 12 * (codes * (1 + torch.rand(4000, D, generator=g))) @ directions()
    return sums + offset() + 0.3 * torch.randn(4000, D, generator=g)


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SAELens's files of a square JumpReLU dictionary: square, so that nothing but numbers tells a transpose."""
    mean = offset()
    parts = Parts("jumprelu", directions(), directions(), b_dec=mean, b_pre=mean, threshold=torch.full((D,), 6.0))
    folder = tmp_path_factory.mktemp("made") / "sae"
    return formats.write(fold(parts), "saelens", folder, Facts("unweave", "jumprelu"))


@pytest.fixture(scope="module")
def declared(right: Path, rows: Tensor) -> dict[str, float]:
    dictionary = formats.load(right)
    with torch.no_grad():
        l0 = float(dictionary.encode(rows).l0().float().mean())
        return {"l0": l0, "fvu": float(fvu(rows, dictionary(rows)))}


def changed(source: Path, place: Path, tensors: dict | None = None, **config: object) -> Path:
    weights = load_file(source / "sae_weights.safetensors")
    weights = {name: (tensors or {}).get(name, lambda t: t)(value).contiguous() for name, value in weights.items()}
    save_file(weights, place / "sae_weights.safetensors")
    (place / "cfg.json").write_text(json.dumps(json.loads((source / "cfg.json").read_text()) | config))
    return place


TRAPS = {
    "the encoder is transposed": {"tensors": {"W_enc": torch.t}},
    "the decoder is transposed": {"tensors": {"W_dec": torch.t}},
    "must subtract b_dec from its input": {"apply_b_dec_to_input": False},
}


def test_what_is_as_declared_matches(right: Path, rows: Tensor, declared: dict[str, float]) -> None:
    verdict = verify(right, rows, **declared)
    assert verdict.matches
    assert verdict.trap is None
    assert declared["fvu"] < 0.01
    assert declared["l0"] == pytest.approx(3, abs=0.01)


@pytest.mark.parametrize("trap", TRAPS)
def test_a_misdeclared_file_is_caught_and_named(
    trap: str, right: Path, rows: Tensor, declared: dict[str, float], tmp_path: Path
) -> None:
    verdict = verify(changed(right, tmp_path, **TRAPS[trap]), rows, **declared)
    assert not verdict.matches
    assert verdict.trap is not None
    assert trap in verdict.trap
    assert verdict.repaired is not None
    with torch.no_grad():
        assert float(fvu(rows, fold(verdict.repaired)(rows))) < declared["fvu"] + 0.01


def test_a_scale_that_was_not_folded(right: Path, rows: Tensor, declared: dict[str, float], tmp_path: Path) -> None:
    scale = D**0.5 / float(rows.norm(dim=1).mean())
    shrink = dict.fromkeys(("b_enc", "b_dec", "threshold"), lambda t: t * scale)
    verdict = verify(changed(right, tmp_path, shrink), rows, **declared)
    assert "scaled to an average norm of sqrt(d)" in str(verdict.trap)


def test_a_threshold_of_the_other_space(right: Path, rows: Tensor, declared: dict[str, float], tmp_path: Path) -> None:
    """Scaled weights, but a threshold left as it was for raw rows: SAELens issue 482."""
    scale = D**0.5 / float(rows.norm(dim=1).mean())
    place = changed(right, tmp_path, dict.fromkeys(("b_enc", "b_dec"), lambda t: t * scale))
    verdict = verify(place, rows, **declared, norm_scaling_factor=scale)
    assert "the threshold is that of raw rows" in str(verdict.trap)


def test_a_k_that_is_missing(rows: Tensor, tmp_path: Path) -> None:
    dictionary = unweave.fit(rows, arch="topk", n_features=32, k=4, epochs=20, batch_size=256, lr=3e-3)
    formats.write(dictionary, "saelens", tmp_path / "sae")
    (tmp_path / "other").mkdir()
    verdict = verify(changed(tmp_path / "sae", tmp_path / "other", k=20), rows, l0=4.0)
    assert verdict.trap == "k is 4, not 20"


def test_rows_of_the_site_next_to_it(right: Path, rows: Tensor, declared: dict[str, float]) -> None:
    before = rows[:, torch.randperm(D, generator=torch.Generator().manual_seed(1))] * 0.4
    others = {"layers.2": (before * 2, None), "layers.4": (rows, None), "narrow": (rows[:, :3], None)}
    verdict = verify(right, before, **declared, others=others)
    assert verdict.trap == "the rows are of another site: it is for those of layers.4"
    assert verdict.repaired is None


def test_features_that_never_fire_are_counted(right: Path, rows: Tensor, declared: dict[str, float]) -> None:
    assert verify(right, rows, **declared).dead == 0
    quiet = rows - 2 * ((rows - offset()) @ directions()[0])[:, None].relu() * directions()[0]  # never in direction 0
    assert verify(right, quiet, l0=2.8).dead == pytest.approx(1 / D)


def test_pursuits_are_measured_and_have_no_traps(rows: Tensor, tmp_path: Path) -> None:
    dictionary = unweave.fit(rows[:256], "mp", n_features=D, k=3, n_rows=256, subtract_bias=True)
    with torch.no_grad():
        dictionary.W_dec.copy_(directions())
        dictionary.b_dec.copy_(offset())
    formats.write(dictionary, "saelens", tmp_path / "sae")
    assert verify(tmp_path / "sae", rows, l0=3, fvu=0.01).matches
    verdict = verify(tmp_path / "sae", rows, l0=9)
    assert (verdict.matches, verdict.trap) == (False, None)


def test_what_no_trap_explains_is_said_to_be_wrong(right: Path, rows: Tensor, declared: dict[str, float]) -> None:
    other = rows[:, torch.randperm(D, generator=torch.Generator().manual_seed(1))] * 3  # another site altogether
    verdict = verify(right, other, **declared)
    assert not verdict.matches
    assert verdict.trap is None


def test_what_is_near_gives_way_to_what_is_close(right: Path, rows: Tensor, declared: dict[str, float]) -> None:
    """The site next to the right one is often within the tolerance: a little noise, as a later layer adds."""
    later = rows + 1.2 * torch.randn(rows.shape, generator=torch.Generator().manual_seed(5))
    alone = verify(right, later, **declared)
    assert (alone.matches, alone.trap) == (True, None)
    assert alone.fvu > declared["fvu"] + 0.02
    verdict = verify(right, later, **declared, others=lambda: {"layers.4": (rows, None)})
    assert not verdict.matches
    assert verdict.trap == "the rows are of another site: it is for those of layers.4"
    assert verdict.after is not None
    assert verdict.after.fvu == pytest.approx(declared["fvu"])
    worse = {"layers.6": (later + torch.randn(rows.shape), None)}
    assert verify(right, later, **declared, others=worse).matches


def test_one_row_that_makes_the_error_is_said(right: Path, rows: Tensor, declared: dict[str, float]) -> None:
    outlier = torch.cat([rows, 3000 * torch.ones(1, D) + offset()])
    weak = Parts("jumprelu", directions(), 0.2 * directions(), b_dec=offset(), b_pre=offset(), threshold=6.0)
    verdict = verify(formats.write(fold(weak), "saelens", right.parent / "weak"), outlier, **declared)
    assert not verdict.matches
    assert verdict.worst > 0.9
    assert any("one row of 4,001 alone makes" in note for note in verdict.notes)
    assert verify(right, rows, **declared).worst < 0.1


def test_worse_than_the_mean_row_never_matches(right: Path, rows: Tensor, tmp_path: Path) -> None:
    verdict = verify(changed(right, tmp_path, {"W_dec": torch.t}), rows, l0=3)
    assert verdict.fvu > 1
    assert not verdict.matches
    assert verdict.trap == "the decoder is transposed"


def test_a_norm_that_no_file_says_is_that_of_the_rows(
    right: Path, rows: Tensor, declared: dict[str, float], tmp_path: Path
) -> None:
    """Llama Scope's R1-Distill release: weights for rows of norm sqrt(d), and no norm."""
    w, scale = load_file(right / "sae_weights.safetensors"), D**0.5 / float(rows.norm(dim=1).mean())
    biases = {"encoder.bias": (w["b_enc"] - w["b_dec"] @ w["W_enc"]) * scale, "decoder.bias": w["b_dec"] * scale}
    matrices = {"encoder.weight": w["W_enc"].T.contiguous(), "decoder.weight": w["W_dec"].T.contiguous()}
    threshold = {"log_jumprelu_threshold": (w["threshold"] * scale).log()}
    save_file(matrices | biases | threshold, tmp_path / "sae_weights.safetensors")
    verdict = verify(tmp_path, rows, **declared)
    assert verdict.matches
    assert verdict.notes == (
        f"norm is not in its files: taken as {D**0.5 / scale:.6g}, the average norm of these rows",
    )


def test_a_loss_is_measured_of_what_is_put_right(
    right: Path, rows: Tensor, declared: dict[str, float], tmp_path: Path
) -> None:
    asked: list[str | None] = []

    def recovered(dictionary: Dictionary, site: str | None) -> float:
        asked.append(site)
        return 1 - float(fvu(rows, dictionary(rows)))

    verdict = verify(changed(right, tmp_path, {"W_dec": torch.t}), rows, ce_recovered=0.99, recovered=recovered)
    assert verdict.trap == "the decoder is transposed"
    assert verdict.after is not None
    assert verdict.after.ce_recovered is not None
    assert verdict.after.ce_recovered > 0.98 > 0.5 > (verdict.ce_recovered or 0)
    assert asked == [None, None]
    with pytest.raises(UnweaveError, match="can only be checked with the model"):
        verify(right, rows, ce_recovered=0.99)


def test_an_option_that_the_format_does_not_have(right: Path, rows: Tensor) -> None:
    with pytest.raises(UnweaveError, match="takes no option 'kk'"):
        verify(right, rows, l0=3, kk=5)


def test_nothing_to_compare_with(right: Path, rows: Tensor) -> None:
    with pytest.raises(UnweaveError, match="needs something to compare with"):
        verify(right, rows)
