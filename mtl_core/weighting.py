"""How much each task counts.

The loop calls `begin_step`, then `backward` with the tasks' losses of each micro-batch, then
`finish_step`, after which the parameters hold the gradient of the whole step; and `end_epoch` when
an epoch is through. Most strategies only say how losses become one: `combine`. What a strategy
remembers from step to step stands in its parameters and buffers, which checkpoints keep.
A new strategy is a class here and a name in `STRATEGIES`; the loop does not change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from mtl_core.config import Experiment, WeightingConfig
from mtl_core.gradients import TaskGradients, cosines, pcgrad_coefficients
from mtl_core.world import World


@dataclass(frozen=True)
class Step:
    """An optimiser step, the same on every rank."""

    seed: int
    number: int
    """Steps that the run has behind it."""
    counts: Mapping[str, int]
    """Task → labels in the whole step."""

    @property
    def present(self) -> list[str]:
        """Tasks that have labels in this step."""
        return [task for task, count in self.counts.items() if count]

    def random(self) -> np.random.Generator:
        """The same numbers on every rank and in a resumed run, and none that dropout draws."""
        seeds = np.random.SeedSequence([self.seed, self.number], spawn_key=(1,))
        return np.random.default_rng(seeds)


class Weighting(nn.Module):
    varies: ClassVar[bool] = True
    """Whether the factors change in a run, so that they are worth telling."""
    reduces_gradients: ClassVar[bool] = False
    """Whether `finish_step` averages gradients over ranks; else the loop does."""

    def __init__(
        self, loss_weights: Mapping[str, float], config: WeightingConfig | None = None
    ) -> None:
        super().__init__()
        self.loss_weights = dict(loss_weights)
        self.config = config or WeightingConfig()
        self.gradients: TaskGradients | None = None
        """Of the shared parameters, in steps whose cosines are asked for."""
        self.seen: dict[tuple[str, str], list[float]] = {}
        """Cosines since the last `report`."""

    def begin_step(self, step: Step, encoder: nn.Module, heads: nn.Module) -> None:
        self.gradients = None
        if self.asks_cosines(step):
            self.gradients = TaskGradients()
            self.gradients.begin(_learning(encoder), step.present)

    def asks_cosines(self, step: Step) -> bool:
        every = self.config.gradient_cosines
        return every is not None and (step.number + 1) % every == 0 and len(step.present) > 1

    def combine(self, losses: Mapping[str, Tensor], share: Mapping[str, float]) -> Tensor:
        """One objective from the tasks' losses; see `backward`."""
        return torch.stack([factor * losses[t] for t, factor in self.current().items()]).sum()

    def backward(self, losses: Mapping[str, Tensor], share: Mapping[str, float]) -> None:
        """Differentiate one micro-batch.

        Args:
            losses: task → () loss of this micro-batch, already divided by the count of the
                whole optimiser step, so that micro-batches add up to the step's mean and ranks
                average to it.
            share: task → the part of the step's labels that this micro-batch holds over all
                ranks: they sum to 1, or to 0 when the step holds no label of the task. What a
                strategy adds once a step, not once a loss, it multiplies by this.
        """
        if self.gradients is not None:
            held = {task: loss for task, loss in losses.items() if share[task]}
            self.gradients.add(held, keep_graph=True)
        self.combine(losses, share).backward()  # type: ignore[no-untyped-call]

    def finish_step(self, world: World) -> None:
        if self.gradients is not None:
            self.gradients.reduce(world)
            self._see(cosines(self.gradients.tasks, self.gradients.gram()))
            self.gradients = None

    def end_epoch(self) -> None:
        """An epoch is through."""

    def current(self) -> dict[str, float]:
        """The factor each task has now."""
        return dict(self.loss_weights)

    def report(self) -> dict[str, float]:
        """What a progress event tells: factors, and mean cosines since the last one."""
        row = {f"weight/{task}": f for task, f in self.current().items()} if self.varies else {}
        for pair, values in self.seen.items():
            row["/".join(("cosine", *pair))] = sum(values) / len(values)
        self.seen = {}
        return row

    def _see(self, found: Mapping[tuple[str, str], float]) -> None:
        for pair, value in found.items():
            self.seen.setdefault(pair, []).append(value)


