"""What the overview page says about a run, worked out once from its files."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from markupsafe import Markup

from unweave.features.card.charts import histogram
from unweave.features.card.formatting import number, percent
from unweave.web._charts import line_chart
from unweave.web._encoder import last_part, model_name

# name in evaluation.json: (label, better, shown as a percentage, what it means)
MEASURES: dict[str, tuple[str, str, bool, str]] = {
    "fvu": ("FVU", "lower", False, "share of the variance the reconstruction misses"),
    "l0": ("L0", "", False, "features that fire per token, on average"),
    "ce_loss_recovered": ("CE recovered", "higher", True, "of the loss lost by zeroing the site, how much is kept"),
    "kl": ("KL", "lower", False, "from the model's predictions to those with the reconstruction spliced in, in nats"),
    "cosine": ("Cosine", "higher", False, "between activation and reconstruction"),
    "l2_ratio": ("Norm ratio", "near 1", False, "length of the reconstruction over that of the activation"),
    "dead_share": ("Dead", "lower", True, "features that never fired on these tokens"),
    "dense_share": ("Dense", "lower", True, "features that fire on more than a tenth of the tokens"),
    "ce_clean": ("CE, clean", "", False, "the model's own next-token loss, in nats"),
    "ce_spliced": ("CE, spliced", "lower", False, "the loss with the reconstruction in place of the activation"),
    "ce_mean": ("CE, mean", "", False, "the loss with the activation replaced by its mean"),
    "ce_zero": ("CE, zero", "", False, "the loss with the activation set to zero"),
}
HEADLINE = ("fvu", "l0", "ce_loss_recovered", "dead_share")
CURVES = (("loss", "Loss"), ("kl", "KL"), ("ce", "CE"), ("fvu", "FVU"), ("l0", "L0"), ("dead_share", "Dead share"))


@dataclass(frozen=True)
class Cell:
    """One measured number, ready to print."""

    text: str
    interval: str = ""


@dataclass(frozen=True)
class Measure:
    key: str
    label: str
    better: str
    meaning: str
    cell: Cell
    rivals: list[Cell]


@dataclass(frozen=True)
class Results:
    """The evaluation as a table: one row per measure, baselines beside the dictionary."""

    rivals: list[str]
    rows: list[Measure]
    data: str
    notes: list[str]

    def headline(self) -> list[Measure]:
        """The numbers to look at first; where there is no common one, those of each model."""
        common = {row.key for row in self.rows}
        return [
            row
            for key in HEADLINE
            for row in self.rows
            if row.key == key or (key not in common and _metric(row.key) == key)
        ]


def results(evaluation: Mapping[str, Any] | None) -> Results | None:
    """None when the run was not evaluated."""
    measured = (evaluation or {}).get("metrics") or {}
    if not measured:
        return None
    baselines: Mapping[str, Any] = (evaluation or {}).get("baselines") or {}
    places = {key: place for place, key in enumerate(MEASURES)}
    rows = []
    for key in sorted(measured, key=lambda key: (places.get(_metric(key), len(places)), ":" in key, key)):
        label, better, share, meaning = MEASURES.get(_metric(key), (_words(_metric(key)), "", False, ""))
        label += f" ({key.partition(':')[2]})" if ":" in key else ""
        rivals = [_cell(values.get(key), share) for values in baselines.values()]
        rows.append(Measure(key, label, better, meaning, _cell(measured[key], share), rivals))
    data = (evaluation or {}).get("data") or {}
    counted = [
        f"{data[key]:,} {word}" for key, word in (("n_tokens", "tokens"), ("n_documents", "documents")) if data.get(key)
    ]
    text = " of ".join(counted)
    notes = [f"Part {label} is {name}." for label, name in (data.get("parts") or {}).items()]
    notes += [f"{note[0].upper()}{note[1:]}." for note in [data.get("note")] if note]
    if split := data.get("split"):
        text = f"{text}, {_words(str(split))}" if text else _words(str(split))
    return Results([_rival_name(name) for name in baselines], rows, text, notes)


def _metric(key: str) -> str:
    """What is measured, of a number that may be of one part of the rows: ``fvu`` of ``fvu:layers.6``."""
    return key.partition(":")[0]


def _rival_name(name: str) -> str:
    return {"pca": "PCA", "random": "random directions", "neurons": "neurons"}.get(name, _words(name))


def _cell(entry: Any, share: bool) -> Cell:
    if entry is None:
        return Cell("–")
    if not isinstance(entry, Mapping):
        entry = {"value": entry}
    show = percent if share else number
    value, low, high = entry.get("value"), entry.get("low"), entry.get("high")
    ends = [show(end) for end in (low, high) if end is not None]
    interval = " to ".join(ends) if len(set(ends)) == 2 else ""
    return Cell(show(value), interval)


@dataclass
class Overview:
    """Everything the first page shows. ``run`` is duck-typed like :class:`unweave.runs.Run`."""

    run: Any
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = str(self.run.name)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return list(self.run.metrics)

    # ---- words ------------------------------------------------------------------------------------------------

    @cached_property
    def dictionary(self) -> Any:
        """None for a run of imported codes without the dictionary they came from."""
        return self.run.dictionary if getattr(self.run, "has_dictionary", True) else None

    @cached_property
    def architecture(self) -> str | None:
        return None if self.dictionary is None else type(self.dictionary).__name__

    @property
    def kind(self) -> str:
        return f"A {self.architecture} dictionary" if self.architecture else "Imported codes"

    @cached_property
    def n_features(self) -> int:
        return int((self.run.features if self.dictionary is None else self.dictionary).n_features)

    @cached_property
    def model(self) -> str | None:
        return model_name(self.run)

    @cached_property
    def against(self) -> str | None:
        """The second model of a run that compares two."""
        named = ((self.run.recipe or {}).get("against") or {}).get("name")
        return last_part(str(named)) if named else None

    @cached_property
    def site(self) -> str | None:
        found = self.run.recipe["source"]["site"] if self.against else _first(self.run, "site")
        return str(found) if found else None

    @cached_property
    def facts(self) -> list[tuple[str, str]]:
        """Name and value pairs: what was taken apart, and into what."""
        width = None
        if (dictionary := self.dictionary) is not None:
            width = f"{dictionary.d_in:,}"
            width += f" to {dictionary.d_out:,}" if dictionary.d_out != dictionary.d_in else ""
        model = _first(self.run, "model")
        revision = model.get("revision") if isinstance(model, Mapping) else None
        pairs = [
            ("Model", self.model),
            ("Revision", str(revision)[:12] if revision else None),
            ("Against", self.against),
            ("Site", self.site),
            (
                "Target site",
                target if (target := _first(self.run, "target_site")) != _first(self.run, "site") else None,
            ),
            ("Architecture", self.architecture),
            ("Features", f"{self.n_features:,}"),
            ("Width", width),
            ("Context", _tokens(_first(self.run, "context_size"))),
            ("Data", self._data()),
        ]
        return [(name, str(value)) for name, value in pairs if value]

    def _data(self) -> str | None:
        """The documents as the recipe names them, or as the source knew them."""
        for values in (self.run.recipe, (self.run.provenance or {}).get("source")):
            data = values.get("data") if isinstance(values, Mapping) else None
            named = (data.get("documents") or data.get("spec")) if isinstance(data, Mapping) else data
            if isinstance(named, list):  # a mix
                return ", ".join(last_part(str(part["documents"])) for part in named)
            if named:
                return last_part(str(named))
        return None

    @cached_property
    def training(self) -> list[tuple[str, str]]:
        """What was set and what was measured while training."""
        pairs: list[tuple[str, Any]] = []
        recipe = self.run.recipe or {}
        found = recipe.get("training")
        settings: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
        last = self.metrics[-1] if self.metrics else {}
        if settings.get("objective", "mse") != "mse":
            pairs.append(("Objective", f"{str(settings['objective']).upper()}, end to end"))
        pairs.append(("Rows trained on", last.get("rows") or settings.get("n_rows")))
        pairs.append(("Steps", last.get("step")))
        for key, label in (("batch_size", "Batch size"), ("seed", "Seed")):
            pairs.append((label, settings.get(key, recipe.get(key))))
        rates = [m["lr"] for m in self.metrics if isinstance(m.get("lr"), int | float)]
        pairs.append(("Peak learning rate", max(rates, default=settings.get("lr"))))
        speeds = [m["rows_per_s"] for m in self.metrics if isinstance(m.get("rows_per_s"), int | float)]
        pairs.append(("Median rows per second", float(np.median(speeds)) if speeds else None))
        pairs.append(("Rows mixed in the shuffle ring", last.get("effective_rows")))
        same = last.get("same_document_rate")
        shown = [
            (name, value if isinstance(value, str) else number(value)) for name, value in pairs if value is not None
        ]
        if isinstance(same, int | float) and math.isfinite(same):
            shown.append(("Row pairs from one document", percent(same)))
        return shown

    @cached_property
    def dictionary_options(self) -> list[tuple[str, str]]:
        """The architecture's own settings, such as k."""
        values = {} if self.dictionary is None else self.dictionary.config.to_dict()
        plain = {k: v for k, v in values.items() if k not in ("d_in", "d_out", "n_features")}
        return [
            (_words(k), number(v) if isinstance(v, int | float) else str(v)) for k, v in plain.items() if v is not None
        ]

    @cached_property
    def results(self) -> Results | None:
        return results(self.run.evaluation)

    @cached_property
    def provenance(self) -> str:
        return json.dumps(self.run.provenance or {}, indent=2, ensure_ascii=False, default=str)

    @cached_property
    def recipe(self) -> str:
        return json.dumps(self.run.recipe or {}, indent=2, ensure_ascii=False, default=str)

    # ---- pictures ---------------------------------------------------------------------------------------------

    @cached_property
    def curves(self) -> list[tuple[str, Markup]]:
        drawn = []
        for key, title in CURVES:
            points = [
                (float(m["rows"]), float(m[key]))
                for m in self.metrics
                if isinstance(m.get(key), int | float) and isinstance(m.get("rows"), int | float)
            ]
            if svg := line_chart(points, name=title):
                drawn.append((title, svg))
        return drawn

    @cached_property
    def density(self) -> DensityPicture | None:
        return DensityPicture.of(self.run.features) if self.run.features is not None else None


