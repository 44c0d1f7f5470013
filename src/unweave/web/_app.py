"""The application: pages for people, the same data as JSON, one guard in front of both."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from unweave.web import _security
from unweave.web._encoder import Encoder
from unweave.web._overview import Overview
from unweave.web._render import render


def create_app(run: Any, *, token: str | None = None, allowed_hosts: Iterable[str] = _security.LOOPBACK) -> Any:
    """A FastAPI application that shows one run.

    Args:
        run: what ``unweave.load`` returns. token: if given, every page asks for it (once, as ``?token=``; then a
            cookie holds it). allowed_hosts: the names the server answers to, without ports; "*" for any.

    Raises:
        UnweaveError: when it would answer to names that other machines may reach, without a token, or when FastAPI is
            not installed.
    """
    allowed_hosts = tuple(allowed_hosts)
    _security.check_exposure(allowed_hosts, token)
    from unweave.web._serve import need_web

    need_web()
    from fastapi import FastAPI
    from starlette.staticfiles import StaticFiles

    from unweave.web import _api, _pages

    overview, encoder = Overview(run), Encoder(run)
    # The interactive documentation would load scripts from elsewhere.
    app = FastAPI(title=f"unweave: {overview.name}", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.overview, app.state.encoder = overview, encoder
    static = StaticFiles(packages=[("unweave.web", "static"), ("unweave.features.card", "static")])
    app.mount("/static", _Kept(static), name="static")
    app.include_router(_api.router(run, overview, encoder))
    app.include_router(_pages.router(run, overview, encoder))
    _pages.add_error_pages(app, overview)

    def refuse(status: int, title: str, message: str) -> str:
        return render("error.html", status=status, title=title, message=message)

    app.add_middleware(_security.Guard, allowed_hosts=allowed_hosts, token=token, refuse=refuse)
    return app


class _Kept:
    """Static files carry a hash in their address, so browsers may keep them."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def kept(message: Any) -> None:
            if message["type"] == "http.response.start" and message["status"] == 200:
                headers = [*message["headers"], (b"cache-control", b"private, max-age=31536000, immutable")]
                message = {**message, "headers": headers}
            await send(message)

        await self.app(scope, receive, kept)
