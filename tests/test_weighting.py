"""Strategies over tasks against the formulas of the papers they come from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from mtl_core import loop
from mtl_core.build import build_train_state
from mtl_core.config import Experiment, WeightingConfig, parse_experiment
from mtl_core.data.examples import Corpus
from mtl_core.data.prepare import Data, encode
from mtl_core.gradients import TaskGradients, cosines, pcgrad_coefficients
from mtl_core.loop import Event, fit
from mtl_core.weighting import (
    STRATEGIES,
    DynamicWeightAveraging,
    FixedWeighting,
    RandomLossWeighting,
    Step,
    UncertaintyWeighting,
    Weighting,
    build_weighting,
)
from mtl_core.world import World
from tests.small_runs import (
    LABELS,
    changed,
    data,
    example,
    experiment,
    first_gradients,
    train,
    weights,
)

Vector = NDArray[np.float64]

LOSSES = {"a": 2.5, "b": 0.3}
WHOLE = {"a": 1.0, "b": 1.0}


def tensors(losses: dict[str, float], requires_grad: bool = False) -> dict[str, torch.Tensor]:
    return {task: torch.tensor(v, requires_grad=requires_grad) for task, v in losses.items()}


def test_fixed_weights_multiply_the_losses() -> None:
    weighting = FixedWeighting({"a": 0.5, "b": 2.0})
    losses = tensors(LOSSES, requires_grad=True)
    weighting.backward(losses, WHOLE)
    assert weighting.combine(losses, WHOLE).item() == pytest.approx(0.5 * 2.5 + 2.0 * 0.3)
    assert [loss.grad.item() for loss in losses.values() if loss.grad is not None] == [0.5, 2.0]
    assert weighting.current() == {"a": 0.5, "b": 2.0}
    assert weighting.report() == {}
    assert not list(weighting.parameters())


def test_the_uncertainty_objective_is_that_of_the_paper() -> None:
    weighting = UncertaintyWeighting({"a": 1.0, "b": 1.0})
    sigma = {"a": 1.7, "b": 0.4}
    with torch.no_grad():
        values = [math.log(value**2) for value in sigma.values()]
        weighting.log_variance.copy_(torch.tensor(values))
    # Equation 10: L / sigma² + log sigma for every softmax likelihood.
    expected = sum(LOSSES[task] / sigma[task] ** 2 + math.log(sigma[task]) for task in LOSSES)
    assert float(weighting.combine(tensors(LOSSES), WHOLE).detach()) == pytest.approx(expected)
    current = weighting.current()
    assert current == pytest.approx({task: 1 / s**2 for task, s in sigma.items()})


def test_weights_start_where_fixed_weights_stand() -> None:
    loss_weights = {"a": 0.5, "b": 2.0}
    assert UncertaintyWeighting(loss_weights).current() == loss_weights


def test_descent_brings_each_variance_to_twice_its_loss() -> None:
    weighting = UncertaintyWeighting({"a": 1.0, "b": 3.0})
    optimizer = torch.optim.SGD(weighting.parameters(), lr=0.2)
    for _ in range(400):
        optimizer.zero_grad()
        weighting.backward(tensors(LOSSES), WHOLE)
        optimizer.step()
    # d/ds (w·L·exp(-s) + s/2) = 0 at s = log(2·w·L).
    expected = [math.log(2 * 2.5), math.log(2 * 3 * 0.3)]
    assert weighting.log_variance.tolist() == pytest.approx(expected, abs=1e-3)


def test_micro_batches_add_up_to_one_step() -> None:
    def gradients(parts: int) -> list[float]:
        weighting = UncertaintyWeighting({"a": 1.0, "b": 1.0})
        for _ in range(parts):
            losses = {task: torch.tensor(value / parts) for task, value in LOSSES.items()}
            weighting.backward(losses, {task: 1 / parts for task in LOSSES})
        assert weighting.log_variance.grad is not None
        return list(weighting.log_variance.grad.tolist())

    assert gradients(4) == pytest.approx(gradients(1))
    assert len(gradients(1)) == 2


def test_a_task_without_labels_in_a_step_keeps_its_variance() -> None:
    weighting = UncertaintyWeighting({"a": 1.0, "b": 1.0})
    weighting.backward(tensors({"a": 2.5, "b": 0.0}), {"a": 1.0, "b": 0.0})
    assert weighting.log_variance.grad is not None
    assert weighting.log_variance.grad.tolist() == pytest.approx([0.5 - 2.5, 0.0])


@pytest.mark.parametrize(("strategy", "kind"), STRATEGIES.items())
def test_an_experiment_names_its_strategy(strategy: str, kind: Any) -> None:
    experiment = parse_experiment(
        {
            "name": "x",
            "tasks": {
                "sentiment": {"kind": "classification", "loss_weight": 0.25},
                "entities": {"kind": "token_classification"},
            },
            "data": [{"demo": True}],
            "weighting": {"strategy": strategy, "temperature": 3.0},
        }
    )
    weighting = build_weighting(experiment)
    assert type(weighting) is kind
    assert weighting.current() == weighting.loss_weights == {"sentiment": 0.25, "entities": 1.0}
    assert weighting.config.temperature == 3.0


# Dynamic weight averaging


def told(events: list[Event], kind: str = "step") -> list[dict[str, Any]]:
    return [event.row for event in events if event.kind == kind]


def vector(row: dict[str, Any], prefix: str) -> Vector:
    return np.array([row[f"{prefix}/{task}"] for task in LABELS])


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_dwa_weighs_by_the_rates_of_the_losses_that_were_told(
    temperature: float, tiny_encoders: dict[str, Path]
) -> None:
    weights = {"topic": 0.5, "mood": 1.0, "entities": 3.0}
    config = weighed(
        experiment(
            tiny_encoders["bert"],
            optim={"learning_rate": 2e-3},
            weighting={"strategy": "dwa", "temperature": temperature},
        ),
        weights,
    )
    _, events = train(config, data(config))
    rows = told(events)
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]  # so each row tells an epoch's means
    losses = [vector(row, "loss") for row in rows]
    given = [vector(row, "weight") / np.array(list(weights.values())) for row in rows]
    np.testing.assert_allclose(given[:2], 1.0, rtol=1e-6)
    for epoch in (2, 3):
        # Equation 7 of the paper.
        raised = np.exp(losses[epoch - 1] / losses[epoch - 2] / temperature)
        np.testing.assert_allclose(given[epoch], 3 * raised / raised.sum(), rtol=1e-5)
        assert given[epoch].max() > 1.001
        assert given[epoch].sum() == pytest.approx(3)


def epoch_of(weighting: Weighting, losses: dict[str, float], counts: dict[str, int]) -> None:
    weighting.begin_step(Step(0, 0, counts), nn.Module(), nn.Module())
    weighting.backward(tensors(losses, requires_grad=True), WHOLE)
    weighting.finish_step(World())
    weighting.end_epoch()


def test_dwa_has_no_rate_of_a_task_that_an_epoch_does_not_hold() -> None:
    weighting = DynamicWeightAveraging({"a": 1.0, "b": 1.0})
    for counts in ({"a": 4, "b": 2}, {"a": 4, "b": 0}, {"a": 4, "b": 2}):
        epoch_of(weighting, {"a": 1.0, "b": 1.0 * (counts["b"] > 0)}, counts)
        assert weighting.current() == pytest.approx({"a": 1.0, "b": 1.0})
    epoch_of(weighting, {"a": 1.0, "b": 0.5}, {"a": 4, "b": 2})
    softmax = np.exp([1 / 2, 0.5 / 2]) / np.exp([1 / 2, 0.5 / 2]).sum()
    expected = dict(zip("ab", 2 * softmax, strict=True))
    assert weighting.current() == pytest.approx(expected, rel=1e-6)


# Random loss weighting


def drawn(weighting: Weighting, seed: int, number: int) -> list[float]:
    weighting.begin_step(Step(seed, number, {"a": 1, "b": 1}), nn.Module(), nn.Module())
    return list(weighting.current().values())


def test_random_weights_are_the_softmax_of_normal_numbers() -> None:
    weighting = RandomLossWeighting({"a": 1.0, "b": 1.0})
    draws = np.array([drawn(weighting, 7, number) for number in range(4000)])
    np.testing.assert_allclose(draws.sum(axis=1), 2.0)
    # The log of the ratio of two softmax terms is the difference of two normal numbers.
    difference = np.log(draws[:, 0] / draws[:, 1])
    assert difference.mean() == pytest.approx(0, abs=0.1)
    assert difference.var() == pytest.approx(2, rel=0.1)
    assert abs(np.corrcoef(difference[1:], difference[:-1])[0, 1]) < 0.05


def test_random_weights_are_a_function_of_seed_and_step() -> None:
    one, other = (RandomLossWeighting({"a": 1.0, "b": 1.0}) for _ in range(2))
    drawn(other, 7, 1)
    assert drawn(one, 7, 2) == drawn(other, 7, 2) != drawn(one, 7, 3) != drawn(one, 8, 3)


def test_random_weights_multiply_loss_weights_in_every_micro_batch() -> None:
    plain, scaled = RandomLossWeighting({"a": 1, "b": 1}), RandomLossWeighting({"a": 0.5, "b": 2})
    factors = drawn(plain, 7, 0)
    assert drawn(scaled, 7, 0) == pytest.approx([0.5 * factors[0], 2 * factors[1]])
    for _ in range(2):
        total = scaled.combine(tensors(LOSSES), WHOLE).item()
        assert total == pytest.approx(0.5 * factors[0] * 2.5 + 2 * factors[1] * 0.3)


# Gradient surgery and cosines


def projected(gradients: Sequence[Vector], random: np.random.Generator) -> Vector:
    """Algorithm 1 of the paper, on the vectors themselves."""
    total = np.zeros_like(gradients[0])
    for i, gradient in enumerate(gradients):
        mine = gradient.copy()
        for j in random.permutation([j for j in range(len(gradients)) if j != i]):
            along = mine @ gradients[j]
            if along < 0:
                mine -= along / (gradients[j] @ gradients[j]) * gradients[j]
        total += mine
    return total


@pytest.mark.parametrize("num_tasks", [1, 2, 5])
def test_surgery_by_inner_products_is_that_on_the_vectors(num_tasks: int) -> None:
    gradients = np.random.default_rng(num_tasks).normal(size=(num_tasks, 6))
    gram = gradients @ gradients.T
    factors = pcgrad_coefficients(gram, np.random.default_rng(3))
    expected = projected(list(gradients), np.random.default_rng(3))
    np.testing.assert_allclose(factors @ gradients, expected, rtol=1e-9)
    if num_tasks == 5:
        assert (gram < 0).any()
        others = [pcgrad_coefficients(gram, np.random.default_rng(seed)) for seed in range(9)]
        assert len({tuple(other.round(9)) for other in others}) > 1


def test_of_two_conflicting_gradients_neither_is_worked_against() -> None:
    gradients = np.array([[1.0, 0.0], [-4.0, 1.0]])
    gram, random = gradients @ gradients.T, np.random.default_rng(0)
    assert (gradients.sum(axis=0) @ gradients.T).min() < 0
    total = pcgrad_coefficients(gram, random) @ gradients
    assert (total @ gradients.T).min() >= 0
    np.testing.assert_allclose(total, projected(list(gradients), random))


def test_gradients_without_conflict_are_summed() -> None:
    for gradients in ([[1.0, 0.0], [2.0, 1.0]], [[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, 0.0]]):
        gram = np.array(gradients) @ np.array(gradients).T
        assert pcgrad_coefficients(gram, np.random.default_rng(0)).tolist() == [1.0, 1.0]


def weighed(config: Experiment, weights: dict[str, float]) -> Experiment:
    tasks = {
        name: task.model_copy(update={"loss_weight": weights[name]})
        for name, task in config.tasks.items()
    }
    return config.model_copy(update={"tasks": tasks})


def first_step(config: Experiment, encoded: Data) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The gradients that the first step ends with, and what is told of the first steps."""
    state = build_train_state(config, encoded)
    gradients = first_gradients(state)
    row = next(event.row for event in fit(state, encoded, config) if event.kind == "step")
    return gradients, row


