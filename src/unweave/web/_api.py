"""The JSON routes: the same data as the pages."""

from __future__ import annotations

import json
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool

from unweave.errors import UnweaveError
from unweave.web import _data
from unweave.web._encoder import Encoder, TooLong, check_length
from unweave.web._listing import ListView
from unweave.web._overview import Overview
from unweave.web._pages import feature_at, is_number

MAX_BODY = 200_000  # bytes; MAX_CHARACTERS of four-byte characters, escaped, and some
MAX_LIMIT = 500
N_OVERALL = 30


class BadRequest(UnweaveError):
    """A request that is refused, with its status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def router(run: Any, overview: Overview, encoder: Encoder) -> APIRouter:
    api = APIRouter(prefix="/api", default_response_class=JSONResponse)

    @api.get("/run")
    def get_run() -> Any:
        return JSONResponse(_data.run_data(Overview(run)))

    @api.get("/features")
    def get_features(request: Request) -> Any:
        query = request.query_params
        if run.features is None:
            return _error(404, "This run has no feature index yet.")
        if (ids := query.get("ids")) is not None:
            wanted = ids.split(",")[:100]
            return JSONResponse({"rows": [_name(feature_at(run, i.strip())) for i in wanted if i.strip()]})
        view = ListView.of(query, run.features)
        limit = query.get("limit", str(view.limit))
        if view.problems or not is_number(limit) or not 1 <= int(limit) <= MAX_LIMIT:
            return _error(400, " ".join(view.problems) or f"limit must lie between 1 and {MAX_LIMIT}, found {limit!r}")
        view = ListView(**{**vars(view), "limit": int(limit)})
        found = view.ask(run.features)
        rows = [_data.summary_data(row) for row in found.rows]
        return JSONResponse({"total": int(found.total), "offset": view.offset, "limit": view.limit, "rows": rows})

    @api.get("/features/{index}")
    def get_feature(index: str) -> Any:
        return JSONResponse(_data.feature_data(feature_at(run, index)))

    @api.get("/model")
    def get_model() -> Any:
        return JSONResponse(encoder.status())

    @api.post("/encode")
    async def encode(request: Request) -> Any:
        try:
            text, feature = _wanted(await _body(request), run)
            if not encoder.available:
                raise BadRequest(409, "This run was not made from a language model, so it cannot encode text.")
            check_length(text)
            if encoder.start() != "ready":
                # A model in the file cache is there in moments: wait a little before asking people to.
                state = await run_in_threadpool(encoder.wait, 0.3)
                if state == "failed":
                    raise BadRequest(503, f"The language model could not be loaded: {encoder.error}")
                if state != "ready":
                    return JSONResponse({"state": state, "model": overview.model}, status_code=202)
            return JSONResponse(await run_in_threadpool(_encoded, run, encoder, text, feature))
        except BadRequest as error:
            return _error(error.status, str(error))
        except TooLong as error:
            return _error(413, str(error))
        except UnweaveError as error:
            return _error(400, str(error))

    return api


def _encoded(run: Any, encoder: Encoder, text: str, feature: int | None) -> dict[str, Any]:
    made = encoder.encode(text)
    if feature is not None:
        values = [float(v) for v in made.values(feature)]
        known = run.features[feature].max_value if run.features is not None else 0.0
        tokens = [{"text": t, "value": v} for t, v in zip(made.tokens, values)]
        return _data.clean({"state": "ready", "feature": feature, "max_value": known, "tokens": tokens})
    peaks = _data.peaks(made.code)
    dense = dense_features(run, [index for index, _, _ in peaks])
    shown = {index for index, _, _ in peaks[:N_OVERALL]}
    shown |= {index for index, _, _ in [peak for peak in peaks if peak[0] not in dense][:N_OVERALL]}
    rows = []
    for index, value, token in peaks:
        if index in shown:
            entry = _name(run.features[index]) if run.features is not None else {"index": index, "top_tokens": []}
            rows.append({**entry, "value": value, "token": token})
    tokens = _data.tokens_data(made)
    return _data.clean({"state": "ready", "tokens": tokens, "top": rows, "dense": sorted(dense)})


def dense_features(run: Any, features: list[int]) -> set[int]:
    """Those that fire on more than a tenth of the indexed tokens, and so say little about one text."""
    if run.features is None:
        return set()
    density = run.features.table["density"]
    return {index for index in features if density[index] > 0.1}


def _name(feature: Any) -> dict[str, Any]:
    """A feature in a line: enough to recognise it in a list."""
    tokens = [text for text, _ in feature.top_tokens]
    return _data.clean(
        {"index": feature.index, "density": feature.density, "max_value": feature.max_value, "top_tokens": tokens}
    )


async def _body(request: Request) -> Any:
    """The JSON of a request, read no further than it may be long."""
    kind = request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":  # what a form on another site cannot send
        raise BadRequest(415, "Send JSON: Content-Type must be application/json.")
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > MAX_BODY:
            raise BadRequest(413, f"This text is too long: a request may hold {MAX_BODY:,} bytes. Shorten it.")
    try:
        return json.loads(bytes(body))
    except (ValueError, RecursionError):
        raise BadRequest(400, "The request is not valid JSON.") from None


def _wanted(body: Any, run: Any) -> tuple[str, int | None]:
    if not isinstance(body, dict) or not isinstance(body.get("text"), str):
        raise BadRequest(400, 'Expected {"text": "..."}, optionally with "feature": a feature number.')
    feature = body.get("feature")
    n = len(run.features) if run.features is not None else int(run.dictionary.n_features)
    if feature is not None and (not isinstance(feature, int) or isinstance(feature, bool) or not 0 <= feature < n):
        raise BadRequest(400, f"feature must be a number from 0 to {n - 1}, found {str(feature)[:40]!r}")
    return body["text"], feature


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status_code=status)
