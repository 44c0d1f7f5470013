"""What is worked out once the codes are on disk: co-firing, top tokens, neighbours, output logits, search text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from unweave.errors import UnweaveError
from unweave.features._tokens import Vocabulary, decode_tokens, token_label
from unweave.features.feature import Origin
from unweave.progress import track

_CELLS = 1 << 23  # elements of the largest dense piece held at a time


def _chunks(n: int, width: int, description: str) -> Iterator[tuple[int, int]]:
    """Ranges of at most ``_CELLS / width`` features, under a progress bar."""
    step = max(1, _CELLS // max(width, 1))
    with track(n, description, "features") as progress:
        for a in range(0, n, step):
            yield a, min(a + step, n)
            progress.advance(min(step, n - a))


def _ragged(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The concatenated ranges ``start .. start + count``."""
    base = counts.cumsum() - counts
    return np.arange(int(counts.sum())) + np.repeat(starts - base, counts)


def _places(row: np.ndarray) -> np.ndarray:
    """The place of each entry within its row, for entries sorted by row."""
    new = np.flatnonzero(np.diff(row, prepend=-1))
    return np.arange(len(row)) - np.repeat(new, np.diff(new, append=len(row)))


def cofiring(
    sample_offsets: np.ndarray,
    sample_token: np.ndarray,
    code_offsets: np.ndarray,
    code_indices: np.ndarray,
    density: np.ndarray,
    n_keep: int,
) -> dict[str, np.ndarray]:
    """For each feature the features that fire on the same tokens, from its sampled firings.

    Ranked by ``p * log(p / density)``: often together, and more often than chance. Only pairs seen at least twice
    (where the sample has two) and with lift above 1 count.

    Returns:
        ``cofiring_feature (n_features, n_keep)`` int32, -1 where there are fewer, and ``cofiring_share``, the share
        of the sampled firings on which the other feature fires too.
    """
    n = len(density)
    kept_feature = np.full((n, n_keep), -1, "i4")
    kept_share = np.zeros((n, n_keep), "f4")
    counts = np.diff(sample_offsets)
    rare = np.maximum(density, 1e-12)
    # A sampled firing brings all entries of its row, so rows too bound how many features are looked at together.
    entries = int(counts.max(initial=0)) * (len(code_indices) // max(len(code_offsets) - 1, 1) + 1)
    for a, b in _chunks(n, max(n, 4 * entries), "co-firing"):
        tokens = sample_token[sample_offsets[a] : sample_offsets[b]]
        if len(tokens) == 0:
            continue
        of = np.repeat(np.arange(b - a), counts[a:b])
        lengths = code_offsets[tokens + 1] - code_offsets[tokens]
        other = code_indices[_ragged(code_offsets[tokens], lengths)]
        pairs = np.bincount(np.repeat(of, lengths) * n + other, minlength=(b - a) * n)
        seen = np.flatnonzero(pairs)
        row, column, together = seen // n, seen % n, pairs[seen]
        share = together / counts[a:b][row]
        score = share * np.log(share / rare[column])
        good = (column != row + a) & (score > 0) & (together >= np.minimum(2, counts[a:b][row]))
        row, column, share, score = row[good], column[good], share[good], score[good]
        order = np.lexsort((column, -score, row))
        row = row[order]
        place = _places(row)
        best = place < n_keep
        kept_feature[a + row[best], place[best]] = column[order][best]
        kept_share[a + row[best], place[best]] = share[order][best]
    return {"cofiring_feature": kept_feature, "cofiring_share": kept_share}


def top_tokens(
    sample_offsets: np.ndarray, sample_token: np.ndarray, tokens: np.ndarray, n_keep: int
) -> dict[str, np.ndarray]:
    """For each feature the token ids it fires on most, with their share of its sampled firings (-1 where fewer)."""
    n = len(sample_offsets) - 1
    feature = np.repeat(np.arange(n), np.diff(sample_offsets))
    token = tokens[sample_token].astype("i8")
    known = token >= 0
    pairs, counts = np.unique((feature[known] << 32) | token[known], return_counts=True)
    row, token = pairs >> 32, pairs & 0xFFFFFFFF
    order = np.lexsort((token, -counts, row))
    row, token, counts = row[order], token[order], counts[order]
    place = _places(row)
    best = place < n_keep
    kept = np.full((n, n_keep), -1, "i4")
    share = np.zeros((n, n_keep), "f4")
    kept[row[best], place[best]] = token[best]
    share[row[best], place[best]] = counts[best] / np.diff(sample_offsets)[row[best]]
    return {"top_tokens": kept, "top_tokens_share": share}


def similar(directions: Tensor, n_keep: int) -> dict[str, np.ndarray]:
    """For each feature the ones whose decoder direction has the largest cosine with its own."""
    n = len(directions)
    n_keep = min(n_keep, n - 1)
    unit = torch.nn.functional.normalize(directions.float(), dim=1)
    kept = np.zeros((n, n_keep), "i4")
    cosine = np.zeros((n, n_keep), "f4")
    for a, b in _chunks(n if n_keep else 0, n, "neighbours"):
        products = unit[a:b] @ unit.T
        products[torch.arange(b - a), torch.arange(a, b)] = -2.0  # not itself
        best = products.topk(n_keep, dim=1)
        kept[a:b], cosine[a:b] = best.indices.cpu().numpy(), best.values.cpu().numpy()
    return {"similar_feature": kept, "similar_cosine": cosine}


def logits(
    directions: Tensor, unembed: Callable[[Tensor], Tensor], n_keep: int, vocabulary: Vocabulary | None
) -> dict[str, np.ndarray]:
    """The output tokens each feature raises most and lowers most, a few features at a time."""
    out: dict[str, list[np.ndarray]] = {f"{sign}_{what}": [] for sign in ("positive", "negative") for what in "tv"}
    width = unembed(directions[:1]).shape[-1]
    for a, b in _chunks(len(directions), width, "logits"):
        effect = unembed(directions[a:b]).float()
        if effect.shape != (b - a, width):
            raise UnweaveError(f"unembed: expected ({b - a}, {width}) logits, found {tuple(effect.shape)}")
        if vocabulary is not None:
            effect = effect[:, : len(vocabulary)]  # some models pad their output layer
        keep = min(n_keep, effect.shape[1])
        for sign, largest in (("positive", True), ("negative", False)):
            best = effect.topk(keep, dim=1, largest=largest)
            out[f"{sign}_t"].append(best.indices.cpu().numpy().astype("i4"))
            out[f"{sign}_v"].append(best.values.cpu().numpy().astype("f4"))
    names = {"t": "logit_token", "v": "logit_value"}
    return {f"{k[:-2]}_{names[k[-1]]}": np.concatenate(parts) for k, parts in out.items()}


def origins(found: Mapping[int, Origin], n_features: int) -> dict[str, np.ndarray]:
    """Of each feature where its atom's row came from (document -1 where that is not known), and the text there.

    Returns:
        ``origin_document``, ``origin_position`` ``(n_features,)``; ``origin_text``, bytes, in pieces (before, the token
        itself, after) that begin at ``origin_offsets`` ``(3 n_features + 1,)``.
    """
    document, position = np.full(n_features, -1, "i8"), np.zeros(n_features, "i4")
    pieces = []
    for feature in range(n_features):
        origin = found.get(feature)
        if origin is not None:
            document[feature], position[feature] = origin.document, origin.position
        texts = ("", "", "") if origin is None else (origin.before, origin.text, origin.after)
        pieces += [text.encode("utf-8", "replace") for text in texts]
    offsets = np.concatenate([[0], np.cumsum([len(piece) for piece in pieces])]).astype("i8")
    text = np.frombuffer(b"".join(pieces), "u1")
    return {
        "origin_document": document,
        "origin_position": position,
        "origin_text": text,
        "origin_offsets": offsets,
    }


def search_text(
    columns: dict[str, np.ndarray], vocabulary: Vocabulary | None, window: Callable[[int], tuple[int, int]]
) -> dict[str, np.ndarray]:
    """What ``list(search=...)`` looks through: per feature one line of case-folded text (UTF-8).

    It holds the top tokens, the logit tokens, the snippet around the best peak and the text of the atom's row.
    ``window(token)`` gives the snippet's first and last token.
    """
    n = len(columns["top_offsets"]) - 1
    tables = [columns[c] for c in ("top_tokens", "positive_logit_token", "negative_logit_token") if c in columns]
    lines = []
    for feature in range(n):
        ids = dict.fromkeys(int(t) for table in tables for t in table[feature] if t >= 0)
        parts = [token_label(vocabulary, t).strip() for t in ids]
        best = int(columns["top_offsets"][feature])
        if vocabulary is not None and best < columns["top_offsets"][feature + 1]:
            a, b = window(int(columns["top_token"][best]))
            parts.append("".join(decode_tokens([vocabulary.bytes_of(int(t)) for t in columns["tokens"][a:b]])))
        if "origin_offsets" in columns:
            a, b = columns["origin_offsets"][[3 * feature, 3 * feature + 3]]
            parts.append(bytes(columns["origin_text"][a:b]).decode())
        lines.append(fold(" ".join(parts)) + b"\n")
    offsets = np.concatenate([[0], np.cumsum([len(line) for line in lines])]).astype("i8")
    return {"search_text": np.frombuffer(b"".join(lines), "u1"), "search_offsets": offsets}


def fold(text: str) -> bytes:
    """Text as it is searched: no case, white space as single blanks."""
    return " ".join(text.casefold().split()).encode("utf-8", "replace")
