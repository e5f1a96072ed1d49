"""What each Ray Train worker runs: data, model and loop put together, checkpoints reported."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from safetensors import SafetensorError

from mtl_core import features
from mtl_core.artifact import save_weights
from mtl_core.build import build_train_state
from mtl_core.config import Experiment, parse_experiment
from mtl_core.data.prepare import Data, reopen
from mtl_core.data.shards import ElsewhereError
from mtl_core.errors import DataError, UserError
from mtl_core.evaluation import evaluate
from mtl_core.freezing import apply_freezing
from mtl_core.loop import fit
from mtl_core.model import MultiTaskModel
from mtl_core.state import TrainState
from mtl_core.storage import may_pass, storage_errors
from mtl_core.world import World
from train_jobs.folders import NamedFolder, out_of_reach
from train_jobs.runs import RESULT


class WorkerSession:
    """How a Ray Train worker finds its checkpoint and passes on what happens.

    A mistake that a retry cannot mend is told as "failed" instead of being raised, so that Ray does
    not start the workers again for it. Any rank may meet one, and any rank may be the one of its
    machine that computes features; all else is told by rank 0.
    """

    def __init__(self, log: Any) -> None:
        context = ray.train.get_context()
        device = ray.train.torch.get_device()
        assert isinstance(device, torch.device)
        rank, size = context.get_world_rank(), context.get_world_size()
        self.world = World(rank, size, context.get_local_rank(), device)
        self.log = log
        """Handle of a ProgressLog."""

    def checkpoint(self) -> ray.train.Checkpoint | None:
        found: ray.train.Checkpoint | None = ray.train.get_checkpoint()
        return found

    def report(self, metrics: dict[str, Any], folder: Path | None) -> None:
        """Hand over metrics, and the files in a folder from rank 0; every rank must come here."""
        checkpoint = None if folder is None else ray.train.Checkpoint.from_directory(folder)
        ray.train.report(metrics, checkpoint=checkpoint)

    def tell(self, event: str, row: dict[str, Any]) -> None:
        if event == "failed":
            node = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
            message = f"{node}: {row['message']}" if self.world.rank else row["message"]
            ray.get(self.log.append.remote(event, {**row, "message": message}))
        elif self.world.rank == 0 or (event == "features" and row["done"] < 1):
            self.log.append.remote(event, row)


def train_worker(config: dict[str, Any]) -> None:
    """Train, evaluate and report the weights; `config` is plain so that it travels.

    Keys: experiment (mapping), labels, keys (of encoded splits), folder (that of all runs, as this
    node has to reach it) and log (handle of a ProgressLog), or session in the place of these two.
    """
    if threads := os.environ.get("OMP_NUM_THREADS"):
        # Set by Ray or the user, maybe after torch was loaded.
        torch.set_num_threads(int(threads.split(",")[0]))
    experiment = parse_experiment(config["experiment"])
    session = config.get("session") or WorkerSession(config["log"])
    world = session.world
    ready = _set_up(config, experiment, session)
    if world.any(ready is None) or ready is None:  # the others must not wait for one that is not
        return
    data, state = ready
    start = {"step": state.step, "workers": world.size, "device": str(world.device)}
    session.tell("start", {**start, "pid": os.getpid(), "epoch": state.epoch})
    try:
        _train(state, data, experiment, world, session)
    except ElsewhereError:
        return
    except UserError as error:
        _give_up(error, session)
        return
    _report_result(state, data, experiment, world, session)


def _set_up(
    config: dict[str, Any], experiment: Experiment, session: WorkerSession
) -> tuple[Data, TrainState] | None:
    """Data, and the model where the last checkpoint left it; None if there is nothing to train."""
    world, checkpoint = session.world, session.checkpoint()
    try:
        if config.get("folder"):
            _check_reached(NamedFolder(config["folder"], experiment.name))
        data = reopen(experiment, config["labels"], config["keys"])
        state = build_train_state(experiment, data, world.device)
        if checkpoint is not None:
            with checkpoint.as_directory() as folder:
                if (Path(folder) / RESULT).exists():
                    return None
                with _damage_named(checkpoint.path):
                    state.load(Path(folder))
    except UserError as error:
        _give_up(error, session)
        return None
    return data, state


@contextmanager
def _damage_named(checkpoint: str) -> Iterator[None]:
    """Say of a checkpoint that cannot be read which one it is, and what is left to do.

    Raises:
        DataError: a file is missing, cut short or not what its name says.
    """
    try:
        yield
    except DataError:
        raise
    except (SafetensorError, ValueError, KeyError, FileNotFoundError) as error:
        raise DataError(
            f"{checkpoint}: this checkpoint is damaged ({type(error).__name__}: {error}), and "
            "training keeps no other; start a run of another name, or remove this one's folder"
        ) from error


def _give_up(error: Exception, session: WorkerSession) -> None:
    """Tell why no retry mends it; a store that did not answer is raised, and so tried again."""
    if may_pass(error.__cause__):
        raise error
    session.tell("failed", {"message": str(error)})


def _check_reached(folder: NamedFolder) -> None:
    """See now that this node reaches the run's folder: Ray Train looks at the first checkpoint."""
    node = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    try:
        found = folder.read("experiment.yaml")
    except storage_errors() as error:
        reason = f" ({type(error).__name__}: {error})"
        raise out_of_reach(node, folder.title, reason) from error
    if found is None:
        raise out_of_reach(node, folder.title)


