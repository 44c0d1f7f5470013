"""End-to-end training: the gradient is the model's, only the dictionary moves, and what it buys."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from unweave.codes import SparseCode
from unweave.dictionaries import Dictionary, DictionaryConfig, TrainingBatch, build
from unweave.errors import UnweaveError
from unweave.evaluation import evaluate, measure_loss
from unweave.interventions import reconstruct, splice
from unweave.metrics import Groups
from unweave.sources import Contexts, LanguageModel, TextSource
from unweave.training import EndToEndConfig, train_end_to_end
from unweave.training._end_to_end import ContextStream, EndToEndTrainer, _rows

SITE = "layers.1"


@pytest.fixture(scope="module")
def model(tiny_model) -> LanguageModel:
    return LanguageModel.load(str(tiny_model), dtype="float32", device="cpu")


def text(model: LanguageModel, documents: list[str], **options: Any) -> TextSource:
    options = {"context_size": 32, "batch_tokens": 256, "split": "all", **options}
    return TextSource(model, documents[:40], options.pop("site", SITE), **options)


def config(**options: Any) -> EndToEndConfig:
    return EndToEndConfig(**{"n_rows": 20 * 100, "batch_size": 100, "lr": 1e-3, "log_every": 5, **options})


def dictionary_of(arch: str = "topk", seed: int = 0, **options: Any) -> Dictionary:
    torch.manual_seed(seed)
    return build(arch, 32, 48, **{**({} if arch == "relu" else build_sparsity(arch)), **options})


def build_sparsity(arch: str) -> dict[str, Any]:
    return {"target_l0": 6.0, "bandwidth": 0.05} if arch == "jumprelu" else {"k": 6}


class Identity(Dictionary):
    """Every coordinate is a feature."""

    name = "identity"
    Config = DictionaryConfig

    def __init__(self) -> None:
        super().__init__(DictionaryConfig(d_in=32, d_out=32, n_features=32))
        self.W = nn.Parameter(torch.eye(32))

    def encode(self, x: Tensor) -> SparseCode:
        return SparseCode.from_fixed_k(torch.arange(32).expand(len(x), -1), self.check_input(x), 32)

    def decode(self, code: SparseCode) -> Tensor:
        return code.dense() @ self.W


def started(dictionary: Dictionary, model: LanguageModel, source: TextSource, **options: Any) -> EndToEndTrainer:
    trainer = EndToEndTrainer(dictionary, ContextStream(source, 100), model, config(**options))
    trainer.start()
    return trainer


def test_the_identity_loses_nothing(model, documents) -> None:
    source = text(model, documents)
    trainer = started(Identity(), model, source, normalise_input=False)
    batch = trainer.ring.next()
    values, _ = trainer._through_the_model(batch, batch.input, batch.target)
    assert abs(values["kl"]) < 1e-7
    assert values["mse"] == 0
    edits = {"identity": (reconstruct(Identity()), SITE)}
    sums = measure_loss(model, [batch], SITE, edits, torch.zeros(32), n_tokens=10**6, groups=Groups(64))
    found = sums.of("identity").values()
    assert found["ce_loss_recovered"] == pytest.approx(1, abs=1e-6)
    assert found["kl"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("arch", ["topk", "batch_topk", "relu", "jumprelu"])
@pytest.mark.parametrize("downstream", [0.0, 2.5])
def test_the_gradient_is_that_of_the_spliced_model(model, documents, arch: str, downstream: float) -> None:
    """Parameters' gradients from the stand-in target, against autograd through encode, decode, splice and model."""
    source = text(model, documents)
    dictionary = dictionary_of(arch)
    trainer = started(dictionary, model, source, downstream_coefficient=downstream, local_coefficient=0.3)
    batch = trainer.ring.next()
    x, target = trainer._prepared(_rows(batch))[:2]
    with torch.no_grad():
        made = dictionary(x)
    values, grad = trainer._through_the_model(batch, made, target)
    aim = made - len(x) / 2 * grad
    loss = dictionary.loss(TrainingBatch(x, aim, None, 0.5))
    parameters = dict(dictionary.named_parameters())
    names = [n for n in parameters if n != "log_threshold"]  # its estimator exists in the loss alone
    ours = torch.autograd.grad(loss.total, [parameters[n] for n in names])

    contexts = Contexts.of(batch, model.special_ids)
    inputs = {"input_ids": contexts.tokens, "attention_mask": contexts.real.long()}
    y = dictionary(x)
    states: list[dict[str, Tensor]] = [{}, {}]
    logits = []
    for number, into in enumerate(states):
        with ExitStack() as stack:
            for name in ("layers.2", "layers.3"):
                keep = model.site(name).hook(lambda rows, name=name, into=into: into.update({name: rows}))
                stack.enter_context(keep)
            if number:
                stack.enter_context(splice(model, SITE, lambda _: y / trainer.scale, contexts.spliced))
            logits.append(model.model(**inputs).logits[contexts.predicts].log_softmax(1))
    direct = (logits[0].exp() * (logits[0] - logits[1])).sum(1).mean()
    assert values["kl"] == pytest.approx(float(direct.detach()), rel=1e-4)
    direct = direct + 0.3 * (target - y).square().sum(1).mean()
    if downstream:
        apart = []
        for name in ("layers.2", "layers.3"):
            a, b = (state[name][contexts.spliced] for state in states)
            apart.append((a - b).square().sum(1).mean() / a.square().sum(1).mean())
        assert values["downstream"] == pytest.approx(float(sum(apart).detach()) / 2, rel=1e-4)
        direct = direct + downstream * sum(apart) / 2
    own = dictionary.loss(TrainingBatch(x, y.detach(), None, 0.5)).total  # penalties alone: there is no error
    theirs = torch.autograd.grad(direct + own, [parameters[n] for n in names])
    for name, a, b in zip(names, ours, theirs):
        assert float((a - b).norm()) < 2e-3 * float(b.norm()), name


