"""The shared body of dictionaries with a linear encoder, a selection rule and a linear decoder."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unweave.codes import SparseCode
from unweave.dictionaries._base import Dictionary, DictionaryConfig
from unweave.errors import UnweaveError
from unweave.kernels.autograd import sparse_decode, sparse_encode
from unweave.kernels.pattern import Pattern


class LinearConfig(DictionaryConfig):
    """Fields of the linear architectures.

    Attributes:
        subtract_bias: encode ``x - b_dec`` rather than ``x``. For autoencoders; a target of its own rules it out.
    """

    subtract_bias: bool = True


class LinearDictionary(Dictionary):
    """``u = (x - b_dec) W_enc^T + b_enc``; some entries of ``u`` become the code ``z``; ``x_hat = z W_dec + b_dec``.

    Subclasses say which entries (``select``) and what becomes of their values (``activate``).
    """

    Config = LinearConfig

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

    def select(self, scores: Tensor) -> Pattern:
        """The entries of the code, from the pre-activations ``(n, n_features)``."""
        raise NotImplementedError

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
        pattern, values = self._entries(self.check_input(x))
        return SparseCode.from_pattern(pattern, self.activate(values, pattern))

    def _entries(self, x: Tensor) -> tuple[Pattern, Tensor]:
        """The selected entries and their pre-activations, differentiable without a dense gradient."""
        centred = self.centre(x)
        with torch.no_grad():
            scores = F.linear(centred, self.W_enc, self.b_enc)
            pattern = self.select(scores)
        return pattern, sparse_encode(centred, self.W_enc, self.b_enc, scores, pattern)

    def decode(self, code: SparseCode) -> Tensor:
        if code.n_features != self.n_features:
            raise UnweaveError(f"{self.name}: expected a code of {self.n_features} features, found {code.n_features}")
        return sparse_decode(code.values.to(self.W_dec.dtype), self.W_dec, code.pattern) + self.b_dec

    def decoder_directions(self) -> Tensor:
        return self.W_dec.detach()

    # ---- hooks of the trainer ---------------------------------------------------------------------------------

    @torch.no_grad()
    def initialise(self, sample: Tensor, target: Tensor) -> None:
        self.b_dec.copy_(geometric_median(target.float()))

    @torch.no_grad()
    def before_step(self) -> None:
        remove_parallel_gradient(self.W_dec)

    @torch.no_grad()
    def after_step(self, loss: object, progress: float) -> None:
        self.W_dec.copy_(F.normalize(self.W_dec, dim=1))

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        # x' = scale x and y' = out y; dividing codes by `out` keeps the decoder's rows as they are (unit norm).
        out = scale if out_scale is None else out_scale
        self.W_enc.mul_(scale / out)
        self.b_enc.div_(out)
        self.b_dec.div_(out)


def remove_parallel_gradient(W: nn.Parameter) -> None:
    """Keep of each row's gradient the part orthogonal to the row: the step stays on the unit sphere."""
    if W.grad is not None:
        along = (W.grad * W).sum(1, keepdim=True) / W.square().sum(1, keepdim=True).clamp_min(1e-24)
        W.grad.sub_(along * W)


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


def scale_to_unit_gain(dictionary: LinearDictionary, sample: Tensor) -> None:
    """Rescale the encoder so that unit inputs give reconstructions of unit norm on average (Gao et al. 2024)."""
    centred = F.normalize(dictionary.centre(sample), dim=1)
    scores = F.linear(centred, dictionary.W_enc)
    pattern = dictionary.select(scores)
    values = scores.reshape(-1)[pattern.flat].clamp_min(0)
    gain = sparse_decode(values, dictionary.W_dec, pattern).norm(dim=1).mean()
    if float(gain) > 0:
        dictionary.W_enc.div_(gain)
