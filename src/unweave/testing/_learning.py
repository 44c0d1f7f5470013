"""Losses, gradients, training and resuming it."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unweave.dictionaries import Dictionary, Loss, TrainingBatch
from unweave.dictionaries._linear import LinearDictionary
from unweave.errors import UnweaveError
from unweave.kernels.gradients.reference import sum_outer
from unweave.kernels.workspace import Plan, Workspace
from unweave.testing._case import Case, K, seeded
from unweave.testing._check import check, require, require_close, require_finite, require_same_bits, skip
from unweave.testing._encoding import require_valid


def _by_gradient(kind: type[Dictionary]) -> bool:
    return kind.learns_by_gradient


def _learn(dictionary: Dictionary, batch: TrainingBatch) -> Loss:
    """What the trainer asks for in a step."""
    if dictionary.learns_by_gradient:
        return dictionary.loss(batch)
    with torch.no_grad():
        return dictionary.absorb(batch)


@check()
def loss_is_well_formed(case: Case) -> None:
    """A loss is one finite number with finite terms, and brings the code that it was made with, detached."""
    dictionary, batch = case.started(), case.batch(dtype=torch.float32)
    loss = _learn(dictionary, batch)
    require(isinstance(loss, Loss), f"expected a Loss, found {type(loss).__name__}")
    require(loss.total.ndim == 0, f"total: expected one number, found shape {tuple(loss.total.shape)}")
    require_finite(loss.total.detach(), "total")
    for name, term in loss.terms.items():
        require(torch.as_tensor(term).numel() == 1, f"term {name}: expected one number")
        require(not torch.as_tensor(term).requires_grad, f"term {name} carries a gradient (detach it)")
        require_finite(torch.as_tensor(term), f"term {name}")
    require(loss.code is not None, "it brings no code, and the trainer counts firings by it")
    assert loss.code is not None
    require(not loss.code.values.requires_grad, "its code carries a gradient (detach it)")
    require_valid(loss.code, len(batch.input), dictionary, "code of the loss")
    with torch.no_grad():  # as the trainer does
        made = loss.reconstruction() if callable(loss.reconstruction) else loss.reconstruction
    if made is not None:
        require(made.shape == batch.target.shape, f"reconstruction: found shape {tuple(made.shape)}")
        require(not made.requires_grad, "its reconstruction carries a gradient (detach it)")


@check(_by_gradient)
def every_parameter_gets_a_gradient(case: Case) -> None:
    """Every parameter that asks for a gradient gets one that is finite and, in some batch, not zero."""
    reached: set[str] = set()
    names: set[str] = set()
    for dictionary in (case.started(), case.trained(torch.float32).train()):
        names = {name for name, p in dictionary.named_parameters() if p.requires_grad}
        for seed in range(4):
            dictionary.zero_grad()
            _learn(dictionary, case.batch(512, torch.float32, seed=seed)).total.backward()
            for name, parameter in dictionary.named_parameters():
                if parameter.grad is not None:
                    require_finite(parameter.grad, f"gradient of {name}")
                    reached |= {name} if bool((parameter.grad != 0).any()) else set()
    missing = sorted(names - reached)
    require(not missing, f"no gradient reaches {', '.join(missing)}: freeze it, make it a buffer, or mend the loss")


@check(_by_gradient)
def dead_features_break_nothing(case: Case) -> None:
    """Loss and gradients are finite when nobody, everybody or nobody knows who is dead, at any time in training."""
    dictionary, batch = case.started(), case.batch(dtype=torch.float32)
    nobody = torch.zeros(case.n_features, dtype=torch.bool)
    for what, dead in (("unknown", None), ("none", nobody), ("all", ~nobody)):
        for progress in (0.0, 0.5, 1.0):
            dictionary.zero_grad()
            loss = dictionary.loss(replace(batch, dead=dead, progress=progress))
            require_finite(loss.total.detach(), f"loss with dead features: {what}, at progress {progress}")
            if loss.total.requires_grad:
                loss.total.backward()
            for name, parameter in dictionary.named_parameters():
                if parameter.grad is not None:
                    require_finite(parameter.grad, f"gradient of {name} with dead features: {what}")


@check()
def learns_an_easy_problem(case: Case) -> None:
    """60 steps on planted features bring the loss down (or, without gradients, reconstruct better than none)."""
    batch = case.batch(512, torch.float32, seed=6)
    batch = replace(batch, dead=None)

    def measure(dictionary: Dictionary) -> float:
        with torch.no_grad(), seeded(0):
            if dictionary.learns_by_gradient:
                return float(dictionary.train().loss(batch).total)
            error = batch.target - dictionary.eval()(batch.input)
            return float(error.square().sum(1).mean())

    before, after = measure(case.started()), measure(case.trained(torch.float32))
    if case.kind.learns_by_gradient:
        least = before - 1e-3 * abs(before)
        require(after < least, f"the loss on rows it has not seen went from {before:.4g} to {after:.4g}")
    else:
        slack = 1e-6 * abs(before)
        require(after <= before + slack, f"the squared error on new rows rose from {before:.4g} to {after:.4g}")


@check(lambda kind: kind.atoms_are_rows)
def atoms_are_rows_of_the_data(case: Case) -> None:
    """What it learnt from a batch are rows of that batch, up to their length."""
    dictionary, batch = case.started(), case.batch(dtype=torch.float32)
    _learn(dictionary, batch)
    with torch.no_grad():
        dictionary.complete()
        atoms = dictionary.decoder_directions()
    atoms = F.normalize(atoms[atoms.norm(dim=1) > 0], dim=1)
    require(len(atoms) > 0, "all of its atoms are 0 after a batch")
    nearest = (atoms @ F.normalize(batch.input, dim=1).T).amax(dim=1)
    far = int((nearest < 1 - 1e-4).sum())
    require(far == 0, f"{far} of {len(atoms)} atoms are no row (cosine {float(nearest.min()):.3g} to the nearest)")


def _has_closed_form(kind: type[Dictionary]) -> bool:
    return kind.learns_by_gradient and issubclass(kind, LinearDictionary) and kind.has_closed_form()


@check(_has_closed_form)
def closed_form_agrees_with_autograd(case: Case) -> None:
    """Loss and gradients worked out in closed form are those that autograd gets from its loss."""
    for progress in (0.02, 1.0):
        dictionary: Any = case.trained().train()
        batch = case.batch(256)
        batch = replace(batch, progress=progress)
        with seeded(0):
            loss = dictionary.loss(batch)
        loss.total.backward()
        with torch.no_grad(), seeded(0):
            made = dictionary.closed_form(batch, Workspace(Plan("reference")))
        if made is None:
            skip("the code is too crowded for the closed form")
        ours, gradients = made
        require_close(torch.as_tensor(ours.total), loss.total, f"loss at progress {progress}", 1e-6)
        found: dict[str, Tensor] = dict(gradients.dense)
        for name, f in gradients.rows.items():
            found[name] = sum_outer(f.columns, f.weights, f.A, dictionary.get_parameter(name).detach(), f.extra)
        for name, parameter in dictionary.named_parameters():
            expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            require(name in found, f"the closed form has no gradient of {name}")
            require_close(found[name], expected, f"gradient of {name} at progress {progress}", 1e-6)


class _Killed(Exception):
    pass


class _Killer:
    """A tracker that ends training at a step, whichever way steps are computed."""

    def __init__(self, step: int) -> None:
        self.step = step

    def start(self, run_id: str, config: dict[str, Any], folder: Path | None) -> None:
        pass

    def log(self, metrics: dict[str, Any], step: int) -> None:
        if step == self.step:
            raise _Killed

    def finish(self) -> None:
        pass


@check()
def resumes_with_the_same_bits(case: Case) -> None:
    """A training killed in the middle and resumed ends with the very weights of one that was not."""
    config = case.training(n_steps=16, checkpoint_every=4, log_every=1)
    whole = case.train(case.build(), case.stream(), config).state_dict()
    with tempfile.TemporaryDirectory() as folder:
        try:
            case.train(case.build(), case.stream(), config, folder, trackers=_Killer(11))
        except _Killed:
            pass
        else:
            require(False, "training could not be killed at step 11 of 16")
        with seeded(17):  # neither the random state nor the weights it was built with may matter now
            resumed = case.train(case.build(seed=1), case.stream(), config, folder).state_dict()
    require(whole.keys() == resumed.keys(), f"state: expected {sorted(whole)}, found {sorted(resumed)}")
    for name, tensor in whole.items():
        require_same_bits(resumed[name], tensor, f"{name} after a kill at step 11 and a resume from step 8")


@check()
def sparsity_is_honoured(case: Case) -> None:
    """Where it takes a k, a row has k features in the mean in training, and about as many in eval mode."""
    try:
        wanted = case.kind.sparsity_option(K)
    except UnweaveError as error:
        skip(str(error))
    if "k" not in wanted:
        require(bool(wanted), "sparsity_option returned nothing")
        case.build(**wanted)
        return
    k, x = float(case.options["k"]), case.rows(1024, torch.float32, seed=5)
    with torch.no_grad():
        trained = float(case.trained(torch.float32).train().encode(x).l0().double().mean())
        require(trained <= k + 1e-6, f"in training {trained:g} features fire in a row, k is {k:g}")
        evaluated = float(case.trained(torch.float32).encode(x).l0().double().mean())
        require(evaluated <= 1.5 * k, f"in eval mode {evaluated:g} features fire in a row, k is {k:g}")
