"""The tiny model and some texts for it; tiny models run fastest on one thread."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from unweave.sources import Documents, LanguageModel


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model(tiny_model) -> LanguageModel:
    return LanguageModel.load(str(tiny_model), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def texts(documents) -> Documents:
    return Documents.from_texts(documents[:40], seed=1)
