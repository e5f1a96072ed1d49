"""Routes in the shapes of others' APIs: OpenAI, Text Embeddings Inference, Hugging Face."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
from starlette.requests import Request

from mtl_core.answers import TokenOutput
from mtl_core.predictor import unit
from serve_app import pipelines, schemas
from serve_app.errors import invalid, unavailable
from serve_app.gate import Gate, Reply
from serve_app.service import Answer


class CompatibleRoutes:
    """The handlers that others' clients call.

    Args:
        gate: reads and checks requests.
    """

    def __init__(self, gate: Gate) -> None:
        self.gate = gate
        self.service = gate.service
        self.settings = gate.settings

    # OpenAI's

    async def embeddings(self, request: Request) -> Reply:
        """Unit-length sentence vectors in the shape of OpenAI's embeddings API."""
        asked = await self.gate.parse(request, schemas.EmbeddingsRequest)
        if not isinstance(asked.input, str) and any(not isinstance(t, str) for t in asked.input):
            raise invalid("input: send text; token ids of other models mean nothing here")
        texts = self.gate.texts(asked.input, "input")  # type: ignore[arg-type]
        answer = await self.service.answer(texts, (), truncate=asked.truncate)
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
            self.gate.texts(asked.inputs), (), truncate=bool(asked.truncate)
        )
        if asked.normalize:
            return Reply(self.shorten(answer.vectors(), asked.dimensions), answer)
        vectors = np.concatenate([part.pooled for part in answer.parts])
        return Reply(self.shorten(vectors, asked.dimensions, unit_length=False), answer)

    async def classify(self, request: Request) -> Reply:
        """Labels by probability, for the task in ?task= or the only classification task."""
        asked = await self.gate.parse(request, schemas.ClassifyRequest)
        task = self.classification_task(request.query_params.get("task"))
        single = isinstance(asked.inputs, str)
        listed = [asked.inputs] if isinstance(asked.inputs, str) else asked.inputs
        if any(isinstance(entry, list) and len(entry) != 1 for entry in listed):
            raise invalid("inputs: pairs of texts are not served; send [[text], [text], …]")
        texts = self.gate.texts(
            [entry[0] if isinstance(entry, list) else entry for entry in listed]
        )
        answer = await self.service.answer(texts, (task,), truncate=bool(asked.truncate))
        self.one_task(answer)
        rows = [by_probability(item["scores"]) for item in self.labels(answer, task)]
        return Reply(rows[0] if single else rows, answer)

    async def tokenize(self, request: Request) -> Reply:
        """The model's sub-words with their places in the text."""
        asked = await self.gate.parse(request, schemas.TokenizeRequest)
        texts = self.gate.texts(asked.inputs)
        return Reply(await self.service.tokens(texts, asked.add_special_tokens))

    async def info(self, request: Request) -> Reply:
        """What is being served."""
        model = self.service.model
        return Reply(
            {
                "model_id": model.name,
                "version": model.version,
                "runtime": model.stage.runtime.name,
                "model_type": {"embedding": {"pooling": model.manifest.encoder["pooling"]}},
                "tasks": {
                    task: {"kind": head.kind, "labels": head.labels}
                    for task, head in model.heads.items()
                },
                "dimension": model.stage.hidden_size,
                "max_input_length": model.stage.windows.max_length,
                "max_concurrent_requests": self.settings.max_waiting,
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
            truncate=options.truncation,
        )
        self.one_task(answer)
        if answer.model.heads[task].level == "sentence":
            served = "sigmoid" if answer.model.heads[task].kind == "multilabel" else "softmax"
            if options.function_to_apply not in (None, served):
                raise invalid(f"parameters.function_to_apply: this task has {served}; leave it out")
            rows = [
                by_probability(item["scores"])[: options.top_k]
                for item in self.labels(answer, task)
            ]
            return Reply(rows, answer)
        tokenizer = answer.model.stage.windows.backend
        ignored = {pipelines.OUTSIDE} if options.ignore_labels is None else {*options.ignore_labels}
        found: list[Any] = []
        for part in answer.parts:
            output = part.outputs[task]
            assert isinstance(output, TokenOutput)
            found += pipelines.token_classification(
                output, part.items, strategy, tokenizer, ignored
            )
        return Reply(found[0] if single else found, answer)

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
        return np.ascontiguousarray(unit(cut) if unit_length else cut)


def by_probability(scores: dict[str, float]) -> list[dict[str, Any]]:
    """Labels with their probabilities, the likeliest first."""
    ordered = sorted(scores.items(), key=lambda item: -item[1])
    return [{"label": label, "score": score} for label, score in ordered]
