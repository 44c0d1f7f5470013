"""Checkpoints on a hub: headers by ranges, values by downloads, and what a hub may do wrong."""

from __future__ import annotations

import io
import json
import os
import struct
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tests.hub import Hub

import unweave
from unweave import formats
from unweave.errors import UnweaveError
from unweave.formats._ranges import BLOCK, RangeFile
from unweave.formats.containers import open_tensors, read_headers

GOLDEN = Path(__file__).parent / "golden"
CASES = [
    "saelens/topk",
    "saelens/jumprelu",
    "sparsify/random/layers.3",
    "dictionary_learning/random_BatchTopKSAE",
    "dictionary_learning/random_MatryoshkaBatchTopKSAE",
    "hypothesaes/random_batch_topk",
    "llamascopium/random_jumprelu",
]


@pytest.fixture
def golden(hub: Hub) -> Hub:
    hub.add("owner/sae", GOLDEN)
    return hub


@pytest.mark.parametrize("case", CASES)
def test_inspect_knows_what_it_knows_of_a_local_folder(case: str, golden: Hub) -> None:
    local, remote = formats.inspect(GOLDEN / case), formats.inspect(f"owner/sae/{case}")
    assert remote.context["revision"] == "c" * 40
    assert replace(remote, context={}) == replace(local, context={})
    assert not any(request.startswith("HEAD") for request in golden.requests)  # nothing was downloaded


@pytest.mark.parametrize("case", CASES)
def test_load_gives_the_same_weights(case: str, golden: Hub) -> None:
    local, remote = unweave.load(GOLDEN / case), unweave.load(f"owner/sae@main/{case}")
    found = remote.state_dict()
    assert all(torch.equal(found[name], value) for name, value in local.state_dict().items())
    downloaded = {request.split("/resolve/")[1] for request in golden.requests if request.startswith("HEAD")}
    assert all(case in name for name in downloaded)
    assert 1 <= len(downloaded) <= 2  # of hundreds of files


def test_what_was_loaded_loads_again_without_the_hub(golden: Hub) -> None:
    first = unweave.load("owner/sae/saelens/topk").state_dict()
    golden.down = True
    again = unweave.load("owner/sae/saelens/topk").state_dict()
    assert all(torch.equal(again[name], value) for name, value in first.items())
    with pytest.raises(UnweaveError, match="the hub does not give it either"):
        unweave.load("owner/sae/saelens/gated")


def sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of float32 of these shapes with nothing in it, which takes no room."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(path, 8 + len(text) + end)


