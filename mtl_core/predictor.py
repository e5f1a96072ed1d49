"""Text in, embeddings, labels and entities out: the one inference path.

Offline prediction and every serving replica run this code. Shapes: N texts, B windows, H hidden
units, L tokens, T sub-words of all texts that stand for characters.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from mtl_core.answers import Features, Prediction, run_head
from mtl_core.artifact import load_encoder, load_model, read_manifest
from mtl_core.heads import Head
from mtl_core.model import MultiTaskModel
from mtl_core.runtime import Runtime, RuntimeName, TorchRuntime, load_runtime, passes
from mtl_core.windows import Tokenized, Windows

Float = NDArray[np.float32]
BATCH_TOKENS = 4096
CHUNK_TOKENS = 1 << 16


class EncodingStage:
    """Texts to features: tokenizer and runtime, without any head."""

    def __init__(
        self, windows: Windows, runtime: Runtime, hidden_size: int, pad_id: int = 0
    ) -> None:
        self.windows = windows
        self.runtime = runtime
        self.hidden_size = hidden_size
        self.pad_id = pad_id
        self.batch_tokens = BATCH_TOKENS
        self.num_windows = 0
        """Windows encoded since this object was made."""

    @classmethod
    def load(
        cls,
        artifact: str | Path,
        device: str | torch.device = "cpu",
        runtime: RuntimeName = "auto",
        threads: int = 0,
    ) -> Self:
        """The encoding stage of an artifact; transformers is imported only if torch runs it.

        Raises:
            ArtifactError: the folder is damaged or newer than this software.
            ConfigError: the runtime is not to be had.
        """
        folder, manifest = Path(artifact), read_manifest(artifact)
        executes = load_runtime(
            runtime,
            folder,
            manifest,
            lambda: load_encoder(folder, manifest),
            torch.device(device),
            threads,
        )
        tokenizer = Tokenizer.from_file(str(folder / "encoder" / "tokenizer.json"))
        config = json.loads((folder / "encoder" / "config.json").read_text(encoding="utf-8"))
        return cls(
            Windows(tokenizer, manifest.encoder["max_length"]),
            executes,
            manifest.encoder["dimension"],
            int(config.get("pad_token_id") or 0),
        )

    def encode(self, items: Sequence[Tokenized], want_states: Sequence[bool]) -> Features:
        """One pass through the encoder for each text, in batches by length.

        Args:
            items: N texts. One beyond the model's window costs a pass for each of its windows if
                its states are wanted, and one for its beginning if not.
            want_states: for each text, whether any token head will read it.

        Returns:
            Features in the order given; texts whose states are not wanted have length 0.
        """
        homes = [
            item.placed if want else None for item, want in zip(items, want_states, strict=True)
        ]
        lengths = np.array([len(home[0]) if home else 0 for home in homes], dtype=np.int64)
        starts = np.cumsum(lengths) - lengths
        pooled = np.zeros((len(items), self.hidden_size), dtype=np.float32)
        dtype = np.float32 if self.runtime.exact else np.float16
        states = np.empty((int(lengths.sum()), self.hidden_size), dtype=dtype)
        jobs = [
            (text, window)
            for text, item in enumerate(items)
            for window in range(len(item.windows) if homes[text] else 1)
        ]
        self.num_windows += len(jobs)
        sequences = [items[text].windows[window] for text, window in jobs]
        for layout, hidden, vectors in passes(
            self.runtime, sequences, self.pad_id, self.batch_tokens
        ):
            sources, targets = [], []
            for number, start, vector in zip(layout.numbers, layout.starts, vectors, strict=True):
                text, window = jobs[number]
                if window == 0:
                    pooled[text] = vector
                home = homes[text]
                if home is None:
                    continue
                here = np.flatnonzero(home[1] == window)
                sources.append(home[2][here] + start)
                targets.append(here + starts[text])
            if sources:
                states[np.concatenate(targets)] = hidden[np.concatenate(sources)]
        return Features(pooled, states, lengths)


class Predictor:
    """A model ready for texts."""

    def __init__(
        self,
        model: MultiTaskModel,
        device: str | torch.device = "cpu",
        runtime: Runtime | None = None,
    ) -> None:
        where = torch.device(device)
        self.model = model.to(where).eval()
        self.tokenizer = model.encoder.tokenizer
        self.stage = EncodingStage(
            Windows(self.tokenizer.backend_tokenizer, model.encoder.max_length),
            runtime or TorchRuntime(model.encoder, where),
            model.encoder.hidden_size,
            model.encoder.pad_id,
        )

    @classmethod
    def load(
        cls,
        artifact: str | Path,
        device: str | torch.device = "cpu",
        runtime: RuntimeName = "torch-fp32",
        threads: int = 0,
    ) -> Self:
        """Open an artifact folder.

        Args:
            artifact: the folder.
            device: where heads run, and the encoder unless the runtime is OpenVINO.
            runtime: how the encoder is executed; "auto" for the fastest.
            threads: CPU threads for the encoder; all when 0.

        Raises:
            ArtifactError: the folder is damaged or newer than this software.
            ConfigError: the runtime is not to be had.
        """
        manifest = read_manifest(artifact, check_files=False)
        model, where = load_model(artifact), torch.device(device)
        executes = load_runtime(runtime, artifact, manifest, lambda: model.encoder, where, threads)
        return cls(model, where, executes)

    @property
    def tasks(self) -> list[str]:
        return list(self.model.heads)

    def embed(self, texts: Sequence[str]) -> Float:
        """(N, H) unit-length sentence vectors; a text beyond the window counts by its beginning."""
        items = self.tokenize(texts)
        return unit(self.stage.encode(items, [False] * len(items)).pooled)

    def predict(
        self, texts: Sequence[str], tasks: Sequence[str] | None = None
    ) -> list[dict[str, Prediction]]:
        """Every task's answer for every text, from one pass through the encoder a text.

        Entities of a text beyond the model's window come from overlapping windows, so none is
        lost; labels are those of its beginning.

        Raises:
            TextError: a text is empty, blank or no valid Unicode.
            KeyError: an unknown task.
        """
        heads = {task: self.model.head(task) for task in (self.tasks if tasks is None else tasks)}
        results: list[dict[str, Prediction]] = []
        for items, _ in chunks(self.tokenize(texts), CHUNK_TOKENS):
            results.extend(self._answer(items, heads))
        return results

    def _answer(
        self, items: Sequence[Tokenized], heads: Mapping[str, Head]
    ) -> list[dict[str, Prediction]]:
        wants_tokens = any(head.level == "token" for head in heads.values())
        features = self.stage.encode(items, [wants_tokens] * len(items))
        rows: list[dict[str, Prediction]] = [{} for _ in items]
        for task, head in heads.items():
            answers = run_head(head, features).predictions(items)
            for row, answer in zip(rows, answers, strict=True):
                row[task] = answer
        return rows

    def similarity(self, texts: Sequence[str]) -> Float:
        """(N, N) cosines between sentence vectors."""
        vectors = self.embed(texts)
        cosines: Float = np.clip(vectors @ vectors.T, -1.0, 1.0)
        return cosines

    def tokenize(self, texts: Sequence[str]) -> list[Tokenized]:
        """Split texts into sub-words, and those beyond the window into overlapping windows."""
        return self.stage.windows.split(texts)


def chunks(items: Sequence[Tokenized], most: int) -> Iterator[tuple[Sequence[Tokenized], int]]:
    """Texts in order, in runs of no more than `most` sub-words unless one text has more.

    Yields:
        A run, and its sub-words.
    """
    first = tokens = 0
    for number, item in enumerate(items):
        if tokens and tokens + item.num_tokens > most:
            yield items[first:number], tokens
            first, tokens = number, 0
        tokens += item.num_tokens
    if first < len(items):
        yield items[first:], tokens


def unit(vectors: Float) -> Float:
    """(N, H) vectors → the same directions at length 1."""
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    scaled: Float = vectors / np.maximum(norms, 1e-12)
    return scaled