@dataclass(frozen=True)
class DensityPicture:
    """How often features fire: the histogram over log10 density, and the shares at both ends."""

    svg: Markup
    n_dead: int
    n_dense: int
    n_features: int
    median: float

    @classmethod
    def of(cls, store: Any) -> DensityPicture:
        density = np.asarray(store.table["density"], dtype=np.float64)
        alive = density[density > 0]
        svg = Markup("")
        if len(alive):
            logs = np.log10(alive)
            low, high = math.floor(logs.min() * 4) / 4, min(0.0, math.ceil(logs.max() * 4) / 4)
            edges = np.linspace(low, high if high > low else low + 0.25, max(2, round((high - low) * 8) + 1))
            counts = np.histogram(logs, edges)[0]
            links = [f"/features?min_density={10**a:.6g}&max_density={10**b:.6g}" for a, b in pairwise(edges)]
            decades = [float(p) for p in range(math.floor(low), 1)]
            svg = histogram(
                edges.tolist(),
                counts.tolist(),
                name="Features by density",
                width=580,
                height=230,
                what="features",
                edge_text=lambda x: percent(10**x),
                tick_at=decades,
                tick_text=lambda x: f"{100 * 10**x:g}%",
                links=links,
            )
        return cls(
            svg,
            n_dead=int((density == 0).sum()),
            n_dense=int((density > 0.1).sum()),
            n_features=len(density),
            median=float(np.median(alive)) if len(alive) else 0.0,
        )


def _tokens(n: Any) -> str | None:
    return f"{n:,} tokens" if isinstance(n, int) else None


def _first(run: Any, key: str) -> Any:
    """A field of the source's provenance, or of the recipe's source or top level; the first that is there."""
    recipe = run.recipe or {}
    for place in ((run.provenance or {}).get("source"), recipe.get("source"), recipe):
        if isinstance(place, Mapping) and place.get(key) not in (None, "", {}):
            return place[key]
    return None


def live_features(store: Any) -> np.ndarray:
    """Indices of features that fire now and then: neither dead nor on every tenth token."""
    density = np.asarray(store.table["density"], dtype=np.float64)
    good = np.flatnonzero((density > 0) & (density <= 0.1))
    return good if len(good) else np.flatnonzero(density > 0)


def starting_points(store: Any, n: int, rng: np.random.Generator) -> Sequence[int]:
    """A few random live features to begin with."""
    live = live_features(store)
    return sorted(int(i) for i in rng.choice(live, size=min(n, len(live)), replace=False)) if len(live) else []


def _words(name: str) -> str:
    """``batch_topk`` as ``batch topk``: keys of a recipe as people would write them."""
    return name.replace("_", " ")
