"""docs/activation-store.md promises ten lines that read a store without unweave: run them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch

from unweave.activations import harvest

PAGE = Path(__file__).parents[2] / "docs" / "activation-store.md"


def test_the_ten_lines_read_a_store(tmp_path, fake_source, monkeypatch):
    store = harvest(fake_source(), tmp_path / "store", n_rows=300, shard_rows=100)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    assert "unweave" not in code
    assert len(code.strip().splitlines()) <= 10
    shown = []
    monkeypatch.chdir(tmp_path)
    exec(code, {"print": lambda *values: shown.append(values)})
    meta = store.meta(slice(None))
    first = 0
    for (shape, document, position, token), n in zip(shown, store.shard_sizes, strict=True):
        assert tuple(shape) == (n, store.d_in)
        assert torch.equal(document, meta.document[first : first + 3])
        assert position.tolist() == meta.position[first : first + 3].tolist()
        assert torch.equal(token, meta.token[first : first + 3])
        first += n


def test_the_tables_name_what_is_really_there(tmp_path, fake_source):
    from safetensors.torch import load_file

    harvest(fake_source(d_target=5), tmp_path, n_rows=300, shard_rows=100)
    text = PAGE.read_text(encoding="utf-8")
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    for name in [*manifest, *load_file(tmp_path / "shard-00000.safetensors")]:
        assert f"`{name}`" in text, name
    assert all(key in text for key in manifest["shards"][0])
