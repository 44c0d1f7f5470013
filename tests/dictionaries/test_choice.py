"""Mutual Choice and Feature Choice: exact budgets, the Zipf line, and features that cannot die."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import unweave
from unweave.dictionaries import Dictionary, TrainingBatch, build
from unweave.dictionaries._auxk import auxk_loss
from unweave.dictionaries._zipf import Zipf, allot, fit_zipf, ranks_of, under_used
from unweave.errors import UnweaveError
from unweave.kernels.select.reference import select_columns
from unweave.metrics import fvu


def rows(n: int = 64, d: int = 12, seed: int = 1) -> Tensor:
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / x.square().sum(1).mean().sqrt()


def make(arch: str, d: int = 12, m: int = 40, **options) -> Dictionary:
    torch.manual_seed(0)
    return build(arch, d, m, **{"k": 3, **options}).double().train()


def planted(n: int, seed: int, m: int = 200, d: int = 32) -> Tensor:
    """Sums of 5 of 200 directions on average, with frequencies by Zipf's law; the directions are always the same."""
    atoms = F.normalize(torch.randn(m, d, generator=torch.Generator().manual_seed(9)), dim=1)
    share = 1 / (torch.arange(m) + 3.0)
    g = torch.Generator().manual_seed(seed)
    return ((torch.rand(n, m, generator=g) < 5 * share / share.sum()) * (torch.rand(n, m, generator=g) + 0.5)) @ atoms


# ---- Mutual Choice --------------------------------------------------------------------------------------------------


def test_mutual_choice_takes_the_largest_of_the_batch_as_batch_topk_does():
    x = rows()
    mutual, batch = make("mutual_choice"), make("batch_topk")
    code = mutual.encode(x)
    assert code.nnz == 3 * 64
    affinities = mutual.pre_activations(x).relu()
    smallest = affinities.reshape(-1).topk(3 * 64).values[-1]
    assert torch.equal(code.dense(), affinities * (affinities >= smallest))
    assert torch.equal(code.dense(), batch.encode(x).dense())


def test_without_a_zipf_line_mutual_choice_is_batch_topk_trained():
    x = planted(2000, 0)
    found = [
        unweave.fit(x, arch=arch, n_features=64, k=4, batch_size=100, n_rows=6000, **options)
        for arch, options in (("batch_topk", {}), ("mutual_choice", {"zipf_share": 0.0}))
    ]
    ours = found[1].state_dict()
    assert all(torch.equal(value, ours[name]) for name, value in found[0].state_dict().items())


@pytest.mark.parametrize("arch", ["mutual_choice", "feature_choice"])
def test_aux_zipf_loss_on_the_dead_is_auxk(arch: str):
    """And on more than the dead it is AuxK on all of these, for the loss and in closed form."""
    dictionary, x = make(arch), rows()
    dead = torch.arange(40) % 5 == 0
    plain = build("batch_topk", 12, 40, k=3).double().train()
    plain.load_state_dict({name: t for name, t in dictionary.state_dict().items() if name in plain.state_dict()})
    ours, theirs = (d.loss(TrainingBatch(x, x, dead)) for d in (dictionary, plain))
    torch.testing.assert_close(ours.total, theirs.total)
    dictionary.underused[1::5] = True
    more = dictionary.loss(TrainingBatch(x, x, dead)).terms["auxk"]
    residual = x - dictionary(x)
    torch.testing.assert_close(more, auxk_loss(dictionary, x, residual, dead | dictionary.underused, 6).detach())
    assert float(more) != pytest.approx(float(theirs.terms["auxk"]))
    assert float(dictionary.loss(TrainingBatch(x, x)).terms["auxk"]) > 0


def test_the_under_used_are_found_below_the_line():
    ranks = torch.arange(1, 201).double()
    density = 0.3 * (ranks + 2) ** -0.9
    line = fit_zipf(density)
    assert line is not None
    torch.testing.assert_close(line.at(ranks), density, rtol=1e-6, atol=0)
    assert (line.shift, round(line.exponent, 6), round(line.scale, 6)) == (2.0, 0.9, 0.3)
    density[150:] *= torch.linspace(1, 0, 50)  # the far tail droops
    low = under_used(density, 0.5)
    assert not low[:170].any()
    assert low[180:].all()
    order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    assert torch.equal(under_used(density[order], 0.5), low[order])
    assert not under_used(torch.zeros(5), 0.5).any()


