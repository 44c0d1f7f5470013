"""unweave: one step of its ``Trainer``, its encode, its ring."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from unweave.activations.ring import ShuffleRing
from unweave.activations.stream import Chunk, RowStream
from unweave.batch import ActivationBatch
from unweave.codes import SparseCode
from unweave.dictionaries import get
from unweave.kernels.pursuit import cpu as pursuit
from unweave.sources._base import Source
from unweave.training._trainer import Trainer
from unweave.training.config import TrainingConfig

from .base import LONG_SILENT, Peer, Setup, version

ENGINES: dict[str, Any] = {
    "autograd": "autograd",
    "exact": "cpu",
    "certified": "cpu+certified",
    "screen": "cpu+screen",
    "int8": "cpu+int8_screen",
    "bfloat16": "cpu+bfloat16",
}
_ARCHS = {"TopK": "topk", "BatchTopK": "batch_topk", "JumpReLU": "jumprelu"}


def dictionary_of(setup: Setup, arch: str) -> Any:
    """An unweave dictionary with the start's weights."""
    kind = get(_ARCHS[arch])
    sizes: dict[str, Any] = {"d_in": setup.d, "d_out": setup.d, "n_features": setup.n_features}
    special = {"target_l0": float(setup.k)} if arch == "JumpReLU" else {"k": setup.k}
    config: Any = {**sizes, **special}
    dictionary: Any = kind(kind.Config(**config))
    with torch.no_grad():
        dictionary.W_enc.copy_(setup.W_enc)
        dictionary.W_dec.copy_(setup.W_dec)
        dictionary.b_enc.copy_(setup.b_enc)
        dictionary.b_dec.copy_(setup.b_dec)
        if arch == "JumpReLU":
            dictionary.log_threshold.fill_(torch.tensor(setup.threshold).log())
    return dictionary.train()


def trainer_of(dictionary: Any, ring: Any, setup: Setup, engine: str) -> Trainer:
    """unweave's trainer, by the engine named.

    Raises:
        NotImplementedError: for an engine there is not (yet).
    """
    if engine not in ENGINES:
        raise NotImplementedError(f"unweave has no engine {engine!r} yet; it has {', '.join(ENGINES)}")
    config = TrainingConfig(
        n_rows=setup.batch_size * 10**6,
        batch_size=setup.batch_size,
        lr=setup.lr,
        warmup=0,
        decay=0,
        normalise_input=False,
        log_every=100,
        engine=ENGINES[engine],
    )
    return Trainer(dictionary, ring, config)


class Unweave(Peer):
    """TopK, BatchTopK or JumpReLU, by the engine named.

    A step is ``Trainer.advance`` with its defaults: clipping at 1, gradient projection, unit atoms, firing counts, the
    log's sums. Rows are taken as they come (``normalise_input=False``), the learning rate is constant.
    """

    def __init__(self, setup: Setup, arch: str = "TopK", engine: str = "autograd") -> None:
        self.name = f"unweave {version('unweave')} {arch}"
        self.plan = "reference" if engine == "autograd" else ENGINES[engine]
        self.dictionary = dictionary_of(setup, arch)
        self.hand = _Hand()
        self.trainer = trainer_of(self.dictionary, self.hand, setup, engine)
        used = self.trainer.stepper.engine
        self.setting = f"engine {engine}" if engine in used else f"engine {engine} ({used})"

    def train_step(self, x: Tensor) -> None:
        self.dictionary.train()
        self.hand.rows = x
        self.trainer.advance()

    @torch.no_grad()
    def encode(self, x: Tensor) -> SparseCode:
        self.dictionary.eval()
        os.environ["UNWEAVE_KERNELS"] = self.plan
        return self.dictionary.encode(x)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        self.dictionary.eval()
        return self.dictionary.decode(self.dictionary.encode(x))

    def dense(self, x: Tensor) -> Tensor:
        return self.encode(x).dense()

    def force_dead(self, features: Tensor) -> None:
        self.trainer.silent[features] = LONG_SILENT


class _Hand:
    """Stands where the trainer expects a ring: gives the rows it was given."""

    rows: Tensor

    def draw(self) -> Chunk:
        return self.sample(len(self.rows))

    def sample(self, n: int) -> Chunk:
        rows = self.rows[:n]
        return Chunk(rows, rows, torch.zeros(len(rows), dtype=torch.long))


class RowsInMemory(Source):
    """An endless producer that gives ``chunk`` rows at a time, as a language model would."""

    def __init__(self, rows: Tensor, chunk: int) -> None:
        self.rows, self.chunk = rows, chunk

    @property
    def d_in(self) -> int:
        return self.rows.shape[1]

    @property
    def d_out(self) -> int:
        return self.rows.shape[1]

    @property
    def provenance(self) -> dict[str, Any]:
        return {"kind": "memory"}

    def batches(self, skip: int = 0) -> Iterator[ActivationBatch]:
        batches = [ActivationBatch.of_rows(part, None, 0) for part in self.rows.split(self.chunk)]
        number = skip
        while True:
            yield batches[number % len(batches)]
            number += 1


def shuffle_ring(rows: Tensor, capacity: int, batch_size: int, chunk: int) -> ShuffleRing:
    """unweave's ring over the same kind of producer as the peers' buffers get."""
    return ShuffleRing(RowStream(RowsInMemory(rows, chunk)), batch_size, capacity)


def matching_pursuit(atoms: Tensor, k: int) -> Callable[[Tensor], Any]:
    """unweave's matching pursuit encode; the Gram matrix is worked out here, once for all batches."""
    atoms = atoms.detach().contiguous()
    gram = pursuit.gram_matrix(atoms) if len(atoms) ** 2 * 4 <= 2**32 else None
    return lambda x: SparseCode.from_pattern(*pursuit.matching_pursuit(x, atoms, k, gram=gram))
