"""Ranks that meet different things: all of them end, and the one that knows why says so."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import time
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from botocore.exceptions import (
    ClientError,
    ConnectTimeoutError,
    EndpointConnectionError,
    NoCredentialsError,
    ProfileNotFound,
)
from ray.train import Checkpoint

from mtl_core import features
from mtl_core.build import build_train_state
from mtl_core.config import parse_experiment
from mtl_core.data.prepare import prepare, reopen
from mtl_core.data.shards import ElsewhereError
from mtl_core.errors import DataError
from mtl_core.state import FILES
from mtl_core.world import World
from serve_app.haproxy import free_ports
from tests.small_runs import examples, experiment, write_rows
from train_jobs import worker
from train_jobs.runs import RunFolder
from train_jobs.worker import train_worker

pytestmark = pytest.mark.slow

PATIENCE_S = 6
"""Of ranks with each other; Ray Train's is half an hour."""


class Session:
    """Stands for Ray Train: keeps what it is told."""

    def __init__(self, world: World, found: Checkpoint | None = None) -> None:
        self.world, self.found = world, found
        self.told: list[tuple[str, dict[str, Any]]] = []

    def checkpoint(self) -> Checkpoint | None:
        return self.found

    def report(self, metrics: dict[str, Any], folder: Path | None) -> None:
        return

    def tell(self, event: str, row: dict[str, Any]) -> None:
        self.told.append((event, row))


def slowly(write: Any) -> Any:
    """Features of which the first take longer to compute than ranks wait for each other."""
    first = iter([1.5 * PATIENCE_S])

    def written(*arguments: Any) -> Any:
        time.sleep(next(first, 0))
        yield from write(*arguments)

    return written


def rank(number: int, folder: Path, port: int, cache: str, configs: list[dict[str, Any]]) -> None:
    """One of two; writes what it told."""
    os.environ["MTL_CACHE"] = cache
    torch.set_num_threads(1)
    features.evaluation_batches = slowly(features.evaluation_batches)
    address, patience = f"tcp://127.0.0.1:{port}", timedelta(seconds=PATIENCE_S)
    dist.init_process_group(
        "gloo", init_method=address, rank=number, world_size=2, timeout=patience
    )
    session = Session(World(number, 2, number))
    train_worker({**configs[number], "session": session})
    dist.destroy_process_group()
    (folder / f"{number}.json").write_text(json.dumps(session.told))


def train(folder: Path, configs: list[dict[str, Any]]) -> list[list[tuple[str, dict[str, Any]]]]:
    """What each of two ranks told, once both have ended."""
    multiprocessing.set_forkserver_preload([__name__])
    torch.multiprocessing.start_processes(
        rank,
        args=(folder, free_ports(1)[0], os.environ.get("MTL_CACHE", str(folder)), configs),
        nprocs=2,
        start_method="forkserver",
    )
    return [json.loads((folder / f"{number}.json").read_text()) for number in range(2)]


@pytest.fixture
def plain(tiny_encoders: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    """What a driver sends its workers: a run whose encoder is frozen."""
    columns = {"text": "text", "topic": "topic", "mood": "mood", "entities": "entities"}
    rows = write_rows(tmp_path / "rows.jsonl", examples(0, 60))
    config = experiment(
        tiny_encoders["bert"],
        data=[{"path": str(rows), "columns": columns}],
        training={"epochs": 1},
        freeze={"encoder": True},
    )
    data = prepare(config)
    mapping = config.model_dump(mode="json")
    return {"experiment": mapping, "labels": data.labels, "keys": data.keys, "log": None}


def test_where_one_rank_cannot_begin_none_waits_for_it(
    plain: dict[str, Any], tmp_path: Path
) -> None:
    away = json.loads(json.dumps(plain["experiment"]))
    away["encoder"]["model"] = str(tmp_path / "not on this machine")
    well, other = train(tmp_path, [plain, {**plain, "experiment": away}])
    assert well == []
    ((event, row),) = other
    assert event == "failed"
    assert "not on this machine" in row["message"]


def test_a_variable_that_is_not_set_on_a_worker_s_machine_is_told_and_not_retried(
    plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "empty"))  # as on another machine
    away = json.loads(json.dumps(plain["experiment"]))
    away["data"][0]["path"] = "${MTL_ELSEWHERE}/rows.jsonl"
    session = Session(World())
    train_worker({**plain, "experiment": away, "session": session})
    ((event, row),) = session.told
    assert event == "failed"
    assert "the environment variable MTL_ELSEWHERE is not set" in row["message"]


