"""ArraySource and ModuleSource: every row once, in order, the same after a skip; bad rows are named."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from unweave.errors import UnweaveError
from unweave.sources import ArraySource, ModuleSource

ROWS = np.random.default_rng(0).normal(size=(25, 3)).astype(np.float32)


def gather(source, skip=0):
    return list(source.batches(skip))


@pytest.mark.parametrize(
    "array",
    [
        ROWS,
        torch.from_numpy(ROWS),
        [ROWS[:4], ROWS[4:5], ROWS[5:]],
        lambda: (ROWS[i : i + 7] for i in range(0, 25, 7)),
        lambda: [torch.from_numpy(ROWS)],
    ],
    ids=["numpy", "tensor", "list", "generator function", "list function"],
)
def test_rows_in_order(array):
    source = ArraySource(array, batch_rows=10)
    batches = gather(source)
    assert [b.n_rows for b in batches] == [10, 10, 5]
    assert np.array_equal(torch.cat([b.input for b in batches]).numpy(), ROWS)
    assert torch.cat([b.meta.document for b in batches]).tolist() == list(range(25))
    assert batches[0].target is batches[0].input
    assert (source.d_in, source.d_out) == (3, 3)
    rest = gather(source, 2)
    assert len(rest) == 1
    assert torch.equal(rest[0].input, batches[2].input)
    assert rest[0].meta.document.tolist() == batches[2].meta.document.tolist()
    assert source.provenance == ArraySource(array, batch_rows=10).provenance


def test_targets_and_dtypes():
    source = ArraySource(ROWS, [ROWS[:20, :2], ROWS[20:, :2]], batch_rows=10)
    assert (source.d_in, source.d_out) == (3, 2)
    assert all(torch.equal(b.target, b.input[:, :2]) for b in source.batches())
    assert ArraySource(ROWS.astype(np.float64)).provenance["dtype"] == "float32"
    assert next(ArraySource(np.arange(6).reshape(3, 2)).batches()).input.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert next(ArraySource(ROWS.astype(np.float16)).batches()).input.dtype == torch.float16
    assert next(ArraySource(torch.from_numpy(ROWS).bfloat16()).batches()).input.dtype == torch.bfloat16
    assert ArraySource(ROWS).provenance != ArraySource(ROWS + 1).provenance


def test_a_memmap_is_read_piece_by_piece(tmp_path):
    path = tmp_path / "rows.npy"
    np.save(path, ROWS)
    source = ArraySource(np.load(path, mmap_mode="r"), batch_rows=10)
    assert np.array_equal(torch.cat([b.input for b in source.batches()]).numpy(), ROWS)


def test_bad_rows_and_shapes_are_named():
    bad = ROWS.copy()
    bad[17, 1] = np.nan
    bad[21, 0] = np.inf
    source = ArraySource(bad, batch_rows=10)
    batches = source.batches()
    next(batches)
    with pytest.raises(UnweaveError, match="row 17 holds NaN or infinity"):
        next(batches)
    with pytest.raises(UnweaveError, match="target: row 17"):
        gather(ArraySource(ROWS, bad, batch_rows=10))
    for array, told in [
        (ROWS[0], r"expected shape \(n, d\)"),
        ("rows.npy", "expected an .n, d. array"),
        ([[1.0, 2.0]], "found list"),
        ((row for row in [ROWS]), "a generator can be read only once"),
        (ROWS[:0], "holds no row"),
        ([], "holds no row"),
        (np.array([["a"]]), "expected numbers"),
    ]:
        with pytest.raises(UnweaveError, match=told):
            ArraySource(array)
    with pytest.raises(UnweaveError, match="equally many rows, found 25 and 24"):
        ArraySource(ROWS, ROWS[:24])
    with pytest.raises(UnweaveError, match="equally many rows"):
        gather(ArraySource(ROWS, [ROWS, ROWS]))
    with pytest.raises(UnweaveError, match="equally many rows"):
        gather(ArraySource([ROWS, ROWS], [ROWS]))
    with pytest.raises(UnweaveError, match="differ in width"):
        gather(ArraySource([ROWS, ROWS[:, :2]]))
    with pytest.raises(UnweaveError, match="expected rows of width 3, found 2 from row 25"):
        gather(ArraySource([ROWS, ROWS[:, :2]], batch_rows=25))


# ---- modules ----------------------------------------------------------------------------------------------------


@pytest.fixture
def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5), nn.Dropout(0.5))


IMAGES = [torch.randn(3, 1, 6, 6, generator=torch.Generator().manual_seed(n)) for n in range(4)]


def test_module_rows(network):
    source = ModuleSource(network, IMAGES, "3", target_site="4", name="tiny")
    batches = gather(source)
    assert torch.cat([b.input for b in batches]).shape == (12, 5)
    torch.testing.assert_close(batches[1].input, network(IMAGES[1]))  # in eval mode: no dropout
    assert torch.equal(batches[1].input, batches[1].target)
    assert torch.cat([b.meta.document for b in batches]).tolist() == list(range(12))
    assert (source.d_in, source.d_out) == (5, 5)
    rest = gather(source, 3)
    assert torch.equal(rest[0].input, batches[3].input)
    assert rest[0].meta.document.tolist() == [9, 10, 11]
    assert source.provenance["model"]["name"] == "tiny"
    assert ModuleSource(network, IMAGES[1:], "3").provenance["data"] != source.provenance["data"]


def test_feature_maps_are_rows_per_position(network):
    source = ModuleSource(network, lambda: iter(IMAGES), "1", channel_dim=1)
    batch = next(source.batches())
    maps = network[1](network[0](IMAGES[0]))
    assert batch.input.shape == (3 * 16, 4)
    assert torch.equal(batch.input[16 + 5], maps[1, :, 1, 1])
    assert len(batch.items) == 3
    assert batch.meta.document.tolist() == [0] * 16 + [1] * 16 + [2] * 16
    assert batch.meta.position.tolist() == list(range(16)) * 3
    assert (batch.meta.token == -1).all()


def test_inputs_of_several_arguments():
    net = nn.Bilinear(2, 3, 4)
    a, b = torch.randn(5, 2), torch.randn(5, 3)
    holder = nn.Sequential()
    holder.add_module("both", net)
    holder.forward = lambda first, second: net(first, second)
    by_position = next(ModuleSource(holder, [(a, b)], "both").batches())
    by_keyword = next(ModuleSource(holder, [{"first": a, "second": b}], "both").batches())
    assert torch.equal(by_position.input, by_keyword.input)


def test_module_source_refuses_what_cannot_work(network):
    with pytest.raises(UnweaveError, match="an iterator can be read only once"):
        ModuleSource(network, iter(IMAGES), "3")
    with pytest.raises(UnweaveError, match="no site '9'"):
        ModuleSource(network, IMAGES, "9")
    with pytest.raises(UnweaveError, match="no batch to run"):
        _ = ModuleSource(network, [], "3").d_in
    with pytest.raises(UnweaveError, match="one row for each position"):
        gather(ModuleSource(network, IMAGES, "0", target_site="3", channel_dim=1))
    with pytest.raises(UnweaveError, match="that hold a tensor"):
        gather(ModuleSource(network, ["text"], "3"))
