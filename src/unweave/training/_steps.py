"""One step: by autograd, in closed form, or without gradients.

The first two update the same Adam state, so either can go on where the other stopped.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unweave.dictionaries import Dictionary, Loss, TrainingBatch
from unweave.dictionaries._closed_form import Factors, Gradients
from unweave.dictionaries._linear import SPOKEN_FOR, LinearDictionary
from unweave.errors import UnweaveError
from unweave.kernels.adam.reference import AdamStep, Rows, adam_rows
from unweave.kernels.backend import serves
from unweave.kernels.workspace import Plan, Workspace, plan_of

_TORCH_CLIP_EPS = 1e-6  # torch adds it to the norm it divides by; so do we


class Diverged(Exception):
    """The loss or a gradient is not finite; nothing was changed."""

    def __init__(self, values: dict[str, float]) -> None:
        super().__init__()
        self.values = values


class AutogradStep:
    """The step for any dictionary: its ``loss``, differentiated by autograd."""

    @property
    def engine(self) -> str:
        """How steps were computed in the end, which "auto" leaves open."""
        return "autograd"

    def __init__(self, dictionary: Dictionary, optimizer: torch.optim.Adam, clip: float | None) -> None:
        self.dictionary, self.optimizer, self.clip = dictionary, optimizer, clip
        self.parameters = {name: p for name, p in dictionary.named_parameters() if p.requires_grad}

    def run(self, batch: TrainingBatch, lr: float, progress: float) -> tuple[Loss, dict[str, float]]:
        """Do one step. Returns the loss, and its numbers with the gradient's norm before clipping.

        Raises:
            Diverged: when one of them is not finite.
        """
        self._rate(lr)
        with torch.enable_grad():  # whoever calls may have turned gradients off
            loss = self.dictionary.loss(batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.total.backward()
        self.dictionary.before_step()
        grads = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        values = self._finite(loss, norm)
        if self.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(self.parameters.values(), self.clip, norm)
        self.optimizer.step()
        with torch.no_grad():
            self.dictionary.after_step(loss, progress)
        return loss, values

    def _rate(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def _finite(self, loss: Loss, norm: Tensor) -> dict[str, float]:
        """Every number of the step in one transfer from the device."""
        numbers = {"loss": loss.total, "grad_norm": norm, **loss.terms}
        device = self.dictionary.device
        stacked = torch.stack([torch.as_tensor(v, device=device).detach().double() for v in numbers.values()])
        values = dict(zip(numbers, stacked.tolist()))
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            raise Diverged(values)
        return values

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class ClosedFormStep(AutogradStep):
    """The step of a linear dictionary from its gradients' factors: row sums and Adam in one pass over the weights.

    Clipping needs the norm of the whole gradient before the first row may be touched. A bound of that norm costs
    next to nothing; only where the bound exceeds the limit are the gradients written out and measured first.
    """

    def __init__(
        self, dictionary: LinearDictionary, optimizer: torch.optim.Adam, clip: float | None, work: Workspace
    ) -> None:
        super().__init__(dictionary, optimizer, clip)
        self.work, self.plan = work, work.plan
        self._scratch: dict[str, Tensor] = {}

    @property
    def engine(self) -> str:
        return self.plan.name

    @torch.no_grad()
    def run(self, batch: TrainingBatch, lr: float, progress: float) -> tuple[Loss, dict[str, float]]:
        dictionary: Any = self.dictionary
        made: tuple[Loss, Gradients] | None = dictionary.closed_form(batch, self.work)
        if made is None:
            return self._by_autograd(batch, lr, progress)
        loss, gradients = made
        self._check(gradients)
        self._rate(lr)
        small = torch.stack([g.square().sum() for g in gradients.dense.values()]).sum()
        bounds = {name: self._bound(name, factors) for name, factors in gradients.rows.items()}
        bound = (small + sum(bounds.values())).sqrt()
        values = self._finite(loss, bound)  # finite factors have finite sums
        if self.clip is None or values["grad_norm"] <= self.clip:
            squares = [self._update(name, factors, lr) for name, factors in gradients.rows.items()]
            norm, scale = (small + sum(squares)).sqrt(), 1.0
        else:
            sums = {name: self._sum(name, factors) for name, factors in gradients.rows.items()}
            norm = (small + sum(g.square().sum() for g in sums.values())).sqrt()
            scale = min(1.0, self.clip / (float(norm) + _TORCH_CLIP_EPS))
            for name, grad in sums.items():
                self.work.ops.adam.adam_rows(self._rows(name), grad, self._adam(name, lr), scale)
        values["grad_norm"] = float(norm)
        for name, grad in gradients.dense.items():
            self._step_small(name, grad, lr, scale)
        dictionary.observe(loss, progress)
        return loss, values

    def _check(self, gradients: Gradients) -> None:
        """Refuse what ``backward`` got wrong, before anything is changed."""
        for name, grad in gradients.dense.items():
            parameter = self.parameters.get(name)
            if parameter is None or parameter.shape != grad.shape:
                found = "no parameter" if parameter is None else f"a parameter of shape {tuple(parameter.shape)}"
                raise UnweaveError(
                    f"{self.dictionary.name}: backward gives a gradient of shape {tuple(grad.shape)} for {name!r}, "
                    f"which is {found}"
                )

    def _step_small(self, name: str, grad: Tensor, lr: float, scale: float) -> None:
        """Step a parameter other than the two large ones: as one row, or on other devices element by element."""
        rows, step = self._rows(name), self._adam(name, lr)
        grad = grad.to(rows.W.dtype)
        if rows.W.device.type == "cpu" and all(part.is_contiguous() for part in rows[:3]):
            W, first, second = (part.view(1, -1) for part in rows[:3])
            self.work.ops.adam.adam_rows(Rows(W, first, second), grad.reshape(1, -1), step, scale)
        else:
            adam_rows(rows, grad, step, scale)

    def _by_autograd(self, batch: TrainingBatch, lr: float, progress: float) -> tuple[Loss, dict[str, float]]:
        try:
            return super().run(batch, lr, progress)
        finally:
            self.work.forget()
            self.optimizer.zero_grad(set_to_none=True)  # dense, and of no use to the steps that follow

    def _bound(self, name: str, factors: Factors) -> Tensor:
        """At least the squared norm of the whole matrix's gradient."""
        extra, more = factors.extra, None
        if extra.rows is not None and extra.at is not None:
            here = extra.at >= 0
            more = extra.rows.new_zeros(len(extra.at))
            more[here] = extra.rows.norm(dim=1)[extra.at[here]]
        if extra.pull is not None:
            pulled = extra.pull.abs() * self.parameters[name].norm(dim=1)
            more = pulled if more is None else more + pulled
        bound = self.work.ops.gradients.norm_bound(factors.columns, factors.weights, factors.lengths, more)
        return bound * (1 + 2**-7) if self.plan.scores == "bfloat16" else bound  # rounded rows may be longer

    def _update(self, name: str, factors: Factors, lr: float) -> Tensor:
        update: Callable[..., Tensor] = self.work.ops.update.update_rows
        rows, step = self._rows(name), self._adam(name, lr)
        return update(rows, factors.columns, factors.weights, factors.A, step, factors.extra).sum()

    def _sum(self, name: str, factors: Factors) -> Tensor:
        rows, ops = self._rows(name), self.work.ops
        total = ops.gradients.sum_outer(factors.columns, factors.weights, factors.A, rows.W, factors.extra)
        return ops.adam.project(rows, total)

    def _rows(self, name: str) -> Rows:
        """The matrix with its moments, which are the ones ``torch.optim.Adam`` would use."""
        dictionary: Any = self.dictionary
        parameter = self.parameters[name]
        state = self._state(parameter)
        unit_norm = dictionary.unit_norm and name == "W_dec"
        shadow = self.work.shadow_of(name)
        return Rows(parameter.detach(), state["exp_avg"], state["exp_avg_sq"], shadow, unit_norm)

    def _adam(self, name: str, lr: float) -> AdamStep:
        group, state = self.optimizer.param_groups[0], self._state(self.parameters[name])
        state["step"] += 1
        return AdamStep(lr, tuple(group["betas"]), group["eps"], int(state["step"]))

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.optimizer.state[parameter]
        if not state:
            fused = bool(self.optimizer.param_groups[0]["fused"])
            state["step"] = torch.zeros((), device=parameter.device if fused else "cpu")
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return state

    def state_dict(self) -> dict[str, Any]:
        return {"plan": self.plan.name, "work": self.work.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:
            return
        # Checkpoints of the first format named the two apart.
        name = state.get("plan") or state["backend"] + ("+screen" if state["screen"] else "")
        plan, W = plan_of(name), self.parameters["W_enc"]
        if plan != self.plan and serves(plan.backend, W) and plan.why_not(W.shape[1]) is None:
            # The last bits of sums depend on the plan, and a resumed run has to end with the bits of one that was
            # never killed. On another device, or a processor without what the plan needs, there is no such promise.
            self.plan, self.work = plan, Workspace(plan, self.dictionary.device)
        if plan.scores == self.plan.scores:  # else the margin was learned for scores of another kind
            self.work.load_state_dict(state["work"])


class AbsorbStep(AutogradStep):
    """The step of a dictionary that learns without gradients: it takes the batch in."""

    @property
    def engine(self) -> str:
        return "without gradients"

    @torch.no_grad()
    def run(self, batch: TrainingBatch, lr: float, progress: float) -> tuple[Loss, dict[str, float]]:
        loss = self.dictionary.absorb(batch)
        values = self._finite(loss, torch.zeros((), device=self.dictionary.device))
        self.dictionary.after_step(loss, progress)
        return loss, values


def make_step(
    dictionary: Dictionary, optimizer: torch.optim.Adam, clip: float | None, plan: Callable[[], Plan] | None
) -> AutogradStep:
    """The closed form where the dictionary has one and a plan is given, else autograd."""
    if not dictionary.learns_by_gradient:
        return AbsorbStep(dictionary, optimizer, clip)
    if plan is None or not isinstance(dictionary, LinearDictionary) or not dictionary.has_closed_form():
        return AutogradStep(dictionary, optimizer, clip)
    if any(not p.requires_grad for p in dictionary.parameters()):
        return AutogradStep(dictionary, optimizer, clip)  # somebody froze a part: autograd knows how to leave it alone
    if not {"W_enc", "W_dec", "b_enc", "b_dec"} <= {name for name, _ in dictionary.named_parameters()}:
        return AutogradStep(dictionary, optimizer, clip)  # tied or parametrised weights
    if not SPOKEN_FOR.isdisjoint(vars(dictionary)):
        return AutogradStep(dictionary, optimizer, clip)  # somebody replaced a method of this very object
    return ClosedFormStep(dictionary, optimizer, clip, Workspace(plan(), dictionary.device))
