"""Does it matter for quality which engine trains? Held-out FVU and dead features of each, at equal rows.

    python benchmarks/engines_agree.py activations                  # a store that unweave harvest or the demo wrote
    python benchmarks/engines_agree.py activations --archs topk,relu --steps 1000 --seeds 0,1,2
    python benchmarks/engines_agree.py planted --archs jumprelu --n-features 1024 --k 12 --steps 120 --batch-size 1024

Every engine gets the same start, rows, order and schedule. The last rows of the store are held out. "planted" stands
for sparse sums of 512 directions, drawn anew for each seed: there JumpReLU, whose thresholds make it jump about on a
real model's rows, comes close enough to itself to be compared.

"difference" is that of the FVU, as a share of autograd's. Training amplifies roundings, so the noise stands beside it:
autograd again, twice, from encoder weights moved by a millionth of themselves. One run tells little; the last table has
the mean of the paired differences over all seeds, with its standard error.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unweave.activations import ActivationStore, RowStream
from unweave.dictionaries import build
from unweave.evaluation import evaluate
from unweave.kernels import int8
from unweave.sources import ArraySource
from unweave.training import TrainingConfig, train

INT8 = ("cpu+int8_screen",) if int8.why_not() is None else ()
ENGINES = ("autograd", "reference", "cpu", "cpu+screen", *INT8, "autograd, moved 1", "autograd, moved 2")


def options_of(arch: str, k: int) -> dict[str, Any]:
    return {"jumprelu": {"target_l0": float(k)}, "relu": {}}.get(arch, {"k": k})


def planted(n: int, seed: int, d: int = 128, n_directions: int = 512) -> Tensor:
    """``(n, d)``: about 12 directions a row, common ones and rare ones, with a little noise."""
    g = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(n_directions, d, generator=g), dim=1)
    share = 1 / torch.arange(1, n_directions + 1) ** 0.7
    fires = torch.rand(n, n_directions, generator=g) < 12 * share / share.sum()
    strength = 1 + torch.empty(n, n_directions).exponential_(generator=g)
    return (fires * strength) @ directions + 0.02 * torch.randn(n, d, generator=g)


def measured(dictionary: Any, rows: Tensor) -> dict[str, float]:
    found = evaluate(dictionary, ArraySource(rows), n_rows=len(rows), baselines=False, n_bootstrap=0, progress=False)
    return {name: found[name] for name in ("fvu", "dead_share", "l0")}


def summarise(found: list[dict[str, Any]]) -> None:
    """Mean paired differences to autograd over the seeds."""
    truth = {(line["arch"], line["seed"]): line for line in found if line["engine"] == "autograd"}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for line in found:
        groups.setdefault((line["arch"], line["engine"]), []).append(line)
    for (arch, engine), lines in groups.items():
        fvus = [line["difference"] for line in lines]
        dead = [line["dead_share"] - truth[arch, line["seed"]]["dead_share"] for line in lines]
        print(f"{arch:12} {engine:18} {len(lines)} seeds: FVU {with_error(fvus)}, dead share {with_error(dead)}")


def with_error(values: list[float]) -> str:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else float("nan")
    return f"{statistics.fmean(values):+.3%} (s.e. {error:.3%})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("store")
    parser.add_argument("--archs", default="topk,batch_topk,jumprelu")
    parser.add_argument("--n-features", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32, help="features a row, or the target of those that have one")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--batch-size", type=int, default=2048)
    parser.add_argument("--engines", default=";".join(ENGINES), help="separated by semicolons; autograd comes first")
    parser.add_argument("--rows", type=int, default=220_000, help="rows of the store to use")
    parser.add_argument("--json", help="write the numbers here too")
    arguments = parser.parse_args()
    store = None if arguments.store == "planted" else ActivationStore.open(arguments.store)
    found = []
    for arch in arguments.archs.split(","):
        for seed in map(int, arguments.seeds.split(",")):
            if store is None:
                rows = planted(min(arguments.rows, 150_000), seed)
            else:
                rows = store.rows(slice(0, min(arguments.rows, store.n_rows))).float()
            seen, held_out, truth = rows[:-16_384], rows[-16_384:], 0.0
            for engine in arguments.engines.split(";"):
                torch.manual_seed(seed)
                dictionary = build(arch, rows.shape[1], arguments.n_features, **options_of(arch, arguments.k))
                if "moved" in engine:
                    g = torch.Generator().manual_seed(int(engine[-1]))
                    dictionary.W_enc.data.mul_(1 + 1e-6 * torch.randn(dictionary.W_enc.shape, generator=g))
                config = TrainingConfig(
                    n_rows=arguments.steps * arguments.batch_size,
                    batch_size=arguments.batch_size,
                    engine=engine.partition(",")[0],
                    seed=seed,
                    ring_rows=65_536,
                )
                train(dictionary, RowStream(ArraySource(seen), seed=seed), config)
                numbers = measured(dictionary, held_out)
                truth = truth or numbers["fvu"]
                difference = numbers["fvu"] / truth - 1
                found.append({"arch": arch, "seed": seed, "engine": engine, **numbers, "difference": difference})
                shown = f"fvu {numbers['fvu']:.5f}  dead {numbers['dead_share']:.2%}  l0 {numbers['l0']:.2f}"
                print(f"{arch} seed {seed} {engine:22} {shown}  difference {difference:+.3%}", flush=True)
    summarise(found)
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
