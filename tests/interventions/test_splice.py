"""Splice and the row edits: exact where chosen, untouched elsewhere, gone afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from unweave.codes import SparseCode
from unweave.dictionaries import build
from unweave.errors import UnweaveError
from unweave.interventions import ablate_mean, ablate_zero, reconstruct, splice
from unweave.sources.sites import find_site

SITES = ["layers.1", "layers.1:input", "layers.2.mlp", "layers.2.attn", "layers.0.attn.heads", "model.norm"]


@pytest.fixture(scope="module")
def model(tiny_model):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(2, 300, (3, 9), generator=torch.Generator().manual_seed(0))


def n_hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def read(model: nn.Module, site: str, tokens: torch.Tensor) -> torch.Tensor:
    seen = []
    with find_site(model, site).hook(seen.append):
        model(tokens)
    return seen[0]


@pytest.mark.parametrize("site", SITES)
def test_identity_changes_no_bit(model, tokens, site):
    clean = model(tokens).logits
    with splice(model, site, lambda rows: rows):
        assert torch.equal(model(tokens).logits, clean)


@pytest.mark.parametrize("site", SITES)
def test_only_chosen_positions_change(model, tokens, site):
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[0, 4] = mask[2, 0] = mask[2, 8] = True
    before = read(model, site, tokens)
    with splice(model, site, lambda rows: torch.full_like(rows, 7.0), mask):
        after = read(model, site, tokens)
    assert torch.all(after[mask] == 7.0)
    assert torch.equal(after[~mask], before[~mask])


def test_rows_come_in_row_major_order(model, tokens):
    mask = torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) < 0.5
    before = read(model, "layers.1", tokens)
    seen = []
    with splice(model, "layers.1", lambda rows: (seen.append(rows.clone()), rows)[1], mask):
        model(tokens)
    assert torch.equal(seen[0], before[mask])


@pytest.mark.parametrize("site", SITES[:5])
def test_later_tokens_notice_and_earlier_ones_do_not(model, tokens, site):
    mask = torch.zeros(3, 9, dtype=torch.bool)
    mask[1, 5] = True
    clean = model(tokens).logits
    with splice(model, site, lambda rows: rows + 1.0, mask):
        changed = model(tokens).logits
    assert torch.equal(changed[0], clean[0])
    assert torch.equal(changed[1, :5], clean[1, :5])
    assert not torch.allclose(changed[1, 5:], clean[1, 5:], atol=1e-4)


@pytest.mark.parametrize("site", SITES[:5])
def test_padded_batch_equals_single_contexts(model, site):
    generator = torch.Generator().manual_seed(3)
    contexts = [torch.randint(2, 300, (n,), generator=generator) for n in (4, 11, 7)]
    padded = nn.utils.rnn.pad_sequence(contexts, batch_first=True)
    real = torch.arange(11) < torch.tensor([[4], [11], [7]])
    mask = real.clone()
    mask[:, 0] = False  # as if it were BOS
    mean = torch.linspace(-1, 1, 32)
    with splice(model, site, ablate_mean(mean), mask):
        together = model(padded, attention_mask=real.long()).logits
    for i, context in enumerate(contexts):
        with splice(model, site, ablate_mean(mean), mask[i : i + 1, : len(context)]):
            alone = model(context[None]).logits[0]
        assert torch.allclose(together[i, : len(context)], alone, atol=1e-5), site


def test_no_hook_stays(model, tokens):
    with splice(model, "layers.1", ablate_zero):
        assert n_hooks(model) == 1
    assert n_hooks(model) == 0
    with pytest.raises(RuntimeError, match="inside the block"), splice(model, "layers.1", ablate_zero):
        raise RuntimeError("inside the block")
    with pytest.raises(ZeroDivisionError), splice(model, "layers.1", lambda rows: rows / (1 // 0)):
        model(tokens)
    with pytest.raises(UnweaveError), splice(model, "layers.1", ablate_zero, read="layers.99"):
        pass
    assert n_hooks(model) == 0


def test_wrong_mask_result_or_site(model, tokens):
    def refused(match: str):
        return pytest.raises(UnweaveError, match=match)

    wrong_shape = r"layers\.1.*boolean mask of shape \(3, 9\).*\(3, 8\)"
    with splice(model, "layers.1", ablate_zero, torch.ones(3, 8, dtype=torch.bool)), refused(wrong_shape):
        model(tokens)
    with splice(model, "layers.1", ablate_zero, torch.ones(3, 9)), refused("boolean"):
        model(tokens)
    with splice(model, "layers.1", lambda rows: rows[:, :5]), refused(r"\(27, 32\), found \(27, 5\)"):
        model(tokens)
    with pytest.raises(UnweaveError, match="layers"), splice(model, "layer.1", ablate_zero):
        pass
    with splice(model, "layers.1", ablate_mean(torch.zeros(5))), pytest.raises(UnweaveError, match="mean of shape"):
        model(tokens)


def test_no_position_chosen_is_no_change(model, tokens):
    def never(rows: torch.Tensor) -> torch.Tensor:
        raise AssertionError("called without a row")

    with splice(model, "layers.1", never, torch.zeros(3, 9, dtype=torch.bool)):
        assert torch.equal(model(tokens).logits, model(tokens).logits)


def test_dtype_is_kept(model, tokens):
    half = type(model)(model.config).bfloat16().eval()
    with splice(half, "layers.1", lambda rows: rows.double()):
        assert half(tokens).logits.dtype == torch.bfloat16
        assert read(half, "layers.1", tokens).dtype == torch.bfloat16


def test_module_that_gives_a_tuple():
    class Pair(nn.Module):
        def forward(self, x):
            return x * 2, "kept"

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair = Pair()

        def forward(self, x):
            y, word = self.pair(x)
            return y + 1, word

    net = Net()
    with splice(net, "pair", ablate_zero, torch.tensor([True, False])):
        y, word = net(torch.ones(2, 3))
    assert word == "kept"
    assert y.tolist() == [[1.0] * 3, [3.0] * 3]


def test_read_elsewhere_write_here(model, tokens):
    """As a transcoder does: the edit of the MLP's output is given the MLP's input."""
    mask = torch.rand(3, 9, generator=torch.Generator().manual_seed(4)) < 0.5
    into = read(model, "layers.2.mlp:input", tokens)
    with splice(model, "layers.2.mlp", lambda rows: rows * 3, mask, read="layers.2.mlp:input"):
        out = read(model, "layers.2.mlp", tokens)
    assert torch.equal(out[mask], into[mask] * 3)
    with (
        splice(model, "layers.1", lambda rows: rows, read="layers.2"),
        pytest.raises(UnweaveError, match="did not run"),
    ):
        model(tokens)


def test_gradients_flow_through_the_edit(model, tokens):
    scale = torch.ones((), requires_grad=True)
    with splice(model, "layers.1", lambda rows: rows * scale):
        model(tokens).logits.square().sum().backward()
    assert scale.grad is not None
    assert float(scale.grad.abs()) > 0


# ---- edits ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def dictionary():
    torch.manual_seed(0)
    return build("topk", d_in=32, n_features=64, k=4).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_keeping_edit_that_changes_nothing_is_a_no_op(dictionary, dtype):
    rows = torch.randn(50, 32, generator=torch.Generator().manual_seed(5)).to(dtype)
    with torch.no_grad():
        kept = reconstruct(dictionary, edit=lambda code: code, keep_error=True)(rows)
        assert torch.equal(kept, rows)
        plain = reconstruct(dictionary)(rows)
    assert torch.allclose(plain, dictionary(rows), atol=1e-6)
    assert not torch.allclose(plain, rows.to(plain.dtype), atol=0.1)


def test_error_keeping_edit_shows_only_the_edit(dictionary):
    rows = torch.randn(50, 32, generator=torch.Generator().manual_seed(6))

    def double(code: SparseCode) -> SparseCode:
        return SparseCode.from_pattern(code.pattern, code.values * 2)

    with torch.no_grad():
        code = dictionary.encode(rows)
        added = dictionary.decode(code) - dictionary.b_dec
        kept = reconstruct(dictionary, edit=double, keep_error=True)(rows)
        dropped = reconstruct(dictionary, edit=double)(rows)
    assert torch.allclose(kept, rows + added, atol=1e-5)
    assert torch.allclose(dropped, 2 * added + dictionary.b_dec, atol=1e-5)


def test_edits_refuse_what_they_cannot_do(dictionary):
    transcoder = build("topk", d_in=32, d_out=16, n_features=64, k=4, subtract_bias=False)
    with pytest.raises(UnweaveError, match="error term needs d_out == d_in"):
        reconstruct(transcoder, keep_error=True)
    with pytest.raises(UnweaveError, match="width 32"):
        reconstruct(dictionary)(torch.zeros(3, 8))
