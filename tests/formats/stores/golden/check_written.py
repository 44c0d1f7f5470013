"""The reverse of ``make.py``: what unweave writes, delphi reads, and makes the same examples of it as of its own.

Run where delphi is installed, with unweave on the path::

    PYTHONPATH=src python tests/formats/stores/golden/check_written.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from make import HERE, absent  # pyright: ignore[reportMissingImports]

from unweave.batch import ActivationBatch, Items
from unweave.codes import SparseCode
from unweave.formats.stores import open_store, write_latents


class Words:
    """A tokenizer, as far as delphi needs one: every id is a word."""

    def batch_decode(self, tokens: Any) -> list[str]:
        return [f" w{int(token)}" for token in tokens]

    def decode(self, tokens: Any) -> str:
        return "".join(self.batch_decode(tokens))


def examples(raw: Path) -> dict[int, list[tuple]]:
    """What delphi's dataset gives for each latent: examples, frequencies, samples for explainers and scorers."""
    from delphi.config import ConstructorConfig, SamplerConfig
    from delphi.latents import LatentDataset

    sampler = SamplerConfig(n_examples_train=4, n_examples_test=4, n_quantiles=2)
    constructor = ConstructorConfig(min_examples=2, n_non_activating=2, non_activating_source="random")
    dataset = LatentDataset(raw, sampler, constructor, tokenizer=Words(), modules=["layers.1"])  # type: ignore[arg-type]
    found = {}
    for record in dataset:
        shown = [(e.tokens.tolist(), e.activations.tolist()) for e in (*record.examples, *record.train)]
        found[record.latent.latent_index] = [*shown, record.per_token_frequency, record.per_context_frequency]
    return found


def main() -> None:
    absent("sentence_transformers", "SentenceTransformer")
    absent("faiss")
    with tempfile.TemporaryDirectory() as temporary:
        theirs, ours = Path(temporary) / "theirs" / "layers.1", Path(temporary) / "ours" / "layers.1"
        theirs.mkdir(parents=True)
        for path in (HERE / "delphi" / "raw" / "layers.1").iterdir():
            if path.name != "expected.safetensors":  # their reader takes every file for a split
                (theirs / path.name).write_bytes(path.read_bytes())
        latents: Any = open_store(theirs)
        write_latents(ours, latents.batches(), latents.n_features, model="tiny", n_splits=3)
        for path in sorted(theirs.glob("*.safetensors")):
            assert (ours / path.name).is_file(), path.name
        expected, found = examples(theirs.parent), examples(ours.parent)
        assert expected == found
        assert len(found) > 20
        print(f"delphi: the same examples of {len(found)} latents from its own files and from unweave's")

        ragged = ragged_codes()
        write_latents(Path(temporary) / "ragged" / "layers.1", [(ragged.batch, ragged.code)], 300, n_splits=7)
        print(f"delphi: examples of {len(examples(Path(temporary) / 'ragged'))} latents from items of unequal length")


def ragged_codes() -> SimpleNamespace:
    """Items of 3 to 60 tokens, the first of each without a row; some splits stay empty."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(3, 61, (40,), generator=generator)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    n = int(offsets[-1])
    items = Items(
        torch.randint(0, 40, (n,), generator=generator, dtype=torch.int32),
        offsets,
        torch.arange(40),
        torch.zeros(40, dtype=torch.int32),
    )
    has_row = torch.ones(n, dtype=torch.bool)
    has_row[offsets[:-1]] = False
    row_token = has_row.nonzero().flatten()
    dense = torch.zeros(len(row_token), 300)
    dense[:, :40] = torch.rand(len(row_token), 40, generator=generator).sub(0.8).relu()
    rows = torch.empty(len(row_token), 0)
    return SimpleNamespace(batch=ActivationBatch(rows, rows, items, row_token), code=SparseCode.from_dense(dense))


if __name__ == "__main__":
    main()
