"""Training: what a step computes, what a run repeats exactly, and what it leaves alone."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mtl_core.build import build_train_state
from mtl_core.config import Experiment
from mtl_core.data.prepare import Data
from mtl_core.errors import DataError, TrainingError
from mtl_core.evaluation import evaluate
from mtl_core.loop import Event, fit
from mtl_core.runtime import use_bf16
from mtl_core.state import TrainState
from mtl_core.weighting import STRATEGIES
from tests.small_runs import (
    changed,
    data,
    experiment,
    first_gradients,
    in_shards,
    learned,
    train,
    weights,
)

DROPOUT: dict[str, Any] = {"encoder": {"dropout": 0.1}, "tasks": {"dropout": 0.1}}


@pytest.fixture(scope="module")
def bert(tiny_encoders: dict[str, Path]) -> Path:
    return tiny_encoders["bert"]


def of(events: list[Event], kind: str) -> list[dict[str, Any]]:
    return [event.row for event in events if event.kind == kind]


# What a step computes


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_accumulated_batches_make_the_step_of_one_large_batch(strategy: str, bert: Path) -> None:
    sizes = {"batch_size": 24, "epochs": 3}, {"batch_size": 6, "accumulation": 4, "epochs": 3}
    large, parts = (
        experiment(bert, training=size, weighting={"strategy": strategy}) for size in sizes
    )
    gradients, ends = [], []
    for config in (large, parts):
        encoded = data(config, train=24)
        state = build_train_state(config, encoded)
        gradients.append(first_gradients(state))
        events = list(fit(state, encoded, config))
        assert len(of(events, "step")) == state.step == 3
        ends.append(weights(state.model))
    for name in gradients[0]:
        torch.testing.assert_close(gradients[1][name], gradients[0][name], rtol=1e-5, atol=1e-6)
    for name in ends[0]:
        if not name.endswith(".key.bias"):  # has no effect, so its gradient is only rounding
            # Other sums round otherwise: 1.07e-6 was seen once in a thousand elements.
            torch.testing.assert_close(ends[1][name], ends[0][name], rtol=0, atol=2e-6)


def test_a_joint_step_is_one_pass_through_the_encoder_for_all_tasks(bert: Path) -> None:
    config = experiment(bert, mixing={"strategy": "joint"}, training={"epochs": 1})
    encoded = data(config)
    state = build_train_state(config, encoded)
    assert state.optimizer is not None
    labelled: list[set[str]] = []
    state.model.register_forward_pre_hook(
        lambda _, inputs: labelled.append(
            {task for task, found in inputs[0].labelled.items() if len(found.targets)}
        )
    )
    passes = [state.model.encoder.num_passes]
    state.optimizer.register_step_post_hook(
        lambda *_: passes.append(state.model.encoder.num_passes)
    )
    list(fit(state, encoded, config))
    assert state.step > 5
    assert passes == list(range(passes[0], passes[0] + state.step + 1))
    assert labelled == [set(config.tasks)] * state.step


def test_batches_of_so_many_tokens_go_through_every_text_once(bert: Path) -> None:
    config = experiment(bert, training={"epochs": 1, "batch_tokens": 90})
    encoded = data(config)
    split = encoded.splits["train"]
    state = build_train_state(config, encoded)
    masks: list[torch.Tensor] = []
    state.model.register_forward_pre_hook(lambda _, inputs: masks.append(inputs[0].attention_mask))
    list(fit(state, encoded, config))
    tokens = [int(mask.sum()) for mask in masks]
    assert len(tokens) == state.step == math.ceil(len(split.input_ids) / 90)
    assert sum(tokens) == len(split.input_ids)
    assert sum(len(mask) for mask in masks) == len(split)
    even = sum(tokens) / len(tokens)
    assert all(abs(number - even) <= split.lengths.max() for number in tokens)
    assert len({len(mask) for mask in masks}) > 1, "the number of texts a batch varies"


@pytest.mark.parametrize(
    ("precision", "device", "gpu", "avx", "amx", "expected"),
    [
        ("fp32", "cuda", True, True, True, False),
        ("fp32", "cpu", True, True, True, False),
        ("bf16", "cuda", False, False, False, True),
        ("bf16", "cpu", False, False, False, True),
        ("auto", "cuda", True, False, False, True),
        ("auto", "cuda", False, True, True, False),
        ("auto", "cpu", True, False, False, False),
        ("auto", "cpu", False, True, False, True),
        ("auto", "cpu", False, False, True, True),
        ("auto", "cpu", False, True, True, True),
    ],
)
def test_auto_takes_bf16_where_the_hardware_has_it(
    precision: str,
    device: str,
    gpu: bool,
    avx: bool,
    amx: bool,
    expected: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: gpu)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert use_bf16(precision, torch.device(device)) is expected


def test_a_loss_weight_of_zero_silences_a_task(bert: Path) -> None:
    config = experiment(bert, tasks={"loss_weight": 0.0}, training={"epochs": 1})
    encoded = data(config)
    state = build_train_state(config, encoded)
    gradients = first_gradients(state)
    list(fit(state, encoded, config))
    assert gradients
    assert not any(gradient.any() for gradient in gradients.values())


def test_the_gradient_is_clipped_to_the_norm_asked_for(bert: Path) -> None:
    config = experiment(bert, optim={"max_grad_norm": 1e-3}, training={"epochs": 1})
    encoded = data(config)
    state = build_train_state(config, encoded)
    gradients = first_gradients(state)
    list(fit(state, encoded, config))
    norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in gradients.values()))
    assert norm == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize(("accumulation", "strategy"), [(1, "fixed"), (2, "fixed"), (2, "pcgrad")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_before_the_weights_change(
    value: float, accumulation: int, strategy: str, bert: Path
) -> None:
    weighting, training = {"strategy": strategy}, {"accumulation": accumulation}
    config = experiment(bert, training=training, weighting=weighting)
    encoded = data(config)
    state = build_train_state(config, encoded)
    run = fit(state, encoded, config)
    next(run)
    with torch.no_grad():
        state.model.head("mood").output.weight[1, 3] = value
    with pytest.raises(TrainingError, match="the loss of task 'mood' is not finite") as caught:
        list(run)
    assert f"at step {state.step + 1} (epoch {state.epoch + 1})" in str(caught.value)
    bad = {name for name, weight in weights(state.model).items() if not weight.isfinite().all()}
    assert bad == {"heads.mood.output.weight"}


# What a run tells


def test_a_run_tells_losses_speed_and_the_scores_of_every_epoch(bert: Path) -> None:
    config = experiment(bert, training={"epochs": 2})
    state, events = train(config, data(config))
    kinds = [event.kind for event in events]
    assert kinds == ["step", "validation", "checkpoint"] * 2
    for number, row in enumerate(of(events, "step"), start=1):
        assert (row["step"], row["epoch"], row["step_in_epoch"]) == (10 * number, number, 10)
        assert row["tokens_per_second"] > 0
        assert all(0 < row[f"loss/{task}"] < 5 for task in config.tasks)
    for number, row in enumerate(of(events, "validation"), start=1):
        assert (row["step"], row["epoch"]) == (10 * number, number)
        primary = [row[f"validation/{name}"] for name in ("topic/accuracy", "mood/micro_f1")]
        primary.append(row["validation/entities/f1"])
        assert row["score"] == pytest.approx(sum(primary) / 3)
        assert all(row[f"validation/{task}/loss"] > 0 for task in config.tasks)
    assert state.step == 20


def test_the_first_loss_told_is_the_mean_over_labels(bert: Path) -> None:
    config = experiment(bert, training={"epochs": 1, "batch_size": 40})
    encoded = data(config)
    state = build_train_state(config, encoded)
    expected = evaluate(state.model, encoded.splits["train"]).losses
    row = next(fit(state, encoded, config)).row
    for task in config.tasks:
        assert row[f"loss/{task}"] == pytest.approx(expected[task], rel=1e-5)


def test_learned_task_weights_are_told(bert: Path) -> None:
    config = experiment(bert, weighting={"strategy": "uncertainty"}, training={"epochs": 1})
    _, events = train(config, data(config))
    (row,) = of(events, "step")
    assert all(row[f"weight/{task}"] != 1.0 for task in config.tasks)


def test_the_metric_of_one_task_can_pick_the_best_epoch(bert: Path) -> None:
    config = experiment(bert, training={"epochs": 2, "metric": "topic/macro_f1"})
    _, events = train(config, data(config))
    for row in of(events, "validation"):
        assert row["score"] == row["validation/topic/macro_f1"]


def test_the_model_ends_with_the_weights_of_the_best_epoch(bert: Path) -> None:
    config = experiment(bert, optim={"learning_rate": 3e-3})
    encoded = data(config)
    state = build_train_state(config, encoded)
    at_epoch: dict[int, Any] = {}
    for event in fit(state, encoded, config):
        if event.kind == "validation":
            at_epoch[state.epoch] = (event.row["score"], weights(state.model), event.row["best"])
    best = max(at_epoch, key=lambda epoch: at_epoch[epoch][0])
    assert state.best_epoch == best
    assert at_epoch[best][2] is True
    assert not changed(at_epoch[best][1], weights(state.model))


def test_training_stops_when_patience_is_out(bert: Path) -> None:
    # Nothing moves, so that no epoch is better than the first.
    config = experiment(bert, optim={"learning_rate": 1e-30}, training={"patience": 2, "epochs": 9})
    state, events = train(config, data(config))
    assert state.epoch == 3
    assert of(events, "stopped") == [{"epoch": 3, "reason": "no better score for 2 epochs"}]


def test_running_out_of_patience_in_the_last_epoch_is_no_early_stop(bert: Path) -> None:
    config = experiment(bert, optim={"learning_rate": 1e-30}, training={"patience": 2, "epochs": 3})
    _, events = train(config, data(config))
    assert not of(events, "stopped")


# What a run repeats


def test_the_same_seed_gives_the_same_weights_to_the_bit(bert: Path) -> None:
    config = experiment(bert, **DROPOUT)
    encoded = data(config)
    first, _ = train(config, encoded)
    torch.rand(7)
    second, _ = train(config, encoded)
    assert not changed(weights(first.model), weights(second.model))


def test_another_seed_gives_other_weights(bert: Path) -> None:
    config = experiment(bert)
    first, _ = train(config, data(config))
    second, _ = train(config.model_copy(update={"seed": 8}), data(config))
    trained = {n for n in weights(first.model) if ".pooler." not in n}
    assert changed(weights(first.model), weights(second.model)) >= {
        n for n in trained if n.endswith("weight") and "embeddings" not in n
    }


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "unfreezing": {"freeze": {"unfreeze_every": 1}},
    "temperature": {"mixing": {"strategy": "temperature"}},
    "dwa": {"weighting": {"strategy": "dwa", "gradient_cosines": 2}},
    "rlw": {"weighting": {"strategy": "rlw"}},
    "pcgrad": {"weighting": {"strategy": "pcgrad"}},
    "shards": {},
}


@dataclass
class Undisturbed:
    """A run that saved its state after every step."""

    config: Experiment
    encoded: Data
    state: TrainState
    told: list[Event]
    folder: Path


@pytest.fixture(scope="module", params=VARIANTS)
def undisturbed(
    request: pytest.FixtureRequest, bert: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Undisturbed]:
    folder = tmp_path_factory.mktemp("undisturbed")
    changes = {**DROPOUT, **VARIANTS[request.param]}
    rates, training = {"learning_rate": 2e-3}, {"checkpoint_every": 1, "epochs": 3}
    config = experiment(bert, training=training, optim=rates, **changes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MTL_CACHE", str(folder / "cache"))
        if request.param == "shards":
            config, encoded = in_shards(folder, config, 14)
        else:
            encoded = data(config)
        state = build_train_state(config, encoded)
        told = list(save_each(state, encoded, config, folder))
        yield Undisturbed(config, encoded, state, told, folder)


def save_each(
    state: TrainState, encoded: Data, config: Experiment, folder: Path
) -> Iterator[Event]:
    """Pass a run's events on, saving the state whenever a checkpoint is due."""
    for event in fit(state, encoded, config):
        if event.kind == "checkpoint":
            (folder / str(state.step)).mkdir()
            state.save(folder / str(state.step))
        yield event


