import numpy as np
import pytest
import torch

from unweave.codes import SparseCode
from unweave.errors import UnweaveError
from unweave.files import write_bytes


@pytest.fixture
def dense():
    torch.manual_seed(0)
    x = torch.randn(9, 6)
    x[x.abs() < 0.8] = 0
    x[3] = 0
    return x


def test_dense_and_scipy_round_trips(dense):
    code = SparseCode.from_dense(dense)
    assert torch.equal(code.dense(), dense)
    assert np.array_equal(code.to_scipy().toarray(), dense.numpy())
    assert torch.equal(SparseCode.from_scipy(code.to_scipy()).dense(), dense)


@pytest.mark.parametrize(
    "rows", [0, -1, slice(2, 5), slice(None, None, 2), slice(7, 3), [4, 0, 4, -2], torch.tensor([1, 3])]
)
def test_slicing_equals_slicing_the_dense_matrix(dense, rows):
    expected = dense[rows] if not isinstance(rows, int) else dense[rows][None]
    assert torch.equal(SparseCode.from_dense(dense)[rows].dense(), expected)


def test_row_numbers_of_every_kind_and_none_out_of_range(dense):
    code = SparseCode.from_dense(dense)
    for number in (np.int64(3), torch.tensor(3), torch.tensor(-6)):
        assert torch.equal(code[number].dense(), dense[3][None])
    for wrong in (9, -10, [0, 9], torch.tensor([-10])):
        with pytest.raises(IndexError):
            code[wrong]


def test_boolean_mask_and_iteration(dense):
    code = SparseCode.from_dense(dense)
    mask = torch.arange(9) % 2 == 0
    assert torch.equal(code[mask].dense(), dense[mask])
    assert torch.equal(torch.cat([row.dense() for row in code]), dense)


def test_concatenate(dense):
    code = SparseCode.from_dense(dense)
    assert torch.equal(SparseCode.concatenate([code[:4], code[4:4], code[4:]]).dense(), dense)
    with pytest.raises(UnweaveError, match="differ in n_features"):
        SparseCode.concatenate([code, SparseCode.empty(1, 7)])


def test_fixed_k_is_csr_with_equal_rows_and_explicit_zeros_do_not_fire():
    code = SparseCode.from_fixed_k(torch.tensor([[0, 2], [1, 3]]), torch.tensor([[1.0, 0.0], [-2.0, 3.0]]), 4)
    assert code.offsets.tolist() == [0, 2, 4]
    assert code.l0().tolist() == [1, 2]
    assert code.firing_counts().tolist() == [1, 1, 0, 1]
    assert code.nonzero().nnz == 3
    assert torch.equal(code.nonzero().dense(), code.dense())


def test_top_goes_by_magnitude_and_keeps_the_sign():
    code = SparseCode.from_dense(torch.tensor([[0.0, 1.0, 0.0], [0.5, -3.0, 0.0]]))
    assert code.top(5) == [(1, -3.0), (0, 0.5)]
    assert code.feature(1).tolist() == [1.0, -3.0]


def test_save_and_load(dense, tmp_path):
    code = SparseCode.from_dense(dense)
    code.save(tmp_path / "code.safetensors")
    loaded = SparseCode.load(tmp_path / "code.safetensors")
    assert loaded.shape == code.shape
    assert torch.equal(loaded.dense(), dense)


def test_empty_codes():
    code = SparseCode.empty(3, 5)
    assert code.l0().tolist() == [0, 0, 0]
    assert torch.equal(code.dense(), torch.zeros(3, 5))
    assert code.top() == []
    assert "3 rows x 5 features" in repr(code)


@pytest.mark.parametrize(
    ("indices", "offsets", "message"),
    [([0, 9], [0, 2], "must lie in"), ([0, 1], [0, 3], "must rise"), ([0, 1], [0, 2, 1, 2], "must rise")],
)
def test_wrong_parts_are_refused(indices, offsets, message):
    with pytest.raises(UnweaveError, match=message):
        SparseCode(torch.tensor(indices), torch.ones(len(indices)), torch.tensor(offsets), 4)


def test_a_file_of_another_kind_is_refused(tmp_path):
    write_bytes(tmp_path / "x.safetensors", b"not tensors at all")
    with pytest.raises(UnweaveError, match="not a whole safetensors file"):
        SparseCode.load(tmp_path / "x.safetensors")
