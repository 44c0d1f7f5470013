"""The fold: a dictionary for raw rows computes what the scaled, norm-gated, biased original computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from unweave.errors import UnweaveError
from unweave.formats import Parts, fold
from unweave.formats._fold import with_skip

D, M, K = 6, 15, 4
ACTIVATIONS = ("relu", "topk", "abs_topk", "batch_topk", "jumprelu", "matryoshka")
OPTIONS = {"topk": {"k": K}, "abs_topk": {"k": K}, "batch_topk": {"k": K}}
OPTIONS["group_max"] = {"k": K}
OPTIONS["matryoshka"] = {"k": K, "group_fractions": (0.4, 0.6)}
WITH_THRESHOLD = ("batch_topk", "jumprelu", "matryoshka")


def act(architecture: str, u: Tensor, threshold: Tensor | float | None) -> Tensor:
    """The activations from their definitions, dense."""
    if architecture == "relu":
        return u.clamp_min(0)
    if architecture in WITH_THRESHOLD:
        return u * (u > threshold) * (u > 0)
    score = u.abs() if architecture == "abs_topk" else u
    kept = torch.zeros_like(u).scatter(1, score.topk(K, dim=1).indices, 1.0)
    return (u if architecture == "abs_topk" else u.clamp_min(0)) * kept


def original(p: Parts, x: Tensor) -> tuple[Tensor, Tensor]:
    """Code and output of the library, its scales around it; the code in units of the output."""
    zero = torch.zeros(1, dtype=torch.float64)
    n = p.W_dec.double().norm(dim=1)
    b_pre, b_enc, b_dec = (zero if b is None else b.double() for b in (p.b_pre, p.b_enc, p.b_dec))
    u = (p.in_scale * x - b_pre) @ p.W_enc.double().T + b_enc
    threshold = p.threshold
    if threshold is not None and p.raw_threshold:
        threshold = threshold * p.in_scale
    z = act(p.architecture, u if p.norms == "apart" else u * n, threshold)
    y = z @ (p.W_dec.double() if p.norms == "apart" else p.W_dec.double() / n[:, None]) + b_dec
    if p.norms == "in_threshold":
        z = z / n
    return z / p.out_scale, y / p.out_scale


def parts(architecture: str, seed: int = 0, **changes: object) -> Parts:
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g)  # noqa: E731
    threshold = None
    if architecture in WITH_THRESHOLD:
        threshold = (0.5 + draw(M).abs()) if architecture == "jumprelu" else 0.7
    b = draw(D)
    made = {"b_enc": draw(M), "b_dec": b, "b_pre": b, "threshold": threshold, "options": OPTIONS.get(architecture, {})}
    return Parts(architecture, draw(M, D), draw(M, D), **(made | changes))  # pyright: ignore[reportArgumentType]


CHANGES = {
    "as it is": {},
    "scaled": {"in_scale": 0.31, "out_scale": 0.31},
    "two scales": {"in_scale": 0.31, "out_scale": 4.2},
    "no bias before": {"b_pre": None, "in_scale": 3.0, "out_scale": 3.0},
    "another bias before": {"b_pre": torch.linspace(-1, 1, D), "in_scale": 2.0, "out_scale": 0.5},
    "no biases": {"b_pre": None, "b_enc": None, "b_dec": None, "in_scale": 2.0, "out_scale": 2.0},
    "norms in codes": {"norms": "in_codes", "in_scale": 0.31, "out_scale": 1.7},
    "raw threshold": {"raw_threshold": True, "in_scale": 0.31, "out_scale": 0.8},
}


# Measured over 5 seeds: at most 4e-7.
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("architecture", ACTIVATIONS)
def test_the_fold_changes_nothing(architecture: str, change: str) -> None:
    p = parts(architecture, **CHANGES[change])
    x = 2 * torch.randn(50, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64) + 0.5
    expected_code, expected = original(p, x)
    dictionary = fold(p)
    with torch.no_grad():
        code = dictionary.encode(x)
        output = dictionary(x).double()
    assert 0 < code.nnz < 50 * M
    assert float((code.dense() - expected_code).norm() / expected_code.norm()) < 1e-5
    assert float((output - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("change", [c for c in CHANGES if c != "raw threshold"])
def test_the_fold_changes_nothing_of_a_gate(change: str) -> None:
    g = torch.Generator().manual_seed(5)
    gain, b_mag = (torch.randn(M, generator=g) for _ in range(2))
    p = parts("gated", log_magnitude=gain, b_mag=b_mag, **CHANGES[change])
    x = 2 * torch.randn(50, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64) + 0.5
    zero, n = torch.zeros(1, dtype=torch.float64), p.W_dec.double().norm(dim=1)
    b_pre, b_enc, b_dec = (zero if b is None else b.double() for b in (p.b_pre, p.b_enc, p.b_dec))
    raw = (p.in_scale * x - b_pre) @ p.W_enc.double().T
    z = (raw + b_enc > 0) * (gain.double().exp() * raw + b_mag).relu()
    output = (z @ p.W_dec.double() + b_dec) / p.out_scale
    code = z * n if p.norms == "in_codes" else z
    dictionary = fold(p)
    with torch.no_grad():
        found = dictionary.encode(x).dense()
        assert float((found - code / p.out_scale).norm() / code.norm() * p.out_scale) < 1e-5
        assert float((dictionary(x) - output).norm() / output.norm()) < 1e-5
    assert 0 < int((found != 0).sum()) < found.numel()


@pytest.mark.parametrize("change", [c for c in CHANGES if c != "raw threshold"])
@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_the_fold_changes_nothing_of_a_glu(activation: str, change: str) -> None:
    """As without the second matrix, with every row's pre-activations multiplied by its gates."""
    g = torch.Generator().manual_seed(5)
    W_gate, b_gate = torch.randn(M, D, generator=g), torch.randn(M, generator=g)
    options = {"activation": activation, **OPTIONS.get(activation, {})}
    p = parts("glu", W_gate=W_gate, b_gate=b_gate, **{**CHANGES[change], "options": options})
    x = 2 * torch.randn(50, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64) + 0.5
    zero, n = torch.zeros(1, dtype=torch.float64), p.W_dec.double().norm(dim=1)
    b_pre, b_enc, b_dec = (zero if b is None else b.double() for b in (p.b_pre, p.b_enc, p.b_dec))
    centred = p.in_scale * x - b_pre
    u = (centred @ p.W_enc.double().T + b_enc) * torch.sigmoid(centred @ W_gate.double().T + b_gate)
    inside = p.norms == "in_codes"
    z = act(activation, u * n if inside else u, None)
    output = (z @ (p.W_dec / (n if inside else torch.ones(M))[:, None]).double() + b_dec) / p.out_scale
    with torch.no_grad():
        dictionary = fold(p)
        found = dictionary.encode(x).dense()
        assert float((found - z / p.out_scale).norm() / z.norm() * p.out_scale) < 1e-5
        assert float((dictionary(x) - output).norm() / output.norm()) < 1e-5
    assert 0 < int((found != 0).sum()) < found.numel()