# ---- Feature Choice -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "most"), [(512, 64), (100, 64), (99, 64), (6400, 64), (37, 1), (0, 5), (101, 5)])
def test_budgets_add_up_and_stay_in_their_bounds(total: int, most: int):
    shares = Zipf(1.0, 2.0, 1.1).at(torch.arange(1, 101).double())
    budgets = allot(shares, total, most)
    assert int(budgets.sum()) == total
    assert int(budgets.max()) <= most
    assert int(budgets.min()) >= (1 if total >= 100 else 0)
    assert (budgets.diff() <= 0).all()
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    unique = allot(shares[order], total, most)
    assert torch.equal(unique, budgets[order])
    if total == 512:  # where no bound holds, it is proportion, rounded
        free = (budgets > 1) & (budgets < most)
        ratio = budgets[free] / shares[free]
        assert float((budgets[free] - shares[free] * ratio[:5].mean()).abs().max()) < 1.5


def test_each_feature_takes_its_budget_of_the_largest_affinities():
    u = torch.randn(50, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u[:, 4] = -1.0  # never positive
    u[3:, 5] = -1.0  # positive in at most 3 rows
    budgets = torch.arange(30)
    budgets[7] = 50
    pattern, edges = select_columns(u, budgets)
    kept = pattern.densify(torch.ones(len(pattern.indices)))
    positive = (u > 0).sum(0)
    assert torch.equal(kept.sum(0).long(), torch.minimum(budgets, positive))
    ranked = F.pad(u.relu().sort(0, descending=True).values, (0, 0, 0, 1))
    for feature in range(1, 30):
        n = int(budgets[feature])
        smallest = ranked[n - 1, feature]
        assert torch.equal(kept[:, feature] > 0, (u[:, feature] >= smallest) & (u[:, feature] > 0))
        assert float(edges[feature]) == pytest.approx(float((smallest + ranked[n, feature]) / 2))
    assert float(edges[0]) == -1


def test_feature_choice_sums_columns_and_moves_with_rows_and_features():
    dictionary, x = make("feature_choice", budgets="uniform", mutual_share=0.0), rows(256)
    code = dictionary.encode(x)
    columns = code.firing_counts()
    positive = (dictionary.pre_activations(x) > 0).sum(0)
    assert int(dictionary.budgets(256).sum()) == 3 * 256
    assert torch.equal(columns, torch.minimum(dictionary.budgets(256), positive))
    assert set(columns.tolist()) == {19, 20}
    assert code.l0().min() < 2 < 5 < code.l0().max()  # rows take as many as they need
    order = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    assert torch.equal(dictionary.encode(x[order]).dense(), code.dense()[order])
    dictionary.shares.copy_(torch.linspace(1, 3, 40, dtype=torch.float64))
    before, budgets = dictionary.encode(x).dense(), dictionary.budgets(256)
    features = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for tensor in (dictionary.W_enc, dictionary.b_enc, dictionary.W_dec, dictionary.shares):
            tensor.copy_(tensor[features].clone())
    assert torch.equal(dictionary.budgets(256), budgets[features])
    torch.testing.assert_close(dictionary.encode(x).dense(), before[:, features])


def test_budgets_follow_the_densities_of_the_first_phase():
    dictionary, step = make("feature_choice"), 0
    while not dictionary.settled:
        x = rows(128, seed=step)
        loss = dictionary.loss(TrainingBatch(x, x))
        assert loss.code.nnz == 3 * 128
        dictionary.after_step(loss, progress=step / 100)
        step += 1
    assert step == 11  # a tenth of the training
    budgets = dictionary.budgets(128)
    assert torch.equal(ranks_of(dictionary.shares), ranks_of(dictionary.density))
    assert budgets.max() > budgets.min() >= 1
    assert int(budgets.sum()) == 3 * 128
    x = rows(128, seed=step)
    code = dictionary.loss(TrainingBatch(x, x)).code
    assert torch.equal(code.firing_counts(), torch.minimum(budgets, (dictionary.pre_activations(x) > 0).sum(0)))


# Silent on fresh rows: TopK without AuxK 18 to 20 % over seeds 0 to 2, Feature Choice none over seeds 0 and 1, at an L0
# of 12.06 to 12.09 of 12. (With k of 6 TopK leaves 7 to 12 %, with 3 it leaves 2 to 3 %.)
@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_no_feature_is_dead_after_a_thousand_steps(seed: int):
    x, fresh = planted(20_000, seed), planted(20_000, seed + 50)
    shared = {"n_features": 512, "k": 12, "batch_size": 512, "n_rows": 512 * 1100, "seed": seed}
    topk = unweave.fit(x, arch="topk", auxk_coefficient=0.0, **shared)
    chosen = unweave.fit(x, arch="feature_choice", **shared)
    silent = [float((d.encode(fresh).firing_counts() == 0).double().mean()) for d in (topk, chosen)]
    assert silent[0] > 0.1
    assert silent[1] < 0.01
    assert abs(float(chosen.encode(fresh).l0().double().mean()) - 12) < 0.05 * 12
    assert fvu(fresh, chosen(fresh).detach()) < 0.3


# Over 5 seeds L0 on fresh rows was 4.13 to 4.18 (mutual) and 4.09 to 4.19 (feature) for 4, after 300 steps of 200 rows;
# the slow test above, of 1,100 steps of 512, stays within 1 %.
@pytest.mark.parametrize("arch", ["mutual_choice", "feature_choice"])
def test_thresholds_keep_the_l0_of_training_and_do_not_look_at_the_batch(arch: str, tmp_path):
    x, fresh = planted(4000, 0), planted(4000, 50)
    dictionary = unweave.fit(x, arch=arch, n_features=64, k=4, batch_size=200, n_rows=200 * 300, seed=0)
    code = dictionary.encode(fresh)
    assert abs(float(code.l0().double().mean()) - 4) < 0.08 * 4
    assert int((code.firing_counts() == 0).sum()) == 0
    dictionary.save(tmp_path)
    assert torch.equal(Dictionary.load(tmp_path).encode(fresh).dense(), code.dense())
    double = dictionary.double()
    alone = torch.cat([double.encode(row[None]).dense() for row in fresh[:10].double()])
    torch.testing.assert_close(alone, double.encode(fresh.double())[:10].dense())
    before = double.encode(fresh.double())
    double.fold_scale(0.01)
    folded = double.encode(fresh.double() / 0.01)
    assert torch.equal(folded.indices, before.indices)
    torch.testing.assert_close(folded.values, before.values / 0.01)


# L0 was 2.0 to 2.1 for 2. Before features without a budget were kept silent it was 42.
@pytest.mark.parametrize("options", [{"budgets": "uniform", "mutual_share": 0.0}, {}])
def test_a_feature_that_never_had_a_row_stays_silent_in_eval_mode(options: dict):
    dictionary = make("feature_choice", m=200, k=2, **options)
    taken = torch.zeros(200, dtype=torch.long)
    for step in range(60):  # batches of 60 rows have 120 places for 200 features
        loss = dictionary.loss(TrainingBatch(rows(60, seed=step), rows(60, seed=step)))
        taken += loss.code.firing_counts() if bool(dictionary.settled) else 0
        dictionary.after_step(loss, progress=step / 59)
    code = dictionary.eval().encode(rows(2000, seed=99))
    assert int((taken == 0).sum()) >= 80
    assert int(code.firing_counts()[taken == 0].sum()) == 0
    assert abs(float(code.l0().double().mean()) - 2) < 0.3


def test_what_contradicts_itself_is_refused():
    with pytest.raises(UnweaveError, match="needs a first phase that learns the densities"):
        build("feature_choice", 8, 16, k=2, mutual_share=0.0)
