"""evaluate(): anchors with known answers, honest data, one clear error for what does not fit."""

from __future__ import annotations

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch

from unweave import metrics
from unweave.activations import ActivationStore
from unweave.codes import SparseCode
from unweave.dictionaries import build
from unweave.errors import UnweaveError
from unweave.evaluation import METRICS, Evaluation, evaluate
from unweave.evaluation._rows import EvaluationRows, cut
from unweave.sources import ArraySource

QUICK = {"n_rows": 600, "n_loss_tokens": 400, "n_bootstrap": 50, "progress": False}
NAMES = [
    "fvu", "cosine", "l2_ratio", "relative_bias", "l0", "dead_share", "dense_share", "ce_loss_recovered",
    "ce_loss_recovered_mean", "kl", "ce_clean", "ce_spliced", "ce_zero", "ce_mean",
]  # fmt: skip


# ---- anchors on a language model ------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["layers.1", "layers.2:input", "layers.1.mlp"])
def test_identity(any_model, text_source, known, site):
    found = evaluate(known(32, lambda x: x), text_source(any_model, site), baselines=False, **QUICK)
    assert list(found.metrics) == NAMES
    assert (found["fvu"], found["cosine"], found["l2_ratio"], found["relative_bias"]) == (0, 1, 1, 1)
    assert (found["ce_loss_recovered"], found["ce_loss_recovered_mean"], found["kl"]) == (1, 1, 0)
    assert found["ce_clean"] == found["ce_spliced"]
    assert found.metrics["kl"].low == found.metrics["kl"].high == 0


def test_zero(any_model, text_source, known):
    found = evaluate(known(32, torch.zeros_like), text_source(any_model), baselines=False, **QUICK)
    assert found["ce_loss_recovered"] == 0
    assert found["ce_spliced"] == found["ce_zero"] != found["ce_clean"]
    assert found["l2_ratio"] == found["cosine"] == 0
    assert math.isnan(found["relative_bias"])
    assert found["fvu"] > 1


def test_mean(model, text_source, known):
    """The mean of the fitted rows recovers nothing of the mean-anchored loss; of the evaluated rows, fvu is 1."""
    source = text_source(model)
    rows = EvaluationRows.read(source, None, QUICK["n_rows"], needs_fit=True, progress=False)
    fitted = rows.fit.mean(0, dtype=torch.float64).float()
    found = evaluate(known(32, lambda x: fitted.expand_as(x)), source, baselines=False, **QUICK)
    assert found["ce_spliced"] == found["ce_mean"]
    assert found["ce_loss_recovered_mean"] == 0
    evaluated = torch.cat([b.input for b in rows.batches])
    exact = evaluated.double().mean(0)
    found = evaluate(known(32, lambda x: exact.expand_as(x)), source, baselines=False, **QUICK)
    assert found["fvu"] == pytest.approx(1.0, abs=1e-12)
    assert len(evaluated) == found.data["n_rows"]


def test_half(model, text_source, known):
    found = evaluate(known(32, lambda x: x / 2), text_source(model), baselines=False, **QUICK)
    assert found["l2_ratio"] == pytest.approx(0.5, abs=1e-7)
    assert found["relative_bias"] == pytest.approx(0.5, abs=1e-7)
    assert found["cosine"] == pytest.approx(1, abs=1e-7)
    assert found["kl"] > 0


def test_transcoder_that_is_the_mlp(model, text_source, known):
    """Reads layers.1.mlp:input, writes layers.1.mlp: a copy of the MLP leaves the model as it was."""
    source = text_source(model, "layers.1.mlp:input", target_site="layers.1.mlp")
    twin = known(32, copy.deepcopy(model.site("layers.1.mlp").module))
    found = evaluate(twin, source, **QUICK)
    assert found["fvu"] < 1e-9
    assert found["ce_loss_recovered"] == pytest.approx(1, abs=1e-2)
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    wrong = evaluate(known(32, lambda x: x), source, baselines=False, **QUICK)
    assert wrong["kl"] > 100 * max(found["kl"], 1e-9)
    assert found.baselines["pca"]["kl"].value >= 0


def test_a_better_dictionary_scores_better(model, text_source, known):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(32, generator=generator)
    source = text_source(model)
    small, large = (
        evaluate(known(32, lambda x, s=s: x + s * x.norm(dim=1, keepdim=True) * noise), source, **QUICK)
        for s in (0.01, 0.3)
    )
    assert small["fvu"] < large["fvu"]
    assert small["kl"] < large["kl"]
    assert small["cosine"] > large["cosine"]


