"""Gradients in closed form against autograd of the same dictionary's loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from unweave import dictionaries
from unweave.dictionaries import Loss, TrainingBatch
from unweave.dictionaries._closed_form import Backward, Gradients
from unweave.dictionaries._linear import LinearDictionary
from unweave.dictionaries.topk import TopK
from unweave.errors import UnweaveError
from unweave.kernels.backend import why_not
from unweave.kernels.gradients import reference
from unweave.kernels.select import reference as select_reference
from unweave.kernels.select import select
from unweave.kernels.workspace import Plan, Workspace

needs_numba = pytest.mark.skipif(why_not("cpu") is not None, reason="numba is not installed (pip install numba)")


def has_closed_form(name: str) -> bool:
    kind = dictionaries.get(name)
    return issubclass(kind, LinearDictionary) and kind.has_closed_form()


ARCHS = [name for name in dictionaries.names() if has_closed_form(name)]

# What differs from the ordinary case of 24 -> 90 features, k 5, 33 rows, where a third of the features is dead.
CASES: dict[str, dict[str, Any]] = {
    "ordinary": {},
    "nobody dead": {"dead": None},
    "one dead": {"dead": [7]},
    "all dead": {"dead": range(90)},
    "no bias subtracted": {"options": {"subtract_bias": False}},
    "bias subtracted": {"options": {"subtract_bias": True}},
    "transcoder": {"d_out": 17, "options": {"subtract_bias": False}},
    "target of the same width": {"target": True},
    "k of all features": {"k": 90},
    "k above the living": {"k": 60, "silenced": range(0, 90, 2)},
    "one row": {"n": 1},
    "ties": {"copies": 3},
    "early": {"progress": 0.01},
}
VARIANTS: dict[str, list[dict[str, Any]]] = {
    "relu": [{"variant": "april"}, {"variant": "standard"}],
    "jumprelu": [
        {"penalty": "target"},
        {"penalty": "l0"},
        {"penalty": "tanh", "tanh_scale": 2.0, "dead_coefficient": 0.3},
    ],
    "topk": [{}, {"k_aux": 2}, {"auxk_coefficient": 0.0}],
    "gated": [{}, {"p_end": 0.3}],
    "matryoshka": [{}, {"prefixes": "random"}],
    "hierarchical_topk": [{}, {"budgets": (2, 5)}],
    "ort": [{}, {"ort_coefficient": 3.0, "chunk_size": 20}, {"ort_coefficient": 0.0}],
    "transcoder": [{"auxk_coefficient": 1 / 32}, {"objective": "mse"}, {"activation": "relu"}],
}
EACH = [(arch, variant) for arch in ARCHS for variant in VARIANTS.get(arch, [{}])]


def takes(arch: str, option: str) -> bool:
    return option in dictionaries.get(arch).Config.model_fields


def sparsity_of(arch: str, k: int) -> dict[str, Any]:
    """What asks for k features; nothing where a penalty alone decides."""
    return dictionaries.get(arch).sparsity_option(k) if takes(arch, "k") or takes(arch, "target_l0") else {}


def problem(
    arch: str,
    *,
    n: int = 33,
    d_out: int = 24,
    k: int = 5,
    dead: Any = range(0, 90, 3),
    silenced: Any = (),
    copies: int = 1,
    target: bool = False,
    progress: float = 1.0,
    options: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[LinearDictionary, TrainingBatch]:
    """A dictionary whose parameters are all random, and a batch in which it has something of everything to learn."""
    g = torch.Generator().manual_seed(seed)
    made = dictionaries.build(arch, 24, 90, d_out=d_out, **sparsity_of(arch, k), **(options or {})).train()
    assert isinstance(made, LinearDictionary)
    made = made.double()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64) / parameter.shape[-1] ** 0.5)
        if takes(arch, "bandwidth"):
            made.get_parameter("log_threshold").add_(0.6)
        if takes(arch, "p_end"):
            made.get_buffer("p_stage").fill_(4)  # of p falling to p_end
        if not sparsity_of(arch, k) or (options or {}).get("activation") == "relu":
            made.b_enc.sub_(2.0)  # else half of all features fire, and dense products are the better way
        if made.unit_norm:
            made.W_dec.copy_(torch.nn.functional.normalize(made.W_dec, dim=1))
        made.b_enc[list(silenced)] = -50.0
        if copies > 1:
            for parameter in (made.W_enc, made.b_enc):
                parameter.copy_(parameter[:30].repeat(copies, *[1] * (parameter.ndim - 1)))
    x = torch.randn(n, 24, generator=g, dtype=torch.float64)
    if copies > 1:  # scores that no order of adding up rounds: equal features tie on every processor
        for exact in (made.W_enc.data, made.b_enc.data, made.b_dec.data, x):
            exact.mul_(64).round_().div_(64)
    wanted = torch.randn(n, d_out, generator=g, dtype=torch.float64) if target or d_out != 24 else x
    flags = None if dead is None else torch.zeros(90, dtype=torch.bool).index_fill(0, torch.tensor([*dead]), True)
    x_, wanted_ = x.to(dtype), wanted.to(dtype)
    return made.to(dtype), TrainingBatch(x_, x_ if wanted is x else wanted_, flags, progress)


def wide(arch: str) -> dict[str, Any]:
    """A window wide enough for some entries to be in it: the paper's would be empty in 33 rows."""
    return {"bandwidth": 0.2} if takes(arch, "bandwidth") else {}


