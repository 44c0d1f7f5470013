"""What the classical methods share: learning from a sample of the rows, and codes with at most k entries."""

from __future__ import annotations

import contextlib
import importlib
import logging
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from pydantic import PositiveInt, model_validator
from torch import Tensor, nn

from unweave.codes import SparseCode
from unweave.dictionaries._base import Dictionary, DictionaryConfig, Loss, TrainingBatch
from unweave.dictionaries._linear import LinearDictionary
from unweave.dictionaries.classical._reservoir import Reservoir
from unweave.errors import UnweaveError
from unweave.kernels.autograd import sparse_decode
from unweave.kernels.select import Rule, TopKRule

_LOOK = 128  # rows of a batch that are encoded for the log: some of these encoders are slow, ...
LESS = 5  # ... and in training mode, which serves the log alone, those that iterate do it this many times less


class SampledConfig(DictionaryConfig):
    """
    Attributes:
        reservoir: distinct rows kept to learn from, a uniform sample of all.
    """

    subtract_bias: ClassVar[bool] = True  # rows are centred; not an option

    reservoir: PositiveInt = 16_384


class ClassicalConfig(SampledConfig):
    """
    Attributes:
        k: features a row at most, those of largest magnitude; None leaves the method's own code as it is.
    """

    k: PositiveInt | None = None

    @model_validator(mode="after")
    def _k_fits(self) -> ClassicalConfig:
        if self.k is not None and self.k > self.n_features:
            raise ValueError(f"k must be at most n_features = {self.n_features}")
        return self


class Classical(Dictionary):
    """A method that learns from rows all at once: ``absorb`` keeps a sample of them, ``complete`` learns from it.

    To have something to log, it also learns on the way, whenever the sample has doubled. Features beyond what a
    method can find (more principal components than dimensions) are zero and never fire. The sample is part of the
    state while training lasts, and of no saved dictionary.
    """

    learns_by_gradient = False

    seed: Tensor
    learning: Any

    def __init__(self, config: SampledConfig) -> None:
        if config.d_in != config.d_out:
            raise UnweaveError(
                f"{self.name} takes its input apart and has no other target: expected d_in == d_out, found "
                f"{config.d_in} and {config.d_out}"
            )
        super().__init__(config)
        self.register_buffer("seed", torch.randint(2**31 - 1, ()))
        self.learning = None

    def learn(self, rows: Tensor) -> None:
        """Set the parameters from ``(n, d)`` rows."""
        raise NotImplementedError

    def sample(self) -> nn.Module:
        """An empty memory of rows: it has ``add(x)``, ``rows()``, and the counts ``n_kept`` and ``n_learnt``."""
        return Reservoir(self.config.reservoir, self.d_in, int(self.seed)).to(self.device)

    # ---- the contract -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def absorb(self, batch: TrainingBatch) -> Loss:
        x = self.check_input(batch.input)
        if batch.target is not batch.input and not torch.equal(batch.target, batch.input):
            raise UnweaveError(f"{self.name} takes its input apart and has no other target: leave the target out")
        if self.learning is None:
            self.learning = self.sample()
        self.learning.add(x)
        if int(self.learning.n_kept) >= 2 * int(self.learning.n_learnt):
            self._learn(final=False)
        code = self.encode(x[:_LOOK])
        mse = (x[:_LOOK] - self.decode(code)).square().sum(1).mean()
        return Loss(mse, {"mse": mse}, code, lambda: self(x))

    @torch.no_grad()
    def complete(self) -> None:
        if self.learning is not None:
            self._learn(final=True)
            self.learning = None

    def _learn(self, final: bool) -> None:
        with _convergence_told(self.name, final):
            self.learn(self.learning.rows())
        self.learning.n_learnt.copy_(self.learning.n_kept)

    def loss(self, batch: TrainingBatch) -> Loss:
        raise UnweaveError(f"{self.name} learns without gradients: hand its batches to absorb, then call complete")

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        if out_scale is not None and out_scale != scale:
            raise UnweaveError(f"{self.name} has no target of its own, so no scale of its own for it")
        super().fold_scale(scale)

    def initialise(self, sample: Tensor, target: Tensor) -> None:
        pass  # all it knows comes from the rows it absorbs

    def initialise_map(self, sample: Tensor, target: Tensor) -> None:
        pass  # a target that is not the input is refused with the first batch

    def before_step(self) -> None:
        pass

    def after_step(self, loss: Loss, progress: float) -> None:
        pass

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        # A checkpoint of a training under way holds the sample; a saved dictionary does not.
        has_sample = any(name.startswith(f"{prefix}learning.") for name in state_dict)
        self.learning = self.sample() if has_sample else None
        super()._load_from_state_dict(state_dict, prefix, *args)


class LinearClassical(Classical, LinearDictionary):
    """``z = (x - b_dec) W_enc^T``, of either sign, the k largest by magnitude; ``x_hat = z W_dec + b_dec``."""

    def rule(self) -> Rule:
        return TopKRule(self.config.k or self.n_features, signed=True)

    def set_atoms(self, encoder: Tensor, atoms: Tensor, mean: Tensor) -> None:
        """Put in ``(m, d)`` rows, m at most n_features; the remaining features are zero."""
        self.W_enc.zero_()
        self.W_dec.zero_()
        self.b_enc.zero_()
        self.W_enc[: len(encoder)].copy_(encoder)
        self.W_dec[: len(atoms)].copy_(atoms)
        self.b_dec.copy_(mean)


class AtomDictionary(Dictionary):
    """``x_hat = z W_dec + b_dec``; how z comes about is the subclass's business."""

    def __init__(self, config: DictionaryConfig) -> None:
        super().__init__(config)
        self.W_dec = nn.Parameter(torch.zeros(config.n_features, config.d_out))
        self.b_dec = nn.Parameter(torch.zeros(config.d_out))

    def decode(self, code: SparseCode) -> Tensor:
        code = self.check_code(code)
        return sparse_decode(code.values.to(self.W_dec.dtype), self.W_dec, code.pattern) + self.b_dec

    def decoder_directions(self) -> Tensor:
        return self.W_dec.detach()

    @torch.no_grad()
    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        self.b_dec.div_(scale)

    def set_atoms(self, atoms: Tensor, offset: Tensor) -> None:
        """Put in ``(m, d)`` atoms, m at most n_features; the remaining ones are zero."""
        self.W_dec.zero_()
        self.W_dec[: len(atoms)].copy_(atoms)
        self.b_dec.copy_(offset)


def scikit_learn(module: str, name: str) -> Any:
    """A class of scikit-learn, imported when it is needed.

    Raises:
        UnweaveError: where it is not installed.
    """
    try:
        return getattr(importlib.import_module(f"sklearn.{module}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "sklearn":
            raise
        raise UnweaveError("this method needs scikit-learn: pip install 'unweave[sklearn]'") from None


@contextlib.contextmanager
def _convergence_told(name: str, final: bool) -> Iterator[None]:
    """What scikit-learn says of convergence goes to our log, and only at the end of training."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        yield
    unconverged = [str(w.message) for w in heard if w.category.__name__ == "ConvergenceWarning"]
    for warning in heard:
        if warning.category.__name__ != "ConvergenceWarning":
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
    if final and unconverged:
        more = f" (and {len(unconverged) - 1:,} more of the kind)" if len(unconverged) > 1 else ""
        logging.getLogger("unweave").warning("%s: %s%s", name, " ".join(unconverged[0].split()), more)
