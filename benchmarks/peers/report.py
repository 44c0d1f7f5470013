"""Results as dated JSON, a Markdown page and a plot."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Entry = dict[str, Any]
Column = tuple[str, Callable[[Entry], str]]


def write(folder: Path, stem: str, results: Entry) -> list[Path]:
    """Write ``stem.json``, ``stem.md`` and, when there are training rows, ``stem.svg`` and ``stem.png``."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{stem}.json", folder / f"{stem}.md"]
    files[0].write_text(json.dumps(results, indent=1) + "\n")
    files[1].write_text(markdown(results))
    return files + plot(results, folder / stem)


def markdown(results: Entry) -> str:
    """All sections as tables."""
    machine = results["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    lines = [
        f"# Speed beside the peers, {results['date']}",
        "",
        f"{machine['cpu']}, {machine['cores']} cores ({', '.join(machine['flags'])}), {machine['memory_gib']} GiB, "
        f"{machine['torch_threads']} torch threads, {machine['system']}. {versions}.",
        "",
        f"`{results['command']}`. One process, callables interleaved round-robin, {results['warmups']} warm-up rounds, "
        f"{results['rounds']} timed ones. Times are medians over rounds; ratios are formed within a round, and their "
        "median is given. *x best peer* is how many times as fast as the fastest peer that trains the same "
        "architecture, at whatever setting; *x best float32 peer* leaves out those that compute in bfloat16. "
        "*/ GEMM* is the time over that of the encode's matrix product alone.",
    ]
    for section, found in results["sections"].items():
        for part in found:
            lines += ["", f"## {_title(section, part)}", "", *_table(section, part, _twins(results, part))]
    return "\n".join(lines) + "\n"


def _title(section: str, part: Entry) -> str:
    what = {
        "train": "Training step",
        "auxk": "Training step, AuxK active",
        "encode": "Encode",
        "pursuit": "Matching pursuit encode",
        "buffer": "Shuffle buffer",
        "quality": "Quality",
        "endtoend": "End to end",
    }[section]
    facts = [part.get("arch"), part["size"]]
    facts += [f"{part['n_rows']:,} rows"] if "n_rows" in part else []
    facts += [f"{part['dead']:,} features dead"] if "dead" in part else []
    facts += [f"{part['steps']} steps"] if "steps" in part else []
    return f"{what}: {', '.join(fact for fact in facts if fact)}"


def _table(section: str, part: Entry, twins: dict[str, Entry]) -> list[str]:
    working = [row for row in part["rows"] if "error" not in row]
    columns = QUALITY if section == "quality" else TIMES
    if section == "train":
        columns = [*TIMES, *((name, _of_twin(show, twins)) for name, show in TWIN)]
    shown = [column for column in columns if any(column[1](row) for row in working)]
    lines = ["| " + " | ".join(["", *(name for name, _ in shown)]) + " |"]
    lines.append("|" + "|".join(["---", *["---:"] * len(shown)]) + "|")
    for row in sorted(working, key=lambda row: row.get("ms", 0.0)):
        label = f"**{_label(row)}**" if row["ours"] else _label(row)
        lines.append("| " + " | ".join([label, *(show(row) for _, show in shown)]) + " |")
    floors = part.get("rounds", {}).get("timings", {})
    for name in (name for name in floors if name.startswith("encode GEMM")):
        cells = [f"{floors[name]['median_ms']:.3g}", *[""] * (len(shown) - 1)]
        lines.append("| " + " | ".join([f"*{name}*", *cells]) + " |")
    failed = [row for row in part["rows"] if "error" in row]
    if failed:
        lines += ["", "Not run:", "", *(f"- {_label(row)}: {row['error']}" for row in failed)]
    if "rounds" in part:
        before, after = part["rounds"]["load_before"][0], part["rounds"]["load_after"][0]
        lines += ["", f"Load average {before} before, {after} after."]
    return lines


def _label(row: Entry) -> str:
    if "name" not in row:
        return row["key"]
    marks = [row["setting"], row["note"]]
    return f"{row['name']}: {'; '.join(mark for mark in marks if mark)}"


def _number(key: str, form: str) -> Callable[[Entry], str]:
    return lambda row: "" if row.get(key) is None else format(row[key], form)


def _of_twin(show: Callable[[Entry], str], twins: dict[str, Entry]) -> Callable[[Entry], str]:
    return lambda row: show(twins.get(row["key"], {}))


def _twins(results: Entry, part: Entry) -> dict[str, Entry]:
    """The quality entries of the same size and architecture, by row key."""
    for twin in results["sections"].get("quality", []):
        if (twin["size"], twin["arch"]) == (part["size"], part.get("arch")):
            return {row["key"]: row for row in twin["rows"] if "error" not in row}
    return {}


TIMES: list[Column] = [
    ("ms", _number("ms", ".4g")),
    ("min", _number("min_ms", ".4g")),
    ("IQR", _number("iqr_ms", ".2g")),
    ("rows/s", _number("rows_per_second", ",.0f")),
    ("x best peer", _number("x_best_peer", ".2f")),
    ("x best float32 peer", _number("x_best_float32_peer", ".2f")),
    ("/ GEMM float32", _number("x_gemm_float32", ".2f")),
    ("/ GEMM bf16", _number("x_gemm_bfloat16", ".1f")),
    ("same features", _number("same_features", ".2%")),
]
TWIN: list[Column] = [("held-out FVU", _number("fvu", ".5f")), ("dead", _number("dead_share", ".2%"))]
QUALITY: list[Column] = [
    ("FVU at the start", _number("start", ".5f")),
    ("held-out FVU", _number("fvu", ".5f")),
    ("dead", _number("dead_share", ".2%")),
    ("L0", _number("l0", ".2f")),
    ("seconds (not a timing)", _number("seconds", ".0f")),
]


def plot(results: Entry, stem: Path) -> list[Path]:
    """Training rows per second, a panel for each size, TopK only; unweave's bars in colour."""
    parts = [part for part in results["sections"].get("train", []) if part["arch"] == "TopK"]
    if not parts:
        return []
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    ranked = sorted((row for row in parts[0]["rows"] if "ms" in row), key=lambda row: row["rows_per_second"])
    keys = [row["key"] for row in ranked]
    figure, axes = plt.subplots(
        1, len(parts), figsize=(5.5 + 3.5 * len(parts), 1.2 + 0.28 * len(keys)), squeeze=False, sharey=True
    )
    for axis, part in zip(axes[0], parts, strict=True):
        rows = {row["key"]: row for row in part["rows"] if "ms" in row and row["key"] in keys}
        speed = [rows[key]["rows_per_second"] if key in rows else 0.0 for key in keys]
        colours = ["#c2410c" if row["ours"] else "#94a3b8" if row["exact"] else "#d8dee6" for row in ranked]
        bars = axis.barh([row["key"] for row in ranked], speed, color=colours)
        axis.bar_label(bars, [f"{value:,.0f}" for value in speed], padding=3, fontsize=8)
        axis.set_title(f"TopK, {part['size']}", fontsize=10, loc="left")
        axis.set_xlabel("rows per second, full training step", fontsize=9)
        axis.margins(x=0.18)
        axis.tick_params(labelsize=8)
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.locator_params(axis="x", nbins=4)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    files = [stem.with_suffix(suffix) for suffix in (".svg", ".png")]
    for file in files:
        figure.savefig(file, dpi=150)
    plt.close(figure)
    return files
