"""Rows of several parts put back into the model: at several sites at once, and into each of two models."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from unweave.activations import harvest
from unweave.codes import SparseCode
from unweave.dictionaries import Dictionary, DictionaryConfig, build
from unweave.errors import UnweaveError
from unweave.evaluation import evaluate
from unweave.metrics import fvu
from unweave.sources import Contexts, JoinedSource, LanguageModel, TextSource

OPTIONS = {"context_size": 32, "batch_tokens": 256, "split": "all"}
SHORT = {"n_rows": 400, "n_loss_tokens": 150, "n_bootstrap": 10, "progress": False}


class Scaled(Dictionary):
    """Every coordinate is a feature; the output is the input times a factor for each coordinate."""

    name = "scaled"
    Config = DictionaryConfig

    def __init__(self, factors: Tensor) -> None:
        super().__init__(DictionaryConfig(d_in=len(factors), d_out=len(factors), n_features=len(factors)))
        self.factors = nn.Parameter(factors)

    def encode(self, x: Tensor) -> SparseCode:
        x = self.check_input(x)
        return SparseCode.from_fixed_k(torch.arange(x.shape[1]).expand(len(x), -1), x, x.shape[1])

    def decode(self, code: SparseCode) -> Tensor:
        return code.dense() * self.factors


def parts(*factors: float) -> Scaled:
    return Scaled(torch.tensor(factors).float().repeat_interleave(32))


@pytest.fixture(scope="module")
def model(tiny_model) -> LanguageModel:
    return LanguageModel.load(str(tiny_model), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def tuned(tuned_model, model) -> LanguageModel:
    return LanguageModel.load(str(tuned_model), dtype="float32", device="cpu").reading_as(model)


@pytest.fixture(scope="module")
def several(model, documents) -> TextSource:
    return TextSource(model, documents[:40], "layers.1.mlp+layers.2.mlp+layers.0", **OPTIONS)


@pytest.fixture(scope="module")
def pair(model, tuned, documents) -> JoinedSource:
    return JoinedSource([TextSource(one, documents[:40], "layers.1", **OPTIONS) for one in (model, tuned)])


def values(evaluation, *names: str) -> dict[str, float]:
    return {name: evaluation[name] for name in names or evaluation.metrics}


def test_the_identity_loses_nothing_at_several_sites(several) -> None:
    found = values(evaluate(parts(1, 1, 1), several, baselines=False, **SHORT))
    assert found["ce_loss_recovered"] == pytest.approx(1, abs=1e-5)
    assert found["kl"] == pytest.approx(0, abs=1e-7)
    nothing = values(evaluate(parts(0, 0, 0), several, baselines=False, **SHORT))
    assert nothing["ce_loss_recovered"] == pytest.approx(0, abs=1e-5)
    assert nothing["ce_spliced"] == pytest.approx(nothing["ce_zero"])


def test_what_is_put_back_is_made_of_the_untouched_rows(model, several) -> None:
    """Against hooks by hand: each site gets its own columns, whatever was put back before it."""
    dictionary = parts(3.0, -2.0, 0.5)
    total, kl, n = 0.0, 0.0, 0
    fit = torch.cat([b.target for b in several.batches()])
    found = evaluate(
        dictionary, several, fit=fit, baselines=False, **{**SHORT, "n_rows": 10**6, "n_loss_tokens": 10**6}
    )
    for batch in several.batches():
        contexts = Contexts.of(batch, model.special_ids)
        inputs = {"input_ids": contexts.tokens, "attention_mask": contexts.real.long(), "use_cache": False}
        clean = model.run_to(several.site.parts, contexts.tokens, contexts.real.long())
        with ExitStack() as stack:
            for site, factor in zip(several.site.parts, (3.0, -2.0, 0.5)):

                def put(here, new=clean[site.name] * factor, spliced=contexts.spliced):
                    return torch.where(spliced[..., None], new, here)

                stack.enter_context(site.hook(put))
            changed = model.model(**inputs).logits[contexts.predicts].log_softmax(1)
        untouched = model.model(**inputs).logits[contexts.predicts].log_softmax(1)
        total -= float(changed.gather(1, contexts.targets[:, None]).sum())
        kl += float((untouched.exp() * (untouched - changed)).sum())
        n += contexts.n_targets
    assert found["ce_spliced"] == pytest.approx(total / n, rel=1e-4)
    assert found["kl"] == pytest.approx(kl / n, rel=1e-3)


def test_each_part_has_an_fvu(several) -> None:
    rows = torch.cat([batch.input for batch in several.batches()])
    found = evaluate(parts(0.5, 1, 0), several, fit=rows, n_loss_tokens=0, progress=False, n_bootstrap=10)
    each = rows.split(32, dim=1)
    assert found["fvu:layers.1.mlp"] == pytest.approx(float(fvu(each[0], 0.5 * each[0])), rel=1e-4)
    assert found["fvu:layers.2.mlp"] == pytest.approx(0, abs=1e-9)
    assert found["fvu:layers.0"] >= 1
    assert "fvu:layers.0" in found.baselines["pca"]
    assert "fvu:layers.0 ↓" in repr(found)


def test_the_target_may_be_one_of_the_two_that_is_several(model, documents) -> None:
    text = TextSource(
        model, documents[:40], "layers.1.mlp:input+layers.2.mlp:input", target_site="layers.1.mlp", **OPTIONS
    )
    torch.manual_seed(0)
    dictionary = build("topk", 64, 48, 32, k=4, subtract_bias=False)
    found = evaluate(dictionary, text, baselines=False, **SHORT)
    assert "ce_loss_recovered" in found.metrics
    assert not any(name.startswith("fvu:") for name in found.metrics)


def test_each_of_two_models_has_its_own_numbers(pair, model, tuned, documents) -> None:
    found = evaluate(parts(1, 0), pair, baselines=["pca"], **SHORT)
    measured = values(found)
    assert measured["fvu:a"] == pytest.approx(0, abs=1e-9)
    assert measured["ce_loss_recovered:a"] == pytest.approx(1, abs=1e-5)
    assert measured["kl:a"] == pytest.approx(0, abs=1e-7)
    assert measured["ce_loss_recovered:b"] == pytest.approx(0, abs=1e-5)
    assert measured["kl:b"] > 0
    assert "ce_loss_recovered" not in measured
    assert {"fvu:b", "kl:a", "kl:b"} <= found.baselines["pca"].keys()
    names = {label: Path(one.name).name for label, one in (("a", model), ("b", tuned))}
    assert found.data["parts"] == {label: f"{name}, layers.1" for label, name in names.items()}
    assert f"b: {names['b']}" in found.caption()
    # The clean losses are those of each model measured by itself on the same rows.
    fit = torch.cat([batch.target for batch in pair.batches()])
    both = evaluate(parts(1, 1), pair, fit=fit, baselines=False, **SHORT)
    for label, one in zip("ab", pair.joined):
        alone = evaluate(parts(1), one, fit=fit[:, :32], baselines=False, **SHORT)
        assert both[f"ce_clean:{label}"] == pytest.approx(alone["ce_clean"], rel=1e-5)
        assert both[f"ce_zero:{label}"] == pytest.approx(alone["ce_zero"], rel=1e-4)


def test_rows_from_stores_do_not_bring_their_models(pair, model, tmp_path) -> None:
    stores = [harvest(one, tmp_path / name, n_rows=600) for one, name in zip(pair.joined, "ab")]
    found = evaluate(parts(1, 1), JoinedSource(stores), model=model, baselines=False, **SHORT)
    assert "give a JoinedSource of their TextSources" in found.data["loss_left_out"]
    assert {"fvu:a", "fvu:b"} <= found.metrics.keys()
    assert not any(name.startswith(("ce_", "kl")) for name in found.metrics)


def test_two_sites_of_one_model_from_stores(model, documents, tmp_path) -> None:
    sources = [TextSource(model, documents[:40], site, **OPTIONS) for site in ("layers.1", "layers.2")]
    stores = [harvest(one, tmp_path / name, n_rows=600) for one, name in zip(sources, "ab")]
    found = evaluate(parts(1, 1), JoinedSource(stores), model=model, baselines=False, **SHORT)
    assert found["ce_loss_recovered"] == pytest.approx(1, abs=1e-4)
    assert "fvu:layers.2" in found.metrics


def test_another_second_model_is_refused(pair, model, documents) -> None:
    trained_on = pair.provenance
    other = JoinedSource([TextSource(model, documents[:40], "layers.1", **OPTIONS)] * 2)
    with pytest.raises(UnweaveError, match=r"trained on model .*tiny-tuned.* but evaluated on model .*tiny-llama"):
        evaluate(parts(1, 1), other, trained_on=trained_on, baselines=False, **SHORT)


def test_what_a_dictionary_says_of_its_inference_is_told(model, documents) -> None:
    text = TextSource(model, documents[:40], "layers.1", **OPTIONS)
    found = evaluate(build("g_sae", 32, 48, k=4), text, baselines=False, **{**SHORT, "n_loss_tokens": 0})
    assert "selected by size alone" in found.data["note"]
    assert "selected by size alone" in found.caption()
