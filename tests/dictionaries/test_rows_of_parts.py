"""What holds for every dictionary whose rows are several activations, or whose target is another activation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import unweave
from unweave.dictionaries import Dictionary, TrainingBatch, build, get
from unweave.errors import UnweaveError

M = 24
CASES: list[tuple[str, dict[str, Any]]] = [
    ("transcoder", {"k": 4, "zero_decoder": False}),
    ("transcoder", {"activation": "relu", "zero_decoder": False, "objective": "mse"}),
    ("skip_transcoder", {"k": 4, "zero_decoder": False}),
    ("crosscoder", {}),
    ("topk_crosscoder", {"k": 4}),
    ("batch_topk_crosscoder", {"k": 4}),
    ("clt", {"k": 4}),
    ("clt", {"activation": "relu"}),
    ("clt", {"activation": "jumprelu", "k": 4}),
]
ids = [f"{name}-{options.get('activation', '')}".rstrip("-") for name, options in CASES]
each = pytest.mark.parametrize(("arch", "options"), CASES, ids=ids)


def data(arch: str, n: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of two parts of width 6, the second ten times as long, and targets; from a few sparse causes."""
    g = torch.Generator().manual_seed(seed)
    causes = F.relu(torch.randn(n, 16, generator=g) - 0.8).double()
    maps = torch.randn(16, 24, generator=torch.Generator().manual_seed(7)).double()
    rows = causes @ maps
    x, y = rows[:, :12].clone(), rows[:, 12:].clone()
    x[:, 6:] *= 10
    y[:, 6:] *= 0.1
    targets = {"crosscoder": x, "topk_crosscoder": x, "batch_topk_crosscoder": x}
    return x, targets.get(arch, y)


def made(arch: str, options: dict[str, Any]) -> tuple[Dictionary, Tensor]:
    """A dictionary after a few steps on rows scaled as the trainer scales them, and those rows."""
    x, y = data(arch)
    torch.manual_seed(0)
    dictionary = build(arch, 12, M, d_out=y.shape[1], **options).double().train()
    x, y = (rows / rows.square().sum(1).mean().sqrt() for rows in (x, y))
    dictionary.initialise(x, y)
    optimiser = torch.optim.Adam(dictionary.parameters(), lr=1e-2)
    for i in range(20):
        loss = dictionary.loss(TrainingBatch(x, y, torch.arange(M) < 3, i / 20))
        optimiser.zero_grad()
        loss.total.backward()
        dictionary.before_step()
        optimiser.step()
        dictionary.after_step(loss, i / 20)
    return dictionary.eval(), x


@each
def test_eval_codes_do_not_depend_on_the_batch(arch: str, options: dict[str, Any]) -> None:
    dictionary, x = made(arch, options)
    together = dictionary.encode(x).dense()
    alone = torch.cat([dictionary.encode(row[None]).dense() for row in x])
    torch.testing.assert_close(together, alone)
    assert dictionary.encode(x[:0]).shape == (0, M)
    with torch.no_grad():
        torch.testing.assert_close(dictionary.encode(x).dense(), together)


@each
@pytest.mark.parametrize("out", [0.3, 40.0])
def test_folding_keeps_outputs_and_codes(arch: str, options: dict[str, Any], out: float) -> None:
    dictionary, x = made(arch, options)
    before, code = dictionary(x), dictionary.encode(x)
    share = code.dense() * dictionary.decoder_directions().norm(dim=1)
    dictionary.complete()
    torch.testing.assert_close(dictionary(x), before)
    dictionary.complete()
    dictionary.fold_scale(2.5, out)
    raw = x / 2.5
    torch.testing.assert_close(dictionary(raw), before / out)
    folded = dictionary.encode(raw)
    assert torch.equal(folded.nonzero().dense() != 0, code.dense() != 0)
    norms = dictionary.decoder_directions().norm(dim=1)
    if arch != "clt" and not arch.endswith("crosscoder"):  # there the parts change their relative scale on the way out
        torch.testing.assert_close(folded.dense() * norms, share / out)


@each
def test_fit_trains_it_and_files_keep_it(arch: str, options: dict[str, Any], tmp_path) -> None:
    x, y = data(arch, 600)
    target = None if y is x else y
    options = {name: value for name, value in options.items() if name != "zero_decoder"}
    dictionary = unweave.fit(x, arch, target=target, n_features=M, n_rows=150 * 64, batch_size=64, lr=1e-2, **options)
    with torch.no_grad():
        found = dictionary(x.float())
        for part in y.float().sub(found).square().sum(0).div(y.float().sub(y.float().mean(0)).square().sum(0)).split(6):
            assert float(part.mean()) < 0.75
        dictionary.save(tmp_path)
        loaded = Dictionary.load(tmp_path)
        first, second = dictionary.encode(x), loaded.encode(x)
        assert torch.equal(first.values, second.values)
        assert torch.equal(first.indices, second.indices)
        assert torch.equal(loaded(x), found)


@pytest.mark.parametrize("arch", ["crosscoder", "topk_crosscoder", "batch_topk_crosscoder", "clt"])
def test_parts_of_any_scale_are_learnt_alike(arch: str) -> None:
    """A part 100 times as long gives, to the last digits, the same training."""
    x, y = data(arch)
    long = torch.tensor([1.0, 100.0]).repeat_interleave(6)
    codes, norms = [], []
    for factor in (torch.ones(12), long):
        torch.manual_seed(0)
        options = {} if arch == "crosscoder" else {"k": 4}
        dictionary = build(arch, 12, M, **options).double().train()
        rows, target = x * factor, (x if y is x else y) * factor
        dictionary.initialise(rows, target)
        optimiser = torch.optim.Adam(dictionary.parameters(), lr=1e-3)
        for _ in range(10):
            loss = dictionary.loss(TrainingBatch(rows, target))
            optimiser.zero_grad()
            loss.total.backward()
            optimiser.step()
            dictionary.after_step(loss, 1.0)
        dictionary.complete()
        codes.append(dictionary.eval().encode(rows).dense())
        norms.append(dictionary.part_norms() if arch != "clt" else dictionary.decoder_norms())
    torch.testing.assert_close(*codes)
    torch.testing.assert_close(*norms)
    assert float(codes[0].count_nonzero()) > 0


def test_settings_that_make_no_sense_are_refused() -> None:
    for arch in ("crosscoder", "clt"):
        with pytest.raises(UnweaveError, match="n_parts = 3 does not divide d_in = 10"):
            build(arch, 10, 30, n_parts=3)
    with pytest.raises(UnweaveError, match="subtract_bias"):
        build("crosscoder", 10, 30, subtract_bias=True)
    with pytest.raises(UnweaveError, match="n_features must be a multiple of n_parts = 2, found 31"):
        build("clt", 10, 31)
    with pytest.raises(UnweaveError, match="k is shared out among the layers: expected 5 to 30, found 3"):
        build("clt", 10, 30, n_parts=5, k=3)
    with pytest.raises(UnweaveError, match="k must be at most n_features = 8"):
        build("transcoder", 4, 8, k=9)
    rows = torch.randn(50, 8)
    rows[:, 4:] = 0
    with pytest.raises(UnweaveError, match="part 1 of the input rows is zero in every row"):
        unweave.fit(rows, "crosscoder", n_features=16, n_rows=100)
    assert all(get(arch).citation for arch, _ in CASES)
