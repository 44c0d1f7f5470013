"""The Triton kernels on this machine's GPU, beside what torch offers for the same work. Needs a CUDA device.

    python benchmarks/gpu_kernels.py
    python benchmarks/gpu_kernels.py --only topk,ops --sizes 16384 --batch 32768

In this order, since each part is read by the light of the ones before: what the machine can do (rates: matrix products
and copying), selection (topk: torch.topk, FlashInfer where it is installed, ours), where gathering beats multiplying
(gather: decode and weight gradients over n_features / k), our operations one by one (ops), and a whole training step
against dense bfloat16 products with torch's fused Adam, eagerly and as a CUDA graph (step).

Every job of a group is timed once per round, in turn, with CUDA events, after two rounds of warming up; before each,
a buffer larger than the L2 cache is overwritten. Given are the median, the least and the quartiles in microseconds,
and the median of the per-round ratios to the first job of the group. A job that fails is listed with its message.
Results are dated JSON in benchmarks/results/.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import json
import statistics
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

SECTIONS = ("rates", "topk", "gather", "ops", "step")
RATIOS = (64, 128, 256, 512, 1024, 2048, 4096)  # n_features / k
WARMUPS = 2

Jobs = dict[str, Callable[[], Any]]


class Size(NamedTuple):
    d: int
    n_features: int
    k: int


SIZES = (
    Size(768, 24_576, 32),
    Size(2304, 16_384, 64),
    Size(4096, 131_072, 64),
    Size(576, 4608, 32),
    Size(576, 18_432, 32),
)


class Setting(NamedTuple):
    device: torch.device
    batch: int
    rounds: int


# ---- timing ---------------------------------------------------------------------------------------------------------


def measure(jobs: Jobs, setting: Setting) -> dict[str, Any]:
    """Microseconds of each job by its name; see the top of the file."""
    flush = torch.empty(2**28, dtype=torch.int8, device=setting.device)
    times: dict[str, list[float]] = {name: [] for name in jobs}
    failed: dict[str, str] = {}
    for round_ in range(WARMUPS + setting.rounds):
        for name, job in jobs.items():
            if name in failed:
                continue
            try:
                flush.zero_()
                took = timed(job)
            except Exception as error:  # a benchmark reports what fails and goes on
                failed[name] = f"{type(error).__name__}: {error}"[:500]
                continue
            if round_ >= WARMUPS:
                times[name].append(took)
    base = next(iter(jobs))
    found = {name: summary(t, times[base]) for name, t in times.items() if t and name not in failed}
    return {**found, **{name: {"failed": message} for name, message in failed.items()}}


def timed(job: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    job()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def summary(times: list[float], base: list[float]) -> dict[str, float]:
    quartiles = statistics.quantiles(times, n=4) if len(times) > 1 else [times[0]] * 3
    ratios = [t / b for t, b in zip(times, base)]
    return {
        "median_us": statistics.median(times),
        "min_us": min(times),
        "quartile_1_us": quartiles[0],
        "quartile_3_us": quartiles[2],
        "ratio_to_first": statistics.median(ratios) if ratios else float("nan"),
    }


# ---- what is measured -----------------------------------------------------------------------------------------------


def rates(size: Size, setting: Setting) -> dict[str, Any]:
    """Encoder products in three precisions, as TFLOP/s; a copy of 1 GiB, as GB/s (read and written)."""
    X, W = rows(setting.batch, size.d, setting), rows(size.n_features, size.d, setting)
    low_X, low_W = X.bfloat16(), W.bfloat16()
    source = torch.empty(2**28, dtype=torch.float32, device=setting.device)
    target = torch.empty_like(source)

    def tf32() -> Tensor:
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            return X @ W.T
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False

    jobs: Jobs = {
        "product, bfloat16": lambda: low_X @ low_W.T,
        "product, TF32": tf32,
        "product, float32": lambda: X @ W.T,
        "copy": lambda: target.copy_(source),
    }
    found = measure(jobs, setting)
    for name, times in found.items():
        if "median_us" in times:
            work = 2 * source.nbytes if name == "copy" else 2 * setting.batch * size.d * size.n_features
            unit, scale = ("GB/s", 1e3) if name == "copy" else ("TFLOP/s", 1e6)
            times[unit] = work / times["median_us"] / scale
    return found


def topk(size: Size, setting: Setting) -> dict[str, Any]:
    """The k largest of each row. The screened job also works its candidates out again in float32."""
    ops, k = our("select"), size.k
    case = Case(size, setting)
    scores = case.X @ case.W.T
    low = case.X.bfloat16() @ case.W.bfloat16().T
    jobs: Jobs = {
        "torch, float32": lambda: torch.topk(scores, k, sorted=False),
        "torch, bfloat16": lambda: torch.topk(low, k, sorted=False),
        "unweave, float32": lambda: ops.topk(scores, case.shift, k),
        "unweave, bfloat16 screen": lambda: ops.topk(low, case.shift, k, exact=case.exact),
    }
    try:
        flashinfer = importlib.import_module("flashinfer")
    except ImportError:
        pass
    else:
        jobs["flashinfer, float32"] = lambda: flashinfer.top_k(scores, k)
        jobs["flashinfer, bfloat16"] = lambda: flashinfer.top_k(low, k)
    return measure(jobs, setting)


def gather(size: Size, setting: Setting) -> dict[str, Any]:
    """Decode and weight gradient by a dense bfloat16 product and by gathering, for more and more sparse codes."""
    decode, gradients, csc = our("decode"), our("gradients"), our("csc")
    found = {}
    for ratio in RATIOS:
        k = size.n_features // ratio
        if k == 0:
            continue
        case = Case(size._replace(k=k), setting)
        pattern, values, X = case.pattern, case.values, case.X
        low_W, low_X = case.W.bfloat16(), X.bfloat16()
        dense = pattern.densify(values).bfloat16()
        columns = csc.csc(pattern)
        decoding: Jobs = {
            "dense, bfloat16": lambda dense=dense, W=low_W: dense @ W,
            "gather, float32": lambda c=case: decode.decode(c.pattern, c.values, c.W),
            "gather, bfloat16": lambda c=case, W=low_W: decode.decode(c.pattern, c.values, W),
        }
        summing: Jobs = {
            "dense, bfloat16": lambda dense=dense, X=low_X: dense.T @ X,
            "gather, float32": lambda c=case, columns=columns: gradients.sum_outer(columns, c.values, c.X),
            "gather, bfloat16": lambda c=case, columns=columns, X=low_X: gradients.sum_outer(columns, c.values, X),
        }
        found[f"n_features / k = {ratio}"] = {
            "decode": measure(decoding, setting),
            "weight gradient": measure(summing, setting),
        }
    return found


def ops(size: Size, setting: Setting) -> dict[str, Any]:
    """Our operations beside an encoder product of the same batch, with the bytes that must move at least."""
    select, decode, gradients, csc, update, adam = map(our, ("select", "decode", "gradients", "csc", "update", "adam"))
    case = Case(size, setting)
    low_X, low_W = case.X.bfloat16(), case.W.bfloat16()
    low = low_X @ low_W.T
    pattern, values, X, W = case.pattern, case.values, case.X, case.W
    columns = csc.csc(pattern)
    atoms, encoder = case.matrix(unit_norm=True), case.matrix(unit_norm=False)
    bound = float(values.min()) * 0.9
    G = torch.randn_like(W)
    jobs: Jobs = {
        "encoder product, bfloat16": lambda: low_X @ low_W.T,
        "decode, residual, loss, value gradients": lambda: decode.decode_residual(
            pattern, values, W, X[0], X, 2 / len(X)
        ),
        "csc": lambda: csc.csc(pattern),
        "update rows, unit norm": lambda: update.update_rows(atoms, columns, values, X, case.step),
        "update rows": lambda: update.update_rows(encoder, columns, values, X, case.step),
        "adam rows, given the gradient": lambda: adam.adam_rows(encoder, G, case.step),
        "sum by feature": lambda: gradients.sum_over(columns, values),
        "top k, screened": lambda: select.topk(low, case.shift, size.k, exact=case.exact),
        "batch top k, screened": lambda: select.batch_topk(
            low, case.shift, size.k * len(X), bound=bound, exact=case.exact
        ),
        "above, screened": lambda: select.above(low, case.shift, bound, exact=case.exact, expected=size.k),
    }
    found = measure(jobs, setting)
    gathered, weights = len(values) * size.d * 4, W.nbytes
    least = {
        "decode, residual, loss, value gradients": gathered + 2 * X.nbytes,
        "update rows, unit norm": 6.5 * weights + gathered,
        "update rows": 6.5 * weights + gathered,
        "adam rows, given the gradient": 7.5 * weights,
        "top k, screened": low.nbytes,
    }
    for name, n_bytes in least.items():
        if "median_us" in found.get(name, {}):
            found[name]["GB/s of the least traffic"] = n_bytes / found[name]["median_us"] / 1e3
    return found


def step(size: Size, setting: Setting) -> dict[str, Any]:
    """A TopK training step without clipping, AuxK and logging on both sides. The first job is the encoder product."""
    select, decode, gradients, csc, update = map(our, ("select", "decode", "gradients", "csc", "update"))
    case = Case(size, setting)
    X, b_dec, b_enc = case.X, torch.zeros(size.d, device=setting.device), case.shift
    encoder, atoms = case.matrix(unit_norm=False), case.matrix(unit_norm=True)
    low_X, low_W = X.bfloat16(), case.W.bfloat16()

    def ours() -> None:
        shadow = encoder.shadow
        scores = X.bfloat16() @ shadow.T
        pattern, u = select.topk(scores, b_enc, size.k, exact=case.exact._replace(W=encoder.W, norms=X.norm(dim=1)))
        values = u.relu()
        error, grads, _ = decode.decode_residual(pattern, values, atoms.W, b_dec, X, 2 / len(X))
        grads = grads * (u > 0)
        columns = csc.csc(pattern)
        gradients.sum_over(columns, grads)
        update.update_rows(atoms, columns, values, error, case.step)
        update.update_rows(encoder, columns, grads, X, case.step)

    parameters = [case.W.clone().requires_grad_() for _ in range(2)]
    optimizer = torch.optim.Adam(parameters, lr=1e-4, fused=True)

    def dense() -> None:
        W_enc, W_dec = (p.detach().bfloat16() for p in parameters)
        low = X.bfloat16()
        scores = low @ W_enc.T + b_enc.bfloat16()
        best = scores.topk(size.k, sorted=False)
        code = torch.zeros_like(scores).scatter_(1, best.indices, best.values.relu())
        error = ((code @ W_dec) - low) * (2 / len(X))
        grad_code = (error @ W_dec.T).masked_fill_(code <= 0, 0)
        parameters[0].grad = (grad_code.T @ low).float()
        parameters[1].grad = (code.T @ error).float()
        optimizer.step()
        with torch.no_grad():
            parameters[1].copy_(F.normalize(parameters[1], dim=1))

    jobs: Jobs = {
        "encoder product, bfloat16": lambda: low_X @ low_W.T,
        "dense, bfloat16, fused Adam": dense,
        "unweave": ours,
    }
    try:
        jobs["unweave, CUDA graph"] = captured(ours)
    except Exception as error:
        message = f"{type(error).__name__}: {error}"[:500]
        return {**measure(jobs, setting), "unweave, CUDA graph": {"failed": message}}
    return measure(jobs, setting)


def captured(job: Callable[[], Any]) -> Callable[[], Any]:
    for _ in range(3):
        job()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        job()
    return graph.replay


# ---- cases ----------------------------------------------------------------------------------------------------------


class Case:
    """One size's tensors. Codes are of random rows, so features fire unevenly, but less so than in real models."""

    def __init__(self, size: Size, setting: Setting) -> None:
        from unweave.kernels._triton import DeviceScreen, rows_of
        from unweave.kernels.adam.reference import AdamStep, Rows
        from unweave.kernels.select import Exact

        self.X, self.W = rows(setting.batch, size.d, setting), rows(size.n_features, size.d, setting)
        self.W = F.normalize(self.W, dim=1)
        self.shift = torch.zeros(size.n_features, device=setting.device)
        screen: Any = DeviceScreen(setting.device)
        self.exact = Exact(self.X, self.W, self.X.norm(dim=1), screen)
        self.pattern, self.values = our("select").topk(self.X @ self.W.T, self.shift, size.k)
        self.rows = rows_of(self.pattern)
        self.step = AdamStep(1e-4, (0.9, 0.999), 1e-8, 10)
        self._rows = Rows

    def matrix(self, unit_norm: bool) -> Any:
        """A copy of W with moments and a shadow."""
        moments = torch.zeros_like(self.W), torch.zeros_like(self.W)
        return self._rows(self.W.clone(), *moments, self.W.bfloat16(), unit_norm)


