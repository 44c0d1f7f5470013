"""Which plan is fastest on this machine: timed once per kind of shape, in a second or two, and remembered.

The candidates do the same work and give the same code (a screened selection is decided in float32), so the choice
changes how long things take, and the last bits of sums. (But for AuxK: what dead features learn is worked out in
bfloat16 where the plan screens and the processor multiplies it.) ``UNWEAVE_KERNELS`` pins one of
:data:`~unweave.kernels.names.PINS`; of these the certified screen, which is slower, and bfloat16, which rounds, are for
whoever asks for them. "cpu" is float32 throughout, and leaves open by which library.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unweave.errors import UnweaveError
from unweave.files import cache_dir, read_json, write_json
from unweave.kernels import int8, multiply
from unweave.kernels.adam.reference import AdamStep, Rows
from unweave.kernels.backend import BackendName, has_fast_bfloat16, serves
from unweave.kernels.names import PINS
from unweave.kernels.select import TopKRule
from unweave.kernels.workspace import Plan, Workspace, plan_of
from unweave.progress import track

Purpose = Literal["train", "encode"]
_SMALL = 2**18  # entries of an encoder below which all plans take about as long as the calibration's noise
_ROUNDS = 3
_known: dict[str, dict[str, Any]] = {}


def plan_for(W: Tensor, n_rows: int, purpose: Purpose = "encode", pinned: str | None = None) -> Plan:
    """The plan for an encoder ``W (n_features, d)`` and batches of ``n_rows``; measured if it is not known yet.

    Args:
        pinned: one of :data:`~unweave.kernels.names.PINS`; None for what ``UNWEAVE_KERNELS`` says.

    Raises:
        UnweaveError: when the pin names no plan, or one that cannot run here.
    """
    pinned = pinned or os.environ.get("UNWEAVE_KERNELS")
    if pinned:
        plan = pin(pinned, W)
        if pinned != "cpu" or plan.backend != "cpu":
            return plan
    compiled: BackendName = "gpu" if W.is_cuda else "cpu"
    if not serves(compiled, W):
        return Plan()
    if W.numel() < _SMALL or (W.numel() * n_rows < 2**24 and not W.is_cuda):
        _compile(Plan(compiled), purpose, W.device)
        return Plan(compiled)
    key = _bucket(W, n_rows, purpose)
    known = _read()
    if key not in known:
        known = _read() | {key: measure(W.shape[1], W.shape[0], n_rows, purpose, W.device)}
        _write(known)
    times = {plan_of(name): seconds for name, seconds in known[key].items()}
    times = {plan: seconds for plan, seconds in times.items() if plan.why_not(W.shape[1]) is None}
    if pinned:
        times = {plan: s for plan, s in times.items() if plan.backend == "cpu" and plan.scores == "float32"}
    return min(times, key=lambda plan: times[plan], default=Plan(compiled))


def pin(name: str, W: Tensor | None = None) -> Plan:
    """The plan of that name (see :data:`~unweave.kernels.names.PINS`).

    Raises:
        UnweaveError: when there is none, or it cannot work on ``W``.
    """
    if name not in PINS:
        raise UnweaveError(f"kernels: expected one of {', '.join(PINS)}, found {name!r}")
    plan = plan_of(name)
    if reason := plan.why_not():
        raise UnweaveError(f"kernels {name!r} cannot be used here: {reason}")
    # A pin is a wish for where it can hold: a float64 dictionary, or one on another device, takes the reference.
    if W is None or (serves(plan.backend, W) and plan.why_not(W.shape[1]) is None):
        return plan
    return Plan()


def measure(d: int, n_features: int, n_rows: int, purpose: Purpose, device: torch.device) -> dict[str, float]:
    """Seconds of each candidate plan on random rows, by its name; medians of a few interleaved rounds."""
    compiled = "gpu" if device.type == "cuda" else "cpu"
    exact = [f"cpu+{library}" for library in multiply.at_hand()] if compiled == "cpu" else ["gpu"]
    names = ["reference", *exact, f"{compiled}+screen"]
    if compiled == "cpu" and plan_of("cpu+int8_screen").why_not(d) is None:
        names.append("cpu+int8_screen")
    n_rows = max(1, min(n_rows, 2**20 // max(1, n_features // 16)))
    jobs = _jobs(names, purpose, d, n_features, n_rows, device)
    times: dict[str, list[float]] = {name: [] for name in names}
    with track(len(names) * (_ROUNDS + 1), f"prepare kernels for {n_features:,} features (once)", "runs") as progress:
        for round_ in range(_ROUNDS + 1):
            for name, job in jobs.items():
                if round_ > 1 and times[name][0] > 4 * min(t[0] for t in times.values()):
                    continue  # out of the race
                started = time.perf_counter()
                job()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                if round_:  # the first round compiles
                    times[name].append(time.perf_counter() - started)
                progress.advance()
    return {name: sorted(t)[len(t) // 2] for name, t in times.items()}


def _compile(plan: Plan, purpose: Purpose, device: torch.device) -> None:
    """Let the first use on a machine, which takes seconds, show as what it is."""
    key = f"{purpose} {device.type} compiled"
    if key not in _read():
        started = time.perf_counter()
        with track(1, "compile kernels (once)", "runs") as progress:
            _jobs((str(plan.backend),), purpose, 16, 64, 8, device)[plan.backend]()
            progress.advance()
        _write(_read() | {key: {plan.backend: time.perf_counter() - started}})


def measured(W: Tensor, n_rows: int, purpose: Purpose) -> dict[str, float]:
    """Seconds by plan for shapes like this one; empty where nothing was measured."""
    return dict(_read().get(_bucket(W, n_rows, purpose), {}))


def forget() -> None:
    """Throw the timings of this machine away."""
    _known.pop(str(file()), None)
    file().unlink(missing_ok=True)


def fingerprint() -> dict[str, Any]:
    """What a timing depends on: processor, threads, versions, accelerator."""
    versions = {}
    for package in ("torch", "numpy", "numba", "triton", "unweave"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return {
        "processor": processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16": has_fast_bfloat16(),
        "int8": int8.why_not() is None,
        "float32 by": ", ".join(multiply.at_hand()),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        **versions,
    }


def processor() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _jobs(
    names: Sequence[str], purpose: Purpose, d: int, n_features: int, n_rows: int, device: torch.device
) -> dict[str, Callable[[], None]]:
    generator = torch.Generator().manual_seed(0)
    X = F.normalize(torch.randn(n_rows, d, generator=generator), dim=1).to(device)
    W = F.normalize(torch.randn(n_features, d, generator=generator), dim=1).to(device)
    make = _train_job if purpose == "train" else _encode_job
    return {name: make(plan_of(name), X, W, min(32, n_features)) for name in names}


def _encode_job(plan: Plan, X: Tensor, W: Tensor, k: int) -> Callable[[], None]:
    b = W.new_zeros(len(W))
    work = Workspace(plan, W.device)

    def job() -> None:
        work.forget()  # an encoder that is not being trained casts its weights each time
        work.select(TopKRule(k), X, W, b)

    return job


def _train_job(plan: Plan, X: Tensor, W: Tensor, k: int) -> Callable[[], None]:
    b, bias, work = W.new_zeros(len(W)), X.mean(0), Workspace(plan, W.device)
    rows, atoms = (Rows(W.clone(), torch.zeros_like(W), torch.zeros_like(W), None, unit) for unit in (False, True))
    if plan.low:
        rows = rows._replace(shadow=work.encoder.follow(rows.W))
    step = AdamStep(1e-9, (0.9, 0.999), 1e-8, 1)

    def job() -> None:
        pattern, values = work.select(TopKRule(k), X, rows.W, b)
        error, grads, _ = work.ops.decode.decode_residual(pattern, values, atoms.W, bias, X, 2 / len(X))
        columns = work.ops.csc.csc(pattern)
        work.ops.update.update_rows(atoms, columns, values, error, step)
        work.ops.update.update_rows(rows, columns, grads, X, step)

    return job


def _bucket(W: Tensor, n_rows: int, purpose: Purpose) -> str:
    """Shapes within a factor of two share their timings."""
    d, m, n = ((max(1, x) - 1).bit_length() for x in (W.shape[1], W.shape[0], n_rows))
    return f"{purpose} {W.device.type} d<=2^{d} features<=2^{m} rows<=2^{n}"


def file() -> Path:
    """Where this machine's timings are kept."""
    return cache_dir() / f"kernels-{_tag(torch.get_num_threads())}.json"


@cache
def _tag(threads: int) -> str:
    return hashlib.sha256(json.dumps(fingerprint(), sort_keys=True).encode()).hexdigest()[:12]


def _read() -> dict[str, Any]:
    path = file()
    if str(path) not in _known:
        try:
            values = read_json(path)["seconds"].items() if path.is_file() else ()
        except (UnweaveError, KeyError, TypeError, AttributeError):
            values = ()
        values = {key: times for key, times in values if _are_times(times)}  # what is broken is measured again
        _known[str(path)] = values
    return _known[str(path)]


def _are_times(times: Any) -> bool:
    named = isinstance(times, dict) and len(times) > 0 and times.keys() <= set(PINS)
    return named and all(isinstance(time, int | float) for time in times.values())


def _write(seconds: dict[str, Any]) -> None:
    path = file()
    _known[str(path)] = seconds
    with contextlib.suppress(OSError, UnweaveError):  # a read-only home costs a second per process, no more
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"machine": fingerprint(), "seconds": seconds})
