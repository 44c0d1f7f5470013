"""Attention-output dictionaries: which heads a feature reads, which positions, and what was written there.

Kissane et al. 2024, "Interpreting attention layer outputs with sparse autoencoders", arXiv:2406.17759. A dictionary on
the concatenated heads ``z`` of a layer (the site ``layers.N.attn.heads``) has pre-activations that are linear in ``z``,
``u_i(q) = sum_h w_i^h . z_h(q) + b_i``; ``z_h(q) = sum_s A^h_qs v^h_s`` is linear in the values with the attention
frozen, and ``v^h_s = W_V^h LN(x_s) + b_V`` in the parts of the residual stream with the norm's scale frozen. So a
pre-activation is a sum over heads, over source positions, over what was in the stream there: *direct feature
attribution* (DFA), exact, without a further forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from unweave.analysis.attention_trace import AttentionTrace
from unweave.codes import SparseCode
from unweave.dictionaries import Dictionary
from unweave.dictionaries._linear import LinearDictionary
from unweave.dictionaries._origin import check_origin
from unweave.errors import UnweaveError


def head_weights(dictionary: Dictionary, n_heads: int) -> Tensor:
    """``(n_features, n_heads)``: the share of each head in what a feature writes; rows sum to 1.

    ``h_ik = ||D_i^k|| / sum_l ||D_i^l||`` with ``D_i^k`` the block of atom i that belongs to head k. An atom of zeros
    has no shares: its row is nan.

    Raises:
        UnweaveError: when the width of the dictionary is no multiple of ``n_heads``.
    """
    atoms = dictionary.decoder_directions()
    if n_heads < 1 or atoms.shape[1] % n_heads:
        raise UnweaveError(
            f"head_weights: expected atoms made of {n_heads} equal blocks, found a width of {atoms.shape[1]}. Is this "
            "a dictionary of concatenated heads (layers.N.attn.heads), and n_heads the number of query heads?"
        )
    norms = atoms.unflatten(1, (n_heads, -1)).norm(dim=2)
    return norms / norms.sum(1, keepdim=True)


def top_features_of_heads(dictionary: Dictionary, n_heads: int, n: int = 10) -> Tensor:
    """``(n_heads, n)`` int64: the features that write most of their atom through each head, best first."""
    weights = head_weights(dictionary, n_heads).nan_to_num(-1.0)
    return weights.topk(min(n, len(weights)), dim=0).indices.T


class AttentionAttribution:
    """Direct feature attribution of one layer's dictionary in one sequence.

    Numbers are pre-activations' (before ReLU, threshold or top-k), in the dictionary's units. Positions may be
    negative, counted from the end.

    Args:
        trace: of the sequence, down to this layer at least. layer: whose heads the dictionary was trained on.
        dictionary: with a linear encoder. force: go on with one that was loaded and is not known to be for this site.

    Raises:
        UnweaveError: for an encoder that is not linear, or a dictionary of another width or site.
    """

    def __init__(self, trace: AttentionTrace, layer: int, dictionary: Dictionary, *, force: bool = False) -> None:
        if not isinstance(dictionary, LinearDictionary):
            raise UnweaveError(
                f"direct attribution splits a pre-activation that is linear in its input; {dictionary.name!r} has none"
            )
        self.trace, self.number, self.layer, self.dictionary = trace, layer, trace.layer(layer), dictionary
        width = self.layer.heads.shape[1]
        if dictionary.d_in != width:
            raise UnweaveError(
                f"the heads of layer {layer} are {width} wide, the dictionary takes {dictionary.d_in}: was it trained "
                f"on layers.{layer}.attn.heads of this model?"
            )
        if not force:
            check_origin(dictionary.trained_on, {"site": f"layers.{layer}.attn.heads"}, "used at")
        self._check_linear()

    def __repr__(self) -> str:
        return f"AttentionAttribution(layer {self.number}, {self.dictionary.name}, {self.trace!r})"

    # ---- the sums -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def pre_activations(self) -> Tensor:
        """``(t, n_features)``; dense. What the sums below add up to, feature by feature."""
        return self.dictionary.pre_activations(self.layer.heads)

    def bias(self, feature: int) -> float:
        """What of a pre-activation comes from no head: ``b_enc - b_dec . w`` (without b_dec where none is subtracted).

        ``by_head(feature, q).sum() + bias(feature)`` is the pre-activation.
        """
        encoder, start = self._encoder_row(feature)
        shift = encoder @ self.dictionary.b_dec.detach().to(encoder) if self.dictionary.config.subtract_bias else 0.0
        return float(start - shift)

    def by_head(self, feature: int, position: int) -> Tensor:
        """``(h,)``: ``w^h . z_h(q)``."""
        heads = self.layer.heads[self._at(position)].unflatten(0, (self.layer.n_heads, -1))
        return (self._reads(feature) * heads).sum(1)

    def by_source(self, feature: int, position: int, *, by_head: bool = False) -> Tensor:
        """``(t,)``, or ``(h, t)`` by head: ``A^h_qs (w^h . v^h_s)``, with the attention as it was.

        Nothing comes from behind the position. Over all sources it adds up to ``by_head``.
        """
        products = torch.einsum("hk,thk->ht", self._reads(feature), self.layer.values)
        each = self.layer.pattern[:, self._at(position)] * products
        return each if by_head else each.sum(0)

    def by_component(self, feature: int, position: int, *, source: int | None = None) -> tuple[list[str], Tensor]:
        """What was in the residual stream at the sources, with attention and the norm's scale as they were.

        Args:
            source: one position, or None for all.

        Returns:
            Names and ``(c, t)`` (or ``(c,)`` for one source): ``embedding``, ``layers.N.attn.heads.H`` and
            ``layers.N.mlp`` of the layers before (``layers.N.attn.bias`` too, where output projections have one), and
            ``bias`` (of the norm and the values). Over the components it
            adds up to :meth:`by_source`.
        """
        at = slice(None) if source is None else slice(self._at(source), self._at(source) + 1)
        names, parts = self.trace.components(self.number, at)
        values = self._through(feature, position, parts, at).sum(0)
        w, layer = self._reads(feature), self.layer
        constant = torch.einsum("hk,hk->h", w, torch.einsum("hkd,d->hk", layer.W_V, layer.norm_bias) + layer.b_V)
        bias = torch.einsum("hs,h->s", layer.pattern[:, self._at(position), at], constant)
        values = torch.cat([values, bias[None]])
        return [*names, "bias"], values if source is None else values[:, 0]

    def by_feature(
        self, feature: int, position: int, source: int, upstream: Mapping[int, AttentionAttribution]
    ) -> list[tuple[int, int, Tensor]]:
        """What features of earlier layers' attention dictionaries wrote at a source, strongest first.

        ``f_j (W_O D_j)`` of each feature j that fires there, through norm, values and attention.

        Args:
            upstream: attributions of the same trace, by layer; those not before this one are passed over.

        Returns:
            ``(layer, feature, (h,) by head)`` for each that fires.
        """
        at = self._at(source)
        found = []
        for number, other in upstream.items():
            if number >= self.number:
                continue
            features, values = other.fires(at)
            atoms = other.dictionary.decoder_directions()[features].to(self.layer.stream)
            written = (values[:, None] * atoms) @ other.layer.W_O.flatten(0, 1)
            parts = self._through(feature, position, written[:, None], slice(at, at + 1))[:, :, 0]
            found += [(number, int(j), parts[:, i]) for i, j in enumerate(features)]
        return sorted(found, key=lambda entry: -float(entry[2].sum()))

    def fires(self, position: int) -> tuple[Tensor, Tensor]:
        """The features that fire at a position and their values."""
        row = self._code[self._at(position) : self._at(position) + 1]
        return row.indices.long(), row.values.to(self.layer.stream)

    # ---- details --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _check_linear(self) -> None:
        """Refuse pre-activations that are not the sums: an encoder may do something to its rows first."""
        dictionary, rows = self.dictionary, self.layer.heads[-4:]
        W, b = (p.detach().to(rows) for p in (dictionary.W_enc, dictionary.b_enc))
        centred = rows - dictionary.b_dec.detach().to(rows) if dictionary.config.subtract_bias else rows
        made, expected = dictionary.pre_activations(rows).to(rows), centred @ W.T + b
        if float((made - expected).norm()) > 1e-2 * float(expected.norm().clamp_min(1e-30)):
            raise UnweaveError(
                f"direct attribution splits a pre-activation that is linear in its input; {dictionary.name!r} does "
                "something else to its rows first"
            )

    @cached_property
    def _code(self) -> SparseCode:
        was_training = self.dictionary.training
        try:
            with torch.no_grad():
                return self.dictionary.eval().encode(self.layer.heads).nonzero()
        finally:
            self.dictionary.train(was_training)

    def _encoder_row(self, feature: int) -> tuple[Tensor, Tensor]:
        if not 0 <= feature < self.dictionary.n_features:
            raise UnweaveError(f"no feature {feature}: the dictionary has {self.dictionary.n_features}")
        rows = self.layer.heads
        return (
            self.dictionary.W_enc[feature].detach().to(rows.device, rows.dtype),
            self.dictionary.b_enc[feature].detach().to(rows.device, rows.dtype),
        )

    def _reads(self, feature: int) -> Tensor:
        """``(h, d_head)``: the encoder's row, head by head."""
        return self._encoder_row(feature)[0].unflatten(0, (self.layer.n_heads, -1))

    def _through(self, feature: int, position: int, parts: Tensor, at: slice) -> Tensor:
        """``(h, c, s)``: what ``(c, s, d)`` parts of the stream at some sources add to a pre-activation, by head."""
        into = torch.einsum("hk,hkd->hd", self._reads(feature), self.layer.W_V)
        each = torch.einsum("csd,hd->hcs", self.layer.frozen_norm(parts, at), into)
        return each * self.layer.pattern[:, self._at(position), None, at]

    def _at(self, position: int) -> int:
        n = len(self.trace)
        if not -n <= position < n:
            raise UnweaveError(f"no position {position} in a sequence of {n} tokens")
        return position % n


