"""Frozen parts run once: token states at the freeze boundary, one encoder pass a text.

The states stand in one mapped file per (encoder, boundary, texts), shared by the processes of a
machine and by later runs over the same data. Shapes: H hidden units.
"""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import uuid
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mtl_core.config import Experiment
from mtl_core.data.batching import Rows, collate, evaluation_batches
from mtl_core.data.cache import cache_root
from mtl_core.data.encoding import EncodedSplit
from mtl_core.freezing import cacheable_layers
from mtl_core.model import Batch, MultiTaskModel


@dataclass(frozen=True)
class FeatureCache:
    """States of every token of a split after `depth` layers."""

    states: NDArray[np.float16] | NDArray[np.float32]
    """(all tokens, H), mapped from disk."""
    depth: int

    def attach(self, batch: Batch, split: EncodedSplit, rows: Rows) -> Batch:
        """The batch with its states, so that the layers below them need not run."""
        inside = batch.attention_mask.numpy().astype(bool)
        states = np.zeros((*inside.shape, self.states.shape[1]), dtype=np.float32)
        flat = np.concatenate([np.arange(split.starts[r], split.starts[r + 1]) for r in rows])
        states[inside] = self.states[flat]
        return replace(batch, states=torch.from_numpy(states), states_depth=self.depth)


def cached_layers(
    model: MultiTaskModel, experiment: Experiment, split: EncodedSplit, device: torch.device
) -> int:
    """How many layers run once a text in this experiment; 0 where nothing is cached."""
    if not experiment.training.feature_cache:
        return 0
    depth = cacheable_layers(model, experiment.freeze, experiment.training.epochs)
    return depth if depth and splits_cleanly(model, split, depth, device) else 0


def cache_file(
    model: MultiTaskModel, split_key: str, depth: int, dtype: np.dtype[np.generic]
) -> Path:
    """Where the states of these texts under these weights are, or will be.

    Layers above `depth` do not count: a run that goes on from a checkpoint finds its file again.
    """
    digest = hashlib.sha256(f"{split_key} {depth} {dtype}".encode())
    digest.update(model.encoder.transformer.config.to_json_string().encode())
    for name, tensor in model.encoder.lower_part(depth).state_dict().items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).tobytes())
    return cache_root() / "features" / f"{digest.hexdigest()[:32]}.npy"


def build_cache(
    model: MultiTaskModel,
    split: EncodedSplit,
    path: Path,
    depth: int,
    device: torch.device,
    dtype: np.dtype[np.generic],
    autocast: bool,
) -> Iterator[float]:
    """Write the states of every text; yields the share done, and leaves nothing half-written.

    Trials of a sweep come to the same states at the same time: one writes them, the others wait.

    Raises:
        OSError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        with suppress(OSError):  # a file system without locks only costs the work twice
            fcntl.lockf(lock, fcntl.LOCK_EX)
        if not path.is_file():
            yield from _write_states(model, split, path, depth, device, dtype, autocast)


@torch.no_grad()
def _write_states(
    model: MultiTaskModel,
    split: EncodedSplit,
    path: Path,
    depth: int,
    device: torch.device,
    dtype: np.dtype[np.generic],
    autocast: bool,
) -> Iterator[float]:
    encoder, hidden = model.encoder, model.encoder.hidden_size
    size = len(split.input_ids) * hidden * dtype.itemsize
    if size > shutil.disk_usage(path.parent).free * 0.9:
        raise OSError(f"{path.parent}: the feature cache needs {size / 2**30:.1f} GiB of disk")
    partial = path.with_suffix(f".{uuid.uuid4().hex[:8]}.partial.npy")
    done = 0
    encoder.eval()
    try:
        states = np.lib.format.open_memmap(partial, "w+", dtype, (len(split.input_ids), hidden))
        for rows in evaluation_batches(split):
            batch = collate(split, rows, pad_id(model), frozenset(), without_labels=True).to(device)
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                output = encoder.lower(depth, batch.input_ids, batch.attention_mask)
            flat = np.concatenate([np.arange(split.starts[r], split.starts[r + 1]) for r in rows])
            states[flat] = output[batch.attention_mask.bool()].float().cpu().numpy()
            done += len(flat)
            yield done / max(len(split.input_ids), 1)
        states.flush()
        partial.rename(path)
    finally:
        partial.unlink(missing_ok=True)


def open_cache(path: Path, depth: int) -> FeatureCache | None:
    """The cache at `path` if it has been built."""
    if not path.is_file():
        return None
    return FeatureCache(np.load(path, mmap_mode="r"), depth)


@torch.no_grad()
def splits_cleanly(
    model: MultiTaskModel, split: EncodedSplit, depth: int, device: torch.device
) -> bool:
    """Whether lower and upper part, run one after the other, give what the whole encoder gives.

    True of BERT-like encoders; an architecture that does more between its layers says no here and
    trains without the cache.
    """
    training = model.encoder.training
    model.encoder.eval()
    try:
        rows = np.arange(min(4, len(split)))
        batch = collate(split, rows, pad_id(model), frozenset(), without_labels=True).to(device)
        whole, _ = model.encoder(batch.input_ids, batch.attention_mask)
        states = model.encoder.lower(depth, batch.input_ids, batch.attention_mask)
        parts, _ = model.encoder.upper(depth, states, batch.attention_mask)
        return bool(torch.allclose(whole, parts, atol=1e-4))
    finally:
        model.encoder.train(training)


def pad_id(model: MultiTaskModel) -> int:
    """The tokenizer's padding id."""
    return int(model.encoder.tokenizer.pad_token_id or 0)
