"""The Triton kernels: their results, interpreted (and on a GPU where there is one), and what they compile to.

All of it runs in processes of its own. Triton decides when it is imported whether kernels are interpreted, so
TRITON_INTERPRET must neither come too late nor stay behind for whoever imports Triton next.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
CASES = ["cases_gpu_select.py", "cases_gpu_products.py", "cases_gpu_pursuit.py"]
SHARED_LIMIT = 100 * 1024  # bytes a block of sm_86 and sm_89 can have; sm_80 and sm_90 have more
REGISTER_LIMIT = 168  # with 128 threads, three blocks on a multiprocessor

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed (pip install triton)"
)


def run(*command: str, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command], cwd=HERE, env={**kept, **environment}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("cases", CASES)
def test_interpreted_kernels_agree_with_the_reference(cases):
    told = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", cases, TRITON_INTERPRET="1")
    assert " passed" in told
    assert "skipped" not in told


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("cases", CASES)
def test_kernels_on_a_gpu_agree_with_the_reference(cases):
    told = run("-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header", cases)
    assert " passed" in told
    assert "skipped" not in told


def test_every_kernel_compiles_for_both_architectures_without_spilling():
    told = json.loads(run("compile_gpu_kernels.py", "80", "90").splitlines()[-1])
    assert told["missing"] + told["gone"] == [], "compile_gpu_kernels.py does not list every kernel"
    assert {kernel["arch"] for kernel in told["kernels"]} == {80, 90}
    over = [
        kernel
        for kernel in told["kernels"]
        if kernel["spilled"] or kernel["shared"] > SHARED_LIMIT or kernel["registers"] > REGISTER_LIMIT
    ]
    assert over == []
