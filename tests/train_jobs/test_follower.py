"""A run's history on disk: soon after things happen, cheap however long it is, and whole."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import EndpointConnectionError
from ray.exceptions import GetTimeoutError

from mtl_core.config import parse_experiment
from train_jobs import follower as module
from train_jobs.follower import Follower
from train_jobs.runs import RunFolder

ROUNDS = 200
Told = list[tuple[str, dict[str, Any]]]
FAILS: dict[int, Told] = {
    1: [("step", {"step": 1})],
    2: [("failed", {"step": 1, "message": "not finite"})],
}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What time it is, to be turned on."""
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    return now


def follow(
    folder: Path,
    kind: type[RunFolder],
    rounds: int,
    clock: list[float],
    monkeypatch: pytest.MonkeyPatch,
    told: dict[int, Told],
    get: Callable[[Told], Told] = lambda answer: answer,
) -> Follower:
    """Follow a run for so many rounds of half a second; `told` is what workers tell before each."""
    raw = {
        "name": "long",
        "tasks": {"t": {"kind": "classification"}},
        "data": [{"path": "x.jsonl", "columns": {"text": "text", "t": "t"}}],
        "output_dir": str(folder),
    }
    experiment = parse_experiment(raw)
    (folder / "long").mkdir()
    number = [0]

    def wait(seconds: float) -> bool:
        clock[0] += seconds
        number[0] += 1
        return number[0] >= rounds

    def drain() -> Told:
        return [row for round in sorted(told) if round <= number[0] for row in told.pop(round)]

    log = SimpleNamespace(drain=SimpleNamespace(remote=drain))
    monkeypatch.setattr(module, "ray", SimpleNamespace(get=lambda answer, timeout: get(answer)))
    follower = Follower(experiment, kind(experiment), log)
    monkeypatch.setattr(follower.progress, "show", lambda *_: None)
    monkeypatch.setattr(follower, "done", SimpleNamespace(wait=wait))
    follower._follow()
    follower.board.close()
    return follower


def test_a_long_history_is_written_less_often_and_at_the_end_whole(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    writes: list[tuple[float, int]] = []

    class Slow(RunFolder):
        def write_history(self, rows: Any) -> None:
            writes.append((clock[0], len(rows)))
            clock[0] += len(rows) / 100  # as a file does that is written anew
            super().write_history(rows)

    told: dict[int, Told] = {i: [("step", {"step": i})] for i in range(1, ROUNDS + 1)}
    follower = follow(tmp_path, Slow, ROUNDS, clock, monkeypatch, told)
    spent = sum(rows / 100 for _, rows in writes[:-1])
    assert spent < 0.07 * clock[0]
    assert writes[0][0] == 0.5
    steps = [row["step"] for row in follower.folder.history()]
    assert steps == list(range(1, ROUNDS + 1))


@contextlib.contextmanager
def printing_to(output: str) -> Iterator[None]:
    """Let nothing that is printed come through."""
    if output == "full disk":
        descriptor = os.open("/dev/full", os.O_WRONLY)
    else:
        reading, descriptor = os.pipe()
        os.close(reading)
    with contextlib.redirect_stdout(os.fdopen(descriptor, "w")) as file:
        yield
    with contextlib.suppress(OSError):
        file.close()


@pytest.mark.parametrize("output", ["full disk", "closed pipe"])
@pytest.mark.parametrize(
    "error",
    [
        OSError("No space left on device"),
        EndpointConnectionError(endpoint_url="http://store"),
    ],
)
def test_what_storage_refuses_is_written_when_it_does_not_and_progress_is_followed_meanwhile(
    output: str,
    error: Exception,
    tmp_path: Path,
    clock: list[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Away(RunFolder):
        def write_history(self, rows: Any) -> None:
            if clock[0] < 3:
                raise error
            super().write_history(rows)

    with printing_to(output):
        follower = follow(tmp_path, Away, 20, clock, monkeypatch, dict(FAILS))
    assert follower.failure == "not finite"
    assert [row["event"] for row in follower.folder.history()] == ["step", "failed"]


def test_an_answer_of_the_log_that_comes_late_is_not_lost(
    tmp_path: Path, clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def get(answer: Told) -> Told:
        if clock[0] < 2:
            raise GetTimeoutError
        return answer

    follower = follow(tmp_path, RunFolder, 4, clock, monkeypatch, dict(FAILS), get)
    assert follower.failure == "not finite"
    assert [row["event"] for row in follower.folder.history()] == ["step", "failed"]