def summed(gradients: Gradients, dictionary: LinearDictionary) -> dict[str, Tensor]:
    """Every gradient as the matrix that it is."""
    weights = dict(dictionary.named_parameters())
    rows = {
        name: reference.sum_outer(f.columns, f.weights, f.A, weights[name].detach(), f.extra)
        for name, f in gradients.rows.items()
    }
    return rows | gradients.dense


def by_autograd(dictionary: LinearDictionary, batch: TrainingBatch) -> tuple[Loss, dict[str, Tensor]]:
    loss = dictionary.loss(batch)
    names, parameters = zip(*dictionary.named_parameters())
    grads = torch.autograd.grad(loss.total, parameters, allow_unused=True)
    return loss, {name: torch.zeros_like(p) if g is None else g for name, p, g in zip(names, parameters, grads)}


def crowded(dictionary: LinearDictionary, batch: TrainingBatch) -> bool:
    with torch.no_grad():
        scores = dictionary.pre_activations(batch.input)
        return select(select_reference, dictionary.training_rule(), scores)[0].is_crowded


def compare(
    dictionary: LinearDictionary, batch: TrainingBatch, plan: Plan, rtol: float, is_crowded: bool = False
) -> None:
    torch.manual_seed(0)  # of what is drawn for a batch: random prefixes, chunks
    truth, grads = by_autograd(dictionary, batch)
    torch.manual_seed(0)
    with torch.no_grad():
        made = dictionary.closed_form(batch, Workspace(plan))
    if made is None:  # so crowded that dense products are faster
        assert plan.backend != "reference"
        assert crowded(dictionary, batch)
        return
    loss, gradients = made

    def same(ours: Tensor, theirs: Tensor) -> None:
        scale = max(1e-2, float(theirs.abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol * scale)

    same(loss.total, truth.total.detach())
    assert loss.terms.keys() == truth.terms.keys()
    for name in truth.terms.keys() - ({"auxk"} if dictionary.config.to_dict().get("auxk_coefficient") == 0 else set()):
        same(loss.terms[name], truth.terms[name])
    ours = summed(gradients, dictionary)
    assert ours.keys() == grads.keys()
    for name in grads:
        same(ours[name], grads[name])
    for f in gradients.rows.values():
        same(f.lengths, f.A.norm(dim=1))
    assert callable(loss.reconstruction)
    assert isinstance(truth.reconstruction, Tensor)
    same(loss.reconstruction(), truth.reconstruction)
    assert loss.code is not None
    assert truth.code is not None
    assert torch.equal(loss.code.firing_counts(), truth.code.firing_counts())


def test_the_four_classic_architectures_have_a_closed_form():
    assert {"topk", "batch_topk", "jumprelu", "relu"} <= set(ARCHS)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("arch", "variant"), EACH)
def test_the_reference_has_the_gradients_of_autograd(arch, variant, case):
    if case == "ties" and "k_aux" in variant:
        pytest.skip("of equal dead features the closed form takes all, autograd as many as there is room for")
    if case.startswith("k ") and "budgets" in variant:
        pytest.skip("these budgets are for another k")
    settings = {**CASES[case], "options": {**wide(arch), **variant, **CASES[case].get("options", {})}}
    for seed in range(2):
        compare(*problem(arch, **settings, seed=seed), Plan("reference"), 1e-10)


