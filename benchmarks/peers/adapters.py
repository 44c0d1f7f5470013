"""Every row of the benchmark: its key, and how to build it. Libraries are imported when a row of theirs is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .base import Peer, Setup


@dataclass(frozen=True)
class Row:
    """One library at one setting.

    Attributes:
        key: stable name, used in JSON and to choose rows. ours: unweave's own. exact: trains the very architecture
            named (groupmax, for one, is not TopK). bf16: computes products in bfloat16, so its values differ.
        auxk: also run with AuxK over dead features.
    """

    key: str
    build: Callable[[Setup], Peer]
    ours: bool = False
    exact: bool = True
    bf16: bool = False
    auxk: bool = False


def _unweave(arch: str, engine: str) -> Callable[[Setup], Peer]:
    def build(setup: Setup) -> Peer:
        from .ours import Unweave

        return Unweave(setup, arch, engine)

    return build


def _sparsify(setting: str) -> Callable[[Setup], Peer]:
    def build(setup: Setup) -> Peer:
        from .lib_sparsify import Sparsify

        return Sparsify(setup, setting)

    return build


def _dictionary_learning(arch: str, setting: str) -> Callable[[Setup], Peer]:
    def build(setup: Setup) -> Peer:
        from .lib_dictionary_learning import DictionaryLearning

        return DictionaryLearning(setup, arch, setting)

    return build


def _sae_lens(arch: str, setting: str) -> Callable[[Setup], Peer]:
    def build(setup: Setup) -> Peer:
        from .lib_sae_lens import SaeLens

        return SaeLens(setup, arch, setting)

    return build


def _overcomplete(setting: str) -> Callable[[Setup], Peer]:
    def build(setup: Setup) -> Peer:
        from .lib_overcomplete import Overcomplete

        return Overcomplete(setup, setting)

    return build


def _llamascopium(arch: str, setting: str) -> Callable[[Setup], Peer]:
    def build(setup: Setup) -> Peer:
        from .lib_llamascopium import Llamascopium

        return Llamascopium(setup, arch, setting)

    return build


def _unweave_rows(arch: str, auxk: bool = False) -> list[Row]:
    return [
        Row(f"unweave/{engine}", _unweave(arch, engine), ours=True, auxk=auxk, bf16=engine == "bfloat16")
        for engine in OUR_ENGINES
    ]


OUR_ENGINES = ("autograd", "exact", "certified", "screen", "int8", "bfloat16")

TRAIN: dict[str, list[Row]] = {
    "TopK": [
        *_unweave_rows("TopK", auxk=True),
        Row("eai-sparsify/adam", _sparsify("adam"), auxk=True),
        Row("eai-sparsify/signum", _sparsify("signum")),
        Row("eai-sparsify/groupmax", _sparsify("groupmax"), exact=False),
        Row("dictionary_learning/default", _dictionary_learning("TopK", "default"), auxk=True),
        Row("dictionary_learning/autocast", _dictionary_learning("TopK", "autocast"), bf16=True),
        Row("sae-lens/default", _sae_lens("TopK", "default"), auxk=True),
        Row("sae-lens/autocast", _sae_lens("TopK", "autocast"), bf16=True, auxk=True),
        Row("sae-lens/sparse", _sae_lens("TopK", "sparse")),
        Row("overcomplete/default", _overcomplete("default")),
        Row("overcomplete/fastest", _overcomplete("fastest"), auxk=True),
        Row("overcomplete/amp", _overcomplete("amp"), bf16=True),
        Row("llamascopium/default", _llamascopium("TopK", "default"), bf16=True),
        Row("llamascopium/float32", _llamascopium("TopK", "float32")),
        Row("llamascopium/fastest", _llamascopium("TopK", "fastest"), bf16=True, auxk=True),
    ],
    "BatchTopK": [
        *_unweave_rows("BatchTopK"),
        Row("dictionary_learning/default", _dictionary_learning("BatchTopK", "default")),
        Row("dictionary_learning/autocast", _dictionary_learning("BatchTopK", "autocast"), bf16=True),
        Row("sae-lens/default", _sae_lens("BatchTopK", "default")),
        Row("sae-lens/autocast", _sae_lens("BatchTopK", "autocast"), bf16=True),
        Row("llamascopium/fastest", _llamascopium("BatchTopK", "fastest"), bf16=True),
    ],
    "JumpReLU": [
        *_unweave_rows("JumpReLU"),
        Row("dictionary_learning/default", _dictionary_learning("JumpReLU", "default")),
        Row("dictionary_learning/autocast", _dictionary_learning("JumpReLU", "autocast"), bf16=True),
        Row("sae-lens/default", _sae_lens("JumpReLU", "default")),
        Row("sae-lens/autocast", _sae_lens("JumpReLU", "autocast"), bf16=True),
    ],
}
# Encoding: the rows whose inference code differs (the optimiser or autocast in training does not change it).
ENCODE_KEYS = (
    "unweave/",
    "eai-sparsify/adam",
    "dictionary_learning/default",
    "sae-lens/default",
    "overcomplete/default",
    "llamascopium/float32",
)


def encode_rows() -> list[Row]:
    """One TopK row for each library's inference encode, and each of our engines'."""
    return [row for row in TRAIN["TopK"] if row.key.startswith(ENCODE_KEYS)]


def pursuits(atoms: Tensor, k: int) -> dict[str, Callable[[], Callable[[Tensor], Any]]]:
    """Matching pursuit encoders by key, each a function that builds it; the naive one is k full matrix products."""

    def ours() -> Callable[[Tensor], Any]:
        from .ours import matching_pursuit

        return matching_pursuit(atoms, k)

    def sae_lens(setting: str) -> Callable[[], Callable[[Tensor], Any]]:
        def build() -> Callable[[Tensor], Any]:
            from .lib_sae_lens import matching_pursuit

            return matching_pursuit(atoms, k, setting)

        return build

    def overcomplete() -> Callable[[Tensor], Any]:
        from .lib_overcomplete import matching_pursuit

        return matching_pursuit(atoms, k)

    return {
        "unweave": ours,
        "sae-lens/default": sae_lens("default"),
        "sae-lens/no checks": sae_lens("no checks"),
        "overcomplete/default": overcomplete,
    }


def buffers(rows: Tensor, capacity: int, batch_size: int, chunk: int) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Shuffle buffers by key, each a function that builds (not fills) it and gives what draws a batch."""

    def ours() -> Callable[[], Any]:
        from .ours import shuffle_ring

        return shuffle_ring(rows, capacity, batch_size, chunk).next

    def sae_lens() -> Callable[[], Any]:
        from .lib_sae_lens import mixing_buffer

        return mixing_buffer(rows, capacity, batch_size, chunk).__next__

    return {"unweave": ours, "sae-lens/default": sae_lens}
