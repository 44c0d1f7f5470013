"""The catalogue: what names say, the snapshot, patterns, asking a hub on 127.0.0.1, and names that load."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import unweave
from unweave import formats
from unweave.errors import UnweaveError
from unweave.formats import catalogue, registry
from unweave.formats._checkpoint import Checkpoint
from unweave.formats.catalogue.entry import KNOWN, binary
from unweave.formats.catalogue.listings import SNAPSHOT, cache
from unweave.formats.catalogue.paths import compress, expand

QWEN = "Qwen/SAE-Res-Qwen3-1.7B-Base-W32K-L0_50"
REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNWEAVE_CACHE", str(tmp_path / "cache"))


def entry(name: str) -> catalogue.Entry:
    found = catalogue.find(name)
    assert found is not None, name
    return found


@pytest.mark.parametrize(
    "paths",
    [
        [],
        ["one"],
        [f"layer_{i}/width_{w}k/l0_{size}" for i in range(26) for w in (16, 65) for size in ("big", "small")],
        ["a_00", "a_01", "a_1", "a_2", "a_3", "a_07"],
        ["layer_0/l0_3/x", "layer_0/l0_5/x", "layer_1/l0_5/x", "layer_1/x", ":v1/+é"],
    ],
)
def test_patterns_stand_for_their_paths_and_no_others(paths: list[str]) -> None:
    patterns = compress(paths)
    assert Counter(path for pattern in patterns for path in expand(pattern)) == Counter(paths)
    assert len(patterns) <= len(paths)


def test_patterns_are_few_and_leave_braces_out() -> None:
    assert compress(f"layer_{i}_{w}k" for i in range(26) for w in (16, 65)) == ["layer_{0..25}_{16,65}k"]
    assert compress(["a{b}", "a,b", "ab"]) == ["ab"]


def test_widths_are_rounded_powers_of_two() -> None:
    words = {"4k": 4096, "16k": 16384, "65k": 65536, "131k": 131072, "262k": 262144, "524k": 524288, "1m": 1048576}
    assert {word: binary(word) for word in words} == words
    assert binary("wide") is None


def test_the_snapshot_is_small_and_consistent() -> None:
    assert SNAPSHOT.stat().st_size < 52_000
    known = [repository for kind in KNOWN.values() for repository in kind.repositories]
    assert len(known) == len(set(known))
    assert set(json.loads(SNAPSHOT.read_text())["repositories"]) <= set(known)
    entries = catalogue.entries()
    assert len(entries) > 12_000
    names = [entry.name.casefold() for entry in entries]
    assert len({*names, *(entry.hub_id.casefold() for entry in entries)}) >= len(names)
    assert len(set(names)) == len(names)
    for one in entries:
        assert one.options.keys() <= formats.get(one.format).options.keys()
        assert one.listed
        assert one.model


def test_every_option_of_the_snapshot_belongs_to_an_entry() -> None:
    options = json.loads(SNAPSHOT.read_text())["options"]
    for repository, record in options.items():
        places = {e.place for e in catalogue.entries() if e.repository == repository}
        for patterns in record.values():
            assert places == {place for pattern in patterns for place in expand(pattern)}


def test_names_and_hub_ids_are_found_again() -> None:
    some = catalogue.entries()[:: len(catalogue.entries()) // 60]
    assert len(some) >= 60
    for one in some:
        assert catalogue.find(one.name) is one
        assert catalogue.find(f"hf://{one.hub_id.upper()}/") is one
        assert catalogue.resolve(one.name, {"x": 1})[0] == one.hub_id


# name: format, model, site, target site, layer, width, l0, k
FACTS = {
    "gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82": (
        *("gemma-scope", "google/gemma-2-2b", "layers.12", None, 12, 16384, 82, None),
    ),
    "gemma-scope-9b-pt-att/layer_9/width_131k/average_l0_16": (
        *("gemma-scope", "google/gemma-2-9b", "layers.9.attn.heads", None, 9, 131072, 16, None),
    ),
    "gemma-scope-2b-pt-transcoders/layer_25/width_16k/average_l0_41": (
        *(
            "gemma-scope",
            "google/gemma-2-2b",
            "layers.25.pre_feedforward_layernorm",
            "layers.25.post_feedforward_layernorm",
            25,
            16384,
            41,
            None,
        ),
    ),
    "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6": (
        *("gemma-scope", "google/gemma-2-2b", None, None, None, 4096, 6, None),
    ),
    "gemma-scope-2-12b-it/resid_post/layer_12_width_16k_l0_small": (
        *("gemma-scope-2", "google/gemma-3-12b-it", "layers.12", None, 12, 16384, None, None),
    ),
    "gemma-scope-2-270m-pt/transcoder_all/layer_3_width_262k_l0_big_affine": (
        *(
            "gemma-scope-2",
            "google/gemma-3-270m",
            "layers.3.pre_feedforward_layernorm",
            "layers.3.post_feedforward_layernorm",
            3,
            262144,
            None,
            None,
        ),
    ),
    "Llama3_1-8B-Base-L15R-8x": (
        *("llama-scope", "meta-llama/Llama-3.1-8B", "layers.15", None, 15, 32768, None, None),
    ),
    "Llama-Scope-R1-Distill/800M-Slimpajama-0-OpenR1-Math-220k/L15R": (
        *("llama-scope-r1", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "layers.15", None, 15, None, None, None),
    ),
    "SAE-Res-Qwen3.5-27B-W80K-L0_100/layer63": (
        *("qwen-scope", "Qwen/Qwen3.5-27B", "layers.63", None, 63, 81920, None, 100),
    ),
    "GPT2-Small-SAEs-Reformatted/blocks.8.hook_resid_pre": (
        *("saelens", "openai-community/gpt2", "layers.8:input", None, 8, None, None, None),
    ),
    "GPT2-Small-OAI-v5-32k-attn-out-SAEs/v5_32k_layer_3": (
        *("saelens", "openai-community/gpt2", "layers.3.attn", None, 3, 32768, None, None),
    ),
    "gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40/standard/blocks.12.hook_resid_post": (
        *("saelens", "google/gemma-2-2b", "layers.12", None, 12, 32768, 40, None),
    ),
    "saes-gpt-oss-20b/resid_post_layer_11/trainer_0": (
        *("dictionary_learning", "openai/gpt-oss-20b", "layers.11", None, 11, None, None, None),
    ),
    "qwen3-4b-transcoders/layer_7": (*("circuit-tracer", "Qwen/Qwen3-4B", None, "layers.7.mlp", 7, None, None, None),),
    "clt-gemma-2-2b-2.5M": ("circuit-tracer-clt", "google/gemma-2-2b", None, None, None, None, None, None),
    "sae-pythia-410m-65k/layers.5.mlp": ("sparsify", "EleutherAI/pythia-410m", None, None, 5, 65536, None, None),
    "Llama-3.1-8B-Instruct-SAE-l19": (
        *("goodfire", "meta-llama/Llama-3.1-8B-Instruct", "layers.19", None, 19, None, None, None),
    ),
}


@pytest.mark.parametrize("name", FACTS)
def test_what_names_say(name: str) -> None:
    e = entry(name)
    assert (e.format, e.model, e.site, e.target_site, e.layer, e.width, e.l0, e.k) == FACTS[name]


def test_who_says_what() -> None:
    said = entry("Llama3_1-8B-Base-L15R-8x").to_dict()
    assert said["facts_from"] == {"model": "list", "site": "name", "layer": "name", "width": "name"}
    assert said["listed"].startswith("sae-lens")
    assert entry("GPT2-Small-OAI-v5-32k-attn-out-SAEs/v5_32k_layer_3").declared == ("model", "site")
    assert entry("gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_82").declared == ()


@pytest.mark.parametrize(
    ("repository", "file"),
    [
        ("google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82/config.json"),
        ("google/gemma-scope-2b-pt-res", "layer_12/width_wide/params.npz"),
        ("google/gemma-scope-2-1b-it", "crosscoder/layer_7_width_65k_l0_big/params.safetensors"),
        ("fnlp/Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L15R-8x/checkpoints/step_9.safetensors"),
        ("canrager/lm_sae", "a/resid_post_layer_3_checkpoints/trainer_0_step_9/ae.pt"),
        ("mwhanna/qwen3-4b-transcoders", "features/layer_0.safetensors"),
        ("jbloom/GPT2-Small-SAEs-Reformatted", "sae_weights.safetensors"),
        ("EleutherAI/sae-pythia-410m-65k", "layers.0.mlp/optimizer.pt"),
        (QWEN, "layer.sae.pt"),
    ],
)
def test_odd_files_are_no_dictionaries(repository: str, file: str) -> None:
    kind = next(kind for kind in KNOWN.values() if repository in kind.repositories)
    assert kind.named(repository, file) is None


def test_patterns_fit_names_and_facts() -> None:
    found = unweave.list_dictionaries("*GEMMA*12B*", "layer=12 width=16384")
    assert found
    assert all("12b" in e.repository and (e.layer, e.width) == (12, 16384) for e in found)
    assert {e.layer for e in unweave.list_dictionaries("layer=1")} == {1}
    assert {e.format for e in unweave.list_dictionaries("format=qwen*")} == {"qwen-scope"}
    assert {e.k for e in unweave.list_dictionaries("qwen-scope k=50")} == {50}
    assert all(e.layer is None for e in unweave.list_dictionaries("layer=unknown"))
    assert unweave.list_dictionaries("layers.12.attn", "gemma-2-2b")  # a site, and a part of a model's name
    assert len(unweave.list_dictionaries()) == len(catalogue.entries())
    assert unweave.list_dictionaries("qwen-scope", "gemma") == []
    with pytest.raises(UnweaveError, match="no fact 'lyer', as in 'lyer=3': did you mean 'layer'"):
        unweave.list_dictionaries("lyer=3")


def test_near_names_for_what_nothing_fits() -> None:
    assert catalogue.near(["*gema*"]).startswith("'*gema*' fits none: did you mean 'gemma'")
    assert "did you mean '16384'" in catalogue.near(["gemma", "width=16385"])
    assert catalogue.near(["qwen-scope", "gemma"]) == "each of the words fits some, no dictionary fits all of them"


def test_a_name_that_goes_on_wrong() -> None:
    with pytest.raises(UnweaveError, match=r"did you mean .*average_l0_82'.*`unweave list` shows them all"):
        unweave.load("gemma-scope-2b-pt-res/layer_12/width_16k/average_l0_83")
    assert catalogue.find("google/gemma-2-2b") is None
    assert catalogue.find("gemma-scope-2b-pt-res") is None  # a repository, not a dictionary


# A hub: two calls for a repository, the second in pages.


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[str, list[str] | int]], None]]:
    """Call it with the files of each repository, or the status its calls fail with; others are not there (404)."""
    held: dict[str, list[str] | int] = {}

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path, _, query = self.path.partition("?")
            asked = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/tree/.*)?(/revision/.*)?", path)
            files = held.get(asked[1] if asked else "", 404)
            if asked is None or isinstance(files, int):
                self._answer(404 if asked is None else int(str(files)), {"error": "Not this one"})
            elif asked[2]:
                start = int(query.partition("cursor=")[2] or 0)
                more = f'<http://{self.headers["Host"]}{path}?cursor={start + 3}>; rel="next"'
                page = [{"type": "file", "path": name, "size": 1, "oid": REVISION} for name in files[start : start + 3]]
                self._answer(200, page, {"Link": more} if start + 3 < len(files) else {})
            else:
                self._answer(200, {"id": asked[1], "sha": REVISION, "siblings": []})

        def _answer(self, status: int, values: object, headers: dict[str, str] | None = None) -> None:
            body = json.dumps(values).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", **(headers or {})}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_address[1]}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    try:
        yield held.update
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three formats only, so that a refresh asks for few repositories."""
    for name in KNOWN.keys() - {"qwen-scope", "gemma-scope-2", "sparsify"}:
        monkeypatch.delitem(KNOWN, name)


