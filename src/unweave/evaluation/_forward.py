"""Running a language model many times with different things spliced in at one site.

Two ways, which give the same numbers:

- :class:`WholeForward` runs the whole model for every variant.
- :class:`ReplayForward` runs the model once, notes what each block from the site on was called with, and for every
  variant calls only those blocks again, then the final norm; the head is applied a few positions at a time. It is
  used only where, on the first batch, it reproduces the model's own output bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from unweave.errors import UnweaveError
from unweave.interventions import RowEdit, splice
from unweave.sources import Contexts
from unweave.sources.composite import AnySite
from unweave.sources.sites import Site, find_blocks

Edit = tuple[RowEdit, Site]  # what to write at the target site, and the site whose rows it is given

#: Logits are made so many bytes (as float32) at a time; a few such tensors exist at once.
LOGIT_BYTES = 50_000_000


class Forward(Protocol):
    """``states`` of the clean model first, then of any number of variants of the same contexts."""

    def split(self, contexts: Contexts) -> Iterator[Contexts]: ...

    def clean(self, contexts: Contexts) -> Tensor: ...

    def spliced(self, contexts: Contexts, edit: Edit) -> Tensor: ...

    def logits(self, states: Tensor) -> Tensor: ...


class WholeForward:
    """The whole model for each variant; ``states`` are the logits ``(n_targets, vocab)``."""

    def __init__(self, model: nn.Module, target: Site, vocab: int) -> None:
        self.model, self.target, self.vocab = model, target, vocab

    def split(self, contexts: Contexts) -> Iterator[Contexts]:
        """Contexts few enough that their logits stay small; at least one at a time."""
        step = max(1, LOGIT_BYTES // (4 * self.vocab * contexts.tokens.shape[1]))
        for i in range(0, len(contexts), step):
            yield contexts[i : i + step]

    def clean(self, contexts: Contexts) -> Tensor:
        return _run(self.model, contexts).logits[contexts.predicts]

    def spliced(self, contexts: Contexts, edit: Edit) -> Tensor:
        with splice(self.model, self.target, edit[0], contexts.spliced, read=edit[1]):
            return self.clean(contexts)

    def logits(self, states: Tensor) -> Tensor:
        return states


class RowsForward(WholeForward):
    """The whole model, with rows that are made beforehand written at one site or several; the others follow.

    What is written is made of the rows of the untouched model at all sites, so what goes in at one changes nothing of
    what goes in behind it.
    """

    def __init__(self, model: Any, site: AnySite) -> None:
        super().__init__(model.model, site.parts[0], model.model.config.get_text_config().vocab_size)
        self.sites, self.widths = site.parts, model.widths(site)

    def spliced(self, contexts: Contexts, edit: Any) -> Tensor:
        """``edit``: a function, and the ``(n, d)`` rows of the spliced positions that it is given."""
        fn, given = edit
        with ExitStack() as stack:
            for site, rows in zip(self.sites, fn(given).split(self.widths, dim=1)):
                stack.enter_context(splice(self.model, site, _always(rows), contexts.spliced))
            return self.clean(contexts)


class ReplayForward:
    """Blocks below the site run once; ``states`` are what the head is given, ``(n_targets, d)``."""

    def __init__(self, model: nn.Module, target: Site, blocks: list[nn.Module], first: int, head: nn.Module) -> None:
        self.model, self.target, self.head = model, target, head
        self.blocks = blocks[first:]
        self.tail: list[nn.Module] = []
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    @classmethod
    def build(cls, model: nn.Module, target: Site, read: Site, contexts: Contexts) -> ReplayForward | None:
        """A forward proven on ``contexts`` to match the model bit for bit, or None where that cannot be had."""
        blocks = find_blocks(model)[1]
        numbers = [_block_of(site, blocks) for site in (target, read)]
        get_head: Any = getattr(model, "get_output_embeddings", None)
        head = None if get_head is None else get_head()
        if head is None or None in numbers:
            return None
        forward = cls(model, target, blocks, min(n for n in numbers if n is not None), head)
        try:
            return forward if forward._find_tail(contexts) and forward._matches(contexts) else None
        except (UnweaveError, TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError):
            return None  # blocks that cannot be called by themselves; if it is the model, the whole run will tell

    def split(self, contexts: Contexts) -> Iterator[Contexts]:
        yield contexts

    def clean(self, contexts: Contexts) -> Tensor:
        return self._clean(contexts)[contexts.predicts]

    def spliced(self, contexts: Contexts, edit: Edit) -> Tensor:
        with splice(self.model, self.target, edit[0], contexts.spliced, read=edit[1]):
            return self._replay()[contexts.predicts]

    def logits(self, states: Tensor) -> Tensor:
        logits, config = self.head(states), self.model.config.get_text_config()  # pyright: ignore
        # What models do to their logits after the head; build() compares with the model's own, so nothing is missed.
        if scaling := getattr(config, "logits_scaling", None):
            logits = logits / scaling
        if scale := getattr(config, "logit_scale", None):
            logits = logits * scale
        if cap := getattr(config, "final_logit_softcapping", None):
            logits = torch.tanh(logits / cap) * cap
        return logits

    def _clean(self, contexts: Contexts) -> Tensor:
        """``(b, t, d)`` head input of the untouched model; notes the calls of the blocks on the way."""
        self._calls = []
        found: list[Tensor] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._calls.append((args, kwargs))

        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            found.append(args[0])
            raise _HeadReached

        with ExitStack() as stack:
            for block in self.blocks:
                stack.callback(block.register_forward_pre_hook(note, with_kwargs=True).remove)
            stack.callback(self.head.register_forward_pre_hook(stop).remove)
            with suppress(_HeadReached):
                _run(self.model, contexts)
        return found[0]

    def _replay(self) -> Tensor:
        stream: Any = None
        for block, (args, kwargs) in zip(self.blocks, self._calls):
            if stream is None:
                output = block(*args, **kwargs)
            else:
                with _stream_into(block).hook(_always(stream)):
                    output = block(*args, **kwargs)
            stream = Site("", block, "", "output", "").read(args, kwargs, output)
        assert stream is not None, "there is at least the site's own block"
        for module in self.tail:
            stream = module(stream)
        return stream

    def _find_tail(self, contexts: Contexts) -> bool:
        """Find the modules between the last block and the head by following the tensor through one forward."""
        inside = {id(m) for block in find_blocks(self.model)[1] for m in block.modules()}
        seen: list[tuple[nn.Module, Tensor, Tensor]] = []

        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                seen.append((module, args[0], output))

        last: list[Tensor] = []
        end = Site("", self.blocks[-1], "", "output", "")
        with ExitStack() as stack:
            for module in self.model.modules():
                if id(module) not in inside and not any(True for _ in module.children()):
                    stack.callback(module.register_forward_hook(note).remove)
            stack.enter_context(end.hook(last.append))
            goal = self._clean(contexts)
        stream = last[-1]
        while not _same(stream, goal):
            step = next((s for s in seen if _same(s[1], stream) and not _same(s[2], stream)), None)
            if step is None:
                return False
            self.tail.append(step[0])
            stream = step[2]
        return True

    def _matches(self, contexts: Contexts) -> bool:
        clean = self._clean(contexts)
        if len(self._calls) != len(self.blocks) or not torch.equal(self._replay(), clean):
            return False
        one = contexts[:1]
        return torch.equal(self.logits(self._clean(one)), _run(self.model, one).logits)


class _HeadReached(Exception):
    pass


def _run(model: nn.Module, contexts: Contexts) -> Any:
    return model(input_ids=contexts.tokens, attention_mask=contexts.real.long(), use_cache=False)


def _block_of(site: Site, blocks: list[nn.Module]) -> int | None:
    return next((n for n, block in enumerate(blocks) if any(m is site.module for m in block.modules())), None)


def _stream_into(block: nn.Module) -> Site:
    return Site("", block, "", "input", "")


def _always(stream: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda _: stream


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape)
