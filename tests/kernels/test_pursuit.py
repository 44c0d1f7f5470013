"""Pursuit: the reference beside a loop that spells it out, the compiled kernels beside the reference."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from unweave.codes import SparseCode
from unweave.errors import UnweaveError
from unweave.kernels import _jit
from unweave.kernels.pursuit import Screening, cpu, reference

SHAPES = [(1, 4, 5, 3), (7, 16, 33, 6), (9, 24, 257, 8), (33, 64, 700, 12), (5, 48, 1031, 1)]  # n, d, m, k
CLEAR = 1e-4  # two correlations closer than this, per unit of row norm, may swap places in float32
PURSUITS = {
    "matching": (reference.matching_pursuit, cpu.matching_pursuit),
    "distinct": (partial(reference.matching_pursuit, distinct=True), partial(cpu.matching_pursuit, distinct=True)),
    "orthogonal": (reference.orthogonal_matching_pursuit, cpu.orthogonal_matching_pursuit),
}


def made(n: int, d: int, m: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    return x, F.normalize(torch.randn(m, d, generator=generator), dim=1)


def spelt_out(x, W, k, kind, *, signed=False, tolerance=None):
    """One row, in numpy: its code as a dict in order of first pick, and how clearly each pick won."""
    x, W = x.double().numpy(), W.double().numpy()
    residual, code, gap = x.copy(), {}, np.inf
    for _ in range(k):
        scores = W @ residual
        strength = np.abs(scores) if signed else scores.copy()
        if kind != "matching":
            strength[list(code)] = -1
        order = np.argsort(-strength, kind="stable")
        j = int(order[0])
        if strength[j] <= 1e-12 * np.linalg.norm(x):
            break
        if tolerance is not None and np.linalg.norm(residual) <= tolerance:
            break
        if len(order) > 1:
            gap = min(gap, strength[j] - strength[order[1]])
        gap = min(gap, strength[j])
        code[j] = code.get(j, 0.0) + scores[j]
        if kind == "orthogonal":
            support = list(code)
            values = np.linalg.lstsq(W[support].T, x, rcond=None)[0]
            code = dict(zip(support, values, strict=True))
            residual = x - values @ W[support]
            if np.linalg.matrix_rank(W[support]) == W.shape[1]:
                break
        else:
            residual = residual - scores[j] * W[j]
        if tolerance is not None:
            gap = min(gap, abs(np.linalg.norm(residual) - tolerance))
    return code, gap / np.linalg.norm(x)


def codes_of(result) -> list[dict[int, float]]:
    pattern, values = result
    SparseCode(pattern.indices, values, pattern.offsets, pattern.n_features)  # raises where it is no valid code
    bounds = pairwise(pattern.offsets.tolist())
    return [dict(zip(pattern.indices[a:b].tolist(), values[a:b].tolist(), strict=True)) for a, b in bounds]


def assert_same(code, wanted, size, rtol):
    assert list(code) == list(wanted)
    np.testing.assert_allclose(list(code.values()), list(wanted.values()), rtol=0, atol=rtol * size)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("kind", PURSUITS)
def test_the_reference_is_what_is_written_down(shape, signed, kind):
    n, d, m, k = shape
    x, W = made(n, d, m)
    found = codes_of(PURSUITS[kind][0](x.double(), W.double(), k, signed=signed))
    for row, code in zip(x, found):
        wanted, gap = spelt_out(row, W, k, kind, signed=signed)
        assert gap > 1e-9
        assert_same(code, wanted, float(row.norm()), 1e-9)


@pytest.mark.parametrize("shape", [*SHAPES, (6, 3, 11, 40), (4, 8, 5, 9)])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("tolerance", [None, 1.5])
@pytest.mark.parametrize("method", ["gram", "residual", "screened"])
@pytest.mark.parametrize("kind", PURSUITS)
def test_the_kernels_pick_what_the_reference_picks(shape, signed, tolerance, method, kind):
    n, d, m, k = shape
    x, W = made(n, d, m, seed=1)
    how = {"signed": signed, "tolerance": tolerance}
    precise, fast = PURSUITS[kind]
    truth = codes_of(precise(x.double(), W.double(), k, **how))
    found = codes_of(fast(x, W, k, method=method, screening=Screening(n_candidates=m), **how))
    n_clear = 0
    for row, code, wanted in zip(x, found, truth, strict=True):
        _, gap = spelt_out(row, W, k, kind, signed=signed)
        if gap > CLEAR:
            assert_same(code, wanted, float(row.norm()), 2e-5)
            n_clear += 1
    assert n_clear >= 0.6 * n or d < 16


@pytest.mark.parametrize("kind", PURSUITS)
def test_tolerance_stops_at_the_first_residual_below_it(kind):
    x, W = made(20, 32, 300, seed=2)
    for pursue in PURSUITS[kind]:
        pattern, values = pursue(x, W, 30, tolerance=2.0)
        left = (x - pattern.densify(values) @ W).norm(dim=1)
        counts = pattern.offsets.diff()
        assert bool(((left <= 2.0 + 1e-5) | (counts == 30)).all())
        assert bool((counts < 30).any())
        for i in range(20):  # one pick fewer was not enough
            if 0 < counts[i] < 30 and kind == "orthogonal":
                shorter, less = pursue(x[i : i + 1], W, int(counts[i]) - 1)
                assert (x[i] - shorter.densify(less) @ W).norm() > 2.0 - 1e-5
        assert len(pursue(x, W, 30, tolerance=1e3)[1]) == 0


@pytest.mark.parametrize("method", ["gram", "screened"])
def test_orthogonal_values_are_least_squares(method):
    x, W = made(40, 96, 1500, seed=3)
    for code, row in zip(codes_of(cpu.orthogonal_matching_pursuit(x, W, 20, method=method)), x, strict=True):
        atoms = W[list(code)].double().numpy()
        best = np.linalg.lstsq(atoms.T, row.double().numpy(), rcond=None)[0]
        np.testing.assert_allclose(list(code.values()), best, rtol=0, atol=3e-6 * float(row.norm()))


def test_energy_falls_by_the_squares_of_the_picks():
    x, W = made(12, 40, 300, seed=4)
    x, W = x.double(), F.normalize(W.double(), dim=1)
    before = x.square().sum(1)
    for k in range(1, 9):
        pattern, values = reference.matching_pursuit(x, W, k, distinct=False)
        after = (x - pattern.densify(values) @ W).square().sum(1)
        shorter, less = reference.matching_pursuit(x, W, k - 1)
        pick = (pattern.densify(values) - shorter.densify(less)).square().sum(1)
        torch.testing.assert_close(before - after, pick, rtol=0, atol=1e-10)
        before = after


def test_an_atom_picked_twice_is_one_entry():
    W = F.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), dim=1)
    x = torch.tensor([[1.0, 0.9]])
    truth = codes_of(reference.matching_pursuit(x.double(), W.double(), 5, signed=True))[0]
    code = codes_of(cpu.matching_pursuit(x, W, 5, signed=True, method="gram"))[0]
    assert list(code) == list(truth) == [1, 0]
    np.testing.assert_allclose(list(code.values()), list(truth.values()), atol=1e-6)
    once = codes_of(cpu.matching_pursuit(x, W, 5, signed=True, distinct=True, method="gram"))[0]
    assert once[1] != pytest.approx(code[1])


def replayed(x, W, trail):
    """The code that a trail stands for, pick by pick, and what it leaves of the row."""
    residual, code = x.clone(), {}
    for j in trail.tolist():
        if j >= 0:
            value = residual @ W[j]
            code[j] = code.get(j, 0.0) + float(value)
            residual = residual - value * W[j]
    return code


@pytest.mark.parametrize("method", [None, "gram", "residual"])
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("until_repeat", [False, True])
def test_the_trail_tells_every_pick_and_a_repeat_can_end_it(method, signed, until_repeat):
    x, W = made(40, 12, 50, seed=18)
    x, W = x.double(), F.normalize(W.double(), dim=1)
    if method is None:
        pursue = reference.matching_pursuit
    else:
        pursue, x, W = partial(cpu.matching_pursuit, method=method), x.float(), W.float()
    trail = torch.empty(40, 20, dtype=torch.int32)
    found = codes_of(pursue(x, W, 20, signed=signed, until_repeat=until_repeat, trail=trail))
    for row, picks, code in zip(x, trail, found, strict=True):
        assert_same(code, replayed(row, W, picks), float(row.norm()), 1e-12 if method is None else 2e-5)
        picked = picks[picks >= 0].tolist()
        n_new = len(set(picked))
        assert len(picked) in ((n_new + 1, 20) if until_repeat else (20,))
        assert not until_repeat or len(set(picked[:-1])) == len(picked[:-1])
    assert (float((trail[:, -1] < 0).double().mean()) > 0.9) == until_repeat


def test_a_trail_that_does_not_fit_is_refused():
    x, W = made(6, 8, 20, seed=16)
    for pursue in (reference.matching_pursuit, cpu.matching_pursuit):
        with pytest.raises(UnweaveError, match=r"int32 trail \(6, 3\), found torch.int64 \(6, 3\)"):
            pursue(x, W, 3, trail=torch.zeros(6, 3, dtype=torch.long))
    with pytest.raises(UnweaveError, match="knows neither until_repeat nor trail"):
        cpu.matching_pursuit(x, W, 3, method="screened", until_repeat=True)


@pytest.mark.parametrize("method", ["gram", "residual", "screened"])
@pytest.mark.parametrize("kind", PURSUITS)
def test_planted_atoms_are_found_and_nothing_else(method, kind):
    generator = torch.Generator().manual_seed(5)
    W = torch.linalg.qr(torch.randn(200, 64, generator=generator, dtype=torch.float64).T).Q.T.float().contiguous()
    planted = torch.zeros(50, 64)
    for row in planted:
        row[torch.randperm(64, generator=generator)[:6]] = 0.5 + torch.rand(6, generator=generator)
    pattern, values = PURSUITS[kind][1](planted @ W, W, 15, method=method)
    assert pattern.offsets.diff().tolist() == [6] * 50  # the rest is rounding, and rounding is not picked
    torch.testing.assert_close(pattern.densify(values), planted, rtol=0, atol=1e-5)


def test_planted_atoms_of_an_overcomplete_dictionary_are_found():
    generator = torch.Generator().manual_seed(6)
    W = F.normalize(torch.randn(1000, 256, generator=generator), dim=1)
    planted = torch.zeros(30, 1000)
    for row in planted:
        row[torch.randperm(1000, generator=generator)[:5]] = 1 + torch.rand(5, generator=generator)
    pattern, values = cpu.orthogonal_matching_pursuit(planted @ W, W, 20, method="gram")
    torch.testing.assert_close(pattern.densify(values), planted, rtol=0, atol=1e-5)
    assert int(pattern.offsets.diff().max()) == 5


@pytest.mark.parametrize("method", ["gram", "residual", "screened", None])
@pytest.mark.parametrize("kind", PURSUITS)
def test_rows_of_zeros_and_no_rows_and_no_picks_give_empty_codes(method, kind):
    x, W = made(5, 12, 70, seed=7)
    x[1] = x[3] = 0
    precise, fast = PURSUITS[kind]
    assert [len(code) > 0 for code in codes_of(fast(x, W, 4, method=method))] == [True, False, True, False, True]
    for pursue in (precise, fast):
        for rows, k in ((x[:0], 4), (x, 0), (torch.zeros(3, 12), 4)):
            pattern, values = pursue(rows, W, k)
            assert pattern.n_rows == len(rows)
            assert pattern.n_features == 70
            assert len(values) == 0
        assert pursue(x, W[:0], 4)[0].n_features == 0


@pytest.mark.parametrize("method", ["gram", "residual", "screened"])
@pytest.mark.parametrize("kind", PURSUITS)
def test_of_equal_atoms_the_code_is_that_of_one(method, kind):
    x, W = made(20, 32, 150, seed=8)
    twice = torch.cat([W, W, W[:70]])
    precise, fast = PURSUITS[kind]
    wanted = precise(x.double(), W.double(), 6)
    pattern, values = fast(x, twice, 6, method=method, screening=Screening(n_candidates=len(twice)))
    code = pattern.densify(values)
    merged = code[:, :150] + code[:, 150:300]
    merged[:, :70] += code[:, 300:]
    torch.testing.assert_close(merged.double(), wanted[0].densify(wanted[1]), rtol=0, atol=2e-5)


def test_orthogonal_pursuit_ends_where_the_atoms_span_no_more():
    x, W = made(6, 10, 30, seed=9)
    W[:, 4:] = 0  # all atoms in a space of four dimensions
    W = F.normalize(W, dim=1)
    precise, fast = PURSUITS["orthogonal"]
    for pursue, rows, atoms in ((precise, x.double(), W.double()), (fast, x, W)):
        pattern, values = pursue(rows, atoms, 30, signed=True)
        assert pattern.offsets.diff().tolist() == [4] * 6
        torch.testing.assert_close((pattern.densify(values) @ atoms)[:, :4], rows[:, :4], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", PURSUITS)
@pytest.mark.parametrize("d", [8, 64])
def test_atoms_that_are_not_quite_of_norm_one(kind, d):
    x, W = made(10, d, 90, seed=10)
    W = W * torch.empty(90, 1).uniform_(0.97, 1.03, generator=torch.Generator().manual_seed(0))
    precise, fast = PURSUITS[kind]
    wanted = precise(x.double(), W.double(), 5)
    pattern, values = fast(x, W, 5, method="gram")
    torch.testing.assert_close(
        pattern.densify(values).double(), wanted[0].densify(wanted[1]), rtol=0, atol=2e-5 * float(x.norm(dim=1).max())
    )


@pytest.mark.parametrize("kind", PURSUITS)
def test_a_gram_matrix_is_used_again_and_may_be_coarse(kind):
    x, W = made(64, 48, 600, seed=11)
    fast = PURSUITS[kind][1]
    G, coarse = cpu.gram_matrix(W), cpu.gram_matrix(W, dtype=torch.bfloat16)
    torch.testing.assert_close(G, W @ W.T)
    assert coarse.dtype == torch.bfloat16
    exact = fast(x, W, 8, method="gram")
    again = fast(x, W, 8, gram=G)
    assert torch.equal(exact[0].indices, again[0].indices)
    assert torch.equal(exact[1], again[1])
    near = fast(x, W, 8, gram=coarse)
    overlap = ((near[0].densify(near[1]) != 0) & (exact[0].densify(exact[1]) != 0)).sum() / len(exact[1])
    assert overlap > 0.9
    left = [float((x - p.densify(v) @ W).square().sum()) for p, v in (exact, near)]
    assert left[1] == pytest.approx(left[0], rel=0.01)


@pytest.mark.parametrize("kind", PURSUITS)
@pytest.mark.parametrize("method", ["gram", "screened"])
def test_results_do_not_depend_on_threads_or_on_who_else_is_in_the_batch(kind, method, monkeypatch):
    monkeypatch.setattr(_jit, "WORTH_A_THREAD", 1)  # two rows are worth a thread
    x, W = made(131, 32, 513, seed=12)
    encode = partial(PURSUITS[kind][1], W=W, k=6, method=method, screening=Screening(caution=1.0))
    threads, supports = torch.get_num_threads(), {}
    try:
        for n_threads in (1, 3):
            torch.set_num_threads(n_threads)
            supports[n_threads] = [list(code) for code in codes_of(encode(x))]
    finally:
        torch.set_num_threads(threads)
    assert supports[3] == supports[1]
    for i in (0, 64, 130):
        assert list(codes_of(encode(x[i : i + 1]))[0]) == supports[1][i]


def test_rows_beyond_one_piece_of_work(monkeypatch):
    monkeypatch.setattr(cpu, "_ROOM", 64 * 90)  # 64 rows at a time
    x, W = made(150, 16, 90, seed=13)
    for method in ("gram", "residual", "screened"):
        for kind in PURSUITS:
            precise, fast = PURSUITS[kind]
            wanted = precise(x.double(), W.double(), 4)
            pattern, values = fast(x, W, 4, method=method, screening=Screening(n_candidates=90))
            torch.testing.assert_close(
                pattern.densify(values).double(), wanted[0].densify(wanted[1]), rtol=0, atol=1e-4
            )


@pytest.mark.parametrize("kind", PURSUITS)
@pytest.mark.parametrize("signed", [False, True])
def test_screened_pursuit_is_exact_with_all_caution_and_near_with_little(kind, signed):
    x, W = made(60, 48, 900, seed=14)
    fast = PURSUITS[kind][1]
    exact = fast(x, W, 8, method="gram", signed=signed)
    wanted = exact[0].densify(exact[1])
    done = {caution: Screening(n_candidates=40, caution=caution) for caution in (0.0, 0.3, 1.0)}
    overlap = {}
    for caution, screening in done.items():
        pattern, values = fast(x, W, 8, method="screened", screening=screening, signed=signed)
        found = pattern.densify(values)
        overlap[caution] = float(((found != 0) & (wanted != 0)).sum() / len(exact[1]))
        assert screening.n_picks == 60 * 8
        assert screening.n_proven >= screening.n_products - 1
        if caution == 1:
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
            assert screening.proven_share == 1
    assert 0.2 < overlap[0.0] < overlap[0.3] <= 1
    assert 60 <= done[0.0].n_products < done[0.3].n_products < done[1.0].n_products <= 60 * 8
    everything = Screening(n_candidates=900)
    fast(x, W, 8, method="screened", screening=everything, signed=signed)
    assert (everything.n_products, everything.proven_share) == (60, 1)


def test_the_method_taken_by_itself_is_exact(monkeypatch):
    x, W = made(4, 32, 400, seed=15)
    taken = []
    monkeypatch.setattr(cpu, "_by_gram", lambda *a: taken.append("gram"))
    monkeypatch.setattr(cpu, "_by_residuals", lambda *a: taken.append("residual"))
    monkeypatch.setattr(cpu, "_by_candidates", lambda *a: taken.append("screened"))
    cpu.matching_pursuit(x, W, 5)  # 20 picks do not make up for 400 rows of a Gram matrix
    cpu.matching_pursuit(x, W, 5, gram=cpu.gram_matrix(W))
    cpu.matching_pursuit(x.repeat(50, 1), W, 5)
    monkeypatch.setattr(cpu, "_MOST_GRAM_BYTES", 400 * 400)
    cpu.matching_pursuit(x.repeat(50, 1), W, 5)
    assert taken == ["residual", "gram", "gram", "residual"]


@pytest.mark.parametrize("kind", PURSUITS)
def test_what_is_refused(kind):
    x, W = made(6, 8, 20, seed=16)
    broken, atoms = x.clone(), W.clone()
    broken[4, 2] = torch.nan
    atoms[3, 1] = torch.inf
    for pursue in PURSUITS[kind]:
        with pytest.raises(UnweaveError, match=r"1 of 6 rows of x \(the first is row 4\)"):
            pursue(broken, W, 3)
        with pytest.raises(UnweaveError, match="1 of 20 rows of the dictionary"):
            pursue(x, atoms, 3)
        with pytest.raises(UnweaveError, match=r"found \(6, 8\) and \(20, 5\)"):
            pursue(x, W[:, :5], 3)
        with pytest.raises(UnweaveError, match="0 or more, found -1"):
            pursue(x, W, -1)
        with pytest.raises(UnweaveError, match="tolerance"):
            pursue(x, W, 3, tolerance=float("nan"))
        with pytest.raises(UnweaveError, match="one floating type"):
            pursue(x, W.double(), 3)
    fast = PURSUITS[kind][1]
    with pytest.raises(UnweaveError, match="float32 on the CPU"):
        fast(x.double(), W.double(), 3)
    with pytest.raises(UnweaveError, match=r"Gram matrix \(20, 20\), found \(6, 6\)"):
        fast(x, W, 3, gram=torch.eye(6))
    with pytest.raises(UnweaveError, match="float32 or bfloat16"):
        fast(x, W, 3, gram=torch.eye(20).double())
    with pytest.raises(UnweaveError, match="method"):
        fast(x, W, 3, method="magic")


def test_sums_that_overflow_are_not_taken_for_infinity():
    x, W = made(3, 8, 20, seed=17)
    big = (1 + x.abs()) * 1e36
    big[:, 0] = 3e38
    with pytest.raises(UnweaveError):
        cpu.matching_pursuit(torch.full((3, 8), torch.inf), W, 2)
    reference.matching_pursuit(big.double(), W.double(), 2)
    cpu.matching_pursuit(big, W, 2, method="gram")  # whatever it gives: no complaint, no crash
