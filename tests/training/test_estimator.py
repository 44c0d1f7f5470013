"""The scikit-learn transformer: scikit-learn's own conformance suite, and what it does not ask."""

from __future__ import annotations

import pickle
import sys
from typing import Any

import numpy as np
import pytest
import scipy.sparse

sklearn = pytest.importorskip("sklearn")

from sklearn.base import clone  # noqa: E402
from sklearn.linear_model import LogisticRegression  # noqa: E402
from sklearn.pipeline import make_pipeline  # noqa: E402
from sklearn.utils.estimator_checks import parametrize_with_checks  # noqa: E402

from unweave.training.estimator import SparseDictionaryTransformer  # noqa: E402


@parametrize_with_checks(
    [
        SparseDictionaryTransformer(max_iter=20),
        SparseDictionaryTransformer(arch="topk", n_components=5, max_iter=10, sparse_output=False),
    ]
)
def test_scikit_learn_agrees(estimator: Any, check: Any) -> None:
    check(estimator)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    rng = np.random.default_rng(0)
    atoms = rng.standard_normal((20, 12))
    codes = rng.random((400, 20)) * (rng.random((400, 20)) < 0.1)
    return codes @ atoms


@pytest.fixture(scope="module")
def fitted(rows: np.ndarray) -> SparseDictionaryTransformer:
    return SparseDictionaryTransformer(32, k=3, max_iter=400, random_state=0).fit(rows)


def test_codes_and_reconstruction(fitted: SparseDictionaryTransformer, rows: np.ndarray) -> None:
    codes = fitted.transform(rows)
    assert isinstance(codes, scipy.sparse.csr_matrix)
    assert codes.shape == (400, 32)
    assert codes.dtype == np.float64
    assert codes.nnz == np.count_nonzero(codes.toarray())
    assert 1 < codes.nnz / 400 < 4.5
    back = fitted.inverse_transform(codes)
    assert back.shape == rows.shape
    np.testing.assert_allclose(fitted.inverse_transform(codes.toarray()), back)
    fvu = ((rows - back) ** 2).sum() / ((rows - rows.mean(0)) ** 2).sum()
    assert fvu < 0.2
    np.testing.assert_allclose(codes @ fitted.components_ + (back - codes @ fitted.components_)[:1], back)
    assert fitted.components_.shape == (32, 12)
    assert fitted.n_features_in_ == 12
    assert fitted.n_iter_ == 400
    assert fitted.metrics_[-1]["step"] == 400


def test_many_rows_are_encoded_in_pieces(fitted: SparseDictionaryTransformer, rows: np.ndarray) -> None:
    many = np.tile(rows, (21, 1))  # more than one chunk
    codes = fitted.transform(many)
    assert (codes[-400:] != fitted.transform(rows)).nnz == 0
    assert fitted.inverse_transform(codes).shape == many.shape


def test_feature_names(fitted: SparseDictionaryTransformer) -> None:
    names = fitted.get_feature_names_out()
    assert names[0] == "sparsedictionarytransformer0"
    assert len(names) == 32


def test_pandas_output(rows: np.ndarray) -> None:
    pandas = pytest.importorskip("pandas")
    dense = SparseDictionaryTransformer(16, k=3, max_iter=20, sparse_output=False).set_output(transform="pandas")
    frame = dense.fit_transform(pandas.DataFrame(rows))
    assert isinstance(frame, pandas.DataFrame)
    assert frame.shape == (400, 16)


def test_pickle_and_clone(fitted: SparseDictionaryTransformer, rows: np.ndarray) -> None:
    copy = pickle.loads(pickle.dumps(fitted))
    assert (copy.transform(rows) != fitted.transform(rows)).nnz == 0
    again = clone(fitted).fit(rows)
    np.testing.assert_array_equal(again.components_, fitted.components_)
    other = clone(fitted).set_params(random_state=1, max_iter=5).fit(rows)
    assert not np.array_equal(other.components_, fitted.components_)


def test_in_a_pipeline(rows: np.ndarray) -> None:
    labels = rows[:, 0] > np.median(rows[:, 0])
    pipeline = make_pipeline(
        SparseDictionaryTransformer(64, k=6, max_iter=300, random_state=0), LogisticRegression(max_iter=1000)
    )
    assert pipeline.fit(rows, labels).score(rows, labels) > 0.8


def test_options_reach_the_architecture_and_the_training(rows: np.ndarray) -> None:
    fitted = SparseDictionaryTransformer(
        16, arch="jumprelu", k=4, max_iter=10, batch_size=50, options={"bandwidth": 0.01, "lr": 1e-3}
    ).fit(rows)
    assert fitted.dictionary_.config.bandwidth == 0.01
    assert fitted.dictionary_.config.target_l0 == 4
    assert fitted.metrics_[-1]["rows"] == 500


def test_wrong_width_of_codes(fitted: SparseDictionaryTransformer) -> None:
    with pytest.raises(ValueError, match="codes of 32 components, found 5"):
        fitted.inverse_transform(np.ones((2, 5)))


def test_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    import unweave.training
    from unweave.errors import UnweaveError

    assert unweave.training.SparseDictionaryTransformer is SparseDictionaryTransformer
    monkeypatch.delitem(sys.modules, "unweave.training.estimator")
    for name in [name for name in sys.modules if name.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(UnweaveError, match=r"pip install 'unweave\[sklearn\]'"):
        _ = unweave.training.SparseDictionaryTransformer


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Skipping check")
def test_scikit_learn_agrees_with_the_defaults() -> None:
    from sklearn.utils.estimator_checks import check_estimator

    results = check_estimator(SparseDictionaryTransformer())
    assert {result["status"] for result in results} <= {"passed", "skipped"}