@pytest.mark.usefixtures("few")
def test_refresh_lists_what_the_hub_holds(hub: Callable[[dict], None]) -> None:
    before = len(catalogue.list_dictionaries("W64K"))
    odd = [
        "../layer1/sae.safetensors",
        "layers.10\x1b[31m/sae.safetensors",
        "README.md",
        ".gitattributes",
        "layer7.sae.pt/x",
        "Layer 1 {a,b}.sae.pt",
        "layers/ü.json",
        "state.pt",
    ]
    clt = [f"clt/width_262k_l0_big/params_layer_{i}.safetensors" for i in range(4)]
    hub(
        {
            QWEN: [*odd, *(f"layer{i}.sae.pt" for i in range(30))],
            "google/gemma-scope-2-1b-it": [*odd, *clt, "resid_post/layer_3_width_16k_l0_small/params.safetensors"],
            "EleutherAI/sae-llama-3-8b-32x": [*odd, "layers.10/sae.safetensors", "layers.10/cfg.json", "config.json"],
            "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50": 403,  # gated
        }
    )
    done = catalogue.refresh()
    assert done.listed == 3
    assert "403" in done.failed["Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50"]
    found = [e for e in catalogue.entries() if e.repository == QWEN]
    assert [e.place for e in found] == [f"layer{i}.sae.pt" for i in range(30)]
    assert {(e.revision, e.listed.split(",")[0], e.k) for e in found} == {(REVISION, "the hub", 50)}
    now = {e.name: e.format for e in catalogue.entries() if e.repository == "google/gemma-scope-2-1b-it"}
    assert now == {
        "gemma-scope-2-1b-it/clt/width_262k_l0_big": "gemma-scope-2-clt",
        "gemma-scope-2-1b-it/resid_post/layer_3_width_16k_l0_small": "gemma-scope-2",
    }
    assert [e.place for e in unweave.list_dictionaries("sae-llama-3-8b-32x")] == ["layers.10"]
    assert "EleutherAI/sae-llama-3-8b-32x" not in catalogue.unlisted()
    assert len(catalogue.list_dictionaries("W64K")) == before  # what is refused keeps what was known of it

    hub({QWEN: 500, "EleutherAI/sae-llama-3-8b-32x": ["layers.11/sae.safetensors"]})
    assert QWEN in catalogue.refresh().failed
    assert len([e for e in catalogue.entries() if e.repository == QWEN]) == 30
    assert catalogue.find("sae-llama-3-8b-32x/layers.11") is not None