def test_a_local_error_alone_is_local_training(model, documents) -> None:
    dictionary = dictionary_of()
    trainer = started(dictionary, model, text(model, documents), kl_coefficient=0.0, local_coefficient=1.0)
    batch = trainer.ring.next()
    x, target = trainer._prepared(_rows(batch))[:2]
    with torch.no_grad():
        made = dictionary(x)
    _, grad = trainer._through_the_model(batch, made, target)
    torch.testing.assert_close(made - len(x) / 2 * grad, target, rtol=1e-4, atol=1e-5)


def test_only_the_dictionary_moves(model, documents) -> None:
    before = {name: p.clone() for name, p in model.model.named_parameters()}
    dictionary = dictionary_of()
    at_first = {name: p.clone() for name, p in dictionary.named_parameters()}
    trained = train_end_to_end(dictionary, model, text(model, documents), config())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.model.named_parameters())
    assert not any(p.requires_grad for p in model.model.parameters())
    assert all(not torch.equal(p, at_first[name]) for name, p in dictionary.named_parameters())
    assert trained.metrics[-1]["kl"] < trained.metrics[0]["kl"]
    assert {"loss", "kl", "mse", "fvu", "l0", "auxk", "dead_share"} <= trained.metrics[-1].keys()
    assert not trained.dictionary.training


def test_what_gives_no_row_is_left_alone(model, documents) -> None:
    """BOS, padding and rows of high norm keep their activations; all others become the dictionary's."""
    source = text(model, documents, max_norm_ratio=1.2)
    trainer = started(dictionary_of(), model, source)
    batch = trainer.ring.next()
    contexts = Contexts.of(batch, model.special_ids)
    assert source.dropped["high_norm"] > 0
    assert int(contexts.spliced.sum()) == batch.n_rows < int((contexts.real & (contexts.tokens != 0)).sum())
    assert not bool(contexts.real.all())
    assert not bool(contexts.spliced[:, 0].any())
    clean = model.run_to(SITE, contexts.tokens, contexts.real.long())[SITE]
    torch.testing.assert_close(clean[contexts.spliced], batch.input, rtol=1e-4, atol=1e-4)
    seen: list[Tensor] = []
    made = torch.full((batch.n_rows, 32), 7.0)
    real_logits = trainer._logits

    def logits(contexts: Contexts) -> Tensor:
        with model.site("layers.2:input").hook(lambda rows: seen.append(rows.detach().clone())):
            return real_logits(contexts)

    trainer._logits = logits
    trainer._through_the_model(batch, made, batch.target)
    first, second = seen
    torch.testing.assert_close(second[contexts.spliced], torch.full_like(made, 7.0) / trainer.scale)
    assert torch.equal(second[~contexts.spliced], first[~contexts.spliced])


