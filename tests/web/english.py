"""A run over made-up English: real folders, a real store and dictionary, and features a person can recognise.

The activations are made so that feature ``i`` of an identity dictionary fires on the words of group ``i``, with values
that depend on the words around; so the browser's pages show what they would show of a good dictionary.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from unweave.batch import ActivationBatch, Items
from unweave.codes import SparseCode
from unweave.dictionaries import ReLU
from unweave.features import IndexConfig, build_features, decode_tokens
from unweave.runs import Run, TextCode

N_FEATURES = 220
SCRIPT = "<script>alert(1)</script>"
DEAD, NASTY, EMOJI = 7, 12, 13

SLOTS = {
    "who": "the captain|my grandmother|a young engineer|the committee|Dr. Alvarez|our neighbour|the defendant|Maria",
    "water": "river|harbour|lake|sea|canal|rain|tide|estuary",
    "move": "walked|sailed|drove|hurried|climbed|drifted|returned",
    "food": "bread|soup|rice|olive oil|garlic|cheese|butter|a ripe pear",
    "cook": "stir|simmer|bake|chop|season|whisk|fry",
    "law": "appeal|verdict|statute|contract|ruling|witness|evidence",
    "body": "heart|lungs|knee|blood pressure|left hand|spine",
    "sick": "fever|infection|fracture|fatigue|a mild cough|inflammation",
    "sport": "scored|defended|equalised|passed|missed the penalty|won the match",
    "city": "Lisbon|Nairobi|Kyoto|Bergen|Montréal|São Paulo|Cairo",
    "month": "January|March|June|August|October|December",
    "num": "3|12|47|150|1,204|two thirds|nineteen",
    "code": "def parse(text):|for row in table:|return None|import numpy as np|if x is None:|while queue:",
    "colour": "red|pale green|dark blue|grey|white",
    "feel": "happy|anxious|proud|tired|relieved|furious",
    "german": "Die Katze schläft|Wir gehen nach Hause|Das Wetter ist schön",
    "arabic": "السلام عليكم|مرحبا بالعالم",
    "emoji": "🎉|👩‍🔬|❄|🦊",
}
SENTENCES = [
    "In {month}, {who} {move} along the {water} near {city}.",
    "{who} said the {water} was higher than it had been in {num} years.",
    "{cook} the {food} for {num} minutes, then {cook} again and add {food}.",
    "The court heard the {law} in {month}; the {law} was not accepted.",
    "Patients with {sick} should have their {body} examined within {num} days.",
    "They {sport} in the {num}th minute, and {who} was {feel}.",
    "A {colour} boat {move} across the {water} while {who} watched.",
    "Could {who} really be {feel} about a {colour} door?",
    "```\n{code}\n    {code}\n```\n",
    "“{german},” {who} answered, {feel} but polite.",
    "The word {arabic} was painted in {colour} above the {water}.",
    "{who} bought {food} and {num} {colour} candles in {city} {emoji}",
    "The {law} cites {num} cases, none of which concern the {body}.",
    "After {num} weeks the {sick} was gone and {who} felt {feel}.",
]


def documents(n: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    slots = {name: text.split("|") for name, text in SLOTS.items()}
    made = []
    for i in range(n):
        sentences = []
        for _ in range(rng.randint(3, 9)):
            template = rng.choice(SENTENCES)
            sentences.append(re.sub(r"\{(\w+)\}", lambda m: rng.choice(slots[m[1]]), template))
        if i % 40 == 7:
            sentences.insert(1, f'He typed {SCRIPT} & pressed "Enter".')
        made.append(" ".join(s[0].upper() + s[1:] for s in sentences))
    return made


def pieces(text: str) -> list[bytes]:
    """Byte pieces much like a BPE tokenizer's: words with their space, long ones in two, emoji in halves."""
    made: list[bytes] = []
    for word in re.findall(re.escape(SCRIPT) + r"| ?[^\W\d_]+| ?\d+|\s+|[^\w\s]", text):
        raw = word.encode()
        if word == SCRIPT:
            made.append(raw)
        elif not word.isascii() and ord(word.strip()[:1] or " ") > 0x1F000:
            made += [raw[:2], raw[2:]]
        elif len(raw) > 9:
            made += [raw[:5], raw[5:]] if word.isascii() else [raw]
        else:
            made.append(raw)
    return made


