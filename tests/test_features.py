"""Training on cached states is training without the cache, minus the passes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mtl_core import features
from mtl_core.config import EncoderConfig, FreezeConfig, TaskConfig
from mtl_core.data.batching import Schedule, collate, evaluation_batches
from mtl_core.data.encoding import EncodedSplit, encode_split
from mtl_core.data.examples import Example, Span
from mtl_core.encoder import SentenceEncoder, layers
from mtl_core.freezing import apply_freezing
from mtl_core.heads import build_head
from mtl_core.model import MultiTaskModel
from mtl_core.weighting import FixedWeighting

ARCHITECTURES = ("bert", "distilbert", "roberta", "deberta-v2", "mpnet", "deberta-v2-conv")
TASKS = {
    "intent": TaskConfig(kind="classification", dropout=0.0),
    "ner": TaskConfig(kind="token_classification", dropout=0.0),
}
LABELS = {"intent": ("ask", "tell"), "ner": ("loc",)}
EXAMPLES = [  # the longest first: a row's padding must not cover what stands behind it in the file
    Example("in " * n + "Berlin", {"intent": intent, "ner": (Span(3 * n, 3 * n + 6, "loc"),)})
    for n, intent in reversed(list(enumerate(["ask", "tell", "ask", "ask", "tell", "tell"] * 3)))
]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tiny_encoders: dict[str, Path], tiny_deberta_conv: Path) -> dict[str, Path]:
    return tiny_encoders | {"deberta-v2-conv": tiny_deberta_conv}


def model_of(folder: Path) -> MultiTaskModel:
    torch.manual_seed(0)
    encoder = SentenceEncoder.load(EncoderConfig(model=str(folder), dropout=0.0))
    heads = {task: build_head(32, LABELS[task], config) for task, config in TASKS.items()}
    return MultiTaskModel(encoder, heads, FixedWeighting(dict.fromkeys(TASKS, 1.0)))


def split_for(model: MultiTaskModel) -> EncodedSplit:
    return encode_split(EXAMPLES, TASKS, LABELS, model.encoder.tokenizer, 64)


def build(
    model: MultiTaskModel, split: EncodedSplit, path: Path, depth: int, bf16: bool = False
) -> features.FeatureCache:
    done = list(features.build_cache(model, split, path, depth, CPU, bf16))
    assert done == sorted(done)
    assert done[-1] == 1
    return features.FeatureCache(path, depth)


def losses_and_gradients(
    model: MultiTaskModel, split: EncodedSplit, cache: features.FeatureCache | None
) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    rows = Schedule(split, _mixing(), 8, None, 0).batches(0)[0]
    batch = collate(split, rows, model.encoder.pad_id)
    if cache is not None:
        batch = cache.attach(batch, split, rows)
    model.zero_grad(set_to_none=True)
    sums = model(batch)
    torch.stack(list(sums.values())).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {task: float(loss.detach()) for task, loss in sums.items()}, gradients


def _mixing() -> Any:
    from mtl_core.config import MixingConfig

    return MixingConfig()


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cached_training_computes_what_uncached_training_does(
    folders: dict[str, Path], name: str, depth: int, tmp_path: Path
) -> None:
    model = model_of(folders[name])
    split = split_for(model)
    cache = build(model, split, tmp_path / "states.npy", depth)
    apply_freezing(model, FreezeConfig(layers=depth), 0)
    plain, plain_gradients = losses_and_gradients(model, split, None)
    cached, cached_gradients = losses_and_gradients(model, split, cache)
    assert cached == pytest.approx(plain, rel=1e-5)
    assert cached_gradients.keys() == plain_gradients.keys()
    for parameter, gradient in plain_gradients.items():
        torch.testing.assert_close(
            cached_gradients[parameter], gradient, atol=1e-4, rtol=1e-4, msg=parameter
        )
    learning = {f"layer.{i}." for i in range(depth, 3)}
    assert any(p.startswith("heads.") for p in plain_gradients)
    assert all(any(part in p for p in plain_gradients) for part in learning)


def test_a_half_precision_cache_is_close(folders: dict[str, Path], tmp_path: Path) -> None:
    model = model_of(folders["bert"])
    split = split_for(model)
    cache = build(model, split, tmp_path / "states.npy", 3, bf16=True)
    assert cache.dtype == np.float16
    apply_freezing(model, FreezeConfig(encoder=True), 0)
    plain, _ = losses_and_gradients(model, split, None)
    cached, _ = losses_and_gradients(model, split, cache)
    assert cached == pytest.approx(plain, rel=1e-2)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_cache_adds_nothing_to_a_process_s_memory(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    model = model_of(folders["bert"])
    split = split_for(model)
    path = tmp_path / "states.npy"
    cache = build(model, split, path, 3)
    rows = np.arange(len(split))
    batch = collate(split, rows, model.encoder.pad_id, without_labels=True)
    assert cache.attach(batch, split, rows).states is not None
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_to_open_a_cache_reads_none_of_it_and_closes_with_it(tmp_path: Path) -> None:
    path = tmp_path / "states.npy"
    np.save(path, np.zeros((50_000, 32), dtype=np.float32))
    tracemalloc.start()
    try:
        cache = features.FeatureCache(path, 3)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < path.stat().st_size / 10
    file = cache.file
    os.fstat(file)
    del cache
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)


def test_the_encoder_passes_once_per_batch_in_all_not_per_epoch(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    model = model_of(folders["bert"])
    split = split_for(model)
    cache = build(model, split, tmp_path / "states.npy", 3)
    passes = len(list(evaluation_batches(split)))
    assert model.encoder.num_passes == passes
    for _ in range(3):
        losses_and_gradients(model, split, cache)
    assert model.encoder.num_passes == passes


def cache_files(model: MultiTaskModel, key: str = "k", depth: int = 2) -> Path:
    return features.cache_file(model, key, depth, bf16=False)


def test_a_cache_is_found_by_texts_depth_and_the_weights_below(folders: dict[str, Path]) -> None:
    model = model_of(folders["bert"])
    path = cache_files(model)
    twin = model_of(folders["bert"])
    with torch.no_grad():
        twin.encoder.transformer.pooler.dense.weight.add_(1)
    assert cache_files(twin) == path, "a pooler, random where a checkpoint has none, feeds no head"
    others = [
        cache_files(model, key="other"),
        cache_files(model, depth=1),
        features.cache_file(model, "k", 2, bf16=True),
        cache_files(model_of(folders["distilbert"])),
    ]
    assert len({path, *others}) == 5
    stack = layers(model.encoder.transformer)
    with torch.no_grad():
        next(stack[2].parameters()).add_(1)
    assert cache_files(model) == path, "layers above the boundary may learn"
    with torch.no_grad():
        next(stack[1].parameters()).view(-1)[0] += 1e-3
    changed = cache_files(model)
    assert changed != path
    with torch.no_grad():
        model.encoder.transformer.embeddings.word_embeddings.weight[5, 0] += 1e-3
    assert cache_files(model) not in (path, changed)


def test_a_build_that_stops_halfway_leaves_no_file(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(folders["bert"])
    split = split_for(model)
    monkeypatch.setattr(features, "evaluation_batches", lambda s: evaluation_batches(s, 32))
    path = tmp_path / "cache" / "states.npy"
    running = features.build_cache(model, split, path, 3, CPU, False)
    assert 0 < next(running) < 1
    assert not features.is_built(path)
    assert list(path.parent.iterdir())
    running.close()
    assert list(path.parent.glob("*.npy")) == []


def test_two_builds_of_one_cache_at_once_both_succeed(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_locks(*_: Any) -> None:
        raise OSError

    model = model_of(folders["bert"])
    split = split_for(model)
    monkeypatch.setattr(features, "evaluation_batches", lambda s: evaluation_batches(s, 32))
    monkeypatch.setattr("fcntl.lockf", without_locks)
    path = tmp_path / "states.npy"
    arguments: Any = (model, split, path, 3, CPU, False)
    slow, fast = features.build_cache(*arguments), features.build_cache(*arguments)
    next(slow)
    next(fast)
    list(fast)
    finished = np.array(np.load(path))
    list(slow)
    assert np.array_equal(np.load(path), finished)
    assert list(tmp_path.glob("*.npy")) == [path]


def test_states_are_on_the_disk_before_they_have_their_name(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a power cut might leave zeros, in a file of the right length."""
    path = tmp_path / "states.npy"
    kept: list[bytes] = []

    def fsync(file: int) -> None:
        assert not path.exists()
        kept.append(os.pread(file, os.fstat(file).st_size, 0))

    monkeypatch.setattr(os, "fsync", fsync)
    model = model_of(folders["bert"])
    build(model, split_for(model), path, 3)
    assert kept == [path.read_bytes()]


