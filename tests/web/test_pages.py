"""Every route, with the run of ``english.py``."""

from __future__ import annotations

import re
import shutil
import threading
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from unweave.runs import Run
from unweave.web import create_app

ORIGIN = "http://127.0.0.1:8765"


def client_of(run: Any, **options: Any) -> TestClient:
    return TestClient(create_app(run, **options), base_url=ORIGIN, follow_redirects=False)


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


# ---- overview -------------------------------------------------------------------------------------------------


def test_overview_shows_results_curves_density_and_provenance(client: TestClient) -> None:
    page = client.get("/")
    assert page.status_code == 200
    text = text_of(page.text)
    assert "A ReLU dictionary of 220 features, on layers.12 of example/english-1b" in text.replace(" ,", ",")
    assert "0.183" in text
    assert "0.181 to 0.185" in text  # the interval
    assert "0.402" in text  # the rival beside it
    assert "97.1%" in text
    for name in ("Loss", "FVU", "L0", "Dead share"):
        assert f'aria-label="{name}: from' in page.text
    assert "Features by density" in page.text
    assert "0123456789abcdef0123" in page.text  # the provenance
    assert len(re.findall(r'class="card" href="/features/\d+"', page.text)) == 6


def test_density_bars_lead_to_exactly_their_features(client: TestClient, run: Any) -> None:
    page = client.get("/").text
    bars = re.findall(r'<a href="(/features\?min_density[^"]+)" aria-label="[^"]*: ([\d,]+) features"', page)
    assert sum(int(count.replace(",", "")) for _, count in bars) == int((run.features.table["n_firing"] > 0).sum())
    for address, count in bars:
        found = client.get(address.replace("&amp;", "&").replace("/features", "/api/features", 1)).json()
        assert abs(found["total"] - int(count)) <= 1  # an edge belongs to both neighbours


def test_a_run_of_imported_codes_has_pages_without_its_dictionary(run: Any, tmp_path: Path) -> None:
    shutil.copytree(run.folder / "features", tmp_path / "codes" / "features")
    client = client_of(Run(tmp_path / "codes"))
    assert "Imported codes of 220 features" in text_of(client.get("/").text)
    assert client.get("/features/3").status_code == client.get("/features").status_code == 200
    found = client.get("/api/run").json()
    assert (found["architecture"], found["d_in"], found["n_features"]) == (None, None, 220)
    answer = client.post("/api/encode", json={"text": "some words", "feature": 220}, headers={"Origin": ORIGIN})
    assert "from 0 to 219" in answer.json()["error"]
    assert client.post("/api/encode", json={"text": "some words"}, headers={"Origin": ORIGIN}).status_code >= 400


def test_overview_of_a_run_with_nothing_but_a_dictionary(english: Any, tmp_path: Path) -> None:
    english.identity_dictionary().save(tmp_path / "bare" / "dictionary")
    client = client_of(Run(tmp_path / "bare"))
    text = text_of(client.get("/").text)
    assert "not evaluated yet" in text
    assert "no feature index yet" in text
    assert "No training curves" in text
    assert "no feature index yet" in client.get("/features").text
    assert client.get("/features/0").status_code == 404
    assert client.get("/features/random").headers["location"] == "/features"
    assert client.get("/api/features").status_code == 404
    assert client.get("/api/run").json()["indexed"] is False


# ---- list -----------------------------------------------------------------------------------------------------


def rows_of(html: str) -> list[int]:
    return [int(i) for i in re.findall(r'class="row-link" href="/features/(\d+)"', html)]


