import os
import subprocess

import pytest
import torch

from unweave.errors import UnweaveError
from unweave.files import atomic_path, read_json, read_tensors, write_json, write_tensors, write_text


def test_a_failed_write_leaves_the_old_file_and_no_litter(tmp_path):
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(RuntimeError, match="boom"), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise RuntimeError("boom")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_json_refuses_nan_and_names_broken_files(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    (tmp_path / "cut.json").write_text('{"a": ')
    with pytest.raises(UnweaveError, match=r"cut.json is not valid JSON"):
        read_json(tmp_path / "cut.json")


def test_tensors_cut_short_are_named(tmp_path):
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"a": torch.arange(1000)})
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UnweaveError, match="cut short or damaged"):
        read_tensors(path)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_a_full_disk_is_one_clear_error_and_keeps_the_old_file(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], check=False).returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        write_tensors(disk / "t.safetensors", {"a": torch.arange(10)})
        for write in (
            lambda: write_tensors(disk / "t.safetensors", {"a": torch.zeros(100_000)}),
            lambda: write_text(disk / "u.txt", "x" * 1_000_000),
        ):
            with pytest.raises(UnweaveError, match="No space left"):
                write()
        assert torch.equal(read_tensors(disk / "t.safetensors")["a"], torch.arange(10))
        assert os.listdir(disk) == ["t.safetensors"]
    finally:
        subprocess.run(["umount", disk], check=True)
