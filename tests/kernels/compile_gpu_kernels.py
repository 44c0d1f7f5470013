"""Compile every Triton kernel for given architectures without a GPU, and print what each needs as JSON.

    python tests/kernels/compile_gpu_kernels.py 80 90

A program of its own, because Triton is imported either to compile or to interpret, once per process. Kernels are
compiled with the block sizes that are used at (d, m, k) = (4096, 131072, 64) and with all their parts switched on (and
off, where that is a different kernel); ``test_gpu_compile.py`` checks that no kernel is missing here.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from unweave.kernels._triton import tile
from unweave.kernels.adam.gpu import row_blocks
from unweave.kernels.gradients.gpu import SEGMENT
from unweave.kernels.select.gpu import topk_plan

D, M, K = 4096, 131_072, 64
MODULES = ("select", "decode", "gradients", "adam", "update", "prefixes", "pursuit")

I64 = ("offsets", "starts", "ends", "order", "rows", "first_segment", "owner", "at", "at_extra")
I32 = ("indices", "candidates", "counts", "bounds", "again", "found_indices", "packed_indices")
BF16 = ("shadow",)
INT = ("n_features", "n_rows", "n_groups", "d", "m", "k")
FLOAT = ("tolerance", "scale", "clip", "beta1", "beta2", "rest1", "rest2", "step_size", "correction", "eps")

ROW = {**tile(D, 8)}
PLAN = topk_plan(M, K)
SELECT = {"SIGNED": True, "SCREENED": True}
PURSUIT = {"WIDTH": K, "BLOCK": 1024, "BLOCK_D": 512, "FLOOR": 1e-6, "num_warps": 8}
PURSUES = ("SIGNED", "DISTINCT", "UNTIL_REPEAT", "HAS_TRAIL", "HAS_TOLERANCE")
ALL = {"HAS_HEAVY": True, "HAS_MORE": True, "HAS_PULL": True}
NONE = dict.fromkeys(ALL, False)

# kernel: variants, each (block sizes and flags, types that differ from what the names above say)
CASES: dict[str, list[tuple[dict[str, Any], dict[str, str]]]] = {
    "decode._decode": [(ROW, {}), (tile(24, 8), {})],
    "decode._decode_residual": [(ROW, {}), (ROW, {"W": "*bf16"})],
    "gradients._gather_dot": [(ROW, {})],
    "gradients._sum_segments": [({**ROW, "SEGMENT": SEGMENT}, {"first": "*i64"})],
    "gradients._sum_outer": [({**ROW, **ALL}, {"first": "*i64"}), ({**ROW, **NONE}, {"first": "*i64"})],
    "gradients._sum_over": [({"HAS_LENGTHS": True, "FEATURES": 32, "TOGETHER": 32}, {})],
    "adam._adam_rows": [
        ({**row_blocks(D), "UNIT_NORM": True, "HAS_SHADOW": True}, {}),
        ({**row_blocks(D), "UNIT_NORM": False, "HAS_SHADOW": True}, {}),
    ],
    "adam._project": [(row_blocks(D), {})],
    "update._update_rows": [
        ({**tile(D, 4), **ALL, "UNIT_NORM": True, "HAS_SHADOW": True}, {"heavy_first": "*i64"}),
        ({**tile(D, 4), **NONE, "UNIT_NORM": False, "HAS_SHADOW": True}, {"heavy_first": "*i64"}),
    ],
    "prefixes._decode_prefixes": [(ROW, {}), (ROW, {"W": "*bf16"})],
    "pursuit._pursue": [
        ({**PURSUIT, **dict.fromkeys(PURSUES, True)}, {"counts": "*i64", "trail": "*i32"}),
        ({**PURSUIT, **dict.fromkeys(PURSUES, False)}, {"counts": "*i64", "trail": "*i32", "gram": "*bf16"}),
    ],
    "select._find": [
        ({**SELECT, **PLAN}, {"scores": "*bf16"}),
        ({"SIGNED": False, "SCREENED": False, **PLAN}, {}),
        ({**SELECT, **topk_plan(M, 512)}, {"scores": "*bf16"}),
    ],
    "select._refine": [({**ROW, "CAPACITY": PLAN["CAPACITY"]}, {})],
    "select._cut": [
        ({**SELECT, "CAPACITY": PLAN["CAPACITY"]}, {"scores": "*bf16"}),
        ({**SELECT, "CAPACITY": topk_plan(M, 512)["CAPACITY"]}, {"scores": "*bf16"}),
        # Triton compiles an argument that is 1 as a constant.
        ({"SIGNED": False, "SCREENED": False, "CAPACITY": 32, "m": 1, "k": 1}, {}),
    ],
    "select._redo": [
        ({**SELECT, **ROW, "BLOCK": 512}, {"scores": "*bf16", "found": "*i32"}),
        ({"SIGNED": False, "SCREENED": False, **ROW, "BLOCK": 512}, {"found": "*i32"}),
    ],
    "select._collect": [
        (
            {"PER_FEATURE": True, "STRICT": False, "SCREENED": True, "BLOCK": 1024},
            {"scores": "*bf16", "counts": "*i64"},
        ),
        ({"PER_FEATURE": False, "STRICT": True, "SCREENED": False, "BLOCK": 1024}, {"counts": "*i64"}),
    ],
    "select._pack": [({"BLOCK": 128}, {})],
}


def kernels() -> dict[str, Any]:
    """Every function of the modules that is launched: the jitted ones whose name starts with an underscore and that
    another jitted function does not call."""
    found, called = {}, set()
    for name in MODULES:
        module = importlib.import_module(f"unweave.kernels.{name}.gpu")
        for key, value in vars(module).items():
            if isinstance(value, triton.runtime.jit.JITFunction) and value.__module__ == module.__name__:
                found[f"{name}.{key}"] = value
                called |= {f"{name}.{word}" for word in re.findall(r"\b_\w+(?=\()", value.src.split(":", 1)[1])}
    return {name: fn for name, fn in found.items() if "._" in name and name not in called}


def compiled(fn: Any, constants: dict[str, Any], types: dict[str, str], arch: int) -> dict[str, Any]:
    constants = dict(constants)
    warps = constants.pop("num_warps", 4)
    constants = {name: value for name, value in constants.items() if name in fn.arg_names}
    signature = {name: "constexpr" if name in constants else type_of(name, types) for name in fn.arg_names}
    # As at launch: torch's memory is aligned to 16 bytes, and widths are usually multiples of 16.
    aligned = [["tt.divisibility", 16]]
    wide = [name for name in ("d", "m") if name not in constants]
    attrs = {(i,): aligned for i, name in enumerate(fn.arg_names) if signature[name][0] == "*" or name in wide}
    source = ASTSource(fn=fn, signature=signature, constexprs=constants, attrs=attrs)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    return {"warps": warps, "shared": kernel.metadata.shared, **resources(kernel.asm["cubin"])}


def type_of(name: str, types: dict[str, str]) -> str:
    if name in types:
        return types[name]
    if name in INT or name in FLOAT:
        return "i32" if name in INT else "fp32"
    return "*i64" if name in I64 else "*i32" if name in I32 else "*bf16" if name in BF16 else "*fp32"


def resources(cubin: bytes) -> dict[str, int]:
    """Registers per thread, and bytes per thread that did not fit in them (a stack is where ptxas spills to)."""
    with tempfile.TemporaryDirectory() as place:
        file = Path(place) / "kernel.cubin"
        file.write_bytes(cubin)
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(tool), "--dump-resource-usage", str(file)]
        told = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (re.search(rf"\b{name}:(\d+)", told) for name in ("REG", "STACK", "LOCAL"))
    if not (registers and stack and local):
        raise ValueError(f"cuobjdump said {told!r}")
    return {"registers": int(registers[1]), "spilled": int(stack[1]) + int(local[1])}


def main() -> None:
    archs = [int(arch) for arch in sys.argv[1:]] or [80, 90]
    found = kernels()
    jobs = [
        (name, i, arch, found[name], *case)
        for name, cases in CASES.items()
        if name in found
        for i, case in enumerate(cases)
        for arch in archs
    ]
    with ThreadPoolExecutor(2) as pool:
        made = list(pool.map(lambda job: compiled(job[3], job[4], job[5], job[2]), jobs))
    rows = [{"kernel": name, "variant": i, "arch": arch, **r} for (name, i, arch, *_), r in zip(jobs, made)]
    print(
        json.dumps(
            {"kernels": rows, "missing": sorted(set(found) - set(CASES)), "gone": sorted(set(CASES) - set(found))}
        )
    )


if __name__ == "__main__":
    main()
