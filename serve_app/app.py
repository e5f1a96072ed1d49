"""The ASGI application of a replica."""

from __future__ import annotations

import time
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve_app.errors import ApiError
from serve_app.gate import TIMING_HEADERS, Gate, error_response
from serve_app.routes import Routes

NO_ROUTE = "none"
"""What log and metrics call a path or method that is not answered; the path may hold anything."""


async def http_error(gate: Gate, request: Request, error: Exception) -> Response:
    """404 and 405 of the router, as JSON."""
    assert isinstance(error, HTTPException)
    started = time.perf_counter()
    kind = "NotFound"
    if error.status_code == 405:
        kind = "MethodNotAllowed"
        allowed = (error.headers or {}).get("Allow", "")
        message = f"{request.method} is not answered here; use {allowed}"
    else:
        message = f"no route {request.url.path[:80]}; /docs lists them"
    known = ApiError(error.status_code, kind, message, dict(error.headers or {}))
    gate.finish(request, NO_ROUTE, known.status, started, None)
    return error_response(known)


def build_app(routes: Routes) -> Starlette:
    """Every route behind the gate."""
    gate = routes.gate
    table = [
        Route(operation.path, gate.endpoint(operation), methods=[operation.method])
        for operation in routes.operations
    ]
    middleware = []
    if gate.settings.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(gate.settings.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["*"],  # clients send their own, as x-stainless-…
                expose_headers=["retry-after", "x-request-id", *TIMING_HEADERS],
            )
        )
    app = Starlette(
        routes=table,
        middleware=middleware,
        exception_handlers={HTTPException: partial(http_error, gate)},
    )
    app.router.redirect_slashes = False  # it would send clients of a TLS proxy to http://
    return app
