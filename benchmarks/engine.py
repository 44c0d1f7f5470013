"""unweave's training engine, encoder, pursuit and shuffle ring beside other libraries: speed, and the quality twin.

    python -m venv peers-env && peers-env/bin/pip install torch==2.13.0
    peers-env/bin/pip install --no-deps -r benchmarks/peers/requirements.txt && peers-env/bin/pip install --no-deps -e .
    OMP_NUM_THREADS=2 peers-env/bin/python benchmarks/engine.py --smoke
    OMP_NUM_THREADS=2 peers-env/bin/python benchmarks/engine.py --only train,auxk,encode
    peers-env/bin/python benchmarks/engine.py --only quality --rows unweave --sizes 4608

Measured, all in one process and interleaved: a full training step (train), the same with a tenth of the features dead
(auxk), inference encode of 1, 64 and 8,192 rows (encode), matching pursuit (pursuit), drawing from shuffle buffers
(buffer), language model to trained dictionary (endtoend); and, untimed, held-out FVU and dead features after equal
steps from an equal start (quality). Peers run their own code with their defaults and with their fastest documented
setting; one that fails is listed with its message. Timing both sizes takes 20 to 30 minutes on two cores, quality 30
minutes at 4,608 features and two hours at 18,432. Results are dated JSON, a Markdown page and a plot in
benchmarks/results/. To put rows measured elsewhere beside new ones (quality takes long, and peers do not change), give
an earlier file: --quality-from benchmarks/results/NAME.json.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is downloaded
os.environ.setdefault("WANDB_MODE", "disabled")

import torch
from peers import endtoend, machine, report, sections
from peers.data import synthetic_rows
from peers.sections import Options, Results, Size

SECTIONS = ("train", "auxk", "encode", "pursuit", "buffer", "quality", "endtoend")
SIZES = (Size(576, 4608, 32, 2048, 1024), Size(576, 18432, 32, 2048, 128))
SMOKE = (Size(64, 512, 8, 256, 128),)
ARCHS = ("TopK", "BatchTopK", "JumpReLU")


def options_of(arguments: argparse.Namespace) -> Options:
    smoke = arguments.smoke
    patterns = arguments.rows.replace("_", "-").split(",") if arguments.rows else []
    return Options(
        rounds=arguments.rounds or (3 if smoke else 7),
        warmups=1 if smoke else 2,
        lr=arguments.lr,
        quality_steps=arguments.quality_steps or (20 if smoke else 200),
        archs=tuple(arguments.archs.split(",")),
        capacities=(4096,) if smoke else (65_536, 262_144),
        wanted=lambda key: not patterns or any(pattern in key.replace("_", "-") for pattern in patterns),
    )


def run(
    names: list[str], sizes: list[Size], options: Options, found: dict[str, Results], save: Callable[[], object]
) -> None:
    """Fill ``found``, section by section, and save after each."""
    found.update({name: [] for name in names})
    steps = options.warmups + options.rounds
    if "quality" in names:
        steps = max(steps, options.quality_steps)
    for size in sizes:
        print(f"{size}")
        n_train = max(steps * size.batch_size, 32 * size.batch_size, 8192)
        rows = synthetic_rows(n_train + 16_384, size.d)
        data, held_out = rows[:n_train], rows[n_train:]
        for name in names:
            if name in ("buffer", "endtoend") and size.n_features != sizes[0].n_features:
                continue  # they do not depend on it, or take one size only
            print(f"  {name}", flush=True)
            if name == "quality":
                found[name] += sections.quality(size, data, held_out, options)
            elif name == "endtoend":
                found[name] += endtoend.run(size, options)
            else:
                found[name] += getattr(sections, name)(size, data, options)
            save()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a small size and few rounds: does everything run?")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"sections, of {','.join(SECTIONS)}")
    parser.add_argument("--sizes", help="numbers of features, of " + ", ".join(str(s.n_features) for s in SIZES))
    parser.add_argument("--archs", default="TopK,BatchTopK,JumpReLU", help="architectures to train")
    parser.add_argument("--rows", help="only rows whose key contains one of these, as in unweave,eai-sparsify/adam")
    parser.add_argument("--rounds", type=int, help="timed rounds (default 7)")
    parser.add_argument("--lr", type=float, default=1e-3, help="Adam's learning rate, for all")
    parser.add_argument("--quality-steps", type=int, help="steps of the quality twin (default 200)")
    parser.add_argument("--quality-from", type=Path, help="an earlier JSON, for quality rows not run now")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    unknown = [*(set(names) - set(SECTIONS)), *(set(arguments.archs.split(",")) - set(ARCHS))]
    if unknown:
        parser.error(f"unknown: {', '.join(unknown)}")
    sizes = list(SMOKE if arguments.smoke else SIZES)
    if arguments.sizes and not arguments.smoke:
        sizes = [size for size in sizes if str(size.n_features) in arguments.sizes.split(",")]
    if not sizes:
        parser.error(f"no size of {arguments.sizes} features")
    warnings.filterwarnings("ignore", module=r"(?!unweave)")
    torch.manual_seed(0)
    options = options_of(arguments)
    now = datetime.datetime.now()
    found: dict[str, Results] = {}
    results: dict[str, Any] = {
        "date": now.isoformat(" ", "minutes"),
        "command": "python benchmarks/engine.py " + " ".join(_told(sys.argv[1:])),
        "machine": machine.describe(),
        "rounds": options.rounds,
        "warmups": options.warmups,
        "lr": options.lr,
        "sections": found,
    }
    stem = f"engine-{'smoke-' if arguments.smoke else ''}{now:%Y%m%d-%H%M}"
    run(names, sizes, options, found, lambda: report.write(arguments.out, stem, results))
    if arguments.quality_from:
        _add_quality(found, json.loads(arguments.quality_from.read_text())["sections"]["quality"])
    print(report.markdown(results))
    for file in report.write(arguments.out, stem, results):
        print(f"wrote {file}")


def _told(arguments: list[str]) -> list[str]:
    """The command line without folders, which say nothing to another reader."""
    return [Path(argument).name if "/" in argument and Path(argument).exists() else argument for argument in arguments]


def _add_quality(found: dict[str, Results], earlier: Results) -> None:
    """Quality rows of an earlier run, where this one has none."""
    parts = {(part["size"], part["arch"]): part for part in found.setdefault("quality", [])}
    for part in earlier:
        mine = parts.get((part["size"], part["arch"]))
        if mine is None:
            found["quality"].append(part)
        elif mine["steps"] == part["steps"]:
            have = {row["key"] for row in mine["rows"] if "error" not in row}
            mine["rows"] = [row for row in mine["rows"] if row["key"] in have or "unweave" in row["key"]]
            mine["rows"] += [row for row in part["rows"] if row["key"] not in {r["key"] for r in mine["rows"]}]


if __name__ == "__main__":
    main()