def test_list_is_sorted_filtered_and_paged_as_the_store_says(client: TestClient, run: Any) -> None:
    store = run.features
    assert rows_of(client.get("/features").text) == [r.index for r in store.list(include_dead=False).rows]
    by_max = client.get("/features?sort=max_value&order=asc&page=2").text
    expected = store.list(sort="max_value", descending=False, include_dead=False, offset=50)
    assert rows_of(by_max) == [r.index for r in expected.rows]
    assert 'aria-sort="ascending"' in by_max
    assert "51 to 100 of 201 features that fire" in by_max
    dense = rows_of(client.get("/features?min_density=0.01").text)
    assert dense
    assert set(dense) == {int(i) for i in (store.table["density"] >= 0.01).nonzero()[0]}
    found = rows_of(client.get("/features?q=river").text)
    assert 1 in found
    assert len(found) < 60
    assert len(rows_of(client.get("/features?q=7&dead=1").text)) >= 1


def test_list_says_what_it_cannot_do(client: TestClient) -> None:
    page = client.get("/features?min_density=lots&sort=beauty")
    assert page.status_code == 200
    assert "must lie between 0 and 1" in page.text
    assert "cannot be sorted by" in page.text
    assert "No feature matches" in client.get("/features?q=zzzzzz").text
    assert client.get("/features?page=999").headers["location"] == "/features?page=5"
    assert client.get("/features?page=-3").status_code == 200


def test_links_of_the_list_keep_its_filters(client: TestClient) -> None:
    page = client.get("/features?q=the&min_density=0.001&sort=max_value").text
    assert "/features?q=the&amp;min_density=0.001" in page  # the density head
    assert "/features?q=the&amp;sort=max_value&amp;order=asc&amp;min_density=0.001" in page  # the max head, turned


def test_jump_goes_to_a_number_and_searches_for_anything_else(client: TestClient) -> None:
    assert client.get("/features?jump=1&q=+12+").headers["location"] == "/features/12"
    assert client.get("/features?jump=1&q=river").status_code == 200


# ---- one feature ----------------------------------------------------------------------------------------------


def test_feature_page_has_everything_of_the_feature(client: TestClient, run: Any) -> None:
    page = client.get("/features/1").text
    text = text_of(page)
    feature = run.features[1]
    assert "Feature 1" in text
    assert "439" in text
    assert f'rel="prev" href="/features/0"' in page  # noqa: F541
    assert 'rel="next" href="/features/2"' in page
    assert "Values when it fires" in text
    assert page.count('class="ctx"') == len(feature.top) + sum(len(q.contexts) for q in feature.quantiles)
    for other, _ in feature.similar:
        assert f'href="/features/{other}"' in page
    for other, _, _ in feature.cofiring:
        assert f'href="/features/{other}"' in page
    for token, _ in feature.positive_logits + feature.negative_logits:
        assert token.strip() in page or not token.isascii()
    assert 'data-tip="river  ' in page
    assert 'class="tok h10 peak"' in page


def test_contexts_hold_the_whole_item_and_the_exact_peak(client: TestClient, run: Any) -> None:
    page = client.get("/features/1").text
    first = re.search(r'<p class="text".*?</p>', page, re.S)
    assert first is not None
    text = re.sub(r"<[^>]+>", "", first[0]).replace("…", "")
    best = run.features[1].contexts(1, before=500, after=500)[0]
    assert text.strip() == best.text.replace("\n", "↵").strip()


def test_ends_of_the_range_have_no_neighbour(client: TestClient) -> None:
    first, last = client.get("/features/0").text, client.get("/features/219").text
    assert "<a class" in first
    assert 'rel="prev"' not in first
    assert 'rel="next"' not in last


def test_dead_feature_is_told(client: TestClient, english: Any) -> None:
    page = client.get(f"/features/{english.DEAD}").text
    assert "Dead feature." in page
    assert "21,179 indexed rows" in page or "indexed rows" in page
    assert 'class="ctx"' not in page
    assert "Raises" in page  # what it would write is known


