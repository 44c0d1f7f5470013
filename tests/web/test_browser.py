"""The pages in a real Chromium, against a real server."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from unweave.web import create_app, export_html
from unweave.web._serve import listen

pytestmark = pytest.mark.browser

FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
]
SIZES = {"desktop": (1280, 900), "phone": (390, 844)}
TEXT = "In June, the captain sailed along the river near Lisbon and stirred garlic for 12 minutes."


@dataclass
class Watched:
    """A page, and everything about it that should not happen."""

    page: Any
    base: str
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def go(self, path: str) -> Any:
        return self.page.goto(self.base + path)


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("there is no chromium on this machine's PATH")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def served(english: Any, english_corpus: Any, run_folder: Path) -> Iterator[tuple[str, Any]]:
    import uvicorn

    run = english.EnglishRun(run_folder, english_corpus)
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(run), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", run
    server.should_exit = True
    thread.join(20)
    listener.close()


@pytest.fixture
def open_page(chromium: Any, served: tuple[str, Any]) -> Iterator[Any]:
    contexts = []
    watched: list[Watched] = []

    def make(size: str = "desktop", scheme: str = "light") -> Watched:
        width, height = SIZES[size]
        phone = size == "phone"
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, has_touch=phone, is_mobile=phone
        )
        contexts.append(context)
        one = Watched(context.new_page(), served[0])
        one.page.on("console", lambda m: one.errors.append(m.text) if m.type in ("error", "warning") else None)
        one.page.on("pageerror", lambda e: one.errors.append(str(e)))
        one.page.on("request", lambda r: None if r.url.startswith(served[0]) else one.foreign.append(r.url))
        one.page.add_init_script(
            "addEventListener('securitypolicyviolation', e => console.error('CSP', e.violatedDirective, e.blockedURI))"
        )
        watched.append(one)
        return one

    yield make
    for one in watched:
        # The 404 page is asked for on purpose, and browsers log it.
        assert [e for e in one.errors if "404" not in e] == []
        assert one.foreign == []
    for context in contexts:
        context.close()


def tip_of(page: Any) -> str:
    return page.locator("#tip:not([hidden])").inner_text()


def test_a_walk_with_the_mouse(open_page: Any, served: tuple[str, Any]) -> None:
    one = open_page()
    page = one.page
    one.go("/")
    page.locator("svg.line").first.hover()
    assert "rows" in tip_of(page)
    page.get_by_role("link", name="Features", exact=True).click()
    page.wait_for_url("**/features")
    page.get_by_role("columnheader", name="Max").get_by_role("link").click()
    page.wait_for_url("**/features?sort=max_value")
    assert page.locator("th[aria-sort=descending]").inner_text().startswith("Max")
    best = served[1].features.list(sort="max_value", limit=1).rows[0].index
    assert page.locator(".row-link").first.inner_text() == str(best)
    page.locator(".row-link").first.click()
    page.wait_for_url(f"**/features/{best}")
    page.locator(".tok.peak").first.hover()
    assert f"{served[1].features[best].max_value:.2f}" in tip_of(page)
    page.locator("svg.bars .bar").first.hover()
    assert "tokens" in tip_of(page)


def test_the_list_filters_as_one_types(open_page: Any) -> None:
    one = open_page()
    page = one.page
    one.go("/features")
    page.fill("#q", "river")
    page.wait_for_url("**/features?q=river*")
    page.wait_for_selector("#results[aria-busy=false]")
    assert "of 201" not in page.locator(".count").inner_text()
    assert page.locator("#q").input_value() == "river"
    page.select_option("select[name=min_density]", "0.01")
    page.wait_for_url(re.compile("min_density=0.01"))
    assert page.locator(".row-link").count() >= 1


def test_the_keyboard_is_enough(open_page: Any) -> None:
    one = open_page()
    page = one.page
    one.go("/features/5")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    for key, number in (("ArrowRight", 6), ("j", 7), ("k", 6), ("ArrowLeft", 5)):
        page.keyboard.press(key)
        page.wait_for_url(f"**/features/{number}")
    page.keyboard.press("?")
    assert page.locator("#help").is_visible()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    assert not page.locator("#help").is_visible()
    assert page.url.endswith("/features/5")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "find"
    page.keyboard.type("j1")  # letters typed in a field are not commands
    assert page.url.endswith("/features/5")
    page.keyboard.press("Escape")
    # arrows inside a context walk over its firing tokens
    page.locator(".text").first.focus()
    page.keyboard.press("ArrowRight")
    assert "peak" in page.evaluate("document.activeElement.className")
    assert tip_of(page)
    page.keyboard.press("v")
    assert page.evaluate("document.documentElement.dataset.view") == "whole"
    page.reload()
    assert page.evaluate("document.documentElement.dataset.view") == "whole"  # it is remembered
    page.fill(".stepper input[name=q]", "12")
    page.keyboard.press("Enter")
    page.wait_for_url("**/features/12")
    page.fill("#find", "17")
    page.keyboard.press("Enter")
    page.wait_for_url("**/features/17")
    one.go("/features")
    page.keyboard.press("j")
    page.keyboard.press("j")
    assert page.evaluate("document.activeElement.getAttribute('href')") == page.locator(".row-link").nth(
        1
    ).get_attribute("href")


def test_the_theme_is_chosen_and_remembered(open_page: Any) -> None:
    one = open_page()
    page = one.page
    one.go("/")
    ground = "getComputedStyle(document.documentElement).backgroundColor"
    light = page.evaluate(ground)
    page.click("#theme")  # light
    assert page.evaluate(ground) == light
    page.click("#theme")  # dark
    dark = page.evaluate(ground)
    assert dark != light
    one.go("/features")
    assert page.evaluate(ground) == dark
    page.click("#theme")  # as the system again
    assert page.evaluate(ground) == light


def test_own_text_on_the_try_page(open_page: Any, served: tuple[str, Any]) -> None:
    one = open_page()
    page = one.page
    one.go("/try")
    page.fill("#text", TEXT)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#overall tbody tr")
    tokens = page.locator("#tokens [role=option]")
    code = served[1].encode(TEXT)
    assert tokens.count() == len(code)
    assert page.locator("#tokens").inner_text() == TEXT
    river = code.tokens.index(" river")
    tokens.nth(river).click()
    page.locator("#at .lede", has_text="river").wait_for()
    first = page.locator("#at tbody tr").first
    index, value = code.code[river].top(1)[0]
    first.locator("a", has_text=str(index)).wait_for()
    assert f"{value:.2f}" in first.inner_text()
    page.keyboard.press("ArrowRight")
    page.locator("#at .lede", has_text="near").wait_for()
    page.locator("#overall tbody tr").first.hover()
    assert "values of feature" in page.locator("#painted").inner_text()
    page.locator("#overall a", has_text=re.compile("^0$")).wait_for()
    page.check("#sparse")
    assert page.locator("#overall a", has_text=re.compile("^0$")).count() == 0
    page.locator("#overall tbody a").first.click()
    page.wait_for_url("**/features/*")
    page.go_back()
    page.wait_for_selector("#overall tbody tr")  # the text is in the address


def test_own_text_on_a_features_page(open_page: Any, served: tuple[str, Any]) -> None:
    one = open_page()
    page = one.page
    one.go("/features/1")
    page.fill("#trial-text", TEXT)
    page.click("#trial button")
    page.wait_for_selector("#trial-result .tok.peak")
    assert page.locator("#trial-result .peak").inner_text() == "river"
    value = max(served[1].encode(TEXT).values(1))
    assert f"{value:.2f}" in page.locator("#trial-result .note").inner_text()
    page.fill("#trial-text", "Nothing wet")
    page.click("#trial button")
    page.locator("#trial-result", has_text="Silent").wait_for()
    page.evaluate("document.querySelector('#trial-text').value = ' '")
    page.click("#trial button")
    page.wait_for_selector("#trial-result .problem")
    # The refusal is answered with status 400, which browsers log.
    one.errors[:] = [e for e in one.errors if "400" not in e]


def test_waiting_for_the_model_is_shown(chromium: Any, english: Any, english_corpus: Any, run_folder: Path) -> None:
    import uvicorn

    run, gate = english.EnglishRun(run_folder, english_corpus), threading.Event()
    run.loads = [lambda: gate.wait(30)]
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(create_app(run), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    page = chromium.new_page()
    try:
        page.goto(f"http://127.0.0.1:{listener.getsockname()[1]}/try")
        page.fill("#text", "the river")
        page.click("#try button")
        page.locator("#status", has_text="Loading the model").wait_for()
        gate.set()
        page.wait_for_selector("#tokens [role=option]")
    finally:
        gate.set()
        page.close()
        server.should_exit = True
        thread.join(20)
        listener.close()


def test_touch_shows_values(open_page: Any) -> None:
    one = open_page("phone")
    page = one.page
    one.go("/features/1")
    page.locator(".tok.peak").first.tap()
    assert "estuary" in tip_of(page) or "lake" in tip_of(page)
    one.go("/try?text=Maria+walked+along+the+river")
    page.wait_for_selector("#overall tbody tr")
    page.locator("#tokens [role=option]").last.tap()
    page.locator("#at .lede", has_text="river").wait_for()


def test_scripts_in_data_do_not_run(open_page: Any, english: Any) -> None:
    one = open_page()
    page = one.page
    page.on("dialog", lambda d: one.errors.append("a dialog opened") or d.dismiss())
    one.go(f"/features/{english.NASTY}")
    assert english.SCRIPT in page.locator(".tok.peak").first.inner_text()
    one.go("/try")
    page.fill("#text", f"{english.SCRIPT} <img src=x onerror=alert(2)>")
    page.click("#try button")
    page.wait_for_selector("#tokens [role=option]")
    assert english.SCRIPT in page.locator("#tokens").inner_text()
    assert page.locator("main img").count() == 0


def test_pages_work_without_scripts(chromium: Any, served: tuple[str, Any]) -> None:
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(served[0] + "/features")
    page.fill("#q", "river")
    page.get_by_role("button", name="Show").click()
    page.locator(".row-link").first.click()
    assert page.locator("h1").inner_text().startswith("Feature ")
    page.locator(".view", has_text="Whole").click()
    assert "view=whole" in page.url
    assert page.locator(".far").first.is_visible()
    context.close()


def test_an_exported_file_opens_by_itself(chromium: Any, run: Any, tmp_path: Path) -> None:
    path = export_html(run, [1, 12, 7], tmp_path / "features.html")
    page = chromium.new_page()
    seen: list[str] = []
    page.on("request", lambda r: seen.append(r.url))
    page.on("console", lambda m: seen.append(m.text))
    page.goto(path.as_uri())
    page.locator(".tok.peak").first.hover()
    assert tip_of(page)
    page.get_by_text("Whole", exact=True).click()
    assert page.locator(".far").first.is_visible()
    assert seen == [path.as_uri()]
    save(page, "export-desktop-light", tmp_path)
    page.close()


def test_notebook_cards_live_in_frames_of_their_own(chromium: Any, run: Any, english: Any, tmp_path: Path) -> None:
    cards = [run.features[i]._repr_html_() for i in (1, english.NASTY, english.DEAD)]
    notebook = tmp_path / "notebook.html"
    notebook.write_text(f"<meta charset=utf-8><style>table{{display:none}}</style>{''.join(cards)}", encoding="utf-8")
    page = chromium.new_page(viewport={"width": 900, "height": 900})
    seen: list[str] = []
    for event in ("request", "console", "pageerror"):  # a dialog would be refused, and that is logged
        page.on(event, lambda what: seen.append(getattr(what, "url", str(what))))
    page.goto(notebook.as_uri())
    first, nasty, dead = (page.frame_locator("iframe").nth(i) for i in range(3))
    assert first.locator(".logits").first.is_visible()
    first.locator(".tok.peak").first.hover()
    assert f"{run.features[1].max_value:.2f}" in first.locator("#tip:not([hidden])").inner_text()
    assert first.locator("html").evaluate("e => e.scrollWidth <= e.clientWidth")
    first.get_by_text("Whole", exact=True).click()
    assert first.locator(".far").first.is_visible()
    assert english.SCRIPT in nasty.locator(".tok.peak").first.inner_text()
    assert "Dead feature." in dead.locator(".notice").inner_text()
    assert seen == [notebook.as_uri()]
    page.close()


PAGES = {
    "overview": "/",
    "list": "/features",
    "filtered": "/features?q=river&min_density=0.0001",
    "feature": "/features/1",
    "whole": "/features/5?view=whole",
    "script": "/features/12",
    "dead": "/features/7",
    "try": "/try?text=" + TEXT.replace(" ", "+"),
    "missing": "/features/999",
}


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", ["desktop", "phone"])
def test_every_page_fits_its_window(open_page: Any, tmp_path: Path, size: str, scheme: str) -> None:
    one = open_page(size, scheme)
    for name, path in PAGES.items():
        one.go(path)
        if name == "try":
            one.page.wait_for_selector("#overall tbody tr")
            one.page.wait_for_selector("#at tbody tr")
        wide = one.page.evaluate("document.documentElement.scrollWidth")
        assert wide <= SIZES[size][0], f"{name} is {wide} wide on a {size}"
        unnamed = one.page.evaluate(
            "[...document.querySelectorAll('a, button, input:not([type=hidden]), select, textarea')].filter("
            "e => e.checkVisibility() && !(e.innerText || e.ariaLabel || e.labels?.length)).map(e => e.outerHTML)"
        )
        assert unnamed == [], name
        save(one.page, f"{name}-{size}-{scheme}", tmp_path)


def test_the_narrowest_phones(open_page: Any) -> None:
    one = open_page("phone")
    one.page.set_viewport_size({"width": 360, "height": 640})
    for name, path in PAGES.items():
        one.go(path)
        assert one.page.evaluate("document.documentElement.scrollWidth") <= 360, name


def save(page: Any, name: str, otherwise: Path) -> None:
    """Screenshots for people: in $UNWEAVE_SCREENSHOTS if that is set."""
    folder = Path(os.environ.get("UNWEAVE_SCREENSHOTS") or otherwise)
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"{name}.png", full_page=True)
