"""JoinedSource: rows of several sources over the same text, side by side, and a refusal where the text differs."""

from __future__ import annotations

import pytest
import torch

import unweave
from unweave.activations import harvest
from unweave.errors import UnweaveError
from unweave.sources import ArraySource, Documents, JoinedSource, TextSource

OPTIONS = {"context_size": 24, "batch_tokens": 200, "max_norm_ratio": 1.2}  # so low that sites differ in their rows


def places(batches) -> dict[tuple[int, int], torch.Tensor]:
    return {
        (int(document), int(position)): row
        for batch in batches
        for document, position, row in zip(batch.meta.document, batch.meta.position, batch.input)
    }


def test_every_token_with_a_row_in_all_has_one(model, texts):
    first, second = (TextSource(model, texts, site, **OPTIONS) for site in ("layers.2", "layers.0.mlp"))
    joined = JoinedSource([first, second])
    a, b, both = places(first.batches()), places(second.batches()), places(joined.batches())
    assert both.keys() == a.keys() & b.keys()
    assert a.keys() != b.keys()
    for place, row in both.items():
        assert torch.equal(row, torch.cat([a[place], b[place]]))
    assert len(places(joined.batches(2))) < len(both)
    told = joined.provenance
    assert [part["width"] for part in told["parts"]] == [32, 32]
    assert told["site"] == "layers.2+layers.0.mlp"
    assert told["model"] == first.provenance["model"]
    assert (joined.d_in, joined.d_out, joined.d_side) == (64, 64, None)


def test_stores_join_as_their_sources_do_and_train(model, texts, tmp_path):
    sources = [TextSource(model, texts, site, side="gradient", **OPTIONS) for site in ("layers.0", "layers.2")]
    stores = [harvest(source, tmp_path / str(i), n_rows=400) for i, source in enumerate(sources)]
    joined = JoinedSource(stores)
    assert joined.d_side == 64
    together = harvest(joined, tmp_path / "joined", n_rows=300)
    live = next(JoinedSource(sources).batches())
    assert torch.equal(together[: live.n_rows].side, live.side)
    assert torch.equal(together[: live.n_rows].input, live.input)
    found = unweave.fit(joined, "g_sae", n_features=80, k=4, n_rows=2000, batch_size=100)
    assert found.d_in == 64
    assert unweave.evaluate(found, joined, n_rows=200, n_bootstrap=5, progress=False).metrics["fvu"].value < 1.5


def test_targets_are_joined_where_there_are_any():
    x, y = torch.randn(50, 3), torch.randn(50, 2)
    (batch,) = JoinedSource([ArraySource(x, y), ArraySource(y)]).batches()
    assert torch.equal(batch.input, torch.cat([x, y], 1))
    assert torch.equal(batch.target, torch.cat([y, y], 1))
    found = unweave.fit(JoinedSource([ArraySource(x, y), ArraySource(y)]), "topk", k=1, n_rows=500, batch_size=50)
    assert (found.d_in, found.d_out, found.config.subtract_bias) == (5, 4, False)


def test_other_text_is_refused(model, texts, documents):
    a = TextSource(model, texts, "layers.0", **OPTIONS)
    other = Documents.from_texts([*documents[:39], documents[60]], seed=1)
    for b in (
        TextSource(model, other, "layers.0", **OPTIONS),
        TextSource(model, texts, "layers.0", **{**OPTIONS, "batch_tokens": 100}),
    ):
        with pytest.raises(UnweaveError, match=r"batch \d+ of sources 0 and 1 is not over the same text"):
            list(JoinedSource([a, b]).batches())
    with pytest.raises(UnweaveError, match="two sources or more, found 1"):
        JoinedSource([a])
    with pytest.raises(UnweaveError, match="some of the sources have side inputs"):
        JoinedSource([a, TextSource(model, texts, "layers.0", side="gradient", **OPTIONS)])
