"""One training run in memory: the step, and the state from which it continues bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from unweave.activations.ring import ShuffleRing
from unweave.activations.stream import Chunk
from unweave.dictionaries import Dictionary, Loss, TrainingBatch
from unweave.dictionaries._base import no_side
from unweave.errors import UnweaveError
from unweave.kernels.calibration import plan_for
from unweave.kernels.workspace import Plan
from unweave.training._steps import Diverged, make_step
from unweave.training._window import Window
from unweave.training.config import TrainingConfig

Prepared = tuple[Tensor, Tensor, Tensor | None]  # input, target, side
_SAMPLE_ROWS = 8192  # rows from which the scale and the dictionary's starting point are worked out


class Trainer:
    """Steps a dictionary over the batches of a ring. It knows the dictionary only by its interface.

    Attributes:
        step: steps done.
        scale, target_scale: what rows and targets are multiplied with; ``target_scale`` is None where the target is
            the input itself.
        input_norms: root mean square, median and largest norm of the sampled rows, for the health report.
    """

    def __init__(self, dictionary: Dictionary, ring: ShuffleRing, config: TrainingConfig) -> None:
        self.dictionary, self.ring, self.config = dictionary, ring, config
        self.device = dictionary.device
        self.step = 0
        self.scale, self.target_scale = 1.0, None
        self.input_norms: dict[str, float] = {}
        self.lr = config.lr or dictionary.default_lr() * (1.0 if config.continued else config.lr_boost)
        self.parameters = {name: p for name, p in dictionary.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.Adam(
            # Adam refuses an empty list, and what learns without gradients may have nothing that asks for one.
            list(self.parameters.values()) or [torch.zeros((), device=self.device)],
            lr=self.lr,
            betas=dictionary.betas,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.stepper = make_step(dictionary, self.optimizer, config.grad_clip, self._plan_for())
        self.silent = torch.zeros(dictionary.n_features, dtype=torch.long, device=self.device)
        self.window = Window(dictionary.d_out, config.log_steps, config.n_steps, config.batch_size)

    def _plan_for(self) -> Callable[[], Plan] | None:
        engine = self.config.engine
        if engine == "autograd":
            return None
        pinned = None if engine == "auto" else engine
        return lambda: plan_for(self._encoder(), self.config.batch_size, "train", pinned)

    def _encoder(self) -> Tensor:
        return self.parameters["W_enc"].detach()

    # ---- the start --------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Measure the scale on the ring's first rows and let the dictionary set what depends on data."""
        sample = self.ring.sample(_SAMPLE_ROWS)
        same = sample.target is sample.input
        x = sample.input.to(self.device).float()
        target = x if same else sample.target.to(self.device).float()
        self._check_widths(x, target)
        if self.dictionary.needs_side and sample.side is None:
            raise no_side(self.dictionary)
        norms = x.double().norm(dim=1)
        rms = float(norms.square().mean().sqrt())
        self.input_norms = {"rms": rms, "median": float(norms.median()), "largest": float(norms.max())}
        if self.config.normalise_input:
            self.scale = _inverse(rms, "input")
            if not same:
                target_rms = float(target.double().square().sum(1).mean().sqrt())
                self.target_scale = _inverse(target_rms, "target")
        self.dictionary.train()
        if self.config.continued:  # what finish folds into the weights is taken out of them
            with torch.no_grad():
                self.dictionary.fold_scale(1 / self.scale, None if same else 1 / (self.target_scale or 1.0))
            return
        x = x * self.scale
        target = x if same else target * (self.target_scale or 1.0)
        self.dictionary.initialise(x, target)
        if not same:
            self.dictionary.initialise_map(x, target)
        if sample.side is not None:
            self.dictionary.initialise_side(sample.side.to(self.device).float())

    def _check_widths(self, x: Tensor, target: Tensor) -> None:
        expected, found = (self.dictionary.d_in, self.dictionary.d_out), (x.shape[1], target.shape[1])
        if expected != found:
            raise UnweaveError(
                f"the dictionary takes rows of width {expected[0]} to width {expected[1]}, but the activations have "
                f"{found[0]} (input) and {found[1]} (target): build it with d_in={found[0]}, d_out={found[1]}"
            )

    # ---- one step ---------------------------------------------------------------------------------------------

    @property
    def progress(self) -> float:
        return self.step / max(1, self.config.n_steps - 1)

    def advance(self) -> None:
        """Do one step.

        Raises:
            UnweaveError: when the loss or a gradient is not finite; the weights are then those before the step.
        """
        x, target, side = self._rows()
        lr = self.lr * self.config.lr_factor(self.step)
        batch = TrainingBatch(x, target, self.silent > self.config.dead_rows, self.progress, side)
        try:
            loss, values = self.stepper.run(batch, lr, self.progress)
        except Diverged as error:
            raise self._diverged(error.values, lr) from None
        counts = self._count(loss, values)
        self.silent += len(x)
        self.silent.masked_fill_(counts > 0, 0)
        self.window.add(values)
        if self.window.wants_rows(self.step):
            self.window.add_rows(target, self._reconstruction(loss, x))
        self.step += 1

    def _rows(self) -> Prepared:
        return self._prepared(self.ring.draw())

    def _prepared(self, rows: Chunk) -> Prepared:
        """Rows as the dictionary is trained on them: float32, on its device, scaled (but for side inputs)."""

        def moved(tensor: Tensor, scale: float = 1.0) -> Tensor:
            tensor = tensor.to(self.device, torch.float32, non_blocking=True)
            return tensor if scale == 1 else tensor * scale

        x = moved(rows.input, self.scale)
        target = x if rows.target is rows.input else moved(rows.target, self.target_scale or 1.0)
        return x, target, None if rows.side is None else moved(rows.side)

    def _count(self, loss: Loss, values: dict[str, float]) -> Tensor:
        """In how many rows each feature fired; their mean per row joins the values."""
        code = loss.code
        if code is None:
            raise UnweaveError(f"{self.dictionary.name}: its Loss has no code, and the trainer counts firings by it")
        counts = code.firing_counts()
        values["l0"] = float(counts.sum()) / max(1, len(code))
        return counts

    def _reconstruction(self, loss: Loss, x: Tensor) -> Tensor:
        with torch.no_grad():
            if loss.reconstruction is not None:
                return loss.reconstruction() if callable(loss.reconstruction) else loss.reconstruction
            assert loss.code is not None
            return self.dictionary.reconstruct(x, loss.code)

    def _diverged(self, values: dict[str, float], lr: float) -> UnweaveError:
        shown = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        return UnweaveError(
            f"training broke down at step {self.step + 1:,} of {self.config.n_steps:,}: {shown}. Likely causes: the "
            f"learning rate ({lr:.2g}) is too high, inputs overflow (rows measured {self._norms_in_words()}), or "
            "normalise_input is off. Try a tenth of the learning rate. The last checkpoint, if there is one, is from "
            "before this step and is kept."
        )

    def _norms_in_words(self) -> str:
        norms = self.input_norms
        return f"a median norm of {norms['median']:.3g} and a largest of {norms['largest']:.3g} at the start"

    # ---- the log ----------------------------------------------------------------------------------------------

    def line(self) -> dict[str, Any]:
        """The numbers of the window that just ended; starts the next window."""
        means = self.window.means()
        line = {
            "step": self.step,
            "rows": self.step * self.config.batch_size,
            "loss": means.pop("loss"),
            "fvu": self.window.fvu(),
            "l0": means.pop("l0"),
            "dead_share": float((self.silent > self.config.dead_rows).double().mean()),
            "lr": self.lr * self.config.lr_factor(self.step - 1),
            "grad_norm": means.pop("grad_norm"),
            **means,
        }
        self.window.reset()
        return line

    # ---- state ------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on, and the log window."""
        adam = {name: dict(self.optimizer.state[p]) for name, p in self.parameters.items() if p in self.optimizer.state}
        return {
            "step": self.step,
            "lr": self.lr,
            "scale": self.scale,
            "target_scale": self.target_scale,
            "input_norms": self.input_norms,
            "weights": dict(self.dictionary.state_dict()),
            "adam": adam,
            "engine": self.stepper.state_dict(),
            "silent": self.silent,
            "window": self.window.state_dict(),
            "ring": self.ring.state_dict(),
            "rng": torch.get_rng_state(),
            "rng_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self.scale, self.target_scale = state["step"], state["scale"], state["target_scale"]
        self.input_norms = state["input_norms"]
        self.lr = state.get("lr", self.lr)  # defaults may change; what was begun goes on as it was
        self.dictionary.load_state_dict(state["weights"])
        for name, values in state["adam"].items():
            parameter = self.parameters[name]
            # Adam keeps its step count on the parameter's device only when fused; either way it moves it itself.
            moved = {key: v.to(self.device) for key, v in values.items()}
            # Fused Adam walks through memory: moments have to lie there as their weights do (a matrix may be a
            # transpose), and a file does not say how they lay.
            self.optimizer.state[parameter] = {
                key: torch.empty_like(parameter).copy_(v) if v.shape == parameter.shape and v.ndim else v
                for key, v in moved.items()
            }
        self.stepper.load_state_dict(state["engine"])
        self.silent.copy_(state["silent"])
        self.window.load_state_dict(state["window"], self.device)
        self.ring.load_state_dict(state["ring"])
        torch.set_rng_state(state["rng"])
        if state["rng_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["rng_cuda"], self.device)
        self.dictionary.train()

    def finish(self) -> None:
        """Fold the scales into the dictionary, which then takes raw rows, and put it in eval mode."""
        with torch.no_grad():
            self.dictionary.complete()
            self.dictionary.fold_scale(self.scale, self.target_scale)
        self.dictionary.eval()


def _inverse(rms: float, what: str) -> float:
    if not math.isfinite(rms):
        raise UnweaveError(f"the first {what} rows hold NaN or infinity: drop them, or look for an overflow")
    if rms == 0:
        raise UnweaveError(f"the first {what} rows are all zero: there is nothing to learn from them")
    return 1.0 / rms
