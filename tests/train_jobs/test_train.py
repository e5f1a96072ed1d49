"""Training on Ray: what a run leaves behind, on S3 too, and what happens when something dies."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from mtl_core.artifact import load_model, read_manifest
from mtl_core.build import build_train_state
from mtl_core.config import load_experiment
from mtl_core.data.prepare import prepare
from mtl_core.predictor import Predictor
from tests.commands import ROOT, history, run, start, wait_for, weights, write_config
from tests.preloaded import Process
from tests.s3_server import checkpoints, s3_server

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
STEPS_IN_EPOCH = 75
S3_RUN = "team/runs/small"
TEXTS = ["Maria Lopez loved the Grand Hotel in Lisbon.", "The food was cold."]


def announced(folder: Path, step: int, starts: int = 1) -> dict[str, Any] | None:
    """The row of this start of workers, once they are known to have done this step."""
    rows = history(folder)
    begun = [number for number, row in enumerate(rows) if row["event"] == "start"]
    if len(begun) < starts:
        return None
    begin, *steps = rows[begun[starts - 1] :]
    done = any(row["event"] == "step" and row["step"] >= step for row in steps)
    return begin if done else None


def freeze_inside_an_epoch(folder: Path, process: Process, starts: int = 1) -> dict[str, Any]:
    """Halt the first worker where it and its last checkpoint are inside an epoch, not the first.

    Returns the row that announced the workers. The log has a row each ten steps and at the end of
    an epoch, and may lag by one: so two rows from the end is inside for certain. As often there is
    a checkpoint, handed in once the one before it is taken: so the first is by the third row.
    """
    row = wait_for(lambda: announced(folder, STEPS_IN_EPOCH + 10, starts), process)
    for _ in range(40):
        os.kill(row["pid"], signal.SIGSTOP)
        time.sleep(1.2)  # what it told before reaches the file within half a second
        last = history(folder)[-1]
        if last["event"] == "step" and 30 <= last["step_in_epoch"] < last["steps_in_epoch"] - 10:
            return dict(row)
        os.kill(row["pid"], signal.SIGCONT)
        time.sleep(0.05)
    raise AssertionError("the run ended before it could be halted inside an epoch")


def assert_resumed_inside_an_epoch(folder: Path) -> None:
    rows = history(folder)
    begun = [row["step"] for row in rows if row["event"] == "start"][-1]
    assert {row["steps_in_epoch"] for row in rows if row["event"] == "step"} == {STEPS_IN_EPOCH}
    assert begun > STEPS_IN_EPOCH, "the workers started over instead of resuming"
    assert begun % STEPS_IN_EPOCH, "the checkpoint was one of an epoch's end"


def fill(path: Path) -> None:
    """Write until the disk takes no more."""
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"\0" * 4096):
            pass


def test_a_run_leaves_artifact_history_events_and_plots(finished: Path) -> None:
    folder = finished / "runs" / "small"
    manifest = read_manifest(folder / "artifact")
    assert set(manifest.tasks) == {"sentiment", "entities"}
    assert 0.3 < manifest.tasks["entities"]["metrics"]["test"]["token_accuracy"] <= 1
    rows = history(finished)
    assert [row["epoch"] for row in rows if row["event"] == "validation"] == [1, 2]
    assert list((folder / "tensorboard").glob("events.*"))
    assert (folder / "artifact/plots/learning_curves.png").stat().st_size > 5_000
    assert (folder / "artifact/plots/confusion_sentiment.png").stat().st_size > 5_000
    assert (folder / "artifact/plots/gradient_cosines.png").stat().st_size > 5_000
    steps = [row for row in rows if row["event"] == "step"]
    assert any(key.startswith("cosine/") for row in steps for key in row)
    card = (folder / "artifact/README.md").read_text()
    types = manifest.tasks["entities"]["labels"]
    assert all(f"| {name} | " in card.split("## entities: by label (test)")[1] for name in types)
    output = (finished / "output.txt").read_text()
    assert "2 worker(s) on cpu" in output
    assert "sentiment" in output
    assert "ETA" in output or "epoch 2/2" in output


def test_tensorboard_has_every_number_of_the_history(finished: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(finished / "runs/small/tensorboard"), {"scalars": 0}).Reload()
    written = {
        (tag, event.step): event.value
        for tag in events.Tags()["scalars"]
        for event in events.Scalars(tag)
    }
    rows = [row for row in history(finished) if row["event"] in ("step", "validation")]
    told = [
        (name, row["step"], float(value))
        for row in rows
        for name, value in row.items()
        if isinstance(value, int | float) and name != "step"
    ]
    expected = {(name, step): value for name, step, value in told}
    assert written == pytest.approx(expected, rel=1e-6)
    assert {"loss/sentiment", "validation/entities/f1", "learning_rate"} <= {n for n, _, _ in told}


def test_a_finished_run_is_shown_and_not_repeated(finished: Path) -> None:
    before = weights(finished)
    again = run("train", "--config", str(finished / "experiment.yaml"))
    assert again.returncode == 0
    assert "is finished" in again.stdout
    assert weights(finished) == before


def test_a_driver_that_died_before_the_artifact_stood_builds_it_without_training_again(
    finished: Path, tmp_path: Path, experiment: dict[str, Any]
) -> None:
    config = write_config(tmp_path, experiment, scale={"workers": 1})
    shutil.copytree(finished / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs/small/artifact")
    done = run("train", "--config", str(config))
    assert done.returncode == 0, done.stderr
    assert weights(tmp_path) == weights(finished)
    assert [row["event"] for row in history(tmp_path)].count("start") == 1


def test_a_damaged_record_of_checkpoints_is_said_so_and_without_checkpoints_it_is_not_read(
    finished: Path, tmp_path: Path, ray_address: str, experiment: dict[str, Any]
) -> None:
    config = write_config(tmp_path, experiment)
    shutil.copytree(finished / "runs", tmp_path / "runs")
    shutil.rmtree(tmp_path / "runs/small/artifact")
    record = tmp_path / "runs/small/checkpoint_manager_snapshot.json"
    whole = record.read_text()
    record.write_text(whole[:100])
    refused = run("train", "--config", str(config), address=ray_address)
    assert refused.returncode == 1
    assert "/runs/small: the record of its checkpoints cannot be used: " in refused.stderr
    assert "Traceback" not in refused.stderr
    record.write_text(whole)
    for checkpoint in (tmp_path / "runs/small").glob("checkpoint_2*"):
        shutil.rmtree(checkpoint)
    less = ("--set", "training.epochs=1", "--set", "data.0.limit=40", "--set", "scale.workers=1")
    anew = run("train", "--config", str(config), *less, address=ray_address)
    assert anew.returncode == 0, anew.stderr
    assert [row["step"] for row in history(tmp_path) if row["event"] == "start"] == [0]


def test_a_folder_of_another_configuration_is_refused(finished: Path) -> None:
    other = run("train", "--config", str(finished / "experiment.yaml"), "--set", "seed=7")
    assert other.returncode == 1
    assert "another configuration" in other.stderr
    assert "seed was 42, now 7" in other.stderr
    assert "Traceback" not in other.stderr


def test_an_elastic_number_of_workers_gives_the_weights_of_two(
    tmp_path: Path, ray_address: str, experiment: dict[str, Any]
) -> None:
    no_dropout = {
        **experiment,
        "encoder": {**experiment["encoder"], "dropout": 0.0},
        "tasks": {name: {**task, "dropout": 0.0} for name, task in experiment["tasks"].items()},
        "training": {**experiment["training"], "epochs": 1},
    }
    for name, workers in (("two", 2), ("elastic", [1, 2])):
        config = write_config(tmp_path, no_dropout, name=name, scale={"workers": workers})
        done = run("train", "--config", str(config), address=ray_address)
        assert done.returncode == 0, done.stderr
        starts = [row for row in history(tmp_path, name) if row["event"] == "start"]
        assert [row["workers"] for row in starts] == [2]
    two, elastic = (load_model(tmp_path / "runs" / n / "artifact") for n in ("two", "elastic"))
    for (name, a), (_, b) in zip(two.named_parameters(), elastic.named_parameters(), strict=True):
        assert (a - b).abs().max() < 1e-4, name


def raylets(process: Process) -> set[int]:
    family = psutil.Process(process.pid).children(recursive=True)
    found = {member.pid for member in family if member.name() == "raylet"}
    assert found
    return found


def assert_nothing_needless_runs(process: Process) -> None:
    """A Ray of the command's own has none of what only clusters and Ray Data's datasets need."""
    family = psutil.Process(process.pid).children(recursive=True)
    commands = [" ".join(member.cmdline()) for member in family]
    assert any(command.startswith("ray::TrainController") for command in commands)
    for needless in ("monitor.py", "dashboard.py", "PlacementGroupCleaner", "DatasetManager"):
        assert not any(needless in command for command in commands), needless


def test_a_killed_worker_costs_nothing_but_time_and_nobody_else_may_start_the_name_meanwhile(
    finished: Path, tmp_path: Path, experiment: dict[str, Any]
) -> None:
    config = write_config(tmp_path, experiment)
    process = start("train", "--config", str(config))
    row = freeze_inside_an_epoch(tmp_path, process)
    assert psutil.Process(row["pid"]).ppid() not in raylets(process), "it is no fork"
    assert_nothing_needless_runs(process)
    second = run("train", "--config", str(config))
    assert second.returncode == 1
    assert f"is in use by process {process.pid} on host" in second.stderr
    assert "Traceback" not in second.stderr
    os.kill(row["pid"], signal.SIGKILL)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 0, output
    assert_resumed_inside_an_epoch(tmp_path)
    assert [r["pid"] for r in history(tmp_path) if r["event"] == "start"][-1] != row["pid"]
    assert weights(tmp_path) == weights(finished)


def test_after_ctrl_c_and_after_the_driver_was_killed_the_same_command_goes_on(
    finished: Path, tmp_path: Path, ray_address: str, experiment: dict[str, Any]
) -> None:
    """On a Ray that outlives its drivers, as a cluster does."""
    config = write_config(tmp_path, experiment)
    process = start("train", "--config", str(config), address=ray_address)
    wait_for(lambda: announced(tmp_path, 30), process)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 130, output
    assert "run the same command again" in output
    process = start("train", "--config", str(config), address=ray_address)
    row = freeze_inside_an_epoch(tmp_path, process, starts=2)
    assert row["step"] > 0, "Ctrl-C left no checkpoint"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with contextlib.suppress(ProcessLookupError):  # where Ray has done so already
        os.kill(row["pid"], signal.SIGKILL)  # before it can go on to the epoch's end
    assert not (tmp_path / "runs/small/artifact").exists()
    resumed = run("train", "--config", str(config), "--resume", address=ray_address)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming" in resumed.stdout
    assert_resumed_inside_an_epoch(tmp_path)
    steps = [row["step"] for row in history(tmp_path) if row["event"] == "step"]
    assert steps == sorted(set(steps)), "a step stands twice in the history"
    assert weights(tmp_path) == weights(finished)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_as_its_own_ray_starts_it_leaves_no_process(
    number: signal.Signals, tmp_path: Path, experiment: dict[str, Any]
) -> None:
    process = start("train", "--config", str(write_config(tmp_path, experiment)))

    def agents() -> list[psutil.Process]:
        family = psutil.Process(process.pid).children(recursive=True)
        with contextlib.suppress(psutil.Error):  # some come and go
            if any("ray::" in " ".join(each.cmdline()) for each in family):
                return family
        return []

    family = wait_for(agents, process)
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    assert output.splitlines()[-1] == "interrupted; run the same command again to go on"
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive


def test_a_loss_that_is_not_finite_stops_the_run_which_keeps_the_checkpoint_before(
    tmp_path: Path, ray_address: str, experiment: dict[str, Any]
) -> None:
    wild = {
        **experiment,
        "optim": {"learning_rate": 1e30, "max_grad_norm": None, "warmup": 0.5},
        "training": {**experiment["training"], "checkpoint_every": 1},
    }
    config = write_config(tmp_path, wild)
    done = run("train", "--config", str(config), address=ray_address)
    assert done.returncode == 1
    assert "is not finite at step 2 (epoch 1)" in done.stderr
    assert "Traceback" not in done.stderr
    assert [row["event"] for row in history(tmp_path)].count("start") == 1, "it was retried in vain"

    (checkpoint,) = (tmp_path / "runs/small").glob("checkpoint_2*")
    wanted = load_experiment(config)
    data = prepare(wanted)
    state = build_train_state(wanted, data)
    state.load(checkpoint)
    assert state.step == 1
    assert all(parameter.isfinite().all() for parameter in state.model.parameters())

    assert "Lower optim.learning_rate" in done.stderr
    assert "give the run a new name" in done.stderr
    lower = ("--config", str(config), "--set", "optim.learning_rate=1e-3")
    refused = run("train", *lower)
    assert refused.returncode == 1
    assert "optim.learning_rate was 1e+30, now 0.001" in refused.stderr
    small = ("--set", "name=calm", "--set", "data.0.limit=40")
    calm = run("train", *lower, *small, address=ray_address)
    assert calm.returncode == 0, calm.stderr


def test_a_mistake_that_only_the_encoder_shows_is_told_once(
    tmp_path: Path, ray_address: str, experiment: dict[str, Any]
) -> None:
    encoder = {**experiment["encoder"], "max_length": 5000}
    config = write_config(tmp_path, {**experiment, "encoder": encoder}, scale={"workers": 1})
    done = run("train", "--config", str(config), address=ray_address)
    assert done.returncode == 1
    assert "error: encoder.max_length: 5000 is more than" in done.stderr
    assert "retries" not in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_keeps_the_checkpoint_before(
    tmp_path: Path, ray_address: str, experiment: dict[str, Any]
) -> None:
    disk = tmp_path / "runs"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", disk], check=True)
    try:
        config = write_config(tmp_path, experiment, scale={"workers": 1, "max_failures": 0})
        process = start("train", "--config", str(config), address=ray_address)
        wait_for(lambda: announced(tmp_path, 30), process)
        fill(disk / "ballast")
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 1, output
        assert "error: the disk is full: worker 0: " in output
        assert "run the same command to resume" in output
        assert "Traceback" not in output
        (disk / "ballast").unlink()
        resumed = run("train", "--config", str(config), address=ray_address)
        assert resumed.returncode == 0, resumed.stderr
        assert [r["step"] for r in history(tmp_path) if r["event"] == "start"][-1] > 0
    finally:
        subprocess.run(["umount", "-l", disk], check=True)


def test_a_task_is_added_to_an_artifact_without_touching_what_it_had(
    finished: Path, tmp_path: Path, ray_address: str, experiment: dict[str, Any]
) -> None:
    old = finished / "runs/small/artifact"
    rows = [{"text": f"{word} number {i}", "kind": word} for i in range(30) for word in ("a", "b")]
    data = tmp_path / "kinds.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    added = {
        **experiment,
        "name": "added",
        "init_from": os.path.relpath(old, ROOT),
        "tasks": {"kind": {"kind": "classification"}},
        "data": [{"path": str(data), "columns": {"text": "text", "kind": "kind"}}],
        "freeze": {"encoder": True},
        "scale": {"workers": 1},
    }
    config = str(write_config(tmp_path, added))
    done = run("train", "--config", config, address=ray_address)
    assert done.returncode == 0, done.stderr
    new = tmp_path / "runs/added/artifact"
    before, after = read_manifest(old), read_manifest(new)
    assert after.encoder["sha256"] == before.encoder["sha256"]
    assert set(after.tasks) == {"sentiment", "entities", "kind"}
    assert after.tasks["sentiment"]["metrics"] == before.tasks["sentiment"]["metrics"]
    tasks = ["sentiment", "entities"]
    assert Predictor.load(new).predict(TEXTS, tasks) == Predictor.load(old).predict(TEXTS, tasks)


def test_with_everything_frozen_the_run_evaluates_and_says_so(
    tmp_path: Path, ray_address: str, experiment: dict[str, Any]
) -> None:
    frozen = {
        **experiment,
        "freeze": {"encoder": True, "heads": ["sentiment", "entities"]},
        "scale": {"workers": 1},
    }
    config = str(write_config(tmp_path, frozen))
    done = run("train", "--config", config, address=ray_address)
    assert done.returncode == 0, done.stderr
    assert "Nothing was trained" in done.stdout
    assert read_manifest(tmp_path / "runs/small/artifact").training["trained"] is False


@pytest.fixture
def server() -> Iterator[tuple[Any, dict[str, str]]]:
    with s3_server("bucket") as both:
        yield both


def stored(client: Any) -> set[str]:
    """What is in the run's folder."""
    found = client.list_objects_v2(Bucket="bucket", Prefix=f"{S3_RUN}/").get("Contents", [])
    return {item["Key"].removeprefix(f"{S3_RUN}/") for item in found}


