"""``train_end_to_end``: a dictionary trained by what it does to the model it is spliced into (Braun et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from unweave.dictionaries import Dictionary
from unweave.errors import UnweaveError
from unweave.sources import LanguageModel, TextSource
from unweave.sources.sites import Site
from unweave.training._end_to_end import ContextStream, EndToEndConfig, EndToEndTrainer, later_sites
from unweave.training.loop import Trained, identity_of, run_in_folder
from unweave.training.trackers import Tracker


def train_end_to_end(
    dictionary: Dictionary,
    model: LanguageModel,
    source: TextSource,
    config: EndToEndConfig,
    folder: str | Path | None = None,
    *,
    trackers: Iterable[str | Tracker] | str | Tracker = (),
) -> Trained:
    """Train a dictionary so that the model predicts with it as it does without.

    At every step the model reads some contexts twice, as it is and with the rows of the source's site (its target
    site, for a transcoder) replaced by the dictionary's; see :class:`EndToEndConfig` for the loss. Exactly the
    positions that give rows in the source are replaced: padding, BOS and other special tokens, and abnormally high
    norms stay as they are. The model does not change. Braun et al. 2024, "Identifying functionally important features
    with end-to-end sparse dictionary learning", arXiv:2405.12241.

    Files, log and resume are those of :func:`~unweave.training.train`; ``loss`` in the log is the part that went
    through the model (``kl``, ``downstream``) and the weighted ``mse``, the dictionary's own penalties stand beside it.

    Args:
        dictionary: of any architecture that learns by gradient and takes no side inputs; trained in place, on the
            device it is on.
        model: what to splice it into. source: which contexts, and which of their positions give rows.
        folder, trackers: as for ``train``.

    Raises:
        UnweaveError: for a source of another model, a dictionary that learns without gradients or with side inputs,
            or what ``train`` raises.
    """
    if source.model is not model:
        raise UnweaveError(f"the source reads {source.model.name!r}, not the model given: make the source from it")
    check_end_to_end(dictionary, source, config)
    return run_in_folder(
        lambda: EndToEndTrainer(dictionary, ContextStream(source, config.batch_size), model, config),
        dictionary,
        config,
        identity_of(dictionary, config, source),
        folder,
        trackers,
    )


def check_end_to_end(dictionary: Dictionary, source: object, config: EndToEndConfig) -> None:
    """Raise unless this dictionary can be trained through the model of this source.

    Raises:
        UnweaveError: for rows that are not of one model's text, a site that is several, a model in float16, no site
            behind to compare at; a dictionary that learns without gradients or with side inputs.
    """
    if not isinstance(source, TextSource):
        found = "rows of several, joined" if hasattr(source, "joined") else repr(source)
        raise UnweaveError(f"end-to-end training runs one language model on text at every step, found {found}")
    site = source.target_site
    if not isinstance(site, Site):
        raise UnweaveError(
            f"end-to-end training splices into one site, and {site.name} is several: train on their rows instead"
        )
    if source.model.dtype == torch.float16:
        raise UnweaveError("gradients in float16 underflow: load the model in bfloat16 or float32")
    if not dictionary.learns_by_gradient:
        raise UnweaveError(f"{dictionary.name} learns without gradients: nothing can reach it through a model")
    if dictionary.needs_side:
        raise UnweaveError(
            f"{dictionary.name} chooses or learns by side inputs ({dictionary.needs_side}), which its reconstruction "
            "in the model does not see: train it on rows instead"
        )
    later_sites(source.model, site, config)
