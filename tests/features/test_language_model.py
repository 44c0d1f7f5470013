"""A store built from a real model's activations, with its tokenizer and its output head."""

from __future__ import annotations

import pytest
import torch

from unweave.dictionaries import build
from unweave.features import build_features
from unweave.sources import LanguageModel, TextSource, read_documents


@pytest.fixture(scope="module")
def parts(tiny_model, corpus):
    pytest.importorskip("transformers")
    model = LanguageModel.load(str(tiny_model), dtype="float32")
    source = TextSource(model, read_documents(str(corpus)), "layers.1", context_size=32, max_tokens=3000)
    torch.manual_seed(0)
    return model, source, build("topk", source.d_in, 64, k=4).eval()


def test_a_store_of_a_language_model(parts, tmp_path):
    model, source, dictionary = parts
    batches = list(source.batches())
    store = build_features(tmp_path / "f", dictionary, batches, token_bytes=model.token_bytes(), unembed=model.unembed)
    rows = torch.cat([batch.input for batch in batches])
    assert store.n_rows == len(rows)
    dense = dictionary.encode(rows.float()).dense().detach()
    assert [f.n_firing for f in store] == (dense != 0).sum(0).tolist()

    feature = store[int(dense.abs().amax(0).argmax())]
    assert feature.max_value == pytest.approx(float(dense.abs().max()))
    effect = model.unembed(dictionary.decoder_directions()[[feature.index]])[0]
    assert [v for _, v in feature.positive_logits] == pytest.approx(effect.topk(10).values.tolist(), rel=1e-4)

    # The tokenizer itself reads each context as the same text.
    context = feature.top[0]
    a = int(store.items.offsets[context.item])
    first = a + context.position - int(store.items.start[context.item]) - context.peak
    ids = store.items.tokens[first : first + len(context.tokens)].tolist()
    assert context.text.strip("�") == model.tokenizer.decode(ids).strip("�")
