"""Who may talk to the browser, and the headers on every answer."""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from starlette.testclient import TestClient

from unweave.errors import UnweaveError
from unweave.web import create_app
from unweave.web._security import is_loopback
from unweave.web._serve import listen

TOKEN = "correct-horse-battery-staple"


def client_of(run: Any, base: str = "http://127.0.0.1:8765", **options: Any) -> TestClient:
    return TestClient(create_app(run, **options), base_url=base, follow_redirects=False)


def test_headers_are_on_every_answer(client: TestClient) -> None:
    answers = [client.get(a) for a in ("/", "/api/run", "/static/site.css", "/nowhere", "/features/random")]
    answers.append(client.get("/", headers={"host": "evil.example"}))
    answers.append(client.post("/api/encode", json={"text": ""}))
    for answer in answers:
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["x-frame-options"] == "DENY"
        assert answer.headers["referrer-policy"] == "same-origin"
        assert "access-control-allow-origin" not in answer.headers
    assert client.get("/").headers["cache-control"] == "no-store"
    assert "immutable" in client.get("/static/site.css").headers["cache-control"]


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8765", "localhost:9", "LOCALHOST", "[::1]:8765"])
def test_loopback_hosts_are_answered(client: TestClient, host: str) -> None:
    assert client.get("/api/model", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8765",
        "127.0.0.1.evil.example",
        "localhost.",
        "",
        "[::1",
        "127.0.0.1@evil.example",
        "a\tb",
    ],
)
def test_other_hosts_are_refused(client: TestClient, host: str) -> None:
    assert client.get("/", headers={"host": host}).status_code == 421
    refused = client.get("/api/run", headers={"host": host})
    assert refused.status_code == 421
    assert "error" in refused.json()


@pytest.mark.parametrize(
    "origin", ["http://evil.example", "null", "http://127.0.0.1:9999", "http://localhost:8765", "file://"]
)
def test_other_origins_are_refused(client: TestClient, origin: str) -> None:
    for answer in (
        client.post("/api/encode", json={"text": "the river"}, headers={"origin": origin}),
        client.get("/api/run", headers={"origin": origin}),
    ):
        assert answer.status_code == 403


def test_own_origin_and_no_origin_pass(client: TestClient) -> None:
    own = {"origin": "http://127.0.0.1:8765", "sec-fetch-site": "same-origin"}
    assert client.post("/api/encode", json={"text": "the river"}, headers=own).status_code == 200
    assert client.post("/api/encode", json={"text": "the river"}).status_code == 200  # curl, a script


def test_cross_site_fetches_are_refused_but_links_work(client: TestClient) -> None:
    cross = {"sec-fetch-site": "cross-site"}
    assert client.get("/api/run", headers=cross).status_code == 403
    assert client.get("/features/1", headers=cross).status_code == 200


def test_the_token_is_asked_for_once_and_kept_in_a_cookie(run: Any) -> None:
    client = client_of(run, token=TOKEN)
    assert client.get("/").status_code == 401
    assert client.get("/api/run").status_code == 401
    assert client.get("/?token=wrong").status_code == 401
    assert client.get("/static/site.css").status_code == 200  # the refusal is styled
    entered = client.get(f"/features?q=a&token={TOKEN}")
    assert entered.status_code == 303
    assert entered.headers["location"] == "/features?q=a"  # the token leaves the address bar
    cookie = entered.headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=Lax" in cookie
    assert client.get("/").status_code == 200
    assert client.get("/api/run").status_code == 200


def test_a_script_may_send_the_token_in_a_header(run: Any) -> None:
    client = client_of(run, token=TOKEN)
    assert client.get("/api/run", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
    assert client.get("/api/run", headers={"authorization": "Bearer nope"}).status_code == 401
    assert client.get("/api/run", headers=[(b"cookie", b"unweave-8765=\xff")]).status_code == 401


def test_the_redirect_after_the_token_stays_here(run: Any) -> None:
    client = client_of(run, token=TOKEN)
    for path in ("//evil.example", "/%0d%0aset-cookie:%20a=b", "/\\evil.example"):
        answer = client.get(f"{path}?token={TOKEN}")
        if answer.status_code == 303:
            where = answer.headers["location"]
            assert where.startswith("/")
            assert not where.startswith(("//", "/\\"))
            assert "\n" not in where
        assert "a" not in answer.cookies


def test_the_token_is_compared_in_constant_time(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import hmac

    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: compared.append((a, b)) or real(a, b))
    client_of(run, token=TOKEN).get("/?token=guess")
    assert (b"guess", TOKEN.encode()) in compared


def test_exposure_without_a_token_is_refused(run: Any) -> None:
    for hosts in (("*",), ("0.0.0.0",), ("lab.example",)):
        with pytest.raises(UnweaveError, match="without a token"):
            create_app(run, allowed_hosts=hosts)
    for token in ("short", "has spaces in the middle of it", "semi;colon;semi;colon"):
        with pytest.raises(UnweaveError, match="at least 16 characters"):
            create_app(run, token=token)
    exposed = client_of(run, "http://lab.example", token=TOKEN, allowed_hosts=("*",))
    assert exposed.get("/").status_code == 401
    assert exposed.get(f"/?token={TOKEN}").status_code == 303


def test_is_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.9.9.9", "localhost", "::1", "[::1]")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "192.168.0.1", "example.org", "*", "")))


def test_static_files_stay_in_their_folder(client: TestClient) -> None:
    for path in ("/static/../_app.py", "/static/%2e%2e/_app.py", "/static/..%2f_app.py", "/static/"):
        assert client.get(path).status_code in (404, 405)


@pytest.fixture
def served(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[tuple[str, int, str]]:
    """``serve`` itself, in a thread, on any free port: host, port and what it printed."""
    import uvicorn

    from unweave.web import serve

    servers: list[Any] = []
    ready = threading.Event()
    original = uvicorn.Server.startup

    async def startup(self: Any, sockets: Any = None) -> None:
        await original(self, sockets)
        servers.append((self, *sockets[0].getsockname()))
        ready.set()

    monkeypatch.setattr(uvicorn.Server, "startup", startup)
    thread = threading.Thread(target=serve, args=(run,), kwargs={"port": 0, "open_browser": False}, daemon=True)
    thread.start()
    assert ready.wait(20)
    server, host, port = servers[0]
    yield host, port, capsys.readouterr().out
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()


def test_serve_listens_on_loopback_and_checks_hosts(served: tuple[str, int, str]) -> None:
    host, port, printed = served
    assert host == "127.0.0.1"
    assert f"http://127.0.0.1:{port}/" in printed
    connection = http.client.HTTPConnection(host, port, timeout=10)
    connection.request("GET", "/features/1")
    answer = connection.getresponse()
    assert answer.status == 200
    assert b"Feature 1" in answer.read()
    connection.request("GET", "/", headers={"Host": f"rebound.example:{port}"})
    assert connection.getresponse().status == 421
    connection.close()


def test_a_taken_port_is_told_and_the_default_gives_way() -> None:
    taken = listen("127.0.0.1", 0)
    taken.listen()
    try:
        with pytest.raises(UnweaveError, match="Choose another port"):
            listen("127.0.0.1", taken.getsockname()[1])
    finally:
        taken.close()
    with pytest.raises(UnweaveError, match="cannot listen on 203"):
        listen("203.0.113.7", 0)
