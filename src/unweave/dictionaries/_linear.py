"""The shared body of dictionaries with a linear encoder, a selection rule and a linear decoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unweave.codes import SparseCode
from unweave.dictionaries._base import Dictionary, DictionaryConfig, Loss, TrainingBatch
from unweave.dictionaries._closed_form import Backward, Fit, Gradients, Step, closed_form, plain_fit
from unweave.errors import UnweaveError
from unweave.kernels.autograd import outer_sums, sparse_decode, sparse_encode
from unweave.kernels.calibration import plan_for
from unweave.kernels.pattern import Pattern
from unweave.kernels.select import Rule, reference, select
from unweave.kernels.workspace import Workspace


class LinearConfig(DictionaryConfig):
    """Fields of the linear architectures.

    Attributes:
        subtract_bias: encode ``x - b_dec`` rather than ``x``. For autoencoders; a target of its own rules it out.
    """

    subtract_bias: bool = True


class Errors(NamedTuple):
    """What a loss makes of a code: the squared errors it trains on, those of the whole reconstruction, and that."""

    trained: Tensor
    mse: Tensor
    reconstruction: Tensor  # (n, d_out)


class LinearDictionary(Dictionary):
    """``u = (x - b_dec) W_enc^T + b_enc``; some entries of ``u`` become the code ``z``; ``x_hat = z W_dec + b_dec``.

    Subclasses say which entries (``rule``, or ``select`` for what no rule says) and what becomes of their values
    (``activate``).
    """

    Config = LinearConfig
    bfloat16 = True

    def __init__(self, config: LinearConfig) -> None:
        super().__init__(config)
        if config.subtract_bias and config.d_in != config.d_out:
            raise UnweaveError(
                f"{self.name}: subtract_bias needs d_in == d_out, found {config.d_in} and {config.d_out}; "
                "set subtract_bias=False"
            )
        atoms = F.normalize(torch.randn(config.n_features, config.d_out), dim=1)
        # Tied at the start: an encoder that already points at its atom kills far fewer features.
        same = config.d_in == config.d_out
        encoder = atoms.clone() if same else F.normalize(torch.randn(config.n_features, config.d_in), dim=1)
        self.W_dec = nn.Parameter(atoms)
        self.W_enc = nn.Parameter(encoder)
        self.b_enc = nn.Parameter(torch.zeros(config.n_features))
        self.b_dec = nn.Parameter(torch.zeros(config.d_out))

    # ---- what subclasses choose -------------------------------------------------------------------------------

    def rule(self) -> Rule:
        """Which entries become the code, in the present mode (training or eval)."""
        raise NotImplementedError

    def select(self, scores: Tensor) -> Pattern:
        """The entries of the code, from the pre-activations ``(n, n_features)``."""
        return select(reference, self.rule(), scores)[0]

    def training_rule(self) -> Rule:
        """Which entries the training loss needs; more than the code's where the loss looks beyond them."""
        return self.rule()

    @property
    def unit_norm(self) -> bool:
        """Whether atoms stay on the unit sphere."""
        return True

    def activate(self, values: Tensor, pattern: Pattern) -> Tensor:
        """The values of the code, from the pre-activations at its entries."""
        return values

    # ---- the contract -----------------------------------------------------------------------------------------

    def centre(self, x: Tensor) -> Tensor:
        return x - self.b_dec if self.config.subtract_bias else x

    def pre_activations(self, x: Tensor) -> Tensor:
        """``(n, n_features)``; dense, for analyses that need every one."""
        return F.linear(self.centre(self.check_input(x)), self.W_enc, self.b_enc)

    def encode(self, x: Tensor) -> SparseCode:
        x = self.check_input(x)
        own = "select" in vars(self) or not _settled_by(type(self), LinearDictionary, "select", "_entries")
        if torch.is_grad_enabled() or own:
            pattern, values = self._entries(x)
        else:
            work = Workspace(plan_for(self.W_enc, len(x)), x.device)
            pattern, values = work.select(self.rule(), self.centre(x), self.W_enc, self.b_enc)
        return SparseCode.from_pattern(pattern, self.activate(values, pattern))

    def _entries(self, x: Tensor) -> tuple[Pattern, Tensor]:
        """The selected entries and their pre-activations, differentiable without a dense gradient."""
        centred = self.centre(x)
        with torch.no_grad():
            scores = F.linear(centred, self.W_enc, self.b_enc)
            pattern = self.select(scores)
        return pattern, sparse_encode(centred, self.W_enc, self.b_enc, scores, pattern)

    def decode(self, code: SparseCode) -> Tensor:
        code = self.check_code(code)
        return sparse_decode(code.values.to(self.W_dec.dtype), self.W_dec, code.pattern) + self.b_dec

    def decoder_directions(self) -> Tensor:
        return self.W_dec.detach()

    def errors(self, code: SparseCode, target: Tensor) -> Errors:
        """The squared errors of a code, summed over d and averaged over rows; what ``fit`` is without autograd."""
        reconstruction = self.decode(code)
        mse = (target - reconstruction).square().sum(1).mean()
        return Errors(mse, mse, reconstruction)

    # ---- hooks of the trainer ---------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, sample: Tensor, target: Tensor) -> None:
        self.b_dec.copy_(geometric_median(target.float()))

    @torch.no_grad()
    def initialise_map(self, sample: Tensor, target: Tensor) -> None:
        """Point each atom at what the target does where its feature fires; our choice.

        An encoder and atoms that are tied, or random, write the wrong thing: the error then starts at several times
        the variance, and the steps that bring it down silence features, which a penalty on L0 does not wake again.
        """
        if not (self.unit_norm and self.linear_decoder):
            return  # free norms grow from what little they start with, and turned atoms gained nothing there
        self.b_dec.copy_(target.mean(0))
        self.read_from_mean(sample)
        code, wanted = self.encode(sample), target.to(self.W_dec) - self.b_dec
        self.W_dec.copy_(turned(self.W_dec, code.pattern, code.values, wanted))
        self.W_enc.mul_(best_gain(self.decode(code) - self.b_dec, wanted))
        self.read_from_mean(sample)

    def read_from_mean(self, sample: Tensor) -> None:
        """Let pre-activations be those of rows less their mean, as subtracting the decoder's bias does for others.

        What was measured of pre-activations (thresholds) has to be measured again: extend this where there is such.
        """
        if self.b_enc.requires_grad:  # else there is to be none
            self.b_enc.copy_(-self.centre(sample).mean(0) @ self.W_enc.T)

    @torch.no_grad()
    def before_step(self) -> None:
        if self.unit_norm:
            remove_parallel_gradient(self.W_dec)

    @torch.no_grad()
    def after_step(self, loss: Loss, progress: float) -> None:
        if self.unit_norm:
            self.W_dec.copy_(F.normalize(self.W_dec, dim=1))
        self.observe(loss, progress)

    def observe(self, loss: Loss, progress: float) -> None:
        """After the weights have moved: update thresholds and statistics."""

    # ---- the step without autograd ----------------------------------------------------------------------------

    def backward(self, step: Step) -> Backward:
        """From the gradient of the squared error by the code to that of the loss by the pre-activations.

        An architecture that defines this beside its ``loss`` is trained without autograd. Both say the same: a
        subclass that changes what only autograd sees (``loss``, ``activate``, ``before_step``, ...) and not this is
        trained by autograd again.
        """
        raise NotImplementedError

    def fit(self, pattern: Pattern, values: Tensor, target: Tensor, work: Workspace) -> Fit:
        """The squared errors of a code and their gradients; the part of ``loss`` before ``backward``."""
        return plain_fit(pattern, values, self.W_dec.detach(), self.b_dec.detach(), target, work)

    def closed_form(self, batch: TrainingBatch, work: Workspace) -> tuple[Loss, Gradients] | None:
        """Loss and gradients of a batch without autograd; None where it has to be autograd after all."""
        return closed_form(self, batch, work) if self.has_closed_form() else None

    @classmethod
    def has_closed_form(cls) -> bool:
        """Whether ``backward`` and ``fit`` speak for everything that this class does in a training step."""
        owner = next((c for c in cls.__mro__ if "backward" in vars(c) or "fit" in vars(c)), LinearDictionary)
        if owner is LinearDictionary or cls.centre is not LinearDictionary.centre:  # rows are centred by a kernel
            return False
        return _settled_by(cls, owner, *SPOKEN_FOR)

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        # x' = scale x and y' = out y; dividing codes by `out` keeps the decoder's rows as they are (unit norm).
        out = scale if out_scale is None else out_scale
        self.W_enc.mul_(scale / out)
        self.b_enc.div_(out)
        self.b_dec.div_(out)