def test_steps_take_whole_contexts_and_every_context_once_an_epoch(model, documents) -> None:
    source = text(model, documents)
    stream, seen = ContextStream(source, 70), []
    while True:
        batch = stream.next()
        if stream.epoch:
            break
        assert batch.n_rows >= 70
        seen.append(batch)
    everything = list(source.batches())
    rows = torch.cat([b.input for b in everything])
    ours = torch.cat([b.input for b in [*seen, batch]])
    assert torch.equal(ours[: len(rows)], rows)
    assert torch.equal(torch.cat([b.items.tokens for b in seen]), torch.cat(
        [b.items.tokens for b in everything])[: sum(b.items.n_tokens for b in seen)])  # fmt: skip
    tokens = torch.cat([b.meta.token for b in seen])
    assert torch.equal(tokens, torch.cat([b.meta.token for b in everything])[: len(tokens)])


def test_few_contexts_at_a_time_give_the_same_gradient(model, documents, monkeypatch) -> None:
    dictionary = dictionary_of()
    trainer = started(dictionary, model, text(model, documents), local_coefficient=0.5)
    batch = trainer.ring.next()
    x, target = trainer._prepared(_rows(batch))[:2]
    with torch.no_grad():
        made = dictionary(x)
    whole, grad = trainer._through_the_model(batch, made, target)
    monkeypatch.setattr("unweave.training._end_to_end._LOGIT_BYTES", 4 * 400 * 32)
    parts, same = trainer._through_the_model(batch, made, target)
    assert whole == pytest.approx(parts, rel=1e-4)
    torch.testing.assert_close(same, grad, rtol=1e-3, atol=1e-7)


def test_a_context_without_a_row_changes_nothing(model, documents, monkeypatch) -> None:
    """All of its tokens may be special or of high norm; by itself it has nothing to compare at later sites."""
    monkeypatch.setattr("unweave.training._end_to_end._LOGIT_BYTES", 1)  # each context by itself
    trainer = started(dictionary_of(), model, text(model, documents), downstream_coefficient=1.0)
    whole = trainer.ring.next()
    batch = whole.select(whole.items.item_of_token[whole.row_token] != 1)
    assert batch.n_rows < whole.n_rows
    x, target = trainer._prepared(_rows(batch))[:2]
    values, grad = trainer._through_the_model(batch, x, target)
    assert bool(torch.isfinite(grad).all())
    assert grad.shape == x.shape
    assert values["downstream"] == pytest.approx(0, abs=1e-9)


class Stop(Exception):
    pass


@pytest.mark.parametrize("arch", ["batch_topk", "jumprelu"])
def test_a_killed_run_ends_with_the_same_bits(model, documents, tmp_path, arch: str) -> None:
    options: dict[str, Any] = {"checkpoint_every": 4, "downstream_coefficient": 1.0}
    source = text(model, documents)
    whole = train_end_to_end(dictionary_of(arch), model, source, config(**options), tmp_path / "whole")
    killed, steps = dictionary_of(arch), iter(range(1, 100))
    observe = killed.observe
    killed.observe = lambda loss, progress: (observe(loss, progress), stop_at(next(steps), 11))
    with pytest.raises(Stop):
        train_end_to_end(killed, model, source, config(**options), tmp_path / "killed")
    again = train_end_to_end(dictionary_of(arch), model, source, config(**options), tmp_path / "killed")
    ours, theirs = again.dictionary.state_dict(), whole.dictionary.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    drop = {"rows_per_s"}
    logs = [[{k: v for k, v in line.items() if k not in drop} for line in run.metrics] for run in (again, whole)]
    assert logs[0] == logs[1]
    finished = train_end_to_end(dictionary_of(arch, seed=5), model, source, config(**options), tmp_path / "killed")
    assert torch.equal(finished.dictionary.state_dict()["W_dec"], theirs["W_dec"])
    with pytest.raises(UnweaveError, match=r"kl_coefficient: there 1\.0, now 0\.5"):
        train_end_to_end(dictionary_of(arch), model, source, config(kl_coefficient=0.5, **options), tmp_path / "killed")