def rows(n: int, d: int, setting: Setting) -> Tensor:
    generator = torch.Generator(setting.device).manual_seed(n + d)
    return torch.randn(n, d, generator=generator, device=setting.device)


def our(operation: str) -> Any:
    return importlib.import_module(f"unweave.kernels.{operation}.gpu")


# ---- program --------------------------------------------------------------------------------------------------------


def machine(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    versions = {}
    for package in ("unweave", "torch", "triton", "flashinfer-python"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "gpu": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30),
        "multiprocessors": properties.multi_processor_count,
        "l2_mib": getattr(properties, "L2_cache_size", 0) / 2**20,
        "cuda": torch.version.cuda,
        "versions": versions,
    }


def run(names: list[str], sizes: list[Size], setting: Setting) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        for size in sizes:
            if name == "gather" and size.d != 2304:
                continue  # one width; what varies is the sparsity
            print(f"{name}  d={size.d} n_features={size.n_features} k={size.k} batch={setting.batch}", flush=True)
            if name == "gather":
                size = size._replace(n_features=65_536)
            try:
                result = globals()[name](size, setting)
            except torch.OutOfMemoryError as error:
                result = {"failed": f"out of memory: {error}"[:300]}
            found.setdefault(name, []).append({**size._asdict(), "batch": setting.batch, "results": result})
            show(result, "  ")
            torch.cuda.empty_cache()
    return found


