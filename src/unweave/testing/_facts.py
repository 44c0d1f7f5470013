"""What a class says about itself."""

from __future__ import annotations

from unweave.dictionaries import Dictionary
from unweave.errors import UnweaveError
from unweave.testing._case import Case
from unweave.testing._check import ConformanceError, check, require

_CLAIMS = (
    *("linear_decoder", "learns_by_gradient", "ordered_features", "homogeneous", "scaled_codes", "bfloat16"),
    "atoms_are_rows",
)


@check()
def is_documented(case: Case) -> None:
    """It has a name, a docstring of its own and claims that are true or false."""
    kind = case.kind
    require(bool((vars(kind).get("__doc__") or "").strip()), "the class has no docstring: `unweave archs` shows it")
    require(isinstance(kind.citation, str), f"citation: expected text, found {kind.citation!r}")
    for claim in _CLAIMS:
        value = getattr(kind, claim)
        require(isinstance(value, bool), f"{claim}: expected True or False, found {value!r}")


@check()
def has_a_way_to_learn(case: Case) -> None:
    """It defines the method that the trainer will call."""
    by_gradient = case.kind.learns_by_gradient
    method = "loss" if by_gradient else "absorb"
    require(
        getattr(case.kind, method) is not getattr(Dictionary, method),
        f"learns_by_gradient is {by_gradient}, so the trainer calls {method}, which it does not define",
    )


@check()
def has_a_readable_repr(case: Case) -> None:
    """Its repr names the class and its size, in less than a page."""
    text = repr(case.build())
    for part in (case.kind.__name__, f"n_features={case.n_features}"):
        require(part in text, f"repr: expected {part!r} in it, found {text[:200]!r}")
    require(len(text) < 3000, f"repr: expected less than a page, found {len(text)} characters")


@check()
def config_goes_to_json_and_back(case: Case) -> None:
    """Its config is frozen, goes to JSON and back, and refuses keys that it does not know."""
    config = case.build().config
    again = type(config).from_json(config.to_json())
    require(again == config, f"config: after JSON and back expected {config!r}, found {again!r}")
    try:
        config.n_features = 7
    except Exception:
        pass
    else:
        raise ConformanceError("config: a field could be assigned; configs are frozen")
    try:
        type(config).from_dict({**config.to_dict(), "no_such_key": 1})
    except UnweaveError:
        return
    raise ConformanceError("config: the unknown key 'no_such_key' was accepted")


@check()
def refuses_an_impossible_k(case: Case) -> None:
    """More firing features than there are are refused by an UnweaveError."""
    try:
        options = case.kind.sparsity_option(case.n_features + 1.0)
    except UnweaveError:
        return
    if "k" not in options:
        return
    try:
        case.build(**options)
    except UnweaveError:
        return
    raise ConformanceError(f"config: k = {case.n_features + 1} of {case.n_features} features was accepted")
