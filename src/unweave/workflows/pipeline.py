"""From a recipe to a run folder: harvest, train, evaluate, index. Every stage picks up where it was left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from unweave.batch import ActivationBatch
from unweave.errors import NoText, UnweaveError
from unweave.files import read_json
from unweave.runs.opening import open_against, open_documents, open_model, open_source
from unweave.runs.provenance import environment, now, update_provenance
from unweave.runs.recipe import EvaluationRecipe, IndexRecipe, Recipe
from unweave.workflows.harvesting import Say, fill_store

if TYPE_CHECKING:
    from torch import Tensor

    from unweave.activations import ActivationStore
    from unweave.dictionaries import Dictionary, DictionaryConfig
    from unweave.evaluation import Evaluation
    from unweave.features import FeatureStore, Origin
    from unweave.sources import Documents, JoinedSource, LanguageModel, TextSource
    from unweave.training import TrainingConfig

_AROUND = 24  # tokens of text kept on each side of an atom's own


class Pipeline:
    """One run folder in the making. ``say`` gets a line for the user at every turn.

    A finished stage is read back, not repeated; a killed one continues from its last shard or checkpoint and ends
    bit for bit (on a CPU) as if it had never been interrupted.
    """

    def __init__(self, recipe: Recipe, folder: str | Path, say: Say = print) -> None:
        self.recipe, self.folder, self.say = _settled(recipe), Path(folder), say
        self._remeasure = False
        if (self.folder / "recipe.yaml").is_file():
            self._compare_recipes(Recipe.of_run(self.folder))

    def _compare_recipes(self, there: Recipe) -> None:
        """Refuse a recipe that contradicts work already in the folder; what has not been used yet may change."""
        trained = (self.folder / "training.json").is_file() or any(self.folder.glob("checkpoints/*.safetensors"))
        harvested = (self.folder / "activations" / "manifest.json").is_file()
        decided = {"model", "against", "data", "source"} if harvested or trained else set()
        decided |= {"store", "dictionary", "training"} if trained else set()
        old, new = there.to_dict(), self.recipe.to_dict()
        changes = list(_differences({k: old[k] for k in decided}, {k: new[k] for k in decided}))
        changes = [c for c in changes if trained or c[0] != "source.tokens"]  # an unfinished store may still grow
        if changes:
            name, before, now_ = changes[0]
            more = f" (and {len(changes) - 1} more)" if len(changes) > 1 else ""
            raise UnweaveError(
                f"{self.folder} was begun with another recipe: {name} is {before!r} there and {now_!r} now{more}. "
                "Choose another folder with --out, or repeat the old settings to continue."
            )
        self._remeasure = old["evaluation"] != new["evaluation"]

    def _begin(self) -> None:
        """Write down what is about to be done, once everything in it was found to make sense."""
        self.recipe.to_yaml(self.folder / "recipe.yaml")
        update_provenance(self.folder, **environment())

    # ---- what the stages share --------------------------------------------------------------------------------

    @cached_property
    def model(self) -> LanguageModel:
        self.say(f"loading the model {self.recipe.model.name}")
        return open_model(self.recipe)

    @cached_property
    def against(self) -> LanguageModel | None:
        """The model to compare with, if there is one."""
        if self.recipe.against is not None:
            self.say(f"loading the model {self.recipe.against.name}")
        return open_against(self.recipe, self.model)

    @cached_property
    def documents(self) -> Documents:
        documents = open_documents(self.recipe)
        self.say(f"text: {documents.describe()}")
        return documents

    @cached_property
    def source(self) -> TextSource | JoinedSource:
        return self._source()

    def _source(self, split: Literal["train", "held_out"] = "train", with_side: bool = True) -> Any:
        return open_source(self.recipe, self.model, self.documents, split, with_side, self.against)

    @cached_property
    def store(self) -> ActivationStore | None:
        """The activations on disk, if this run uses any."""
        from unweave.activations import ActivationStore

        if self.recipe.store:
            return ActivationStore.open(self.recipe.store)
        if self.recipe.source.stream:
            return None
        folder = self.folder / "activations"
        there = ActivationStore.open(folder) if (folder / "manifest.json").is_file() else None
        if there is not None and (self.folder / "training.json").is_file():
            return there  # measuring a finished run must not touch what it was made with
        return self._harvest(folder, 0 if there is None else there.n_rows)

    def _timed(self, stage: str, started: float, **facts: Any) -> None:
        seconds = round(time.monotonic() - started, 2)
        update_provenance(self.folder, stages={stage: {"seconds": seconds, "finished": now(), **facts}})

    # ---- the stages -------------------------------------------------------------------------------------------

    def run(self) -> Evaluation | None:
        """All stages of the recipe; the evaluation, if there is one."""
        self.train()
        evaluation = None
        if self.recipe.evaluation:
            try:
                evaluation = self.evaluate(again=self._remeasure)
            except NoText as error:  # too little text to hold some out: the rest of the run is none the worse
                self.say(f"note: not evaluated, since there is {error}")
        if self.recipe.index:
            self.index()
        return evaluation

    def _harvest(self, folder: Path, n_there: int) -> ActivationStore:
        from unweave.training.trackers import make_trackers

        started = time.monotonic()
        wanted = dictionary_config(self.recipe, self.source)  # mistakes should show before the work, not after
        if self.recipe.dictionary.start is not None:
            _started(self.recipe.dictionary.start, wanted)
        make_trackers(self.recipe.trackers)
        self._begin()
        store = fill_store(self.recipe, self.source, folder, self.say)
        if store.n_rows > n_there:
            seconds = time.monotonic() - started
            self.say(f"harvested {store.n_rows:,} activations of {store.n_items:,} contexts in {seconds:.0f} s")
            self._timed("harvest", started, rows=store.n_rows, tokens=store.n_tokens)
        return store

    def train(self) -> Dictionary:
        from unweave.activations import RowStream
        from unweave.training import EndToEndConfig, train, train_end_to_end

        if (self.folder / "training.json").is_file():
            return self.dictionary
        dictionary, config = self.prepare()
        started, trackers = time.monotonic(), self.recipe.trackers
        if isinstance(config, EndToEndConfig):
            source = cast("TextSource", self.source)  # it was checked
            trained = train_end_to_end(dictionary, self.model, source, config, self.folder, trackers=trackers)
        else:
            stream = RowStream(self.origin, seed=config.seed)
            trained = train(dictionary, stream, config, self.folder, trackers=trackers)
        self._timed("train", started, rows=config.n_rows)
        for line in trained.health:
            self.say(f"note: {line}")
        return self.dictionary

    @property
    def origin(self) -> ActivationStore | TextSource | JoinedSource:
        """Where the rows come from."""
        return self.source if self.store is None else self.store

    def share(self, other: Pipeline) -> None:
        """Use another run's model, text and activations, which must be the same as this one's."""
        for name in ("model", "against", "documents", "source", "store"):
            if name in vars(other):
                setattr(self, name, vars(other)[name])

    def prepare(self) -> tuple[Dictionary, TrainingConfig]:
        """The dictionary as training will find it, and how it will be trained; the recipe is written down."""
        dictionary, config = self.build()
        self._begin()
        update_provenance(self.folder, source=self.origin.provenance, seed=config.seed)
        n_available = self._n_available
        self.say(
            f"training {dictionary.name}: {dictionary.d_in} -> {dictionary.n_features:,} features on "
            f"{config.n_rows:,} rows ({config.n_rows / n_available:.1f} passes over {n_available:,})"
            + ("" if config.by_reconstruction else f", end to end ({self.recipe.training.objective})")
        )
        return dictionary, config

    def build(self) -> tuple[Dictionary, TrainingConfig]:
        """The dictionary with its first weights, and how it will be trained."""
        import torch

        from unweave.dictionaries import get
        from unweave.sources import parse_device
        from unweave.training import EndToEndConfig, check_end_to_end

        recipe = self.recipe
        config = recipe.training.resolve(self._n_available)
        torch.manual_seed(config.seed if recipe.dictionary.seed is None else recipe.dictionary.seed)
        wanted = dictionary_config(recipe, self.origin)
        if recipe.dictionary.start is not None:
            made, config = _started(recipe.dictionary.start, wanted), config.replace(continued=True)
        else:
            made = get(recipe.dictionary.arch)(wanted)
        if isinstance(config, EndToEndConfig):
            check_end_to_end(made, self.origin, config)
        return made.to(parse_device(recipe.model.device)), config

    @property
    def _n_available(self) -> int:
        wanted = self.recipe.source.tokens
        return wanted if self.store is None else min(self.store.n_rows, wanted)

    @cached_property
    def dictionary(self) -> Dictionary:
        from unweave.runs import Run

        return Run(self.folder).dictionary

    def evaluate(
        self, settings: EvaluationRecipe | None = None, again: bool = False, force: bool = False
    ) -> Evaluation:
        """The measurements of the run, made if there are none or ``again``; ``force`` as for ``unweave.evaluate``."""
        from unweave.evaluation import Evaluation, evaluate

        path = self.folder / "evaluation.json"
        if path.is_file() and not again:
            return Evaluation.load(path)
        settings = settings or self.recipe.evaluation or EvaluationRecipe()
        started = time.monotonic()
        held_out = self._source("held_out", with_side=False)
        evaluation = evaluate(
            self.dictionary,
            held_out,
            model=self.model if settings.loss_tokens else None,
            n_rows=settings.tokens,
            n_loss_tokens=settings.loss_tokens,
            baselines=settings.baselines,
            n_bootstrap=settings.n_bootstrap,
            fit=self.store,
            trained_on=read_json(self.folder / "provenance.json").get("source"),
            force=force,
        )
        if (reason := evaluation.data.get("loss_left_out")) is not None:
            self.say(f"note: the loss metrics are left out: {reason}")
        if (note := evaluation.data.get("note")) is not None:
            self.say(f"note: {note}")
        evaluation.save(path)
        self._timed("evaluate", started)
        return evaluation

    def index(self, settings: IndexRecipe | None = None, again: bool = False, force: bool = False) -> FeatureStore:
        """The feature store of the run, built if there is none or ``again``; ``force`` as for ``build_features``."""
        from unweave.dictionaries._origin import check_origin
        from unweave.features import FeatureStore, IndexConfig, build_features

        folder = self.folder / "features"
        if (folder / "manifest.json").is_file() and not again:
            return FeatureStore.open(folder)
        settings = settings or self.recipe.index or IndexRecipe()
        if not force:  # stored rows are of the right model; tokens and logits come from the one that is opened now
            used = [{"model": one.provenance} for one in (self.model, self.against) if one is not None]
            place = used[0] if len(used) == 1 else {"sources": used}
            check_origin(self.dictionary.trained_on, place, "indexed with")
        origin, rows = self.origin, self.origin
        if self.store is None and self.recipe.source.side:  # gradients would be made for nothing
            rows = self._source(with_side=False)
        n_rows = min(settings.tokens, self.recipe.source.tokens if self.store is None else self.store.n_rows)
        started = time.monotonic()
        features = build_features(
            folder,
            self.dictionary,
            first_rows(rows.batches(), n_rows),
            token_bytes=self.model.token_bytes(),
            unembed=self._unembed(origin.provenance),
            origins=self._origins(),
            config=IndexConfig(**{name: getattr(settings, name) for name in IndexConfig.model_fields}),
            n_rows=n_rows,
            provenance=origin.provenance,
            force=force,
        )
        self._timed("index", started, rows=n_rows)
        return features

    def _origins(self) -> dict[int, Origin] | None:
        """The rows that the atoms are, with their texts, where the dictionary is made of rows; one more pass."""
        if not self.dictionary.atoms_are_rows:
            return None
        from unweave.analysis import atom_sources
        from unweave.features import Origin, decode_tokens

        n_rows = self.recipe.source.tokens if self.store is None else self.store.n_rows
        pieces = self.model.token_bytes()
        found = atom_sources(
            self.dictionary,
            _First(self.origin, n_rows),
            token_strings=lambda tokens: decode_tokens([pieces[token] for token in tokens]),
            context=_AROUND,
        )
        self.say(f"found the text of {len(found):,} of {self.dictionary.n_features:,} atoms")
        return {feature: Origin(s.document, s.position, s.before, s.text, s.after) for feature, s in found.items()}

    def _unembed(self, provenance: Mapping[str, Any]) -> Callable[[Tensor], Tensor] | None:
        """What atoms do to the logits, where they live in the residual stream, so that the output head can read them.

        Of a composite site the last part that does is read; of two models the one where the atom is the longer, each
        norm in units of the rows there.
        """
        import torch

        if self.against is None:
            columns = _in_the_stream(provenance, self.model, self.dictionary.d_out)
            return None if columns is None else lambda directions: self.model.unembed(directions[:, columns])
        half = self.dictionary.d_out // 2
        units = getattr(self.dictionary, "part_rms", torch.ones(2))
        read = [
            (one, _in_the_stream(source, one, half))
            for one, source in zip((self.model, self.against), provenance["sources"])
        ]

        def effect(directions: Tensor) -> Tensor:
            atoms = directions.split(half, dim=1)
            lengths = torch.stack([atom.norm(dim=1) for atom in atoms], dim=1) / units
            logits = [model.unembed(atom[:, columns]) for (model, columns), atom in zip(read, atoms)]
            n = min(one.shape[1] for one in logits)  # one may have its output padded
            return torch.where((lengths[:, 0] >= lengths[:, 1])[:, None], *(one[:, :n] for one in logits))

        return None if any(columns is None for _, columns in read) else effect


def _started(folder: str, wanted: DictionaryConfig) -> Dictionary:
    """The dictionary of a run, to be trained further."""
    from unweave.runs import Run

    made = Run(folder).dictionary
    if made.config != wanted:
        changes = _differences(made.config.to_dict(), wanted.to_dict())
        name, there, now_ = next(changes, ("arch", made.name, "another"))
        raise UnweaveError(
            f"going on from {folder} means with its dictionary: {name} is {there!r} there and {now_!r} now; leave "
            "the settings of the dictionary out, and name the site it was trained on"
        )
    if not made.learns_by_gradient or "n_parts" in type(made.config).model_fields:
        why = "takes rows of several parts" if made.learns_by_gradient else "learns without gradients"
        raise UnweaveError(f"{made.name} {why}: it cannot be gone on from, train it anew")
    return made


def _in_the_stream(provenance: Mapping[str, Any], model: LanguageModel, width: int) -> slice | None:
    """The columns of a source's target rows that are in the residual stream, the last of several; None if none are."""
    from unweave.sources import target_parts

    found, end = None, 0
    for part in target_parts(provenance) or [{"site": provenance["target_site"], "width": width}]:
        start, end = end, end + part["width"]
        if part["site"] in model.sites() and not part["site"].endswith(".heads"):
            found = slice(start, end)
    return found


