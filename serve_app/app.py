"""HTTP: routes in the shapes that clients already speak, around a Service."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import orjson
from pydantic import BaseModel, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from mtl_core.answers import Prediction, TokenOutput
from mtl_core.windows import TextError
from serve_app import pipelines, schemas
from serve_app.auth import Keys, bearer
from serve_app.batcher import Overloaded
from serve_app.errors import ApiError, invalid, overloaded, too_large, unauthorized, unavailable
from serve_app.openapi import Operation, documentation_page, openapi_document
from serve_app.requestlog import RequestLog
from serve_app.service import Answer, Service, TooLong
from serve_app.settings import Settings

PAGE = Path(__file__).parent / "page"
PAGE_TYPES = {"": "text/html", "style.css": "text/css", "app.js": "text/javascript"}
PAGE_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; form-action 'none'; base-uri 'none'; "
    "frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}
AnyModel = TypeVar("AnyModel", bound=BaseModel)


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


def dump(content: Any) -> bytes:
    return orjson.dumps(content, option=orjson.OPT_SERIALIZE_NUMPY)


def timing_headers(answer: Answer, total: float) -> dict[str, str]:
    """Text Embeddings Inference's headers, in milliseconds."""
    timings = answer.timings
    values: dict[str, Any] = {
        "x-compute-type": answer.model.stage.runtime.name,
        "x-compute-time": timings.tokenize + timings.encoder + timings.heads,
        "x-total-time": total,
        "x-tokenization-time": timings.tokenize,
        "x-queue-time": timings.queue,
        "x-inference-time": timings.encoder + timings.heads,
    }
    shown = {k: v if isinstance(v, str) else f"{1000 * v:.2f}" for k, v in values.items()}
    characters = sum(len(item.text) for part in answer.parts for item in part.items)
    return shown | {
        "x-compute-characters": str(characters),
        "x-compute-tokens": str(answer.num_tokens),
    }