def told(client: Any) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl so far."""
    if "metrics.jsonl" not in stored(client):
        return []
    text = client.get_object(Bucket="bucket", Key=f"{S3_RUN}/metrics.jsonl")["Body"].read().decode()
    return [json.loads(line) for line in text.splitlines()]


def download(client: Any, folder: Path) -> Path:
    for name in stored(client):
        if name.startswith("artifact/"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            client.download_file("bucket", f"{S3_RUN}/{name}", str(folder / name))
    return folder / "artifact"


@pytest.mark.filterwarnings("ignore")
def test_a_run_on_s3_goes_on_after_its_driver_was_killed_and_ends_as_one_on_a_disk(
    finished: Path,
    tmp_path: Path,
    server: tuple[Any, dict[str, str]],
    experiment: dict[str, Any],
) -> None:
    client, environment = server
    config = write_config(tmp_path, experiment, output_dir="s3://bucket/team/runs")
    process = start("train", "--config", str(config), **environment)
    wait_for(lambda: checkpoints(client, S3_RUN), process)
    process.kill()
    process.communicate()
    assert "run.lock" in stored(client)
    assert "artifact/manifest.json" not in stored(client)

    resumed = run("train", "--config", str(config), "--resume", **environment)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming s3://bucket/team/runs/small" in resumed.stdout
    assert "accuracy" in resumed.stdout
    assert [row["step"] for row in told(client) if row["event"] == "start"][-1] > 0
    assert "run.lock" not in stored(client)
    assert any(name.startswith("tensorboard/") for name in stored(client))

    artifact = download(client, tmp_path / "runs/small")
    assert weights(tmp_path) == weights(finished)
    assert read_manifest(artifact).name == "small"
    assert Predictor.load(artifact).predict(["The food was cold."])
    shown = run("train", "--config", str(config), **environment)
    assert shown.returncode == 0, shown.stderr
    assert "s3://bucket/team/runs/small is finished" in shown.stdout

    taken_up = {
        "name": "next",
        "init_from": "s3://bucket/team/runs/small/artifact",
        "tasks": {"sentiment": experiment["tasks"]["sentiment"]},
        "data": [{"demo": True, "columns": {"text": "text", "sentiment": "sentiment"}}],
        "freeze": {"encoder": True, "heads": ["sentiment"]},
        "weighting": {},
    }
    frozen = write_config(tmp_path, {**experiment, **taken_up})
    started = run("train", "--config", str(frozen), **environment)
    assert started.returncode == 0, started.stderr
    assert weights(tmp_path, "next") == weights(finished)
