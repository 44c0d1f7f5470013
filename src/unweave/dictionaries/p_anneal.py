"""P-anneal: a sparsity penalty that starts as L1 and ends close to L0."""

from __future__ import annotations

from pydantic import PositiveFloat

from unweave.dictionaries._anneal import AnnealConfig, Annealed
from unweave.dictionaries._base import Loss, TrainingBatch
from unweave.dictionaries._closed_form import Backward, Step
from unweave.dictionaries._linear import LinearConfig
from unweave.dictionaries.registry import register
from unweave.kernels.select import AboveRule, Rule


class PAnnealConfig(AnnealConfig, LinearConfig):
    """
    Attributes:
        sparsity_coefficient: lambda at the start, for inputs scaled to E||x||^2 = 1.
    """

    sparsity_coefficient: PositiveFloat = 0.02


@register("p_anneal")
class PAnneal(Annealed):
    """``z = ReLU(u)``, unit-norm atoms, loss ``||x - x_hat||^2 + lambda_t ||z||_p^p`` with p falling from 1 to 0.2.

    L1 makes every code smaller; a small p asks for fewer of them. Starting at 1 keeps features alive.
    """

    Config = PAnnealConfig
    citation = (
        "Karvonen et al. 2024, Measuring progress in dictionary learning with board game models, arXiv:2408.00113"
    )
    good_for = "L1's convexity at the start and nearly L0 at the end, without thresholds"
    lr_at_16k = 3e-4

    def rule(self) -> Rule:
        return AboveRule(0.0)

    def loss(self, batch: TrainingBatch) -> Loss:
        code = self.encode(batch.input)
        trained, mse, reconstruction = self.errors(code, batch.target)
        now, _, following = self.powers(code.values, len(code))
        penalty = self.coefficient(batch.progress) * now
        terms = {"mse": mse, "sparsity": penalty, "lp": now, "lp_next": following}
        detached = {name: term.detach() for name, term in terms.items()}
        return Loss(trained + penalty, detached, code.detach(), reconstruction.detach())

    def backward(self, step: Step) -> Backward:
        now, slopes, following = self.powers(step.values, len(step.x))
        coefficient = self.coefficient(step.batch.progress)
        penalty = coefficient * now
        return Backward(
            step.grads + coefficient * slopes, penalty, {"sparsity": penalty, "lp": now, "lp_next": following}
        )
