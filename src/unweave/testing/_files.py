"""Files and copies: a dictionary is its config and its state, and nothing else."""

from __future__ import annotations

import copy
import tempfile

import torch

from unweave.dictionaries import Dictionary
from unweave.testing._case import Case
from unweave.testing._check import check, require, require_same_bits, require_same_code


def _require_same(case: Case, found: Dictionary, expected: Dictionary, what: str) -> None:
    x = case.rows(dtype=torch.float32)
    with torch.no_grad():
        require_same_code(found.encode(x), expected.encode(x), f"{what}: codes")
        require_same_bits(found(x), expected(x), f"{what}: outputs")


@check()
def saves_and_loads(case: Case) -> None:
    """After save and load, the config is the same and codes and outputs have the same bits."""
    dictionary = case.trained(torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        dictionary.save(folder)
        loaded = Dictionary.load(folder)
    require(type(loaded) is case.kind, f"load: expected a {case.kind.__name__}, found a {type(loaded).__name__}")
    require(loaded.config == dictionary.config, f"load: expected {dictionary.config!r}, found {loaded.config!r}")
    require(not loaded.training, "load: expected eval mode, found training mode")
    _require_same(case, loaded, dictionary, "after save and load")


@check()
def state_dict_is_complete(case: Case) -> None:
    """Its state_dict, put into a fresh dictionary, gives codes and outputs of the same bits."""
    dictionary = case.trained(torch.float32)
    fresh = case.build(seed=1).eval()
    fresh.load_state_dict(dictionary.state_dict())
    _require_same(case, fresh, dictionary, "after load_state_dict into a fresh one")


@check()
def can_be_deepcopied(case: Case) -> None:
    """A deepcopy gives the same bits and shares nothing."""
    dictionary = case.trained(torch.float32)
    twin = copy.deepcopy(dictionary)
    _require_same(case, twin, dictionary, "deepcopy")
    before = {name: t.clone() for name, t in dictionary.state_dict().items()}
    with torch.no_grad():
        for tensor in twin.state_dict().values():
            tensor.zero_()
    for name, tensor in dictionary.state_dict().items():
        require_same_bits(tensor, before[name], f"{name}, after its deepcopy was zeroed")
