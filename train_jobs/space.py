"""Ranges of a search: what is drawn, and which fields of an experiment it sets."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import PlainSerializer, PlainValidator

from mtl_core.config import first_key
from mtl_core.errors import there_is

SHAPES: dict[str, tuple[str, ...]] = {
    "uniform": ("low", "high"),
    "loguniform": ("low", "high"),
    "quniform": ("low", "high", "step"),
    "randint": ("low", "high"),
}
LISTS = ("choice", "grid")
SIMPLEX = "simplex"
SMALLEST = 1e-3
"""A weight on the simplex may come near zero, never to it."""


@dataclass(frozen=True)
class Parameter:
    """One range, written `{kind: values}`.

    uniform, loguniform: [low, high]. quniform: [low, high, step]. randint: [low, high], both in.
    choice, grid: a list of values, which may be whole sections. sample_from: simplex draws weights
    of several fields that sum to one, uniformly (Dirichlet with all parameters 1).
    """

    kind: str
    values: tuple[Any, ...]

    @classmethod
    def parse(cls, raw: Any) -> Parameter:
        """From `{kind: values}`.

        Raises:
            ValueError: it is no range.
        """
        if isinstance(raw, Parameter):
            return raw
        kinds = [*SHAPES, *LISTS, "sample_from"]
        if not isinstance(raw, dict) or len(raw) != 1 or next(iter(raw)) not in kinds:
            raise ValueError(f"expected one of {', '.join(kinds)}: such as uniform: [0.1, 0.5]")
        ((kind, values),) = raw.items()
        if kind == "sample_from":
            if values != SIMPLEX:
                raise ValueError(f"sample_from knows {SIMPLEX!r} only: weights that sum to one")
            return cls(kind, ())
        if not isinstance(values, list) or not values:
            raise ValueError(f"{kind} takes a list")
        if kind in LISTS:
            if len({json.dumps(v, sort_keys=True, default=str) for v in values}) < len(values):
                raise ValueError(f"{kind} names a value twice")
            return cls(kind, tuple(values))
        return cls._interval(kind, values)

    @classmethod
    def _interval(cls, kind: str, values: list[Any]) -> Parameter:
        names = SHAPES[kind]
        numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
        if len(values) != len(names) or not numbers or not all(map(math.isfinite, values)):
            raise ValueError(f"{kind} takes numbers: [{', '.join(names)}]")
        if values[0] >= values[1]:
            raise ValueError(f"{kind}: low must be below high, got {values[:2]}")
        if kind == "loguniform" and values[0] <= 0:
            raise ValueError("loguniform: low must be above 0")
        if kind == "quniform" and not 0 < values[2] <= values[1] - values[0]:
            raise ValueError("quniform: step must be above 0 and fit between low and high")
        if kind == "quniform" and any(
            abs(v / values[2] - round(v / values[2])) > 1e-9 for v in values[:2]
        ):
            raise ValueError("quniform: low and high must be multiples of step")
        if kind == "randint" and any(v != int(v) for v in values):
            raise ValueError("randint takes whole numbers")
        return cls(kind, tuple(values))

    def plain(self) -> dict[str, Any]:
        return {self.kind: list(self.values) if self.kind != "sample_from" else SIMPLEX}

    def domains(self, path: str, fields: Sequence[str], every: bool = False) -> dict[str, Any]:
        """What Ray Tune draws: a key to its domain; `every` value of a list instead of any."""
        from ray import tune

        if self.kind == "sample_from":
            return {field: tune.uniform(SMALLEST, 1 - SMALLEST) for field in fields}
        if self.kind == "grid" or (every and self.kind == "choice"):
            return {path: tune.grid_search([label(v) for v in self.values])}
        if self.kind == "choice":
            return {path: tune.choice([label(v) for v in self.values])}
        if self.kind == "randint":
            return {path: tune.randint(int(self.values[0]), int(self.values[1]) + 1)}
        return {path: getattr(tune, self.kind)(*self.values)}

    def ends(self, path: str) -> list[dict[str, Any]]:
        """Draws at the ends of the range and one between, or all there are."""
        if self.kind == "sample_from":
            return [{}]  # any weight is one of [0, 1]: each is checked as what it decodes to
        values = self.values
        if self.kind not in LISTS:
            low, high = values[:2]
            step = {"quniform": values[-1], "randint": 1}.get(self.kind, 0.37 * (high - low))
            values = (low, low + step, high)  # a whole number at both ends may not be one between
        return [{path: label(value)} for value in values]

    def decode(self, path: str, fields: Sequence[str], drawn: Mapping[str, Any]) -> dict[str, Any]:
        """Field → value, from what was drawn; without a draw on the simplex, equal weights."""
        if self.kind == "sample_from":
            # -log of uniform draws is exponential; exponential draws over their sum are uniform
            # on the simplex. So every searcher that knows `uniform` can search it.
            draws = [-math.log(drawn.get(field, 0.5)) for field in fields]
            return {f: d / sum(draws) for f, d in zip(fields, draws, strict=True)}
        value = drawn[path]
        if self.kind in LISTS:
            value = next(v for v in self.values if label(v) == value)
        return dict.fromkeys(fields, value)


Range = Annotated[Parameter, PlainValidator(Parameter.parse), PlainSerializer(Parameter.plain)]
"""A parameter as a field of the sweep file."""


def label(value: Any) -> Any:
    """A choice as searchers like it: a section becomes text."""
    return json.dumps(value, default=str) if isinstance(value, dict | list) else value


def expand(raw: Mapping[str, Any], path: str) -> list[str]:
    """The fields of an experiment (as plain values) that a dotted path with * names.

    Raises:
        KeyError: there is no such field; its argument says what there is.
    """
    return list(_expand(raw, path.split("."), ""))


def _expand(node: Any, parts: Sequence[str], prefix: str) -> Iterator[str]:
    if not parts:
        yield prefix
        return
    part, rest = first_key(node, parts)
    if isinstance(node, list):
        node = {str(number): item for number, item in enumerate(node)}
    names = list(node) if isinstance(node, Mapping) else []
    chosen = names if part == "*" else [name for name in names if name == part]
    if not chosen:
        where = prefix or "the experiment"
        raise KeyError(
            f"{where} has no field {part!r}; {there_is(names, part) if names else 'a value'}"
        )
    for name in chosen:
        yield from _expand(node[name], rest, f"{prefix}.{name}" if prefix else name)
