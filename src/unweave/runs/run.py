"""A run folder, read: ``run = unweave.load("run/")``; other libraries' checkpoints through the same door."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from unweave.codes import SparseCode
from unweave.config import read_yaml
from unweave.errors import UnweaveError
from unweave.files import read_json

if TYPE_CHECKING:
    from unweave.dictionaries import Dictionary
    from unweave.features import FeatureStore
    from unweave.runs.recipe import Recipe
    from unweave.sources import LanguageModel


def load(thing: str | Path, *, model: str | None = None, force: bool = False, **options: Any) -> Run | Dictionary:
    """Open a run folder, or read a dictionary that unweave or another library saved.

    Args:
        thing: what ``unweave train`` or ``unweave demo`` wrote (nothing heavy of it is read until it is asked for); or
            a checkpoint: a folder, a file, a path into a zip archive, a hub id.
        model: of a run: where the model is now, if not where it was when the run was made.
        force: of a run: go on although that model is not the one the dictionary was trained on.
        options: of a checkpoint: ``format``, and what its files do not say; see :func:`unweave.formats.load`.

    Returns:
        Run or Dictionary: the second in eval mode, for raw activation rows.

    Raises:
        UnweaveError: when it is neither, or broken; for arguments that are of the other kind.
    """
    from unweave import formats

    path = Path(thing)
    is_run = any((path / name).exists() for name in ("dictionary/config.json", "recipe.yaml", "features/manifest.json"))
    if is_run and options:
        raise UnweaveError(f"{thing} is a run, which says all of itself: leave {', '.join(options)} out")
    if is_run or not (options or formats.holds_weights(thing)):
        return Run(path, model=model, force=force)
    if model is not None or force:
        raise UnweaveError(f"{thing} is no run but a checkpoint: model and force mean nothing to it, leave them out")
    return formats.load(thing, **options)


@dataclass(frozen=True)
class TextCode:
    """A text, token by token, and its code.

    Attributes:
        tokens: the tokens' texts; joined they are the text.
        code: one row per token.
    """

    tokens: list[str]
    code: SparseCode

    def __len__(self) -> int:
        return len(self.tokens)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.tokens, self.code))  # tokens, code = run.encode(text)

    def top(self, n: int = 10) -> list[tuple[int, float]]:
        """The ``n`` features with the highest peak in the text, as ``(feature, peak)``."""
        return self.code.top(n)

    def values(self, feature: int) -> list[float]:
        """The value of one feature on every token."""
        return self.code.feature(feature).tolist()

    def __repr__(self) -> str:
        lines = [f"TextCode({len(self)} tokens, {self.code.n_features:,} features)"]
        for feature, peak in self.top(8):
            values = self.values(feature)
            at = max(range(len(values)), key=lambda i: abs(values[i]))
            lines.append(f"  {feature:>7}  {peak:8.2f}  at {self.tokens[at]!r}")
        return "\n".join(lines)


class Run:
    """A trained dictionary with all that is known of it.

    ``encode`` gives the code of a text, ``features`` the feature store, ``evaluation`` the measurements. A run of
    imported codes may have features alone.
    """

    def __init__(self, folder: str | Path, *, model: str | None = None, force: bool = False) -> None:
        self.folder = Path(folder)
        self._model_name, self._force = model, force
        if not self.folder.is_dir():
            raise UnweaveError(f"no folder {self.folder}: give the folder that `unweave train` or `unweave demo` wrote")
        if not self.has_dictionary and not (self.folder / "features" / "manifest.json").is_file():
            begun = (self.folder / "recipe.yaml").is_file()
            raise UnweaveError(
                f"{self.folder} was begun but holds no dictionary yet; run the same command again to finish it"
                if begun
                else f"{self.folder} is not a run: it has no dictionary/. `unweave inspect {self.folder}` may know it"
            )

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @cached_property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe, as written; empty for a dictionary trained on plain vectors."""
        path = self.folder / "recipe.yaml"
        return read_yaml(path) if path.is_file() else {}

    @cached_property
    def provenance(self) -> dict[str, Any]:
        path = self.folder / "provenance.json"
        return read_json(path) if path.is_file() else {}

    @property
    def evaluation(self) -> dict[str, Any] | None:
        """What ``evaluation.json`` says, or None."""
        path = self.folder / "evaluation.json"
        return read_json(path) if path.is_file() else None

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of the training log, also of a training still going on."""
        from unweave.training import read_metrics

        return read_metrics(self.folder / "metrics.jsonl")

    @property
    def has_dictionary(self) -> bool:
        return (self.folder / "dictionary" / "config.json").is_file()

    @cached_property
    def dictionary(self) -> Dictionary:
        """
        Raises:
            UnweaveError: for a run of codes that were imported without the dictionary they came from.
        """
        from unweave.dictionaries import Dictionary

        if not self.has_dictionary:
            raise UnweaveError(
                f"{self.folder} holds imported codes and no dictionary: import them again with the one they came from "
                "(--dictionary), or encode with that one"
            )
        dictionary = Dictionary.load(self.folder / "dictionary")
        dictionary.trained_on = self.provenance.get("source", {})
        return dictionary

    @cached_property
    def features(self) -> FeatureStore | None:
        """The feature store, or None before ``unweave index``."""
        from unweave.features import FeatureStore

        folder = self.folder / "features"
        return FeatureStore.open(folder) if folder.is_dir() else None

    # ---- the model --------------------------------------------------------------------------------------------

    @cached_property
    def _parsed_recipe(self) -> Recipe:
        from unweave.runs.recipe import Recipe

        if not self.recipe:
            raise UnweaveError(f"{self.folder} was trained on plain vectors: it has no model to run a text through")
        recipe = Recipe.from_dict(self.recipe)
        if self._model_name:
            recipe = recipe.replace(model=recipe.model.replace(name=self._model_name, revision=None))
        return recipe

    @property
    def has_model(self) -> bool:
        return bool(self.recipe)

    @cached_property
    def model(self) -> LanguageModel:
        """The language model, loaded on first use.

        Raises:
            UnweaveError: when it is not the model the dictionary was trained on, unless ``force`` was given.
        """
        from unweave.runs.opening import open_model

        model = open_model(self._parsed_recipe)
        if not self._force:
            self._check_model(model)
        return model

    @cached_property
    def against(self) -> LanguageModel | None:
        """The second model of a run that compares two, loaded on first use; None for any other run.

        Raises:
            UnweaveError: as :attr:`model`.
        """
        from unweave.runs.opening import open_against

        against = open_against(self._parsed_recipe, self.model)
        if against is not None and not self._force:
            self._check_model(against, 1)
        return against

    def _check_model(self, model: LanguageModel, number: int = 0) -> None:
        from unweave.dictionaries._origin import same_model

        source = self.provenance.get("source", {})
        trained_on = source.get("sources", [source] * 2)[number].get("model", {})
        found = model.provenance
        for key in ("sha256", "revision", "d_model", "n_layers"):
            if key in trained_on and key in found and trained_on[key] != found[key]:
                raise UnweaveError(
                    f"{self.folder} was trained on {trained_on.get('name')} ({key} {trained_on[key]}), but "
                    f"{found.get('name')} has {key} {found[key]}. Give the right model, or force=True (--force)."
                )
        if self._model_name and number == 0 and same_model(trained_on, found) is not True:
            raise UnweaveError(
                f"nothing tells whether {found.get('name')} is the model that {self.folder} was trained on, "
                f"{trained_on.get('name', 'which is not known')}. If it is, say so by force=True (--force)."
            )

    def encode(self, text: str) -> TextCode:
        """Run a text through the model and the dictionary.

        The text is cut into contexts as the training text was; BOS is prepended and dropped again likewise.

        Returns:
            TextCode: one row of code per token of the text.

        Raises:
            UnweaveError: for an empty text, or a run without a model.
        """
        from unweave.features import decode_tokens

        if not text.strip():
            raise UnweaveError("the text is empty: give at least one word to encode")
        tokens, rows = self._rows(text)
        with torch.no_grad():
            code = self.dictionary.encode(rows.float())
        vocabulary = self.model.token_bytes()
        return TextCode(decode_tokens([vocabulary[int(token)] for token in tokens]), code)

    def _rows(self, text: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens ``(t,)`` of a text and their activations ``(t, d)``, made the way the training rows were.

        Only the filters are off (special and high-norm tokens get a row too), so that every token has a code.
        """
        from unweave.sources import JoinedSource, TextSource

        recipe = self._parsed_recipe.source
        longest = self.model.max_context or recipe.context_size  # of dialogues a recipe may ask for more
        each = [
            TextSource(
                model,
                [text],
                recipe.site,
                context_size=min(recipe.context_size, longest),
                batch_tokens=recipe.batch_tokens,
                bos=recipe.bos,
                keep_special=True,
                max_norm_ratio=None,
                split="all",
                min_tokens=1,
            )
            for model in (self.model, self.against)
            if model is not None
        ]
        tokens, rows, positions = [], [], []
        for batch in (each[0] if len(each) == 1 else JoinedSource(each)).batches():
            keep = torch.ones(batch.n_rows, dtype=torch.bool)
            if each[0].plan.prefix:
                keep[batch.items.offsets[:-1]] = False
            tokens.append(batch.meta.token[keep])
            rows.append(batch.input[keep])
            positions.append(batch.meta.position[keep])
        order = torch.cat(positions).argsort()
        return torch.cat(tokens)[order], torch.cat(rows)[order]

    # ---- shown ------------------------------------------------------------------------------------------------

    def _dictionary_words(self) -> str:
        if not self.has_dictionary:
            return f"codes of {len(self.features or ()):,} features, without their dictionary"
        return f"{self.dictionary.name}, {self.dictionary.d_in} -> {self.dictionary.n_features:,} features"

    def __repr__(self) -> str:
        lines = [f"Run {self.folder}: {self._dictionary_words()}"]
        if self.recipe:
            against = f" against {self.recipe['against']['name']}" if self.recipe.get("against") else ""
            lines.append(f"  model {self.recipe['model']['name']}{against}, site {self.recipe['source']['site']}")
        metrics = (self.evaluation or {}).get("metrics", {})
        shown = [f"{name} {entry['value']:.4g}" for name, entry in metrics.items() if entry.get("value") is not None]
        if shown:
            lines.append("  " + ", ".join(shown[:6]))
        lines.append(f"  features: {'indexed' if self.features is not None else 'not indexed yet (unweave index)'}")
        return "\n".join(lines)
