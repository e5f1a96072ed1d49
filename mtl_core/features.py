"""Frozen parts run once: token states at the freeze boundary, one encoder pass a text.

The states stand in one file per (encoder, boundary, texts), shared by the processes of a
machine and by later runs over the same data. Shapes: B texts, L tokens, H hidden units.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mtl_core.config import Experiment
from mtl_core.data.batching import Rows, collate, evaluation_batches
from mtl_core.data.encoding import EncodedSplit
from mtl_core.data.prepare import Data
from mtl_core.folders import cache_root, one_at_a_time
from mtl_core.freezing import frozen_layers
from mtl_core.model import Batch, MultiTaskModel
from mtl_core.world import World


class FeatureCache:
    """States of every token of a split after `depth` layers, read from disk as they are needed.

    The file is not mapped: the pages a process has seen would count as its memory.
    """

    def __init__(self, path: Path, depth: int) -> None:
        header = np.load(path, mmap_mode="r")
        self.depth = depth
        self.dtype, self.hidden, self.offset = header.dtype, header.shape[1], header.offset
        self.file = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self.file)

    def tokens(self, first: int, last: int) -> NDArray[np.float16] | NDArray[np.float32]:
        """(last - first, H) states of a run of the split's tokens."""
        size = self.hidden * self.dtype.itemsize
        content = os.pread(self.file, (last - first) * size, self.offset + first * size)
        return np.frombuffer(content, self.dtype).reshape(-1, self.hidden)

    def attach(self, batch: Batch, split: EncodedSplit, rows: Rows) -> Batch:
        """The batch with its states (B, L, H), so that the layers below them need not run."""
        states = np.zeros((*batch.input_ids.shape, self.hidden), dtype=np.float32)
        for place, (first, last) in zip(states, ranges(split, rows), strict=True):
            place[: last - first] = self.tokens(first, last)
        return replace(batch, states=torch.from_numpy(states), states_depth=self.depth)


def ranges(split: EncodedSplit, rows: Rows) -> list[tuple[int, int]]:
    """Each row's first token in the split's flat arrays, and the one behind its last."""
    return list(zip(split.starts[rows].tolist(), split.starts[rows + 1].tolist(), strict=True))


def cached_layers(
    model: MultiTaskModel, experiment: Experiment, split: EncodedSplit, device: torch.device
) -> int:
    """How many layers run once a text in this experiment; 0 where nothing is cached."""
    if not experiment.training.feature_cache:
        return 0
    last = experiment.training.epochs - 1  # layers only ever thaw
    depth = frozen_layers(experiment.freeze, model.encoder.num_layers, last)
    return depth if depth and splits_cleanly(model, split, depth, device) else 0


def open_cache(
    caches: dict[str, FeatureCache],
    name: str,
    model: MultiTaskModel,
    data: Data,
    depth: int,
    world: World,
    bf16: bool,
) -> Iterator[float]:
    """Put the states of the split of that name into `caches`; yields the share computed.

    All ranks come out of it together.

    Raises:
        OSError: the disk is full.
    """
    path = cache_file(model, data.keys[name], depth, bf16)
    yield from build_cache(model, data.splits[name], path, depth, world.device, bf16)
    world.barrier()
    caches[name] = FeatureCache(path, depth)


def cache_file(model: MultiTaskModel, split_key: str, depth: int, bf16: bool) -> Path:
    """Where the states of these texts under these weights are, or will be.

    Layers above `depth` do not count: a run that goes on from a checkpoint finds its file again.
    """
    digest = hashlib.sha256(f"{split_key} {depth} {_dtype(bf16)}".encode())
    digest.update(model.encoder.transformer.config.to_json_string().encode())
    states = model.encoder.lower_part(depth).state_dict()
    add_tensors(digest, {n: t for n, t in states.items() if not n.startswith("pooler.")})
    return cache_root() / "features" / f"{digest.hexdigest()[:32]}.npy"


def add_tensors(digest: hashlib._Hash, tensors: Mapping[str, Tensor]) -> None:
    """Have a hash depend on names and bits, wherever the tensors are."""
    for name, tensor in tensors.items():
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor.detach().cpu().numpy()).data)


@torch.no_grad()
def build_cache(
    model: MultiTaskModel,
    split: EncodedSplit,
    path: Path,
    depth: int,
    device: torch.device,
    bf16: bool,
) -> Iterator[float]:
    """Write the states of every text; yields the share done, and leaves nothing half-written.

    Ranks of a machine and trials of a sweep come to the same states at the same time: one writes
    them, the others wait.

    Raises:
        OSError: the disk is full.
    """
    if is_built(path):
        return
    with one_at_a_time(path.with_suffix(".lock")) as alone:
        for left in path.parent.glob(f"{path.stem}.*.partial.npy") if alone else ():
            left.unlink(missing_ok=True)  # by one that was killed
        if is_built(path):
            return
        encoder, hidden, dtype = model.encoder, model.encoder.hidden_size, _dtype(bf16)
        size = len(split.input_ids) * hidden * dtype.itemsize
        if size > shutil.disk_usage(path.parent).free * 0.9:
            raise OSError(f"{path.parent}: the feature cache needs {size / 2**30:.1f} GiB of disk")
        partial = path.with_suffix(f".{uuid.uuid4().hex[:8]}.partial.npy")
        done = 0
        encoder.eval()
        try:
            shape = (len(split.input_ids), hidden)
            offset = np.lib.format.open_memmap(partial, "w+", dtype, shape).offset
            with partial.open("r+b") as file:
                for rows in evaluation_batches(split):
                    batch = collate(split, rows, encoder.pad_id, without_labels=True)
                    batch = batch.to(device)
                    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                        output = encoder.lower(depth, batch.input_ids, batch.attention_mask)
                    states = output.float().cpu().numpy().astype(dtype, copy=False)
                    for row, (first, last) in zip(states, ranges(split, rows), strict=True):
                        file.seek(offset + first * hidden * dtype.itemsize)
                        file.write(row[: last - first].data)
                        done += last - first
                    yield done / max(len(split.input_ids), 1)
                file.flush()
                os.fsync(file.fileno())  # else the name may outlive a power cut, and the states not
            partial.rename(path)
        finally:
            partial.unlink(missing_ok=True)


def _dtype(bf16: bool) -> np.dtype[np.generic]:
    """Storage type: fp16 for passes in bf16, which NumPy lacks, else fp32."""
    return np.dtype(np.float16 if bf16 else np.float32)


def is_built(path: Path) -> bool:
    """Whether the cache at `path` is there, and as long as it says."""
    try:
        np.load(path, mmap_mode="r")
    except (OSError, EOFError, ValueError):
        return False
    return True


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
        batch = collate(split, rows, model.encoder.pad_id, without_labels=True).to(device)
        whole, _ = model.encoder(batch.input_ids, batch.attention_mask)
        states = model.encoder.lower(depth, batch.input_ids, batch.attention_mask)
        parts, _ = model.encoder.upper(depth, states, batch.attention_mask)
        return bool(torch.allclose(whole, parts, atol=1e-4))
    finally:
        model.encoder.train(training)
