"""The sections of the benchmark: each builds its callables, times them side by side, and returns JSON-able rows."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .adapters import TRAIN, Row, buffers, encode_rows, pursuits
from .base import Peer, Setup
from .harness import Call, Rounds, gemm_floor, message, time_rounds

FLOOR, FLOOR16 = "encode GEMM alone, float32", "encode GEMM alone, bfloat16"
DEAD_SHARE = 0.1
Results = list[dict[str, Any]]


@dataclass(frozen=True)
class Size:
    """``batch_size`` rows of width d into n_features, k of them firing; pursuit encodes ``pursuit_rows`` at a time."""

    d: int
    n_features: int
    k: int
    batch_size: int
    pursuit_rows: int

    def __str__(self) -> str:
        return f"d={self.d}, n_features={self.n_features}, k={self.k}"


@dataclass(frozen=True)
class Options:
    """How long to measure, and what."""

    rounds: int
    warmups: int
    lr: float
    quality_steps: int
    archs: tuple[str, ...]
    capacities: tuple[int, ...]
    wanted: Callable[[str], bool]  # chooses rows by key

    def rows(self, rows: list[Row]) -> list[Row]:
        return [row for row in rows if self.wanted(row.key)]


def train(size: Size, data: Tensor, options: Options) -> Results:
    """A training step of every row, for each architecture; no feature is dead yet, so nobody pays for AuxK."""
    setup = _setup(size, data, options)
    return [_train(size, data, options, arch, setup, options.rows(TRAIN[arch])) for arch in options.archs]


def auxk(size: Size, data: Tensor, options: Options) -> Results:
    """A TopK training step with the AuxK loss at work: a tenth of the features forced dead before every step."""
    setup, dead = _setup(size, data, options).with_dead(data, DEAD_SHARE)
    rows = [row for row in options.rows(TRAIN["TopK"]) if row.auxk]
    return [_train(size, data, options, "TopK", setup, rows, dead) | {"dead": len(dead)}]


def _train(
    size: Size, data: Tensor, options: Options, arch: str, setup: Setup, rows: list[Row], dead: Tensor | None = None
) -> dict[str, Any]:
    batches = data.split(size.batch_size)
    peers, errors = _build(rows, setup)

    def step(peer: Peer) -> Call:
        def call(number: int) -> None:
            if dead is not None:
                peer.force_dead(dead)
            peer.train_step(batches[number % len(batches)])

        return call

    calls = {key: step(peer) for key, peer in peers.items()} | gemm_floor(size.batch_size, size.d, size.n_features)
    measured = time_rounds(calls, rounds=options.rounds, warmups=options.warmups)
    found = _section(size, rows, peers, errors, measured, rows_per_call=size.batch_size)
    _close(peers)
    return {"arch": arch, **found}


def encode(size: Size, data: Tensor, options: Options) -> Results:
    """Inference encode of 1, 64 and 8,192 rows; also how many rows get the very features float32 TopK gives them."""
    setup = _setup(size, data, options)
    rows = options.rows(encode_rows())
    peers, errors = _build(rows, setup)
    sample = data[:512]
    scores = (sample - setup.b_dec) @ setup.W_enc.T + setup.b_enc
    expected = torch.zeros_like(scores).scatter_(1, scores.topk(setup.k, dim=1).indices, 1.0).bool() & (scores > 0)
    same = {}
    for key, peer in peers.items():
        same[key] = float(((peer.dense(sample) != 0) == expected).all(1).double().mean())
    results = []
    for n, repeats in ((1, 50), (64, 10), (8192, 1)):
        x = data[:n]

        def call(peer: Peer, x: Tensor = x) -> Call:
            return lambda number: peer.encode(x)

        calls = {key: call(peer) for key, peer in peers.items()} | gemm_floor(n, size.d, size.n_features)
        measured = time_rounds(calls, rounds=options.rounds, warmups=options.warmups, repeats=repeats)
        found = _section(size, rows, peers, errors, measured, rows_per_call=n)
        for row in found["rows"]:
            row["same_features"] = same.get(row["key"])
        results.append({"arch": "TopK", "n_rows": n, **found})
    _close(peers)
    return results


def pursuit(size: Size, data: Tensor, options: Options) -> Results:
    """Matching pursuit encode with k selections; ``same_features`` is the overlap of supports with the naive one's."""
    setup = _setup(size, data, options)
    x = (data - setup.b_dec)[: size.pursuit_rows].contiguous()
    encoders: dict[str, Callable[[Tensor], Any]] = {"naive torch": _naive_pursuit(setup.W_dec, size.k)}
    errors: dict[str, str] = {}
    for key, build in pursuits(setup.W_dec, size.k).items():
        if options.wanted(key):
            try:
                encoders[key] = build()
            except Exception as error:
                errors[key] = message(error)
    expected = encoders["naive torch"](x[:64]) != 0
    same = {}
    for key, encoder in list(encoders.items()):
        try:
            found = _dense(encoder(x[:64])) != 0
            same[key] = float((found & expected).sum() / expected.sum())
        except Exception as error:
            errors[key] = message(error)
            del encoders[key]
    calls: dict[str, Call] = {key: (lambda number, e=encoder: e(x)) for key, encoder in encoders.items()}
    calls |= gemm_floor(len(x), size.d, size.n_features)
    measured = time_rounds(calls, rounds=options.rounds, warmups=options.warmups)
    rows = [timed_row(key, measured, errors, len(x), ours=key.startswith("unweave")) for key in (*encoders, *errors)]
    for row in rows:
        row["same_features"] = same.get(row["key"])
    compare(rows, measured, {row["key"] for row in rows if not row["ours"] and row["key"] != "naive torch"})
    return [{"size": str(size), "n_rows": len(x), "rows": rows, **meta(measured)}]


