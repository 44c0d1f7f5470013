"""unweave.fit takes any rows, picks sensible defaults, and refuses bad input in one clear message."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from unweave.activations import ActivationStore
from unweave.batch import ActivationBatch
from unweave.errors import UnweaveError
from unweave.metrics import fvu
from unweave.sources.arrays import ArraySource
from unweave.training import fit
from unweave.training._rows import IteratorSource, rows_of

SHORT: dict[str, Any] = {"n_features": 16, "k": 2, "n_rows": 60 * 32, "batch_size": 32, "device": "cpu"}


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    rng = np.random.default_rng(0)
    return (rng.standard_normal((500, 8)) * np.arange(1, 9)).astype(np.float32)


def store_of(rows: np.ndarray, folder: Path) -> ActivationStore:
    store = ActivationStore.create(folder, {"kind": "array"}, d_in=8, d_out=None, dtype="float32")
    store.append(ActivationBatch.of_rows(torch.from_numpy(rows)))
    store.finish()
    return store


def test_every_kind_of_rows(rows: np.ndarray, tmp_path: Path) -> None:
    x = torch.from_numpy(rows)
    read_only = rows.copy()
    read_only.flags.writeable = False
    np.save(tmp_path / "rows.npy", rows)
    kinds = {
        "numpy": rows,
        "float64": rows.astype(np.float64),
        "fortran": np.asfortranarray(rows),
        "reversed": np.ascontiguousarray(rows[::-1])[::-1],
        "read-only": read_only,
        "memmap": np.load(tmp_path / "rows.npy", mmap_mode="r"),
        "torch": x,
        "with a graph": x.clone().requires_grad_(),
        "list of arrays": [rows[:100], rows[100:]],
        "list of lists": rows.tolist(),
        "generator": (rows[i : i + 50] for i in range(0, 500, 50)),
        "function": lambda: (rows[i : i + 50] for i in range(0, 500, 50)),
        "source": ArraySource(rows),
    }
    expected = fit(rows, **SHORT, ring_rows=500)
    for name, data in kinds.items():
        found = fit(data, **SHORT, ring_rows=500)
        for key, value in expected.state_dict().items():
            assert torch.equal(found.state_dict()[key], value), (name, key)
    assert (expected.d_in, expected.d_out, expected.n_features, expected.training) == (8, 8, 16, False)
    bfloat = fit(x.bfloat16(), **SHORT)
    assert bfloat.decoder_directions().dtype == torch.float32
    integers = fit((rows * 10).astype(np.int64), **SHORT)
    assert integers.d_in == 8
    assert fit(store_of(rows, tmp_path / "store"), **SHORT).d_in == 8


def test_it_learns_by_default(rows: np.ndarray) -> None:
    dictionary = fit(rows, batch_size=32, n_features=32, k=4, epochs=25, seed=1)
    x = torch.from_numpy(rows)
    with torch.no_grad():
        assert fvu(x, dictionary(x)) < 0.1


def test_the_seed_decides(rows: np.ndarray) -> None:
    torch.manual_seed(1)
    a = fit(rows, **SHORT, seed=3)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    b, c = fit(rows, **SHORT, seed=3), fit(rows, **SHORT, seed=4)
    assert torch.equal(before, torch.get_rng_state())  # the caller's random state is left alone
    assert torch.equal(a.decoder_directions(), b.decoder_directions())
    assert not torch.equal(a.decoder_directions(), c.decoder_directions())


def test_defaults_follow_the_data(rows: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("unweave.training.fit")  # the package's attribute of that name is the function
    seen: list[Any] = []

    class Done(Exception):
        pass

    def fake(dictionary: Any, stream: Any, config: Any, *rest: Any, **named: Any) -> None:
        seen.append((dictionary.config, config))
        raise Done

    monkeypatch.setattr(module, "train", fake)

    def defaults(data: Any, **options: Any) -> Any:
        with pytest.raises(Done):
            fit(data, **options)
        return seen[-1]

    dictionary, config = defaults(rows)
    assert (dictionary.n_features, dictionary.k) == (64, 1)
    assert (config.batch_size, config.n_rows, config.ring_rows) == (32, 1500 * 32, 500)
    wide = np.zeros((10_000, 512), dtype=np.float32)
    dictionary, config = defaults(wide, expansion=2)
    assert (dictionary.n_features, dictionary.k) == (1024, 32)
    assert (config.batch_size, config.n_rows) == (512, 1500 * 512)
    assert defaults(rows, epochs=3)[1].n_rows == 1500
    assert defaults(rows, arch="jumprelu", k=3)[0].target_l0 == 3
    assert defaults(rows[:5])[1].batch_size == 5
    assert defaults(rows[:5])[1].n_rows == 300 * 5
    assert defaults(ArraySource(rows))[1].batch_size == 2048
    dictionary, config = defaults(rows, lr=0.01, auxk_coefficient=0.5)
    assert (dictionary.auxk_coefficient, config.lr) == (0.5, 0.01)


def test_transcoder(rows: np.ndarray) -> None:
    mixing = np.random.default_rng(1).standard_normal((8, 5)).astype(np.float32)
    target = 1000 * rows @ mixing + 70
    for data, extra in [(rows, {"target": target}), (((rows, target) for _ in range(1)), {})]:
        dictionary = fit(data, "topk", n_features=64, k=8, n_rows=500 * 32, batch_size=32, lr=4e-3, **extra)
        x, y = torch.from_numpy(rows), torch.from_numpy(target)
        assert (dictionary.d_in, dictionary.d_out) == (8, 5)
        with torch.no_grad():
            assert fvu(y, dictionary(x)) < 0.1  # in the units of the target, though its scale is far from the input's


def test_same_width_target_is_a_target(rows: np.ndarray) -> None:
    dictionary = fit(rows, "topk", target=-rows, n_features=64, k=8, n_rows=600 * 32, batch_size=32)
    assert dictionary.config.subtract_bias is False
    x = torch.from_numpy(rows)
    with torch.no_grad():
        assert fvu(-x, dictionary(x)) < fvu(-x, torch.zeros_like(x))


def test_an_endless_iterator_is_read_as_needed() -> None:
    given = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal given
        rng = np.random.default_rng(0)
        while True:
            given += 100
            yield rng.standard_normal((100, 8))

    dictionary = fit(endless(), ring_rows=256, **SHORT)
    assert dictionary.d_in == 8
    assert given < 60 * 32 + 256 + 200


def test_an_iterator_that_ends_early_goes_round(rows: np.ndarray) -> None:
    pieces = (rows[i : i + 50] for i in range(0, 500, 50))
    assert fit(pieces, ring_rows=64, **SHORT).d_in == 8


def test_iterator_source_repeats_its_batches(rows: np.ndarray) -> None:
    buffer = np.empty((50, 8), dtype=np.float32)

    def reusing() -> Iterator[np.ndarray]:
        for i in range(0, 500, 50):
            buffer[:] = rows[i : i + 50]
            yield buffer

    source = rows_of(reusing(), read_all=False).source
    assert isinstance(source, IteratorSource)
    first = next(source.batches(skip=3))
    assert torch.equal(first.input, torch.from_numpy(rows[150:200]))
    assert first.meta.document.tolist() == list(range(150, 200))
    for _ in range(2):
        assert torch.equal(torch.cat([b.input for b in source.batches()]), torch.from_numpy(rows))


def test_resumes_in_a_folder(rows: np.ndarray, tmp_path: Path) -> None:
    a = fit(rows, folder=tmp_path, **SHORT)
    assert {p.name for p in tmp_path.iterdir()} == {"dictionary", "metrics.jsonl", "training.json"}
    b = fit(rows, folder=tmp_path, **SHORT)
    assert torch.equal(a.decoder_directions(), b.decoder_directions())
    with pytest.raises(UnweaveError, match=r"k: there 2, now 3.*another folder"):
        fit(rows, folder=tmp_path, **{**SHORT, "k": 3})


def test_health_is_logged(rows: np.ndarray, caplog: pytest.LogCaptureFixture) -> None:
    fit(rows, n_features=16, k=2, n_rows=64, batch_size=32)
    assert any("only 2 steps" in record.message for record in caplog.records)
    assert {record.name for record in caplog.records} == {"unweave"}


def nan(rows: np.ndarray, at: int) -> np.ndarray:
    broken = rows.copy()
    broken[at, 3] = np.nan
    return broken


@pytest.mark.parametrize(
    ("data", "options", "message"),
    [
        (lambda x: x[0], {}, r"expected shape \(n, d\), found \(8,\)"),
        (lambda x: x.reshape(50, 10, 8), {}, r"found \(50, 10, 8\).*reshape"),
        (lambda x: x[:0], {}, "at least one row"),
        (lambda x: [], {}, "at least one row"),
        (lambda x: iter([]), {}, "at least one row"),
        (lambda x: iter([]), {"n_rows": 100}, "at least one row"),
        (lambda x: nan(x, 77), {}, "data: row 77 holds NaN or infinity"),
        (lambda x: [x, nan(x, 7)], {}, "data: row 507 holds NaN"),
        (lambda x: iter([x, nan(x, 7)]), {"n_rows": 5000, "batch_size": 32}, "array 1: row 7 holds NaN"),
        (lambda x: x * np.inf, {}, "row 0 holds NaN or infinity"),
        (lambda x: x * 0, {}, "all zero"),
        (lambda x: x.astype(complex), {}, "real numbers"),
        (lambda x: [x, x[:, :5]], {}, "array 1 has rows of width 5, the first has 8"),
        (lambda x: "rows.npy", {}, r"expected a \(n, d\) array.*found str"),
        (lambda x: 3, {}, r"expected a \(n, d\) array.*found int"),
        (lambda x: np.array([["a", "b"]]), {}, "real numbers"),
        (lambda x: x, {"k": 17, "n_features": 16}, "k must be at most n_features = 16"),
        (lambda x: x, {"k": 0}, "greater than 0"),
        (lambda x: x, {"arch": "topkk"}, "did you mean 'topk'"),
        (lambda x: x, {"batchsize": 3}, "unknown option 'batchsize'.*did you mean 'batch_size'"),
        (lambda x: x, {"n_row": 3}, "unknown option 'n_row'"),
        (lambda x: x, {"arch": "relu", "k": 3}, "'relu' has no k.*l1_coefficient"),
        (lambda x: x, {"arch": "jumprelu", "k": 3, "target_l0": 4}, "say the same thing twice"),
        (lambda x: x, {"n_rows": 5, "epochs": 2}, "both set the length"),
        (lambda x: iter([x]), {"epochs": -1}, "above 0"),
        (lambda x: x, {"batch_size": 10_000}, "batch_size"),
        (lambda x: x, {"batch_size": "many"}, "batch_size"),
        (lambda x: x, {"device": "toaster"}, "device 'toaster' is not to be had"),
        (lambda x: x, {"target": np.ones((3, 8))}, "a target for each of the 500 rows, found 3"),
        (lambda x: iter([x]), {"target": np.ones((3, 8))}, "let the iterator yield"),
        (lambda x: ArraySource(x), {"target": np.ones((500, 8))}, "own target"),
    ],
)
def test_bad_input(rows: np.ndarray, data: Any, options: dict, message: str) -> None:
    with pytest.raises(UnweaveError, match=message):
        fit(data(rows), **options)
