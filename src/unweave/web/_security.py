"""Who may talk to the browser: Host, Origin and token checks, and the headers on every answer.

A server on loopback is still reachable from any web page the user has open. A page can point its own name at
127.0.0.1 (DNS rebinding), so the Host header must be one we know; it can send a form or a fetch here, so what
carries an Origin must carry ours. Anywhere but on loopback a token is needed as well.
"""

from __future__ import annotations

import hmac
import json
import re
from collections.abc import Callable, Iterable
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qsl, quote, urlencode, urlsplit

from unweave.errors import UnweaveError

LOOPBACK = ("127.0.0.1", "localhost", "::1")

HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
}

Scope = dict[str, Any]


def is_loopback(host: str) -> bool:
    """Whether a bind address or host name means this machine only.

    >>> is_loopback("localhost"), is_loopback("127.0.0.2"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    import ipaddress

    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_exposure(allowed_hosts: Iterable[str], token: str | None) -> None:
    """Refuse to be reachable under a name that is not loopback without a token."""
    exposed = [host for host in allowed_hosts if not is_loopback(host)]
    if exposed and not token:
        raise UnweaveError(
            f"the browser would answer to {', '.join(map(repr, exposed))}, which other machines may reach, without a "
            "token. Give token=..., or keep to 127.0.0.1 (and use an SSH tunnel to look from elsewhere)."
        )
    if token is not None and not re.fullmatch(r"[A-Za-z0-9_.~-]{16,}", token):
        raise UnweaveError(
            f"a token needs at least 16 characters, all letters, digits or one of _ . ~ -; found {len(token)} "
            "characters. Leave it out and one is made."
        )


class Guard:
    """ASGI middleware doing the checks above, in that order, before any page sees the request.

    Args:
        app: the application. allowed_hosts: host names without port; "*" for any (a token then protects).
        token: what ``?token=`` or the cookie must hold; None asks for nothing.
        refuse: ``refuse(status, title, message) -> html`` renders a refusal for people.
    """

    def __init__(
        self,
        app: Any,
        *,
        allowed_hosts: Iterable[str] = LOOPBACK,
        token: str | None = None,
        refuse: Callable[[int, str, str], str],
    ) -> None:
        self.app, self.token, self.refuse = app, token, refuse
        self.allowed = {host.lower().strip("[]") for host in allowed_hosts}

    async def __call__(self, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # there are no web sockets here
            await send({"type": "websocket.close", "code": 1008})
            return

        async def send_with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                present = {name.lower() for name, _ in message["headers"]}
                extra = [(n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in present]
                if b"cache-control" not in present:
                    extra.append((b"cache-control", b"no-store"))
                message = {**message, "headers": [*message["headers"], *extra]}
            await send(message)

        answer = self._refusal(scope) or self._without_token(scope)
        if answer is None:
            await self.app(scope, receive, send_with_headers)
            return
        status, headers, body = answer
        await send_with_headers({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    # ---- Host and Origin --------------------------------------------------------------------------------------

    def _refusal(self, scope: Scope) -> Any:
        hosts = _header(scope, b"host")
        if len(hosts) != 1 or not self._knows(hosts[0]):
            shown = ", ".join(hosts) or "no name"
            return self._answer(
                scope, 421, "Unknown host", f"This server does not answer to {shown!r}. Use the address it printed."
            )
        reads = scope["method"] in ("GET", "HEAD")
        page = reads and not scope["path"].startswith("/api/")
        if page:  # following a link from another site to a page is fine; reading data from there is not
            return None
        origins = _header(scope, b"origin")
        own = {f"http://{hosts[0]}", f"https://{hosts[0]}"}
        if any(origin.lower() not in {o.lower() for o in own} for origin in origins):
            return self._answer(scope, 403, "Another site asked", "Requests from other sites are refused.")
        if any(site not in ("same-origin", "none") for site in _header(scope, b"sec-fetch-site")):
            return self._answer(scope, 403, "Another site asked", "Requests from other sites are refused.")
        return None

    def _knows(self, host: str) -> bool:
        if "*" in self.allowed:
            return True
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            return False
        return name is not None and name.lower() in self.allowed

    # ---- token ------------------------------------------------------------------------------------------------

    def _without_token(self, scope: Scope) -> Any:
        if self.token is None or scope["path"].startswith("/static/"):
            return None
        name = cookie_name(scope)
        given = dict(parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True))
        if (offered := given.pop("token", None)) is not None and self._matches(offered):
            # quoted, so that no line break reaches the header; one slash, because "//host" is another site
            where = "/" + quote(scope["path"]).lstrip("/") + (f"?{urlencode(given)}" if given else "")
            cookie = f"{name}={self.token}; Path=/; HttpOnly; SameSite=Lax"
            if scope.get("scheme") == "https":
                cookie += "; Secure"
            headers = [(b"location", where.encode()), (b"set-cookie", cookie.encode())]
            return 303, headers, b""
        if any(self._matches(value) for value in _cookies(scope, name) + _bearer(scope)):
            return None
        return self._answer(
            scope, 401, "A token is needed", "Open the address printed in the terminal; it ends with ?token=…"
        )

    def _matches(self, offered: str) -> bool:
        expected = (self.token or "").encode()
        return hmac.compare_digest(offered.encode("utf-8", "surrogateescape"), expected)

    def _answer(self, scope: Scope, status: int, title: str, message: str) -> Any:
        if scope["path"].startswith("/api/"):
            kind, body = b"application/json", json.dumps({"error": message})
        else:
            kind, body = b"text/html; charset=utf-8", self.refuse(status, title, message)
        return status, [(b"content-type", kind)], body.encode()


def cookie_name(scope: Scope) -> str:
    """Cookies are shared by all ports of a host, so each port gets a name of its own."""
    server = scope.get("server")
    return f"unweave-{server[1] if server else 0}"


def _header(scope: Scope, name: bytes) -> list[str]:
    return [value.decode("latin-1") for key, value in scope["headers"] if key.lower() == name]


def _cookies(scope: Scope, name: str) -> list[str]:
    found = []
    for line in _header(scope, b"cookie"):
        try:
            jar = SimpleCookie(line)
        except CookieError:
            continue
        if name in jar:
            found.append(jar[name].value)
    return found


def _bearer(scope: Scope) -> list[str]:
    return [v[7:] for v in _header(scope, b"authorization") if v[:7].lower() == "bearer "]
