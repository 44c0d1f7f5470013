"""Rows that are out of the ordinary."""

from __future__ import annotations

import torch
from torch import Tensor

from unweave.dictionaries import TrainingBatch
from unweave.errors import UnweaveError
from unweave.testing._case import Case
from unweave.testing._check import (
    ConformanceError,
    check,
    require,
    require_close,
    require_close_code,
    require_finite,
    require_same_code,
)
from unweave.testing._encoding import require_valid


@check()
def takes_no_rows(case: Case) -> None:
    """No rows give a code of no rows and an output of no rows."""
    dictionary, x = case.trained(), case.rows()[:0]
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            code = dictionary.encode(x)
            require_valid(code, 0, dictionary, "code of no rows")
            output = dictionary.decode(code)
            require(tuple(output.shape) == (0, case.d), f"output of no rows: found shape {tuple(output.shape)}")


def _require_usable(case: Case, x: Tensor, what: str) -> None:
    dictionary = case.trained()
    code = dictionary.encode(x)
    require_valid(code, len(x), dictionary, f"code of {what}")
    output = dictionary.decode(code)
    require(tuple(output.shape) == (len(x), case.d), f"output of {what}: found shape {tuple(output.shape)}")
    require_finite(output, f"output of {what}")
    if not case.kind.learns_by_gradient:
        return
    for model, name in ((dictionary.train(), "after training"), (case.started().double(), "at the start")):
        model.zero_grad()
        loss = model.loss(TrainingBatch(x, x, torch.arange(case.n_features) % 3 == 0, side=case.side(x)))
        require_finite(loss.total.detach(), f"loss of {what} {name}")
        if loss.total.requires_grad:
            loss.total.backward()
        for parameter, tensor in model.named_parameters():
            if tensor.grad is not None:
                require_finite(tensor.grad, f"gradient of {parameter} for {what} {name}")


@check()
def takes_one_row(case: Case) -> None:
    """One row is enough, to encode and to train on."""
    _require_usable(case, case.rows(1), "one row")


@check()
def takes_zero_rows(case: Case) -> None:
    """Rows of zeros give finite codes, outputs, losses and gradients."""
    _require_usable(case, torch.zeros(9, case.d, dtype=torch.float64), "rows of zeros")


@check()
def takes_constant_rows(case: Case) -> None:
    """Rows that are all the same give finite codes, outputs, losses and gradients, and all the same code."""
    x = case.rows(1).expand(8, -1).contiguous()  # eight: their mean has no rounding error
    _require_usable(case, x, "equal rows")
    dictionary = case.trained()
    with torch.no_grad():
        code = dictionary.encode(x)
        require_close_code(code, code[[0] * len(x)], "codes of equal rows")


@check()
def starts_on_any_sample(case: Case) -> None:
    """initialise leaves finite state, also where the sample is one row or all rows are the same."""
    for sample, what in (
        (case.rows(300, torch.float32), "ordinary rows"),
        (case.rows(1, torch.float32), "one row"),
        (case.rows(1, torch.float32).expand(50, -1).contiguous(), "equal rows"),
    ):
        dictionary = case.build().train()
        dictionary.initialise(sample, sample)
        for name, tensor in dictionary.state_dict().items():
            if tensor.is_floating_point():
                require(not bool(tensor.isnan().any()), f"{name} holds NaN after initialise on {what}")


@check()
def takes_rows_of_any_float_type(case: Case) -> None:
    """Rows of another float type, or not contiguous, give the codes of the same rows."""
    dictionary = case.trained(torch.float32)
    with torch.no_grad():
        for dtype in (torch.float64, torch.float16, torch.bfloat16):
            x = case.rows(dtype=torch.float32).to(dtype)
            require_same_code(dictionary.encode(x), dictionary.encode(x.float()), f"codes of {dtype} rows")
        x = case.rows(dtype=torch.float32)
        across = x.T.contiguous().T
        require_close_code(dictionary.encode(across), dictionary.encode(x), "codes of rows not contiguous", 1e-4)
        require_close(dictionary(across), dictionary(x), "outputs of rows not contiguous", 1e-4)


@check()
def refuses_nan_and_infinity(case: Case) -> None:
    """Rows with NaN or infinity are refused by an UnweaveError."""
    dictionary = case.trained()
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = case.rows()
        x[7, 2] = bad
        for training in (False, True):
            try:
                dictionary.train(training).encode(x)
            except UnweaveError:
                continue
            raise ConformanceError(f"encode took a row with {bad} (call check_input first)")


@check()
def refuses_rows_of_another_width(case: Case) -> None:
    """Rows of another width, or that are no rows, are refused by an UnweaveError."""
    dictionary = case.trained()
    for shape in ((4, case.d + 1), (4, case.d - 1), (case.d,), (2, 3, case.d)):
        try:
            dictionary.encode(torch.zeros(shape, dtype=torch.float64))
        except UnweaveError:
            continue
        except Exception as error:
            raise ConformanceError(
                f"encode of shape {shape}: expected an UnweaveError, found {type(error).__name__}: {error} "
                "(call check_input first)"
            ) from None
        raise ConformanceError(f"encode took an input of shape {shape} (call check_input first)")
