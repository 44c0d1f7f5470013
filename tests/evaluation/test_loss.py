"""Loss and KL: against a plain computation, on anchors, and the same whichever way the model is run."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
import torch.nn.functional as F

from unweave.evaluation import _forward, measure_loss
from unweave.evaluation import loss as loss_module
from unweave.evaluation._forward import ReplayForward, WholeForward
from unweave.evaluation.loss import LossSums
from unweave.metrics import Groups
from unweave.sources import Contexts
from unweave.sources.sites import find_blocks, find_site

SITES = ["layers.1", "layers.1:input", "layers.2.mlp", "layers.2.attn", "layers.0.attn.heads", "layers.3"]


def first_batches(source, n=1):
    return list(islice(source.batches(), n))


def scramble(rows):
    return rows.flip(1) * 20.0


def by_hand(model, batches, site, edit):
    """Loss and KL of each predicted token, one context at a time, in float64, by a plain hook."""
    losses, cleans, kls = [], [], []
    for batch in batches:
        for i in range(len(batch.items)):
            a, b = int(batch.items.offsets[i]), int(batch.items.offsets[i + 1])
            tokens = batch.items.tokens[a:b].long()[None]
            rows = batch.row_token[(batch.row_token >= a) & (batch.row_token < b)] - a

            def change(x, rows=rows):
                x = x.clone()
                x[0, rows] = edit(x[0, rows])
                return x

            clean = model.model(tokens).logits[0, :-1].double()
            with find_site(model.model, site).hook(change):
                changed = model.model(tokens).logits[0, :-1].double()
            counted = torch.tensor([int(t) not in model.special_ids for t in tokens[0, 1:]])
            target = tokens[0, 1:][counted]
            clean, changed = clean[counted], changed[counted]
            cleans.append(F.cross_entropy(clean, target, reduction="none"))
            losses.append(F.cross_entropy(changed, target, reduction="none"))
            kls.append(F.kl_div(changed.log_softmax(1), clean.log_softmax(1), log_target=True, reduction="none").sum(1))
    return [torch.cat(part).mean().item() for part in (losses, cleans, kls)] + [sum(len(k) for k in kls)]


@pytest.mark.parametrize("site", SITES)
def test_equals_a_plain_computation(model, text_source, site):
    batches = first_batches(text_source(model, site), 2)
    mean = torch.zeros(batches[0].target.shape[1])
    sums = measure_loss(model, batches, site, {"scrambled": (scramble, site)}, mean, n_tokens=10**9, groups=Groups(512))
    spliced, clean, kl, n = by_hand(model, batches, site, scramble)
    found = sums.of("scrambled").values()
    assert sums.n_targets == n
    assert found["ce_clean"] == pytest.approx(clean, abs=1e-5)
    assert found["ce_spliced"] == pytest.approx(spliced, abs=1e-5)
    assert found["kl"] == pytest.approx(kl, rel=1e-3)
    assert found["kl"] > 1e-3
    assert found["ce_mean"] == found["ce_zero"]  # the mean given is zero


def test_bfloat16_losses_are_worked_out_in_float32(any_model, text_source):
    batches = first_batches(text_source(any_model))
    sums = measure_loss(
        any_model,
        batches,
        "layers.1",
        {"same": (lambda r: r, "layers.1")},
        torch.zeros(32),
        n_tokens=1,
        groups=Groups(9),
    )
    contexts = Contexts.of(batches[0], any_model.special_ids)
    logits = any_model.model(contexts.tokens, attention_mask=contexts.real.long()).logits[contexts.predicts]
    expected = F.cross_entropy(logits.float(), contexts.targets).item()
    found = sums.of("same").values()
    assert found["ce_clean"] == pytest.approx(expected, abs=1e-6)
    assert found["kl"] == 0.0
    assert found["ce_spliced"] == found["ce_clean"]
    assert found["ce_loss_recovered"] == 1.0


def test_what_counts_as_a_prediction(model, text_source):
    batch = first_batches(text_source(model))[0]
    contexts = Contexts.of(batch, model.special_ids)
    lengths = batch.items.offsets.diff()
    assert contexts.tokens.shape == (len(lengths), int(lengths.max()))
    assert int(contexts.real.sum()) == batch.items.n_tokens
    assert int(contexts.spliced.sum()) == batch.n_rows
    assert not contexts.spliced[:, 0].any()  # BOS gave no row
    assert contexts.predicts[:, 0].all()  # but it predicts the first token
    assert contexts.n_targets == batch.items.n_tokens - len(lengths)  # all tokens but one BOS a context
    assert contexts.targets.tolist() == batch.items.tokens[batch.items.tokens != model.bos_id].tolist()
    assert len(contexts.target_document) == contexts.n_targets


def test_no_more_batches_than_asked_for(model, text_source):
    seen = []
    sums = measure_loss(
        model, text_source(model).batches(), "layers.1", {}, torch.zeros(32), n_tokens=600, groups=Groups(8),
        advance=seen.append,
    )  # fmt: skip
    assert sum(seen) == sums.n_targets >= 600
    assert sum(seen[:-1]) < 600


def test_logits_in_small_pieces_give_the_same(model, text_source, monkeypatch):
    batches = first_batches(text_source(model))

    def values():
        edits = {"scrambled": (scramble, "layers.1")}
        return measure_loss(
            model, batches, "layers.1", edits, torch.ones(32), n_tokens=1, groups=Groups(512)
        ).of("scrambled").values()  # fmt: skip

    whole = values()
    monkeypatch.setattr(loss_module, "LOGIT_BYTES", 4 * 400 * 7)
    assert values() == pytest.approx(whole, abs=1e-6)


# ---- running the model from the site on -----------------------------------------------------------------------------


def random_model(kind: str):
    import transformers as t

    torch.manual_seed(0)
    small = {"vocab_size": 97, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
    gemma = {"num_key_value_heads": 1, "head_dim": 8, "intermediate_size": 32, "sliding_window": 4}
    made = {
        "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(vocab_size=97, n_embd=16, n_layer=3, n_head=2)),
        "neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**small, intermediate_size=32)),
        "gemma2": lambda: t.Gemma2ForCausalLM(
            t.Gemma2Config(**small, **gemma, final_logit_softcapping=0.05, query_pre_attn_scalar=8)
        ),
        "opt": lambda: t.OPTForCausalLM(
            t.OPTConfig(**small, ffn_dim=32, word_embed_proj_dim=8, max_position_embeddings=64)
        ),
        "cohere": lambda: t.CohereForCausalLM(t.CohereConfig(**small, intermediate_size=32, logit_scale=0.3)),
        "granite": lambda: t.GraniteForCausalLM(t.GraniteConfig(**small, intermediate_size=32, logits_scaling=3.0)),
    }
    return made[kind]().eval().requires_grad_(False)


def random_contexts() -> Contexts:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([[7], [12], [9]])
    real = torch.arange(12) < lengths
    tokens = torch.randint(3, 97, (3, 12), generator=generator) * real
    predicts = torch.zeros_like(real)
    predicts[:, :-1] = real[:, 1:]
    return Contexts(tokens, real, real & (torch.arange(12) > 0), predicts, torch.arange(3))


@pytest.mark.parametrize("kind", ["gpt2", "neox", "gemma2", "opt", "cohere", "granite"])
@pytest.mark.parametrize("name", ["layers.1", "layers.1:input", "layers.1.attn"])
def test_replay_gives_the_bits_of_the_whole_model(kind, name):
    net, contexts = random_model(kind), random_contexts()
    site = find_site(net, name)
    replay = ReplayForward.build(net, site, site, contexts)
    assert replay is not None, "this architecture should not need whole forwards"
    whole = WholeForward(net, site, 97)
    assert torch.allclose(replay.logits(replay.clean(contexts)), whole.clean(contexts), atol=1e-6)
    edit = (scramble, site)
    changed = replay.logits(replay.spliced(contexts, edit))
    assert torch.allclose(changed, whole.spliced(contexts, edit), atol=1e-6)
    assert not torch.equal(changed, replay.logits(replay.clean(contexts)))
    assert torch.equal(replay.spliced(contexts, (lambda rows: rows, site)), replay.clean(contexts))
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()) == 0


def test_blocks_below_the_site_run_once(model, text_source):
    contexts = Contexts.of(first_batches(text_source(model))[0], model.special_ids)
    site = model.site("layers.2")
    forward = ReplayForward.build(model.model, site, site, contexts)
    assert forward is not None
    calls = [0] * 4
    handles = [
        block.register_forward_hook(lambda *_, n=n: calls.__setitem__(n, calls[n] + 1))
        for n, block in enumerate(find_blocks(model.model)[1])
    ]
    forward.clean(contexts)
    for _ in range(5):
        forward.spliced(contexts, (scramble, site))
    for handle in handles:
        handle.remove()
    assert calls == [1, 1, 6, 6]


def test_a_model_that_cannot_be_replayed_runs_whole(model, text_source, monkeypatch):
    """A head that does something unknown to its logits: the check against the model's own output sees it."""
    batches = first_batches(text_source(model))
    contexts = Contexts.of(batches[0], model.special_ids)
    site = model.site("layers.1")
    monkeypatch.setattr(model.model.config, "final_logit_softcapping", 1.0, raising=False)  # Llama does not do this
    assert ReplayForward.build(model.model, site, site, contexts) is None
    monkeypatch.undo()

    def values():
        edits = {"scrambled": (scramble, "layers.1")}
        sums = measure_loss(model, batches, "layers.1", edits, torch.ones(32), n_tokens=1, groups=Groups(512))
        return sums.of("scrambled").values()

    fast = values()
    monkeypatch.setattr(ReplayForward, "build", lambda *_: None)
    assert values() == pytest.approx(fast, abs=1e-6)
    monkeypatch.setattr(_forward, "LOGIT_BYTES", 1)  # one context at a time
    assert values() == pytest.approx(fast, abs=1e-5)


