"""What is known of a checkpoint without its weights, and what is not."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Facts:
    """Read from headers and settings alone. None is for what the files do not say.

    Attributes:
        format: of the registry. architecture: of unweave's registry, or what the library calls it where unweave has
            none. library_class: the library's own name for it.
        dtype: as stored. model: that it was trained on. site, target_site: in unweave's names where they can be told.
        hook: the site in the words of the file. context: what it was trained on besides (data, context size, ...).
        models: where rows of several models lie side by side, each one's; ``model`` is None then.
        notes: what a user should know. missing: what unweave lacks to load it; None if nothing.
    """

    format: str
    architecture: str
    d_in: int | None = None
    d_out: int | None = None
    n_features: int | None = None
    k: float | None = None
    dtype: str | None = None
    library_class: str | None = None
    model: str | None = None
    site: str | None = None
    target_site: str | None = None
    hook: str | None = None
    context: dict[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    missing: str | None = None

    @property
    def origin(self) -> dict[str, Any]:
        """What it was trained on, as a dictionary's ``trained_on`` says it."""
        several = {"sources": [{"model": model} for model in self.models]} if self.models else {}
        return {"model": self.model, "site": self.site, "target_site": self.target_site, **several}

    @property
    def l0(self) -> float | None:
        """The average number of features per row that it states itself."""
        stated = self._stated("average L0", "L0")
        return float(stated) if isinstance(stated, int | float) and not isinstance(stated, bool) else None

    @property
    def context_size(self) -> int | None:
        """Tokens per context in its training."""
        stated = self._stated("context size", "context_size")
        return stated if isinstance(stated, int) and stated > 1 else None

    @property
    def prepends_bos(self) -> bool | None:
        """Whether each context began with BOS."""
        stated = self._stated("prepend_bos")
        return stated if isinstance(stated, bool) else None

    def _stated(self, *names: str) -> Any:
        """What ``context`` has under the first of these names, which differ by library."""
        return next((self.context[name] for name in names if self.context.get(name) is not None), None)

    def rows(self) -> list[tuple[str, str]]:
        """Names and values for a card."""
        shown = [("format", self.format), ("architecture", self.architecture)]
        if self.library_class and self.library_class != self.architecture:
            shown.append(("library's class", self.library_class))
        shown += [(name, _word(getattr(self, name))) for name in ("d_in", "d_out", "n_features")]
        if self.k is not None:
            shown.append(("k", _word(self.k)))
        models = ("models", ", ".join(self.models)) if self.models else ("model", _word(self.model))
        shown += [("dtype", _word(self.dtype)), models, ("site", _word(self.site))]
        if self.target_site:
            shown.append(("target site", self.target_site))
        if self.hook and self.hook != self.site:
            shown.append(("site in the file", self.hook))
        shown += [(name, _word(value)[:200]) for name, value in self.context.items() if value is not None]
        shown += [("note", note) for note in self.notes]
        shown.append(("loads", "yes" if self.missing is None else f"no: {self.missing}"))
        return shown


def _word(value: Any) -> str:
    if value is None:
        return UNKNOWN
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


_HOOKS = {
    "hook_resid_pre": "layers.{}:input",
    "hook_resid_post": "layers.{}",
    "hook_mlp_out": "layers.{}.mlp",
    "mlp.hook_in": "layers.{}.mlp:input",
    "mlp.hook_out": "layers.{}.mlp",
    "hook_attn_out": "layers.{}.attn",
    "attn.hook_z": "layers.{}.attn.heads",
}


def site_of_hook(hook: str | None) -> str | None:
    """unweave's name for a TransformerLens hook such as ``blocks.12.hook_resid_post``, or None.

    ``hook_mlp_in``, ``hook_resid_mid``, ``ln2.hook_normalized`` and the like have no name here: they are no block's
    input or output.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", hook or "")
    pattern = _HOOKS.get(match[2]) if match else None
    return pattern.format(match[1]) if pattern and match else None


def site_of_module(path: str | None) -> str | None:
    """unweave's name for what a module such as ``layers.3.mlp`` or ``transformer.h.3`` puts out, or None.

    What lies deeper in a block keeps its own name there: ``model.layers.3.mlp.act_fn`` is ``layers.3.mlp.act_fn``.
    """
    match = re.fullmatch(r"(?:.*\.)?(?:layers|h|blocks)\.(\d+)(?:\.(.+))?", path or "")
    if not match:
        return None
    part = {None: "", "attention": ".attn", "self_attn": ".attn"}.get(match[2], f".{match[2]}")
    return f"layers.{match[1]}{part}"


def sites_called(name: str) -> list[str]:
    """What a site may be called here that another library calls ``name``, the likeliest first.

    ``name`` is a TransformerLens hook, the path of a module, which may end in ``.output`` or ``.input``, or a name of
    unweave's. Which of them there is, only a model can tell.
    """
    path = name.removesuffix(".output")
    side = ":input" if path.endswith((".input", ":input")) else ""
    path = path.removesuffix(".input").removesuffix(":input")
    inside = site_of_module(path)
    found = [site_of_hook(name), None if inside is None else inside + side, path + side]
    return list(dict.fromkeys(one for one in found if one))


def hook_of_site(site: str | None) -> str | None:
    """The TransformerLens hook of one of unweave's sites, or None."""
    for hook, pattern in _HOOKS.items():
        match = re.fullmatch(re.escape(pattern).replace(r"\{\}", r"(\d+)"), site or "")
        if match and not hook.startswith("mlp.hook"):
            return f"blocks.{match[1]}.{hook}"
    return None