def _train(
    state: TrainState, data: Data, experiment: Experiment, world: World, session: WorkerSession
) -> None:
    """Go through `fit`, saving what it asks to save and passing on the rest."""
    validated: dict[str, Any] = {}
    for event in fit(state, data, experiment, world):
        if event.kind == "validation":
            validated = event.row
        if event.kind != "checkpoint":
            session.tell(event.kind, event.row)
            continue
        with tempfile.TemporaryDirectory() as folder:
            if world.rank == 0:
                state.save(Path(folder))
            session.report({**validated, **event.row}, Path(folder) if world.rank == 0 else None)
    apply_freezing(state.model, experiment.freeze, experiment.training.epochs - 1)


def _report_result(
    state: TrainState, data: Data, experiment: Experiment, world: World, session: WorkerSession
) -> None:
    """Score the best weights on the splits that were not trained on, in fp32, and hand all over."""
    model = state.model
    tasks = list(experiment.tasks)
    caches = _exact_states(model, data, experiment, world)
    results = {
        name: evaluate(model, split, world, cache=caches.get(name), tasks=tasks)
        for name, split in data.splits.items()
        if name != "train"
    }
    metrics: dict[str, Any] = {"step": state.step, "epoch": float(state.epoch), "finished": True}
    for name, result in results.items():
        metrics |= result.flat(name)
    with tempfile.TemporaryDirectory() as folder:
        if world.rank == 0:
            save_weights(model, Path(folder))
            content = {
                "training": {
                    "trained": state.optimizer is not None,
                    "steps": state.step,
                    "epochs": state.epoch,
                    "best_epoch": state.best_epoch,
                    "encoder_passes": model.encoder.num_passes,
                },
                "splits": {
                    name: {
                        task: {"counts": counts.tolist(), "loss": result.losses.get(task)}
                        for task, counts in result.counts.items()
                    }
                    for name, result in results.items()
                },
            }
            (Path(folder) / RESULT).write_text(json.dumps(content), encoding="utf-8")
        session.report(metrics, Path(folder) if world.rank == 0 else None)


def _exact_states(
    model: MultiTaskModel, data: Data, experiment: Experiment, world: World
) -> dict[str, features.FeatureCache]:
    """fp32 states at the freeze boundary of the splits to score; trials of a sweep share them."""
    depth = features.cached_layers(model, experiment, data.splits["validation"], world.device)
    caches: dict[str, features.FeatureCache] = {}
    scored = [name for name in data.splits if name != "train"]
    for name in scored if depth else ():
        for _ in features.open_cache(caches, name, model, data, depth, world, bf16=False):
            pass
    return caches
