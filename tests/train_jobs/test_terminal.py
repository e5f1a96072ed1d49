"""What a person at a terminal sees while a run goes on, and what Ctrl-C does there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from tests.commands import history, write_config
from tests.terminal import Terminal

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
LIVE = re.compile(
    r"^epoch \d+\.\d\d/200  step (\d+)  [\d,]+ tokens/s  ETA \d+:\d\d\n", re.MULTILINE
)
TABLE = re.compile(
    LIVE.pattern
    + r"[━╸╺ ]+\n *task +training loss +validation *\n( *(sentiment|entities) +\d\.\d{4}.*\n?){2}",
    re.MULTILINE,
)


SEARCH = re.compile(
    r"^search: (?:\d+ \w+(?:, )?)+  \d+:\d\d\n┏━+.*\n┃ trial ┃ status +┃ epoch ┃ mean", re.MULTILINE
)


def test_a_sweep_s_table_is_redrawn_in_place_and_says_why_a_trial_failed_while_others_go_on(
    tmp_path: Path, experiment: dict[str, Any]
) -> None:
    """A rate that overflows fp32 gives a loss that is not finite."""
    base = {**experiment, "data": [{"demo": True, "limit": 80}], "scale": {"workers": 1}}
    write_config(tmp_path, base)
    sweep = {
        "name": "sweep",
        "base": "experiment.yaml",
        "output_dir": str(tmp_path / "sweeps"),
        "space": {"optim.learning_rate": {"grid": [1e38, 1e-3]}},
        "searcher": {"algorithm": "grid"},
        "budget": {"concurrency": 1},
        "seeds": 1,
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep), encoding="utf-8")
    with Terminal("tune", "--config", str(tmp_path / "sweep.yaml")) as terminal:
        screen = terminal.screen

        def tables() -> list[str]:
            found = SEARCH.findall(screen.text)
            assert len(found) <= 1, f"drawn below, not over, the last one:\n{screen.text}"
            return found

        terminal.wait_until(lambda: bool(tables()))
        assert not screen.cursor_visible
        terminal.wait_until(lambda: bool(tables()) and "1 failed" in screen.text)
        assert re.search(r"^trial 1: .* is not finite at step \d+", screen.text, re.MULTILINE)
        assert terminal.wait() == 0, screen.text
    assert screen.cursor_visible
    assert screen.erased > 5
    assert len(tables()) == 1
    assert re.search(r"^search: 1 failed, 1 finished  \d+:\d\d", screen.text, re.MULTILINE)
    assert "report: " in screen.text
    assert "Traceback" not in screen.text
    folder = tmp_path / "sweeps/sweep"
    trials = pd.read_csv(folder / "trials.csv")
    (failed,) = trials[trials["status"] == "failed"].to_dict("records")
    told = (folder / f"workers/{failed['trial']}/metrics.jsonl").read_text("utf-8")
    assert failed["optim.learning_rate"] == 1e38
    assert "is not finite at step" in failed["reason"]
    assert told.count('"event": "start"') == 1, "it is not trained again"
    assert (folder / "artifact/manifest.json").is_file()


def test_progress_is_redrawn_in_place_and_ctrl_c_gives_the_terminal_back(
    tmp_path: Path, experiment: dict[str, Any]
) -> None:
    changes = {
        "training": {**experiment["training"], "epochs": 200},
        "scale": {"workers": 1},
    }
    config = write_config(tmp_path, {**experiment, **changes})
    with Terminal("train", "--config", str(config)) as terminal:
        screen = terminal.screen
        terminal.wait_until(lambda: "starting workers" in screen.text)
        seen: list[int] = []

        def three_steps() -> bool:
            shown = [int(step) for step in LIVE.findall(screen.text)]
            assert len(shown) <= 1, f"drawn below, not over, the last one:\n{screen.text}"
            seen.extend(step for step in shown if step not in seen)
            return len(seen) >= 3

        terminal.wait_until(three_steps)
        assert seen == sorted(seen)
        assert screen.erased > 10
        assert not screen.cursor_visible
        terminal.wait_until(lambda: bool(TABLE.search(screen.text)))
        assert "1 worker(s) on cpu, from step 0" in screen.text, "lines above are gone"
        terminal.type(b"\x03")
        assert terminal.wait() == 130, screen.text
        assert screen.cursor_visible
        assert "run the same command again to go on" in screen.text
        assert "Traceback" not in screen.text
    assert any(row["event"] == "step" for row in history(tmp_path))
