"""How to train: one frozen config, with the defaults a first run needs."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from unweave.config import Config
from unweave.kernels.names import Pin

Engine = Literal["auto", "autograd", Pin]


class TrainingConfig(Config):
    """How to train a dictionary.

    Attributes:
        n_rows: activation rows to train on in all, rounded up to whole batches.
        batch_size: rows a step.
        lr: Adam's learning rate at its highest. None: the dictionary's own default, which is meant for long runs,
            times :attr:`lr_boost` for short ones.
        warmup: linear rise of the learning rate: a share of all steps (below 1) or a number of steps.
        decay: the last share of all steps, over which the learning rate falls linearly to 0.
        grad_clip: largest global norm of the gradients; None leaves them alone.
        seed: of everything random in training.
        normalise_input: train on ``x / sqrt(mean ||x||^2)`` and fold the scale back at the end, so that
            coefficients mean the same for every model; targets get a scale of their own by the same rule.
        ring_rows: rows the shuffle ring mixes; batches are drawn from these.
        continued: go on from the weights the dictionary has, which are for raw rows, instead of setting what depends on
            data from the first rows; no :attr:`lr_boost` then.
        mixing: "rows" replaces every row as it is drawn; "halves" draws half of the ring without replacement, then
            replaces that half at once (SAELens' buffer, which FAST uses).
        dead_after: a feature silent for more rows than this is dead. None: a twentieth of ``n_rows``, but at least
            50 batches and at most 10 million rows (the customary rule of long runs).
        log_every: steps between lines of ``metrics.jsonl``; None: 50 lines, at most 100 steps apart.
        checkpoint_every: steps between checkpoints; 0 for none; None: about once a minute of work.
        keep_checkpoint: keep the last checkpoint (optimiser and all) after training ends.
        engine: how a step is computed. "auto": in closed form where the architecture has one, with the kernels that
            were fastest on this machine (see ``unweave doctor``). "reference", "cpu", "cpu+certified", "cpu+screen",
            "cpu+int8_screen", "gpu" or "gpu+screen" pins them, "autograd" does without. All of these agree to float32's
            last digits (but what AuxK adds, to bfloat16's where the plan screens). "cpu+bfloat16" and "gpu+bfloat16"
            round codes, atoms, rows and errors to bfloat16 where a step reads them; weights and moments stay float32.
            "cpu" takes the fastest library for float32 products; "cpu+torch", "cpu+numpy" and "cpu+onednn" name one.
        precision: of matrix products on NVIDIA cards. "tf32" keeps 10 bits of mantissa, more than the bfloat16 the
            activations were stored in; processors always work in float32.
    """

    # Fields that change no number: a run may be resumed with other values of these.
    HARMLESS: ClassVar[frozenset[str]] = frozenset({"checkpoint_every", "keep_checkpoint"})
    # Whether the dictionary is asked to give its rows back, so that a large FVU means that something went wrong.
    by_reconstruction: ClassVar[bool] = True

    n_rows: PositiveInt
    batch_size: PositiveInt = 2048
    lr: PositiveFloat | None = None
    warmup: NonNegativeFloat = 0.05
    decay: float = Field(default=0.2, ge=0, le=1)
    grad_clip: PositiveFloat | None = 1.0
    seed: int = Field(default=0, ge=0, lt=2**63)
    normalise_input: bool = True
    continued: bool = False
    ring_rows: PositiveInt = 65_536
    mixing: Literal["rows", "halves"] = "rows"
    dead_after: PositiveInt | None = None
    log_every: PositiveInt | None = None
    checkpoint_every: NonNegativeInt | None = None
    keep_checkpoint: bool = False
    engine: Engine = "auto"
    precision: Literal["float32", "tf32"] = "tf32"

    @property
    def n_steps(self) -> int:
        return math.ceil(self.n_rows / self.batch_size)

    @property
    def warmup_steps(self) -> int:
        return round(self.warmup * self.n_steps) if self.warmup < 1 else round(self.warmup)

    @property
    def dead_rows(self) -> int:
        """The rows of silence after which a feature counts as dead."""
        if self.dead_after is not None:
            return self.dead_after
        return min(10_000_000, max(50 * self.batch_size, self.n_rows // 20))

    @property
    def lr_boost(self) -> float:
        """How much more than a dictionary's default rate a short run gets: ``sqrt(50,000 / steps)``, from 1 to 8.

        Published rates are for some 100 million rows and more; with a thousand steps they leave a dictionary far from
        trained. On SmolLM2-135M (layer 12, 4,608 features, k = 32, 977 steps of 2,048 rows) the training FVU ended at
        0.245 with the plain default, and at 0.206, 0.181 and 0.166 with 2.1, 4.2 and 8.5 times that. With 245 steps 17
        times gave 23 % dead features, 8.5 times 1 %: hence the cap.
        """
        return min(8.0, max(1.0, (50_000 / self.n_steps) ** 0.5))

    @property
    def log_steps(self) -> int:
        return self.log_every or max(1, min(100, self.n_steps // 50))

    def lr_factor(self, step: int) -> float:
        """Share of ``lr`` at ``step``: up over the warm-up, flat, down to (nearly) 0 over the decay."""
        decay_steps = round(self.decay * self.n_steps)
        rising = min(1.0, (step + 1) / (self.warmup_steps + 1))
        falling = min(1.0, (self.n_steps - step) / (decay_steps + 1))
        return min(rising, falling)