@pytest.mark.usefixtures("few")
def test_a_refresh_that_fails_keeps_the_old_listing(
    hub: Callable[[dict], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub({QWEN: ["layer0.sae.pt"]})
    catalogue.refresh()
    before = cache().read_bytes()
    hub({QWEN: 404})
    with pytest.raises(UnweaveError, match=r"the hub lists none of the \d+ known repositories"):
        catalogue.refresh()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(UnweaveError, match=r"the hub cannot be reached .*what was listed before is kept"):
        catalogue.refresh()
    assert cache().read_bytes() == before
    assert len([e for e in catalogue.entries() if e.repository == QWEN]) == 1


def test_a_damaged_listing_is_told(hub: Callable[[dict], None]) -> None:
    cache().parent.mkdir()
    for text in ('{"version": 1, "repositories": {"a/b": {"files": "x"}}}', '{"version": 9}', "[]", "{"):
        cache().write_text(text)
        with pytest.raises(UnweaveError, match=r"catalogue\.json is no"):
            catalogue.entries()
    hub({QWEN: ["layer0.sae.pt"]})
    assert catalogue.refresh().listed == 1  # and a refresh puts it right
    assert catalogue.find(f"{QWEN}/layer0.sae.pt") is not None


# Names that load, from a folder in the hub's place.


@pytest.fixture
def fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(registry, "on_hub", lambda name: nullcontext(Checkpoint(tmp_path / "hub" / name, name)))
    return tmp_path / "hub"


def test_a_short_name_brings_k_with_it(fetched: Path) -> None:
    g = torch.Generator().manual_seed(0)
    w = {"W_enc": torch.randn(64, 8, generator=g), "W_dec": torch.randn(8, 64, generator=g)}
    (fetched / QWEN).mkdir(parents=True)
    torch.save(w | {"b_enc": torch.ones(64), "b_dec": torch.zeros(8)}, fetched / QWEN / "layer3.sae.pt")
    name = "sae-res-qwen3-1.7b-base-w32k-l0_50/layer3"
    facts = formats.inspect(name)
    assert (facts.format, facts.k, facts.site, facts.missing) == ("qwen-scope", 50, "layers.3", None)
    loaded = unweave.load(name)
    assert isinstance(loaded, unweave.Dictionary)
    x = torch.randn(20, 8, generator=g)
    assert loaded.encode(x).l0().max() <= 50
    assert unweave.load(name, k=3).encode(x).l0().max() == 3  # what the user says goes first
    verdict = formats.verify(name, x, l0=3, k=3)
    assert verdict.l0 == 3


def test_a_short_name_brings_the_norm_with_it(fetched: Path) -> None:
    place = "800M-Slimpajama-0-OpenR1-Math-220k/L15R"
    folder = fetched / "fnlp" / "Llama-Scope-R1-Distill" / place
    folder.mkdir(parents=True)
    g = torch.Generator().manual_seed(0)
    w = {"encoder.weight": torch.randn(24, 8, generator=g), "encoder.bias": torch.zeros(24)}
    w |= {"decoder.weight": torch.randn(8, 24, generator=g), "decoder.bias": torch.ones(8)}
    save_file(w | {"log_jumprelu_threshold": torch.zeros(24)}, folder / "sae_weights.safetensors")
    name = f"Llama-Scope-R1-Distill/{place}"
    norm = entry(name).options["norm"]
    assert norm == pytest.approx(11.57464)
    with pytest.raises(UnweaveError, match="give norm="):
        formats.load(folder)
    x = 10 * torch.randn(20, 8, generator=g)
    with torch.no_grad():
        torch.testing.assert_close(formats.load(name)(x), formats.load(folder, norm=norm)(x))
    assert formats.inspect(name).model == entry(name).model


def test_what_lies_here_goes_before_the_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = entry("Llama3_1-8B-Base-L15R-8x").name
    assert catalogue.resolve(name, {})[0] == f"fnlp/Llama3_1-8B-Base-LXR-8x/{name}"
    Path(name).mkdir()
    assert catalogue.resolve(name, {})[0] == name
    assert catalogue.resolve(Path("x"), {"k": 1}) == (Path("x"), {"k": 1})
