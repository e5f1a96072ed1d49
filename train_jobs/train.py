"""python -m train_jobs.train: from an experiment file to an artifact, on Ray Train."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from mtl_core.command import run_command
from mtl_core.config import Experiment, load_experiment
from train_jobs.runs import RunFolder

EPILOG = """examples:
  python -m train_jobs.train --config train_jobs/configs/demo.yaml
  python -m train_jobs.train --config my.yaml --set training.epochs=5 --set scale.workers=2

Running the same name again resumes it from its last checkpoint; a finished run is shown, not
repeated. Every key of the file is explained in docs/experiment.md."""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m train_jobs.train",
        description="Train one encoder for many tasks.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="experiment file (YAML)")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change one field by its dotted path; may be repeated",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="insist on resuming: fail if there is no run of this name",
    )
    options = parser.parse_args(arguments)
    experiment = load_experiment(options.config, options.set)
    if experiment.init_from is not None:
        from mtl_core.build import resolve_init_from

        experiment = resolve_init_from(experiment)
    folder = RunFolder(experiment)
    resumed = folder.resumes(experiment, must_exist=options.resume)
    if folder.is_finished:
        print(f"{folder.title} is finished; its scores:")
    else:
        if resumed:
            print(f"resuming {folder.title}")
        run(experiment, folder)
    from train_jobs.report import show_result

    show_result(folder)


def run(experiment: Experiment, folder: RunFolder) -> None:
    """Train, while what takes seconds to import is imported by two processes at the same time."""
    from mtl_core.forks import forked_workers

    started = time.monotonic()
    with forked_workers("train_jobs.preload") as scripts:
        from mtl_core.data.prepare import prepare
        from train_jobs.cluster import ray_cluster
        from train_jobs.console import announce_reading, describe_data
        from train_jobs.driver import train
        from train_jobs.report import build_artifact

        announce_reading(experiment)
        data = prepare(experiment)
        describe_data(data)
        with folder.claim(experiment), ray_cluster(scripts) as end_ray:
            checkpoint = train(experiment, data, folder)
            end_ray()
            with checkpoint.as_directory() as weights:
                build_artifact(Path(weights), experiment, data, folder, time.monotonic() - started)


if __name__ == "__main__":
    run_command(main)