def test_a_node_that_does_not_reach_the_run_s_folder_says_so_before_it_begins(
    plain: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(World())
    monkeypatch.setattr(worker, "WorkerSession", lambda _: session)
    for name in ("_train", "_report_result"):
        monkeypatch.setattr(worker, name, lambda *_: None)
    config = parse_experiment({**plain["experiment"], "output_dir": str(tmp_path / "runs")})
    folder = RunFolder(config)
    for begun in (False, True):
        with folder.claim(config) if begun else nullcontext():
            train_worker({**plain, "folder": folder.storage_path})
    (failed, row), (started, _) = session.told
    assert (failed, started) == ("failed", "start")
    assert f"of this cluster does not reach {folder.path}; give storage" in row["message"]


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99, None])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_is_named_with_what_is_left_to_do_and_not_tried_again(
    file: str, share: float | None, plain: dict[str, Any], tmp_path: Path
) -> None:
    config = parse_experiment(plain["experiment"])
    folder = tmp_path / "small" / "checkpoint_2026"
    folder.mkdir(parents=True)
    build_train_state(config, reopen(config, plain["labels"], plain["keys"])).save(folder)
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    if share is not None:
        (folder / file).write_bytes(content[: int(share * len(content))])
    session = Session(World(), Checkpoint.from_directory(folder))
    train_worker({**plain, "session": session})
    ((event, row),) = session.told
    assert event == "failed"
    assert row["message"].startswith(f"{folder}: this checkpoint is damaged (")
    assert row["message"].endswith("of another name, or remove this one's folder")


@pytest.mark.parametrize(
    ("cause", "again"),
    [
        (ConnectionError("refused"), True),
        (OSError(errno.EBUSY, "reduce your request rate"), True),
        (EndpointConnectionError(endpoint_url="http://store"), True),
        (ConnectTimeoutError(endpoint_url="http://store"), True),
        (ClientError({"Error": {"Code": "SlowDown"}}, "GetObject"), True),
        (NoCredentialsError(), False),
        (ProfileNotFound(profile="team"), False),
        (FileNotFoundError("gone"), False),
        (PermissionError("forbidden"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (OSError(errno.ENAMETOOLONG, "File name too long"), False),
        (OSError("not a gzipped file"), False),
        (ValueError("no number"), False),
        (None, False),
    ],
)
def test_a_store_that_does_not_answer_is_tried_again_and_what_it_lacks_is_told(
    cause: Exception | None, again: bool, plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise DataError("s3://bucket/train.jsonl: cannot be read") from cause

    session = Session(World())
    for stage in ("_train", "reopen"):
        monkeypatch.setattr(worker, stage, refuse)
        with pytest.raises(DataError) if again else nullcontext():
            train_worker({**plain, "session": session})
    events = [event for event, _ in session.told]
    assert events == (["start"] if again else ["start", "failed", "failed"])


def test_a_rank_that_another_one_stopped_says_nothing(
    plain: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*_: Any) -> None:
        raise ElsewhereError("another worker could not read its texts")

    monkeypatch.setattr(worker, "_train", stopped)
    session = Session(World())
    train_worker({**plain, "session": session})
    assert [event for event, _ in session.told] == ["start"]


def test_no_rank_waits_in_the_group_while_another_computes_features(
    plain: dict[str, Any], tmp_path: Path
) -> None:
    told = train(tmp_path, [plain, plain])
    ends = [[row for event, row in rank if event == "features"] for rank in told]
    assert ends[0] == ends[1] != []
    built = [row["done"] for row in ends[0]]
    assert built == [1.0] * len(built)