def buffer(size: Size, data: Tensor, options: Options) -> Results:
    """Batches drawn from a full shuffle buffer of bfloat16 rows that a producer refills, ``batch_size`` at a time.

    As many draws a round as sae-lens serves between two refills (half the buffer), so that all its costs are in.
    """
    rows16 = data[: 32 * size.batch_size].bfloat16()
    results = []
    for capacity in options.capacities:
        draws = max(1, capacity // 2 // size.batch_size)
        calls: dict[str, Call] = {}
        errors: dict[str, str] = {}
        for key, build in buffers(rows16, capacity, size.batch_size, size.batch_size).items():
            if not options.wanted(key):
                continue
            try:
                draw = build()
                draw()  # fills it
            except Exception as error:
                errors[key] = message(error)
                continue
            calls[key] = lambda number, draw=draw, draws=draws: [draw() for _ in range(draws)]
        measured = time_rounds(calls, rounds=options.rounds, warmups=options.warmups)
        n = draws * size.batch_size
        rows = [timed_row(key, measured, errors, n, key.startswith("unweave")) for key in (*calls, *errors)]
        compare(rows, measured, {row["key"] for row in rows if not row["ours"]})
        results.append({"size": f"d={size.d}, {capacity:,} slots", "rows": rows, **meta(measured)})
        calls.clear()
    return results


def quality(size: Size, data: Tensor, held_out: Tensor, options: Options) -> Results:
    """The twin of every training row: the same start, data, order, steps and learning rate; then held-out numbers.

    ``fvu`` is the share of variance unexplained, ``dead_share`` the features that fire on none of the held-out rows,
    ``l0`` how many fire in a row, all by the library's inference encode. Not timed, but the seconds are kept.
    """
    setup = _setup(size, data, options)
    batches = data.split(size.batch_size)
    results = []
    for arch in options.archs:
        rows: Results = []
        for row in options.rows(TRAIN[arch]):
            print(f"    {arch} {row.key}", end=" ", flush=True)
            entry = _identity(row, None)
            try:
                peer = row.build(setup)
                entry = _identity(row, peer) | {"start": _held_out(peer, held_out[:2048])["fvu"]}
                start = time.perf_counter()
                for number in range(options.quality_steps):
                    peer.train_step(batches[number % len(batches)])
                entry |= {"seconds": time.perf_counter() - start} | _held_out(peer, held_out)
                print(f"fvu {entry['fvu']:.5f}  dead {entry['dead_share']:.1%}  l0 {entry['l0']:.1f}")
                peer.close()
                del peer
            except Exception as error:
                entry["error"] = message(error)
                print(entry["error"])
            gc.collect()
            rows.append(entry)
        results.append({"arch": arch, "size": str(size), "steps": options.quality_steps, "rows": rows})
    return results


def _held_out(peer: Peer, rows: Tensor) -> dict[str, float]:
    error, fired, active = 0.0, None, 0
    for part in rows.split(2048):
        error += float((part - peer.reconstruct(part).float()).double().square().sum())
        code = peer.dense(part) != 0
        active += int(code.sum())
        fired = code.any(0) if fired is None else fired | code.any(0)
    assert fired is not None
    variance = float((rows - rows.mean(0)).double().square().sum())
    return {"fvu": error / variance, "dead_share": float((~fired).double().mean()), "l0": active / len(rows)}


# ---- shared -------------------------------------------------------------------------------------------------------


def _setup(size: Size, data: Tensor, options: Options) -> Setup:
    return Setup.make(data[:8192], size.n_features, size.k, size.batch_size, options.lr)


def _build(rows: list[Row], setup: Setup) -> tuple[dict[str, Peer], dict[str, str]]:
    """The rows that could be built, and why the others could not."""
    peers, errors = {}, {}
    for row in rows:
        try:
            peers[row.key] = row.build(setup)
        except Exception as error:
            errors[row.key] = message(error)
    return peers, errors


def _close(peers: dict[str, Peer]) -> None:
    for peer in peers.values():
        peer.close()
    peers.clear()
    gc.collect()


def _identity(row: Row, peer: Peer | None) -> dict[str, Any]:
    facts = {"key": row.key, "ours": row.ours, "exact": row.exact, "bf16": row.bf16}
    return facts if peer is None else facts | {"name": peer.name, "setting": peer.setting, "note": peer.note}


def _section(
    size: Size, rows: list[Row], peers: dict[str, Peer], errors: dict[str, str], measured: Rounds, rows_per_call: int
) -> dict[str, Any]:
    found = [
        _identity(row, peers.get(row.key)) | timed_row(row.key, measured, errors, rows_per_call, row.ours)
        for row in rows
    ]
    by_key = {row.key: row for row in rows}
    peers_only = {key for key, row in by_key.items() if not row.ours and row.exact}
    compare(found, measured, peers_only)
    compare(found, measured, {key for key in peers_only if not by_key[key].bf16}, "x_best_float32_peer")
    return {"size": str(size), "rows": found, **meta(measured)}


def timed_row(key: str, measured: Rounds, errors: dict[str, str], rows_per_call: int, ours: bool) -> dict[str, Any]:
    row: dict[str, Any] = {"key": key, "ours": ours}
    timing = measured.timings.get(key)
    error = errors.get(key) or (timing.error if timing else "not run")
    if error is not None or timing is None:
        return row | {"error": error}
    row |= {
        "ms": 1e3 * timing.median,
        "min_ms": 1e3 * min(timing.times),
        "iqr_ms": 1e3 * timing.iqr,
        "rows_per_second": rows_per_call / timing.median,
    }
    if FLOOR in measured.timings:
        row |= {"x_gemm_float32": timing.ratio(measured[FLOOR]), "x_gemm_bfloat16": timing.ratio(measured[FLOOR16])}
    return row


def compare(rows: Results, measured: Rounds, keys: set[str], column: str = "x_best_peer") -> None:
    """How many times as fast as the fastest of ``keys`` each row is: the median of ratios within rounds."""
    rivals = [timing for timing in measured.working if timing.name in keys]
    if not rivals:
        return
    best = min(rivals, key=lambda timing: timing.median)
    for row in rows:
        if "ms" in row:
            row[column] = best.ratio(measured[row["key"]])


def meta(measured: Rounds) -> dict[str, Any]:
    return {"rounds": measured.to_dict()}


def _naive_pursuit(atoms: Tensor, k: int) -> Callable[[Tensor], Tensor]:
    """Matching pursuit as it is written down: a full product of residuals and atoms for every selection."""

    @torch.no_grad()
    def encode(x: Tensor) -> Tensor:
        residual = x.clone()
        code = x.new_zeros(len(x), len(atoms))
        for _ in range(k):
            values, at = (residual @ atoms.T).max(1)
            code.scatter_add_(1, at[:, None], values[:, None])
            residual -= values[:, None] * atoms[at]
        return code

    return encode


def _dense(code: Any) -> Tensor:
    return code if isinstance(code, Tensor) else code.dense()
