"""How much each task counts.

A strategy gets the tasks' normalised losses of one micro-batch and sees to it that gradients
accumulate on the parameters; one that works on gradients rather than losses overrides `backward`.
A new strategy is a class here and a name in `STRATEGIES`; the loop does not change.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mtl_core.config import Experiment


class Weighting(nn.Module):
    def __init__(self, loss_weights: Mapping[str, float]) -> None:
        super().__init__()
        self.loss_weights = dict(loss_weights)

    def combine(self, losses: Mapping[str, Tensor], share: Mapping[str, float]) -> Tensor:
        """One objective from the tasks' losses.

        Args:
            losses: task → () loss of this micro-batch, already divided by the count of the
                whole optimiser step, so that micro-batches and ranks add up to the step's mean.
            share: task → the part of the step that this micro-batch is: they sum to 1 over the
                micro-batches of a rank, or to 0 when the step holds no label of the task. What a
                strategy adds once a step, not once a loss, it multiplies by this.
        """
        raise NotImplementedError

    def backward(self, losses: Mapping[str, Tensor], share: Mapping[str, float]) -> None:
        self.combine(losses, share).backward()  # type: ignore[no-untyped-call]

    def current(self) -> dict[str, float]:
        """The factor each task has now, for the log."""
        return dict(self.loss_weights)


class FixedWeighting(Weighting):
    """Σ w·L with the weights of the experiment file."""

    def combine(self, losses: Mapping[str, Tensor], share: Mapping[str, float]) -> Tensor:
        return torch.stack([self.loss_weights[t] * loss for t, loss in losses.items()]).sum()


class UncertaintyWeighting(Weighting):
    """Σ exp(-s)·L + s/2 with s = log σ² learned per task.

    Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses", CVPR 2018,
    equation 10 for softmax likelihoods. `loss_weight` still multiplies each task's loss. A step
    without a task's labels leaves its s alone.
    """

    def __init__(self, loss_weights: Mapping[str, float]) -> None:
        super().__init__(loss_weights)
        self.log_variance = nn.Parameter(torch.zeros(len(self.loss_weights)))
        """s of each task, in the order of `loss_weights`."""

    def combine(self, losses: Mapping[str, Tensor], share: Mapping[str, float]) -> Tensor:
        terms = []
        for task, s in zip(self.loss_weights, self.log_variance.unbind(), strict=True):
            weighted = self.loss_weights[task] * torch.exp(-s) * losses[task]
            terms.append(weighted + 0.5 * s * share[task])
        return torch.stack(terms).sum()

    def current(self) -> dict[str, float]:
        factors = torch.exp(-self.log_variance.detach()).tolist()
        return {
            task: weight * factor
            for (task, weight), factor in zip(self.loss_weights.items(), factors, strict=True)
        }


STRATEGIES: dict[str, type[Weighting]] = {
    "fixed": FixedWeighting,
    "uncertainty": UncertaintyWeighting,
}


def build_weighting(experiment: Experiment) -> Weighting:
    """The strategy an experiment asks for."""
    loss_weights = {name: task.loss_weight for name, task in experiment.tasks.items()}
    return STRATEGIES[experiment.weighting.strategy](loss_weights)
