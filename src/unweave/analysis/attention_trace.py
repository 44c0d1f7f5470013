"""One forward pass, kept: for every layer what its attention read, from where, and what it wrote."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unweave.errors import UnweaveError
from unweave.sources.language_model import LanguageModel, norm_scale
from unweave.sources.sites import capture, find_blocks

# How far off, relatively, the parts may be from the whole. (Llama's norm works in float32 whatever the model's dtype.)
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class LayerTrace:
    """One layer of one sequence of ``t`` tokens. Rows are in float32 (float64 where the model is).

    Attributes:
        stream: ``(t, d)`` the residual stream before the block.
        pattern: ``(h, t, t)`` the attention of position q (row) to position s (column).
        heads: ``(t, h * d_head)`` the concatenated heads, before the output projection (the site ``attn.heads``).
        values: ``(t, h, d_head)`` the value vectors, one for each head (shared ones repeated).
        attention: ``(t, d)`` what the attention put out. mlp: ``(t, d)`` what the MLP did.
        W_V: ``(h, d_head, d)``, the value matrix of each head. b_V: ``(h, d_head)``.
        W_O: ``(h, d_head, d)``, what a head's output writes, row by row. b_O: ``(d,)``.
        norm_scale: ``(t, d)`` what the norm before the attention multiplied (centred) coordinates with, frozen at this
            pass. norm_centred: whether it subtracts the mean. norm_bias: ``(d,)``.
    """

    stream: Tensor
    pattern: Tensor
    heads: Tensor
    values: Tensor
    attention: Tensor
    mlp: Tensor
    W_V: Tensor
    b_V: Tensor
    W_O: Tensor
    b_O: Tensor
    norm_scale: Tensor
    norm_centred: bool
    norm_bias: Tensor

    @property
    def n_heads(self) -> int:
        return len(self.pattern)

    def frozen_norm(self, rows: Tensor, position: int | slice) -> Tensor:
        """The linear part of the norm on ``(..., d)`` parts of the stream, its scale frozen where they are."""
        centred = rows - rows.mean(-1, keepdim=True) if self.norm_centred else rows
        return centred * self.norm_scale[position]


@dataclass(frozen=True)
class AttentionTrace:
    """Everything attribution needs of one sequence; no further forward pass is run.

    Attributes:
        tokens: ``(t,)``. layers: from the first up to the last that was asked for.
    """

    tokens: Tensor
    layers: tuple[LayerTrace, ...]

    def __len__(self) -> int:
        return len(self.tokens)

    def __repr__(self) -> str:
        return f"AttentionTrace({len(self)} tokens, layers 0 to {len(self.layers) - 1})"

    def layer(self, n: int) -> LayerTrace:
        """The trace of a layer.

        Raises:
            UnweaveError: for one that was not run.
        """
        if not 0 <= n < len(self.layers):
            raise UnweaveError(f"no layer {n} in {self!r}")
        return self.layers[n]

    def components(self, n: int, at: slice = slice(None), *, by_head: bool = True) -> tuple[list[str], Tensor]:
        """What the residual stream before block ``n`` is the sum of at some positions: names, and ``(c, t, d)``.

        ``embedding`` (positions included), then of every earlier layer each head, the output projection's bias, where
        there is one, and the MLP.
        """
        names, parts = ["embedding"], [self.layers[0].stream[at]]
        for number, layer in enumerate(self.layers[:n]):
            name, attention = f"layers.{number}", layer.attention[at]
            if by_head:
                heads = layer.heads[at].unflatten(1, (layer.n_heads, -1))
                names += [f"{name}.attn.heads.{head}" for head in range(layer.n_heads)]
                parts += list(torch.einsum("thk,hkd->htd", heads, layer.W_O))
                if bool(layer.b_O.any()):
                    names.append(f"{name}.attn.bias")
                    parts.append(layer.b_O.expand_as(attention))
            else:
                names.append(f"{name}.attn")
                parts.append(attention)
            names.append(f"{name}.mlp")
            parts.append(layer.mlp[at])
        return names, torch.stack(parts)


def trace_attention(
    model: LanguageModel, tokens: Tensor | Sequence[int] | str, last_layer: int | None = None
) -> AttentionTrace:
    """Run one sequence through a model and keep what its attention did.

    The attention is computed in the way that gives its weights (``eager``) for the while. What is kept is checked: the
    patterns times the values must be the heads, the heads through the output projection what the attention put out, and
    the parts of the residual stream must add up to it. So a model that works otherwise is refused, not misread.

    Args:
        model: a decoder with softmax attention, such as the Llama and GPT-2 families, grouped-query attention and
            rotary positions included. tokens: ``(t,)`` ids, or a text (BOS is put before it if there is one).
        last_layer: the deepest to keep; None keeps all.

    Raises:
        UnweaveError: for no tokens, a layer the model does not have, or a model that works otherwise.
    """
    blocks = find_blocks(model.model)[1]
    last = len(blocks) - 1 if last_layer is None else last_layer
    if not 0 <= last < len(blocks):
        raise UnweaveError(f"no layer {last}: the model has layers 0 to {len(blocks) - 1}")
    if isinstance(tokens, str):
        tokens = [*([] if model.bos_id is None else [model.bos_id]), *model.tokenize(tokens)]
    ids = torch.as_tensor(tokens, dtype=torch.long).flatten()
    if len(ids) == 0:
        raise UnweaveError("trace_attention: expected at least one token, found none")
    kinds = (":input", ".attn:input", ".attn.heads", ".attn", ".mlp")
    sites = [model.site(f"layers.{n}{kind}") for n in range(last + 1) for kind in kinds]
    sites += [model.site(f"layers.{last}")]  # so that the last block's MLP has run, whatever the order
    patterns: dict[int, Tensor] = {}
    with ExitStack() as stack:
        stack.enter_context(_eager(model.model))
        for n in range(last + 1):
            stack.enter_context(_pattern_of(model.site(f"layers.{n}.attn").module, n, patterns))
        inputs = ids[None].to(model.device)
        found = capture(sites, lambda: model.model(input_ids=inputs, use_cache=False))
    wide = torch.promote_types(model.dtype, torch.float32)
    rows = {name: value.reshape(len(ids), -1).to(wide) for name, value in found.items()}
    layers = []
    for n in range(last + 1):
        if n not in patterns:
            raise UnweaveError(f"layers.{n}: {type(model.model).__name__} does not give the weights of its attention")
        taken = [rows[f"layers.{n}{kind}"] for kind in kinds]
        layers.append(_layer(model, blocks[n], n, patterns[n][0].to(wide), taken))
    trace = AttentionTrace(ids, tuple(layers))
    _check(rows, trace, _TOLERANCE.get(model.dtype, 5e-2))
    return trace


def _layer(model: LanguageModel, block: nn.Module, n: int, pattern: Tensor, taken: list[Tensor]) -> LayerTrace:
    stream, normed, heads, attention, mlp = taken
    n_heads = len(pattern)
    d_head = heads.shape[1] // n_heads
    W_V, b_V = _value_map(model.site(f"layers.{n}.attn").module, n, d_head)
    W_V, b_V = W_V.to(stream).unflatten(0, (-1, d_head)), b_V.to(stream).unflatten(0, (-1, d_head))
    groups = n_heads // len(W_V)
    W_V, b_V = W_V.repeat_interleave(groups, 0), b_V.repeat_interleave(groups, 0)
    W_O, b_O = _matrix(model.site(f"layers.{n}.attn.heads").module, n)
    scale, centred, bias = _norm(block, n, stream, normed)
    return LayerTrace(
        stream=stream,
        pattern=pattern,
        heads=heads,
        values=torch.einsum("td,hkd->thk", normed, W_V) + b_V,
        attention=attention,
        mlp=mlp,
        W_V=W_V,
        b_V=b_V,
        W_O=W_O.to(stream).T.unflatten(0, (n_heads, d_head)),
        b_O=b_O.to(stream),
        norm_scale=scale,
        norm_centred=centred,
        norm_bias=bias,
    )


# ---- finding the parts --------------------------------------------------------------------------------------------


@contextmanager
def _eager(model: nn.Module) -> Iterator[None]:
    """Attention computed step by step, so that its weights exist, inside the block."""
    whole: Any = model.config
    configs = {id(config): config for config in (whole, whole.get_text_config(decoder=True))}
    before = {key: config._attn_implementation for key, config in configs.items()}
    try:
        for config in configs.values():
            config._attn_implementation = "eager"
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


@contextmanager
def _pattern_of(attention: nn.Module, n: int, found: dict[int, Tensor]) -> Iterator[None]:
    """Note the ``(1, h, t, t)`` tensor among what an attention module gives."""

    def note(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        parts = output if isinstance(output, (tuple, list)) else ()
        weights = [p for p in parts if isinstance(p, Tensor) and p.ndim == 4 and p.shape[2] == p.shape[3]]
        if weights:
            found[n] = weights[0].detach()

    handle = attention.register_forward_hook(note)
    try:
        yield
    finally:
        handle.remove()


def _matrix(module: nn.Module, n: int) -> tuple[Tensor, Tensor]:
    """``(d_out, d_in)`` and ``(d_out,)`` of a linear module, also of GPT-2's, which keeps its weight transposed."""
    weight: Any = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        raise UnweaveError(f"layers.{n}: expected a linear module, found {type(module).__name__}")
    weight = weight.detach() if isinstance(module, nn.Linear) else weight.detach().T
    bias: Any = getattr(module, "bias", None)
    return weight, weight.new_zeros(len(weight)) if bias is None else bias.detach()


