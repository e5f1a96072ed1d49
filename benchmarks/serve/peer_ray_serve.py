"""Peer (b): the Ray Serve composition of the documentation. A FastAPI gateway calls an encoder that
batches with `@serve.batch`, then a deployment for each head; Serve's own defaults elsewhere.

    ARTIFACT=DIR python -m benchmarks.serve.peer_ray_serve --port 8000
"""

# No postponed annotations here: Serve ships these classes by value, and FastAPI could not look up
# what a string names.
import argparse
import asyncio
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve
from ray.serve.handle import DeploymentHandle
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

app = FastAPI()


class PredictRequest(BaseModel):
    inputs: str | list[str]
    tasks: list[str] | None = None


# Without this Serve admits five requests and says that a batch can then never be full.
@serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": 0.5})
class Encoder:
    def __init__(self, artifact: str) -> None:
        torch.set_num_threads(os.cpu_count() or 1)  # Ray would give an actor one thread
        self.tokenizer = AutoTokenizer.from_pretrained(f"{artifact}/encoder")
        self.model = AutoModel.from_pretrained(f"{artifact}/encoder", dtype=torch.float32).eval()

    @serve.batch(max_batch_size=32, batch_wait_timeout_s=0.005)
    async def __call__(self, texts: list[str]) -> list[dict[str, Any]]:
        batch = self.tokenizer(
            texts, padding=True, truncation=True, return_tensors="pt", return_offsets_mapping=True
        )
        offsets = batch.pop("offset_mapping").numpy()
        with torch.inference_mode():
            states = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1)
            pooled = (states * mask).sum(1) / mask.sum(1)
        lengths = batch["attention_mask"].sum(1).tolist()
        return [
            {
                "text": text,
                "pooled": pooled[row].numpy(),
                "states": states[row, :length].numpy(),
                "offsets": offsets[row, :length],
            }
            for row, (text, length) in enumerate(zip(texts, lengths, strict=True))
        ]


class Head:
    def __init__(self, folder: str) -> None:
        spec = json.loads((Path(folder) / "head.json").read_text())
        weights = load_file(Path(folder) / "head.safetensors")
        self.labels: list[str] = spec["labels"]
        self.weight = weights["output.weight"].numpy().T
        self.bias = weights["output.bias"].numpy()

    def scores(self, features: np.ndarray) -> np.ndarray:
        logits = features @ self.weight + self.bias
        exponents = np.exp(logits - logits.max(-1, keepdims=True))
        return exponents / exponents.sum(-1, keepdims=True)


@serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": 0.25})
class Classifier(Head):
    def __call__(self, encoded: dict[str, Any]) -> dict[str, Any]:
        scores = self.scores(encoded["pooled"])
        best = int(scores.argmax())
        return {"label": self.labels[best], "score": float(scores[best])}


@serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": 0.25})
class Tagger(Head):
    def __call__(self, encoded: dict[str, Any]) -> list[dict[str, Any]]:
        """Neighbouring sub-words of one type become one entity."""
        scores = self.scores(encoded["states"])
        groups: list[tuple[int, list[int]]] = []
        last = -1
        for position, tag in enumerate(scores.argmax(-1)):
            start, end = encoded["offsets"][position]
            if start == end:  # [CLS] and [SEP]
                continue
            kind = -1 if tag == 0 else int(tag - 1) % len(self.labels)
            if kind >= 0 and tag > len(self.labels) and last == kind:
                groups[-1][1].append(position)
            elif kind >= 0:
                groups.append((kind, [position]))
            last = kind
        return [self.entity(kind, places, scores, encoded) for kind, places in groups]

    def entity(
        self, kind: int, places: list[int], scores: np.ndarray, encoded: dict[str, Any]
    ) -> dict[str, Any]:
        start, end = int(encoded["offsets"][places[0]][0]), int(encoded["offsets"][places[-1]][1])
        return {
            "entity_group": self.labels[kind],
            "score": float(scores[places].max(-1).mean()),
            "word": encoded["text"][start:end],
            "start": start,
            "end": end,
        }


@serve.deployment(max_ongoing_requests=64, ray_actor_options={"num_cpus": 0.25})
@serve.ingress(app)
class Gateway:
    def __init__(self, encoder: DeploymentHandle, heads: dict[str, DeploymentHandle]) -> None:
        self.encoder = encoder
        self.heads = heads

    @app.get("/health")
    async def health(self) -> dict[str, str]:
        return {"status": "ok"}

    @app.post("/v1/predict")
    async def predict(self, request: PredictRequest) -> dict[str, Any]:
        texts = [request.inputs] if isinstance(request.inputs, str) else request.inputs
        tasks = request.tasks or list(self.heads)
        return {"results": await asyncio.gather(*(self.one(text, tasks) for text in texts))}

    async def one(self, text: str, tasks: list[str]) -> dict[str, Any]:
        encoded = self.encoder.remote(text)  # handed on unresolved, as the composition guide does
        answers = await asyncio.gather(*(self.heads[task].remote(encoded) for task in tasks))
        return dict(zip(tasks, answers, strict=True))


def build(artifact: str) -> serve.Application:
    heads = {}
    for folder in sorted((Path(artifact) / "heads").iterdir()):
        kind = json.loads((folder / "head.json").read_text())["kind"]
        deployment = Tagger if kind == "token_classification" else Classifier
        heads[folder.name] = deployment.options(name=folder.name).bind(str(folder))
    return Gateway.bind(Encoder.bind(artifact), heads)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args()
    ray.init(address="local", num_cpus=max(os.cpu_count() or 1, 2))
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    serve.run(build(os.environ["ARTIFACT"]), blocking=True)


if __name__ == "__main__":
    main()
