"""What every library under test looks like to the benchmark, and how a library's own training loop is stepped.

A :class:`Peer` is built from a :class:`Setup` (sizes, learning rate, the tensors to start from), so all of them start
from the same dictionary. ``train_step`` is one full step of that library's own trainer, with whatever it does in a
step: clipping, projection, renormalisation, statistics, scheduler. Nothing is re-implemented: where a library has no
step to call, only a loop that asks for data, :class:`Stepped` runs that very loop and stops it at each request.
"""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

LONG_SILENT = 10**9  # rows: beyond every library's rule for "dead"


@dataclass(frozen=True)
class Setup:
    """Where every library starts from.

    ``u = (x - b_dec) W_enc^T + b_enc``; W_enc and W_dec are ``(n_features, d)`` and W_dec's rows have unit norm.
    ``threshold`` is JumpReLU's, chosen so that about ``k`` features fire per row at the start.
    """

    d: int
    n_features: int
    k: int
    batch_size: int
    lr: float
    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    threshold: float
    auxk: bool = False  # switch the AuxK loss on in libraries that leave it off

    @property
    def b_enc_without_centring(self) -> Tensor:
        """The encoder bias of a library that does not subtract b_dec from its input: the same pre-activations."""
        return self.b_enc - self.W_enc @ self.b_dec

    @staticmethod
    def make(sample: Tensor, n_features: int, k: int, batch_size: int, lr: float, seed: int = 0) -> Setup:
        """Random unit atoms, a tied encoder scaled to unit gain, b_dec the mean of the ``(n, d)`` sample."""
        d = sample.shape[1]
        generator = torch.Generator().manual_seed(seed)
        atoms = torch.nn.functional.normalize(torch.randn(n_features, d, generator=generator), dim=1)
        mean = sample.mean(0)
        centred = sample[:1024] - mean
        scores = centred @ atoms.T
        top = scores.topk(k, dim=1)
        z = torch.zeros_like(scores).scatter_(1, top.indices, top.values.relu())
        gain = float((z @ atoms).norm(dim=1).mean() / centred.norm(dim=1).mean())
        encoder = atoms / max(gain, 1e-3)
        threshold = float((scores / max(gain, 1e-3)).flatten().topk(k * len(centred) + 1).values[-1])
        zeros = torch.zeros(n_features)
        return Setup(d, n_features, k, batch_size, lr, encoder, atoms, zeros, mean, max(threshold, 1e-3))

    def with_dead(self, sample: Tensor, share: float) -> tuple[Setup, Tensor]:
        """The same start with ``share`` of the features held below every row's k-th largest, and their indices.

        Their pre-activations stay positive on many rows, so AuxK has something to choose from.
        """
        dead = torch.arange(round(share * self.n_features)) * round(1 / share)
        scores = (sample[:2048] - self.b_dec) @ self.W_enc.T
        lowest = float(scores.topk(self.k, dim=1).values[:, -1].min())
        b_enc = self.b_enc.clone()
        b_enc[dead] = (0.9 * lowest - scores[:, dead].max(0).values).clamp(max=0.0)
        return replace(self, b_enc=b_enc, auxk=True), dead


class Peer(ABC):
    """One library at one setting.

    Attributes:
        name: library, version and architecture. setting: what differs from its defaults, or "default".
        note: what a reader must know to compare (a bias it lacks, and the like).
    """

    name: str
    setting: str = "default"
    note: str = ""

    @abstractmethod
    def train_step(self, x: Tensor) -> None:
        """One full training step on ``(batch_size, d)`` rows."""

    @abstractmethod
    def encode(self, x: Tensor) -> Any:
        """The library's inference encode, in whatever form it returns codes."""

    @abstractmethod
    def reconstruct(self, x: Tensor) -> Tensor:
        """``(n, d)`` reconstructions by the library's inference encode and decode."""

    def dense(self, x: Tensor) -> Tensor:
        """``(n, n_features)``: the inference codes as a dense matrix, to compare libraries by."""
        return self.encode(x)

    def force_dead(self, features: Tensor) -> None:
        """Tell the library's own counter that these features have been silent for long."""
        raise NotImplementedError(f"{self.name} has no AuxK loss over dead features")

    def close(self) -> None:  # noqa: B027  most have nothing to let go of
        """Let go of a loop that was left in the middle."""


class Stepped:
    """Runs a training loop one step at a time, in the same thread.

    The loop runs in a greenlet. Each time it calls ``next_batch`` it is set aside, and goes on at the next
    :meth:`step`. A step thus lasts from one request for data to the following one, and includes all that the loop
    does in between. Its prints and progress bars go nowhere.
    """

    def __init__(self, loop: Callable[[Callable[[], Tensor]], Any]) -> None:
        from greenlet import getcurrent, greenlet

        self._home = getcurrent()
        self._loop = greenlet(lambda: loop(self._next_batch))
        with silent():
            self._loop.switch()  # up to the first request

    def _next_batch(self) -> Tensor:
        return self._home.switch()

    def step(self, x: Tensor) -> None:
        if self._loop.dead:
            raise RuntimeError("the library's training loop has ended")
        self._loop.switch(x)

    def close(self) -> None:
        with silent(), contextlib.suppress(Exception):
            self._loop.throw()


class Endless:
    """An iterable whose every item comes from a function; a fresh ``iter`` goes on with the same function."""

    def __init__(self, item: Callable[[], Any]) -> None:
        self._item = item

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return self._item()


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """No output; what keeps ``sys.stderr`` (as progress bars do) stays silent for good."""
    with contextlib.redirect_stdout(_NOWHERE), contextlib.redirect_stderr(_NOWHERE):
        yield


_NOWHERE = open(os.devnull, "w")  # noqa: SIM115  kept open: progress bars write to it as long as they live


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """torch's global float32 matrix product precision, set back afterwards so that peers do not meet it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def version(package: str) -> str:
    from importlib.metadata import version as installed

    return installed(package)
