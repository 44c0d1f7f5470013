"""Sites: names for the tensors inside a model, the same names in every architecture.

    layers.N               the residual stream after block N (the block's output)
    layers.N:input         the residual stream before block N
    layers.N.mlp           what the MLP of block N puts out
    layers.N.attn          what the attention of block N puts out, after its output projection
    layers.N.attn.heads    the concatenated heads, before the output projection
    any.module.path        the output of that module; with ":input" behind it, its input

Several joined are a composite site, such as ``layers.6+layers.12`` (see :mod:`unweave.sources.composite`).

The blocks and their parts are found by role, not by a list of model classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unweave.errors import UnweaveError, near_names

_MLP_NAMES = ("mlp", "feed_forward", "feedforward", "ffn", "ff", "block_sparse_moe", "moe", "fc2")
_ATTENTION_NAMES = ("self_attn", "attn", "attention", "self_attention", "linear_attn")
_PROJECTION_NAMES = ("o_proj", "out_proj", "c_proj", "dense", "wo", "out_lin", "proj")
# Hugging Face passes the residual stream by this keyword where it does not pass it by position.
_STREAM_KEYWORDS = ("hidden_states", "x", "input")


@dataclass(frozen=True)
class Site:
    """One tensor of a model: the first tensor a module takes or gives.

    Attributes:
        name: as the user wrote it. module: the module it belongs to. module_path: its path from the root.
        side: "input" or "output" of the module. words: what it is, in words.
    """

    name: str
    module: nn.Module
    module_path: str
    side: Literal["input", "output"]
    words: str

    @property
    def parts(self) -> tuple[Site, ...]:
        """This site alone, as a composite site has several."""
        return (self,)

    def describe(self) -> str:
        """What this tensor is, for people."""
        return f"{self.words} ({self.side} of {self.module_path or 'the model'}, {type(self.module).__name__})"

    def __repr__(self) -> str:
        return f"Site({self.name!r}: {self.describe()})"

    def read(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any = None) -> Tensor:
        """The site's tensor out of one call of its module.

        Raises:
            UnweaveError: when the module took or gave no tensor.
        """
        if self.side == "input":
            found = _first_tensor(args)
            found = _first_tensor(_stream_first(kwargs)) if found is None else found
        else:
            found = _first_tensor(output)
        if found is None:
            raise UnweaveError(f"site {self.name!r}: the {self.side} of {self.module_path} holds no tensor")
        return found

    @contextmanager
    def hook(self, fn: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
        """Call ``fn(tensor)`` whenever the model computes this site; what it returns, if not None, replaces the tensor.

        The replacement is cast to the tensor's dtype and must have its shape. The hook is gone when the block
        ends, also after an error.
        """

        def changed(before: Tensor) -> Tensor | None:
            after = fn(before)
            if after is None:
                return None
            if after.shape != before.shape:
                raise UnweaveError(
                    f"site {self.name!r}: a hook must return a tensor of shape {tuple(before.shape)}, "
                    f"found {tuple(after.shape)}"
                )
            return after.to(before.device, before.dtype)

        def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            after = changed(self.read(args, kwargs))
            if after is None:
                return None
            if _first_tensor(args) is not None:
                return _with_first_tensor(args, after), kwargs
            return args, {**kwargs, **_with_first_tensor(_stream_first(kwargs), after)}

        def on_output(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            after = changed(self.read(args, kwargs, output))
            return None if after is None else _with_first_tensor(output, after)

        if self.side == "input":
            handle = self.module.register_forward_pre_hook(on_input, with_kwargs=True)
        else:
            handle = self.module.register_forward_hook(on_output, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()


# ---- finding sites ----------------------------------------------------------------------------------------------


def find_blocks(root: nn.Module) -> tuple[str, list[nn.Module]]:
    """The model's blocks and the path of their list; ``("", [])`` for a model without a list of blocks.

    The list is the ``nn.ModuleList`` with the most parameters, first among those as long as the model's config
    says (so that the vision tower of a language model is passed over).
    """
    lists = [
        (path, module) for path, module in root.named_modules() if isinstance(module, nn.ModuleList) and len(module)
    ]
    if not lists:
        return "", []
    expected = _configured_layers(root)
    right_length = [entry for entry in lists if len(entry[1]) == expected]
    path, blocks = max(right_length or lists, key=lambda entry: sum(p.numel() for p in entry[1].parameters()))
    return path, list(blocks)


def list_sites(root: nn.Module) -> list[str]:
    """The canonical names this model has, block by block."""
    names = []
    for n, block in enumerate(find_blocks(root)[1]):
        names.append(f"layers.{n}:input")
        attention = _child(block, _ATTENTION_NAMES)
        if attention is not None:
            if _projection(attention[1]) is not None:
                names.append(f"layers.{n}.attn.heads")
            names.append(f"layers.{n}.attn")
        if _child(block, _MLP_NAMES) is not None:
            names.append(f"layers.{n}.mlp")
        names.append(f"layers.{n}")
    return names


def find_site(root: nn.Module, name: str) -> Site:
    """The site called ``name``.

    Raises:
        UnweaveError: for a name the model does not have, with the near ones.
    """
    path, colon, side = name.partition(":")
    if colon and side not in ("input", "output"):
        raise UnweaveError(f"site {name!r}: after the colon expected 'input' (or 'output'), found {side!r}")
    side = "input" if side == "input" else "output"
    match = re.fullmatch(r"layers\.(\d+)(?:\.(.+))?", path)
    blocks_path, blocks = find_blocks(root) if match else ("", [])
    if match and blocks:
        n = int(match[1])
        if n >= len(blocks):
            raise UnweaveError(
                f"no site {name!r}: the model has {len(blocks)} blocks, layers.0 to layers.{len(blocks) - 1}"
            )
        site = _site_in_block(name, blocks[n], f"{blocks_path}.{n}", n, match[2] or "", side)
    else:
        module = _submodule(root, path)
        site = None if module is None else Site(name, module, path, side, f"the {side} of a module")
    if site is None:
        known = list_sites(root) + [p for p, _ in root.named_modules() if p]
        raise UnweaveError(f"no site {name!r} in this {type(root).__name__}: {near_names(name, known)}")
    return site


def _site_in_block(
    name: str, block: nn.Module, path: str, n: int, part: str, side: Literal["input", "output"]
) -> Site | None:
    if part == "":
        when = "before" if side == "input" else "after"
        return Site(name, block, path, side, f"the residual stream {when} block {n}")
    if part in ("attn", "attn.heads"):
        attention = _child(block, _ATTENTION_NAMES)
        if attention is None:
            return None
        at = f"{path}.{attention[0]}"
        if part == "attn":
            words = "what goes into" if side == "input" else "what comes out of"
            return Site(name, attention[1], at, side, f"{words} the attention of block {n}")
        projection = _projection(attention[1])
        if projection is None:
            return None
        words = f"the concatenated attention heads of block {n}, before the output projection"
        return Site(name, projection[1], f"{at}.{projection[0]}", "input", words)
    if part == "mlp":
        mlp = _child(block, _MLP_NAMES)
        if mlp is not None:
            words = "what goes into" if side == "input" else "what comes out of"
            return Site(name, mlp[1], f"{path}.{mlp[0]}", side, f"{words} the MLP of block {n}")
    module = _submodule(block, part)
    if module is None:
        return None
    return Site(name, module, f"{path}.{part}", side, f"the {side} of a module in block {n}")


def _child(block: nn.Module, names: Sequence[str]) -> tuple[str, nn.Module] | None:
    children = dict(block.named_children())
    return next(((name, children[name]) for name in names if name in children), None)


def _projection(attention: nn.Module) -> tuple[str, nn.Module] | None:
    """The output projection: the shallowest module of one of the usual names (GPT-Neo keeps it one level down)."""
    by_depth = sorted(attention.named_modules(), key=lambda entry: entry[0].count("."))
    for wanted in _PROJECTION_NAMES:
        for path, module in by_depth:
            if path.rpartition(".")[2] == wanted:
                return path, module
    return None


def _submodule(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path) if path else None
    except AttributeError:
        return None


def _configured_layers(root: nn.Module) -> int | None:
    config: Any = getattr(root, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    return getattr(config, "num_hidden_layers", None)


# ---- reading several sites in one pass --------------------------------------------------------------------------


class _AllRead(Exception):
    """Ends a forward pass once every wanted site was read."""


def capture(sites: Sequence[Site], call: Callable[[], Any]) -> dict[str, Tensor]:
    """Run ``call`` (a forward pass) and return the tensor of each site by name, without gradients.

    The pass ends at the last of the sites: nothing behind it is computed.

    Raises:
        UnweaveError: when the pass ended without computing a site.
    """
    found: dict[str, Tensor] = {}
    wanted = {site.name for site in sites}

    def reader(site: Site) -> Callable[[Tensor], None]:
        def read(tensor: Tensor) -> None:
            if site.name in found:
                return
            # What runs between here and the last site might work in place.
            found[site.name] = tensor.detach() if len(found) + 1 == len(wanted) else tensor.detach().clone()
            if found.keys() == wanted:
                raise _AllRead

        return read

    with ExitStack() as stack, torch.no_grad():
        for site in {site.name: site for site in sites}.values():
            stack.enter_context(site.hook(reader(site)))
        try:
            call()
        except _AllRead:
            return found
    missed = next(site for site in sites if site.name not in found)
    raise UnweaveError(
        f"site {missed.name!r} was not computed in a forward pass ({missed.describe()}): the model does not call "
        "this module. Choose another site."
    )


# ---- the tensor inside what modules take and give ---------------------------------------------------------------


def _stream_first(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    first = {name: kwargs[name] for name in _STREAM_KEYWORDS if isinstance(kwargs.get(name), Tensor)}
    return first or dict(kwargs)


def _first_tensor(structure: Any) -> Tensor | None:
    if isinstance(structure, Tensor):
        return structure
    parts: Any = ()
    if isinstance(structure, Mapping):
        parts = structure.values()
    elif isinstance(structure, (tuple, list)):
        parts = structure
    return next((part for part in parts if isinstance(part, Tensor)), None)


def _with_first_tensor(structure: Any, tensor: Tensor) -> Any:
    """The same structure (tuple, named tuple, list, dict, Hugging Face output) with its first tensor replaced."""
    if isinstance(structure, Tensor):
        return tensor
    if isinstance(structure, Mapping):
        key = next(key for key, part in structure.items() if isinstance(part, Tensor))
        if type(structure) is dict:
            return {**structure, key: tensor}
        return type(structure)(**{**structure, key: tensor})
    parts = list(structure)
    parts[next(i for i, part in enumerate(parts) if isinstance(part, Tensor))] = tensor
    if hasattr(structure, "_fields"):
        return type(structure)(*parts)
    return type(structure)(parts)