@pytest.mark.parametrize("architecture", ["relu", "topk", "jumprelu", "abs_topk", "group_max"])
def test_the_fold_scales_a_skip(architecture: str) -> None:
    plain = parts(architecture, b_pre=None, in_scale=0.31, out_scale=4.2)
    W_skip = torch.randn(D, D, generator=torch.Generator().manual_seed(5))
    x = 2 * torch.randn(50, D, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        expected = fold(plain)(x) + 0.31 * x @ W_skip / 4.2
        found = fold(with_skip(plain, W_skip))
        torch.testing.assert_close(found(x), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(UnweaveError, match="relu has no place for W_skip"):
        fold(replace(parts("relu"), W_skip=W_skip))
    with pytest.raises(UnweaveError, match="gated needs log_magnitude"):
        fold(parts("gated"))
    with pytest.raises(UnweaveError, match="glu needs W_gate"):
        fold(parts("glu", options={"k": K}))


@pytest.mark.parametrize("architecture", ["relu", "jumprelu"])
def test_norms_that_only_gate_leave_the_code(architecture: str) -> None:
    p = parts(architecture, norms="in_threshold", in_scale=0.4, out_scale=1.3)
    x = 2 * torch.randn(50, D, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    expected_code, _ = original(p, x)
    with torch.no_grad():
        found = fold(p).encode(x).dense()
    assert float((found - expected_code).norm() / expected_code.norm()) < 1e-5


def test_a_threshold_of_zero_or_less_passes_what_is_positive() -> None:
    p = parts("jumprelu", threshold=torch.linspace(-1, 0, M))
    x = torch.randn(50, D, generator=torch.Generator().manual_seed(9))
    relu = parts("relu", b_enc=p.b_enc, b_dec=p.b_dec, b_pre=p.b_pre)
    with torch.no_grad():
        torch.testing.assert_close(fold(p)(x), fold(Parts("relu", p.W_enc, p.W_dec, relu.b_enc, p.b_dec, p.b_pre))(x))


def test_input_and_output_may_be_of_two_widths() -> None:
    p = Parts("relu", torch.randn(M, D), torch.randn(M, 9), b_dec=torch.randn(9), in_scale=2.0, out_scale=0.1)
    dictionary, x = fold(p), torch.randn(20, D, dtype=torch.float64)
    assert (dictionary.d_in, dictionary.d_out) == (D, 9)
    with torch.no_grad():
        torch.testing.assert_close(dictionary(x).double(), original(p, x)[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"in_scale": 0.0}, "input scale to be a positive number"),
        ({"out_scale": float("nan")}, "output scale"),
        ({"b_enc": torch.zeros(3)}, "expected b_enc of shape"),
        ({"threshold": torch.ones(3)}, "no place for 3 thresholds"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict, says: str) -> None:
    with pytest.raises(UnweaveError, match=says):
        fold(parts("batch_topk", **changes))
