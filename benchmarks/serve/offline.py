"""Offline encoding and the machine's ceiling, each in a process of its own that prints JSON.

    python offline.py ours|torch|openvino|onnx|gemm MODEL TEXTS

MODEL is the artifact for ours and a sentence-transformers folder otherwise; TEXTS a JSON list. This
file imports nothing of the project at the top: peers run it in an environment of their own.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

WARM_UP = 256
Encode = Callable[[list[str]], Any]


def ours(model: str) -> Encode:
    from mtl_core.predictor import Predictor

    return Predictor.load(model, runtime="auto").embed


def sentence_transformers(model: str, backend: Any) -> Encode:
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(model, backend=backend, device="cpu")
    return lambda texts: encoder.encode(texts, normalize_embeddings=True)


def encode(engine: str, model: str, texts: list[str]) -> dict[str, Any]:
    """Texts a second, model loading and a first call left out; some vectors to compare."""
    embed = ours(model) if engine == "ours" else sentence_transformers(model, engine)
    embed(texts[:WARM_UP])
    started = time.perf_counter()
    vectors = embed(texts)
    seconds = time.perf_counter() - started
    return {"rate": len(texts) / seconds, "seconds": seconds, "vectors": vectors[:64].tolist()}


def gemm() -> dict[str, float]:
    """The best rate of a bf16 matrix product, in Gflop/s: a square one, and MiniLM's widest."""
    import torch

    best = {}
    shapes = {"square": (2048, 2048, 2048), "minilm": (2048, 384, 1536)}
    for name, (rows, inner, columns) in shapes.items():
        left = torch.randn(rows, inner, dtype=torch.bfloat16)
        right = torch.nn.Linear(inner, columns, bias=False, dtype=torch.bfloat16)
        with torch.inference_mode():
            best[name] = max(_rate(lambda: right(left)) for _ in range(20))  # noqa: B023
        best[name] *= 2 * rows * inner * columns / 1e9
    return best


def _rate(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return 1 / (time.perf_counter() - started)


def main() -> None:
    engine, model, texts = sys.argv[1:]
    output, sys.stdout = sys.stdout, sys.stderr
    os.environ["TQDM_DISABLE"] = "1"
    if engine == "gemm":
        result: Any = gemm()
    else:
        result = encode(engine, model, json.loads(Path(texts).read_text(encoding="utf-8")))
    print(json.dumps(result), file=output)


if __name__ == "__main__":
    main()
