"""Eight small dictionaries trained together, beside one alone: on stored rows, and on rows a language model makes.

    python benchmarks/many.py
    python benchmarks/many.py --model path/to/model/or/hub/id --site layers.12     # another model than the demo's

Each round trains one dictionary (TopK, 576 features, k 16) and then eight (two architectures, two numbers of features,
two learning rates) on the same number of rows, the way ``unweave train`` and ``unweave sweep`` do; the ratio is formed
within a round. On the first line rows come from memory, so that only the steps cost; on the second from the model,
whose forward passes all members share.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from unweave.activations import RowStream
from unweave.batch import ActivationBatch
from unweave.dictionaries import build
from unweave.runs.opening import open_documents, open_model, open_source
from unweave.sources._base import Source
from unweave.training import TrainingConfig, train, train_many
from unweave.workflows.demo import demo_recipe

BATCH = 2048
GRID = list(itertools.product(("topk", "batch_topk"), (576, 1152), (5e-4, 1e-3)))


class Kept(Source):
    """The first batches of a source, over and over."""

    def __init__(self, source: Any, n_rows: int) -> None:
        self.source, self.kept = source, []
        for batch in source.batches():
            self.kept.append(batch)
            if sum(b.n_rows for b in self.kept) >= n_rows:
                break

    @property
    def d_in(self) -> int:
        return self.source.d_in

    @property
    def d_out(self) -> int:
        return self.source.d_out

    @property
    def provenance(self) -> dict[str, Any]:
        return {"kind": "kept"}

    def batches(self, skip: int = 0) -> Iterator[ActivationBatch]:
        return itertools.islice(itertools.cycle(self.kept), skip, None)


def member(number: int, d: int) -> Any:
    arch, n_features, _ = GRID[number]
    torch.manual_seed(number)
    return build(arch, d, n_features, k=16)


def config(number: int, n_steps: int) -> TrainingConfig:
    # The ring is a share of a real one's, so that filling it does not outweigh the few steps timed.
    return TrainingConfig(
        n_rows=n_steps * BATCH, batch_size=BATCH, ring_rows=8 * BATCH, lr=GRID[number][2], log_every=n_steps
    )


def seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(source: Source, n_steps: int, rounds: int) -> dict[str, float]:
    def alone() -> None:
        train(member(0, source.d_in), RowStream(source, seed=0), config(0, n_steps))

    def together() -> None:
        members = {f"m{i}": (member(i, source.d_in), config(i, n_steps)) for i in range(len(GRID))}
        train_many(members, RowStream(source, seed=0))

    alone(), together()  # compile and calibrate
    one, many, ratios = [], [], []
    for _ in range(rounds):
        one.append(seconds(alone))
        many.append(seconds(together))
        ratios.append(many[-1] / one[-1])
    return {
        "one_s": statistics.median(one),
        "eight_s": statistics.median(many),
        "ratio": statistics.median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the demo's")
    parser.add_argument("--site", default="layers.12")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", help="write the numbers here too")
    arguments = parser.parse_args()
    recipe = demo_recipe(model=arguments.model, site=arguments.site)
    source = open_source(recipe, open_model(recipe), open_documents(recipe))
    kept = Kept(source, 12 * BATCH)
    found = {
        "stored rows": measure(kept, 3 * arguments.steps, arguments.rounds),
        "live model": measure(source, arguments.steps, arguments.rounds),
    }
    for name, row in found.items():
        spread = f"{row['ratio_lowest']:.2f} to {row['ratio_highest']:.2f}"
        print(
            f"{name}: one {row['one_s']:.1f} s, eight {row['eight_s']:.1f} s, {row['ratio']:.2f} times one ({spread})"
        )
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