# What the closed form computes in its own way; anything else may be overridden freely.
SPOKEN_FOR = frozenset(
    (
        "loss",
        "errors",
        "encode",
        "decode",
        "_entries",
        "centre",
        "select",
        "activate",
        "threshold",
        "before_step",
        "after_step",
    )
)


def _settled_by(cls: type, owner: type, *methods: str) -> bool:
    """Whether no class below ``owner`` overrides one of the methods."""
    below = cls.__mro__[: cls.__mro__.index(owner)]
    return not any(method in vars(c) for c in below for method in methods)


def remove_parallel_gradient(W: nn.Parameter) -> None:
    """Keep of each row's gradient the part orthogonal to the row: the step stays on the unit sphere."""
    if W.grad is not None:
        along = (W.grad * W).sum(1, keepdim=True) / W.square().sum(1, keepdim=True).clamp_min(1e-24)
        W.grad.sub_(along * W)


@torch.no_grad()
def fold_decoder_norms(dictionary: LinearDictionary) -> None:
    """Give every atom unit norm and let the codes carry the size; outputs do not change where that selects the same."""
    norms = dictionary.W_dec.norm(dim=1).clamp_min(1e-12)
    dictionary.W_dec.copy_(F.normalize(dictionary.W_dec, dim=1))
    dictionary.W_enc.mul_(norms[:, None])
    dictionary.b_enc.mul_(norms)