def test_five_gigabytes_are_known_by_their_header(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "repository" / "layer_12"
    folder.mkdir(parents=True)
    d, n = 5120, 131_072
    sparse(folder / "sae_weights.safetensors", {"W_enc": (d, n), "W_dec": (n, d), "b_enc": (n,), "b_dec": (d,)})
    (folder / "cfg.json").write_text(json.dumps({"architecture": "standard", "d_in": d, "d_sae": n}))
    assert (folder / "sae_weights.safetensors").stat().st_size > 5e9
    hub.add("owner/large", tmp_path / "repository")
    facts = formats.inspect("owner/large/layer_12")
    assert (facts.format, facts.d_in, facts.n_features, facts.dtype) == ("saelens", d, n, "F32")
    assert hub.sent < 50_000
    asked = [request for request in hub.requests if "owner/large" in request]
    assert len(asked) == 3  # the list of files, the settings, the header


def test_of_large_archives_little_is_sent(hub: Hub, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    folder = tmp_path / "repository"
    (folder / "torch").mkdir(parents=True)
    (folder / "numpy").mkdir()
    n, d = 6000, 400  # about 20 MB a file
    weights = {"encoder.weight": torch.randn(n, d, generator=generator), "encoder.bias": torch.zeros(n)}
    weights |= {"decoder.weight": torch.randn(d, n, generator=generator), "b_dec": torch.zeros(d)}
    weights |= {"k": torch.tensor(37), "threshold": torch.tensor(0.25)}
    torch.save(weights, folder / "torch" / "ae.pt")
    trainer = {"dict_class": "BatchTopKSAE", "layer": 3, "lm_name": "some/model"}
    (folder / "torch" / "config.json").write_text(json.dumps({"trainer": trainer}))
    arrays = {"W_enc": np.random.default_rng(0).normal(size=(d, n)).astype("f4"), "b_enc": np.zeros(n, "f4")}
    arrays |= {"W_dec": np.ones((n, d), "f4"), "b_dec": np.zeros(d, "f4"), "threshold": np.ones(n, "f4")}
    np.savez(folder / "numpy" / "params.npz", **arrays)
    hub.add("owner/large", folder)
    facts = formats.inspect("owner/large/torch")
    assert (facts.architecture, facts.d_in, facts.n_features, facts.k) == ("batch_topk", d, n, 37)
    assert facts.notes == ()  # its threshold was read: one of -1 would be noted
    facts = formats.inspect("owner/large/numpy/params.npz")
    assert (facts.format, facts.d_in, facts.n_features) == ("gemma-scope", d, n)
    assert hub.sent < 400_000


@pytest.mark.parametrize("compressed", [False, True])
def test_a_header_is_all_that_is_read(compressed: bool, tmp_path: Path) -> None:
    """Of every container the header alone; what is not read is a hole, and reading it would be told by its zeros."""
    rng = np.random.default_rng(0)
    arrays = {f"a{i}": rng.normal(size=(300, 200)) for i in range(5)} | {"k": np.array([5])}
    (np.savez_compressed if compressed else np.savez)(tmp_path / "a.npz", **arrays)
    save_file({name: torch.from_numpy(array) for name, array in arrays.items()}, tmp_path / "a.safetensors")
    torch.save({name: torch.from_numpy(array) for name, array in arrays.items()}, tmp_path / "a.pt")
    for name in ("a.npz", "a.safetensors", "a.pt"):
        data, copy, fetched = (tmp_path / name).read_bytes(), tmp_path / "copy" / name, []

        def fetch(start: int, stop: int, data: bytes = data, fetched: list = fetched) -> tuple[bytes, int]:
            fetched.append(len(data[start:stop]))
            return data[start:stop], len(data)

        copy.parent.mkdir(exist_ok=True)
        copy.touch()
        with RangeFile(copy, fetch) as file:
            read_headers(file, copy)
        found, whole = open_tensors(copy), open_tensors(tmp_path / name)
        assert found.info == whole.info
        assert float(found["k"]) == 5
        assert sum(fetched) <= 14 * BLOCK < len(data) / 5
        assert len(copy.read_bytes()) == len(data)


def test_a_folder_of_folders_is_named(golden: Hub) -> None:
    with pytest.raises(UnweaveError, match=r"owner/sae/saelens holds no dictionary .*name one of .*abstopk"):
        formats.inspect("owner/sae/saelens")
    assert golden.sent < 1_000_000


# ---- what a hub may say no to, or do wrong ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("owner/nothing", "no such repository, or it is private: then log in"),
        ("owner/sae@v9/saelens/topk", "no such revision"),
        ("owner/sae/saelens/nothing", "the repository owner/sae has no 'saelens/nothing'"),
        ("owner/sae/../topk", "the repository owner/sae has no|no file or folder"),
    ],
)
def test_what_is_not_there(name: str, says: str, golden: Hub) -> None:
    with pytest.raises(UnweaveError, match=says):
        formats.inspect(name)


def test_a_private_repository_takes_the_users_token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/sae", GOLDEN, token="hf_right")
    with pytest.raises(UnweaveError, match="log in"):
        formats.inspect("owner/sae/saelens/topk")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert formats.inspect("owner/sae/saelens/topk").architecture == "topk"


def test_a_gated_repository_says_what_to_do(hub: Hub) -> None:
    hub.add("owner/sae", GOLDEN, gated=True)
    with pytest.raises(UnweaveError, match="it is gated: accept its terms"):
        formats.inspect("owner/sae/saelens/topk")
    assert len([request for request in hub.requests if "resolve" in request]) <= 2  # each file once


