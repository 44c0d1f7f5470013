"""Dictionaries whose scores are known beforehand, and the tiny model's activations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from unweave.codes import SparseCode
from unweave.dictionaries import Dictionary, DictionaryConfig


class Known(Dictionary):
    """Every coordinate is a feature; ``fn`` says what comes out."""

    name = "known"
    Config = DictionaryConfig

    def __init__(self, d_in: int, fn, d_out: int | None = None) -> None:
        super().__init__(DictionaryConfig(d_in=d_in, d_out=d_out or d_in, n_features=d_in))
        self.fn = fn
        self.anchor = nn.Parameter(torch.zeros(1))

    def encode(self, x: Tensor) -> SparseCode:
        indices = torch.arange(self.d_in).expand(len(x), -1)
        return SparseCode.from_fixed_k(indices, self.check_input(x), self.d_in)

    def decode(self, code: SparseCode) -> Tensor:
        return self.fn(code.values.view(-1, self.d_in))


@pytest.fixture(scope="session")
def known():
    return Known


@pytest.fixture(scope="session", params=["float32", "bfloat16"])
def any_model(request, tiny_model):
    from unweave.sources import LanguageModel

    return LanguageModel.load(str(tiny_model), dtype=request.param, device="cpu")


@pytest.fixture(scope="session")
def model(tiny_model):
    from unweave.sources import LanguageModel

    return LanguageModel.load(str(tiny_model), dtype="float32", device="cpu")


@pytest.fixture
def text_source(documents):
    from unweave.sources import TextSource

    def make(model, site="layers.1", **options):
        options = {"context_size": 32, "batch_tokens": 256, "split": "all", **options}
        return TextSource(model, documents[:40], site, **options)

    return make
