"""What is sent: sentences of the project's own seeded generator, as request bodies."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mtl_core.data.demo import demo_corpus

MODEL = "sentence-transformers/all-MiniLM-L6-v2"
"""What requests for embeddings call the encoder."""
SEED = 2026
NUM_BODIES = 2000
SENTENCES_PER_LIST = 32
TOKENS = range(8, 31)
"""Sub-words of a sentence, special tokens included."""


def sentences(tokenizer: Any, count: int) -> list[str]:
    """Distinct sentences of 8 to 30 sub-words."""
    found: dict[str, None] = {}
    seed = SEED
    while len(found) < count:
        texts = [row.text for rows in demo_corpus(seed).values() for row in rows]
        lengths = map(len, tokenizer(texts)["input_ids"])
        found.update((t, None) for t, n in zip(texts, lengths, strict=True) if n in TOKENS)
        seed += 1
    return list(found)[:count]


def mixed_lengths(texts: Sequence[str], count: int) -> list[str]:
    """Texts of one to eight sentences, short ones more often: 8 to 150 sub-words, 33 on average."""
    rng = random.Random(SEED)
    sizes = rng.choices(range(1, 9), weights=[2.0**-n for n in range(8)], k=count)
    return [" ".join(rng.choices(texts, k=size)) for size in sizes]


def write_bodies(folder: Path, texts: Sequence[str]) -> dict[str, Path]:
    """A file for each kind of request, a JSON body a line."""
    rng = random.Random(SEED)
    lists = [rng.sample(texts, SENTENCES_PER_LIST) for _ in range(NUM_BODIES // 10)]
    return {
        "sentence": _write(folder / "sentence.jsonl", ({"inputs": t} for t in texts)),
        "list": _write(folder / "list.jsonl", ({"inputs": texts} for texts in lists)),
        "embed": _write(folder / "embed.jsonl", ({"input": t, "model": MODEL} for t in texts)),
    }


def _write(path: Path, bodies: Iterable[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(body) + "\n" for body in bodies), encoding="utf-8")
    return path
