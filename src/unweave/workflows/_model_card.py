"""The README of a dictionary on a hub: what it is, what was measured of it, and what was not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

import yaml

from unweave import __version__
from unweave.errors import UnweaveError
from unweave.evaluation import Evaluation, registry
from unweave.evaluation.registry import METRICS
from unweave.formats import Facts, Verdict
from unweave.sources.documents import kind_of

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
_PATH = re.compile(r"(?<![\w./:-])(?:[A-Za-z]:\\|~[/\\]|\.{0,2}/)(?:[^\s,=()/\\]*[/\\])*([^\s,=()/\\]+)")
_UNKNOWN = "not recorded"


@dataclass(frozen=True)
class Known:
    """All that a card is made of.

    Attributes:
        facts: of the files that are published. load_as: by which name they are loaded.
        config: the dictionary's. training: as ``training.json`` has it. provenance: as ``provenance.json`` does.
        stated: what another library's files say of their training.
        evaluation, verdict: what was measured, if anything was. extra: what goes into the front matter besides.
    """

    facts: Facts
    load_as: str
    config: Mapping[str, Any]
    training: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    stated: Mapping[str, Any] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    verdict: Verdict | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> dict[str, Any]:
        """Where the rows it was trained on came from."""
        return self.training.get("data") or self.provenance.get("source") or {}

    @property
    def models(self) -> list[dict[str, Any]]:
        """What is known of the model, or of each of several whose rows stand side by side."""
        each = [one.get("model") for one in self.source.get("sources") or [self.source]]
        return [dict(model) if isinstance(model, Mapping) else {} for model in each]

    @property
    def names(self) -> list[str]:
        """What the models are called; nothing where that is not known."""
        if len(self.models) > 1 and all(model.get("name") for model in self.models):
            return list(dict.fromkeys(str(model["name"]) for model in self.models))
        return [self.facts.model] if self.facts.model else []


def model_card(known: Known) -> str:
    """Markdown with YAML front matter, as the hub reads it."""
    facts = known.facts
    of = f" of {' and '.join(f'`{name}`' for name in known.names)}" if known.names else ""
    at = f" at `{facts.site}`" if facts.site else ""
    parts = [
        f"---\n{yaml.safe_dump(_front_matter(known), sort_keys=False, allow_unicode=True)}---",
        f"# {facts.architecture}{of}{at}",
        f"A sparse dictionary: it writes activations{of}{at}, {facts.d_in:,} numbers a row, as sums of a few of "
        f"{facts.n_features:,} features. Made with unweave"
        + ("." if facts.format == "unweave" else f", in the layout of {facts.format}."),
        f'```python\nimport unweave\n\ndictionary = unweave.load("{known.load_as}")\n'
        f"code = dictionary.encode(rows)  # raw activations, (n, {facts.d_in}), as the model makes them\n"
        "made = dictionary(rows)  # what the features say of them\n```",
        "## What it is",
        _table(("", ""), [(name, f"`{_word(value)}`") for name, value in _identity(known).items()]),
        "## How it was trained",
        _table(("", ""), [(name, _word(value)) for name, value in _training(known).items()]),
        "## What was measured",
        *_measured(known),
        "## What was not measured",
        "\n".join(f"- {line}" for line in _limits(known)),
    ]
    return "\n\n".join(parts) + "\n"


def without_paths(value: Any) -> Any:
    """The same without the folders that files lay in, which are nobody else's business."""
    if isinstance(value, Mapping):
        return {key: without_paths(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [without_paths(part) for part in value]
    if not isinstance(value, str):
        return value
    if re.match(r"[/~]|[A-Za-z]:\\", value):
        return PurePath(value.replace("\\", "/")).name
    return _PATH.sub(r"\1", value)


def _front_matter(known: Known) -> dict[str, Any]:
    facts, source = known.facts, known.source
    tags = ["unweave", "sparse-autoencoder", "interpretability", facts.architecture]
    if facts.format != "unweave":
        tags.append(facts.format)
    values: dict[str, Any] = {"library_name": "unweave", "tags": tags}
    # A folder or a file has a hash; only what came from a hub is named as there.
    hashed = any("sha256" in model for model in known.models)
    if known.names and not hashed and all(_HUB_NAME.fullmatch(name) for name in known.names):
        values["base_model"] = known.names[0] if len(known.names) == 1 else known.names
    if sets := _data_sets(str((source.get("data") or {}).get("spec", ""))):
        values["datasets"] = sets
    return {**values, **known.extra}


def _data_sets(spec: str) -> list[str]:
    """The hub's data sets in the description of some data, which may be a mix."""
    names = [name for name in re.findall(r"[^\s,=()]+", spec) if _HUB_NAME.fullmatch(name)]
    found = [name.partition(":")[0] for name in names if kind_of(Path(name)) is None and not Path(name).exists()]
    return list(dict.fromkeys(found))


def _identity(known: Known) -> dict[str, Any]:
    facts = known.facts
    options = {k: v for k, v in known.config.items() if k not in ("d_in", "d_out", "n_features", "k") and v is not None}
    several = len(known.names) > 1
    rows: dict[str, Any] = {}
    for letter, model in zip("abcdefgh" if several else "-", known.models):
        called = f"model {letter}" if several else "model"
        rows[called] = model.get("name") if several else facts.model
        rows |= {f"{called}'s {key}": model.get(key) for key in ("revision", "sha256", "dtype")}
    rows |= {
        "site": facts.site or facts.hook,
        "target site": facts.target_site,
        "architecture": facts.architecture,
        "d_in": facts.d_in,
        "d_out": facts.d_out,
        "n_features": facts.n_features,
        "k": facts.k,
        "dtype": facts.dtype,
        "format": facts.format,
        "options": ", ".join(f"{name}={value}" for name, value in options.items()) or None,
    }
    needed = ("model", "site")
    return {name: value for name, value in rows.items() if value is not None or name in needed}


def _training(known: Known) -> dict[str, Any]:
    config, source = known.training.get("config") or {}, known.source
    data, stage = source.get("data") or {}, (known.provenance.get("stages") or {}).get("train") or {}
    hardware, versions = known.provenance.get("hardware") or {}, known.provenance.get("versions") or {}
    rows = {
        "data": data.get("spec") or data.get("name"),
        "data's fingerprint": data.get("fingerprint") or data.get("sha256_of_first_batch"),
        "context size": source.get("context_size"),
        "BOS prepended": source.get("bos"),
        "objective": _objective(config),
        "began with": "the weights of a dictionary trained before" if config.get("continued") else None,
        "rows": config.get("n_rows"),
        "rows in a batch": config.get("batch_size"),
        "steps": known.training.get("steps"),
        "learning rate": "unweave's default" if config and config.get("lr") is None else config.get("lr"),
        "seed": config.get("seed"),
        "seconds": stage.get("seconds"),
        "processor": hardware.get("processor"),
        "accelerator": hardware.get("accelerator"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or None,
        **{f"its files say: {name}": value for name, value in known.stated.items()},
        "unweave noted": " ".join(known.training.get("health") or ()) or None,
        "card written by": f"unweave {__version__}",
    }
    needed = ("data", "rows", "versions")
    return {name: value for name, value in rows.items() if value is not None or name in needed}


def _objective(config: Mapping[str, Any]) -> str | None:
    """What was minimised, of a training through the model; None of one on rows, where the architecture says it."""
    terms = {
        "kl": "KL to the model's own predictions",
        "ce": "cross-entropy of the text",
        "downstream": "squared error at later sites",
        "local": "squared error of the reconstruction",
    }
    weights = {words: config.get(f"{name}_coefficient") for name, words in terms.items()}
    return "; ".join(f"{words}, times {weight:g}" for words, weight in weights.items() if weight) or None


def _measured(known: Known) -> list[str]:
    evaluation, verdict = known.evaluation, known.verdict
    made = []
    if evaluation is not None:
        rivals = evaluation.baselines
        rows = [
            (
                _marked(name),
                value.shown,
                value.interval,
                *(other[name].shown if name in other else "" for other in rivals.values()),
                metric.meaning if (metric := registry.of(name)) else "",
            )
            for name, value in evaluation.metrics.items()
        ]
        made.append(_table(("metric", "value", "95 % interval", *rivals, "what it is"), rows))
        made.append(f"On {evaluation.caption()}. `evaluation.json` beside this page has all digits.")
    if verdict is not None:
        rows = [("fvu", f"{verdict.fvu:.4g}"), ("l0", f"{verdict.l0:.4g}"), ("dead_share", f"{verdict.dead:.4g}")]
        made.append(_table(("metric", "value"), rows))
        judged = "as declared" if verdict.matches else "not as declared" + (f": {verdict.trap}" if verdict.trap else "")
        made.append(f"By a verified load on stored activations, without intervals: {judged}.")
    return made or ["Nothing: these files came without measurements, and none were made for this page."]


def _limits(known: Known) -> list[str]:
    evaluation = known.evaluation
    lines = []
    if evaluation is not None:
        measured = {name.partition(":")[0] for name in evaluation.metrics}  # also of a part of the rows
        missing = [name for name in METRICS if name not in measured]
        undefined = [name for name, value in evaluation.metrics.items() if value.shown == "-"]
        if missing or undefined:
            names = ", ".join(f"`{name}`" for name in (*missing, *undefined))
            lines.append(f"Of unweave's own metrics: {names}.")
        if not evaluation.baselines:
            lines.append("How rivals (PCA, random directions, raw neurons) do on the same rows.")
        measured_on, trained_on = (_data_of(part) for part in (evaluation.data.get("source"), known.source))
        if measured_on and measured_on != trained_on:
            lines.append(f"Any other data than {measured_on.get('spec', 'that of the line under the numbers')}.")
        elif evaluation.data.get("split") == "held_out":
            lines.append("Any other data: the numbers are of held-out documents of what it was trained on.")
        else:
            lines.append("Rows that it was not trained on, unless the line under the numbers says so.")
    elif known.verdict is None:
        lines.append("How much it reconstructs, how sparse it is, what it does to the model's loss.")
    lines.append("Whether its features mean anything to a reader, and whether acting on them steers the model.")
    if known.facts.format != "unweave" and (evaluation is not None or known.verdict is not None):
        lines.append(
            f"The numbers in {known.facts.format}: they were measured by unweave, before it wrote this layout."
        )
    return lines


def _data_of(source: Any) -> dict[str, Any]:
    data = (source or {}).get("data") or {}
    return {name: data[name] for name in ("spec", "fingerprint", "name") if name in data}


def _marked(name: str) -> str:
    metric = registry.of(name)
    arrow = {"low": " ↓", "high": " ↑"}.get(metric.better, "") if metric else ""
    return f"{name}{arrow}"


def _word(value: Any) -> str:
    if value is None:
        return _UNKNOWN
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"

    return "\n".join([line(header), "|" + "---|" * len(header), *(line(row) for row in rows)])


def check_front_matter(values: Mapping[str, Any]) -> None:
    """Refuse what the card says by itself."""
    if owned := {"library_name", "tags"} & values.keys():
        raise UnweaveError(f"{', '.join(sorted(owned))} of the front matter cannot be set: the card says it by itself")
