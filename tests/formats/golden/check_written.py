"""The reverse of ``make.py``: what unweave writes, the real libraries load, and compute the same.

Run where a library is installed, with unweave on the path::

    PYTHONPATH=src python tests/formats/golden/check_written.py [LIBRARY ...]
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from unweave import formats
from unweave.dictionaries import Dictionary, build
from unweave.errors import UnweaveError

D, M, K = 8, 24, 4
FACTS = formats.Facts("unweave", "any", model="gpt2", site="layers.3", hook="blocks.3.hook_resid_post")


def dictionaries() -> dict[str, Dictionary]:
    """One of every kind, with no bias zero and no norm one."""
    torch.manual_seed(0)
    made = {
        "relu": build("relu", D, M),
        "relu_subtracting": build("relu", D, M, variant="standard", subtract_bias=True),
        "topk": build("topk", D, M, k=K),
        "topk_plain": build("topk", D, M, k=K, subtract_bias=False),
        "abs_topk": build("abs_topk", D, M, k=K),
        "batch_topk": build("batch_topk", D, M, k=K),
        "batch_topk_untrained": build("batch_topk", D, M, k=K),
        "matryoshka": build("matryoshka", D, M, k=K, group_fractions=(0.25, 0.75)),
        "jumprelu": build("jumprelu", D, M, target_l0=K),
        "gated": build("gated", D, M),
        "gated_plain": build("gated", D, M, subtract_bias=False),
        "group_max": build("group_max", D, M, k=K),
        "mp": build("mp", D, M, k=K),
        "mp_adaptive": build("mp", D, M, k=D, variant="adaptive", tolerance=0.5, subtract_bias=True),
        "skip": build("skip_transcoder", D, M, k=K),
        "skip_relu": build("skip_transcoder", D, M, activation="relu", subtract_bias=True),
        "skip_jumprelu": build("jumprelu_skip_transcoder", D, M, target_l0=K),
        "skip_group_max": build("group_max_skip_transcoder", D, M, k=K),
        "skip_abs_topk": build("abs_topk_skip_transcoder", D, M, k=K),
        "standardised_topk": build("standardised_topk", D, M, k=K),
        "standardised_abs_topk": build("standardised_abs_topk", D, M, k=K, standardise="length"),
        "standardised_relu": build("standardised_relu", D, M, standardise="length"),
        "standardised_jumprelu": build("standardised_jumprelu", D, M, target_l0=K),
        "standardised_gated": build("standardised_gated", D, M, subtract_bias=False),
        "glu": build("glu", D, M, k=K),
        "clt": build("clt", D, M, n_parts=2, k=K),
        "clt_relu": build("clt", D, M, n_parts=2, activation="relu"),
        "clt_jumprelu": build("clt", D, M, n_parts=2, activation="jumprelu", k=K),
        "clt_skip": build("skip_clt", D, M, n_parts=2, activation="relu"),
        "crosscoder": build("crosscoder", D, M, n_parts=2),
        "batch_topk_crosscoder": build("batch_topk_crosscoder", D, M, n_parts=2, k=K),
        "topk_crosscoder": build("topk_crosscoder", D, M, n_parts=2, k=K),
    }
    with torch.no_grad():
        for name, dictionary in made.items():
            for parameter in dictionary.parameters():
                parameter.add_(0.4 * torch.randn_like(parameter))
            if name in ("batch_topk", "matryoshka", "batch_topk_crosscoder"):
                dictionary.threshold.fill_(0.8)
            if "jumprelu" in name and hasattr(dictionary, "log_threshold"):
                dictionary.log_threshold.copy_(torch.randn(M) * 0.5 - 0.5)
            if name.startswith("mp"):  # longer atoms make residuals grow
                dictionary.W_dec.copy_(torch.nn.functional.normalize(dictionary.W_dec, dim=1))
            if "clt" in name or "crosscoder" in name:  # as in training: parts at scales of their own, of two norms
                dictionary.in_scales.copy_(torch.tensor([0.5, 2.0]))
    return {name: dictionary.eval() for name, dictionary in made.items()}


def rows() -> Tensor:
    return 1.5 * torch.randn(64, D, generator=torch.Generator().manual_seed(1)) + 0.3


def saelens(folder: Path) -> tuple[Tensor, Tensor]:
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    return sae.encode(rows()), sae(rows())


def dictionary_learning(folder: Path) -> tuple[Tensor, Tensor]:
    from dictionary_learning.utils import load_dictionary

    dictionary, _ = load_dictionary(str(folder), "cpu")
    code = dictionary.encode(rows())
    return code, dictionary.decode(code)


def sparsify(folder: Path) -> tuple[Tensor, Tensor]:
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(folder)
    values, indices, _ = coder.encode(rows())
    return torch.zeros(len(rows()), M).scatter_(1, indices, values), coder(rows()).sae_out


def llamascopium(folder: Path) -> tuple[Tensor, Tensor]:
    from llamascopium.models import sae  # noqa: F401  registers its classes
    from llamascopium.models.sparse_dictionary import SparseDictionary

    loaded = SparseDictionary.from_pretrained(str(folder))
    code = loaded.encode(rows())
    return code, loaded.decode(code)


def llamascopium_parts(folder: Path) -> tuple[Tensor, Tensor]:
    from llamascopium.models import clt, crosscoder  # noqa: F401  registers its classes
    from llamascopium.models.sparse_dictionary import SparseDictionary

    loaded = SparseDictionary.from_pretrained(str(folder))
    code = loaded.encode(rows().view(-1, 2, D // 2))
    if isinstance(loaded, crosscoder.Crosscoder):
        return code[:, 0], loaded.decode(code).flatten(1)
    return code.flatten(1), loaded.decode(code, batch_first=True).flatten(1)


def _circuit_tracer(module: str) -> Any:
    """A module of circuit-tracer, without the packages for models and pictures that all of it wants."""
    for name in ("circuit_tracer", "circuit_tracer.transcoder", "circuit_tracer.utils"):
        if name not in sys.modules:
            spec, package = find_spec(name), ModuleType(name)
            package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations or ()) if spec else []
            sys.modules[name] = package
    sys.modules["circuit_tracer.utils"].get_default_device = lambda: torch.device("cpu")
    return import_module(f"circuit_tracer.transcoder.{module}")


def circuit_tracer(folder: Path) -> tuple[Tensor, Tensor]:
    (file,) = folder.glob("layer_*.safetensors")
    loaded = _circuit_tracer("single_layer_transcoder").load_relu_transcoder(str(file), 3)
    return loaded.encode(rows()), loaded(rows())


def circuit_tracer_clt(folder: Path) -> tuple[Tensor, Tensor]:
    loaded = _circuit_tracer("cross_layer_transcoder").load_clt(str(folder), dtype=torch.float32)
    x = rows().view(-1, 2, D // 2).transpose(0, 1)
    code = loaded.encode(x)
    return tuple(t.transpose(0, 1).flatten(1) for t in (code, loaded.decode(code, x)))


# What each can express; every other dictionary has to be refused.
PLAIN = {
    "relu",
    "relu_subtracting",
    "topk",
    "topk_plain",
    "batch_topk",
    "batch_topk_untrained",
    "matryoshka",
    "jumprelu",
}
GATED = {"gated", "gated_plain"}
GROUPS = {"group_max", "skip_group_max"}
THRESHOLDS = {"relu", "relu_subtracting", "batch_topk", "matryoshka", "jumprelu"}
SAELENS = {"abs_topk", "mp", "mp_adaptive", "skip_relu", "skip_jumprelu"}
SAELENS |= {f"standardised_{name}" for name in ("topk", "abs_topk", "relu", "jumprelu", "gated")}
LIBRARIES: dict[str, tuple[str, Callable[[Path], tuple[Tensor, Tensor]], set[str]]] = {
    "saelens": ("sae_lens", saelens, PLAIN | GATED | SAELENS),
    "dictionary_learning": ("dictionary_learning", dictionary_learning, PLAIN | GATED),
    "sparsify": ("sparsify", sparsify, {"topk", "topk_plain", "batch_topk_untrained", "skip"} | GROUPS),
    "llamascopium": ("llamascopium", llamascopium, PLAIN),
    "llamascopium-crosscoder": ("llamascopium", llamascopium_parts, {"crosscoder"}),
    "llamascopium-clt": ("llamascopium", llamascopium_parts, {"clt", "clt_relu", "clt_jumprelu"}),
    "circuit-tracer": ("circuit_tracer", circuit_tracer, THRESHOLDS | {"skip_relu", "skip_jumprelu"}),
    "circuit-tracer-clt": ("circuit_tracer", circuit_tracer_clt, {"clt_relu", "clt_jumprelu"}),
}


@torch.no_grad()
def check(library: str) -> dict[str, Any]:
    """The largest relative difference for each kind of dictionary, or why unweave did not write it."""
    _, load, can = LIBRARIES[library]
    found: dict[str, Any] = {}
    for name, dictionary in dictionaries().items():
        with tempfile.TemporaryDirectory() as place:
            try:
                folder = formats.write(dictionary, library, Path(place) / "written", FACTS)
            except UnweaveError as error:
                found[name] = str(error)
            assert (name not in found) == (name in can), f"{library}, {name}: {found.get(name, 'was written')}"
            if name in found:
                continue
            code, output = load(folder)
        mine = dictionary.encode(rows()).dense()
        assert torch.equal(mine != 0, code != 0), f"{library}, {name}: other features fire"
        worst = max(
            float((theirs - ours).norm() / ours.norm()) for theirs, ours in ((code, mine), (output, dictionary(rows())))
        )
        assert worst < 1e-5, f"{library}, {name}: {worst:.2g}"
        found[name] = worst
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    for library in sys.argv[1:] or LIBRARIES:
        if find_spec(LIBRARIES[library][0]) is None:
            print(f"{library}: not installed")
            continue
        for name, result in check(library).items():
            print(f"{library:20} {name:22} {result if isinstance(result, str) else f'{result:.1e}'}"[:160])