def test_the_token_stays_with_the_hub(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large files lie on another server, which is told nothing."""
    hub.add("owner/sae", GOLDEN, token="hf_right", ranges="elsewhere")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert formats.inspect("owner/sae/saelens/topk").architecture == "topk"
    asked = [request for request in hub.requests if "/elsewhere/" in request]
    assert len(asked) == 2
    assert not any("with a token" in request for request in asked)
    assert "GET /api/models/owner/sae with a token" in hub.requests


@pytest.mark.parametrize(
    ("ranges", "says"),
    [("moved", "it gave 'bytes 1-"), ("short", "expected an answer of .* bytes from the hub")],
)
def test_a_server_that_sends_something_else(ranges: str, says: str, hub: Hub) -> None:
    hub.add("owner/sae", GOLDEN, ranges=ranges)
    with pytest.raises(UnweaveError, match=says):
        formats.inspect("owner/sae/saelens/topk")


def test_a_server_without_ranges(hub: Hub, tmp_path: Path) -> None:
    """Small files come whole; large ones are not swallowed."""
    folder = tmp_path / "repository"
    for name, d in (("small", 16), ("large", 4096)):
        (folder / name).mkdir(parents=True)
        n = 4 * d
        sparse(
            folder / name / "sae_weights.safetensors", {"W_enc": (d, n), "W_dec": (n, d), "b_enc": (n,), "b_dec": (d,)}
        )
        (folder / name / "cfg.json").write_text(json.dumps({"architecture": "standard", "d_in": d, "d_sae": n}))
    hub.add("owner/sae", folder, ranges="ignored")
    assert formats.inspect("owner/sae/small").d_in == 16
    hub.forget()
    with pytest.raises(UnweaveError, match="gives whole files only, and this is a large one"):
        formats.inspect("owner/sae/large")
    assert hub.sent < 50_000_000 < (folder / "large" / "sae_weights.safetensors").stat().st_size


def test_names_that_lead_out_write_nothing(hub: Hub, tmp_path: Path) -> None:
    repository = hub.add("owner/sae", GOLDEN)
    evil = [tmp_path / name for name in ("one", "two")]
    up = "../" * 40
    repository.names = ["saelens/topk/cfg.json", "saelens/topk/sae_weights.safetensors"]
    repository.names += [f"{up}{evil[0]}", f"saelens/topk/{up}{evil[0]}", str(evil[1]), "a\\..\\b", "", "c:x"]
    assert formats.inspect("owner/sae/saelens/topk").architecture == "topk"  # the others are as if not there
    with pytest.raises(UnweaveError, match="name one of saelens/topk"):
        formats.inspect("owner/sae")
    assert not any(path.exists() for path in evil)
    repository.names = ["cfg.json", "cfg.json/x"]
    with pytest.raises(UnweaveError, match="cannot lie in one folder"):
        formats.inspect("owner/sae")


def zip_bomb() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.npy", bytes(1 << 22))
    return made.getvalue()


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("params.safetensors", struct.pack("<Q", 1 << 60) + b"{" * 100, "its header claims"),
        ("params.safetensors", struct.pack("<Q", 3) + b"{{{", "not JSON"),
        ("params.safetensors", b"", "cut short or damaged"),
        ("params.npz", zip_bomb(), "would grow"),
        ("params.npz", zip_bomb()[:-30], "not a whole zip"),
        ("ae.pt", b"\x80\x02}q\x00.", "not an archive"),
    ],
)
def test_hostile_headers(name: str, data: bytes, says: str, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / name).write_bytes(data)
    hub.add("owner/bad", tmp_path / "repository")
    with pytest.raises(UnweaveError, match=says) as caught:
        formats.inspect(f"owner/bad/{name}")
    assert f"owner/bad/{name}" in str(caught.value)
    assert tempfile.gettempdir() not in str(caught.value)


def test_headers_that_are_too_long_are_not_fetched(tmp_path: Path) -> None:
    fetched = []

    def fetch(start: int, stop: int) -> tuple[bytes, int]:
        fetched.append(stop - start)
        return bytes(stop - start), 1 << 40

    (tmp_path / "a").touch()
    with RangeFile(tmp_path / "a", fetch) as file, pytest.raises(UnweaveError, match="headers of at most"):
        file.read()
    assert sum(fetched) == BLOCK


def test_a_size_that_no_file_has(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    with pytest.raises(UnweaveError, match="which cannot be a file here"):
        RangeFile(tmp_path / "a", lambda start, stop: (b"x", 10**18 - 1 + (1 << 63)))


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    sizes = iter([1 << 20, 1 << 19])
    (tmp_path / "a").touch()
    with RangeFile(tmp_path / "a", lambda start, stop: (bytes(stop - start), next(sizes))) as file:
        file.seek(1 << 18)
        with pytest.raises(UnweaveError, match="try again"):
            file.read(4)


@pytest.mark.parametrize("name", ["owner/../sae", "owner/sae/../../x", "owner/sae/..", "owner/sae/./topk", "owner/.."])
def test_a_name_that_leads_out_is_no_hub_id(name: str, golden: Hub) -> None:
    with pytest.raises(UnweaveError, match="no file or folder at"):
        formats.inspect(name)
    assert not golden.requests
