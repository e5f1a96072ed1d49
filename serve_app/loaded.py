"""A version of an artifact, ready to serve."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtl_core.artifact import Manifest, read_head, read_manifest
from mtl_core.errors import ArtifactError
from mtl_core.heads import HEADS
from mtl_core.predictor import EncodingStage
from mtl_core.runtime import RuntimeName
from mtl_core.storage import fetch, manifest_of, version_of
from serve_app.heads import StoredHead

TRIES = 3
"""To read an artifact that others replace again and again."""
PAUSE_S = 0.1
"""Between them: while a folder is renamed and another in its place, none is there."""


@dataclass(frozen=True)
class ServedModel:
    """Encoder and heads that belong together."""

    manifest: Manifest
    version: str
    """Changes with anything the manifest vouches for."""
    stage: EncodingStage
    heads: Mapping[str, StoredHead]

    @property
    def name(self) -> str:
        return self.manifest.name


def current_version(artifact: str) -> str:
    """The version that stands at a path or URL now, without fetching more than its manifest."""
    return version_of(manifest_of(artifact))


def load_artifact(
    artifact: str,
    runtime: RuntimeName,
    threads: int,
    device: str,
    batch_tokens: int,
    previous: ServedModel | None = None,
) -> ServedModel:
    """Open an artifact for serving; one that is replaced meanwhile is opened anew.

    Args:
        artifact: folder or URL.
        runtime: how to execute the encoder.
        threads: CPU threads for it.
        device: "cpu" or "cuda".
        batch_tokens: padded sub-words in one forward pass.
        previous: what is being served; its encoder is kept when the new version has the same.

    Raises:
        ArtifactError, ConfigError: see `EncodingStage.load`.
    """
    for attempt in range(TRIES):
        if attempt:
            time.sleep(PAUSE_S)
        folder = fetch(artifact)
        loaded = _open(folder, runtime, threads, device, batch_tokens, previous)
        if loaded is not None:
            return loaded
    current_version(str(folder))  # raises what is wrong where there is none
    raise ArtifactError(f"{artifact}: replaced again and again while it was read")


def _open(
    folder: Path,
    runtime: RuntimeName,
    threads: int,
    device: str,
    batch_tokens: int,
    previous: ServedModel | None,
) -> ServedModel | None:
    """What stands in a folder; None if that changed meanwhile.

    In a function of its own: the encoder that it gives up is freed before another one is loaded.
    """
    version = _standing(folder)
    if version is None:
        return None
    try:
        manifest = read_manifest(folder)
        heads = {task: stored_head(task, folder) for task in manifest.tasks}
        if previous is not None and same_encoder(manifest, previous.manifest):
            stage = previous.stage
        else:
            stage = EncodingStage.load(folder, device, runtime, threads)
            stage.batch_tokens = batch_tokens
    except Exception:
        # Whatever is wrong with files of two versions is no fault of either.
        if _standing(folder) == version:
            raise
        return None
    return ServedModel(manifest, version, stage, heads) if _standing(folder) == version else None


def _standing(folder: Path) -> str | None:
    """`current_version`; None between two renames."""
    try:
        return current_version(str(folder))
    except ArtifactError:
        return None


def same_encoder(one: Manifest, other: Manifest) -> bool:
    """Whether two artifacts hold the very same encoder, tokenizer and runtime files."""

    def files(manifest: Manifest) -> dict[str, Any]:
        return {n: h for n, h in manifest.files.items() if n.startswith(("encoder/", "runtime/"))}

    return files(one) == files(other) and one.encoder == other.encoder


def stored_head(task: str, folder: Path) -> StoredHead:
    description, weights = read_head(folder / "heads" / task)
    spec = json.loads(description)
    kind = HEADS[spec["kind"]]
    return StoredHead(task, kind.kind, kind.level, tuple(spec["labels"]), description, weights)