@pytest.mark.parametrize("step", [3, 10, 17, 30], ids="after step {}".format)
def test_a_resumed_run_ends_with_the_same_weights_to_the_bit(
    step: int, undisturbed: Undisturbed
) -> None:
    torch.rand(step)  # the generator stands elsewhere, as in a new process
    resumed = build_train_state(undisturbed.config, undisturbed.encoded)
    resumed.load(undisturbed.folder / str(step))
    validations = of(undisturbed.told, "validation")
    epochs = sum(row["step"] <= step for row in validations)
    assert (resumed.step, resumed.epoch) == (step, epochs)
    rest = list(fit(resumed, undisturbed.encoded, undisturbed.config))

    expected = undisturbed.state
    assert resumed.step == expected.step
    assert not changed(weights(expected.model), weights(resumed.model))
    assert (resumed.best_epoch, resumed.best_score) == (expected.best_epoch, expected.best_score)
    assert of(rest, "validation") == validations[epochs:]


# Corpora in shards


@pytest.fixture
def sharded(bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Experiment, Data]:
    """50 texts in four shards of four steps, or three."""
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / "cache"))
    rates = {"learning_rate": 2e-3, "warmup": 0.0}
    training = {"checkpoint_every": 1, "epochs": 2}
    return in_shards(tmp_path, experiment(bert, training=training, optim=rates, **DROPOUT), 14)


