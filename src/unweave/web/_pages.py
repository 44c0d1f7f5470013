"""The HTML routes."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from starlette.exceptions import HTTPException

from unweave.errors import UnweaveError
from unweave.features.card import FeatureLines
from unweave.web._encoder import MAX_CHARACTERS, MAX_TOKENS, Encoder
from unweave.web._listing import ListView
from unweave.web._overview import Overview, live_features, starting_points
from unweave.web._render import render

N_STARTING = 6


def router(run: Any, overview: Overview, encoder: Encoder) -> APIRouter:
    pages = APIRouter(default_response_class=HTMLResponse, include_in_schema=False)
    random = np.random.default_rng()

    def page(template: str, here: str, status: int = 200, **values: Any) -> HTMLResponse:
        html = render(template, here=here, run_name=overview.name, **values)
        return HTMLResponse(html, status_code=status)

    @pages.get("/")
    def show_run() -> HTMLResponse:
        starting = []  # the overview is made anew: training or evaluating may still be writing
        if run.features is not None:
            starting = [start_card(run.features[i]) for i in starting_points(run.features, N_STARTING, random)]
        return page("run.html", "/", overview=Overview(run), starting=starting, again=int(random.integers(1_000_000)))

    @pages.get("/features")
    def show_features(request: Request) -> Any:
        query = request.query_params
        if run.features is None:
            return page("features.html", "/features", indexed=False)
        wanted = query.get("q", "").strip()
        if query.get("jump") and is_number(wanted):
            return RedirectResponse(f"/features/{int(wanted)}", status_code=303)
        view = ListView.of(query, run.features)
        found = view.ask(run.features)
        last = view.pages(found.total)
        if view.page > last:  # the list got shorter, or someone edited the address
            return RedirectResponse(view.link(page=last), status_code=303)
        return page(
            "features.html",
            "/features",
            indexed=True,
            view=view,
            page=found,
            heads=view.heads,
            sorts=view.sorts,
        )

    @pages.get("/features/random")
    def show_random() -> RedirectResponse:
        live = live_features(run.features) if run.features is not None else []
        to = f"/features/{int(random.choice(live))}" if len(live) else "/features"
        return RedirectResponse(to, status_code=303)

    @pages.get("/features/{index}")
    def show_feature(index: str, view: str = "short") -> HTMLResponse:
        f = feature_at(run, index)
        last = len(run.features) - 1
        return page(
            "feature.html",
            "/features",
            f=f,
            shown=FeatureLines.of(run.features, f.index),
            before=f.index - 1 if f.index > 0 else None,
            after=f.index + 1 if f.index < last else None,
            last=last,
            names=lambda j: [text for text, _ in run.features[j].top_tokens],
            link=lambda j: f"/features/{j}",
            can_try=encoder.available,
            max_characters=MAX_CHARACTERS,
            whole=view == "whole",
        )

    @pages.get("/try")
    def show_try(text: str = "") -> HTMLResponse:
        return page(
            "try.html",
            "/try",
            available=encoder.available,
            state=encoder.state,
            model=overview.model,
            text=text[:MAX_CHARACTERS],
            max_characters=MAX_CHARACTERS,
            max_tokens=MAX_TOKENS,
        )

    return pages


def start_card(feature: Any) -> dict[str, Any]:
    """What a card on the overview needs: a few tokens around the strongest peak."""
    card: dict[str, Any] = {
        "index": feature.index,
        "density": feature.density,
        "max_value": feature.max_value,
        "tokens": [text for text, _ in feature.top_tokens],
        "near": [],
        "near_values": [],
    }
    if feature.top:
        best = feature.top[0]
        around = slice(max(0, best.peak - 10), best.peak + 8)
        card["near"], card["near_values"] = best.tokens[around], best.values[around]
    return card


def is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 12


def feature_at(run: Any, index: str) -> Any:
    """The feature an address names.

    Raises:
        HTTPException: 404 that says which numbers there are.
    """
    if run.features is None:
        raise HTTPException(404, "This run has no feature index yet.")
    n = len(run.features)
    if not is_number(index) or int(index) >= n:
        raise HTTPException(
            404, f"There is no feature {index[:40]!r}: this run's features are numbered 0 to {n - 1:,}."
        )
    return run.features[int(index)]


def add_error_pages(app: FastAPI, overview: Overview) -> None:
    """Errors as pages for people and as ``{"error": ...}`` under ``/api/``."""

    def answer(request: Request, status: int, title: str, message: str) -> Any:
        if request.url.path.startswith("/api/"):
            return JSONResponse({"error": message}, status_code=status)
        html = render("error.html", here="", run_name=overview.name, status=status, title=title, message=message)
        return HTMLResponse(html, status_code=status)

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> Any:
        known = {404: "Not found", 405: "Not allowed"}
        plain = error.detail if error.detail != "Not Found" else "There is no page at this address."
        return answer(request, error.status_code, known.get(error.status_code, "Refused"), plain)

    @app.exception_handler(UnweaveError)
    async def on_ours(request: Request, error: UnweaveError) -> Any:
        return answer(request, 500, "This could not be read", str(error))