def show(result: dict[str, Any], indent: str) -> None:
    for name, value in result.items():
        if not isinstance(value, dict):
            print(f"{indent}{name}: {value}")
        elif "failed" in value:
            print(f"{indent}{name}: failed: {value['failed']}")
        elif "median_us" in value:
            rate = next((f", {value[unit]:.0f} {unit}" for unit in value if "/s" in unit), "")
            print(f"{indent}{name}: {value['median_us']:,.0f} us ({value['ratio_to_first']:.2f} x first{rate})")
        else:
            print(f"{indent}{name}")
            show(value, indent + "  ")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"sections, of {','.join(SECTIONS)}")
    parser.add_argument("--sizes", help="numbers of features, of " + ", ".join(str(s.n_features) for s in SIZES))
    parser.add_argument("--batch", type=int, default=8192, help="rows a batch (default 8192)")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds (default 9)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := set(names) - set(SECTIONS):
        parser.error(f"unknown: {', '.join(sorted(unknown))}")
    sizes = [s for s in SIZES if not arguments.sizes or str(s.n_features) in arguments.sizes.split(",")]
    if not sizes:
        parser.error(f"no size of {arguments.sizes} features")
    if not torch.cuda.is_available():
        sys.exit("gpu_kernels: no CUDA device here; this program measures GPU kernels and has nothing to run on.")
    setting = Setting(torch.device("cuda"), arguments.batch, arguments.rounds)
    now = datetime.datetime.now()
    results = {
        "date": now.isoformat(" ", "minutes"),
        "command": "python benchmarks/gpu_kernels.py " + " ".join(sys.argv[1:]),
        "machine": machine(setting.device),
        "rounds": setting.rounds,
        "warmups": WARMUPS,
        "sections": run([name for name in SECTIONS if name in names], sizes, setting),
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / f"gpu-kernels-{now:%Y%m%d-%H%M}.json"
    file.write_text(json.dumps(results, indent=1))
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