class _First:
    """The beginning of a source, which may be far longer than what was used of it."""

    def __init__(self, origin: Any, n_rows: int) -> None:
        self.d_in, self._origin, self._n_rows = origin.d_in, origin, n_rows

    def batches(self) -> Iterator[ActivationBatch]:
        return first_rows(self._origin.batches(), self._n_rows)


def first_rows(batches: Iterable[ActivationBatch], n_rows: int) -> Iterator[ActivationBatch]:
    """Whole batches until ``n_rows`` rows have gone by."""
    seen = 0
    for batch in batches:
        if seen >= n_rows:
            return
        yield batch
        seen += batch.n_rows


def dictionary_config(recipe: Recipe, origin: ActivationStore | TextSource | JoinedSource) -> DictionaryConfig:
    """The config of a recipe's dictionary, for rows of that width.

    Raises:
        UnweaveError: for an unknown architecture, or options that make no sense.
    """
    from unweave.dictionaries import get
    from unweave.dictionaries._base import no_side
    from unweave.training.fit import parts_option

    wanted = recipe.dictionary
    kind, options = get(wanted.arch), dict(wanted.options)
    if kind.needs_side and recipe.source.side != kind.needs_side:
        raise no_side(kind, recipe.source.side)
    if recipe.source.target_site and "subtract_bias" in kind.Config.model_fields:
        options.setdefault("subtract_bias", False)
    options |= parts_option(kind, origin, options)
    widths = {"d_in": origin.d_in, "d_out": origin.d_out, "n_features": wanted.width(origin.d_in)}
    return kind.Config(**widths, **options)


def _settled(recipe: Recipe) -> Recipe:
    """The recipe with what follows from it: no store for end-to-end training, and the side inputs its architecture
    cannot do without, where it collects its own activations."""
    from unweave.dictionaries import get

    kind = get(recipe.dictionary.arch)
    if recipe.training.objective != "mse":
        recipe = recipe.replace(source=recipe.source.replace(stream=True))
    if not kind.needs_side or recipe.source.side is not None or recipe.store is not None:
        return recipe
    return recipe.replace(source=recipe.source.replace(side=kind.needs_side))


def _differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield f"{prefix}{key}", a, b
