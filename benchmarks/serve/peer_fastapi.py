"""Peer (a): the server most people write first. FastAPI, transformers and torch, in each process
the encoder once and two heads; started as `ARTIFACT=DIR uvicorn benchmarks.serve.peer_fastapi:app`.

PASSES (1) says how many requests go through the model of a process at a time, THREADS (the cores
shared between them) how many threads torch takes for one. DTYPE may be bfloat16; WEB_CONCURRENCY is
uvicorn's own, the number of processes. README.md of this folder has what each setting gave.
"""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import anyio.to_thread
import torch
from fastapi import FastAPI
from pydantic import BaseModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

ARTIFACT = Path(os.environ["ARTIFACT"])
DTYPE = torch.bfloat16 if os.environ.get("DTYPE") == "bfloat16" else torch.float32
PASSES = int(os.environ.get("PASSES", "1"))
THREADS = int(os.environ.get("THREADS", max((os.cpu_count() or 1) // PASSES, 1)))

tokenizer = AutoTokenizer.from_pretrained(ARTIFACT / "encoder")
encoder = AutoModel.from_pretrained(ARTIFACT / "encoder", dtype=DTYPE).eval()


class Head:
    """A linear layer and the names of its outputs."""

    def __init__(self, folder: Path) -> None:
        spec = json.loads((folder / "head.json").read_text())
        weights = load_file(folder / "head.safetensors")
        self.kind: str = spec["kind"]
        self.labels: list[str] = spec["labels"]
        if self.kind == "token_classification":
            begin = [f"B-{name}" for name in spec["labels"]]
            self.labels = ["O", *begin, *(f"I-{name}" for name in spec["labels"])]
        self.linear = torch.nn.Linear(spec["hidden_size"], len(self.labels))
        self.linear.load_state_dict(
            {"weight": weights["output.weight"], "bias": weights["output.bias"]}
        )


heads = {folder.name: Head(folder) for folder in sorted((ARTIFACT / "heads").iterdir())}
torch.set_num_threads(THREADS)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    anyio.to_thread.current_default_thread_limiter().total_tokens = PASSES
    yield


app = FastAPI(lifespan=lifespan)


class PredictRequest(BaseModel):
    inputs: str | list[str]
    tasks: list[str] | None = None


class Entity(BaseModel):
    entity_group: str
    score: float
    word: str
    start: int
    end: int


class Label(BaseModel):
    label: str
    score: float


class PredictResponse(BaseModel):
    results: list[dict[str, Label | list[Entity]]]


def classify(head: Head, pooled: torch.Tensor) -> list[Label]:
    scores, best = head.linear(pooled).softmax(-1).max(-1)
    return [
        Label(label=head.labels[i], score=score)
        for i, score in zip(best.tolist(), scores.tolist(), strict=True)
    ]


def find_entities(
    labels: list[str], tags: list[int], scores: list[float], offsets: list[Any], text: str
) -> list[Entity]:
    """Neighbouring sub-words of one type become one entity ("simple" aggregation)."""
    groups: list[tuple[str, list[int]]] = []
    last = "O"
    for position, (tag, (start, end)) in enumerate(zip(tags, offsets, strict=True)):
        name = labels[tag]
        if start == end:  # special tokens and padding
            continue
        if name != "O":
            prefix, kind = name.split("-", 1)
            if prefix == "I" and last[2:] == kind:
                groups[-1][1].append(position)
            else:
                groups.append((kind, [position]))
        last = name
    return [
        Entity(
            entity_group=kind,
            score=sum(scores[p] for p in positions) / len(positions),
            word=text[offsets[positions[0]][0] : offsets[positions[-1]][1]],
            start=offsets[positions[0]][0],
            end=offsets[positions[-1]][1],
        )
        for kind, positions in groups
    ]


def tag(
    head: Head, states: torch.Tensor, offsets: list[Any], texts: list[str]
) -> list[list[Entity]]:
    scores, best = head.linear(states).softmax(-1).max(-1)
    rows = zip(best.tolist(), scores.tolist(), offsets, texts, strict=True)
    return [find_entities(head.labels, *row) for row in rows]


@app.get("/health")
def health() -> dict[str, Any]:
    return {"status": "ok", "process": os.getpid()}


@app.post("/v1/predict")
@torch.inference_mode()
def predict(request: PredictRequest) -> PredictResponse:
    texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs
    batch = tokenizer(
        texts, padding=True, truncation=True, return_tensors="pt", return_offsets_mapping=True
    )
    offsets = batch.pop("offset_mapping").tolist()
    states = encoder(**batch).last_hidden_state.float()
    mask = batch["attention_mask"].unsqueeze(-1)
    pooled = (states * mask).sum(1) / mask.sum(1)
    results: list[dict[str, Any]] = [{} for _ in texts]
    for task in request.tasks or heads:
        head = heads[task]
        answers: list[Any] = (
            tag(head, states, offsets, texts)
            if head.kind == "token_classification"
            else classify(head, pooled)
        )
        for result, answer in zip(results, answers, strict=True):
            result[task] = answer
    return PredictResponse(results=results)
