"""Encoded splits on disk, by content: processes on one machine map the same pages."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mtl_core.config import TaskConfig
from mtl_core.data.encoding import EncodedSplit, Labels, encode_split
from mtl_core.data.examples import Example
from mtl_core.folders import atomic_folder, cache_root

FORMAT_VERSION = 2
INFO = "arrays.json"


def content_key(
    examples: Sequence[Example],
    tasks: Mapping[str, TaskConfig],
    labels: Labels,
    tokenizer: Any,
    max_length: int,
) -> str:
    """A hash of all that `encode_split` depends on."""
    digest = hashlib.sha256()
    kinds = {task: config.kind for task, config in tasks.items()}
    settings = [FORMAT_VERSION, max_length, kinds, {task: labels[task] for task in tasks}]
    digest.update(json.dumps(settings, sort_keys=True).encode())
    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    # A tokenizer keeps these two from its last call; `encode_split` sets them anew.
    for setting in ("truncation", "padding"):
        rules.pop(setting, None)
    digest.update(json.dumps(rules, sort_keys=True).encode())
    for example in examples:
        row = (example.text, sorted(example.targets.items()), example.words)
        digest.update(repr(row).encode("utf-8", "surrogatepass"))
    return digest.hexdigest()[:32]


def encode_cached(
    examples: Sequence[Example],
    tasks: Mapping[str, TaskConfig],
    labels: Labels,
    tokenizer: Any,
    max_length: int,
) -> tuple[str, EncodedSplit]:
    """As `encode_split`, computed once per content; returns the content's key too."""
    key = content_key(examples, tasks, labels, tokenizer, max_length)
    cached = load_split(key)
    if cached is None:
        encoded = encode_split(examples, tasks, labels, tokenizer, max_length)
        save_split(key, encoded)
        cached = load_split(key)
    return key, encoded if cached is None else cached


def save_split(key: str, split: EncodedSplit) -> None:
    """Keep a split for other processes of this machine."""
    arrays = {n: getattr(split, n) for n in ("input_ids", "starts", "word_tokens", "word_starts")}
    for group in ("targets", "present", "word_tags"):
        arrays |= {f"{group}.{task}": array for task, array in getattr(split, group).items()}
    save_arrays(cache_root() / "encoded" / key, arrays, {"num_truncated": split.num_truncated})


def load_split(key: str) -> EncodedSplit | None:
    """A split that `save_split` wrote, mapped from disk; None if it is not there, or not whole."""
    found = load_arrays(cache_root() / "encoded" / key)
    if found is None:
        return None
    arrays, info = found
    groups: dict[str, Any] = {"targets": {}, "present": {}, "word_tags": {}}
    for name in list(arrays):
        group, dot, task = name.partition(".")
        if dot:
            groups[group][task] = arrays.pop(name)
    return EncodedSplit(**(arrays | groups), **info)


def save_arrays(folder: Path, arrays: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Write under a temporary name, then rename: a reader sees all of it or nothing.

    Raises:
        OSError: the disk is full.
    """
    with atomic_folder(folder, replace=False) as partial:
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        (partial / INFO).write_text(json.dumps({"arrays": sorted(arrays), "info": info}))
        if folder.exists() and load_arrays(folder) is None:
            with suppress(FileNotFoundError):  # another process was first
                shutil.rmtree(folder)  # it was damaged


def load_arrays(folder: Path) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """What `save_arrays` wrote, mapped from disk; None if it is not there, or not whole."""
    try:
        content = json.loads((folder / INFO).read_text())
        names = content["arrays"]
        arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}
    except (OSError, EOFError, ValueError, KeyError):
        return None
    return arrays, content["info"]