def test_every_epoch_goes_through_the_texts_of_all_shards_once(
    sharded: tuple[Experiment, Data],
) -> None:
    config, encoded = sharded
    state = build_train_state(config, encoded)
    seen: list[int] = []
    state.model.register_forward_pre_hook(
        lambda _, inputs: (
            seen.extend(map(hash, map(str, inputs[0].input_ids.tolist())))
            if state.model.training
            else None
        )
    )
    events = list(fit(state, encoded, config))
    shards = of(events, "shard")
    assert [row["shard"] for row in shards] == [1, 2, 3, 4] * 2
    assert sum(row["texts"] for row in shards) == 2 * 50
    assert len(seen) == 2 * 50
    steps = [sum(math.ceil(row["texts"] / 4) for row in half) for half in (shards[:4], shards[4:])]
    assert state.step == sum(steps)
    assert [row["step"] for row in of(events, "validation")] == [steps[0], sum(steps)]


def test_rates_fall_and_epochs_count_evenly_through_shards(
    sharded: tuple[Experiment, Data],
) -> None:
    config, encoded = sharded
    events = list(fit(build_train_state(config, encoded), encoded, config))
    rates = [row["learning_rate"] for row in of(events, "step")]
    places = [row["epoch"] for row in of(events, "step")]
    assert places == sorted(set(places))
    assert places[-1] == 2.0
    for rate, place in zip(rates, places, strict=True):
        assert rate == pytest.approx(2e-3 * (1 - place / 2), abs=1e-4)


