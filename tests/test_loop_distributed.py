"""Several processes compute what one process computes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mtl_core.build import build_train_state
from mtl_core.config import Experiment
from mtl_core.data.batching import Schedule, deal
from mtl_core.data.prepare import Data
from tests.ranks import (
    GROUPS,
    STEPS,
    Jobs,
    evaluate_in_small_batches,
    plain,
    run_ranks,
    runs_of,
    steps,
)
from tests.small_runs import data, experiment, first_gradients, in_shards, weights

pytestmark = pytest.mark.slow

RUNS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {
        "training": {"batch_size": 4, "accumulation": 2},
        "tasks": {"class_weights": "balanced", "label_smoothing": 0.1},
    },
    "uncertainty": {
        "training": {"batch_size": 4, "accumulation": 2},
        "weighting": {"strategy": "uncertainty"},
    },
    "dwa": {
        "training": {"batch_size": 4, "accumulation": 2},
        "weighting": {"strategy": "dwa", "temperature": 0.5, "gradient_cosines": 4},
    },
    "rlw": {"weighting": {"strategy": "rlw", "gradient_cosines": 1}},
    "pcgrad": {
        "training": {"batch_size": 4, "accumulation": 2},
        "weighting": {"strategy": "pcgrad", "gradient_cosines": 2},
    },
    "pcgrad, tasks missing": {
        "mixing": {"strategy": "round_robin"},
        "freeze": {"layers": 1},
        "weighting": {"strategy": "pcgrad"},
    },
    "pcgrad, unfreezing": {
        "training": {"batch_size": 8, "epochs": 5},
        "freeze": {"unfreeze_every": 1},
        "weighting": {"strategy": "pcgrad"},
    },
    "fewer texts than processes": {"training": {"batch_size": 2}},
    "joint": {"mixing": {"strategy": "joint"}, "optim": {"max_grad_norm": 0.5}},
    "unfreezing": {"training": {"batch_size": 8, "epochs": 5}, "freeze": {"unfreeze_every": 1}},
    "frozen": {"freeze": {"encoder": True}},
    "fewer parameters than processes": {"freeze": {"encoder": True, "heads": ["mood", "entities"]}},
    "weights without use": {
        "training": {"batch_size": 4, "accumulation": 2},
        "weighting": {"strategy": "uncertainty"},
    },
    "in shards": {"training": {"epochs": 2}},
}
ENCODERS = {"weights without use": "longformer"}
"""Of the other runs it is BERT."""
SMALL_STEPS = {"learning_rate": 5e-5}
"""Weights go up to 1e-3 in 20 steps, a thousand times what they may differ by. With more, some
gradient that is almost rounding alone makes one of a thousand differ by 1e-6 on some processors."""
WITHOUT_EFFECT = ".key.bias"
"""Softmax undoes a bias of the keys: its gradient is rounding, which AdamW turns into steps."""


@pytest.fixture(scope="module")
def runs(
    tiny_encoders: dict[str, Path],
    unusual_encoders: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, tuple[Experiment, Data]]]:
    encoders = tiny_encoders | unusual_encoders
    configs = {
        name: experiment(
            encoders[ENCODERS.get(name, "bert")],
            **{**run, "optim": SMALL_STEPS | run.get("optim", {})},
        )
        for name, run in RUNS.items()
    }
    runs = {name: (config, data(config)) for name, config in configs.items()}
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("corpus")
        patch.setenv("MTL_CACHE", str(folder / "cache"))
        yield runs | {"in shards": in_shards(folder, configs["in shards"], 14)}


@pytest.fixture(scope="module")
def folder(
    runs: dict[str, tuple[Experiment, Data]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Where all ranks have left their results."""
    path = tmp_path_factory.mktemp("ranks")
    run_ranks(Jobs(path, runs))
    return path


