"""What every route shares: keys, limits, bodies, errors, log and metrics."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import orjson
from pydantic import BaseModel, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from mtl_core.errors import TextError, there_is
from mtl_core.windows import TooLong, TooMany
from serve_app.auth import Keys, bearer, from_another_site
from serve_app.batcher import Overloaded
from serve_app.errors import (
    ApiError,
    invalid,
    of_another_site,
    overloaded,
    too_large,
    unauthorized,
)
from serve_app.openapi import Operation
from serve_app.requestlog import RequestLog
from serve_app.schemas import OpenAIErrorReply
from serve_app.service import Answer, Service
from serve_app.settings import Settings

AnyModel = TypeVar("AnyModel", bound=BaseModel)
MAX_ERRORS = 1_000
"""Errors of a body that are looked at; only unknown keys can be so many."""


@dataclass
class Reply:
    """What a handler makes: a body, and the answer it came from."""

    content: Any
    answer: Answer | None = None
    media_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)

    def response(self, started: float) -> Response:
        body = self.content if isinstance(self.content, bytes) else dump(self.content)
        headers = dict(self.headers)
        if self.answer is not None:
            headers.update(timing_headers(self.answer, time.perf_counter() - started))
        return Response(body, media_type=self.media_type, headers=headers)


def error_response(error: ApiError, openai: bool = False) -> Response:
    """An error as it is sent."""
    body = error.openai_body() if openai else error.body()
    return Response(dump(body), error.status, error.headers, media_type="application/json")


def dump(content: Any) -> bytes:
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


TIMING_HEADERS: dict[str, Callable[[Answer, float], Any]] = {
    "x-compute-type": lambda answer, _: answer.model.stage.runtime.name,
    "x-compute-time": lambda answer, _: answer.tokenize + answer.inference,
    "x-total-time": lambda _, total: total,
    "x-tokenization-time": lambda answer, _: answer.tokenize,
    "x-queue-time": lambda answer, _: answer.queue,
    "x-inference-time": lambda answer, _: answer.inference,
    "x-compute-characters": lambda answer, _: answer.num_characters,
    "x-compute-tokens": lambda answer, _: answer.num_tokens,
}
"""Headers of Text Embeddings Inference, from an answer and its total seconds."""


def timing_headers(answer: Answer, total: float) -> dict[str, str]:
    """Their values, times in milliseconds."""
    values = {name: value(answer, total) for name, value in TIMING_HEADERS.items()}
    return {k: f"{1000 * v:.2f}" if isinstance(v, float) else str(v) for k, v in values.items()}


class Gate:
    """Stands before the handlers of one replica.

    Args:
        service: does the work.
        settings: limits.
        keys: who may ask.
        log: where requests and errors are noted.
    """

    def __init__(self, service: Service, settings: Settings, keys: Keys, log: RequestLog) -> None:
        self.service = service
        self.settings = settings
        self.keys = keys
        self.log = log

    async def parse(self, request: Request, model: type[AnyModel]) -> AnyModel:
        """The body as a request of this shape.

        Raises:
            ApiError: it is too large, too slow, no JSON or not of this shape.
        """
        body = await self.read(request)
        try:
            return model.model_validate_json(body)
        except ValidationError as error:
            raise invalid(explain(error, model)) from None

    async def read(self, request: Request) -> bytes:
        limit = self.settings.max_body_bytes
        length = request.headers.get("content-length", "")
        if length.isdigit() and int(length) > limit:
            raise too_large(f"the body has {length} bytes; at most {limit} are read: send less")
        body = bytearray()
        try:
            async with asyncio.timeout(self.settings.body_timeout_s):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > limit:
                        raise too_large(
                            f"the body has more than the {limit} bytes that are read: send less"
                        )
        except TimeoutError:
            raise ApiError(
                408,
                "Validation",
                f"the body did not arrive in {self.settings.body_timeout_s:g} s",
                {"connection": "close"},
            ) from None
        return bytes(body)

    def texts(self, inputs: str | Sequence[str], field: str = "inputs") -> list[str]:
        """The request's texts, within limits; `field` is where it holds them."""
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        if not texts:
            raise invalid(f"{field}: send at least one text")
        most = self.settings.max_inputs
        if len(texts) > most:
            raise too_large(f"{field}: {len(texts)} texts; at most {most} in a request: split them")
        longest = self.settings.max_characters
        for number, text in enumerate(texts):
            if len(text) > longest:
                raise too_large(
                    f"input {number + 1} has {len(text)} characters; at most {longest} are "
                    "taken: split it"
                )
        return texts

    def tasks(self, names: Sequence[str] | None) -> list[str]:
        known = self.service.model.heads
        for name in names or ():
            if name not in known:
                listed = there_is(known, name[:80])
                raise ApiError(404, "NotFound", f"unknown task {name[:80]!r}; {listed}")
        if names is not None and not names:
            raise invalid("tasks: name at least one, or leave it out for all")
        return list(dict.fromkeys(known if names is None else names))

    def endpoint(self, operation: Operation) -> Callable[[Request], Awaitable[Response]]:
        """A handler with what all share: keys, errors, log and metrics."""
        route = operation.path

        async def answer(request: Request) -> Response:
            started = time.perf_counter()
            reply: Reply | None = None
            try:
                if not operation.open:
                    self.check_caller(request)
                reply = await operation.handler(request)
                response = reply.response(started)
            except Exception as error:
                known = self.failure(error, request, operation)
                response = error_response(known, openai=operation.error is OpenAIErrorReply)
            self.finish(request, route, response.status_code, started, reply)
            return response

        return answer

    def check_caller(self, request: Request) -> None:
        """Raise ApiError for a wrong key and, where none is needed, for another site's page."""
        if self.keys.required:
            key = bearer(request.headers.get("authorization"))
            if not self.keys.accept(key):
                raise unauthorized(key is not None)
        elif not self.settings.insecure and from_another_site(
            request.headers, self.settings.cors_origins
        ):
            raise of_another_site()

    def failure(self, error: Exception, request: Request, operation: Operation) -> ApiError:
        """An error as the client sees it."""
        if isinstance(error, Overloaded):
            self.service.metrics.rejected.inc()
            return overloaded(str(error), self.settings.retry_after_s)
        if isinstance(error, TooLong):
            cut = operation.truncate
            return too_large(f"{error}; shorten it, or send {cut} to use its beginning")
        if isinstance(error, TooMany):
            return too_large(f"{error}: split them over requests")
        if isinstance(error, TextError):
            return invalid(str(error))
        if isinstance(error, ApiError):
            return error
        if isinstance(error, ClientDisconnect):
            return ApiError(499, "Validation", "the client left")
        self.log.error(request_id(request), error)
        return ApiError(500, "Backend", "an error of the server; its log has the details")

    def finish(
        self, request: Request, route: str, status: int, started: float, reply: Reply | None
    ) -> None:
        seconds = time.perf_counter() - started
        self.service.metrics.requests.labels(route, str(status)).inc()
        self.service.metrics.latency.labels(route).observe(seconds)
        self.log.request(
            request_id(request),
            request.method,
            route,
            status,
            seconds,
            reply.answer if reply else None,
        )


def request_id(request: Request) -> str:
    return request.headers.get("x-request-id", "")[:128]


def explain(error: ValidationError, model: type[BaseModel]) -> str:
    """What is wrong with a body, field by field, without repeating what it held."""
    if (count := error.error_count()) > MAX_ERRORS:
        return f"{count} things are wrong; known keys: {', '.join(model.model_fields)}"
    lines = []
    for item in error.errors(include_input=False, include_url=False)[:5]:
        where = ".".join(str(step)[:80] for step in item["loc"])
        message = item["msg"]
        if item["type"] == "extra_forbidden":
            message = f"unknown key; {there_is(model.model_fields, str(item['loc'][-1])[:80])}"
        if item["type"] == "json_invalid":
            message += "; send JSON in UTF-8, no half of a surrogate pair"
        lines.append(f"{where}: {message}" if where else message)
    return "; ".join(lines)
