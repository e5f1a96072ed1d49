"""What each route does, in the shapes that clients already speak."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
from starlette.requests import Request

from mtl_core.answers import Prediction, TokenOutput
from serve_app import pipelines, schemas
from serve_app.errors import ApiError, invalid, unavailable
from serve_app.gate import Gate, Reply
from serve_app.openapi import Operation, documentation_page, openapi_document
from serve_app.service import Answer

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
        self.settings = gate.settings
        self.check_ready = check_ready
        self.operations = operations(self)
        self.document = openapi_document(self.operations, with_keys=gate.keys.required)

    # Our own routes

    async def predict(self, request: Request) -> Reply:
        """Labels and entities of texts, every task from one pass through the encoder."""
        asked = await self.gate.parse(request, schemas.PredictRequest)
        texts = self.gate.texts(asked.inputs)
        tasks = self.gate.tasks(asked.tasks)
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
        asked = await self.gate.parse(request, schemas.SimilarityRequest)
        answer = await self.service.answer(
            self.gate.texts(asked.inputs), (), whole=not asked.truncate
        )
        vectors = answer.vectors()
        cosines = np.clip(vectors @ vectors.T, -1.0, 1.0)
        return Reply({"similarities": cosines, "model": answer.model.name}, answer)

    # OpenAI's

    async def embeddings(self, request: Request) -> Reply:
        """Unit-length sentence vectors in the shape of OpenAI's embeddings API."""
        asked = await self.gate.parse(request, schemas.EmbeddingsRequest)
        if not isinstance(asked.input, str) and any(not isinstance(t, str) for t in asked.input):
            raise invalid("input: send text; token ids of other models mean nothing here")
        texts = self.gate.texts(asked.input)  # type: ignore[arg-type]
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
        asked = await self.gate.parse(request, schemas.EmbedRequest)
        answer = await self.service.answer(
            self.gate.texts(asked.inputs), (), whole=not asked.truncate
        )
        if asked.normalize:
            return Reply(self.shorten(answer.vectors(), asked.dimensions), answer)
        vectors = np.concatenate([part.pooled for part in answer.parts])
        return Reply(self.shorten(vectors, asked.dimensions, unit_length=False), answer)

    async def classify(self, request: Request) -> Reply:
        """Labels by probability, for the task in ?task= or the only classification task."""
        asked = await self.gate.parse(request, schemas.ClassifyRequest)
        if asked.raw_scores:
            raise invalid("raw_scores: only probabilities are served; leave it out")
        task = self.classification_task(request.query_params.get("task"))
        single = isinstance(asked.inputs, str)
        listed = [asked.inputs] if isinstance(asked.inputs, str) else asked.inputs
        if any(isinstance(entry, list) and len(entry) != 1 for entry in listed):
            raise invalid("inputs: pairs of texts are not served; send [[text], [text], …]")
        texts = self.gate.texts(
            [entry[0] if isinstance(entry, list) else entry for entry in listed]
        )
        answer = await self.service.answer(texts, (task,), whole=not asked.truncate)
        rows = [by_probability(item["scores"]) for item in self.labels(answer, task)]
        return Reply(rows[0] if single else rows, answer)

    async def tokenize(self, request: Request) -> Reply:
        """The model's sub-words with their places in the text."""
        asked = await self.gate.parse(request, schemas.TokenizeRequest)
        texts = self.gate.texts(asked.inputs)
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
        asked = await self.gate.parse(request, schemas.PipelineRequest)
        options = asked.parameters or schemas.PipelineParameters()
        task = request.path_params["task"]
        (task,) = self.gate.tasks([task])
        single = isinstance(asked.inputs, str)
        texts = self.gate.texts(asked.inputs)
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

    def classification_task(self, name: str | None) -> str:
        known = [t for t, h in self.service.model.heads.items() if h.level == "sentence"]
        if name is not None:
            (task,) = self.gate.tasks([name])
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


def without_scores(prediction: Prediction) -> Any:
    """A prediction without the probability of every label."""
    if isinstance(prediction, list):
        return prediction
    return {key: value for key, value in prediction.items() if key != "scores"}


def by_probability(scores: dict[str, float]) -> list[dict[str, Any]]:
    """Labels with their probabilities, the likeliest first."""
    ordered = sorted(scores.items(), key=lambda item: -item[1])
    return [{"label": label, "score": score} for label, score in ordered]


def operations(routes: Routes) -> list[Operation]:
    """Every route, what it takes and what it gives."""
    post = "POST"
    answers = dict[str, Any]
    return [
        Operation("GET", "/", routes.page, None, str, open=True, media_type="text/html"),
        Operation(
            "GET", "/page/{file}", routes.page, None, str, open=True, media_type="text/plain"
        ),
        Operation(
            post, "/v1/predict", routes.predict, schemas.PredictRequest, schemas.PredictReply
        ),
        Operation(
            post,
            "/v1/embeddings",
            routes.embeddings,
            schemas.EmbeddingsRequest,
            schemas.EmbeddingsReply,
        ),
        Operation(
            post,
            "/v1/similarity",
            routes.similarity,
            schemas.SimilarityRequest,
            schemas.SimilarityReply,
        ),
        Operation(post, "/tasks/{task}", routes.pipeline, schemas.PipelineRequest, list[Any]),
        Operation(post, "/embed", routes.embed, schemas.EmbedRequest, list[list[float]]),
        Operation(
            post,
            "/predict",
            routes.classify,
            schemas.ClassifyRequest,
            list[schemas.ScoredLabel] | list[list[schemas.ScoredLabel]],
            query=("task",),
        ),
        Operation(
            post,
            "/tokenize",
            routes.tokenize,
            schemas.TokenizeRequest,
            list[list[schemas.TokenReply]],
        ),
        Operation("GET", "/info", routes.info, None, schemas.InfoReply),
        Operation("GET", "/health", routes.health, None, schemas.HealthReply, open=True),
        Operation("GET", "/ready", routes.ready, None, schemas.HealthReply, open=True),
        Operation("GET", "/metrics", routes.metrics, None, str, media_type="text/plain"),
        Operation("GET", "/openroutes.json", routes.openapi, None, answers, open=True),
        Operation("GET", "/docs", routes.docs, None, str, open=True, media_type="text/html"),
    ]