class Api:
    """The routes of one replica.

    Args:
        service: does the work.
        settings: limits.
        keys: who may ask.
        ready: raises ApiError while the server cannot answer.
    """

    def __init__(
        self,
        service: Service,
        settings: Settings,
        keys: Keys,
        log: RequestLog,
        ready: Callable[[], Awaitable[None]],
    ) -> None:
        self.service = service
        self.settings = settings
        self.keys = keys
        self.log = log
        self.check_ready = ready
        self.operations = operations(self)
        self.document = openapi_document(self.operations, with_keys=keys.required)

    # Our own routes

    async def predict(self, request: Request) -> Reply:
        """Labels and entities of texts, every task from one pass through the encoder."""
        asked = await self.parse(request, schemas.PredictRequest)
        texts = self.texts(asked.inputs)
        tasks = self.tasks(asked.tasks)
        answer = await self.service.answer(texts, tasks, whole=not asked.truncate)
        failures = answer.failures
        if failures and len(failures) == len(tasks):
            raise unavailable(str(next(iter(failures.values()))))
        rows: list[dict[str, Any]] = [{} for _ in texts]
        for task in tasks:
            if task in failures:
                continue
            for row, prediction in zip(rows, answer.predictions(task), strict=True):
                row[task] = prediction if asked.return_scores else without_scores(prediction)
        content: dict[str, Any] = {"results": rows}
        if asked.return_embeddings:
            content["embeddings"] = answer.vectors()
        if failures:
            content["errors"] = {t: unavailable(str(e)).body() for t, e in failures.items()}
        content["model"] = answer.model.name
        content["usage"] = {"tokens": answer.num_tokens}
        return Reply(content, answer)

    async def similarity(self, request: Request) -> Reply:
        """Cosines between the vectors of texts."""
        asked = await self.parse(request, schemas.SimilarityRequest)
        answer = await self.service.answer(self.texts(asked.inputs), (), whole=not asked.truncate)
        vectors = answer.vectors()
        cosines = np.clip(vectors @ vectors.T, -1.0, 1.0)
        return Reply({"similarities": cosines, "model": answer.model.name}, answer)

    # OpenAI's

    async def embeddings(self, request: Request) -> Reply:
        """Unit-length sentence vectors in the shape of OpenAI's embeddings API."""
        asked = await self.parse(request, schemas.EmbeddingsRequest)
        if not isinstance(asked.input, str) and any(not isinstance(t, str) for t in asked.input):
            raise invalid("input: send text; token ids of other models mean nothing here")
        texts = self.texts(asked.input)  # type: ignore[arg-type]
        answer = await self.service.answer(texts, (), whole=not asked.truncate)
        vectors = self.shorten(answer.vectors(), asked.dimensions)
        as_text = asked.encoding_format == "base64"
        data = [
            {
                "object": "embedding",
                "index": index,
                "embedding": base64.b64encode(vector.astype("<f4").tobytes()).decode()
                if as_text
                else vector,
            }
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": answer.num_tokens, "total_tokens": answer.num_tokens}
        content = {"object": "list", "data": data, "model": answer.model.name, "usage": usage}
        return Reply(content, answer)

    # Text Embeddings Inference's

    async def embed(self, request: Request) -> Reply:
        """Sentence vectors in the shape of Text Embeddings Inference."""
        asked = await self.parse(request, schemas.EmbedRequest)
        answer = await self.service.answer(self.texts(asked.inputs), (), whole=not asked.truncate)
        if asked.normalize:
            return Reply(self.shorten(answer.vectors(), asked.dimensions), answer)
        vectors = np.concatenate([part.pooled for part in answer.parts])
        return Reply(self.shorten(vectors, asked.dimensions, unit_length=False), answer)

    async def classify(self, request: Request) -> Reply:
        """Labels by probability, for the task in ?task= or the only classification task."""
        asked = await self.parse(request, schemas.ClassifyRequest)
        if asked.raw_scores:
            raise invalid("raw_scores: only probabilities are served; leave it out")
        task = self.classification_task(request.query_params.get("task"))
        single = isinstance(asked.inputs, str)
        listed = [asked.inputs] if isinstance(asked.inputs, str) else asked.inputs
        if any(isinstance(entry, list) and len(entry) != 1 for entry in listed):
            raise invalid("inputs: pairs of texts are not served; send [[text], [text], …]")
        texts = self.texts([entry[0] if isinstance(entry, list) else entry for entry in listed])
        answer = await self.service.answer(texts, (task,), whole=not asked.truncate)
        rows = [by_probability(item["scores"]) for item in self.labels(answer, task)]
        return Reply(rows[0] if single else rows, answer)

    async def tokenize(self, request: Request) -> Reply:
        """The model's sub-words with their places in the text."""
        asked = await self.parse(request, schemas.TokenizeRequest)
        texts = self.texts(asked.inputs)
        loop = asyncio.get_running_loop()
        windows = self.service.model.stage.windows
        return Reply(
            await loop.run_in_executor(None, windows.tokens, texts, asked.add_special_tokens)
        )

    async def info(self, request: Request) -> Reply:
        """What is being served."""
        model = self.service.model
        return Reply(
            {
                "model_id": model.name,
                "version": model.version,
                "runtime": model.stage.runtime.name,
                "tasks": {
                    task: {"kind": head.kind, "labels": head.labels}
                    for task, head in model.heads.items()
                },
                "dimension": model.stage.hidden_size,
                "max_input_length": model.stage.windows.max_length,
                "max_client_batch_size": self.settings.max_inputs,
                "max_batch_tokens": self.settings.batch_tokens,
                "encoder": model.manifest.encoder,
            }
        )

    # Hugging Face's pipelines

    async def pipeline(self, request: Request) -> Reply:
        """One task in the shape of transformers' pipelines and InferenceClient."""
        asked = await self.parse(request, schemas.PipelineRequest)
        options = asked.parameters or schemas.PipelineParameters()
        task = request.path_params["task"]
        (task,) = self.tasks([task])
        single = isinstance(asked.inputs, str)
        texts = self.texts(asked.inputs)
        strategy = options.aggregation_strategy
        answer = await self.service.answer(
            texts,
            (task,),
            all_tags=strategy in ("first", "average", "max"),
            whole=not options.truncation,
        )
        self.one_task(answer)
        if answer.model.heads[task].level == "sentence":
            if options.function_to_apply == "none":
                raise invalid("parameters.function_to_apply: only probabilities are served")
            rows = [
                by_probability(item["scores"])[: options.top_k]
                for item in self.labels(answer, task)
            ]
            return Reply(rows, answer)
        tokenizer = answer.model.stage.windows.backend
        found: list[Any] = []
        for part in answer.parts:
            output = part.outputs[task]
            assert isinstance(output, TokenOutput)
            found += pipelines.token_classification(output, part.items, strategy, tokenizer)
        ignored = set(options.ignore_labels or ())
        kept = [
            [e for e in row if e.get("entity_group", e.get("entity")) not in ignored]
            for row in found
        ]
        return Reply(kept[0] if single else kept, answer)

    # About the server

    async def health(self, request: Request) -> Reply:
        """Whether this process answers."""
        return Reply({"status": "ok"})

    async def ready(self, request: Request) -> Reply:
        """Whether encoder and heads answer."""
        await self.check_ready()
        return Reply({"status": "ready"})

    async def metrics(self, request: Request) -> Reply:
        """Prometheus metrics of the replica that answers."""
        self.service.metrics.unanswered.set(self.service.batcher.unanswered)
        return Reply(
            self.service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    async def openapi(self, request: Request) -> Reply:
        """This API as an OpenAPI document."""
        return Reply(self.document)

    async def docs(self, request: Request) -> Reply:
        """This API for people."""
        page = documentation_page(self.document).encode()
        return Reply(page, media_type="text/html", headers=PAGE_HEADERS)

    async def page(self, request: Request) -> Reply:
        """A page to try the model on."""
        name = request.path_params.get("file", "")
        if name not in PAGE_TYPES:
            raise ApiError(404, "NotFound", f"no page file {name!r}")
        content = (PAGE / (name or "index.html")).read_bytes()
        return Reply(content, media_type=PAGE_TYPES[name], headers=PAGE_HEADERS)

    # What handlers share

    async def parse(self, request: Request, model: type[AnyModel]) -> AnyModel:
        """The body as a request of this shape.

        Raises:
            ApiError: it is too large, too slow, no JSON or not of this shape.
        """
        body = await self.read(request)
        try:
            return model.model_validate_json(body)
        except ValidationError as error:
            raise invalid(explain(error)) from None

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

    def texts(self, inputs: str | Sequence[str]) -> list[str]:
        """The request's texts, within limits."""
        texts = [inputs] if isinstance(inputs, str) else list(inputs)
        if not texts:
            raise invalid("inputs: send at least one text")
        most = self.settings.max_inputs
        if len(texts) > most:
            raise too_large(f"inputs: {len(texts)} texts; at most {most} in a request: split them")
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
                raise ApiError(404, "NotFound", f"unknown task {name!r}; known: {', '.join(known)}")
        if names is not None and not names:
            raise invalid("tasks: name at least one, or leave it out for all")
        return list(dict.fromkeys(known if names is None else names))

    def classification_task(self, name: str | None) -> str:
        known = [t for t, h in self.service.model.heads.items() if h.level == "sentence"]
        if name is not None:
            (task,) = self.tasks([name])
            if task not in known:
                raise invalid(f"task {task!r} gives entities; send it to /tasks/{task}")
            return task
        if len(known) != 1:
            listed = ", ".join(known) or "none"
            raise invalid(f"name a classification task in ?task=; this model has: {listed}")
        return known[0]

    def labels(self, answer: Answer, task: str) -> list[Any]:
        self.one_task(answer)
        return list(answer.predictions(task))

    def one_task(self, answer: Answer) -> None:
        for error in answer.failures.values():
            raise unavailable(str(error))

    def shorten(self, vectors: Any, dimensions: int | None, unit_length: bool = True) -> Any:
        """The first dimensions of vectors, again of unit length."""
        width = vectors.shape[1]
        if dimensions is None or dimensions == width:
            return vectors
        if dimensions > width:
            raise invalid(f"dimensions: {dimensions} asked for; this model has {width}")
        cut = vectors[:, :dimensions]
        if unit_length:
            cut = cut / np.maximum(np.linalg.norm(cut, axis=1, keepdims=True), 1e-12)
        return np.ascontiguousarray(cut)

    def endpoint(self, operation: Operation) -> Callable[[Request], Awaitable[Response]]:
        """A handler with what all share: keys, errors, log and metrics."""
        route, open_to_all = operation.path, operation.open

        async def answer(request: Request) -> Response:
            started = time.perf_counter()
            reply: Reply | None = None
            try:
                if not open_to_all:
                    self.check_key(request)
                reply = await operation.handler(request)
                response = reply.response(started)
            except Exception as error:
                response = self.failure(error, request)
            self.finish(request, route, response.status_code, started, reply)
            return response

        return answer

    def check_key(self, request: Request) -> None:
        if self.keys.required:
            key = bearer(request.headers.get("authorization"))
            if not self.keys.accept(key):
                raise unauthorized(key is not None)

    def failure(self, error: Exception, request: Request) -> Response:
        """An error as the client sees it."""
        if isinstance(error, Overloaded):
            self.service.metrics.rejected.inc()
            known = overloaded(str(error), self.settings.retry_after_s)
        elif isinstance(error, TooLong):
            known = too_large(str(error))
        elif isinstance(error, TextError):
            known = invalid(str(error))
        elif isinstance(error, ApiError):
            known = error
        elif isinstance(error, ClientDisconnect):
            known = ApiError(499, "Validation", "the client left")
        else:
            self.log.error(request_id(request), error)
            known = ApiError(500, "Backend", "an error of the server; its log has the details")
        return Response(
            dump(known.body()), known.status, known.headers, media_type="application/json"
        )

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


def without_scores(prediction: Prediction) -> Any:
    """A prediction without the probability of every label."""
    if isinstance(prediction, list):
        return prediction
    return {key: value for key, value in prediction.items() if key != "scores"}


def by_probability(scores: dict[str, float]) -> list[dict[str, Any]]:
    """Labels with their probabilities, the likeliest first."""
    ordered = sorted(scores.items(), key=lambda item: -item[1])
    return [{"label": label, "score": score} for label, score in ordered]


def explain(error: ValidationError) -> str:
    """What is wrong with a body, field by field, without repeating what it held."""
    lines = []
    for item in error.errors(include_input=False, include_url=False)[:5]:
        where = ".".join(str(step) for step in item["loc"])
        lines.append(f"{where}: {item['msg']}" if where else item["msg"])
    return "; ".join(lines)


def operations(api: Api) -> list[Operation]:
    """Every route, what it takes and what it gives."""
    post = "POST"
    answers = dict[str, Any]
    return [
        Operation("GET", "/", api.page, None, str, open=True, media_type="text/html"),
        Operation("GET", "/page/{file}", api.page, None, str, open=True, media_type="text/plain"),
        Operation(post, "/v1/predict", api.predict, schemas.PredictRequest, schemas.PredictReply),
        Operation(
            post,
            "/v1/embeddings",
            api.embeddings,
            schemas.EmbeddingsRequest,
            schemas.EmbeddingsReply,
        ),
        Operation(
            post,
            "/v1/similarity",
            api.similarity,
            schemas.SimilarityRequest,
            schemas.SimilarityReply,
        ),
        Operation(post, "/tasks/{task}", api.pipeline, schemas.PipelineRequest, list[Any]),
        Operation(post, "/embed", api.embed, schemas.EmbedRequest, list[list[float]]),
        Operation(
            post,
            "/predict",
            api.classify,
            schemas.ClassifyRequest,
            list[schemas.ScoredLabel] | list[list[schemas.ScoredLabel]],
            query=("task",),
        ),
        Operation(
            post,
            "/tokenize",
            api.tokenize,
            schemas.TokenizeRequest,
            list[list[schemas.TokenReply]],
        ),
        Operation("GET", "/info", api.info, None, schemas.InfoReply),
        Operation("GET", "/health", api.health, None, schemas.HealthReply, open=True),
        Operation("GET", "/ready", api.ready, None, schemas.HealthReply, open=True),
        Operation("GET", "/metrics", api.metrics, None, str, media_type="text/plain"),
        Operation("GET", "/openapi.json", api.openapi, None, answers, open=True),
        Operation("GET", "/docs", api.docs, None, str, open=True, media_type="text/html"),
    ]


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


def build_app(api: Api) -> Starlette:
    """The ASGI application around an Api."""
    routes = [
        Route(operation.path, api.endpoint(operation), methods=[operation.method])
        for operation in api.operations
    ]
    middleware = []
    if api.settings.cors_origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=list(api.settings.cors_origins),
                allow_methods=["GET", "POST"],
                allow_headers=["authorization", "content-type"],
            )
        )
    return Starlette(
        routes=routes, middleware=middleware, exception_handlers={HTTPException: http_error}
    )
