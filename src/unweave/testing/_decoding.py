"""From codes to outputs."""

from __future__ import annotations

import torch

from unweave.codes import SparseCode
from unweave.errors import UnweaveError
from unweave.kernels.pattern import Pattern
from unweave.testing._case import Case
from unweave.testing._check import ConformanceError, check, require, require_close, require_finite


def _random_code(case: Case, seed: int, n: int = 20) -> SparseCode:
    generator = torch.Generator().manual_seed(seed)
    fires = torch.rand(n, case.n_features, generator=generator) < 0.1
    return SparseCode.from_dense(fires * torch.randn(n, case.n_features, generator=generator).double())


@check(lambda kind: kind.linear_decoder)
def decoder_is_linear(case: Case) -> None:
    """It claims that decode is a product with decoder_directions plus a constant, so that codes superpose."""
    dictionary = case.trained()
    a, b = _random_code(case, 0), _random_code(case, 1)
    with torch.no_grad():
        nothing = dictionary.decode(SparseCode.empty(len(a), case.n_features, torch.float64))
        require_close(
            dictionary.decode(a) + dictionary.decode(b) - nothing,
            dictionary.decode(SparseCode.from_dense(a.dense() + b.dense())),
            "decode(a) + decode(b) - decode(nothing) against decode(a + b)",
        )
        product = a.dense() @ dictionary.decoder_directions() + nothing
        require_close(dictionary.decode(a), product, "decode(a) against a @ decoder_directions + decode(nothing)")


@check()
def decoder_directions_are_rows(case: Case) -> None:
    """decoder_directions is (n_features, d_out), finite, and carries no gradient."""
    directions = case.trained().decoder_directions()
    expected = (case.n_features, case.d)
    require(tuple(directions.shape) == expected, f"expected shape {expected}, found {tuple(directions.shape)}")
    require(not directions.requires_grad, "expected a tensor without gradient (detach it)")
    require_finite(directions, "decoder_directions")


@check()
def zeros_in_a_code_mean_nothing(case: Case) -> None:
    """An explicit zero in a code decodes like no entry, and so does a code with no entry at all."""
    dictionary, code = case.trained(), _random_code(case, 0)
    with torch.no_grad():
        spare = [int((code.dense()[i] == 0).nonzero()[0]) for i in range(len(code))]
        indices = torch.cat([torch.cat([row.indices, row.indices.new_tensor([at])]) for row, at in zip(code, spare)])
        values = torch.cat([torch.cat([row.values, row.values.new_zeros(1)]) for row in code])
        offsets = code.offsets + torch.arange(len(code) + 1)
        padded = SparseCode.from_pattern(Pattern(offsets, indices, code.n_features), values)
        require_close(dictionary.decode(padded), dictionary.decode(code), "decode with explicit zeros")
        nothing = dictionary.decode(SparseCode.empty(3, case.n_features, torch.float64))
    require(tuple(nothing.shape) == (3, case.d), f"decode of no entries: found shape {tuple(nothing.shape)}")
    require_finite(nothing, "decode of no entries")


@check()
def refuses_codes_of_another_size(case: Case) -> None:
    """A code of another number of features is refused by an UnweaveError."""
    try:
        case.trained().decode(SparseCode.empty(2, case.n_features + 1, torch.float64))
    except UnweaveError:
        return
    raise ConformanceError(f"decode took a code of {case.n_features + 1} features for one of {case.n_features}")
