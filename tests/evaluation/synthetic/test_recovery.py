"""Recovery of dictionaries whose every number can be worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unweave
from unweave.codes import SparseCode
from unweave.dictionaries import Dictionary, DictionaryConfig
from unweave.errors import UnweaveError
from unweave.evaluation import METRICS, Evaluation
from unweave.evaluation.synthetic import SyntheticSource, match, recover
from unweave.metrics import fvu

ORTHONORMAL = {"d": 16, "n_features": 16, "directions": "orthonormal", "l0": 3.0}


class Planted(Dictionary):
    """Atoms and an encoder given from outside."""

    name = "planted_for_test"
    Config = DictionaryConfig

    def __init__(self, atoms: Tensor, encoder: Tensor, offset: Tensor) -> None:
        m, d = atoms.shape
        super().__init__(DictionaryConfig(d_in=d, d_out=d, n_features=m))
        self.W, self.E = nn.Parameter(atoms), nn.Parameter(encoder)
        self.offset = offset

    def encode(self, x: Tensor) -> SparseCode:
        z = (self.check_input(x) - self.offset) @ self.E.T
        return SparseCode.from_dense(z.masked_fill(z.abs() < 1e-3, 0.0))

    def decode(self, code: SparseCode) -> Tensor:
        return code.dense() @ self.W + self.offset

    def decoder_directions(self) -> Tensor:
        return self.W.detach()


def planted(source: SyntheticSource, change=lambda atoms: atoms) -> Planted:
    atoms = change(source.directions)
    return Planted(atoms, atoms / atoms.square().sum(1, keepdim=True).clamp_min(1e-9), source.world.offset)


def values(found) -> dict[str, float]:
    return {name: e.value for name, e in found.metrics.items()}


PERFECT = dict.fromkeys(
    ("mmcs", "mcc", "mcc_codes", "recall", "uniqueness", "distinct_share", "firing_f1", "firing_precision"), 1.0
) | {"firing_recall": 1.0, "shrinkage": 1.0, "fvu": 0.0}


def assert_values(found, **changed: float) -> None:
    got = values(found)
    for name, expected in {**PERFECT, **changed}.items():
        assert got[name] == pytest.approx(expected, abs=1e-4), name


@pytest.mark.parametrize("signed", [False, True])
def test_the_planted_atoms_are_found_whole(signed):
    source = SyntheticSource(**ORTHONORMAL, signed=signed, offset=1.0)
    assert_values(recover(planted(source), source, n_rows=2000))


@pytest.mark.parametrize("scale", [0.25, 8.0])
def test_permuting_and_scaling_atoms_changes_nothing(scale):
    source = SyntheticSource(**ORTHONORMAL)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    found = recover(planted(source, lambda atoms: scale * atoms[order]), source, n_rows=2000)
    assert_values(found)
    assert found.match is not None
    assert torch.equal(order[found.match.found], found.match.true)


def test_turned_atoms_count_where_signs_do_not():
    source = SyntheticSource(**ORTHONORMAL)
    turned = planted(source, lambda atoms: -atoms)
    assert_values(recover(turned, source, n_rows=2000))
    strict = recover(turned, source, n_rows=2000, absolute=False)
    assert strict["mmcs"] == pytest.approx(0, abs=1e-6)
    assert strict["recall"] == 0


def test_missing_atoms():
    """12 of 16 orthonormal atoms: the pairs are perfect, four planted features have nothing."""
    source = SyntheticSource(**ORTHONORMAL)
    found = recover(planted(source, lambda atoms: atoms[:12]), source, n_rows=4000)
    fresh = source.held_out().sample(4000)
    variance = (fresh.rows - fresh.rows.mean(0)).square().sum()
    lost = fresh.code.dense()[:, 12:].square().sum() / variance
    # The four have cosine 0 with all atoms, up to rounding, which also decides which atom is nearest to them.
    assert_values(found, mmcs=12 / 16, recall=12 / 16, fvu=float(lost), uniqueness=found["uniqueness"])
    assert found["uniqueness"] < 1


def test_every_atom_twice():
    """Pairs use each planted feature once; half of the dictionary says nothing new."""
    source = SyntheticSource(**ORTHONORMAL)
    both = planted(source, lambda atoms: torch.cat([atoms, atoms]))
    with torch.no_grad():
        both.E[16:] = 0  # the copies never fire
    found = recover(both, source, n_rows=2000)
    assert found["distinct_share"] == 0.5
    assert found["mmcs"] == pytest.approx(1)
    assert found["mcc"] == pytest.approx(1)


def test_two_planted_features_in_one_atom():
    """Atoms 0 and 1 are both the bisector of planted 0 and 1: cosines 1 / sqrt 2, one nearest atom for two."""
    source = SyntheticSource(**ORTHONORMAL)

    def merge(atoms: Tensor) -> Tensor:
        merged = (atoms[:1] + atoms[1:2]) / 2**0.5
        return torch.cat([merged, merged, atoms[2:]])

    m = match(source.directions, merge(source.directions))
    cosine = (14 + 2**0.5) / 16
    assert (m.mmcs, m.mcc) == (pytest.approx(cosine), pytest.approx(cosine))
    assert m.recall(0.9) == 14 / 16
    assert m.recall(0.7) == 1.0
    # Which of the two equal atoms is nearest is a matter of rounding; for one atom alone it is not.
    alone = match(source.directions, merge(source.directions)[1:])
    assert alone.uniqueness == 14 / 16
    assert alone.distinct_share == 15 / 15
    assert alone.mcc == pytest.approx((14 + 0.5**0.5) / 15)


def test_shrunk_codes():
    source = SyntheticSource(**ORTHONORMAL)
    shrunk = planted(source)
    with torch.no_grad():
        shrunk.E.mul_(0.7)
    fresh = source.held_out().sample(2000)
    variance = (fresh.rows - fresh.rows.mean(0)).square().sum()
    fvu = 0.09 * fresh.rows.square().sum() / variance
    assert_values(recover(shrunk, source, n_rows=2000), shrinkage=0.7, fvu=float(fvu))


def test_a_feature_that_fires_too_often_and_one_that_never_does():
    """Feature 0 fires always: precision p, recall 1, F1 2p / (1 + p). Feature 1 never: 0, 0, 0."""
    source = SyntheticSource(**ORTHONORMAL)

    class Wrong(Planted):
        def encode(self, x: Tensor) -> SparseCode:
            z = super().encode(x).dense()
            z[:, 0] = z[:, 0] + 5
            z[:, 1] = 0
            return SparseCode.from_dense(z)

    wrong = Wrong(source.directions, source.directions, source.world.offset)
    found = recover(wrong, source, n_rows=4000)
    p = float((source.held_out().sample(4000).code.feature(0) != 0).double().mean())
    assert found["firing_precision"] == pytest.approx((14 + p) / 16)
    assert found["firing_recall"] == pytest.approx(15 / 16)
    assert found["firing_f1"] == pytest.approx((14 + 2 * p / (1 + p)) / 16)
    assert found["mcc_codes"] == pytest.approx(15 / 16, abs=1e-4)  # a constant added does not change a correlation
    assert found.f1 is not None
    assert found.f1[1] == 0


def test_anchors_stand_beside_every_result():
    source = SyntheticSource(d=32, n_features=64, l0=3.0)
    found = recover(planted(source, lambda a: F.normalize(a.roll(1, 1), dim=1)), source, n_rows=2000)
    oracle, atoms, random = (found.baselines[name] for name in ("oracle", "oracle atoms", "random"))
    for name, expected in PERFECT.items():
        assert oracle[name].value == pytest.approx(expected, abs=1e-5), name
    assert atoms["mcc"].value == pytest.approx(1)
    assert 0.95 < atoms["firing_f1"].value <= 1
    assert random["mmcs"].value < 0.6  # 64 random directions in 32 dimensions
    assert random["firing_f1"].value < 0.25
    assert random["recall"].value == 0


def test_it_is_an_evaluation_with_versions_and_a_file(tmp_path):
    source = SyntheticSource(**ORTHONORMAL)
    found = recover(planted(source), source, n_rows=500)
    assert all(METRICS[name].version == e.version and math.isnan(e.low) for name, e in found.metrics.items())
    assert "16 planted features, 16 found" in repr(found)
    assert "oracle atoms" in repr(found)
    found.save(tmp_path / "recovery.json")
    again = Evaluation.load(tmp_path / "recovery.json")
    assert again["mcc"] == found["mcc"]
    assert again.baselines["random"]["mmcs"].value == found.baselines["random"]["mmcs"].value


@pytest.mark.parametrize("arch", ["standardised_topk", "topk"])
def test_the_reconstruction_is_the_dictionarys_whatever_goes_by_the_code(arch):
    """Mean and deviation of a row come back from the row, not from its code."""
    source = SyntheticSource(**ORTHONORMAL, offset=2.0)
    torch.manual_seed(0)
    dictionary = unweave.build(arch, 16, 24, k=3).eval()
    rows = source.held_out().sample(500).rows
    expected = float(fvu(rows, dictionary(rows).detach()))
    assert recover(dictionary, source, n_rows=500)["fvu"] == pytest.approx(expected, rel=1e-4)


def test_what_cannot_be_compared_is_refused():
    source = SyntheticSource(**ORTHONORMAL)
    other = SyntheticSource(d=8, n_features=8, directions="orthonormal", l0=1.0)
    with pytest.raises(UnweaveError, match="width 8 to 8, the rows have 16"):
        recover(planted(other), source)
    with pytest.raises(UnweaveError, match=r"expected \(n, d\) and \(m, d\)"):
        match(torch.zeros(3, 4), torch.zeros(3, 5))
    with pytest.raises(UnweaveError, match="NaN or infinity"):
        match(torch.eye(3), torch.full((3, 3), torch.nan))


def test_a_dead_atom_of_zeros_is_nobodys():
    m = match(torch.eye(3), torch.cat([torch.eye(3), torch.zeros(1, 3)]))
    assert (m.mmcs, m.mcc, m.uniqueness, m.distinct_share) == (1.0, 1.0, 1.0, 0.75)


def test_training_finds_what_was_planted():
    """Seeds 0 to 4: mcc 0.93 to 0.98, F1 0.79 to 0.94; random atoms have at most 0.45 and 0.37."""
    source = SyntheticSource(d=32, n_features=40, l0=2.0)
    dictionary = unweave.fit(source, "jumprelu", n_features=64, k=2, n_rows=400 * 256, batch_size=256)
    found = recover(dictionary, source, n_rows=4096)
    random = found.baselines["random"]
    assert found["mcc"] > 0.88
    assert found["firing_f1"] > 0.72
    assert found["mcc"] > random["mcc"].value + 0.4
    assert found["firing_f1"] > random["firing_f1"].value + 0.3
