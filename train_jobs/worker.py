"""What each Ray Train worker runs: data, model and loop put together, checkpoints reported."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch

from mtl_core.artifact import save_weights
from mtl_core.build import build_model, fit_to_data
from mtl_core.config import Experiment, parse_experiment
from mtl_core.data.prepare import Data, reopen
from mtl_core.evaluation import Evaluation, evaluate
from mtl_core.freezing import apply_freezing
from mtl_core.loop import TrainingError, fit
from mtl_core.model import MultiTaskModel
from mtl_core.state import TrainState
from mtl_core.world import World

RESULT = "result.json"


def train_worker(config: dict[str, Any]) -> None:
    """Train, evaluate and report the weights; `config` is plain so that it travels.

    Keys: experiment (mapping), labels, keys (of encoded splits), log (handle of a ProgressLog).
    A mistake that a retry cannot mend goes to the log as "failed" instead of being raised, so that
    Ray does not start the workers again for it.
    """
    experiment = parse_experiment(config["experiment"])
    world = _world()
    checkpoint = ray.train.get_checkpoint()
    data = reopen(experiment, config["labels"], config["keys"])
    model = build_model(experiment, data.labels).to(world.device)
    fit_to_data(model, experiment, data.splits["train"])
    state = TrainState(model, experiment)
    if checkpoint is not None:
        with checkpoint.as_directory() as folder:
            if (Path(folder) / RESULT).exists():
                return
            state.load(Path(folder))
    log = config["log"] if world.rank == 0 else None
    if log is not None:
        log.append.remote(
            "start",
            {
                "step": state.step,
                "workers": world.size,
                "device": str(world.device),
                "pid": os.getpid(),
                "epoch": state.epoch,
            },
        )
    try:
        _train(state, data, experiment, world, log)
    except TrainingError as error:
        if log is not None:
            ray.get(log.append.remote("failed", {"message": str(error)}))
        return
    _report_result(model, state, data, experiment, world)


def _train(state: TrainState, data: Data, experiment: Experiment, world: World, log: Any) -> None:
    """Go through `fit`, saving what it asks to save and passing on the rest."""
    for event in fit(state, data, experiment, world):
        if event.kind != "checkpoint":
            if log is not None:
                log.append.remote(event.kind, event.row)
            continue
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if world.rank == 0:
                state.save(Path(folder))
                checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report({"step": state.step}, checkpoint=checkpoint)
    apply_freezing(state.model, experiment.freeze, experiment.training.epochs - 1)


def _report_result(
    model: MultiTaskModel, state: TrainState, data: Data, experiment: Experiment, world: World
) -> None:
    """Score the best weights on the splits that were not trained on, in fp32, and hand all over."""
    results = {
        name: evaluate(model, split, world, tasks=list(experiment.tasks))
        for name, split in data.splits.items()
        if name != "train"
    }
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if world.rank == 0:
            save_weights(model, Path(folder))
            content = {
                "steps": state.step,
                "epochs": state.epoch,
                "best_epoch": state.best_epoch,
                "trained": state.optimizer is not None,
                "encoder_passes": model.encoder.num_passes,
                "splits": {name: pack(result) for name, result in results.items()},
            }
            (Path(folder) / RESULT).write_text(json.dumps(content), encoding="utf-8")
            checkpoint = ray.train.Checkpoint.from_directory(folder)
        ray.train.report({"step": state.step, "finished": True}, checkpoint=checkpoint)


def pack(result: Evaluation) -> dict[str, Any]:
    """An evaluation as plain JSON values."""
    return {
        task: {
            "counts": counts.tolist(),
            "scores": result.scores().get(task, {}),
            "loss": result.losses.get(task),
        }
        for task, counts in result.counts.items()
    }


def _world() -> World:
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    assert isinstance(device, torch.device)
    return World(
        context.get_world_rank(), context.get_world_size(), context.get_local_rank(), device
    )
