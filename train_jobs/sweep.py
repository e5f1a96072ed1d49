"""The sweep file: which experiment, which of its fields to search, how, and for how long."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from mtl_core.artifact import read_manifest
from mtl_core.build import resolve_init_from
from mtl_core.config import (
    NAME_PATTERN,
    Config,
    Experiment,
    PositiveFloat,
    PositiveInt,
    describe,
    load_experiment,
    parse_experiment,
    parse_override,
    read_yaml,
    set_field,
)
from mtl_core.errors import ConfigError, there_is
from mtl_core.metrics import metric_names
from mtl_core.storage import fetch
from train_jobs.space import Parameter, Range, expand

FIXED = ("name", "output_dir", "scale", "seed", "init_from", "tasks", "data")
"""Fields that make a trial another experiment, not another setting of this one."""
MAX_CORNERS = 2_000


class Searcher(Config):
    algorithm: Literal["random", "grid", "optuna"] = "random"
    """random draws; grid tries every combination of `grid` and `choice`; optuna is TPE, over
    several objectives when `objective` lists them."""
    startup_trials: PositiveInt = 8
    """optuna: random trials before its model is asked."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Fixes what is drawn."""


class Scheduler(Config):
    kind: Literal["none", "asha", "median"] = "none"
    """asha: successive halving (Li et al., 2020); median: stop what is below the median so far."""
    grace_epochs: PositiveInt = 1
    """Epochs that every trial gets."""
    reduction_factor: Annotated[int, Field(ge=2)] = 3
    """asha: one trial in so many goes on at each rung."""


class Budget(Config):
    trials: PositiveInt = 16
    """Trials of the search; grid has as many as its combinations."""
    concurrency: PositiveInt | None = None
    """Trials at a time; when absent, as many as the cluster holds."""
    minutes: PositiveFloat | None = None
    """Time for the search; what runs then is stopped where it is, and goes on if a later command
    gives more."""


class Sweep(Config):
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    """The sweep's folder under output_dir; running the same name again resumes it."""
    base: str
    """Experiment file to vary; relative to the sweep file's folder, or to the current one."""
    settings: dict[str, Any] = Field(default_factory=dict, alias="set")
    """Changes to the base before anything else: dotted path to value."""
    space: dict[str, Range]
    """Dotted path of a field (or of several, with * for a name) to its range."""
    objective: str | tuple[str, ...] = "mean"
    """What is better: `<task>/<metric>`, mean over tasks, gain (mean relative gain over each task
    trained alone), or a list of them for a multi-objective search."""
    searcher: Searcher = Searcher()
    scheduler: Scheduler = Scheduler()
    budget: Budget = Budget()
    baselines: bool = False
    """Also train each task alone, and all of the base together, with fixed weights; compare."""
    seeds: PositiveInt = 3
    """Runs of everything that is compared in the end."""
    output_dir: str = "runs"
    """Where sweeps go: a folder or a URL that every node reaches."""

    @field_validator("space")
    @classmethod
    def _something_to_search(cls, space: dict[str, Parameter]) -> dict[str, Parameter]:
        if not space:
            raise ValueError("name at least one field to search")
        return space

    @field_validator("objective")
    @classmethod
    def _something_to_go_by(cls, objective: str | tuple[str, ...]) -> str | tuple[str, ...]:
        if not objective:
            raise ValueError("name at least one")
        return objective

    @model_validator(mode="after")
    def _parts_agree(self) -> Self:
        gridded = [path for path, range_ in self.space.items() if range_.kind == "grid"]
        others = [p for p, r in self.space.items() if r.kind not in ("grid", "choice")]
        if self.searcher.algorithm == "grid" and others:
            raise ValueError(
                f"searcher: grid cannot try every value of space.{others[0]} "
                f"({self.space[others[0]].kind}); give it a grid: [...], or search with random"
            )
        if self.searcher.algorithm != "grid" and gridded:
            raise ValueError(
                f"searcher: {self.searcher.algorithm} draws values and space.{gridded[0]} is a "
                "grid; write choice: [...], or search with grid"
            )
        if isinstance(self.objective, tuple):
            if self.searcher.algorithm != "optuna":
                raise ValueError("objective: a list needs searcher.algorithm: optuna")
            if self.scheduler.kind != "none":
                raise ValueError(f"scheduler: {self.scheduler.kind} compares by one objective only")
        if "gain" in self.objectives and not self.baselines:
            raise ValueError("objective: gain is over single-task runs; set baselines: true")
        return self

    @property
    def objectives(self) -> tuple[str, ...]:
        return (self.objective,) if isinstance(self.objective, str) else self.objective

    @property
    def training(self) -> dict[str, Any]:
        """What the sweep says of every trial's training, where it is not searched."""
        # Mid-epoch checkpoints would only cost: a trial is resumed at its last epoch.
        fixed: dict[str, Any] = {"checkpoint_every": None}
        if len(self.objectives) == 1 and "/" in self.objectives[0]:
            fixed["metric"] = self.objectives[0]
        return fixed

    @property
    def num_trials(self) -> int:
        if self.searcher.algorithm != "grid":
            return self.budget.trials
        return math.prod(len(parameter.values) for parameter in self.space.values())


