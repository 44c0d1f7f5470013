"""Activations of a language model over documents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from unweave.batch import ActivationBatch, Items
from unweave.errors import NoText, UnweaveError, near_names
from unweave.sources._base import Source
from unweave.sources._contexts import Plan, Split, to_items
from unweave.sources._running import run_items, run_with_gradients
from unweave.sources.chats import CHAT_DEFAULTS
from unweave.sources.composite import AnySite, CompositeSite, join_parts, parts_facts
from unweave.sources.documents import Documents
from unweave.sources.language_model import LanguageModel
from unweave.sources.sites import Site

#: What a source of texts does unless told otherwise; what one of dialogues does is ``CHAT_DEFAULTS``.
TEXT_DEFAULTS: dict[str, Any] = {"context_size": 128, "keep_special": False, "max_norm_ratio": 10.0}


class TextSource(Source):
    """The activations at a site (or from one site to another) over documents.

    Documents are tokenised and cut into contexts of ``context_size`` tokens, each with BOS before it if the
    tokenizer has one; contexts of like length are batched, and the model runs to the site, no further. Rows of
    special tokens (BOS among them) are left out, and so are rows of abnormally high norm (attention sinks), whose
    norm exceeds ``max_norm_ratio`` times the median norm in the first batch. The items of a batch keep all tokens.

    A composite site (``layers.6+layers.12``, ``layers.2..6``, ``layers.*.mlp``) gives the rows of its parts, from one
    forward pass, concatenated in the order written; a token whose norm is abnormal in one of them gives no row.

    With ``side="gradient"`` each row brings the gradient of the model's next-token cross-entropy, summed over all
    tokens of its context but the first, by the activation that the dictionary reconstructs: the one at ``target_site``
    (or the site), in the unmodified forward pass. This takes the whole model forward and from there back. The last
    token of a context predicts nothing, so its gradient at the residual stream is 0.

    With ``side="previous"`` each row brings the one of the token before it in its context, or itself where that one
    gives no row.

    A row's ``position`` counts the tokens of its document from 0, BOS not counted: an item that starts with BOS has
    ``start`` one below its first real token (so -1 for the first item of a document).

    Dialogues (documents of format "chat") are rendered with the model's chat template, each is one context, cut off
    at ``context_size``, and every token gives a row, unless told otherwise: what comes of a dialogue does not depend
    on the others. The template says where BOS goes, and positions count what it renders from 0.

    Args:
        model: the language model. documents: what it reads; a list of texts works too. site: where rows are taken.
        target_site: where targets are taken (transcoders); None for the site itself.
        side: "gradient" or "previous", see above, or None.
        context_size: tokens per context, BOS included; None: 128, for dialogues 8192 or what the model takes.
        batch_tokens: tokens per forward pass, padding included; a longer context is a pass of its own.
        bos: put BOS before each context; "auto" if the tokenizer has it (never before a dialogue).
        keep_special: keep the rows of BOS and other special tokens, whatever their norm; None: only of dialogues.
        max_norm_ratio: None keeps every norm; "auto" is None for dialogues and 10 for texts.
        max_tokens: the most tokens to run the model on. split: "train" (19 of 20 documents), "held_out", or "all".
        min_tokens: leave out pieces of documents shorter than this.

    Attributes:
        dropped: how many rows the last pass left out so far: ``{"special": n, "high_norm": n}``.

    Raises:
        UnweaveError: for an unknown site, a context longer than the model takes, BOS asked of a tokenizer without
            one, dialogues for a tokenizer without a chat template; while iterating, when the documents give not one
            context.
    """

    def __init__(
        self,
        model: LanguageModel,
        documents: Documents | Sequence[str],
        site: str,
        *,
        target_site: str | None = None,
        side: str | None = None,
        context_size: int | None = None,
        batch_tokens: int = 2048,
        bos: bool | str = "auto",
        keep_special: bool | None = None,
        max_norm_ratio: float | Literal["auto"] | None = "auto",
        max_tokens: int | None = None,
        split: Split = "train",
        min_tokens: int = 8,
    ) -> None:
        if not isinstance(documents, Documents):
            documents = Documents.from_texts(documents)
        self.model, self.documents = model, documents
        self.site = model.composite(site)
        self.target_site = self.site if target_site is None else model.composite(target_site)
        self.side = side
        chat = documents.format == "chat"
        usual = CHAT_DEFAULTS if chat else TEXT_DEFAULTS
        self.keep_special: bool = usual["keep_special"] if keep_special is None else keep_special
        self.max_norm_ratio: float | None = usual["max_norm_ratio"] if max_norm_ratio == "auto" else max_norm_ratio
        size: int = usual["context_size"] if context_size is None else context_size
        if chat:  # a bound on what is read of a dialogue, not a wish
            size = min(size, model.max_context or size)
        self._chat = model.chat_template if chat else None
        self.plan = Plan(
            documents=documents,
            tokenize_many=model.tokenize_chats if chat else model.tokenize_many,
            prefix=_prefix(model, bos, chat),
            context_size=size,
            batch_tokens=batch_tokens,
            min_tokens=max(1, min_tokens),
            max_tokens=max_tokens,
            split=split,
            whole=chat,
        )
        self._check()
        self.dropped = {"special": 0, "high_norm": 0}
        self._widths: dict[str, list[int]] = {}
        self._references: dict[str, float] | None = None

    def _check(self) -> None:
        plan, longest = self.plan, self.model.max_context
        if plan.split not in ("train", "held_out", "all"):
            raise UnweaveError(f"no split {plan.split!r}: {near_names(str(plan.split), ['train', 'held_out', 'all'])}")
        if plan.context_size <= len(plan.prefix) or (longest is not None and plan.context_size > longest):
            raise UnweaveError(
                f"context_size: expected {len(plan.prefix) + 1} to {longest or 'any number of'} tokens for "
                f"{self.model.name}, found {plan.context_size}"
            )
        if plan.min_tokens > plan.context_size - len(plan.prefix):
            raise UnweaveError(
                f"min_tokens={plan.min_tokens} leaves nothing of contexts of {plan.context_size} tokens; lower it"
            )
        if plan.batch_tokens < 1 or (plan.max_tokens is not None and plan.max_tokens < 1):
            raise UnweaveError("batch_tokens and max_tokens must be at least 1")
        if self.max_norm_ratio is not None and self.max_norm_ratio <= 1:
            raise UnweaveError(f"max_norm_ratio must be above 1 (or None), found {self.max_norm_ratio}")
        if self.side not in (None, "gradient", "previous"):
            raise UnweaveError(f"side: expected 'gradient', 'previous' or None, found {self.side!r}")
        if self.side == "gradient" and self.model.dtype == torch.float16:
            raise UnweaveError("gradients in float16 underflow: load the model in bfloat16 or float32")

    # ---- what a source says about itself --------------------------------------------------------------------------

    @property
    def d_in(self) -> int:
        return sum(self._part_widths(self.site))

    @property
    def d_out(self) -> int:
        return sum(self._part_widths(self.target_site))

    @property
    def d_side(self) -> int | None:
        return {None: None, "gradient": self.d_out, "previous": self.d_in}[self.side]

    def _part_widths(self, site: AnySite) -> list[int]:
        if site.name not in self._widths:
            self._widths[site.name] = self.model.widths(site)
        return self._widths[site.name]

    @property
    def provenance(self) -> dict[str, Any]:
        """What the rows depend on. Runs the model on the first batch once, for the reference norms."""
        plan = self.plan
        beside: dict[str, Any] = {"side": self.side} if self.side else {}
        for key, site in (("parts", self.site), ("target_parts", self.target_site)):
            if isinstance(site, CompositeSite):
                beside[key] = parts_facts([part.name for part in site.parts], self._part_widths(site))
        if self._chat is not None:
            beside["chat"] = self._chat.provenance
        return {
            "kind": "text",
            "model": self.model.provenance,
            "site": self.site.name,
            "target_site": self.target_site.name,
            **beside,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "context_size": plan.context_size,
            "batch_tokens": plan.batch_tokens,
            "bos": bool(plan.prefix),
            "special": "kept" if self.keep_special else "dropped",
            "min_tokens": plan.min_tokens,
            "max_tokens": plan.max_tokens,
            "max_norm_ratio": self.max_norm_ratio,
            "reference_norms": self.reference_norms(),
            "split": plan.split,
            "data": self.documents.provenance,
        }

    def __repr__(self) -> str:
        to = "" if self.target_site is self.site else f" to {self.target_site.name}"
        return f"TextSource({self.model.name} at {self.site.name}{to}, {self.documents.describe()})"

    # ---- rows -----------------------------------------------------------------------------------------------------

    def reference_norms(
        self, first_items: Items | None = None, first_rows: Mapping[str, Tensor] | None = None
    ) -> dict[str, float]:
        """The median row norm in the first batch at the sites that are measured; empty when no norm is too high.

        Always taken from batch 0, wherever one resumes, and rounded to two digits, so that the last bits of another
        machine's arithmetic do not change which rows are kept. Who has run the model on batch 0 already may give its
        items and activations.
        """
        if self.max_norm_ratio is None:
            return {}
        if self._references is None:
            items = self.first_items() if first_items is None else first_items
            rows = run_items(self.model, self.measured, items) if first_rows is None else first_rows
            special = self._special(items.tokens)
            use = ~special if bool((~special).any()) else torch.ones_like(special)
            self._references = {
                site.name: float(f"{float(_norms(rows[site.name][use]).median()):.2g}") for site in self.measured
            }
        return self._references

    @property
    def needs_references(self) -> bool:
        """Whether reference norms are wanted and not measured yet."""
        return self.max_norm_ratio is not None and self._references is None

    def batches(self, skip: int = 0) -> Iterator[ActivationBatch]:
        self.forget_dropped()
        for items in self.planned(skip):
            yield self.batch(items, *run_with_gradients(self.model, self.sites, self.gradient_sites, items))

    def batch(
        self, items: Items, rows: Mapping[str, Tensor], gradients: Mapping[str, Tensor] | None = None
    ) -> ActivationBatch:
        """The batch of some items, from the activations ``(n_tokens, d)`` of all their tokens at :attr:`sites`.

        ``gradients`` likewise at :attr:`gradient_sites`, where there are any.
        """
        special = self._special(items.tokens)
        high = self._too_high(rows, len(special)) & ~special
        keep = ~high if self.keep_special else ~(high | special)
        self.dropped["high_norm"] += int(high.sum())
        self.dropped["special"] += 0 if self.keep_special else int(special.sum())
        inputs = join_parts(self.site, rows, keep)
        targets = inputs if self._tied else join_parts(self.target_site, rows, keep)
        side = None
        if self.side == "gradient" and gradients is not None:
            side = join_parts(self.target_site, gradients, keep)
        elif self.side == "previous":
            side = join_parts(self.site, rows)[_previous(items, keep)[keep]]
        return ActivationBatch(inputs, targets, items, keep.nonzero().squeeze(1), side)

    def forget_dropped(self) -> None:
        """Begin a pass: count the rows left out from 0."""
        self.dropped = {"special": 0, "high_norm": 0}

    @property
    def sites(self) -> list[Site]:
        """The parts of the site, and those of the target's that are others."""
        return list({part.name: part for site in (self.site, self.target_site) for part in site.parts}.values())

    @property
    def measured(self) -> list[Site]:
        """The sites by whose norms rows are left out: every part, for a token may be huge in one layer alone."""
        return self.sites

    @property
    def gradient_sites(self) -> list[Site]:
        """The parts whose gradients become side inputs."""
        return list(self.target_site.parts) if self.side == "gradient" else []

    @property
    def _tied(self) -> bool:
        return self.target_site.name == self.site.name

    def first_items(self) -> Items:
        """The items of batch 0."""
        return next(self.planned(0))

    def planned(self, skip: int) -> Iterator[Items]:
        """The items of each batch from number ``skip`` on, before the model has seen them."""
        return map(to_items, self._planned(skip))

    def _planned(self, skip: int) -> Iterator[list[Any]]:
        batches = self.plan.batches()
        first = next(batches, None)
        if first is None:
            raise NoText(
                f"no text to run the model on: no context of at least {self.plan.min_tokens} tokens in the "
                f"{self.plan.split!r} split of {self.documents.describe()}. Give more or longer documents, lower "
                "min_tokens, or use split='all'"
            )
        if skip == 0:
            yield first
        yield from islice(batches, max(0, skip - 1), None)

    def _special(self, tokens: Tensor) -> Tensor:
        return torch.isin(tokens, torch.tensor(sorted(self.model.special_ids), dtype=tokens.dtype))

    def _too_high(self, rows: Mapping[str, Tensor], n: int) -> Tensor:
        high = torch.zeros(n, dtype=torch.bool)
        for name, median in self.reference_norms().items():
            assert self.max_norm_ratio is not None
            high |= _norms(rows[name]) > self.max_norm_ratio * median  # NaN rows stay: harvest names them
        return high


def _previous(items: Items, keep: Tensor) -> Tensor:
    """``(n_tokens,)``: the token before each in its item, or itself where there is none that gives a row."""
    here = torch.arange(items.n_tokens)
    before = (here - 1).clamp_min(0)
    return torch.where((items.item_of_token[before] == items.item_of_token) & keep[before], before, here)


def _norms(rows: Tensor) -> Tensor:
    return rows.float().norm(dim=1)


def _prefix(model: LanguageModel, bos: bool | str, chat: bool) -> tuple[int, ...]:
    if bos not in (True, False, "auto"):
        raise UnweaveError(f"bos: expected 'auto', True or False, found {bos!r}")
    if chat and bos is True:
        raise UnweaveError("bos=True: the chat template already says where BOS goes in a dialogue; leave bos out")
    if chat:
        return ()
    if bos is False or (bos == "auto" and model.bos_id is None):
        return ()
    if model.bos_id is None:
        raise UnweaveError(f"bos=True, but the tokenizer of {model.name} has no BOS token; use bos='auto' or False")
    return (model.bos_id,)