@needs_numba
@pytest.mark.parametrize("screen", [False, True])
@pytest.mark.parametrize("case", [name for name in CASES if name != "ties"])
@pytest.mark.parametrize("arch", ARCHS)
def test_the_compiled_kernels_have_them_in_float32(arch, case, screen):
    """Ties are left out: which of equal features is taken is anybody's choice, and moves the gradient."""
    settings = {**CASES[case], "options": {**wide(arch), **CASES[case].get("options", {})}}
    dictionary, batch = problem(arch, **settings, dtype=torch.float32)
    # The screen's auxiliary products are in bfloat16, on purpose: they are compared where there are none.
    batch = TrainingBatch(batch.input, batch.target, None, batch.progress) if screen else batch
    compare(dictionary, batch, Plan("cpu", "screen" if screen else "float32"), 1e-5)
    assert crowded(dictionary, batch) == (takes(arch, "k") and case.startswith("k "))


@needs_numba
@pytest.mark.parametrize("arch", ARCHS)
def test_a_screen_takes_the_same_features(arch):
    for seed in range(4):
        dictionary, batch = problem(arch, n=70, dtype=torch.float32, seed=seed)
        work = {screen: Workspace(Plan("cpu", "screen" if screen else "float32")) for screen in (False, True)}
        with torch.no_grad():
            rule = dictionary.training_rule()
            x = dictionary.centre(batch.input)
            found = [w.select(rule, x, dictionary.W_enc, dictionary.b_enc)[0] for w in work.values()]
        assert set(found[0].flat.tolist()) == set(found[1].flat.tolist())


@needs_numba
def test_auxiliary_gradients_of_a_screen_are_those_of_bfloat16():
    dictionary, batch = problem("topk", dtype=torch.float32)
    _, grads = by_autograd(dictionary, batch)
    with torch.no_grad():
        made = dictionary.closed_form(batch, Workspace(Plan("cpu", "screen")))
    assert made is not None
    ours, dead = summed(made[1], dictionary), batch.dead
    assert dead is not None
    for name in ("W_dec", "W_enc", "b_enc"):
        error = (ours[name] - grads[name])[dead].norm() / grads[name][dead].norm()
        assert float(error) < 0.05, name


@pytest.mark.parametrize("plan", [Plan("reference"), pytest.param(Plan("cpu"), marks=needs_numba)])
@pytest.mark.parametrize("arch", ARCHS)
def test_rows_that_are_no_numbers_are_refused(arch, plan):
    dictionary, batch = problem(arch, dtype=torch.float32)
    batch.input[3, 1] = torch.nan
    with pytest.raises(UnweaveError, match=r"1 of 33 rows hold NaN or infinity \(first: row 3\)"):
        dictionary.closed_form(batch, Workspace(plan))


def subclass(kind: type[LinearDictionary], *methods: str) -> type[LinearDictionary]:
    return type("Changed", (kind,), {method: lambda *_: None for method in methods})


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    "method", ["activate", "loss", "encode", "decode", "select", "centre", "before_step", "after_step"]
)
def test_a_subclass_that_changes_what_only_autograd_sees_is_left_to_autograd(arch, method):
    kind = dictionaries.get(arch)
    assert issubclass(kind, LinearDictionary)
    assert not subclass(kind, method).has_closed_form()
    assert not subclass(subclass(kind, method)).has_closed_form()
    assert not subclass(subclass(kind, method), "observe").has_closed_form()


@pytest.mark.parametrize("method", ["observe", "rule", "initialise", "default_lr", "fold_scale"])
def test_a_subclass_may_change_the_rest(method):
    assert subclass(TopK, method).has_closed_form()


def test_a_subclass_with_a_backward_of_its_own_speaks_for_itself():
    class Halved(TopK):
        def activate(self, values, pattern):
            return values.relu() / 2

        def backward(self, step) -> Backward:
            back = super().backward(step)
            return Backward(back.grad / 2, back.total, back.terms, back.dense, back.encoder, back.decoder, back.b_enc)

    assert Halved.has_closed_form()
    made, batch = problem("topk", dead=None)
    dictionary = Halved(made.config).double()
    dictionary.load_state_dict(made.state_dict())
    compare(dictionary, batch, Plan("reference"), 1e-10)


def test_a_centre_of_ones_own_is_left_to_autograd_even_beside_a_backward():
    assert not subclass(TopK, "centre", "backward", "loss", "encode", "_entries").has_closed_form()
    assert subclass(TopK, "backward", "loss").has_closed_form()


def test_a_changed_subclass_gives_no_closed_form_at_all():
    made, batch = problem("topk")
    assert subclass(TopK, "loss")(made.config).closed_form(batch, Workspace(Plan())) is None
