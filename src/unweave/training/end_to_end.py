"""``train_end_to_end``: a dictionary trained by what it does to the model it is spliced into (Braun et al. 2024)."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from unweave.dictionaries import Dictionary
from unweave.errors import UnweaveError
from unweave.sources import LanguageModel, TextSource
from unweave.training._end_to_end import ContextStream, EndToEndConfig, EndToEndTrainer
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
    if not dictionary.learns_by_gradient:
        raise UnweaveError(f"{dictionary.name} learns without gradients: nothing can reach it through a model")
    if dictionary.needs_side:
        raise UnweaveError(
            f"{dictionary.name} chooses or learns by side inputs ({dictionary.needs_side}), which its reconstruction "
            "in the model does not see: train it on rows instead"
        )
    return run_in_folder(
        lambda: EndToEndTrainer(dictionary, ContextStream(source, config.batch_size), model, config),
        dictionary,
        config,
        identity_of(dictionary, config, source),
        folder,
        trackers,
    )
