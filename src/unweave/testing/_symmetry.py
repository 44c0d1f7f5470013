"""What must not matter: the order of features, the scale of rows."""

from __future__ import annotations

from dataclasses import replace

import torch

from unweave.codes import SparseCode
from unweave.dictionaries import Dictionary
from unweave.errors import UnweaveError
from unweave.testing._case import Case, seeded
from unweave.testing._check import check, require_close, require_close_code, skip


@torch.no_grad()
def permute(dictionary: Dictionary, order: torch.Tensor) -> None:
    """Put ``order[j]`` in the place of feature ``j``, in every parameter and buffer."""
    for tensor in [*dictionary.parameters(), *dictionary.buffers()]:
        for dimension, size in enumerate(tensor.shape):
            if size == dictionary.n_features:
                tensor.copy_(tensor.index_select(dimension, order.to(tensor.device)))


@check(lambda kind: not kind.ordered_features)
def features_can_be_permuted(case: Case) -> None:
    """With its features in another order, codes are in that order and outputs are the same."""
    dictionary, x = case.trained(), case.rows()
    with torch.no_grad():
        code, output = dictionary.encode(x), dictionary(x)
        order = torch.randperm(case.n_features)
        permute(dictionary, order)
        moved = SparseCode.from_dense(code.dense()[:, order])
        require_close_code(dictionary.encode(x), moved, "codes after permuting the features")
        require_close(dictionary(x), output, "outputs after permuting the features")


@check(lambda kind: kind.learns_by_gradient and not kind.ordered_features)
def loss_does_not_see_the_order_of_features(case: Case) -> None:
    """With its features in another order, the training loss is the same (where it is not a random number)."""
    dictionary, batch = case.trained().train(), case.batch()

    def loss(seed: int) -> torch.Tensor:
        with seeded(seed):
            return dictionary.loss(batch).total.detach()

    before = loss(0)
    if float(loss(1)) != float(before):
        skip("the loss is random")
    order = torch.randperm(case.n_features)
    permute(dictionary, order)
    assert batch.dead is not None
    batch = replace(batch, dead=batch.dead[order])
    require_close(loss(0), before, "loss after permuting the features", 1e-6)


@check()
def fold_scale_keeps_outputs(case: Case) -> None:
    """fold_scale(s) gives a dictionary that does to x / s what it did to x, over s."""
    x = case.rows()
    with torch.no_grad():
        for scale in (1.0, 0.03, 40.0):
            dictionary = case.trained()
            before = dictionary(x)
            dictionary.fold_scale(scale)
            require_close(dictionary(x / scale), before / scale, f"outputs after fold_scale({scale:g})", 1e-5)


@check(lambda kind: kind.scaled_codes)
def fold_scale_puts_codes_in_units_of_the_target(case: Case) -> None:
    """Scale goes into the values, never into the directions."""
    x, plain, scaled = case.rows(), case.trained(), case.trained()
    with torch.no_grad():
        plain.fold_scale(1.0)
        scaled.fold_scale(4.0)
        require_close(
            scaled.decoder_directions(), plain.decoder_directions(), "directions after fold_scale(4), not 1", 1e-5
        )
        code = plain.encode(x)
        quarter = SparseCode.from_pattern(code.pattern, code.values / 4)
        require_close_code(scaled.encode(x / 4), quarter, "codes of x / 4 after fold_scale(4)", 1e-5)


@check()
def fold_scale_takes_a_target_of_its_own(case: Case) -> None:
    """fold_scale(s, t) does to x / s what it did to x, over t, where the target is not the input."""
    x = case.rows()
    for scale, out_scale in ((5.0, 0.5), (0.1, 3.0)):
        try:
            dictionary = case.trained_on_target(7)
        except UnweaveError as error:
            skip(f"it takes no target of its own ({error})")
        with torch.no_grad():
            before = dictionary(x)
            dictionary.fold_scale(scale, out_scale)
            what = f"outputs after fold_scale({scale:g}, {out_scale:g})"
            require_close(dictionary(x / scale), before / out_scale, what, 1e-5)


@check(lambda kind: kind.homogeneous)
def is_homogeneous(case: Case) -> None:
    """It claims that c times the distance from its centre gives c times the code."""
    dictionary, x = case.trained(), case.rows()
    with torch.no_grad():
        centre = dictionary.decode(SparseCode.empty(1, case.n_features, torch.float64))
        code = dictionary.encode(x)
        for factor in (0.01, 50.0):
            expected = SparseCode.from_pattern(code.pattern, code.values * factor)
            found = dictionary.encode(centre + factor * (x - centre))
            require_close_code(found, expected, f"codes at {factor:g} times the distance from the centre", 1e-5)