@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_file_that_was_cut_off_counts_as_none_and_is_written_again(
    share: float, folders: dict[str, Path], tmp_path: Path
) -> None:
    model = model_of(folders["bert"])
    split = split_for(model)
    path = tmp_path / "states.npy"
    whole = build(model, split, path, 3).tokens(0, 50)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    assert not features.is_built(path)
    np.testing.assert_array_equal(build(model, split, path, 3).tokens(0, 50), whole)
    assert path.read_bytes() == content


def test_what_a_killed_build_left_goes_with_the_next_build_of_the_same_states(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("states.0a1b2c3d.partial.npy", "others.0a1b2c3d.partial.npy"):
        (tmp_path / name).write_bytes(b"half")
    model = model_of(folders["bert"])
    build(model, split_for(model), tmp_path / "states.npy", 3)
    found = {path.name for path in tmp_path.glob("*.npy")}
    assert found == {"states.npy", "others.0a1b2c3d.partial.npy"}


def test_a_cache_that_the_disk_cannot_hold_is_refused_before_it_is_built(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a tenth of what is free left to others."""
    model = model_of(folders["bert"])
    split, path = split_for(model), tmp_path / "states.npy"
    needed = len(split.input_ids) * 32 * 4 / 0.9
    usage = features.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(features.shutil, "disk_usage", lambda _: usage._replace(free=free))
    free = int(needed) - 1
    with pytest.raises(OSError, match="feature cache needs"):
        build(model, split, path, 3)
    assert list(tmp_path.glob("*.npy")) == []
    free = int(needed) + 1
    build(model, split, path, 3)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_known_architectures_split_cleanly_and_stay_in_their_mode(
    folders: dict[str, Path], name: str
) -> None:
    model = model_of(folders[name])
    split = split_for(model)
    for training in (True, False):
        model.encoder.train(training)
        assert all(features.splits_cleanly(model, split, depth, CPU) for depth in (1, 2, 3))
        assert {m.training for m in model.encoder.modules()} == {training}


def test_an_encoder_that_does_more_between_its_layers_is_noticed(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(folders["bert"])
    upper = SentenceEncoder.upper

    def wrong(self: Any, depth: int, states: Any, mask: Any) -> Any:
        return upper(self, depth, states + 0.1, mask)

    monkeypatch.setattr(SentenceEncoder, "upper", wrong)
    assert not features.splits_cleanly(model, split_for(model), 2, CPU)


HOLDER = """
import fcntl, os, sys
lock, made, wanted = sys.argv[1:]
with open(lock, "w") as file:
    fcntl.lockf(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.readline()
    os.rename(made, wanted)
"""


def test_states_that_another_process_computes_are_waited_for(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    model = model_of(folders["bert"])
    split = split_for(model)
    wanted = tmp_path / "states.npy"
    made = build(model, split, tmp_path / "made.npy", 2)
    passes = model.encoder.num_passes
    arguments = [str(tmp_path / "states.lock"), str(tmp_path / "made.npy"), str(wanted)]
    command = [sys.executable, "-c", HOLDER, *arguments]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        told: list[float] = []
        states = features.build_cache(model, split, wanted, 2, CPU, False)
        waiting = threading.Thread(target=lambda: told.extend(states), daemon=True)
        waiting.start()
        waiting.join(0.2)
        assert waiting.is_alive()
        other.communicate("go\n")
        waiting.join(10)
    assert told == []
    assert model.encoder.num_passes == passes
    found = features.FeatureCache(wanted, 2)
    for first, last in features.ranges(split, np.arange(len(split))):
        np.testing.assert_array_equal(found.tokens(first, last), made.tokens(first, last))
