"""Hostile and broken files: each gives one clear error, and executes nothing."""

from __future__ import annotations

import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from unweave import formats
from unweave.errors import UnweaveError
from unweave.formats.containers import open_tensors, read_settings, unpack

GOLDEN = Path(__file__).parent / "golden"


def safetensors(header: dict | list | str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(start: int, stop: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def zipped(files: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def npy(array: np.ndarray, **options: bool) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


class Bomb:
    """Unpickling it writes a file: if that file is ever there, something ran."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def torch_file(thing: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    return buffer.getvalue()


def twice(path: Path) -> bytes:
    """An archive whose directory names one file's bytes twice."""
    whole = zipped({"a.npy": npy(np.ones(300))})
    end = whole.rindex(b"PK\x05\x06")
    start = struct.unpack("<I", whole[end + 16 : end + 20])[0]
    entry = whole[start:end]
    other = entry.replace(b"a.npy", b"b.npy")
    tail = bytearray(whole[end:])
    struct.pack_into("<HHI", tail, 8, 2, 2, 2 * len(entry))
    return whole[:start] + entry + other + bytes(tail)


def expanded() -> torch.Tensor:
    return torch.ones(1).expand(1 << 20, 1 << 20)


# Name, bytes, and what the error has to say.
FILES: dict[str, tuple[Callable[[Path], bytes], str]] = {
    "empty.safetensors": (lambda p: b"", "cut short or damaged"),
    "short.safetensors": (lambda p: b"\x10\0\0", "cut short"),
    "long_header.safetensors": (lambda p: safetensors({}, length=1 << 60), "claims"),
    "not_json.safetensors": (lambda p: safetensors("{" + "[" * 40), "not JSON"),
    "deep.safetensors": (lambda p: safetensors('{"a":' + "[" * 100_000), "not JSON"),
    "list.safetensors": (lambda p: safetensors([1]), "not an object"),
    "no_entry.safetensors": (lambda p: safetensors({"a": 3}), "no description"),
    "dtype.safetensors": (lambda p: safetensors({"a": tensor(0, 4, [1], "OBJECT")}, b"0" * 4), "dtype"),
    "negative.safetensors": (lambda p: safetensors({"a": tensor(0, 4, [-1])}, b"0" * 4), "natural numbers"),
    "true.safetensors": (lambda p: safetensors({"a": tensor(0, 4, [True])}, b"0" * 4), "natural numbers"),
    "absurd.safetensors": (lambda p: safetensors({"a": tensor(0, 4, [1 << 40, 1 << 40])}, b"0" * 4), "of shape"),
    "overlap.safetensors": (
        lambda p: safetensors({"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])}, b"0" * 12),
        "overlaps",
    ),
    "gap.safetensors": (lambda p: safetensors({"a": tensor(4, 8, [1])}, b"0" * 8), "gap"),
    "truncated.safetensors": (
        lambda p: safetensors({"a": tensor(0, 400, [100])}, b"0" * 40),
        "need 400 bytes, it has 40",
    ),
    "more.safetensors": (lambda p: safetensors({"a": tensor(0, 4, [1])}, b"0" * 40), "need 4 bytes, it has 40"),
    "twins.safetensors": (lambda p: safetensors('{"a": 1, "a": 2}'), "twice"),
    "meta.safetensors": (lambda p: safetensors({"__metadata__": {"a": 1}}), "__metadata__"),
    "objects.npz": (
        lambda p: zipped({"a.npy": npy(np.array([Bomb(p / "ran")], dtype=object), allow_pickle=True)}),
        "Python objects",
    ),
    "slip.npz": (lambda p: zipped({"../../a.npy": npy(np.ones(3))}), "leads out"),
    "absolute.npz": (lambda p: zipped({"/tmp/a.npy": npy(np.ones(3))}), "leads out"),
    "bomb.npz": (lambda p: zipped({"a.npy": npy(np.zeros(1 << 22))}, zipfile.ZIP_DEFLATED), "would grow"),
    "overlap.npz": (twice, "overlaps"),
    "cut.npz": (lambda p: zipped({"a.npy": npy(np.ones(300))})[:-200], "not a whole zip"),
    "shape.npz": (lambda p: zipped({"a.npy": npy(np.ones(3)).replace(b"(3,)", b"(9,)")}), "needs 72 bytes, it has 24"),
    "huge.npz": (
        lambda p: zipped({"a.npy": npy(np.ones(3)).replace(b"(3,), }      ", b"(10**40,), } ")}),
        "not a numpy",
    ),
    "call.npz": (lambda p: zipped({"a.npy": npy(np.ones(3)).replace(b"(3,)", b"f(3)")}), "not a numpy array"),
    "other.npz": (lambda p: zipped({"a.txt": b"words"}), "without tensors"),
    "words.npz": (lambda p: zipped({"a.npy": npy(np.array(["a"]))}), "dtype"),
    "bomb.pt": (lambda p: torch_file({"a": Bomb(p / "ran")}), "more than tensors"),
    "module.pt": (lambda p: torch_file(torch.nn.Linear(2, 2)), "more than tensors"),
    "bare.pt": (lambda p: pickle.dumps(Bomb(p / "ran")), "not an archive"),
    "legacy.bin": (lambda p: pickle.dumps({"a": 1}), "can run any"),
    "cut.pt": (lambda p: torch_file({"a": torch.ones(500)})[:-300], "not a whole zip"),
    "deflated.pt": (lambda p: zipped({"x/data.pkl": pickle.dumps({})}, zipfile.ZIP_DEFLATED), "compressed"),
    "expanded.pt": (lambda p: torch_file({"a": expanded()}), "claims the shape"),
    "sparse.pt": (lambda p: torch_file({"a": torch.eye(3).to_sparse()}), "expected an ordinary tensor|more than"),
    "empty.pt": (lambda p: b"", "not an archive"),
}


@pytest.mark.parametrize("name", sorted(FILES))
@pytest.mark.filterwarnings("ignore")  # numpy and torch warn while the bad files are made
def test_one_clear_error_and_nothing_runs(name: str, tmp_path: Path) -> None:
    make, says = FILES[name]
    (tmp_path / name).write_bytes(make(tmp_path))
    with pytest.raises(UnweaveError, match=says):
        open_tensors(tmp_path / name)
    with pytest.raises(UnweaveError):
        formats.load(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_the_bombs_are_live(tmp_path: Path) -> None:
    """Else the tests above would prove nothing."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "ran")))
    assert (tmp_path / "ran").is_dir()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_reported_by_tensor(bad: float, tmp_path: Path) -> None:
    weights = {
        "W_enc": torch.ones(8, 24),
        "W_dec": torch.ones(24, 8),
        "b_enc": torch.zeros(24),
        "b_dec": torch.zeros(8),
    }
    weights["W_dec"][3, 2:4] = bad
    save_file(weights, tmp_path / "sae_weights.safetensors")
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "standard", "d_in": 8, "d_sae": 24}))
    assert formats.inspect(tmp_path).n_features == 24  # which needs no weights
    with pytest.raises(UnweaveError, match=r"2 of the 192 values of 'W_dec' are NaN or infinite"):
        formats.load(tmp_path)


SETTINGS = {
    "list.json": ("[1]", "top level"),
    "cut.json": ('{"k": ', "not valid JSON"),
    "deep.json": ("[" * 100_000, "not valid JSON"),
    "digits.json": ('{"k": ' + "9" * 5000 + "}", "not valid JSON"),
    "laughs.yaml": ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "aliases"),
    "python.yaml": ("a: !!python/object/apply:os.mkdir [ran]\n", "not valid YAML"),
    "large.json": ('{"a": "' + "x" * (1 << 22) + '"}', "at most"),
}


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_settings_of_the_wrong_kind(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text, says = SETTINGS[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(UnweaveError, match=says):
        read_settings(tmp_path / name)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"k": "4"}, "expected 'k' to be a number, found '4'"),
        ({"k": True}, "expected 'k' to be a number, found True"),
        ({"k": 0}, "k"),
        ({"k": 25}, "k must be at most"),
        ({"metadata": [1]}, "expected 'metadata' to be keys and values, found a list of 1"),
        ({"architecture": 3}, "expected 'architecture' to be text, found 3"),
        ({"architecture": "magic"}, "'magic' is not known"),
        ({"apply_b_dec_to_input": "no"}, "true or false"),
        ({"d_in": 9}, "cfg.json says d_in = 9, the weights have 8"),
        ({"d_sae": 1 << 50}, "the weights have 24"),
    ],
)
def test_a_setting_of_the_wrong_type_is_named(changes: dict, says: str, tmp_path: Path) -> None:
    case = GOLDEN / "saelens" / "topk"
    values = json.loads((case / "cfg.json").read_text()) | changes
    (tmp_path / "cfg.json").write_text(json.dumps(values))
    (tmp_path / "sae_weights.safetensors").write_bytes((case / "sae_weights.safetensors").read_bytes())
    with pytest.raises(UnweaveError, match=says):
        formats.load(tmp_path)


def test_a_tensor_of_the_wrong_shape_is_named(tmp_path: Path) -> None:
    save_file(
        {"W_enc": torch.ones(8, 24), "W_dec": torch.ones(24, 8), "b_enc": torch.zeros(23), "b_dec": torch.zeros(8)},
        tmp_path / "sae_weights.safetensors",
    )
    (tmp_path / "cfg.json").write_text('{"architecture": "standard"}')
    with pytest.raises(UnweaveError, match=r"expected 'b_enc' to be floats of shape \(24,\), found F32 of \(23,\)"):
        formats.load(tmp_path)


# ---- archives -----------------------------------------------------------------------------------------------------


def archive_of(case: Path, path: Path, prefix: str) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in case.iterdir():
            archive.write(file, f"{prefix}/{file.name}")


def test_a_dictionary_inside_a_zip(tmp_path: Path) -> None:
    archive_of(
        GOLDEN / "dictionary_learning" / "random_AutoEncoder", tmp_path / "old.zip", "pythia/mlp_out_layer0/10_24"
    )
    expected = formats.load(GOLDEN / "dictionary_learning" / "random_AutoEncoder").state_dict()
    for thing in ("old.zip", "old.zip/pythia/mlp_out_layer0/10_24"):
        found = formats.load(tmp_path / thing).state_dict()
        assert all(torch.equal(found[name], value) for name, value in expected.items())
    with pytest.raises(UnweaveError, match="no 'pythia/other'"):
        formats.load(tmp_path / "old.zip" / "pythia/other")


def test_a_slip_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "evil.zip").write_bytes(zipped({"../evil": b"x", "good": b"y"}))
    (tmp_path / "out").mkdir()
    with pytest.raises(UnweaveError, match="leads out"):
        unpack(tmp_path / "evil.zip", tmp_path / "out")
    assert not (tmp_path / "evil").exists()
    assert not list((tmp_path / "out").iterdir())


def test_links_in_archives_are_refused(tmp_path: Path) -> None:
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "links.zip", "w") as archive:
        archive.writestr(info, "/etc")
    with pytest.raises(UnweaveError, match="a link or a device"):
        formats.load(tmp_path / "links.zip")


def test_several_dictionaries_are_listed(tmp_path: Path) -> None:
    with pytest.raises(UnweaveError, match=r"name one of .*jumprelu"):
        formats.load(GOLDEN / "saelens")


# ---- fuzz ---------------------------------------------------------------------------------------------------------

SEEDS = {
    "weights.safetensors": lambda: (GOLDEN / "saelens" / "jumprelu" / "sae_weights.safetensors").read_bytes(),
    "params.npz": lambda: zipped({"W_enc.npy": npy(np.ones((4, 6), "<f4")), "b.npy": npy(np.ones(3))}),
    "packed.npz": lambda: zipped({"W_enc.npy": npy(np.ones((4, 6), "<f4"))}, zipfile.ZIP_DEFLATED),
    "ae.pt": lambda: torch_file({"a": torch.ones(2, 3), "k": torch.tensor(3), "c": {"n": 4, "w": "x"}}),
    "sae.pt": lambda: b'{"schema": 5, "cfg": {}}\n' + torch_file({"W_enc": torch.ones(2, 3)}),
    "cfg.json": lambda: (GOLDEN / "saelens" / "topk" / "cfg.json").read_bytes(),
    "conf.yaml": lambda: b"sae: {k: 3, w: [1, 2]}\nname: &x some\nother: text\n",
}


def mutate(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, cut out, doubled or filled; sizes and counts are hit often, for they stand at both ends."""
    made = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        where = rng.choice(
            (rng.randrange(len(made)), rng.randrange(min(120, len(made))), -rng.randint(1, min(120, len(made))))
        )
        kind = rng.random()
        if kind < 0.5:
            made[where] = rng.choice((0, 255, 127, 128, rng.randrange(256)))
        elif kind < 0.7:
            made[where : where + rng.randint(1, 9)] = bytes(rng.randrange(256) for _ in range(rng.randint(0, 9)))
        elif kind < 0.8:
            del made[where:]
        elif kind < 0.9:
            made[where:where] = made[: rng.randint(1, 60)]
        else:
            made[where : where + 8] = struct.pack("<Q", rng.choice((0, 1 << 31, 1 << 63, (1 << 64) - 1)))
        if not made:
            break
    return bytes(made)


def fuzz(n: int, seed: int, place: Path) -> dict[str, int]:
    rng, outcomes, started = random.Random(seed), {"read": 0, "refused": 0}, time.monotonic()
    seeds = {name: make() for name, make in SEEDS.items()}
    for number in range(n):
        name = list(seeds)[number % len(seeds)]
        path = place / name
        path.write_bytes(mutate(seeds[name], rng))
        before = time.monotonic()
        try:
            if path.suffix in (".json", ".yaml"):
                read_settings(path)
            else:
                for tensor in dict(open_tensors(path)).values():
                    assert tensor.numel() < 1 << 20
            outcomes["read"] += 1
        except UnweaveError:
            outcomes["refused"] += 1
        assert time.monotonic() - before < 20, f"input {number} of seed {seed} took too long"
    outcomes["seconds"] = round(time.monotonic() - started)
    return outcomes


@pytest.mark.filterwarnings("ignore")
def test_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    outcomes = fuzz(1200, 0, tmp_path)
    assert outcomes["read"] > 50
    assert outcomes["refused"] > 600


# Measured: 5,014 read, 94,986 refused, none that crashed, hung or took long.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_hundred_thousand_damaged_files_are_read_or_refused(tmp_path: Path) -> None:
    outcomes = fuzz(100_000, 1, tmp_path)
    assert outcomes["read"] > 2_000
    assert outcomes["refused"] > 50_000


# ---- headers alone ------------------------------------------------------------------------------------------------

# Measured: 2 to 6 ms and under 1 MB for both, the file being a hole of 5 GB.
_INSPECT = """
import resource, sys, time
from unweave import formats
formats.inspect(sys.argv[2])  # imports what is imported on first use
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.process_time()
facts = formats.inspect(sys.argv[1])
seconds = time.process_time() - start
print(seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, facts.d_in, facts.n_features)
"""


def inspected(path: Path, small: Path) -> tuple[float, float, int, int]:
    command = [sys.executable, "-c", _INSPECT, str(path), str(small)]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return float(words[0]), float(words[1]), int(words[2]), int(words[3])


def test_five_gigabytes_are_known_from_their_header(tmp_path: Path) -> None:
    d, n_features = 2560, 262_144
    shapes = {"W_enc": [d, n_features], "W_dec": [n_features, d], "b_enc": [n_features], "b_dec": [d]}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name], end = tensor(end, end + size, shape), end + size
    assert end > 5e9
    text = safetensors(header)
    with open(tmp_path / "sae_weights.safetensors", "wb") as file:
        file.write(text)
        file.truncate(len(text) + end)
    (tmp_path / "cfg.json").write_text(json.dumps({"architecture": "standard", "d_in": d, "d_sae": n_features}))
    seconds, megabytes, *sizes = inspected(tmp_path, GOLDEN / "saelens" / "standard")
    assert sizes == [d, n_features]
    assert seconds < 0.3
    assert megabytes < 50
