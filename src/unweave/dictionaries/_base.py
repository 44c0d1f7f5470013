"""What every dictionary is: encode, decode, loss, a frozen config, save and load."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from unweave.codes import SparseCode
from unweave.config import Config
from unweave.errors import UnweaveError
from unweave.files import read_json, read_tensors, write_json, write_tensors

_FORMAT = "unweave.dictionary/1"


class DictionaryConfig(Config):
    """The fields every architecture has.

    ``d_in`` and ``d_out`` are derived from the data when a dictionary is trained; nobody has to give them.
    """

    d_in: PositiveInt
    d_out: PositiveInt
    n_features: PositiveInt


@dataclass(frozen=True)
class TrainingBatch:
    """What a loss may look at.

    Attributes:
        input: ``(n, d_in)``. target: ``(n, d_out)``.
        dead: ``(n_features,)`` boolean, the features that have not fired for a while; None where nobody counts.
        progress: from 0 at the first step to 1 at the last.
        side: ``(n, d_side)``, what the source gives beside input and target, in its own units (never scaled); None
            where it gives nothing.
    """

    input: Tensor
    target: Tensor
    dead: Tensor | None = None
    progress: float = 1.0
    side: Tensor | None = None


@dataclass(frozen=True)
class Loss:
    """What a loss returns: ``total`` to differentiate, its ``terms`` for the log, and the code it was made with.

    ``reconstruction`` is only measured now and then: a tensor, or a function that makes it.
    """

    total: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    code: SparseCode | None = None
    reconstruction: Tensor | Callable[[], Tensor] | None = None


class Dictionary(nn.Module):
    """A sparse dictionary: ``encode`` rows into a :class:`SparseCode`, ``decode`` them back.

    A new architecture is one file: a subclass with ``name``, a ``Config``, ``encode``, ``decode``, ``loss`` and
    ``decoder_directions``, registered with :func:`unweave.dictionaries.register`. Everything else (the hooks below)
    has a sensible default. The trainer knows only this interface, and :mod:`unweave.testing` checks it.

    Attributes:
        name: what it is registered as. Config: its config. citation: where the method comes from.
        good_for: when to choose it, in a line.
        trained_on: of one that was loaded, what is known of the rows it was trained on, as their provenance says it
            (``model``, ``site``, ``target_site``); None for one that was made in this process.
        betas: of Adam. lr_at_16k: the learning rate for 2^14 features; see :meth:`default_lr`.
        linear_decoder: claims that ``decode(code)`` is ``code @ decoder_directions()`` plus a constant.
        learns_by_gradient: whether ``loss`` is differentiated; else the trainer hands its batches to ``absorb``.
        atoms_are_rows: claims that atoms are rows of the training data, up to their length: a run then keeps the text
            that each came from.
        inference_note: what whoever reads its numbers should know of how it encodes once it is trained, in a sentence.
        needs_side: the side inputs without which it cannot be trained, as ``source.side`` names them; or "".
        ordered_features: claims that features are not interchangeable (nested prefixes, groups, experts): with its
            features in another order the dictionary may do something else. Else parameters and buffers are permuted
            along every dimension of size n_features, and codes are permuted likewise.
        homogeneous: claims that ``c`` times the distance from its centre (what it decodes from no code at all) gives
            ``c`` times the code, for ``c > 0``.
        scaled_codes: claims that values are in the units of the target, and that scale never goes into the directions;
            false where values mean something else (memberships, say).
        bfloat16: claims to encode and decode in bfloat16 as well.
    """

    name: ClassVar[str]
    Config: ClassVar[type[DictionaryConfig]]
    citation: ClassVar[str] = ""
    good_for: ClassVar[str] = ""
    betas: ClassVar[tuple[float, float]] = (0.9, 0.999)
    lr_at_16k: ClassVar[float] = 2e-4
    linear_decoder: ClassVar[bool] = True
    learns_by_gradient: ClassVar[bool] = True
    ordered_features: ClassVar[bool] = False
    homogeneous: ClassVar[bool] = False
    scaled_codes: ClassVar[bool] = True
    bfloat16: ClassVar[bool] = False
    atoms_are_rows: ClassVar[bool] = False
    inference_note: ClassVar[str] = ""
    needs_side: ClassVar[str] = ""
    trained_on: Mapping[str, Any] | None = None

    def __init__(self, config: DictionaryConfig) -> None:
        super().__init__()
        self.config: Any = config

    # ---- the contract -----------------------------------------------------------------------------------------

    def encode(self, x: Tensor) -> SparseCode:
        """Codes of ``(n, d_in)`` rows. In eval mode a row's code does not depend on the other rows."""
        raise NotImplementedError

    def decode(self, code: SparseCode) -> Tensor:
        """Reconstructions ``(n, d_out)``."""
        raise NotImplementedError

    def loss(self, batch: TrainingBatch) -> Loss:
        """The training loss, summed over d and averaged over rows."""
        raise NotImplementedError

    def decoder_directions(self) -> Tensor:
        """``(n_features, d_out)``, what each feature writes (for a non-linear decoder, its linear view)."""
        raise NotImplementedError

    def part_norms(self) -> Tensor | None:
        """``(n_features, n_parts)``, how much of each feature lies in each part of a row; None without parts."""
        return None

    def reconstruct(self, x: Tensor, code: SparseCode) -> Tensor:
        """``(n, d_out)``: what is made of the rows ``x`` with their ``code``, worked out before or edited since.

        That is ``decode(code)``, unless an architecture lets something of the input pass its code by.
        """
        return self.decode(code)

    def forward(self, x: Tensor) -> Tensor:
        return self.reconstruct(x, self.encode(x))

    @classmethod
    def sparsity_option(cls, l0: float) -> dict[str, Any]:
        """The option that asks this architecture for about ``l0`` firing features a row: k, or a target.

        Raises:
            UnweaveError: when it has none (its sparsity follows from a penalty).
        """
        fields = cls.Config.model_fields
        if "k" in fields:
            return {"k": int(l0) if float(l0).is_integer() else l0}
        if "target_l0" in fields:
            return {"target_l0": l0}
        raise UnweaveError(
            f"{cls.name} takes no k: its sparsity follows from other options, see `unweave archs {cls.name}`"
        )

    # ---- hooks of the trainer ---------------------------------------------------------------------------------

    def default_lr(self) -> float:
        """The learning rate when the user names none, ``lr_at_16k / sqrt(n_features / 2^14)``.

        A published rate belongs to its width: narrow dictionaries learn too little with it.
        """
        return self.lr_at_16k / (self.n_features / 2**14) ** 0.5

    def initialise(self, sample: Tensor, target: Tensor) -> None:
        """Set what depends on data (biases, thresholds) from ``(n, d)`` sample rows, before the first step."""

    def initialise_map(self, sample: Tensor, target: Tensor) -> None:
        """After ``initialise``, where the target is another than the input: make a map the starting point."""

    def initialise_side(self, side: Tensor) -> None:
        """After ``initialise``, where there are side inputs: set what depends on the ``(n, d_side)`` of the sample."""

    def before_step(self) -> None:
        """After the gradients, before the optimiser: project gradients."""

    def after_step(self, loss: Loss, progress: float) -> None:
        """After the optimiser: renormalise, retract, update thresholds."""

    def absorb(self, batch: TrainingBatch) -> Loss:
        """Learn from a batch without a gradient (greedy, clustering, streaming methods); the counterpart of ``loss``.

        Called once a step where ``learns_by_gradient`` is False. Everything learnt belongs in parameters and buffers
        of fixed shapes: they are what a checkpoint holds. The loss it returns is for the log; it needs a ``code``.
        """
        raise NotImplementedError

    def complete(self) -> None:
        """After the last batch, before ``fold_scale``: work out what takes all of the data. May run more than once."""

    def fold_scale(self, scale: float, out_scale: float | None = None) -> None:
        """Turn a dictionary trained on ``scale * x`` (and ``out_scale * target``) into one for ``x`` itself.

        Codes and outputs come out in the units of the target. ``out_scale`` is ``scale`` when left out.
        """
        raise NotImplementedError

    # ---- facts ------------------------------------------------------------------------------------------------

    @property
    def n_features(self) -> int:
        return self.config.n_features

    @property
    def d_in(self) -> int:
        return self.config.d_in

    @property
    def d_out(self) -> int:
        return self.config.d_out

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def check_input(self, x: Tensor) -> Tensor:
        """``x`` in the dictionary's dtype, refused if its width is wrong or it holds NaN or infinity."""
        return self.check_finite(self.check_width(x))

    def check_width(self, x: Tensor) -> Tensor:
        """``x`` in the dictionary's dtype, refused if its width is wrong."""
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise UnweaveError(
                f"{self.name}: expected rows of width {self.d_in} (shape (n, {self.d_in})), found shape "
                f"{tuple(x.shape)}. Was this dictionary trained on another site or model?"
            )
        parameter = next(self.parameters())
        return x.to(parameter.device, parameter.dtype)

    def check_finite(self, x: Tensor) -> Tensor:
        """``x``, refused if it holds NaN or infinity."""
        if not bool(torch.isfinite(x.sum())):  # a sum is one pass; look closer only when it overflows
            bad = ~torch.isfinite(x).all(dim=1)
            if bool(bad.any()):
                raise UnweaveError(
                    f"{self.name}: {int(bad.sum())} of {len(x)} rows hold NaN or infinity (first: row "
                    f"{int(bad.nonzero()[0])}). Drop them, or look for an overflow in the model's dtype."
                )
        return x

    def check_code(self, code: SparseCode) -> SparseCode:
        """``code``, refused if it is of another number of features."""
        if code.n_features != self.n_features:
            raise UnweaveError(f"{self.name}: expected a code of {self.n_features} features, found {code.n_features}")
        return code

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.config.to_dict().items())

    # ---- files ------------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """Write ``config.json`` and ``dictionary.safetensors`` into a folder."""
        folder = Path(folder)
        write_tensors(folder / "dictionary.safetensors", dict(self.state_dict()))
        write_json(folder / "config.json", {"format": _FORMAT, "arch": self.name, **self.config.to_dict()})

    @classmethod
    def load(cls, folder: str | Path, device: str = "cpu") -> Self:
        """Read a dictionary that ``save`` wrote, of whichever architecture its config names.

        Raises:
            UnweaveError: when files are missing, cut short, of another format, or do not fit the config.
        """
        from unweave.dictionaries.registry import get

        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise UnweaveError(f"no dictionary in {folder}: expected config.json and dictionary.safetensors")
        values = read_json(folder / "config.json")
        if not isinstance(values, dict) or values.pop("format", None) != _FORMAT:
            raise UnweaveError(f"{folder / 'config.json'} is not of format {_FORMAT!r}")
        kind = get(str(values.pop("arch", "")))
        if not issubclass(kind, cls):
            raise UnweaveError(f"{folder} holds a {kind.name!r} dictionary, expected {cls.name!r}")
        dictionary = kind(kind.Config.from_dict(values))
        tensors = read_tensors(folder / "dictionary.safetensors", device)
        expected = {name: tuple(t.shape) for name, t in dictionary.state_dict().items()}
        found = {name: tuple(t.shape) for name, t in tensors.items()}
        if expected != found:
            wrong = sorted(n for n in expected.keys() | found.keys() if expected.get(n) != found.get(n))
            raise UnweaveError(
                f"{folder}: weights do not fit the config: "
                + "; ".join(
                    f"{n}: expected {expected.get(n, 'nothing')}, found {found.get(n, 'nothing')}" for n in wrong
                )
            )
        dictionary.load_state_dict(tensors)
        return dictionary.to(device).eval()  # pyright: ignore[reportReturnType]


def warm(progress: float, share: float) -> float:
    """How much of a penalty counts, from 0 to 1, that rises evenly over the first ``share`` of training."""
    return min(1.0, progress / share) if share else 1.0


def no_side(dictionary: Dictionary | type[Dictionary], found: str | None = None) -> UnweaveError:
    """What to say where a dictionary that ``needs_side`` is given none, or the ones called ``found``."""
    kind, has = dictionary.needs_side, f"others ({found})" if found else "none"
    return UnweaveError(
        f"{dictionary.name} is trained with side inputs ({kind}) and the data has {has}. From a model's text: collect "
        f"the activations with source.side={kind}. From arrays: unweave.fit(rows, side=..., ...)"
    )
