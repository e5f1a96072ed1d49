"""A run's history on disk: soon after things happen, and cheap however long it is."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mtl_core.config import parse_experiment
from train_jobs import follower as module
from train_jobs.follower import Follower
from train_jobs.runs import RunFolder

ROUNDS = 200


def test_a_long_history_is_written_less_often_and_at_the_end_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, writes = [0.0], []
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))

    class Slow(RunFolder):
        def write_history(self, rows: Any) -> None:
            writes.append((now[0], len(rows)))
            now[0] += len(rows) / 100  # as a file does that is written anew
            super().write_history(rows)

    def wait(seconds: float) -> bool:
        now[0] += seconds
        told.append(("step", {"step": len(told) + 1}))
        return len(told) >= ROUNDS

    told: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(module, "ray", SimpleNamespace(get=lambda _, timeout: [told[-1]]))
    log = SimpleNamespace(drain=SimpleNamespace(remote=lambda: None))
    raw = {
        "name": "long",
        "tasks": {"t": {"kind": "classification"}},
        "data": [{"path": "x.jsonl", "columns": {"text": "text", "t": "t"}}],
        "output_dir": str(tmp_path),
    }
    folder = Slow(parse_experiment(raw))
    (tmp_path / "long").mkdir()
    follower = Follower(parse_experiment(raw), folder, log)
    monkeypatch.setattr(follower.progress, "show", lambda *_: None)
    monkeypatch.setattr(follower, "done", SimpleNamespace(wait=wait))
    follower._follow()
    follower.board.close()
    spent = sum(rows / 100 for _, rows in writes[:-1])
    assert spent < 0.07 * now[0]
    assert writes[0][0] == 0.5
    assert [row["step"] for row in folder.history()] == list(range(1, ROUNDS + 1))
