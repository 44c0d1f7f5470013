"""What SynthSAEBench is for: telling apart what reconstruction alone would rank the other way round."""

from __future__ import annotations

import pytest

import unweave
from unweave.evaluation.synthetic import SyntheticSource, bench_toy, recover


@pytest.mark.slow
def test_matryoshka_finds_more_than_batch_topk_than_l1_at_equal_l0():
    """At an L0 of 6 of about 8, 96 features for 256 planted.

    F1 of seeds 0 to 2: matryoshka 0.76 to 0.77, batch_topk 0.63 to 0.64, relu 0.56; random 0.10. FVU: 0.22, 0.18, 0.24.
    """
    source = SyntheticSource(bench_toy())
    options = {
        "matryoshka": {"k": 6, "group_fractions": (1 / 8, 1 / 8, 1 / 4, 1 / 2)},
        "batch_topk": {"k": 6},
        "relu": {"l1_coefficient": 0.18},
    }
    found = {}
    for arch, chosen in options.items():
        dictionary = unweave.fit(source, arch, n_features=96, n_rows=1200 * 512, batch_size=512, **chosen)
        found[arch] = recover(dictionary, source, n_rows=8192)
        assert found[arch]["l0"] == pytest.approx(6, abs=0.5)
    assert found["matryoshka"]["firing_f1"] > found["batch_topk"]["firing_f1"] + 0.06
    assert found["batch_topk"]["firing_f1"] > found["relu"]["firing_f1"] + 0.03
    assert found["batch_topk"]["fvu"] < found["matryoshka"]["fvu"] - 0.02
    assert found["batch_topk"].baselines["random"]["firing_f1"].value < 0.2
    assert found["batch_topk"].baselines["oracle"]["firing_f1"].value == pytest.approx(1)