def test_everything_beside_the_dictionary(model, text_source):
    torch.manual_seed(0)
    dictionary = build("topk", d_in=32, n_features=64, k=4).eval()
    found = evaluate(dictionary, text_source(model), **QUICK)
    assert list(found.baselines) == ["pca", "random", "neurons"]
    assert found.data["baseline_l0"] == round(found["l0"]) <= 4
    for rival in found.baselines.values():
        assert list(rival) == ["fvu", "cosine", "ce_loss_recovered", "ce_loss_recovered_mean", "kl", "ce_spliced"]
        for name in ("fvu", "cosine", "kl", "ce_spliced"):  # a random model hardly notices zeros: the ratio is noise
            assert rival[name].low <= rival[name].value <= rival[name].high
    assert all(rival["fvu"].value < 1 for rival in found.baselines.values())
    for name, value in found.metrics.items():
        assert "recovered" in name or value.low <= value.value <= value.high, name
        assert value.version == METRICS[name].version
    data = found.data
    assert data["split"] == "all"
    assert data["fit_from"] == "other rows of the same source"
    assert data["n_loss_tokens"] >= 400
    assert data["n_tokens"] > data["n_rows"]  # BOS tokens give no row
    assert data["source"]["site"] == "layers.1"
    assert 1 < data["n_documents"] <= 300


def test_a_store_with_the_model_equals_the_text_source(model, text_source, tmp_path):
    source = text_source(model)
    store = ActivationStore.create(tmp_path / "store", source.provenance, 32, None, "float32")
    for batch in source.batches():
        store.append(batch)
    store.finish()
    dictionary = build("topk", d_in=32, n_features=64, k=4).eval()
    live = evaluate(dictionary, source, **QUICK)
    stored = evaluate(dictionary, store, model=model, **QUICK)
    assert stored.to_dict()["metrics"] == live.to_dict()["metrics"]
    assert stored.to_dict()["baselines"] == live.to_dict()["baselines"]
    alone = evaluate(dictionary, store, **QUICK)
    assert "kl" not in alone.metrics
    assert alone["fvu"] == live["fvu"] or alone.data["fit_rows"] == live.data["fit_rows"]


# ---- rows alone -----------------------------------------------------------------------------------------------------


@pytest.fixture
def rows() -> torch.Tensor:
    return torch.randn(900, 16, generator=torch.Generator().manual_seed(1)) + 2


def test_rows_alone(rows, known):
    found = evaluate(known(16, lambda x: x), ArraySource(rows), **QUICK)
    assert list(found.metrics) == NAMES[:7]
    assert found["fvu"] == 0
    assert found["l0"] == 16
    assert found["dense_share"] == 1
    assert found["dead_share"] == 0
    assert (found.data["n_rows"], found.data["fit_rows"]) == (600, 300)
    assert found.data["n_loss_tokens"] == 0
    assert found.baselines["pca"]["fvu"].value < 1e-9  # sixteen components of sixteen dimensions


def test_baselines_win_where_they_are_at_home(known):
    generator = torch.Generator().manual_seed(2)
    low_rank = torch.randn(900, 3, generator=generator) @ torch.randn(3, 16, generator=generator) + 1
    three = known(16, torch.zeros_like)
    three.encode = lambda x: SparseCode.from_fixed_k(torch.arange(3).repeat(len(x), 1), torch.ones(len(x), 3), 16)
    three.decode = lambda code: torch.zeros(len(code), 16)
    found = evaluate(three, ArraySource(low_rank), **QUICK)
    assert found["l0"] == 3
    assert found.baselines["pca"]["fvu"].value < 1e-9
    assert found.baselines["neurons"]["fvu"].value > 0.05
    axes = torch.zeros(900, 16).scatter_(1, torch.rand(900, 16, generator=generator).topk(3).indices, 9.0)
    axes *= torch.rand(900, 16, generator=generator).sub(0.5).sign()
    found = evaluate(three, ArraySource(axes), fit=torch.zeros(4, 16), **QUICK)
    assert found.data["fit_from"] == "the rows given"
    assert found.baselines["neurons"]["fvu"].value == 0
    assert found.baselines["pca"]["fvu"].value > 0.5