def geometric_median(points: Tensor, n_iterations: int = 100, tolerance: float = 1e-6) -> Tensor:
    """The point with the least summed distance to ``(n, d)`` points, by Weiszfeld's iteration.

    Robust where the mean is not: a few tokens of enormous norm hardly move it.
    """
    centre = points.mean(0)
    for _ in range(n_iterations):
        weights = 1 / (points - centre).norm(dim=1).clamp_min(1e-8)
        moved = (points * weights[:, None]).sum(0) / weights.sum()
        if (moved - centre).norm() <= tolerance * moved.norm().clamp_min(1e-12):
            return moved
        centre = moved
    return centre


@torch.no_grad()
def turned(W_dec: Tensor, pattern: Pattern, values: Tensor, wanted: Tensor) -> Tensor:
    """Unit atoms, each turned to what its feature should write: the sum of ``wanted (n, d)`` weighed by its values.

    Atoms of features that do not fire keep their direction.
    """
    sums = outer_sums(pattern, values.to(W_dec), wanted)
    return F.normalize(torch.where(sums.norm(dim=1, keepdim=True) > 0, sums, W_dec), dim=1)


def best_gain(written: Tensor, wanted: Tensor) -> float:
    """What to multiply ``written`` with for the least squared error; 1 where no positive number is better than 0."""
    gain = float((written * wanted).sum() / written.square().sum().clamp_min(1e-12))
    return gain if gain > 0 else 1.0


def scale_to_unit_gain(dictionary: LinearDictionary, sample: Tensor) -> None:
    """Rescale the encoder so that unit inputs give reconstructions of unit norm on average (Gao et al. 2024)."""
    centred = F.normalize(dictionary.centre(sample), dim=1)
    scores = F.linear(centred, dictionary.W_enc)
    pattern = dictionary.select(scores)
    values = dictionary.activate(scores.reshape(-1)[pattern.flat], pattern)
    gain = sparse_decode(values, dictionary.W_dec, pattern).norm(dim=1).mean()
    if float(gain) > 0:
        dictionary.W_enc.div_(gain)
