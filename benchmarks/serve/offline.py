"""Offline encoding and the machine's ceiling, each in a process of its own that prints JSON.

    python offline.py ours|torch|openvino|onnx|gemm MODEL TEXTS

MODEL is the artifact for ours and a sentence-transformers folder otherwise; TEXTS a JSON list. This
file imports nothing of the project at the top: peers run it in an environment of their own.
"""

import functools
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
    """Best rates of matrix products in bf16 and int8, Gflop/s: a square one, MiniLM's widest."""
    import torch

    best = {}
    shapes = {"square": (2048, 2048, 2048), "minilm": (2048, 384, 1536)}
    for name, (rows, inner, columns) in shapes.items():
        left, right = torch.randn(rows, inner), torch.randn(inner, columns)
        products = {"bf16": (torch.matmul, torch.bfloat16), "int8": (torch._int_mm, torch.int8)}
        for kind, (product, dtype) in products.items():
            call = functools.partial(product, left.to(dtype), right.to(dtype))
            rate = max(_rate(call) for _ in range(20))
            best[f"{kind}_{name}"] = rate * 2 * rows * inner * columns / 1e9
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
