"""The ASGI application of a replica."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from serve_app.errors import ApiError
from serve_app.gate import dump
from serve_app.routes import Routes


async def http_error(request: Request, error: Exception) -> Response:
    """404 and 405 of the router, as JSON."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"{request.method} is not answered here; use {allowed}"
    else:
        message = f"no route {request.url.path}; /docs lists them"
    known = ApiError(error.status_code, "NotFound", message, dict(error.headers or {}))
    return Response(dump(known.body()), known.status, known.headers, media_type="application/json")


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
                allow_headers=["authorization", "content-type"],
            )
        )
    return Starlette(
        routes=table, middleware=middleware, exception_handlers={HTTPException: http_error}
    )
