"""Make the catalogue's snapshot, which is used where the hub was not asked.

    python docs/catalogue.py path/to/sae_lens/pretrained_saes.yaml SAE_LENS_VERSION
    python docs/catalogue.py                    # from the hub itself

The first reads the list of releases that the package sae-lens ships: repositories, the places in them, and the scales
that the files of some do not say. What no format of unweave can read, or knows no repository of, is left out and told.
"""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml

from unweave.files import read_json, write_text
from unweave.formats import catalogue
from unweave.formats.catalogue.entry import KNOWN
from unweave.formats.catalogue.listings import SNAPSHOT, VERSION, cache, today
from unweave.formats.catalogue.paths import compress, expand

# The list names folders; which file in them holds the weights follows from how the library reads them.
FILES = {
    None: "{}/sae_weights.safetensors",
    "gemma_2": "{}/params.npz",
    "gemma_2_transcoder": "{}/params.npz",
    "gemma_3": "{}/params.safetensors",
    "llama_scope": "{}/checkpoints/final.safetensors",
    "llama_scope_r1_distill": "{}/sae_weights.safetensors",
    "dictionary_learning_1": "{}/ae.pt",
    "mntss_clt_layer_transcoder": "W_enc_{}.safetensors",
}
# Not in the list, but loaded by these paths in public code.
MORE = {
    "EleutherAI/sae-pythia-410m-65k": "layers.{0..23}.mlp/sae.safetensors",
    "EleutherAI/sae-DeepSeek-R1-Distill-Qwen-1.5B-65k": "layers.{0..27}.mlp/sae.safetensors",
    "mntss/clt-gemma-2-2b-426k": "W_enc_{0..25}.safetensors",
}
R1, D_MODEL = "fnlp/Llama-Scope-R1-Distill", 4096
TM = "tommmcgrath/gpt2-small-mlp-out-saes"


def from_list(path: Path, version: str) -> dict[str, Any]:
    releases = yaml.load(path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    reader = {repository: kind for kind in KNOWN.values() for repository in kind.repositories}
    files: dict[str, set[str]] = defaultdict(set)
    scales: dict[str, dict[str, float]] = defaultdict(dict)
    left_out: dict[str, int] = defaultdict(int)
    for release in releases.values():
        repository, how = release["repo_id"], release.get("conversion_func")
        for sae in release["saes"]:
            file = FILES.get(how, "{}").format(sae["path"])
            entry = reader[repository].named(repository, file) if repository in reader else None
            if entry is None and how != "mntss_clt_layer_transcoder":
                left_out[repository] += 1
                continue
            files[repository].add(file)
            if entry and "norm_scaling_factor" in sae:
                scales[repository][entry.place] = sae["norm_scaling_factor"]
    for repository, n in left_out.items():
        print(f"left out: {n} of {repository}", file=sys.stderr)
    listed = f"sae-lens {version}, {today()}"
    repositories = {repository: {"files": compress(found)} for repository, found in sorted(files.items())}
    repositories |= {name: {"files": [file], "listed": f"public code, {today()}"} for name, file in MORE.items()}
    # Llama Scope R1 asks for the average norm; the scale is sqrt(d) divided by it.
    norms = {place: math.sqrt(D_MODEL) / scale for place, scale in scales[R1].items()}
    options = {R1: {"norm": in_order(norms)}, TM: {"norm_scaling_factor": in_order(scales[TM])}}
    return {"version": VERSION, "listed": listed, "repositories": repositories, "options": options}


def in_order(values: dict[str, float]) -> dict[str, list[float]]:
    """Values by place as values by pattern, in the order in which it names the places."""
    return {pattern: [float(f"{values[place]:.7g}") for place in expand(pattern)] for pattern in compress(values)}


def from_hub() -> dict[str, Any]:
    for reason in catalogue.refresh().failed.values():
        print(f"not listed: {reason}", file=sys.stderr)
    before = read_json(SNAPSHOT)
    return before | {"repositories": before["repositories"] | read_json(cache())["repositories"]}


if __name__ == "__main__":
    snapshot = from_list(Path(sys.argv[1]), sys.argv[2]) if len(sys.argv) == 3 else from_hub()
    repositories = snapshot.pop("repositories")
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(record)}" for name, record in sorted(repositories.items()))
    rest = json.dumps(snapshot).removesuffix("}")
    write_text(SNAPSHOT, f'{rest},\n "repositories": {{\n{lines}\n}}\n}}\n')
    print(f"{SNAPSHOT}: {SNAPSHOT.stat().st_size:,} bytes, {len(repositories)} repositories")
