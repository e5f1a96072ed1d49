"""The experiment file: typed, frozen, and complete before anything runs."""

from __future__ import annotations

import copy
import difflib
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mtl_core.errors import ConfigError, there_is

TaskKind = Literal["classification", "multilabel", "token_classification"]
Split = Literal["train", "validation", "test"]
Format = Literal["jsonl", "json", "csv", "tsv", "parquet", "conll"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]*$"
RESERVED_COLUMNS = ("text", "words")

Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
PositiveInt = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class Config(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class EncoderConfig(Config):
    model: str = "sentence-transformers/all-MiniLM-L6-v2"
    """A folder, or a model id on the Hugging Face Hub."""
    revision: str | None = None
    """Branch, tag or commit on the Hub."""
    pooling: Literal["auto", "mean", "cls", "max"] = "auto"
    """From token states to one vector; `auto` takes what the model declares, else mean."""
    max_length: PositiveInt = 128
    """Tokens per text, special tokens included; longer training texts are cut and counted."""
    dropout: Fraction | None = None
    """Dropout inside the transformer; none given keeps the checkpoint's own."""


class TaskConfig(Config):
    kind: TaskKind
    """classification: one label a text; multilabel: any number; token_classification: entities."""
    labels: tuple[str, ...] | None = None
    """Label names (for entities their types); read from the training data when absent."""
    loss_weight: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 1.0
    """Factor on this task's loss, under any weighting strategy."""
    class_weights: Literal["balanced"] | dict[str, PositiveFloat] | None = None
    """Weights of labels in the loss: `balanced`, or a number a label (1 for those not named)."""
    dropout: Fraction = 0.1
    """Dropout in front of the head."""
    hidden_size: PositiveInt | None = None
    """Units of one optional hidden layer in the head."""
    label_smoothing: Fraction = 0.0
    """Share of the target's probability that is spread over all labels."""
    decoding: Literal["viterbi", "greedy"] = "viterbi"
    """Entities: the best legal tag sequence, or the best tag of each token on its own."""
    threshold: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    """Multilabel: probability from which a label is given."""

    @field_validator("labels")
    @classmethod
    def _each_once(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if labels is not None and len(set(labels)) < len(labels):
            raise ValueError("a label is named twice")
        return labels


class SourceConfig(Config):
    path: str | None = None
    """A file, a folder of splits, or a URL for fsspec (s3://…); ${VARIABLES} are filled in."""
    hub: str | None = None
    """A dataset id on the Hugging Face Hub, or a folder that `datasets` saved."""
    demo: bool = False
    """The corpus that comes with this package: sentiment of a sentence and the entities in it."""
    subset: str | None = None
    """The Hub dataset's configuration, such as sst2 of nyu-mll/glue."""
    revision: str | None = None
    """The Hub dataset's branch, tag or commit."""
    format: Format | None = None
    """The files' format; told from the name when absent."""
    encoding: str = "utf-8"
    """Character encoding of text files."""
    splits: dict[Split, str] = Field(default_factory=dict)
    """Which Hub split, or which file of the folder, is train, validation and test."""
    columns: dict[str, str | int]
    """Where things stand: `text` and/or `words`, and one entry a task; numbers in CoNLL files."""
    validation_fraction: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.1
    """Share of train that becomes validation when the source has none; drawn with the seed."""
    limit: PositiveInt | None = None
    """Keep only this many training rows, drawn with the seed from all, labelled or not."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What a row that cannot be read does; skipped rows are counted and reported."""

    @model_validator(mode="before")
    @classmethod
    def _demo_columns(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("demo") and "columns" not in data:
            columns = {"text": "text", "sentiment": "sentiment", "entities": "entities"}
            return {**data, "columns": columns}
        return data

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if sum((self.path is not None, self.hub is not None, self.demo)) != 1:
            raise ValueError("give exactly one of path, hub or demo")
        if not self.task_columns:
            raise ValueError("columns names no task: add `<task>: <column>`")
        if self.format != "conll" and not any(name in self.columns for name in RESERVED_COLUMNS):
            raise ValueError("columns needs `text`, `words` or both")
        return self

    @property
    def task_columns(self) -> dict[str, str | int]:
        """Task name → column."""
        return {name: c for name, c in self.columns.items() if name not in RESERVED_COLUMNS}

    @property
    def title(self) -> str:
        """How messages call this source."""
        return self.path or self.hub or "demo"


class MixingConfig(Config):
    strategy: Literal["proportional", "round_robin", "temperature", "joint"] = "proportional"
    """proportional: all rows shuffled together; round_robin: batches of one task group in turn;
    temperature: groups drawn by size^(1/temperature); joint: every batch holds every group."""
    temperature: PositiveFloat = 2.0
    """1 is proportional to size, large values approach equal shares."""


class WeightingConfig(Config):
    strategy: Literal["fixed", "uncertainty", "dwa", "rlw", "pcgrad"] = "fixed"
    """fixed: the tasks' own `loss_weight`; uncertainty: learned (Kendall et al., CVPR 2018);
    dwa: by how slowly losses fall from epoch to epoch (Liu et al., CVPR 2019); rlw: random in each
    step (Lin et al., TMLR 2022); pcgrad: conflicts between the tasks' gradients of the encoder are
    projected out (Yu et al., NeurIPS 2020)."""
    temperature: PositiveFloat = 2.0
    """dwa: large values approach equal weights."""
    gradient_cosines: PositiveInt | None = None
    """In each n-th step, measure the cosines between the tasks' gradients of the encoder."""


class FreezeConfig(Config):
    encoder: bool = False
    """Freeze the whole encoder: only heads learn."""
    embeddings: bool = False
    """Freeze the embedding tables; otherwise sub-words of the training texts learn, others stay."""
    layers: Annotated[int, Field(ge=0)] = 0
    """Freeze the lowest n layers, and the embeddings with them."""
    heads: tuple[str, ...] = ()
    """Heads that keep their weights, by task name."""
    unfreeze_every: PositiveInt | None = None
    """Gradual unfreezing (Howard and Ruder, 2018): start with a frozen encoder and free one more
    layer from the top each k epochs, down to what `embeddings` and `layers` keep frozen."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.encoder and self.unfreeze_every:
            raise ValueError("encoder: true never unfreezes; drop it to use unfreeze_every")
        return self


class OptimConfig(Config):
    learning_rate: PositiveFloat = 2e-4
    """Peak rate of the encoder's top layer."""
    head_learning_rate: PositiveFloat | None = None
    """Peak rate of the heads; the encoder's when absent."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Each layer learns at this share of the one above it (Sun et al., 2019)."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.01
    """Decoupled weight decay, on matrices only."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's moving-average factors."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the rate falls after warm-up."""
    warmup: Fraction = 0.06
    """Share of training in which the rate rises from zero."""
    max_grad_norm: PositiveFloat | None = 1.0
    """Clip the gradient's norm; null for no clipping."""


class TrainingConfig(Config):
    epochs: PositiveInt = 5
    """Passes over the data."""
    batch_size: PositiveInt = 32
    """Texts per batch over all workers."""
    batch_tokens: PositiveInt | None = None
    """Tokens per batch, about so many, instead of a number of texts."""
    shard_texts: PositiveInt | None = None
    """For corpora too large to hold: read, tokenise and shuffle about so many training texts at a
    time, while the ones before are trained on. JSONL, Parquet and Hub datasets."""
    accumulation: PositiveInt = 1
    """Batches whose gradients are summed into one optimiser step."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of the forward pass; auto takes bf16 where the hardware has it."""
    metric: str = "mean"
    """What picks the best epoch: `<task>/<metric>` (intent/accuracy), or the mean over tasks."""
    patience: PositiveInt | None = None
    """Stop after this many epochs without a better score."""
    checkpoint_every: PositiveInt | None = None
    """Also save a checkpoint each n optimiser steps."""
    feature_cache: bool = True
    """Compute what lies below the freeze boundary once per text instead of once per epoch."""


class ScaleConfig(Config):
    workers: PositiveInt | tuple[PositiveInt, PositiveInt] = 1
    """Data-parallel processes, or [min, max] for an elastic number."""
    gpu: bool | None = None
    """One GPU a worker; when absent, only if the nodes that are up have one for each."""
    cpus_per_worker: PositiveInt | None = None
    """CPU cores a worker asks for; when absent, as many as let all workers find room on the nodes
    that are up, and 1 for an elastic number."""
    max_failures: Annotated[int, Field(ge=-1)] = 2
    """How often Ray restarts the workers from the last checkpoint; -1 without end."""

    @field_validator("workers")
    @classmethod
    def _ordered(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        if isinstance(value, tuple) and value[0] > value[1]:
            raise ValueError("elastic workers are [min, max] with min <= max")
        return value


class Experiment(Config):
    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    """The run's folder under output_dir; running the same name again resumes it."""
    tasks: dict[Annotated[str, Field(pattern=NAME_PATTERN)], TaskConfig] = Field(min_length=1)
    """What the model learns: one head each."""
    data: tuple[SourceConfig, ...] = Field(min_length=1)
    """Where the labelled texts come from; a source may label one task or several."""
    output_dir: str = "runs"
    """Where runs go: a folder or a URL (s3://…) that every node reaches."""
    seed: Annotated[int, Field(ge=0)] = 42
    """Fixes initial heads, data order, dropout and carved splits."""
    init_from: str | None = None
    """An artifact, a folder or URL (s3://…), whose encoder and heads to start from; its other heads
    are kept as they are. Its model and pooling count, not those of `encoder`."""
    encoder: EncoderConfig = EncoderConfig()
    mixing: MixingConfig = MixingConfig()
    weighting: WeightingConfig = WeightingConfig()
    freeze: FreezeConfig = FreezeConfig()
    optim: OptimConfig = OptimConfig()
    training: TrainingConfig = TrainingConfig()
    scale: ScaleConfig = ScaleConfig()

    @model_validator(mode="after")
    def _names_agree(self) -> Self:
        for name in self.tasks:
            if name in RESERVED_COLUMNS:
                raise ValueError(f"tasks: {name!r} is a reserved column name; rename the task")
            alike = next(other for other in self.tasks if other.casefold() == name.casefold())
            if alike != name:
                raise ValueError(
                    f"tasks: {alike!r} and {name!r} would be one folder where case does not count; "
                    "rename one"
                )
            if not any(name in source.task_columns for source in self.data):
                raise ValueError(
                    f"tasks.{name} has no labels: add `{name}: <column>` to a source's columns"
                )
        for index, source in enumerate(self.data):
            for name in source.task_columns:
                if name not in self.tasks:
                    raise ValueError(f"data.{index}.columns: {_unknown(name, self.tasks)}")
        for name in self.freeze.heads:
            if name not in self.tasks:
                raise ValueError(f"freeze.heads: {_unknown(name, self.tasks)}")
        return self

    @model_validator(mode="after")
    def _shards_suffice(self) -> Self:
        if self.training.shard_texts is None:
            return self
        for name, task in self.tasks.items():
            if task.class_weights == "balanced":
                raise ValueError(
                    f"tasks.{name}.class_weights: `balanced` needs to count the whole corpus, "
                    "which training.shard_texts never reads at once; give a number a label"
                )
        for index, source in enumerate(self.data):
            if source.limit is not None:
                raise ValueError(
                    f"data.{index}.limit: training.shard_texts goes through all rows; drop one"
                )
        return self

    @model_validator(mode="after")
    def _metric_is_reported(self) -> Self:
        if self.training.metric == "mean":
            return self
        task, _, metric = self.training.metric.partition("/")
        if task not in self.tasks:
            raise ValueError(f"training.metric: {_unknown(task, self.tasks)}")
        if metric:
            from mtl_core.metrics import metric_names

            names = metric_names(self.tasks[task].kind)
            if metric not in names:
                raise ValueError(
                    f"training.metric: {task} reports no {metric!r}; it reports {', '.join(names)}"
                )
        return self


def _unknown(name: str, known: Iterable[str]) -> str:
    return f"unknown task {name!r}; {there_is(known, name)}"


def load_experiment(path: str | Path, overrides: Sequence[str] = ()) -> Experiment:
    """Read an experiment file.

    Args:
        path: YAML file.
        overrides: `dotted.key=value` strings, applied in order; values are YAML.

    Raises:
        ConfigError: the file is missing, is no YAML, or a field is wrong.
    """
    raw, _ = read_yaml(path, overrides)
    return parse_experiment(raw, where=str(path))


class Lines:
    """Where things stand in a YAML file."""

    def __init__(self, root: yaml.Node | None) -> None:
        self.root = root

    def at(self, keys: Sequence[str]) -> str:
        """`:line` of the deepest of nested keys that the file has; empty for none."""
        node, line = self.root, 0
        for key in keys:
            pairs = node.value if isinstance(node, yaml.MappingNode) else ()
            found = [(k, v) for k, v in pairs if k.value == key]
            if not found:
                break
            line, node = found[0][0].start_mark.line + 1, found[0][1]
        return f":{line}" if line else ""


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> tuple[dict[str, Any], Lines]:
    """A file of sections, changed by `dotted.key=value` strings; its name is the default `name`.

    Raises:
        ConfigError: the file is missing or is no YAML, or an override has no place in it.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the file ({error})") from error
    try:
        raw, root = yaml.load(text, Loader=_Loader), yaml.compose(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(
            f"{path}: expected `key: value` lines at the top, got {type(raw).__name__}"
        )
    raw.setdefault("name", Path(path).stem)
    for override in overrides:
        key, value = parse_override(override)
        try:
            set_field(raw, key, value)
        except ConfigError as error:
            raise ConfigError(f"--set {override}: {error}") from error
    return raw, Lines(root)


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 3e-4 as a string; people who write learning rates mean a number.

    A key that stands twice in a section is an error, not the last of both.
    """

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        names = [key.value for key in keys]
        for number, key in enumerate(keys):
            if key.value in names[:number]:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value!r} is set twice", problem_mark=key.start_mark
                )
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_Loader` would read as numbers."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)([eE][-+]?\d+)?$|^[-+]?\.(inf|nan)$"),
        list("-+0123456789."),
    )


def parse_experiment(raw: Mapping[str, Any], where: str = "experiment") -> Experiment:
    """Validate a plain mapping; `where` is the file that messages name."""
    try:
        return Experiment.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + describe(error)) from error


def describe(error: ValidationError, root: type[Config] | None = None) -> str:
    """Validation errors as lines a person can act on, with the nearest known key for a typo."""
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            message = "unknown key"
            keys = _keys_at(item["loc"][:-1], root or Experiment)
            close = difflib.get_close_matches(str(item["loc"][-1]), keys, n=1)
            message += f"; did you mean {close[0]!r}?" if close else ""
        else:
            message = item["msg"].removeprefix("Value error, ")
            if not isinstance(item["input"], dict | list) and item["type"] != "missing":
                message += f" (got {item['input']!r})"
        lines.append(f"{path}: {message}" if path else message)
    return lines[0] if len(lines) == 1 else "\n  " + "\n  ".join(lines)


def _keys_at(loc: tuple[int | str, ...], root: type[Config]) -> list[str]:
    """The fields of the config class that a validation error's location points into."""
    owners: dict[str, type[Config]] = {"tasks": TaskConfig, "data": SourceConfig}
    model = root
    if loc:
        field = root.model_fields.get(str(loc[0]))
        if str(loc[0]) in owners:
            model = owners[str(loc[0])]
        elif field is not None and isinstance(field.annotation, type):
            model = field.annotation
    return list(model.model_fields)


def parse_override(override: str) -> tuple[str, Any]:
    """`key=value` as a key and a YAML value.

    Raises:
        ConfigError: it is something else.
    """
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override}: expected key=value")
    try:
        return key, yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {override}: the value is not valid YAML") from error


def first_key(node: Any, parts: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The key that a dotted path's parts begin with, and what follows it.

    Names may hold dots, so it is the longest that a section has; the first part if it has none.
    """
    known = node if isinstance(node, Mapping) else ()
    ends = range(len(parts), 1, -1)
    end = next((end for end in ends if ".".join(parts[:end]) in known), 1)
    return ".".join(parts[:end]), parts[end:]


def set_field(raw: dict[str, Any], path: str, value: Any) -> None:
    """Set what a dotted path names, in sections that are made where there are none.

    Raises:
        ConfigError: the path leads through a value, or a list that has no such index.
    """
    node: Any = raw
    parts: Sequence[str] = path.split(".")
    while True:
        key, parts = first_key(node, parts)
        place: Any = _list_index(node, key) if isinstance(node, list) else key
        if not parts:
            node[place] = value
            return
        inner = node[place] if isinstance(node, list) else node.get(place)
        inner = {} if inner is None else copy.copy(inner)  # an alias's section is not its anchor's
        if not isinstance(inner, dict | list):
            raise ConfigError(f"{key!r} holds a value, not a section")
        node[place] = inner
        node = inner


def _list_index(node: list[Any], key: str) -> int:
    if not key.isdigit() or int(key) >= len(node):
        raise ConfigError(f"{key!r} is no index into a list of {len(node)}")
    return int(key)


def dump_experiment(experiment: Config) -> str:
    """The resolved configuration as YAML that `load_experiment` reads back."""
    content = experiment.model_dump(mode="json", by_alias=True)
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def expand_path(path: str) -> str:
    """Fill in ${VARIABLES} and ~; a variable that is not set is an error, not an empty string."""
    expanded = os.path.expanduser(os.path.expandvars(path))
    missing = re.search(r"\$\{?(\w+)\}?", expanded)
    if missing:
        raise ConfigError(f"{path}: the environment variable {missing.group(1)} is not set")
    return expanded
