"""Every route; what those do that are our own or about the server."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
from starlette.requests import Request

from mtl_core.answers import Prediction
from serve_app import schemas
from serve_app.compatible import CompatibleRoutes
from serve_app.errors import ApiError, unavailable
from serve_app.gate import Gate, Reply
from serve_app.openapi import Operation, documentation_page, openapi_document

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


class Routes:
    """The handlers of one replica.

    Args:
        gate: reads and checks requests.
        check_ready: raises ApiError while encoder or heads do not answer.
    """

    def __init__(self, gate: Gate, check_ready: Callable[[], Awaitable[None]]) -> None:
        self.gate = gate
        self.service = gate.service
        self.check_ready = check_ready
        self.operations = operations(self)
        self.described: tuple[str, dict[str, Any]] | None = None
        """A version and its document."""

    # Our own routes

    async def predict(self, request: Request) -> Reply:
        """Labels and entities of texts, every task from one pass through the encoder."""
        asked = await self.gate.parse(request, schemas.PredictRequest)
        texts = self.gate.texts(asked.inputs)
        tasks = self.gate.tasks(asked.tasks)
        answer = await self.service.answer(
            texts, tasks, truncate=asked.truncate, vectors=asked.return_embeddings
        )
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
        if answer.beginnings:
            content["truncated"] = answer.beginnings
        content["model"] = answer.model.name
        content["usage"] = {"tokens": answer.num_tokens}
        return Reply(content, answer)

    async def similarity(self, request: Request) -> Reply:
        """Cosines between the vectors of texts."""
        asked = await self.gate.parse(request, schemas.SimilarityRequest)
        answer = await self.service.answer(
            self.gate.texts(asked.inputs), (), truncate=asked.truncate
        )
        vectors = answer.vectors()
        cosines = np.clip(vectors @ vectors.T, -1.0, 1.0)
        content: dict[str, Any] = {"similarities": cosines}
        if answer.beginnings:
            content["truncated"] = answer.beginnings
        content["model"] = answer.model.name
        return Reply(content, answer)

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
        return Reply(self.document())

    async def docs(self, request: Request) -> Reply:
        """This API for people."""
        page = documentation_page(self.document()).encode()
        return Reply(page, media_type="text/html", headers=PAGE_HEADERS)

    async def page(self, request: Request) -> Reply:
        """A page to try the model on."""
        name = request.path_params.get("file", "")
        if name not in PAGE_TYPES:
            raise ApiError(
                404, "NotFound", f"no page file {name[:80]!r}; there are style.css and app.js"
            )
        content = (PAGE / (name or "index.html")).read_bytes()
        return Reply(content, media_type=PAGE_TYPES[name], headers=PAGE_HEADERS)

    def document(self) -> dict[str, Any]:
        """Of the tasks that are served now; they change with the artifact."""
        model = self.service.model
        if self.described is None or self.described[0] != model.version:
            tasks = {task: head.level for task, head in model.heads.items()}
            document = openapi_document(self.operations, self.gate.keys.required, tasks)
            self.described = model.version, document
        return self.described[1]


def without_scores(prediction: Prediction) -> Any:
    """A prediction without the probability of every label."""
    if isinstance(prediction, list):
        return prediction
    return {key: value for key, value in prediction.items() if key != "scores"}


def operations(routes: Routes) -> list[Operation]:
    """Every route, what it takes and what it gives."""
    others = CompatibleRoutes(routes.gate)
    post = "POST"
    answers = dict[str, Any]
    return [
        Operation("GET", "/", routes.page, None, str, open=True, media_type="text/html"),
        Operation("GET", "/page/{file}", routes.page, None, str, open=True, media_type="text/*"),
        Operation(
            post, "/v1/predict", routes.predict, schemas.PredictRequest, schemas.PredictReply
        ),
        Operation(
            post,
            "/v1/embeddings",
            others.embeddings,
            schemas.EmbeddingsRequest,
            schemas.EmbeddingsReply,
            error=schemas.OpenAIErrorReply,
        ),
        Operation(
            post,
            "/v1/similarity",
            routes.similarity,
            schemas.SimilarityRequest,
            schemas.SimilarityReply,
        ),
        Operation(
            post,
            "/tasks/{task}",
            others.pipeline,
            schemas.PipelineRequest,
            list[Any],
            truncate="parameters.truncation: true",
        ),
        Operation(post, "/embed", others.embed, schemas.EmbedRequest, list[list[float]]),
        Operation(
            post,
            "/predict",
            others.classify,
            schemas.ClassifyRequest,
            list[schemas.ScoredLabel] | list[list[schemas.ScoredLabel]],
            query=("task",),
        ),
        Operation(
            post,
            "/tokenize",
            others.tokenize,
            schemas.TokenizeRequest,
            list[list[schemas.TokenReply]],
        ),
        Operation("GET", "/info", others.info, None, schemas.InfoReply),
        Operation("GET", "/health", routes.health, None, schemas.HealthReply, open=True),
        Operation("GET", "/ready", routes.ready, None, schemas.HealthReply, open=True),
        Operation("GET", "/metrics", routes.metrics, None, str, media_type="text/plain"),
        Operation("GET", "/openapi.json", routes.openapi, None, answers, open=True),
        Operation("GET", "/docs", routes.docs, None, str, open=True, media_type="text/html"),
    ]