def _value_map(attention: nn.Module, n: int, d_head: int) -> tuple[Tensor, Tensor]:
    """The matrix that makes values, ``(kv heads * d_head, d)``, and its bias."""
    children = dict(attention.named_children())
    for name in ("v_proj", "value", "v_lin"):
        if name in children:
            return _matrix(children[name], n)
    if "c_attn" in children:  # queries, keys and values behind each other
        weight, bias = _matrix(children["c_attn"], n)
        third = len(weight) // 3
        return weight[2 * third :], bias[2 * third :]
    known = ", ".join(children) or "none"
    raise UnweaveError(
        f"layers.{n}: no value projection in this {type(attention).__name__} (modules found: {known}; known are v_proj "
        "and c_attn)"
    )


def _norm(block: nn.Module, n: int, stream: Tensor, normed: Tensor) -> tuple[Tensor, bool, Tensor]:
    """The norm between stream and attention, as a linear map at each position: scale ``(t, d)``, centring, bias."""
    if torch.equal(stream, normed):
        return torch.ones_like(stream), False, stream.new_zeros(stream.shape[1])
    for name, child in block.named_children():
        if any(True for _ in child.children()) or isinstance(child, (nn.Linear, nn.Dropout)):
            continue
        if not ("norm" in name or "ln" in name):
            continue
        weight = next(child.parameters(), stream)
        made, bias = (child(rows.to(weight)).detach().to(stream) for rows in (stream, stream[:1] * 0))
        if not torch.allclose(made, normed, rtol=1e-2, atol=1e-2 * float(normed.abs().max())):
            continue
        scale, centred = norm_scale(child, stream.shape[1], stream.device, stream.dtype)
        rows = (stream - stream.mean(1, keepdim=True) if centred else stream) * scale
        # Exactly proportional to what the norm gave: the factor is 1 over the norm of the row, eps and all.
        factor = ((normed - bias) * rows).sum(1) / rows.square().sum(1).clamp_min(1e-30)
        return factor[:, None] * scale, centred, bias[0]
    raise UnweaveError(f"layers.{n}: found no norm in {type(block).__name__} that makes what the attention reads")


def _check(rows: dict[str, Tensor], trace: AttentionTrace, tolerance: float) -> None:
    for n, layer in enumerate(trace.layers):
        read = layer.frozen_norm(layer.stream, slice(None)) + layer.norm_bias
        mixed = torch.einsum("hqs,shk->qhk", layer.pattern, layer.values).flatten(1)
        written = F.linear(layer.heads, layer.W_O.flatten(0, 1).T, layer.b_O)
        _same(f"layers.{n}: norm", read, rows[f"layers.{n}.attn:input"], tolerance)
        _same(f"layers.{n}: attention times values", mixed, layer.heads, tolerance)
        _same(f"layers.{n}: output projection", written, layer.attention, tolerance)
        total = trace.components(n, by_head=False)[1].sum(0)
        _same(f"layers.{n}: embedding, attention and MLPs before it, summed", total, layer.stream, tolerance)


def _same(what: str, ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    off = float((ours - theirs).norm() / theirs.norm().clamp_min(1e-30))
    if off > tolerance:
        raise UnweaveError(
            f"{what}: off by {off:.1%} from what the model computed. It works in another way than attribution "
            "understands (norms behind attention or MLP, say), so its parts cannot be told apart"
        )
