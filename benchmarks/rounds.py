"""Contenders that work in turn: whatever else the machine does befalls all of them alike."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

from mtl_core.build import build_train_state
from mtl_core.config import Experiment
from mtl_core.data.prepare import Data, prepare
from mtl_core.loop import fit


def in_turn(
    contenders: Mapping[str, Iterator[float]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """A figure of each contender in each round, another one first each time."""
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    names = list(contenders)
    for number in range(warm_up + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            figure = next(contenders[name])
            if number >= warm_up:
                figures[name].append(figure)
    return figures


def ratios(figures: Sequence[float], base: Sequence[float]) -> list[float]:
    """Each round's figure over the base's in the same round."""
    return [mine / other for mine, other in zip(figures, base, strict=True)]


def steps(experiment: Experiment, data: Data | None = None) -> Iterator[float]:
    """Seconds that each next `loop.LOG_EVERY` steps of a run take."""
    data = data or prepare(experiment)
    run = fit(build_train_state(experiment, data), data, experiment)
    while True:
        started = time.perf_counter()
        event = next(run)
        assert event.kind == "step", "the epoch is too short for so many rounds"
        yield time.perf_counter() - started
