"""The training benchmark measures what it says, and we are faster than the usual loop."""

from __future__ import annotations

import importlib
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.trainer_pt_utils import get_length_grouped_indices

from benchmarks import corpus_size, frozen_sweep, scaling
from benchmarks.scaling import Machine
from benchmarks.train.__main__ import COMPARISONS, CONFIGS, HERE, command, table, write_rows
from benchmarks.train.slices import in_turn
from mtl_core.config import load_experiment
from mtl_core.data.batching import Schedule
from mtl_core.data.prepare import prepare

FEW = ["data.0.limit=1200"]
"""What is timed or counted needs no more texts; to encode all takes longer."""


def slices(seconds: list[float], tokens: int) -> list[dict[str, float]]:
    return [{"seconds": s, "tokens": tokens, "peak_mb": 900} for s in seconds]


def test_a_factor_is_an_epoch_s_time_over_ours_in_the_same_round() -> None:
    comparison = COMPARISONS["joint"]
    found = {name: slices([2.0, 4.0, 8.0], 1000) for name in comparison.contenders}
    found["Trainer, fp32"] = slices([12.0, 24.0, 24.0], 2000)
    rows = {
        line.split(" | ")[0].lstrip("| "): line
        for line in table(comparison, {"tokens": 10_000, "slices": found})
    }
    assert "| 20.0 s |" not in rows["ours"]
    assert "| ours | 250 | 40.0 s |" in rows["ours"]
    assert "| 3.00 × (1.50 to 3.00) | 3 × |" in rows["Trainer, fp32"]
    assert "| 80.0 s | 2.00 × (2.00 to 2.00) | 8 × |" in rows["plain loop"], "two passes an epoch"


@pytest.mark.slow
def test_a_joint_epoch_takes_a_small_part_of_the_usual_loop_s(
    mtl_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ratio of two processes in turn, of CPU time: beside other tests only that is theirs."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")  # and not what threads wait for each other
    contenders = COMPARISONS["joint"].contenders
    config = CONFIGS["snips"]
    data = prepare(load_experiment(config, FEW))
    rows = tmp_path / "rows.npz"
    write_rows(rows, data, "validation")  # of which no more is read than a few batches
    ours = command(contenders["ours"], config, data, rows, ["training.batch_size=32", *FEW])
    loop = command(contenders["plain loop"], config, data, rows, FEW, python=sys.executable)
    found = in_turn({"ours": [*ours[:-1], "8"], "loop": [*loop[:-1], "1"]}, rounds=2)
    rates = {  # of the less disturbed round
        name: max(one["tokens"] / one["cpu_seconds"] for one in measured)
        for name, measured in found.items()
    }
    assert rates["ours"] > 5 * rates["loop"]
    schedule = Schedule(data.splits["train"], load_experiment(config).mixing, 32, None, 42)
    lengths = data.splits["train"].lengths
    first = [int(lengths[batch].sum()) for batch in schedule.batches(0)]
    assert [one["tokens"] for one in found["ours"]] == [
        sum(first[8 * n : 8 * n + 8]) for n in (1, 2)
    ], "not the tokens of the batches that were trained"


def test_workers_exchange_their_gradients_around_a_ring() -> None:
    machine = Machine(overhead=0.01, speed=1e5, bandwidth=1e9, latency=1e-4)
    assert machine.step(1, 1000, 40_000_000) == pytest.approx(0.01 + 0.01)
    two = machine.step(2, 1000, 40_000_000) - 0.02
    assert two == pytest.approx(0.04 + 2e-4)  # half of it there, half back
    many = machine.step(1000, 1000, 40_000_000) - 0.02
    assert many == pytest.approx(0.08 * 0.999 + 1998e-4)
    crowded = Machine(overhead=0.01, speed=1e5, bandwidth=np.inf, latency=0, cores=2)
    assert crowded.step(4, 1000, 40_000_000) == pytest.approx(2 * 0.02)


def test_every_step_counts_as_full_however_many_workers(
    mtl_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = scaling.load_experiment
    monkeypatch.setattr(scaling, "load_experiment", lambda *given: whole(given[0], given[1] + FEW))
    alone = scaling.mean_tokens(64)
    assert scaling.mean_tokens(64 * 16) == pytest.approx(16 * alone, rel=0.05)
    assert scaling.mean_tokens(64 * 512) == pytest.approx(512 * alone, rel=0.05)


def ends(*_: object) -> None:
    """What a process does that cannot measure."""
    sys.exit(3)


def test_processes_that_cannot_exchange_end_the_measurement(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scaling, "_exchange", ends)
    with pytest.raises(SystemExit, match="ended with 3, 3"):
        scaling.all_reduce()


def test_a_training_that_was_killed_is_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = tmp_path / "python"
    killed.write_text(
        "#!/bin/sh\n"
        'for word in "$@"; do case $word in output_dir=*) folder=${word#output_dir=};; esac; done\n'
        'mkdir "$folder/demo"\n'
        """echo '{"event": "step", "shard": 1}' > "$folder/demo/metrics.jsonl"\n"""
        "sleep 1\nkill -9 $$\n",
        encoding="utf-8",
    )
    killed.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(killed))
    with pytest.raises(SystemExit, match="training ended with -9"):
        corpus_size.measure(tmp_path / "1000.jsonl", 10_000, tmp_path)


@pytest.mark.parametrize("status", ["finished", "failed"])
def test_a_sweep_counts_only_if_every_trial_finished(
    status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object, **__: object) -> None:
        folder = tmp_path / "heads-2"
        folder.mkdir()
        (folder / "summary.json").write_text("{}", encoding="utf-8")
        rows = ["phase,status,seconds", "search,finished,1", f"search,{status},1", "final,failed,1"]
        (folder / "trials.csv").write_text("\n".join(rows), encoding="utf-8")

    monkeypatch.setattr(subprocess, "run", run)
    with nullcontext() if status == "finished" else pytest.raises(SystemExit, match="failed"):
        assert len(frozen_sweep.sweep(2, tmp_path)[1]) == 2


def test_a_slice_of_batches_by_length_is_as_many_as_the_trainer_sorts_at_a_time() -> None:
    (by_length,) = (
        contender
        for contender in COMPARISONS["joint"].contenders.values()
        if "--by-length" in contender.arguments
    )
    lengths = torch.randint(5, 30, (12_800,)).tolist()
    order = get_length_grouped_indices(lengths, 32)  # the Trainer's own
    slices = [
        order[n : n + 32 * by_length.steps] for n in range(0, len(order), 32 * by_length.steps)
    ]
    means = [np.mean([lengths[text] for text in texts]) for texts in slices]
    assert max(means) < 1.05 * min(means)


@pytest.mark.parametrize(
    ("module", "words", "reason"),
    [
        # Peers have a batch size of their own.
        ("benchmarks.train.__main__", ["--batch-size", "16"], "unrecognized arguments"),
        ("weighting", ["--rounds", "1"], "--rounds: at least 2"),
    ],
)
def test_what_could_not_be_compared_is_refused_before_the_work(
    module: str,
    words: list[str],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(HERE.parent)  # scripts have their folder first
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(SystemExit):
        importlib.import_module(module).main()
    assert reason in capsys.readouterr().err


def test_the_peers_named_in_the_table_exist() -> None:
    for comparison in COMPARISONS.values():
        assert set(comparison.asked) <= set(comparison.contenders)
        for contender in comparison.contenders.values():
            assert (HERE / f"{contender.script}.py").is_file()