class Corpus:
    """Tokenised documents, the vocabulary, and which feature fires where."""

    def __init__(self, n_documents: int = 240) -> None:
        self.documents = documents(n_documents)
        texts = [pieces(d) for d in self.documents]
        counts: dict[bytes, int] = {}
        for text in texts:
            for piece in text:
                counts[piece] = counts.get(piece, 0) + 1
        self.vocabulary = sorted(counts, key=lambda p: (-counts[p], p))
        self.ids = {piece: i for i, piece in enumerate(self.vocabulary)}
        self.items = [[self.ids[p] for p in text][:160] for text in texts]
        self.groups = self._groups()

    def _groups(self) -> list[set[int]]:
        """Feature by feature, the token ids it fires on."""
        groups: list[set[int]] = []
        for name in SLOTS:
            words = {w for option in SLOTS[name].split("|") for w in pieces(option) + pieces(" " + option)}
            groups.append({self.ids[w] for w in words if w in self.ids and len(w) > 2})
        groups[DEAD] = set()
        groups[NASTY] = {self.ids[SCRIPT.encode()]}
        groups[EMOJI] = {i for i, p in enumerate(self.vocabulary) if p[:1] >= b"\xf0"}
        for i in range(len(groups), N_FEATURES):
            groups.append({i - len(SLOTS)} if i % 11 else set())
        return groups

    def rows(self, tokens: list[int]) -> torch.Tensor:
        """``(t, N_FEATURES)``: what the identity dictionary will read as its code."""
        out = torch.zeros(len(tokens), N_FEATURES)
        for feature, group in enumerate(self.groups):
            for t, token in enumerate(tokens):
                if token in group:
                    near = sum(other in group for other in tokens[max(0, t - 12) : t])
                    out[t, feature] = 1.2 + 1.1 * near + ((token * 7919 + feature * 31 + t) % 17) / 6
        return out


def identity_dictionary() -> ReLU:
    dictionary = ReLU(ReLU.Config(d_in=N_FEATURES, d_out=N_FEATURES, n_features=N_FEATURES))
    with torch.no_grad():
        for parameter in dictionary.parameters():
            parameter.zero_()
        dictionary.W_enc.copy_(torch.eye(N_FEATURES))
        generator = torch.Generator().manual_seed(0)
        mixed = torch.eye(N_FEATURES) + 0.06 * torch.randn(N_FEATURES, N_FEATURES, generator=generator)
        dictionary.W_dec.copy_(torch.nn.functional.normalize(mixed, dim=1))
    return dictionary.eval()


def write_run(folder: Path, corpus: Corpus, *, text: bool = True, index: bool = True) -> Path:
    """A whole run folder, as training, evaluating and indexing leave it."""
    dictionary = identity_dictionary()
    dictionary.save(folder / "dictionary")
    if text:
        (folder / "recipe.yaml").write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    (folder / "provenance.json").write_text(json.dumps(PROVENANCE if text else {"source": {"kind": "array"}}))
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics()))
    if index:
        generator = torch.Generator().manual_seed(1)
        unembedding = torch.randn(N_FEATURES, len(corpus.vocabulary), generator=generator) * 0.3
        build_features(
            folder / "features",
            dictionary,
            batches(corpus),
            token_bytes=corpus.vocabulary,
            unembed=lambda directions: directions @ unembedding,
            config=IndexConfig(n_top=12, n_sample=100),
        )
    return folder


def batches(corpus: Corpus, size: int = 24) -> list[ActivationBatch]:
    made = []
    for first in range(0, len(corpus.items), size):
        part = corpus.items[first : first + size]
        tokens = torch.tensor([t for item in part for t in item], dtype=torch.int32)
        offsets = torch.tensor(np.cumsum([0, *map(len, part)]))
        items = Items(
            tokens, offsets, torch.arange(first, first + len(part)), torch.zeros(len(part), dtype=torch.int32)
        )
        rows = torch.cat([corpus.rows(item) for item in part])
        made.append(ActivationBatch(rows, rows, items, torch.arange(len(rows))))
    return made