def test_a_row_that_cannot_be_read_stops_the_run_at_its_shard(
    sharded: tuple[Experiment, Data], tmp_path: Path
) -> None:
    config, encoded = sharded
    assert encoded.shards is not None
    last = encoded.shards.share(3)[0][0]
    path = tmp_path / "train.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    lines[last] = "x" * (len(lines[last]) - 1) + "\n"
    path.write_text("".join(lines), encoding="utf-8")
    events = fit(build_train_state(config, encoded), encoded, config)
    with pytest.raises(DataError, match=rf"train\.jsonl:{last + 1}: no valid JSON"):
        list(events)


def test_best_weights_and_patience_survive_a_resume(bert: Path, tmp_path: Path) -> None:
    # The rate is so high that later epochs are worse than the first.
    config = experiment(
        bert,
        optim={"learning_rate": 0.3, "warmup": 0.0, "schedule": "constant"},
        training={"checkpoint_every": 3, "patience": 2, "epochs": 9},
    )
    encoded = data(config)
    state = build_train_state(config, encoded)
    state.update_best(2.0)  # no epoch reaches this
    best = weights(state.model)
    told = list(save_each(state, encoded, config, tmp_path))
    assert state.epoch == 2
    assert of(told, "stopped")

    resumed = build_train_state(config, encoded)
    resumed.load(tmp_path / "12")
    assert changed(best, weights(resumed.model))
    rest = list(fit(resumed, encoded, config))
    assert of(rest, "stopped") == of(told, "stopped")
    assert resumed.step == state.step
    assert not changed(best, weights(resumed.model))