@pytest.mark.parametrize("index", ["220", "-1", "abc", "1.5", "99999999999999999999", "%3Cscript%3E"])
def test_out_of_range_is_a_404_that_names_the_range(client: TestClient, index: str) -> None:
    page = client.get(f"/features/{index}")
    assert page.status_code == 404
    assert "numbered 0 to 219" in page.text
    assert "<script>" not in page.text.replace("<script src", "")
    answer = client.get(f"/api/features/{index}")
    assert answer.status_code == 404
    assert "numbered 0 to 219" in answer.json()["error"]


def test_no_logits_is_told(english: Any, english_corpus: Any, tmp_path: Path) -> None:
    from unweave.features import build_features

    folder = tmp_path / "vectors"
    english.write_run(folder, english_corpus, text=False, index=False)
    build_features(folder / "features", english.identity_dictionary(), english.batches(english_corpus)[:2])
    client = client_of(Run(folder))
    page = client.get("/features/1").text
    assert "No logits" in page
    assert "Try your own text" not in page  # a run of plain vectors cannot read text
    assert "made from plain vectors" in client.get("/try").text
    refused = client.post("/api/encode", json={"text": "hello"})
    assert refused.status_code == 409
    assert "not made from a language model" in refused.json()["error"]


def test_random_leads_to_a_live_feature(client: TestClient, run: Any) -> None:
    for _ in range(5):
        index = int(client.get("/features/random").headers["location"].rsplit("/", 1)[1])
        assert not run.features[index].is_dead


# ---- escaping -------------------------------------------------------------------------------------------------


def test_a_token_with_a_script_is_shown_as_text(client: TestClient, english: Any) -> None:
    escaped = "&lt;script&gt;alert(1)&lt;/script&gt;"
    for address in (
        f"/features/{english.NASTY}",
        "/features?q=alert",
        "/features?q=" + english.SCRIPT,
        "/try?text=" + english.SCRIPT,
    ):
        page = client.get(address).text
        assert english.SCRIPT not in page
        assert escaped in page, address
    scripts = re.findall(r"<script[^>]*>", client.get(f"/features/{english.NASTY}").text)
    assert all("src=" in tag for tag in scripts)  # no inline script anywhere


def test_names_of_runs_are_escaped_too(english: Any, tmp_path: Path) -> None:
    folder = tmp_path / "<b>bold"
    english.identity_dictionary().save(folder / "dictionary")
    page = client_of(Run(folder)).get("/").text
    assert "<b>bold" not in page
    assert "&lt;b&gt;bold" in page


def test_pages_carry_no_inline_style_or_handler(client: TestClient) -> None:
    for address in ("/", "/features", "/features/1", "/try", "/nowhere"):
        page = client.get(address).text
        assert not re.search(r"<style|\sstyle=|\son\w+=", page), address
        assert not re.search(r'(src|href)="(https?:)?//', page), address


# ---- JSON -----------------------------------------------------------------------------------------------------


def test_api_says_what_the_pages_say(client: TestClient, run: Any) -> None:
    whole = client.get("/api/run").json()
    assert whole["n_features"] == 220
    assert whole["site"] == "layers.12"
    listed = client.get("/api/features?sort=max_value&limit=3").json()
    assert listed["total"] == 201
    assert [r["index"] for r in listed["rows"]] == [r.index for r in run.features.list(sort="max_value", limit=3).rows]
    one = client.get("/api/features/1").json()
    feature = run.features[1]
    assert one["n_firing"] == feature.n_firing == sum(one["histogram"]["counts"])
    assert one["top"][0]["tokens"] == feature.top[0].tokens
    assert one["similar"][0]["feature"] == feature.similar[0][0]
    few = client.get("/api/features?ids=3,1").json()
    assert [r["index"] for r in few["rows"]] == [3, 1]
    assert client.get("/api/features?ids=3,900").status_code == 404
    assert client.get("/api/features?limit=100000").status_code == 400
    assert client.get("/api/features?sort=beauty").status_code == 400
    assert client.get("/api/nothing").json() == {"error": "There is no page at this address."}