class EnglishModel:
    """Stands in for a language model: cuts text into the corpus's pieces."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus

    def tokenize(self, text: str) -> list[int]:
        return [self.corpus.ids.get(p, -1) for p in pieces(text)]


class EnglishRun(Run):
    """A run whose model is the rule that made the activations; loading it can be made slow or failing."""

    def __init__(self, folder: Path, corpus: Corpus) -> None:
        super().__init__(folder)
        self.corpus = corpus
        self.loads: list[Any] = []  # called, one after another, when the model is asked for
        self._ready: EnglishModel | None = None

    @property
    def model(self) -> Any:
        if self._ready is None:
            while self.loads:
                self.loads.pop(0)()
            self._ready = EnglishModel(self.corpus)
        return self._ready

    def encode(self, text: str) -> TextCode:
        rows = self.corpus.rows(self.model.tokenize(text))
        return TextCode(decode_tokens(pieces(text)), SparseCode.from_dense(rows))


def metrics() -> list[dict[str, float]]:
    rng = random.Random(0)
    lines = []
    for i in range(90):
        fvu = 0.18 + 0.8 * 0.93**i
        lines.append(
            {
                "step": (i + 1) * 10,
                "rows": (i + 1) * 20480,
                "loss": 900 * fvu + rng.uniform(-9, 9),
                "fvu": fvu + rng.uniform(-0.004, 0.004),
                "l0": 32 + 90 * 0.9**i + rng.uniform(-0.5, 0.5),
                "dead_share": 0.08 * (1 - 0.96**i),
                "lr": 3e-4 * min(1, (i + 1) / 5),
                "grad_norm": 0.4,
                "rows_per_s": 20000 + rng.uniform(-900, 900),
                "effective_rows": 61234,
                "same_document_rate": 0.0017,
            }
        )
    return lines


RECIPE = {
    "model": {"name": "example/english-1b", "revision": None, "dtype": "bfloat16", "device": "auto"},
    "data": {"documents": "made-up English", "text_field": "text", "seed": 0, "limit": None},
    "source": {"site": "layers.12", "tokens": 1_843_200, "context_size": 160},
    "dictionary": {"arch": "relu", "n_features": N_FEATURES},
    "training": {"batch_size": 2048, "seed": 0, "lr": 3e-4, "passes": 1},
}
PROVENANCE = {
    "format": "unweave.provenance/1",
    "source": {
        "kind": "text",
        "model": {
            "name": "example/english-1b",
            "revision": "0123456789abcdef0123",
            "n_layers": 24,
            "d_model": N_FEATURES,
        },
        "site": "layers.12",
        "target_site": "layers.12",
        "context_size": 160,
        "data": {"spec": "made-up English", "n_documents": 240},
    },
    "versions": {"python": "3.11", "torch": "2.13"},
}


def _measured(value: float, spread: float) -> dict[str, Any]:
    return {"value": value, "low": value - spread, "high": value + spread, "version": 1}


EVALUATION = {
    "format": "unweave.evaluation/1",
    "data": {"split": "held_out", "n_tokens": 32768, "n_documents": 412},
    "metrics": {
        "fvu": _measured(0.1834, 0.0021),
        "l0": _measured(31.7, 0.4),
        "dead_share": _measured(0.0413, 0.003),
        "dense_share": _measured(0.0021, 0.0004),
        "cosine": _measured(0.9031, 0.0011),
        "l2_ratio": _measured(0.912, 0.002),
        "ce_loss_recovered": _measured(0.9712, 0.0014),
        "kl": _measured(0.1021, 0.0032),
        "ce_clean": _measured(3.142, 0.02),
        "ce_spliced": _measured(3.251, 0.02),
        "ce_zero": _measured(10.81, 0.03),
        "ce_mean": {"value": 7.31, "low": None, "high": None, "version": 1},
    },
    "baselines": {
        "pca": {"fvu": _measured(0.402, 0.003), "l0": _measured(32, 0)},
        "random": {"fvu": _measured(0.871, 0.004), "l0": _measured(32, 0)},
        "neurons": {"fvu": _measured(0.633, 0.004)},
    },
}