RESUME = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from mtl_core.config import load_experiment
from mtl_core.loop import fit
from tests.small_runs import build_train_state, data, weights

folder = Path(sys.argv[1])
config = load_experiment(folder / "experiment.yaml")
encoded = data(config)
state = build_train_state(config, encoded)
state.load(folder / "15")
list(fit(state, encoded, config))
save_file(weights(state.model), folder / "end.safetensors")
"""


@pytest.mark.slow
def test_another_process_resumes_to_the_same_bit(bert: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from mtl_core.config import dump_experiment

    config = experiment(bert, training={"checkpoint_every": 3}, **DROPOUT)
    encoded = data(config)
    state = build_train_state(config, encoded)
    list(save_each(state, encoded, config, tmp_path))
    (tmp_path / "experiment.yaml").write_text(dump_experiment(config), encoding="utf-8")
    root = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", RESUME, str(tmp_path)], cwd=root, check=True)
    assert not changed(weights(state.model), load_file(tmp_path / "end.safetensors"))


# What a run leaves alone


def test_nothing_is_trained_when_everything_is_frozen(bert: Path) -> None:
    config = experiment(bert, freeze={"encoder": True, "heads": ["topic", "mood", "entities"]})
    encoded = data(config)
    state = build_train_state(config, encoded)
    before = weights(state.model)
    assert list(fit(state, encoded, config)) == []
    assert not changed(before, weights(state.model))


def test_a_frozen_head_keeps_its_weights_while_the_rest_learns(bert: Path) -> None:
    config = experiment(bert, freeze={"heads": ["mood"]}, training={"epochs": 1})
    encoded = data(config)
    state = build_train_state(config, encoded)
    before = weights(state.model)
    list(fit(state, encoded, config))
    moved = changed(before, weights(state.model))
    assert {"heads.topic.output.weight", "heads.entities.output.weight"} <= moved
    assert not any(name.startswith("heads.mood.") for name in moved)


@pytest.mark.parametrize("epochs", [1, 5])
def test_a_frozen_encoder_keeps_its_bytes_and_reads_every_text_once(
    epochs: int, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTL_CACHE", str(tmp_path))
    config = experiment(bert, freeze={"encoder": True}, training={"epochs": epochs}, **DROPOUT)
    encoded = data(config)
    state = build_train_state(config, encoded)
    before = weights(state.model)
    passes = state.model.encoder.num_passes
    list(fit(state, encoded, config))
    moved = changed(before, weights(state.model))
    assert moved == {name for name in before if name.startswith("heads.")}
    # Per split one batch that fills the cache; and the check that the encoder splits cleanly.
    assert state.model.encoder.num_passes - passes == 2 + 2
    again = build_train_state(config, encoded)
    list(fit(again, encoded, config))
    assert again.model.encoder.num_passes == 2
    assert not changed(weights(state.model), weights(again.model))


def test_states_that_were_cut_off_on_disk_are_computed_again(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTL_CACHE", str(tmp_path))
    config = experiment(bert, freeze={"encoder": True}, training={"epochs": 1})
    encoded = data(config)
    first, _ = train(config, encoded)
    for path in (tmp_path / "features").glob("*.npy"):
        os.truncate(path, path.stat().st_size - 1)
    again, _ = train(config, encoded)
    assert again.model.encoder.num_passes == first.model.encoder.num_passes
    assert not changed(weights(first.model), weights(again.model))


USUAL, UNUSUAL = ["bert", "distilbert", "roberta", "deberta-v2", "mpnet"], ["albert", "modernbert"]


@pytest.mark.parametrize(
    ("name", "freeze"),
    [(name, {"encoder": True}) for name in USUAL + UNUSUAL]
    + [(name, {"layers": 2}) for name in USUAL],
)
def test_cached_features_train_what_the_whole_encoder_trains(
    freeze: dict[str, Any],
    name: str,
    tiny_encoders: dict[str, Path],
    unusual_encoders: dict[str, Path],
) -> None:
    folder = (tiny_encoders | unusual_encoders)[name]
    ends, passes = [], []
    for cached in (True, False):
        config = experiment(folder, freeze=freeze, training={"feature_cache": cached, "epochs": 1})
        encoded = data(config)
        state = build_train_state(config, encoded)
        gradients = first_gradients(state)
        events = list(fit(state, encoded, config))
        assert bool(of(events, "features")) == cached
        ends.append(gradients)
        passes.append(state.model.encoder.num_passes)
    assert passes[0] < passes[1]
    for parameter, gradient in ends[1].items():
        torch.testing.assert_close(ends[0][parameter], gradient, rtol=1e-4, atol=1e-6)


def test_gradual_unfreezing_frees_one_more_layer_each_time(bert: Path) -> None:
    config = experiment(bert, freeze={"unfreeze_every": 2}, training={"epochs": 8})
    encoded = data(config)
    state = build_train_state(config, encoded)
    before = weights(state.model)
    moved: dict[int, set[str]] = {}
    for event in fit(state, encoded, config):
        if event.kind == "validation":
            moved[state.epoch] = changed(before, weights(state.model))
            before = weights(state.model)
    parts = ["embeddings", *(f"encoder.layer.{depth}." for depth in range(3))]
    for epoch in range(1, 9):
        free = {0: [], 1: parts[3:], 2: parts[2:], 3: parts}[(epoch - 1) // 2]
        expected = {
            name
            for name in before
            if name.startswith("heads.") or any(f"transformer.{part}" in name for part in free)
        }
        assert moved[epoch] - UNMOVED == expected - UNMOVED, epoch


UNMOVED = {"encoder.transformer.embeddings.token_type_embeddings.weight"} | {
    f"encoder.transformer.encoder.layer.{depth}.attention.self.key.bias" for depth in range(3)
}
"""Moved by rounding only, or not at all."""


def test_epochs_in_which_nothing_is_free_yet_only_validate(bert: Path) -> None:
    config = experiment(bert, freeze={"unfreeze_every": 1, "heads": ["topic", "mood", "entities"]})
    encoded = data(config)
    state, events = train(config, encoded)
    assert [event.kind for event in events[:2]] == ["validation", "checkpoint"]
    assert state.step == 30


# Whether it learns


@pytest.mark.parametrize("name", ["albert", "modernbert", "gemma3"])
def test_unusual_architectures_learn_in_all_their_parts(
    unusual_encoders: dict[str, Path], name: str
) -> None:
    config = experiment(unusual_encoders[name], training={"epochs": 1})
    encoded = data(config)
    state = build_train_state(config, encoded)
    before = weights(state.model)
    list(fit(state, encoded, config))
    still = set(before) - changed(before, weights(state.model))
    assert {parameter.removeprefix("encoder.transformer.") for parameter in still} <= {
        *("pooler.weight", "pooler.bias", "embeddings.token_type_embeddings.weight"),
        "encoder.albert_layer_groups.0.albert_layers.0.attention.key.bias",
    }


def test_a_tiny_model_learns_32_texts_by_heart(bert: Path) -> None:
    _, _, events = learned(bert)
    best = max(of(events, "validation"), key=lambda row: float(row["score"]))
    assert best["validation/topic/accuracy"] == 1.0
    assert best["validation/mood/micro_f1"] > 0.98
    assert best["validation/entities/f1"] > 0.98


GROWTH = """
import sys
import torch
from mtl_core.runtime import bound_kernel_caches

def memory():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))

if sys.argv[1] == "bounded":
    bound_kernel_caches()
layer = torch.nn.Linear(64, 64)
before = memory()
with torch.autocast("cpu", torch.bfloat16):
    for rows in range(32, 632):
        layer(torch.randn(rows, 64)).sum().backward()
print(memory() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
@pytest.mark.skipif(not use_bf16("auto", torch.device("cpu")), reason="no bf16 on this CPU")
def test_memory_does_not_grow_with_the_shapes_of_batches() -> None:
    ours = ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    free, bounded = (
        int(
            subprocess.check_output(
                [sys.executable, "-c", GROWTH, how],
                cwd=Path(__file__).parents[1],
                env=environment,
            )
        )
        for how in ("free", "bounded")
    )
    assert bounded < free / 3