def test_permuting_features_changes_nothing(rows):
    torch.manual_seed(3)
    dictionary = build("topk", d_in=16, n_features=48, k=4).eval()
    first = evaluate(dictionary, ArraySource(rows), **QUICK).to_dict()
    order = torch.randperm(48)
    with torch.no_grad():
        for name in ("W_enc", "W_dec", "b_enc"):
            parameter = getattr(dictionary, name)
            parameter.copy_(parameter[order].clone())
    second = evaluate(dictionary, ArraySource(rows), **QUICK).to_dict()
    for name, value in first["metrics"].items():
        assert second["metrics"][name]["value"] == pytest.approx(value["value"], rel=1e-6), name
        assert second["metrics"][name]["low"] == pytest.approx(value["low"], rel=1e-6), name


def test_dead_and_dense_by_hand(known):
    rows = torch.zeros(300, 4)
    rows[:, 0] = 1
    rows[::5, 1] = torch.arange(60) + 1.0
    rows[7, 2] = -1  # set apart for fitting, so not seen
    found = evaluate(known(4, lambda x: x), ArraySource(rows), n_bootstrap=0, progress=False)
    assert found["dead_share"] == 0.5
    assert found["dense_share"] == 0.5
    assert found["l0"] == pytest.approx(1.2)
    assert math.isnan(found.metrics["l0"].low)


def test_seeds_and_sizes(rows, known):
    half = known(16, lambda x: x / 2)
    first, again = (evaluate(half, ArraySource(rows), **QUICK).to_dict() for _ in range(2))
    assert first == again
    other = evaluate(half, ArraySource(rows), seed=1, **QUICK).to_dict()
    assert other["metrics"]["fvu"]["value"] == first["metrics"]["fvu"]["value"]
    assert other["metrics"]["fvu"]["low"] != first["metrics"]["fvu"]["low"]
    few = evaluate(half, ArraySource(rows), n_rows=100, baselines=["pca"], n_bootstrap=50, progress=False)
    assert (few.data["n_rows"], few.data["fit_rows"]) == (100, 800)
    short = evaluate(half, ArraySource(rows), n_rows=10_000, n_bootstrap=0, progress=False)
    assert (short.data["n_rows"], short.data["fit_rows"]) == (600, 300)
    assert list(few.baselines) == ["pca"]
    split = evaluate(half, ArraySource(rows), n_rows=100, fit=rows, n_bootstrap=50, progress=False)
    assert split.data["n_rows"] == 100


def test_one_row(known):
    found = evaluate(known(3, lambda x: x), ArraySource(torch.ones(1, 3)), progress=False)
    assert math.isnan(found["fvu"])
    assert found["cosine"] == 1
    assert "evaluated rows themselves" in found.data["fit_from"]


def test_constant_rows_have_no_fvu(known):
    found = evaluate(known(3, lambda x: x), ArraySource(torch.full((90, 3), 0.3)), n_bootstrap=20, progress=False)
    assert math.isnan(found["fvu"])
    assert found.to_dict()["metrics"]["fvu"] == {"value": None, "low": None, "high": None, "version": 1}
    assert "-" in repr(found)


def test_training_mode_comes_back(rows, known):
    dictionary = known(16, lambda x: x).train()
    evaluate(dictionary, ArraySource(rows), **QUICK)
    assert dictionary.training


# ---- refused --------------------------------------------------------------------------------------------------------


def test_wrong_width(rows, known):
    with pytest.raises(UnweaveError, match=r"reads rows of width 8 .* width 16"):
        evaluate(known(8, lambda x: x), ArraySource(rows), **QUICK)


def test_another_site_or_model(model, text_source, known):
    source, same = text_source(model, "layers.1"), known(32, lambda x: x)
    trained_on = source.provenance
    evaluate(same, source, trained_on=trained_on, baselines=False, **QUICK)
    with pytest.raises(UnweaveError, match=r"trained on site 'layers\.2', but evaluated on site 'layers\.1'"):
        evaluate(same, source, trained_on={**trained_on, "site": "layers.2"}, **QUICK)
    other = {**trained_on, "model": {**trained_on["model"], "name": "other", "sha256": "0" * 64}}
    with pytest.raises(UnweaveError, match="trained on model 'other'"):
        evaluate(same, source, trained_on=other, **QUICK)
    assert evaluate(same, source, trained_on=other, force=True, baselines=False, **QUICK)["kl"] == 0


def test_loss_in_another_model_than_the_rows_came_from(model, text_source, known):
    source = text_source(model)
    elsewhere = {**source.provenance, "model": {"name": "other", "sha256": "0" * 64}}
    stored = SimpleNamespace(d_in=32, d_out=32, provenance=elsewhere, batches=source.batches)
    with pytest.raises(UnweaveError, match="rows were made with model 'other'"):
        evaluate(known(32, lambda x: x), stored, model=model, **QUICK)