def flat(gradients: dict[str, Tensor]) -> Vector:
    """The encoder's part as one vector."""
    parts = [g.double().flatten() for name, g in gradients.items() if name.startswith("encoder.")]
    return torch.cat(parts).numpy()


WEIGHTS = {"topic": 0.5, "mood": 1.0, "entities": 3.0}
ONE_STEP = {"epochs": 1, "batch_size": 10, "accumulation": 4}


def by_task(config: Experiment, encoded: Data) -> list[Vector]:
    """Each task's gradient: that of fixed weights which silence the others."""
    silent = dict.fromkeys(WEIGHTS, 0.0)
    return [
        flat(first_step(weighed(config, {**silent, task: weight}), encoded)[0])
        for task, weight in WEIGHTS.items()
    ]


def test_pcgrad_projects_the_gradients_of_the_whole_step(tiny_encoders: dict[str, Path]) -> None:
    for seed in range(20):  # until heads are drawn that disagree
        fixed = weighed(experiment(tiny_encoders["bert"], training=ONE_STEP, seed=seed), WEIGHTS)
        encoded = data(fixed)
        parts = by_task(fixed, encoded)
        if np.corrcoef(parts).min() < -0.02:
            break
    strategy = WeightingConfig(strategy="pcgrad")
    found, _ = first_step(fixed.model_copy(update={"weighting": strategy}), encoded)
    summed, _ = first_step(fixed, encoded)
    expected = projected(parts, Step(fixed.seed, 0, {}).random())
    size = np.linalg.norm(expected)
    assert np.linalg.norm(flat(found) - expected) < 1e-5 * size
    assert np.linalg.norm(flat(summed) - expected) > 5e-3 * size
    assert found.keys() == summed.keys()
    for name in found:
        if name.startswith("heads."):
            torch.testing.assert_close(found[name], summed[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_cosines_are_those_of_the_gradients_of_the_whole_step(
    strategy: str, tiny_encoders: dict[str, Path]
) -> None:
    fixed = weighed(experiment(tiny_encoders["bert"], training=ONE_STEP), WEIGHTS)
    encoded = data(fixed)
    a, b, c = (part / np.linalg.norm(part) for part in by_task(fixed, encoded))
    asked = WeightingConfig.model_validate({"strategy": strategy, "gradient_cosines": 1})
    _, row = first_step(fixed.model_copy(update={"weighting": asked}), encoded)
    expected = {"topic/mood": a @ b, "topic/entities": a @ c, "mood/entities": b @ c}
    for pair, cosine in expected.items():
        assert row[f"cosine/{pair}"] == pytest.approx(cosine, abs=1e-5)


@pytest.mark.parametrize("strategy", ["fixed", "pcgrad"])
def test_measuring_cosines_changes_nothing(strategy: str, tiny_encoders: dict[str, Path]) -> None:
    ends = []
    for every in (None, 2):
        config = experiment(
            tiny_encoders["bert"],
            training={"epochs": 1, "accumulation": 2},
            tasks={"dropout": 0.1},
            weighting={"strategy": strategy, "gradient_cosines": every},
        )
        state, events = train(config, data(config))
        ends.append(weights(state.model))
        assert any(key.startswith("cosine/") for key in told(events)[-1]) == (every is not None)
    assert not changed(*ends)


def test_where_nothing_learns_ranks_have_nothing_to_exchange() -> None:
    gradients = TaskGradients()
    gradients.begin([], ["a", "b"])
    gradients.reduce(World(rank=0, size=2))  # and there is no second one
    assert cosines(gradients.tasks, gradients.gram()) == {}


class Unequal(World):
    """Stands for two ranks of which the other has three times what this one has."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor.mul_(4)


def test_the_rows_of_a_step_are_the_means_over_ranks() -> None:
    parameter = nn.Parameter(torch.tensor([1.0, 2.0]))
    gradients = TaskGradients()
    gradients.begin([parameter], ["a", "b"])
    gradients.add({"a": 3 * parameter[0], "b": parameter.sum()}, keep_graph=False)
    gradients.reduce(Unequal(rank=0, size=2))
    assert gradients.rows.tolist() == [[6, 0], [2, 2]]


@pytest.mark.parametrize("norms", [[1, 0], [0, 1]])
def test_a_task_without_a_gradient_has_no_cosine(norms: list[float]) -> None:
    assert cosines(["a", "b"], np.diag(norms).astype(float)) == {}


def test_an_event_tells_the_mean_over_the_steps_that_were_asked_for(
    tiny_encoders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(every: int) -> list[dict[str, Any]]:
        asked = {"gradient_cosines": every}
        config = experiment(tiny_encoders["bert"], training={"epochs": 2}, weighting=asked)
        return told(train(config, data(config))[1])

    seldom = rows(5)
    monkeypatch.setattr(loop, "LOG_EVERY", 1)
    each = {row["step"]: row for row in rows(1)}
    assert len(each) == 20
    for row in seldom:
        asked = [each[row["step"] - 5], each[row["step"]]]
        values = [step[pair] for step in asked if (pair := "cosine/topic/mood") in step]
        assert row["cosine/topic/mood"] == pytest.approx(np.mean(values))


def disjoint(config: Experiment) -> Data:
    """Every text labels one task, topic or entities."""
    train = [example(i, {"topic"} if i % 2 else {"entities"}) for i in range(40)]
    return encode(Corpus({"train": train, "validation": train}, {}, {}), config, LABELS)


@pytest.mark.parametrize("strategy", ["fixed", "pcgrad"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_step_of_one_task_has_no_cosine_and_no_conflict(
    accumulation: int, strategy: str, tiny_encoders: dict[str, Path]
) -> None:
    config = experiment(
        tiny_encoders["bert"],
        training={"epochs": 1, "accumulation": accumulation},
        mixing={"strategy": "round_robin"},
        weighting={"strategy": strategy, "gradient_cosines": 1},
    )
    state, events = train(config, encoded := disjoint(config))
    pairs = {key for row in told(events) for key in row if key.startswith("cosine/")}
    assert pairs == ({"cosine/topic/entities"} if accumulation == 2 else set())
    if accumulation == 1:
        plain = config.model_copy(update={"weighting": WeightingConfig()})
        ours, theirs = weights(state.model), weights(train(plain, encoded)[0].model)
        for name in ours:
            if not name.endswith(".key.bias"):  # has no effect, so its gradient is only rounding
                torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("freeze", [{"encoder": True}, {"encoder": True, "heads": ["mood"]}])
def test_pcgrad_over_a_frozen_encoder_is_fixed_weighting(
    freeze: dict[str, Any], tiny_encoders: dict[str, Path]
) -> None:
    ends = []
    for strategy in ("fixed", "pcgrad"):
        config = experiment(
            tiny_encoders["bert"],
            training={"epochs": 2},
            freeze=freeze,
            weighting={"strategy": strategy, "gradient_cosines": 1},
        )
        state, events = train(config, data(config))
        assert not any(key.startswith("cosine/") for row in told(events) for key in row)
        ends.append(weights(state.model))
    for name in ends[0]:
        torch.testing.assert_close(ends[1][name], ends[0][name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("strategy", ["dwa", "rlw", "pcgrad"])
def test_strategies_work_in_bf16(strategy: str, tiny_encoders: dict[str, Path]) -> None:
    config = experiment(
        tiny_encoders["bert"],
        training={"precision": "bf16", "epochs": 3},
        optim={"learning_rate": 2e-3},
        weighting={"strategy": strategy, "gradient_cosines": 5},
    )
    _, events = train(config, data(config))
    rows = told(events)
    assert vector(rows[-1], "loss").sum() < vector(rows[0], "loss").sum()
    assert all(abs(rows[-1][f"cosine/{pair}"]) <= 1 for pair in ("topic/mood", "mood/entities"))
    assert (
        next(iter(build_train_state(config, data(config)).model.parameters())).dtype
        == torch.float32
    )


def test_one_pass_through_the_encoder_a_micro_batch(tiny_encoders: dict[str, Path]) -> None:
    passes = []
    for strategy in ("fixed", "pcgrad"):
        config = experiment(
            tiny_encoders["bert"], weighting={"strategy": strategy, "gradient_cosines": 1}
        )
        state, _ = train(config, data(config))
        passes.append(state.model.encoder.num_passes)
    assert passes[0] == passes[1]