@dataclass(frozen=True)
class Plan:
    """A sweep with the experiment it varies, checked against each other."""

    sweep: Sweep
    base: Experiment

    @cached_property
    def fields(self) -> dict[str, list[str]]:
        """Path of the space → the base's fields that it names."""
        raw = self.base.model_dump(mode="json")
        return {path: expand(raw, path) for path in self.sweep.space}

    def experiment(self, values: Mapping[str, Any], seed: int | None = None) -> Experiment:
        """The base with values that a searcher drew.

        Raises:
            ConfigError: they do not go together.
        """
        raw = self.base.model_dump(mode="json")
        for path, value in self.settings(values).items():
            set_field(raw, path, value)
        if isinstance(raw["training"], dict):  # may have been drawn as a whole
            raw["training"] = self.sweep.training | raw["training"]
        if seed is not None:
            raw["seed"] = seed
        return parse_experiment(raw, where="trial")

    def settings(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Concrete dotted path → the value it gets, as a person would write it."""
        found: dict[str, Any] = {}
        for path, parameter in self.sweep.space.items():
            found |= parameter.decode(path, self.fields[path], values)
        return found

    def logarithmic(self) -> set[str]:
        """The fields that are searched on a logarithmic scale."""
        steep = (path for path, range_ in self.sweep.space.items() if range_.kind == "loguniform")
        return {field for path in steep for field in self.fields[path]}

    def most_epochs(self) -> int:
        """The epochs of the longest trial that may be drawn."""
        return max(self.experiment(corner).training.epochs for corner in _corners(self.sweep))

    def alone(self, task: str) -> Experiment:
        """The base with one task only, all else equal: also the rows that have its labels."""
        raw = self.base.model_dump(mode="json")
        raw["tasks"] = {task: raw["tasks"][task]}
        reserved = ("text", "words", task)
        raw["data"] = [
            {**source, "columns": {k: v for k, v in source["columns"].items() if k in reserved}}
            for source in raw["data"]
            if task in source["columns"]
        ]
        raw["freeze"]["heads"] = [name for name in raw["freeze"]["heads"] if name == task]
        if raw["training"]["metric"].split("/")[0] != task:
            raw["training"]["metric"] = "mean"
        return parse_experiment(raw, where=f"{task} alone")

    def seeds(self) -> list[int]:
        return [self.base.seed + number for number in range(self.sweep.seeds)]


def load_plan(path: str | Path, overrides: Sequence[str] = ()) -> Plan:
    """Read a sweep file and the experiment it names, and check every range.

    Raises:
        ConfigError: something in them is wrong; the message names file and line.
        ArtifactError: `init_from` is no sound artifact.
    """
    # What follows these sections is a path of the base experiment, a key of theirs as it is.
    by_path = [override for override in overrides if override.startswith(("set.", "space."))]
    raw, lines = read_yaml(path, [o for o in overrides if o not in by_path])
    for override in by_path:
        key, value = parse_override(override)
        section, _, field = key.partition(".")
        raw[section] = {**(raw.get(section) or {}), field: value}
    try:
        sweep = Sweep.model_validate(raw)
        base = _base_of(sweep, Path(path))
        _check_space(sweep, base)
    except ValidationError as error:
        where = [str(part) for part in error.errors()[0]["loc"]]
        raise ConfigError(f"{path}{lines.at(where)}: " + describe(error, Sweep)) from error
    except SpaceError as error:
        raise ConfigError(f"{path}{lines.at(error.where)}: {error}") from error
    return Plan(sweep, base)


def check_baselines(plan: Plan) -> None:
    """No task alone leaves a head of `init_from` to an encoder that learns: training refuses it.

    Raises:
        ConfigError: one would.
        ArtifactError: `init_from` is no sound artifact.
    """
    base = plan.base
    if not plan.sweep.baselines or base.init_from is None or base.freeze.encoder:
        return
    heads = read_manifest(fetch(base.init_from), check_files=False).tasks
    for task, head in itertools.product(base.tasks, heads):
        if task != head:
            raise ConfigError(
                f"baselines: {task!r} alone would start from an encoder that has learned {head!r} "
                f"too, whose head in {base.init_from} cannot be kept once the encoder learns; set "
                "baselines: false, or freeze.encoder: true in the base"
            )


class SpaceError(ConfigError):
    """A mistake at one place of the sweep file."""

    def __init__(self, where: Sequence[str], message: str) -> None:
        super().__init__(f"{'.'.join(where)}: {message}")
        self.where = list(where)


def _base_of(sweep: Sweep, path: Path) -> Experiment:
    beside = path.parent / sweep.base
    found = beside if beside.is_file() else Path(sweep.base)
    if not found.is_file():
        raise SpaceError(["base"], f"there is no file {sweep.base!r} beside {path} or here")
    experiment = resolve_init_from(_changed(found, sweep.settings))
    _check_objective(sweep, experiment)
    raw = experiment.model_dump(mode="json")
    raw["training"] |= sweep.training
    return parse_experiment(raw, where=str(found))


def _changed(base: Path, settings: Mapping[str, Any]) -> Experiment:
    """The base experiment with what `set:` changes."""
    # YAML reads what JSON makes of a character beyond 16 bits as two halves of one.
    plain = {k: json.dumps(v, default=str, ensure_ascii=False) for k, v in settings.items()}
    overrides = [f"{key}={value}" for key, value in plain.items()]
    try:
        return load_experiment(base, overrides)
    except ConfigError as error:
        load_experiment(base)  # where the base is at fault, it is named
        path = _culprit(str(error), settings)
        raise SpaceError(["set", path], str(error)) from error


def _check_objective(sweep: Sweep, base: Experiment) -> None:
    if "gain" in sweep.objectives and len(base.tasks) == 1:
        raise SpaceError(["objective"], "gain compares with each task alone; this is one task only")
    for objective in sweep.objectives:
        if objective in ("mean", "gain"):
            continue
        task, _, metric = objective.partition("/")
        if task not in base.tasks:
            known = there_is(base.tasks, task)
            raise SpaceError(["objective"], f"no task {task!r} reports {objective!r}; {known}")
        names = metric_names(base.tasks[task].kind)
        if metric not in names:
            raise SpaceError(
                ["objective"], f"{task} reports no {metric!r}; it reports {', '.join(names)}"
            )


def _check_space(sweep: Sweep, base: Experiment) -> None:
    """Every path names a field, and the ends of every range, alone and together, are valid."""
    raw = base.model_dump(mode="json")
    seen: dict[str, str] = {}
    for path, parameter in sweep.space.items():
        section = path.split(".")[0]
        if section in FIXED and not (section in ("tasks", "data") and path.count(".") > 1):
            raise SpaceError(["space", path], "this field cannot be searched")
        try:
            fields = expand(raw, path)
        except KeyError as error:
            raise SpaceError(["space", path], str(error.args[0])) from None
        for field in fields:
            if (other := _overlapping(field, [f for f in seen if seen[f] != path])) is not None:
                inner = max(field, other, key=len)
                raise SpaceError(["space", path], f"{inner} is searched by {seen[other]} already")
            seen[field] = path
        if parameter.kind == "sample_from" and len(fields) < 2:
            raise SpaceError(["space", path], "weights that sum to one need several fields (use *)")
    plan = Plan(sweep, base)
    for corner in _corners(sweep):
        try:
            plan.experiment(corner)
        except ConfigError as error:
            drawn = ", ".join(f"{p} = {v}" for p, v in plan.settings(corner).items())
            path = _culprit(str(error), sweep.space)
            raise SpaceError(["space", path], f"{drawn}: {error}") from error


def _overlapping(field: str, others: Iterable[str]) -> str | None:
    """The first of other fields that is this one, a section with it, or inside it."""
    for other in others:
        short, long = sorted((f"{field}.", f"{other}."), key=len)
        if long.startswith(short):
            return other
    return None


def _culprit(message: str, paths: Iterable[str]) -> str:
    """The path that a message of validation is about, else the first."""
    ordered = list(paths)
    named = (p for p in ordered if p in message)
    ended = (p for p in ordered if p.split(".")[-1] in message)
    return next(itertools.chain(named, ended), ordered[0])


def _corners(sweep: Sweep) -> Iterator[dict[str, Any]]:
    """Draws from the ends of every range, in all combinations or, if too many, in some of them."""
    ends = [p.ends(path) for path, p in sweep.space.items()]
    if math.prod(map(len, ends)) <= MAX_CORNERS:
        combinations: Iterator[tuple[dict[str, Any], ...]] = itertools.product(*ends)
    else:
        draw = random.Random(0)
        each = (tuple(e[i % len(e)] for e in ends) for i in range(max(map(len, ends))))
        some = (tuple(draw.choice(e) for e in ends) for _ in range(MAX_CORNERS))
        combinations = itertools.chain(each, some)
    for combination in combinations:
        yield {key: value for part in combination for key, value in part.items()}
