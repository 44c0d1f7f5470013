"""What the league is played on: synthetic worlds whose features are known, and rows of a language model.

Most architectures reconstruct the row they read. Those that map one site to another, or several to several, have
worlds and sites of their own, and there those of the usual kind that can stand beside them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unweave import dictionaries
from unweave.activations import ActivationStore, RowStream
from unweave.batch import ActivationBatch
from unweave.dictionaries import Dictionary
from unweave.evaluation import Evaluation, evaluate
from unweave.evaluation.synthetic import Hierarchy, SyntheticConfig, SyntheticSource, match, recover
from unweave.evaluation.synthetic.world import World
from unweave.kernels.decode.reference import decode
from unweave.runs.recipe import Recipe
from unweave.training import TrainingConfig, train
from unweave.workflows.harvesting import harvest_only
from unweave.workflows.pipeline import Pipeline

RECOVERY = ("mmcs", "mcc", "recall", "uniqueness")

TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_skip_transcoder", "group_max_skip_transcoder")
TRANSCODERS += ("abs_topk_skip_transcoder",)
CROSS_LAYER = ("clt", "skip_clt")
CROSSCODERS = ("crosscoder", "topk_crosscoder", "batch_topk_crosscoder")
SIDE = ("g_sae", "temporal")
MAPS = ("topk", "batch_topk", "jumprelu")  # they learn a target of their own, too

PLAIN = SyntheticConfig(
    d=64, n_features=128, l0=4, rates="zipf", correlation="low_rank", magnitude="exponential", noise=0.1, offset=0.5
)
TREE = SyntheticConfig(
    d=64, n_features=120, l0=4, hierarchy=Hierarchy(n_roots=24, branching=4), children_follow=True, noise=0.1
)


def kinds(synthetic_rows: int, store: Path | None, n_rows: int, n_features: int, out: Path) -> dict[str, Any]:
    """Every kind of data by name; those of the language model where there is a store."""
    rows = f"{synthetic_rows:,} rows"
    made: dict[str, Any] = {
        "plain": Synthetic(PLAIN, synthetic_rows, f"128 correlated features of Zipf rates in 64 dimensions, {rows}"),
        "tree": Synthetic(TREE, synthetic_rows, f"24 trees of 5 features in 64 dimensions, {rows}"),
        "halves": Halves(PLAIN, synthetic_rows, f"the rows of plain as two sites of 32 dimensions, {rows}"),
        "pair": Pair(PLAIN, synthetic_rows, f"from rows of plain to the same features along other directions, {rows}"),
    }
    if store is None:
        return made
    ActivationStore.open(store)
    words = f"{n_rows:,} rows, {n_features:,} features"
    first = LanguageModelRows(store.resolve(), n_rows, n_features, words)
    made["smollm2"] = first
    for name, archs, source, what in (
        ("smollm2 gradients", ("g_sae", "topk"), {"side": "gradient"}, "layers.12, gradients of the loss beside it"),
        ("smollm2 tokens", ("temporal", "matryoshka", "topk"), {"side": "previous"}, "layers.12, the row before it"),
        (
            "smollm2 mlp",
            (*TRANSCODERS, *MAPS),
            {"site": "layers.12.mlp:input", "target_site": "layers.12.mlp"},
            "from what the MLP of layer 12 reads to what it writes",
        ),
        (
            "smollm2 layers",
            (*CROSSCODERS, "topk", "batch_topk"),
            {"site": "layers.8+layers.12+layers.16"},
            "layers 8, 12 and 16 as one row",
        ),
        (
            "smollm2 mlps",
            (*CROSS_LAYER, "transcoder"),
            {"site": "layers.10..13.mlp:input", "target_site": "layers.10..13.mlp"},
            "from what the MLPs of layers 10 to 13 read to what they write",
        ),
    ):
        folder = out / "stores" / name.rpartition(" ")[2]
        made[name] = Elsewhere(first, folder, source, archs, f"{what}; {words}")
    return made


class Synthetic:
    """A synthetic world; the dictionary gets as many features as were planted."""

    archs: tuple[str, ...] | None = None  # that take part; None: all that reconstruct the row they read
    parts = 1
    maps = False
    l0 = 4.0

    def __init__(self, config: SyntheticConfig, n_rows: int, words: str) -> None:
        self.config, self.n_rows, self.words = config, n_rows, words

    def source(self, seed: int) -> SyntheticSource:
        return SyntheticSource(self.config.replace(seed=seed))

    def recovery(self, dictionary: Dictionary, source: Any) -> dict[str, float]:
        found = recover(dictionary, source)
        return {name: found[name] for name in RECOVERY}

    def run(self, arch: str, options: dict[str, Any], seed: int, rate: float) -> dict[str, float]:
        source = self.source(seed)
        dictionary = built(arch, source.d_in, self.config.n_features, options, seed, self.parts, self.maps)
        batch = 512
        config = TrainingConfig(n_rows=self.n_rows, batch_size=batch, seed=seed, ring_rows=16 * batch)
        if rate != 1:
            config = config.replace(lr=dictionary.default_lr() * config.lr_boost * rate)
        started = time.perf_counter()
        trained = train(dictionary, RowStream(source, seed=seed), config).dictionary
        seconds = time.perf_counter() - started
        fresh = source.held_out(16_384)
        measured = evaluate(trained, fresh, n_rows=16_384, baselines=False, n_bootstrap=0, progress=False)
        return columns(measured) | self.recovery(trained, source) | {"seconds": seconds}

    def anchors(self, seed: int) -> dict[str, dict[str, float]]:
        """What the oracles and random atoms get."""
        source = self.source(seed)
        rivals = recover(built("topk", source.d_in, self.config.n_features, {"k": round(self.l0)}, seed), source)
        return {
            name: {metric: estimates[metric].value for metric in (*RECOVERY, "fvu") if metric in estimates}
            for name, estimates in rivals.baselines.items()
        }


class Halves(Synthetic):
    """The rows of a world as those of two sites side by side: a feature writes to both."""

    archs = (*CROSSCODERS, "topk", "batch_topk")
    parts = 2


class Pair(Synthetic):
    """The features of a world, read at one site and written along other directions at another, with no linear map
    from one to the other: there are more features than dimensions. What was found is compared with what is written."""

    archs = (*TRANSCODERS, *CROSS_LAYER, *MAPS)
    parts = 2  # of those that have any: each site cut in two
    maps = True

    def source(self, seed: int) -> PairSource:
        return PairSource(self.config.replace(seed=seed))

    def recovery(self, dictionary: Dictionary, source: Any) -> dict[str, float]:
        return _matched(source.written, dictionary.decoder_directions())

    def anchors(self, seed: int) -> dict[str, dict[str, float]]:
        """What random atoms get, and the best linear map."""
        source = self.source(seed)
        torch.manual_seed(seed)
        random = _matched(source.written, torch.randn(self.config.n_features, source.d_out))
        learnt, fresh = _rows_of(source, 16_384), _rows_of(source.held_out(), 16_384)
        x, x_new = (torch.cat([b.input, torch.ones(b.n_rows, 1)], dim=1) for b in (learnt, fresh))
        error = fresh.target - x_new @ torch.linalg.lstsq(x, learnt.target).solution
        spread = fresh.target - fresh.target.mean(0)
        return {"linear map": {"fvu": float(error.square().sum() / spread.square().sum())}, "random": random}


def _matched(written: Tensor, atoms: Tensor) -> dict[str, float]:
    found = match(written, atoms, absolute=True)
    return {"mmcs": found.mmcs, "mcc": found.mcc, "recall": found.recall(), "uniqueness": found.uniqueness}


class PairSource(SyntheticSource):
    """Rows of a world, and as their targets the same codes along the directions of the next world."""

    has_target = True

    def __init__(self, config: SyntheticConfig, *, n_rows: int | None = None, stream: int = 0) -> None:
        super().__init__(config, n_rows=n_rows, stream=stream)
        self.written: Tensor = World(config.replace(seed=config.seed + 10_000)).directions

    def held_out(self, n_rows: int | None = None) -> PairSource:
        return PairSource(self.config, n_rows=n_rows, stream=self.stream + 1)

    def batches(self, skip: int = 0) -> Iterator[ActivationBatch]:
        for batch in super().batches(skip):
            first = int(batch.items.document[0])
            code = self.sample(batch.n_rows, first).code
            yield ActivationBatch.of_rows(batch.input, decode(code.pattern, code.values, self.written), first)


def _rows_of(source: PairSource, n: int) -> ActivationBatch:
    parts, stream = [], source.batches()
    while sum(part.n_rows for part in parts) < n:
        parts.append(next(stream))
    return ActivationBatch.concatenate(parts)


class LanguageModelRows:
    """Cached rows of a language model, with the model at hand for the loss."""

    archs: tuple[str, ...] | None = None
    l0 = 32.0

    def __init__(self, store: Path, n_rows: int, n_features: int, words: str) -> None:
        self.store, self.n_rows, self.n_features, self.words = store, n_rows, n_features, words
        self.pipeline: Pipeline | None = None

    def run(self, arch: str, options: dict[str, Any], seed: int, rate: float, folder: Path) -> dict[str, float]:
        recipe = Recipe.read(None, {"store": str(self.store)}, []).replace(index=None)
        named = {"arch": arch, "n_features": self.n_features, "options": options}
        dictionary = recipe.dictionary.replace(**named)
        training = recipe.training.replace(n_rows=self.n_rows, seed=seed, batch_size=1024)
        measured = {"tokens": 4096, "loss_tokens": 1024, "baselines": False, "n_bootstrap": 1}
        assert recipe.evaluation is not None
        recipe = recipe.replace(
            dictionary=dictionary, training=training, evaluation=recipe.evaluation.replace(**measured)
        )
        run = Pipeline(recipe, folder, lambda line: None)
        if self.pipeline is None:
            self.pipeline = run
        else:
            run.share(self.pipeline)
        if rate != 1:
            made, config = run.build()
            training = training.replace(lr=(config.lr or made.default_lr() * config.lr_boost) * rate)
            run.recipe = recipe.replace(training=training)
        started = time.perf_counter()
        run.train()
        seconds = time.perf_counter() - started
        measured = run.evaluate()
        return columns(measured) | {"seconds": seconds}


class Elsewhere(LanguageModelRows):
    """The same text at another site, or with side inputs; harvested when it is first needed."""

    def __init__(
        self, first: LanguageModelRows, folder: Path, source: dict[str, Any], archs: tuple[str, ...], words: str
    ) -> None:
        super().__init__(folder, first.n_rows, first.n_features, words)
        self.archs, self._first, self._source = archs, first, source

    def run(self, arch: str, options: dict[str, Any], seed: int, rate: float, folder: Path) -> dict[str, float]:
        recipe = Recipe.read(None, {"store": str(self._first.store)}, [])
        source = recipe.source.replace(tokens=self.n_rows, **self._source)
        harvest_only(recipe.replace(store=None, source=source), self.store, lambda line: None)  # goes on, or is there
        return super().run(arch, options, seed, rate, folder)


def columns(measured: Evaluation) -> dict[str, float]:
    """What an evaluation has of the table's columns."""
    renamed = {"fvu": "fvu", "l0": "l0", "dead_share": "dead", "ce_loss_recovered": "ce_recovered"}
    return {ours: measured[theirs] for theirs, ours in renamed.items() if theirs in measured.metrics}


def built(
    arch: str, d: int, n_features: int, options: dict[str, Any], seed: int, parts: int = 1, maps: bool = False
) -> Dictionary:
    torch.manual_seed(seed)
    fields = dictionaries.get(arch).Config.model_fields
    if "n_parts" in fields:
        options = {**options, "n_parts": parts}
    elif maps:
        options = {**options, "subtract_bias": False}
    return dictionaries.build(arch, d, n_features, **options)
