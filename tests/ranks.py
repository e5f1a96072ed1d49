"""What the processes of the data-parallel tests run; started by `run_ranks`."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel
from transformers.utils.logging import disable_progress_bar

from mtl_core import evaluation, loop, shared_gradients
from mtl_core.build import build_train_state
from mtl_core.config import Experiment
from mtl_core.data.batching import evaluation_batches
from mtl_core.data.prepare import Data
from mtl_core.errors import TrainingError
from mtl_core.evaluation import Evaluation, evaluate
from mtl_core.loop import fit
from mtl_core.shared_gradients import SharedGradients
from mtl_core.state import TrainState
from mtl_core.world import World
from serve_app.haproxy import free_ports
from tests.small_runs import first_gradients, weights

STEPS = 20
GROUPS = {"2": 2, "3": 3, "2 machines": 2}
"""Processes of a group; of the last one the second cannot map the first one's memory."""
IN_ALL_GROUPS = (
    *("plain", "accumulated", "uncertainty", "joint", "unfreezing", "frozen"),
    "weights without use",
)
"""Runs of every group; the others are those of the three processes alone."""


@dataclass(frozen=True)
class Jobs:
    """What every number of processes is asked to do, and where the results go."""

    folder: Path
    runs: dict[str, tuple[Experiment, Data]]
    threads: int = field(default_factory=torch.get_num_threads)


def run_ranks(jobs: Jobs) -> None:
    """Start as many processes as the largest group needs; results stand in `jobs.folder`."""
    ports = free_ports(len(GROUPS))
    multiprocessing.set_forkserver_preload([__name__])  # they need not import all this again
    torch.multiprocessing.start_processes(
        _process, args=(jobs, ports), nprocs=max(GROUPS.values()), start_method="forkserver"
    )


def _process(rank: int, jobs: Jobs, ports: list[int]) -> None:
    torch.set_num_threads(jobs.threads)
    disable_progress_bar()
    for (group, size), port in zip(GROUPS.items(), ports, strict=True):
        if rank >= size:
            continue
        if group == "2 machines" and rank == 1:
            shared_gradients._map = lambda *place: None
        address = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=address, rank=rank, world_size=size)
        try:
            world = World(rank, size, rank)
            for name in runs_of(group, jobs.runs):
                config, data = jobs.runs[name]
                _train(jobs.folder / f"{group}.{name}.{rank}", config, data, world)
            config, data = jobs.runs["plain"]
            result = evaluate_in_small_batches(build_train_state(config, data), data, world)
            (jobs.folder / f"{group}.{rank}.evaluation").write_text(json.dumps(plain(result)))
            (jobs.folder / f"{group}.{rank}.failure").write_text(_fail(config, data, world))
        finally:
            dist.destroy_process_group()


def runs_of(group: str, runs: Iterable[str]) -> list[str]:
    """Names of what a group trains."""
    return [name for name in runs if group == "3" or name in IN_ALL_GROUPS]


def _train(path: Path, config: Experiment, data: Data, world: World) -> None:
    """Some steps; writes the first gradients and the last weights."""
    state = build_train_state(config, data)
    gradients = first_gradients(state)
    ways: list[str] = []

    class Counted(DistributedDataParallel):
        def __init__(self, *args: Any, **options: Any) -> None:
            ways.append("sockets")
            super().__init__(*args, **options)

    class CountedMemory(SharedGradients):
        def __init__(self, *args: Any, **options: Any) -> None:
            ways.append("memory")
            super().__init__(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "DistributedDataParallel", Counted)
        patch.setattr(loop, "SharedGradients", CountedMemory)
        rows = steps(state, data, config, world)
    save_file(gradients, path.with_name(path.name + ".gradients"))
    save_file(weights(state.model), path.with_name(path.name + ".weights"))
    told = json.dumps({"ways": ways, "rows": rows})
    path.with_name(path.name + ".told").write_text(told)


def steps(
    state: TrainState, data: Data, config: Experiment, world: World | None = None
) -> list[dict[str, Any]]:
    """Train for STEPS steps, whatever stands in the config; returns what was told."""
    rows = []
    for event in fit(state, data, config, world):
        rows.append({"event": event.kind, **event.row})
        if event.kind == "step" and event.row["step"] >= STEPS:
            break
    assert state.step == STEPS
    return rows


def evaluate_in_small_batches(
    state: TrainState, data: Data, world: World | None = None
) -> Evaluation:
    """Evaluation with several batches for every rank; all heads answer something of everything."""
    torch.manual_seed(0)
    for _, head in state.model.head_items:
        torch.nn.init.normal_(head.output.weight)
    evaluation.evaluation_batches = partial(evaluation_batches, batch_tokens=80)
    try:
        return evaluate(state.model, data.splits["validation"], world)
    finally:
        evaluation.evaluation_batches = evaluation_batches


def plain(result: Evaluation) -> dict[str, Any]:
    counts = {task: counts.tolist() for task, counts in result.counts.items()}
    return {"counts": counts, "losses": result.losses, "scores": result.scores()}


def _fail(config: Experiment, data: Data, world: World) -> str:
    """What a rank says when one rank's loss, and only its, stops being finite."""
    state = build_train_state(config, data)
    try:
        for event in fit(state, data, config, world):
            if event.kind == "step" and world.rank == world.size - 1:
                with torch.no_grad():
                    state.model.head("topic").output.weight.fill_(float("nan"))
    except TrainingError as error:
        return str(error)
    return "no error"