def test_rows_without_tokens_have_no_loss(model, rows, known):
    wide = torch.cat([rows, rows], 1)
    found = evaluate(known(32, lambda x: x), ArraySource(wide), model=model, **QUICK)
    assert "kl" not in found.metrics  # no site in the provenance: nothing to splice

    pretender = SimpleNamespace(d_in=32, d_out=32, provenance={"site": "layers.1"}, batches=ArraySource(wide).batches)
    with pytest.raises(UnweaveError, match="made from plain vectors"):
        evaluate(known(32, lambda x: x), pretender, model=model, **QUICK)


def test_broken_weights_and_rows(rows, known):
    with pytest.raises(UnweaveError, match="weights are broken"):
        evaluate(known(16, lambda x: x * torch.nan), ArraySource(rows), **QUICK)
    with pytest.raises(UnweaveError, match="expected n_rows >= 1"):
        evaluate(known(16, lambda x: x), ArraySource(rows), n_rows=0)
    with pytest.raises(UnweaveError, match="no baseline 'tea'"):
        evaluate(known(16, lambda x: x), ArraySource(rows), baselines=["tea"])
    with pytest.raises(UnweaveError, match=r"fit on of shape \(n, 16\)"):
        evaluate(known(16, lambda x: x), ArraySource(rows), fit=torch.zeros(5, 3), **QUICK)

    empty = SimpleNamespace(d_in=16, d_out=16, batches=lambda: iter([]))
    with pytest.raises(UnweaveError, match="no rows"):
        evaluate(known(16, lambda x: x), empty, **QUICK)


# ---- the result -----------------------------------------------------------------------------------------------------


def test_file_round_trip(rows, known, tmp_path):
    found = evaluate(known(16, lambda x: x / 2), ArraySource(rows), **QUICK)
    found.save(tmp_path / "evaluation.json")
    assert Evaluation.load(tmp_path / "evaluation.json") == found
    plain = json.loads((tmp_path / "evaluation.json").read_text())
    assert plain["format"] == "unweave.evaluation/1"
    assert set(plain) == {"format", "data", "metrics", "baselines"}
    assert set(plain["metrics"]["fvu"]) == {"value", "low", "high", "version"}
    (tmp_path / "other.json").write_text('{"format": "x"}')
    with pytest.raises(UnweaveError, match=r"not of format 'unweave\.evaluation/1', found 'x'"):
        Evaluation.load(tmp_path / "other.json")
    (tmp_path / "other.json").write_text('{"format": "unweave.evaluation/1", "metrics": {"fvu": 3}}')
    with pytest.raises(UnweaveError, match="damaged"):
        Evaluation.load(tmp_path / "other.json")


def test_shown_to_people(rows, known):
    found = evaluate(known(16, lambda x: x / 2), ArraySource(rows, name="rows"), **QUICK)
    text = repr(found)
    for word in ("fvu", "95 % interval", "pca", "random", "neurons", "600 rows of 600 documents", "16 numbers a row"):
        assert word in text, word
    assert "<table>" in found._repr_html_()
    assert "&lt;" in Evaluation({}, {"<b>": {}})._repr_html_()
    with pytest.raises(UnweaveError, match="holds no 'kl'"):
        found["kl"]


def test_an_older_definition_is_named(rows, known):
    found = evaluate(known(16, lambda x: x / 2), ArraySource(rows), **QUICK)
    assert found.outdated() == []
    values = found.to_dict()
    values["metrics"]["fvu"]["version"] = 0
    old = Evaluation.from_dict(values)
    assert old.outdated() == ["fvu"]
    assert "older definition: fvu" in old.caption()


def test_cut_keeps_contexts_whole(model, text_source):
    batch = next(text_source(model).batches())
    head, tail = cut(batch, 50)
    assert 0 < head.n_rows <= 50
    assert torch.equal(torch.cat([head.input, tail.input]), batch.input)
    for name in ("document", "position", "token"):
        joined = torch.cat([getattr(head.meta, name), getattr(tail.meta, name)])
        assert torch.equal(joined, getattr(batch.meta, name)), name
    assert len(head.items) + len(tail.items) == len(batch.items)
    assert head.target is head.input
    nothing, all_of_it = cut(batch, 0)
    assert nothing.n_rows == 0
    assert metrics.fvu(all_of_it.input, batch.input) == 0