# ---- recursive attribution ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureNode:
    """A feature at a position, and what made it fire there.

    Attributes:
        layer, feature, position: which. value: its activation there.
        contribution: what it adds to the pre-activation of the feature above it; None at the root.
        head: through which head of the layer above most of that goes; None at the root.
        sources: the positions it reads most from, each with what it adds to the pre-activation, strongest first.
        children: features of earlier layers at those positions.
    """

    layer: int
    feature: int
    position: int
    value: float
    contribution: float | None = None
    head: int | None = None
    sources: tuple[tuple[int, float], ...] = ()
    children: tuple[FeatureNode, ...] = ()

    def lines(self, depth: int = 0) -> list[str]:
        added = "" if self.contribution is None else f", adds {self.contribution:.3g} through head {self.head}"
        reads = ", ".join(f"{position} ({amount:.3g})" for position, amount in self.sources)
        line = f"{'  ' * depth}layer {self.layer} feature {self.feature} at {self.position}: {self.value:.3g}{added}"
        return [f"{line}; reads {reads}", *(line for child in self.children for line in child.lines(depth + 1))]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def recursive_attribution(
    trace: AttentionTrace,
    dictionaries: Mapping[int, Dictionary],
    layer: int,
    feature: int,
    position: int,
    *,
    n_sources: int = 1,
    n_features: int = 1,
) -> FeatureNode:
    """Follow a feature back: where it reads, which earlier attention feature wrote there, where that reads, and so on.

    At every node the ``n_sources`` positions with the largest attribution, and at each of those the ``n_features``
    features of earlier layers that add most (above 0). Ends where no earlier layer has a dictionary or nothing fires.
    No forward pass is run. (The paper describes the recursion in words only; taking the strongest first is our choice.)

    Args:
        trace: of one sequence. dictionaries: of concatenated heads, by layer.

    Raises:
        UnweaveError: for a layer without a dictionary, or as :class:`AttentionAttribution`.
    """
    if layer not in dictionaries:
        raise UnweaveError(f"no dictionary of layer {layer}: found {', '.join(map(str, dictionaries)) or 'none'}")
    made = {n: AttentionAttribution(trace, n, dictionary) for n, dictionary in dictionaries.items() if n <= layer}

    def node(n: int, i: int, q: int, contribution: float | None, head: int | None) -> FeatureNode:
        attribution = made[n]
        by_source = attribution.by_source(i, q)
        best = by_source.topk(min(n_sources, q + 1))
        sources = tuple((int(s), float(amount)) for s, amount in zip(best.indices, best.values))
        children = []
        for s, _ in sources:
            for earlier, j, by_head in attribution.by_feature(i, q, s, made)[:n_features]:
                if float(by_head.sum()) > 0:
                    children.append(node(earlier, j, s, float(by_head.sum()), int(by_head.argmax())))
        features, values = attribution.fires(q)
        value = float(values[features == i].sum())
        return FeatureNode(n, i, q, value, contribution, head, sources, tuple(children))

    return node(layer, feature, made[layer]._at(position), None, None)