@pytest.mark.parametrize("name", RUNS)
def test_any_number_of_processes_gives_the_gradients_and_weights_of_one(
    name: str, runs: dict[str, tuple[Experiment, Data]], folder: Path
) -> None:
    config, encoded = runs[name]
    state = build_train_state(config, encoded)
    gradients = first_gradients(state)
    rows = steps(state, encoded, config)
    for group, size in GROUPS.items():
        for rank in range(size) if name in runs_of(group, RUNS) else ():
            path = folder / f"{group}.{name}.{rank}"
            theirs = load_file(f"{path}.gradients")
            assert theirs.keys() == gradients.keys()
            for parameter, gradient in gradients.items():
                torch.testing.assert_close(theirs[parameter], gradient, rtol=1e-5, atol=1e-6)
            theirs = load_file(f"{path}.weights")
            for parameter, weight in weights(state.model).items():
                if not parameter.endswith(WITHOUT_EFFECT):
                    torch.testing.assert_close(theirs[parameter], weight, rtol=0, atol=1e-6)
            told = json.loads(Path(f"{path}.told").read_text())
            by_hand = config.weighting.strategy == "pcgrad"
            times = 0 if by_hand else 4 if name == "unfreezing" else 1
            assert told["ways"] == times * ["sockets" if group == "2 machines" else "memory"]
            assert_same_story(told["rows"], rows)


def assert_same_story(theirs: list[dict[str, Any]], ours: list[dict[str, Any]]) -> None:
    assert len(theirs) == len(ours)
    for left, right in zip(theirs, ours, strict=True):
        assert left.keys() == right.keys()
        for key in left.keys() - {"tokens_per_second"}:
            if isinstance(left[key], float):
                least = 1e-5 if key.startswith("cosine/") else None  # some are next to nothing
                assert left[key] == pytest.approx(right[key], rel=1e-4, abs=least)
            else:
                assert left[key] == right[key]


@pytest.mark.parametrize("size", sorted(set(GROUPS.values())))
def test_the_runs_deal_tasks_and_texts_out_unevenly(
    size: int, runs: dict[str, tuple[Experiment, Data]]
) -> None:
    config, encoded = runs["accumulated"]
    split = encoded.splits["train"]
    counts = {task: split.label_counts(task) for task in config.tasks}
    batches = Schedule(split, config.mixing, config.training.batch_size, None, config.seed)
    uneven, absent = 0, 0
    for rows in batches.batches(0):
        parts = [deal(rows, split.lengths, rank, size) for rank in range(size)]
        for task in config.tasks:
            shares = [counts[task][part].sum() for part in parts]
            uneven += len(set(shares)) > 1
            absent += min(shares) == 0 < max(shares)
    assert uneven >= 5
    assert absent >= 5
    small, encoded = runs["fewer texts than processes"]
    assert small.training.batch_size < max(GROUPS.values())


@pytest.mark.parametrize(
    ("group", "name"), [(group, name) for group in GROUPS for name in runs_of(group, RUNS)]
)
def test_all_ranks_have_the_same_weights_to_the_last_bit(
    group: str, name: str, folder: Path
) -> None:
    first, *others = (
        load_file(folder / f"{group}.{name}.{rank}.weights") for rank in range(GROUPS[group])
    )
    for other in others:
        assert all(torch.equal(other[parameter], weight) for parameter, weight in first.items())


def test_every_rank_is_told_the_same(
    runs: dict[str, tuple[Experiment, Data]], folder: Path
) -> None:
    rows = [json.loads((folder / f"3.plain.{rank}.told").read_text())["rows"] for rank in range(3)]
    assert_same_story(rows[1], rows[0])
    assert_same_story(rows[2], rows[0])
    assert rows[0][-1]["step"] == STEPS


@pytest.mark.parametrize("group", GROUPS)
def test_evaluation_in_shards_counts_exactly_what_one_process_counts(
    group: str, runs: dict[str, tuple[Experiment, Data]], folder: Path
) -> None:
    config, encoded = runs["plain"]
    whole = plain(evaluate_in_small_batches(build_train_state(config, encoded), encoded))
    assert all(whole["scores"][task] for task in config.tasks)
    for rank in range(GROUPS[group]):
        theirs = json.loads((folder / f"{group}.{rank}.evaluation").read_text())
        assert theirs["counts"] == whole["counts"]
        assert theirs["scores"] == whole["scores"]
        assert theirs["losses"] == pytest.approx(whole["losses"], rel=1e-6)


@pytest.mark.parametrize("group", GROUPS)
def test_a_loss_that_is_not_finite_on_one_rank_stops_all_of_them(group: str, folder: Path) -> None:
    for rank in range(GROUPS[group]):
        message = (folder / f"{group}.{rank}.failure").read_text()
        assert message.startswith("the loss of task 'topic' is not finite at step 11 (epoch 2)")
