"""Atoms that are rows of the data are found again there, with their text."""

from __future__ import annotations

import pytest
import torch

import unweave
from unweave.activations import harvest
from unweave.analysis import atom_sources
from unweave.dictionaries import build
from unweave.errors import UnweaveError
from unweave.sources import ArraySource, LanguageModel, TextSource


@pytest.fixture(scope="module")
def model(tiny_model) -> LanguageModel:
    return LanguageModel.load(str(tiny_model), dtype="float32", device="cpu")


def test_every_atom_of_itda_has_its_text(model, documents, tmp_path) -> None:
    source = TextSource(model, documents[:60], "layers.1", context_size=24, batch_tokens=256)
    store = harvest(source, tmp_path / "store", n_rows=600)
    found = unweave.fit(store, "itda", n_features=64, k=4, tau=0.05, n_rows=store.n_rows, batch_size=100)
    sources = atom_sources(found, store, token_strings=model.token_strings)
    assert len(sources) == int(found.size) > 32
    rows, meta = store.rows(slice(None)).float(), store[:].meta
    atoms = found.decoder_directions()
    for feature, atom in sources.items():
        cosines = torch.nn.functional.cosine_similarity(rows, atoms[feature], dim=1)
        assert float(cosines[atom.row]) > 1 - 1e-5
        assert not bool((cosines[: atom.row] > 1 - 1e-5).any())  # it is the first
        assert (atom.document, atom.position) == (int(meta.document[atom.row]), int(meta.position[atom.row]))
        assert atom.text == model.token_strings([atom.token])[0]
        assert atom.before + atom.text + atom.after in source_text(model, store, atom.row)
        assert str(atom).count("[") >= 1


def source_text(model, store, row: int) -> str:
    batch = store[row : row + 1]
    return "".join(model.token_strings(batch.items.tokens.tolist()))


def test_atoms_that_are_no_rows_are_left_out_and_rows_need_no_tokens() -> None:
    rows = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    dictionary = build("topk", 8, 20, k=2)
    with torch.no_grad():
        dictionary.W_dec[3].copy_(rows[7] * 2)
        dictionary.W_dec[5].copy_(rows[0])
        dictionary.W_dec[6].zero_()
        dictionary.W_dec[9].copy_(-rows[1])  # the other way round is another atom
    found = atom_sources(dictionary, ArraySource(rows, batch_rows=16))
    assert {feature: atom.row for feature, atom in found.items()} == {3: 7, 5: 0}
    assert found[3].text == ""
    assert atom_sources(dictionary, ArraySource(rows), features=[5]).keys() == {5}
    with pytest.raises(UnweaveError, match="expected rows of width 8, as the atoms have, found 4"):
        atom_sources(dictionary, ArraySource(torch.randn(5, 4)))
