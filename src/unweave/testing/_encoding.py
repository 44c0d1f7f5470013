"""From rows to codes."""

from __future__ import annotations

import torch

from unweave.codes import SparseCode
from unweave.dictionaries import Dictionary
from unweave.testing._case import Case, seeded
from unweave.testing._check import (
    check,
    require,
    require_close,
    require_close_code,
    require_finite,
    require_same_bits,
    require_same_code,
)


def require_valid(code: SparseCode, n: int, dictionary: Dictionary, what: str) -> None:
    """A code that holds what :class:`SparseCode` promises; ``encode`` may have built it without checks."""
    require(isinstance(code, SparseCode), f"{what}: expected a SparseCode, found {type(code).__name__}")
    offsets, indices, values, m = code.offsets, code.indices, code.values, code.n_features
    require(m == dictionary.n_features, f"{what}: expected n_features {dictionary.n_features}, found {m}")
    require(len(code) == n, f"{what}: expected {n} rows, found {len(code)}")
    require(offsets.dtype == torch.int64, f"{what}: expected int64 offsets, found {offsets.dtype}")
    require(indices.dtype == torch.int32, f"{what}: expected int32 indices, found {indices.dtype}")
    expected = next(dictionary.parameters()).dtype
    require(values.dtype == expected, f"{what}: expected values of {expected}, found {values.dtype}")
    require(indices.shape == values.shape and indices.ndim == 1, f"{what}: indices and values differ in shape")
    rising = int(offsets[0]) == 0 and int(offsets[-1]) == len(indices) and bool((offsets.diff() >= 0).all())
    require(rising, f"{what}: offsets must rise from 0 to nnz = {len(indices)}, found {offsets.tolist()[:8]} ...")
    inside = ((indices >= 0) & (indices < m)).all()
    require(inside, f"{what}: indices outside [0, {m}): {indices[(indices < 0) | (indices >= m)][:5].tolist()}")
    twice = len(indices) - len((code.rows * m + indices).unique())
    require(twice == 0, f"{what}: {twice} entries name a feature that their row has already")
    require_finite(values.detach(), f"{what}: values")


@check()
def codes_are_valid(case: Case) -> None:
    """Codes hold together: offsets rise, indices are in range and distinct in a row, values finite."""
    x = case.rows()
    for training in (False, True):
        dictionary = case.trained().train(training)
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                mode = f"code {'in training' if training else 'in eval mode'}{'' if grad else ' without gradients'}"
                require_valid(dictionary.encode(x), len(x), dictionary, mode)


@check()
def codes_are_not_all_empty(case: Case) -> None:
    """After some training something fires, and not always everything."""
    code = case.trained().encode(case.rows(256))
    l0 = float(code.l0().double().mean())
    require(l0 > 0, "after 60 steps of training no feature fires at all")
    require(l0 < case.n_features, f"after 60 steps of training every feature fires in every row (L0 {l0:g})")


@check()
def eval_mode_is_deterministic(case: Case) -> None:
    """In eval mode two encodes give the same bits, whatever the state of the random generator."""
    dictionary, x = case.trained(torch.float32), case.rows(dtype=torch.float32)
    with torch.no_grad():
        with seeded(1):
            code, output = dictionary.encode(x), dictionary(x)
        with seeded(2):
            require_same_code(dictionary.encode(x), code, "codes of a second encode")
            require_same_bits(dictionary(x), output, "outputs of a second pass")


@check()
def rows_are_encoded_each_for_itself(case: Case) -> None:
    """In eval mode a row's code and output do not depend on who else is in the batch."""
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-4)):
        dictionary, x = case.trained(dtype), case.rows(dtype=dtype)
        with torch.no_grad():
            code, output = dictionary.encode(x), dictionary(x)
            alone = SparseCode.concatenate([dictionary.encode(row[None]) for row in x[:16]])
            require_close_code(alone, code[:16], "codes of rows encoded alone", tolerance)
            crowd = torch.cat([30 * case.rows(70, dtype, seed=4), x, 0.01 * case.rows(5, dtype, seed=5)])
            require_close_code(dictionary.encode(crowd)[70:118], code, "codes of rows in a crowd", tolerance)
            require_close(dictionary(crowd)[70:118], output, "outputs of rows in a crowd", 10 * tolerance)
            order = torch.randperm(len(x))
            require_close_code(dictionary.encode(x[order]), code[order], "codes of rows in another order", tolerance)


@check()
def gradients_do_not_change_codes(case: Case) -> None:
    """encode gives the same code with gradients on and off: both ways through the code agree."""
    for dtype, tolerance in ((torch.float64, 1e-8), (torch.float32, 1e-4)):
        dictionary, x = case.trained(dtype), case.rows(dtype=dtype)
        with torch.no_grad():
            without, output = dictionary.encode(x), dictionary(x)
        with torch.enable_grad():
            require_close_code(dictionary.encode(x), without, "codes with gradients on", tolerance)
            require_close(dictionary(x), output, "outputs with gradients on", 10 * tolerance)


@check()
def encoding_leaves_no_trace(case: Case) -> None:
    """encode, decode and switching between training and eval mode change nothing that is kept."""
    dictionary, x = case.trained(torch.float32), case.rows(dtype=torch.float32)
    before = {name: t.clone() for name, t in dictionary.state_dict().items()}
    code = dictionary.encode(x)
    for training in (True, False):
        dictionary.train(training)
        require(dictionary.training is training, f"train({training}) left training = {dictionary.training}")
        dictionary(case.rows(dtype=torch.float32, seed=4))
        for name, tensor in dictionary.state_dict().items():
            require_same_bits(tensor, before[name], f"{name} after encoding and decoding, training = {training}")
    require_same_code(dictionary.encode(x), code, "codes after a visit to training mode")


@check()
def inputs_are_left_alone(case: Case) -> None:
    """encode, decode and the loss do not write into what they are given."""
    dictionary, x = case.trained(), case.rows()
    before = x.clone()
    code = dictionary.encode(x)
    require_same_bits(x, before, "rows after encode")
    values = code.values.detach().clone()
    dictionary.decode(code)
    require_same_bits(code.values.detach(), values, "values after decode")
    if case.kind.learns_by_gradient:
        batch = case.batch()
        before = batch.input.clone()
        dictionary.train().loss(batch)
        require_same_bits(batch.input, before, "rows after loss")