def _learning(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


class FixedWeighting(Weighting):
    """Σ w·L with the weights of the experiment file."""

    varies = False


class UncertaintyWeighting(Weighting):
    """Σ exp(-s)·L + s/2 with s = log σ² learned per task.

    Kendall, Gal and Cipolla, "Multi-Task Learning Using Uncertainty to Weigh Losses", CVPR 2018,
    equation 10 for softmax likelihoods. `loss_weight` still multiplies each task's loss. A step
    without a task's labels adds nothing to the gradient of its s.
    """

    def __init__(
        self, loss_weights: Mapping[str, float], config: WeightingConfig | None = None
    ) -> None:
        super().__init__(loss_weights, config)
        self.log_variance = nn.Parameter(torch.zeros(len(self.loss_weights)))
        """s of each task, in the order of `loss_weights`."""

    def combine(self, losses: Mapping[str, Tensor], share: Mapping[str, float]) -> Tensor:
        terms = []
        for task, s in zip(self.loss_weights, self.log_variance.unbind(), strict=True):
            weighted = self.loss_weights[task] * torch.exp(-s) * losses[task]
            terms.append(weighted + 0.5 * s * share[task])
        return torch.stack(terms).sum()

    def current(self) -> dict[str, float]:
        return _scaled(self.loss_weights, torch.exp(-self.log_variance.detach()).tolist())


class DynamicWeightAveraging(Weighting):
    """Σ w·λ·L, λ higher the slower a task's loss fell between the last two epochs.

    Liu, Johns and Davison, "End-to-End Multi-Task Learning with Attention", CVPR 2019, equation 7:
    λ = K·softmax(r / T) over K tasks, r the mean loss of the last epoch over that of the one
    before. Where there are no two epochs to compare, r is 1.
    """

    means: Tensor
    sums: Tensor
    labels: Tensor
    factors: Tensor

    def __init__(
        self, loss_weights: Mapping[str, float], config: WeightingConfig | None = None
    ) -> None:
        super().__init__(loss_weights, config)
        num_tasks, double = len(self.loss_weights), torch.float64
        # Mean loss a label in the last epoch and the one before; then this epoch so far.
        self.register_buffer("means", torch.full((2, num_tasks), torch.nan, dtype=double))
        self.register_buffer("sums", torch.zeros(num_tasks, dtype=double))
        self.register_buffer("labels", torch.zeros(num_tasks, dtype=double))
        self.register_buffer("factors", torch.ones(num_tasks))

    def begin_step(self, step: Step, encoder: nn.Module, heads: nn.Module) -> None:
        super().begin_step(step, encoder, heads)
        self.counts = self.sums.new_tensor([step.counts[task] for task in self.loss_weights])
        self.losses = torch.zeros_like(self.sums)

    def backward(self, losses: Mapping[str, Tensor], share: Mapping[str, float]) -> None:
        super().backward(losses, share)
        self.losses += torch.stack([losses[task].detach() for task in self.loss_weights])

    def finish_step(self, world: World) -> None:
        super().finish_step(world)
        # Every step, so that the checkpoint that one rank writes holds for all.
        self.sums += world.all_reduce(self.losses) / world.size * self.counts
        self.labels += self.counts

    def end_epoch(self) -> None:
        self.means.copy_(torch.stack([self.sums / self.labels, self.means[0]]))
        self.sums.zero_()
        self.labels.zero_()
        rates = self.means[0] / self.means[1]
        rates = torch.where(rates.isfinite(), rates, 1.0)
        softmax = torch.softmax(rates / self.config.temperature, dim=0)
        self.factors.copy_(len(rates) * softmax)

    def current(self) -> dict[str, float]:
        return _scaled(self.loss_weights, self.factors.tolist())


class RandomLossWeighting(Weighting):
    """Σ w·λ·L with λ = K·softmax(z), z drawn from N(0, 1) in every step for each of K tasks.

    Lin, Ye, Zhang and Tsang, "Reasonable Effectiveness of Random Weighting: A Litmus Test for
    Multi-Task Learning", TMLR 2022; times K, so that the weights have the sum of fixed ones.
    """

    def __init__(
        self, loss_weights: Mapping[str, float], config: WeightingConfig | None = None
    ) -> None:
        super().__init__(loss_weights, config)
        self.factors = [1.0] * len(self.loss_weights)

    def begin_step(self, step: Step, encoder: nn.Module, heads: nn.Module) -> None:
        super().begin_step(step, encoder, heads)
        raised = np.exp(step.random().standard_normal(len(self.factors)))
        self.factors = (len(raised) * raised / raised.sum()).tolist()

    def current(self) -> dict[str, float]:
        return _scaled(self.loss_weights, self.factors)


class GradientSurgery(Weighting):
    """PCGrad: in the encoder no task's gradient works against another's (`pcgrad_coefficients`).

    Projection is not linear, so it needs each task's gradient of the whole step: all micro-batches
    and all ranks. DistributedDataParallel reduces the sum over tasks during a backward pass, which
    is too early, so it is left out; the tasks' gradients are reduced here, in one go with those of
    the heads, which stand behind the encoder's in each row.
    """

    varies = False
    reduces_gradients = True

    def begin_step(self, step: Step, encoder: nn.Module, heads: nn.Module) -> None:
        shared = _learning(encoder)
        self.num_shared = sum(parameter.numel() for parameter in shared)
        self.gradients = self.gradients or TaskGradients()
        self.gradients.begin(shared + _learning(heads), step.present)
        self.random, self.asked = step.random(), self.asks_cosines(step)

    def backward(self, losses: Mapping[str, Tensor], share: Mapping[str, float]) -> None:
        assert self.gradients is not None
        weights = self.loss_weights
        weighted = {task: weights[task] * losses[task] for task in weights if share[task]}
        self.gradients.add(weighted, keep_graph=False)

    def finish_step(self, world: World) -> None:
        gradients = self.gradients
        assert gradients is not None
        gradients.reduce(world)
        gram = gradients.gram(self.num_shared)
        if self.asked:
            self._see(cosines(gradients.tasks, gram))
        rows = gradients.rows
        factors = torch.from_numpy(pcgrad_coefficients(gram, self.random)).to(rows)
        shared, own = rows[:, : self.num_shared], rows[:, self.num_shared :]
        total = torch.cat([factors @ shared, own.sum(dim=0)])
        for parameter, gradient in zip(gradients.parameters, gradients.views(total), strict=True):
            parameter.grad = gradient


def _scaled(loss_weights: Mapping[str, float], factors: list[float]) -> dict[str, float]:
    return {t: w * f for (t, w), f in zip(loss_weights.items(), factors, strict=True)}


STRATEGIES: dict[str, type[Weighting]] = {
    "fixed": FixedWeighting,
    "uncertainty": UncertaintyWeighting,
    "dwa": DynamicWeightAveraging,
    "rlw": RandomLossWeighting,
    "pcgrad": GradientSurgery,
}


def build_weighting(experiment: Experiment) -> Weighting:
    """The strategy an experiment asks for."""
    config = experiment.weighting
    loss_weights = {name: task.loss_weight for name, task in experiment.tasks.items()}
    return STRATEGIES[config.strategy](loss_weights, config)