def stop_at(step: int, last: int) -> None:
    if step == last:
        raise Stop


def test_a_transcoder_reads_one_site_and_writes_another(model, documents) -> None:
    source = text(model, documents, site="layers.1.mlp:input", target_site="layers.1.mlp")
    torch.manual_seed(0)
    dictionary = build("skip_transcoder", 32, 48, k=6, objective="mse")
    trained = train_end_to_end(dictionary, model, source, config(local_coefficient=0.1))
    assert trained.metrics[-1]["kl"] < trained.metrics[0]["kl"]
    assert trained.target_scale is not None


def test_what_cannot_be_is_refused(model, documents, tiny_model) -> None:
    source = text(model, documents)
    other = LanguageModel.load(str(tiny_model), dtype="float32", device="cpu")
    with pytest.raises(UnweaveError, match="the source reads"):
        train_end_to_end(dictionary_of(), other, source, config())
    with pytest.raises(UnweaveError, match=r"no block comes behind 'layers\.3'"):
        late = text(model, documents, site="layers.3")
        train_end_to_end(dictionary_of(), model, late, config(downstream_coefficient=1.0))
    dictionary = dictionary_of()
    type(dictionary).learns_by_gradient, before = False, True
    try:
        with pytest.raises(UnweaveError, match="learns without gradients"):
            train_end_to_end(dictionary, model, source, config())
    finally:
        type(dictionary).learns_by_gradient = before
    with pytest.raises(UnweaveError, match=r"g_sae chooses or learns by side inputs \(gradient\)"):
        train_end_to_end(dictionary_of("g_sae"), model, text(model, documents, side="gradient"), config())
    with pytest.raises(UnweaveError, match="kl_coefficient"):
        config(kl_coefficient=-1.0)


@pytest.fixture(scope="module")
def trained_model(tiny_model, documents) -> LanguageModel:
    """The tiny model after a minute of training on the documents, so that there is something to lose."""
    model = LanguageModel.load(str(tiny_model), dtype="float32", device="cpu")
    ids = [model.tokenize(document) for document in documents]
    stream = torch.tensor([token for document in ids for token in [0, *document]])
    model.model.train().requires_grad_(True)
    optimiser = torch.optim.Adam(model.model.parameters(), lr=3e-3)
    g = torch.Generator().manual_seed(0)
    for _ in range(400):
        at = torch.randint(len(stream) - 33, (16, 1), generator=g) + torch.arange(33)
        tokens = stream[at]
        loss = model.model(input_ids=tokens, labels=tokens).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return LanguageModel(model.model, model.tokenizer, name="trained")


# Seeds 0-2, end to end and local at L0 2.0: CE recovered 0.998 to 0.999 and 0.87 to 0.98; KL 0.004 to 0.005 and 0.12 to
# 0.72; FVU 0.32 to 0.34 and 0.03 to 0.05.
@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_end_to_end_predicts_better_and_reconstructs_worse_at_equal_l0(trained_model, documents, seed: int) -> None:
    source = TextSource(trained_model, documents, SITE, context_size=32, batch_tokens=512, split="train")
    held_out = TextSource(trained_model, documents, SITE, context_size=32, batch_tokens=512, split="held_out")
    found = {}
    for name, kl in (("end to end", 1.0), ("local", 0.0)):
        torch.manual_seed(seed)
        settings = config(
            n_rows=150 * 256, batch_size=256, lr=3e-3, kl_coefficient=kl, local_coefficient=1.0 - kl, seed=seed
        )
        trained = train_end_to_end(build("topk", 32, 64, k=2), trained_model, source, settings)
        found[name] = evaluate(
            trained.dictionary, held_out, n_rows=2000, n_loss_tokens=2000, baselines=False, progress=False
        )
    scores = {n: {k: e.metrics[k].value for k in ("ce_loss_recovered", "kl", "fvu", "l0")} for n, e in found.items()}
    ours, local = scores["end to end"], scores["local"]
    assert ours["l0"] == pytest.approx(local["l0"], abs=0.05)
    assert ours["ce_loss_recovered"] > local["ce_loss_recovered"]
    assert ours["kl"] < local["kl"] / 4
    assert ours["fvu"] > 3 * local["fvu"]
