"""saev's files of every schema: a line of JSON and then a torch archive, against the equations of their time."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from unweave import formats
from unweave.errors import UnweaveError

D, M, K = 8, 24, 4


@pytest.fixture
def w() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    sizes = {"W_enc": (D, M), "b_enc": (M,), "W_dec": (M, D), "b_dec": (D,)}
    return {name: torch.randn(*size, generator=g) for name, size in sizes.items()}


def save(place: Path, header: Any, state: Any) -> Path:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    (place / "sae.pt").write_bytes(json.dumps(header).encode() + b"\n" + buffer.getvalue())
    return place / "sae.pt"


def act(u: Tensor, activation: str, threshold: float) -> Tensor:
    if activation == "BatchTopK" and threshold >= 0:
        return u * (u > threshold)
    if activation == "Relu":
        return u.relu()
    best = u.topk(K, dim=1)
    return torch.zeros_like(u).scatter(1, best.indices, best.values.relu())


def headers(schema: str, activation: str) -> dict[str, Any]:
    model = {"d_model": D, "d_sae": M} if schema in "345" else {"d_vit": D, "exp_factor": M // D, "seed": 0}
    params: dict[str, Any] = {} if activation == "Relu" else {"top_k": K}
    if schema == "0":
        return {**model, "sparsity_coeff": 0.1, "ghost_grads": False}
    if schema == "1A":
        return {"schema": 1, "cfg": {**model, **params}, "cls": activation, "lib": "0.1.0", "commit": "abc"}
    if schema == "1B":
        cls = {"cls": "SparseAutoencoderConfig"}
    else:
        cls = {}
    if schema == "5":
        params["sparsity"] = {"cls": "NoSparsity", "params": {}}
    cfg = {**model, "activation": {"cls": activation, "params": params}}
    return {"schema": int(schema[0]), "cfg": cfg, "lib": "0.2.0", "commit": "abc", **cls}


CASES = [("0", "Relu")] + [(s, a) for s in ("1A", "1B", "2", "3", "4", "5") for a in ("Relu", "TopK", "BatchTopK")]


@pytest.mark.parametrize(("schema", "activation"), CASES)
@pytest.mark.parametrize("subtract", [False, True])
def test_every_schema(tmp_path: Path, w: dict[str, Tensor], schema: str, activation: str, subtract: bool) -> None:
    threshold = 0.9 if schema in "345" else -1.0
    state = {**w, "activation.threshold": torch.tensor(threshold)} if activation == "BatchTopK" and threshold > 0 else w
    file = save(tmp_path, headers(schema, activation), state)
    options: dict[str, Any] = {"subtract": subtract} if schema == "1A" else {}
    subtracts = options.get("subtract", schema == "0")  # elsewhere the option changes nothing
    x = 1.5 * torch.randn(40, D, generator=torch.Generator().manual_seed(1)) + 0.2
    z = act((x - w["b_dec"] * subtracts) @ w["W_enc"] + w["b_enc"], activation, threshold)
    dictionary = formats.load(file, **options)
    with torch.no_grad():
        torch.testing.assert_close(dictionary.encode(x).dense(), z, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(dictionary(x), z @ w["W_dec"] + w["b_dec"], rtol=1e-4, atol=1e-5)
    facts = formats.inspect(file, **options)
    assert (facts.format, facts.d_in, facts.d_out, facts.n_features) == ("saev", D, D, M)
    assert (facts.architecture, facts.k) == (dictionary.name, None if activation == "Relu" else K)
    if schema == "1A":
        with pytest.raises(UnweaveError, match="give subtract=true or subtract=false"):
            formats.load(file)


def test_a_threshold_that_was_never_set_passes_what_is_positive(tmp_path: Path, w: dict[str, Tensor]) -> None:
    file = save(tmp_path, headers("5", "BatchTopK"), {**w, "activation.threshold": torch.tensor(0.0)})
    x = torch.randn(20, D, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(formats.load(file).encode(x).dense(), (x @ w["W_enc"] + w["b_enc"]).relu())


def test_what_cannot_be_loaded_is_named(tmp_path: Path, w: dict[str, Tensor]) -> None:
    with pytest.raises(UnweaveError, match="schema 6 is not known"):
        formats.load(save(tmp_path, {**headers("5", "Relu"), "schema": 6}, w))
    with pytest.raises(UnweaveError, match="'AbsBatchTopK' is not known, or depends on the whole batch"):
        formats.load(save(tmp_path, headers("4", "AbsBatchTopK"), w))
    with pytest.raises(UnweaveError, match="says a width of 9, the weights have 8"):
        formats.load(save(tmp_path, {**headers("0", "Relu"), "d_vit": 9}, w))


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_after_the_line_is_executed(tmp_path: Path, w: dict[str, Tensor]) -> None:
    mark = tmp_path / "ran"
    with pytest.raises(UnweaveError, match="refused"):
        formats.load(save(tmp_path, headers("5", "Relu"), {**w, "more": Bomb(mark)}), format="saev")
    line = json.dumps(headers("5", "Relu")).encode() + b"\n"
    (tmp_path / "sae.pt").write_bytes(line + pickle.dumps(Bomb(mark)))
    with pytest.raises(UnweaveError, match="not an archive as torch"):
        formats.load(tmp_path / "sae.pt", format="saev")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"schema": 5, "cfg": {}\n', "expected a line of JSON"),
        (b'{"schema": 5, "cfg": {}}', "expected a line of JSON"),
        (b'{"schema": ' + b"1" * (1 << 20), "has no end within"),
        (b'{"a": ' * 100_000 + b"\n", "expected a line of JSON"),
        (b'{"schema": "five", "cfg": {}}\n', "expected 'schema' to be a whole number"),
        (b'{"schema": 5, "cfg": []}\n', "expected 'cfg' to be keys and values"),
    ],
)
def test_a_broken_line_is_said_to_be_one(tmp_path: Path, w: dict[str, Tensor], line: bytes, says: str) -> None:
    buffer = io.BytesIO()
    torch.save(w, buffer)
    (tmp_path / "sae.pt").write_bytes(line + buffer.getvalue())
    with pytest.raises(UnweaveError, match=says):
        formats.load(tmp_path / "sae.pt", format="saev")
    if says.startswith("expected '"):
        assert formats.recognised(tmp_path / "sae.pt") == "saev"


def test_a_file_cut_short_anywhere_gives_one_error(tmp_path: Path, w: dict[str, Tensor]) -> None:
    whole = save(tmp_path, headers("5", "Relu"), w).read_bytes()
    for n in range(1, len(whole), len(whole) // 60):
        (tmp_path / "sae.pt").write_bytes(whole[:n])
        with pytest.raises(UnweaveError):
            formats.load(tmp_path / "sae.pt", format="saev")