def test_a_site_outside_the_blocks(model, text_source):
    source = text_source(model, "model.embed_tokens")
    sums = measure_loss(
        model, first_batches(source), "model.embed_tokens", {"same": (lambda r: r, "model.embed_tokens")},
        torch.zeros(32), n_tokens=1, groups=Groups(8),
    )  # fmt: skip
    found = sums.of("same").values()
    assert found["ce_loss_recovered"] == 1.0
    assert found["kl"] == 0.0


def test_a_forbidden_token_adds_nothing():
    """A logit of -inf in both runs must not turn KL into nan."""

    class Fixed:
        def clean(self, contexts):
            return torch.tensor([[0.0, 1.0, -torch.inf], [0.0, 0.0, -torch.inf]])

        def spliced(self, contexts, edit):
            return torch.tensor([[1.0, 0.0, -torch.inf], [0.0, 0.0, -torch.inf]])

        def logits(self, states):
            return states

    tokens = torch.tensor([[0, 1, 0]])
    contexts = Contexts(tokens, tokens >= 0, tokens >= 0, torch.tensor([[True, True, False]]), torch.zeros(1).long())
    sums = LossSums(Groups(1))
    loss_module._measure(Fixed(), contexts, dict.fromkeys(("x", "zero", "mean"), (None, None)), sums)
    p = torch.tensor([0.0, 1.0]).softmax(0)
    expected = float((p * (torch.tensor([0.0, 1.0]) - torch.tensor([1.0, 0.0]))).sum()) / 2
    assert sums.of("x").values()["kl"] == pytest.approx(expected, abs=1e-6)
