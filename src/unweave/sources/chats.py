"""Conversations as a kind of data: read into one shape, rendered by the model's own chat template, run alone.

FAST, Li et al. 2025, "Training superior sparse autoencoders for instruct models" (Finetuning-aligned Sequential
Training): every dialogue goes through the model by itself, special tokens and all, instead of being cut into blocks
with its neighbours. Among :class:`~unweave.sources.Documents` a dialogue is a text as every other: the JSON list of its
turns, ``[{"role": ..., "content": ...}]``, so files, order, split and mixing need to know nothing of it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from unweave.batch import Items
from unweave.errors import UnweaveError

#: What a source of dialogues does unless told otherwise: whole dialogues, every token's row.
CHAT_DEFAULTS: dict[str, Any] = {"context_size": 8192, "keep_special": True, "max_norm_ratio": None}
#: Where data sets keep their dialogues, in the order they are looked for.
CHAT_FIELDS = ("messages", "conversations", "conversation")

_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
_ROLE_TOKENS = 4  # at most, of a role's word
_ROLE_WORDS = frozenset({"system", "user", "assistant", "model", "tool"})
# Some templates print today's date, and then the rows would depend on the day. This is Llama 3.2's own default.
_TODAY = "26 Jul 2024"
_CLOCK = f"{{%- macro strftime_now(format) -%}}{_TODAY}{{%- endmacro %}}"
_PROBE = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


def to_chat(value: Any, where: str) -> str:
    """A dialogue, in any of the usual shapes, as the JSON of its turns; empty for one without a word.

    Turns are ``{"role", "content"}`` or ``{"from", "value"}`` (ShareGPT's); a content may be a list of parts, of which
    the texts are kept. The whole list may come as JSON text, as some data sets keep it.

    Raises:
        UnweaveError: for anything else.
    """
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            raise UnweaveError(f"{where}: expected turns, found a text that is not JSON ({error.msg})") from None
    if value is None:
        return ""
    if not isinstance(value, (list, tuple)):
        raise UnweaveError(f"{where}: expected a list of turns, found {type(value).__name__}")
    made = [_turn(entry, f"{where}, turn {number}") for number, entry in enumerate(value)]
    if not any(turn["content"].strip() for turn in made):
        return ""
    return json.dumps(made, ensure_ascii=False)


def _turn(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise UnweaveError(f'{where}: expected {{"role": ..., "content": ...}}, found {type(value).__name__}')
    role, content = value.get("role", value.get("from")), value.get("content", value.get("value"))
    if not isinstance(role, str):
        found = ", ".join(repr(key) for key in list(value)[:8]) or "nothing"
        raise UnweaveError(f"{where}: expected 'role' and 'content' (or 'from' and 'value'), found {found}")
    if isinstance(content, list):
        content = "".join(part.get("text") or "" if isinstance(part, dict) else str(part) for part in content)
    if not isinstance(content, str | None):
        raise UnweaveError(f"{where}: the content is no text but {type(content).__name__}")
    return {"role": _ROLES.get(role.lower(), role.lower()), "content": content or ""}


def turns(chat: str) -> list[dict[str, str]]:
    """The turns of what :func:`to_chat` made."""
    return json.loads(chat)


class ChatTemplate:
    """The chat template a tokenizer came with.

    Args:
        tokenizer: of transformers. special_ids: its special tokens. name: of the model, for the errors.

    Raises:
        UnweaveError: when the tokenizer has no template.
    """

    def __init__(self, tokenizer: Any, special_ids: set[int], name: str) -> None:
        self._tokenizer, self._special_ids, self._name = tokenizer, special_ids, name
        self._refused = False
        try:
            self.text: str = tokenizer.get_chat_template()
        except (ValueError, AttributeError):
            raise UnweaveError(
                f"the tokenizer of {name} has no chat template, so there is no telling how it wants dialogues: take "
                "the instruct or chat version of the model, or read the data as text (data.format=text)"
            ) from None

    def render(self, dialogue: Sequence[Mapping[str, str]]) -> str:
        """The text of a dialogue, as the model was finetuned on it; special tokens are written out.

        Raises:
            Exception: whatever the template raises for a dialogue it does not allow.
        """
        clock = _CLOCK if "strftime_now" in self.text else ""
        return self._tokenizer.apply_chat_template(
            list(dialogue), chat_template=clock + self.text, tokenize=False, date_string=_TODAY
        )

    def render_or_nothing(self, chat: str) -> str:
        """What :func:`to_chat` made, rendered; empty where the template does not allow it (said once, in the log)."""
        try:
            return self.render(turns(chat))
        except Exception as error:  # templates raise for roles they do not know, two turns of one side, ...
            if not self._refused:
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                logging.getLogger("unweave").warning(
                    "the chat template of %s does not allow every dialogue (%s); such dialogues are left out",
                    self._name,
                    reason,
                )
            self._refused = True
            return ""

    @cached_property
    def marks(self) -> dict[str, list[Any]]:
        """What the template itself writes into a dialogue: ids of ``special`` tokens, and of the words for ``roles``.

        Found by rendering one. A special token that stands only in front of the whole (BOS) is not of the dialogue and
        not listed, as it is not in the paper's lists. A role is a list of ids, since its word may be several tokens.
        """
        ids = self._tokenizer(self.render(_PROBE), add_special_tokens=False)["input_ids"]
        special = {i for i in ids[1:] if i in self._special_ids}
        roles = set()
        for at in (place + 1 for place, i in enumerate(ids) if i in special):
            for end in range(at + 1, at + 1 + _ROLE_TOKENS):
                if self._tokenizer.decode(ids[at:end]).strip() in _ROLE_WORDS and not special & set(ids[at:end]):
                    roles.add(tuple(ids[at:end]))
                    break
        return {"special": sorted(special), "roles": [list(role) for role in sorted(roles)]}

    @property
    def provenance(self) -> dict[str, Any]:
        """What the rows depend on, and what :func:`template_tokens` needs to find the template's own among them."""
        return {"template_sha256": hashlib.sha256(self.text.encode()).hexdigest(), **self.marks}


def template_tokens(items: Items, marks: Mapping[str, Sequence[Any]]) -> Tensor:
    """``(n_tokens,)`` boolean: the tokens that the template wrote, by a chat source's ``provenance["chat"]``.

    Its special tokens, and the word for a role right behind one. (The paper names "user" and "assistant" beside the
    special tokens; that only those in their place count, not those in what people say, is our choice.)
    """
    tokens, item, n = items.tokens, items.item_of_token, items.n_tokens
    special = torch.isin(tokens, torch.tensor(list(marks["special"]), dtype=tokens.dtype))
    marked = special.clone()
    for role in marks["roles"]:
        # Every place with room for a special token and the word, all in one item.
        first = torch.arange(max(0, n - len(role)))
        hit = special[first] & (item[first] == item[first + len(role)])
        for k, token in enumerate(role, 1):
            hit &= tokens[first + k] == token
        for k in range(1, len(role) + 1):
            marked[first[hit] + k] = True
    return marked
