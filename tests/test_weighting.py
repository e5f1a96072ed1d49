"""Objectives over tasks: fixed weights, and the formula of Kendall, Gal and Cipolla."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mtl_core.config import parse_experiment
from mtl_core.weighting import FixedWeighting, UncertaintyWeighting, build_weighting

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


@pytest.mark.parametrize(
    ("strategy", "kind"), [("fixed", FixedWeighting), ("uncertainty", UncertaintyWeighting)]
)
def test_an_experiment_names_its_strategy(strategy: str, kind: Any) -> None:
    experiment = parse_experiment(
        {
            "name": "x",
            "tasks": {
                "sentiment": {"kind": "classification", "loss_weight": 0.25},
                "entities": {"kind": "token_classification"},
            },
            "data": [{"demo": True}],
            "weighting": {"strategy": strategy},
        }
    )
    weighting = build_weighting(experiment)
    assert type(weighting) is kind
    assert weighting.loss_weights == {"sentiment": 0.25, "entities": 1.0}