def test_encode_gives_every_firing_feature_of_every_token(client: TestClient, run: Any) -> None:
    text = "Maria walked along the river"
    data = client.post("/api/encode", json={"text": text}).json()
    code = run.encode(text)
    assert "".join(t["text"] for t in data["tokens"]) == text
    assert [t["n_firing"] for t in data["tokens"]] == code.code.l0().tolist()
    river = data["tokens"][-1]["features"]
    assert river == sorted(river, key=lambda pair: -pair[1])
    assert dict(map(tuple, river))[1] == pytest.approx(code.values(1)[-1], rel=1e-4)
    assert data["top"][0]["value"] == pytest.approx(code.top(1)[0][1])
    assert data["dense"] == [0]  # the words of group 0 are on more than a tenth of all tokens
    one = client.post("/api/encode", json={"text": text, "feature": 1}).json()
    assert [t["value"] for t in one["tokens"]] == pytest.approx(code.values(1))


@pytest.mark.parametrize(
    ("body", "status", "says"),
    [
        ({"text": "   "}, 400, "no text"),
        ({"text": 3}, 400, "Expected"),
        ([1], 400, "Expected"),
        ({"text": "a", "feature": 220}, 400, "from 0 to 219"),
        ({"text": "a", "feature": "1"}, 400, "from 0 to 219"),
        ({"text": "a" * 20_001}, 413, "20,001 characters; at most 20,000"),
        ({"text": "a, " * 1000}, 413, "tokens; at most 1,024"),
        ({"text": "a" * 300_000}, 413, "too long"),
    ],
)
def test_encode_refuses_clearly(client: TestClient, body: Any, status: int, says: str) -> None:
    answer = client.post("/api/encode", json=body)
    assert answer.status_code == status
    assert says in answer.json()["error"]


def test_encode_wants_json(client: TestClient) -> None:
    assert client.post("/api/encode", content="text=hello").status_code == 415
    broken = client.post("/api/encode", content="{", headers={"content-type": "application/json"})
    assert broken.status_code == 400


def test_the_model_loads_once_in_the_background(run: Any) -> None:
    gate, asked = threading.Event(), []
    run.loads = [lambda: (asked.append(1), gate.wait(10))]
    client = client_of(run)
    assert client.get("/api/model").json()["state"] == "idle"
    assert client.get("/try").status_code == 200
    assert client.get("/api/model").json()["state"] == "idle"  # looking does not load
    for _ in range(2):
        waiting = client.post("/api/encode", json={"text": "the river"})
        assert waiting.status_code == 202
        assert waiting.json()["state"] == "loading"
    gate.set()
    client.app.state.encoder.wait(10)  # type: ignore[attr-defined]
    assert client.post("/api/encode", json={"text": "the river"}).status_code == 200
    assert asked == [1]


def test_a_model_that_does_not_load_is_told_and_tried_again(run: Any) -> None:
    from unweave.errors import UnweaveError

    def fail() -> None:
        raise UnweaveError("no model at example/english-1b: give --model")

    run.loads = [fail]
    client = client_of(run)
    failed = client.post("/api/encode", json={"text": "the river"})
    assert failed.status_code == 503
    assert "give --model" in failed.json()["error"]
    assert client.get("/api/model").json()["state"] == "failed"
    assert client.post("/api/encode", json={"text": "the river"}).status_code == 200


def test_texts_are_encoded_one_at_a_time(run: Any) -> None:
    from concurrent.futures import ThreadPoolExecutor

    inside, most = [], []
    encode = run.encode

    def counted(text: str) -> Any:
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.02)
        inside.pop()
        return encode(text)

    run.encode = counted
    client = client_of(run)
    client.post("/api/encode", json={"text": "the river"})
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: client.post("/api/encode", json={"text": "the river"}).status_code, range(6)))
    assert answers == [200] * 6
    assert max(most) == 1
