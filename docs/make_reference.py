"""Write the reference pages in docs/ from the fields' own descriptions."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from mtl_core.config import (
    EncoderConfig,
    Experiment,
    FreezeConfig,
    MixingConfig,
    OptimConfig,
    ScaleConfig,
    SourceConfig,
    TaskConfig,
    TrainingConfig,
    WeightingConfig,
)
from serve_app.settings import Settings
from train_jobs.sweep import Budget, Scheduler, Searcher, Sweep

EXPERIMENT: dict[str, type[BaseModel]] = {
    "top level": Experiment,
    "tasks.<name>": TaskConfig,
    "data[]": SourceConfig,
    "encoder": EncoderConfig,
    "mixing": MixingConfig,
    "weighting": WeightingConfig,
    "freeze": FreezeConfig,
    "optim": OptimConfig,
    "training": TrainingConfig,
    "scale": ScaleConfig,
}


SERVER: dict[str, type[BaseModel]] = {"--set KEY=VALUE": Settings}


SWEEP: dict[str, type[BaseModel]] = {
    "top level": Sweep,
    "searcher": Searcher,
    "scheduler": Scheduler,
    "budget": Budget,
}


def experiment_page() -> str:
    """docs/experiment.md as Markdown."""
    return reference(
        "The experiment file",
        "Every key, its default and what it does. `make docs` writes this page from the code.\n"
        "Unknown keys are errors. `--set section.key=value` changes one from the command line.\n"
        "A file without `name` has its own for one; a source with `demo: true` needs no `columns`.",
        EXPERIMENT,
    )


def settings_page() -> str:
    """docs/settings.md as Markdown."""
    return reference(
        "The server's settings",
        "What `python -m serve_app --set key=value` and `args` in serve_config.yaml take. "
        "`make docs`\nwrites this page from the code. Unknown keys are errors.",
        SERVER,
    )


def sweep_page() -> str:
    """docs/sweep.md as Markdown."""
    return reference(
        "The sweep file",
        "Every key, its default and what it does. `make docs` writes this page from the code.\n"
        "Unknown keys are errors; [tuning.md](tuning.md) shows how sweeps are used. A file without "
        "`name`\nhas its own for one.",
        SWEEP,
    )


def pages() -> dict[str, str]:
    """File name → text of every page that is written from the code."""
    written = {"experiment": experiment_page(), "settings": settings_page(), "sweep": sweep_page()}
    return {f"{name}.md": page for name, page in written.items()}


def reference(title: str, introduction: str, sections: Mapping[str, type[BaseModel]]) -> str:
    """A page of tables, one a section."""
    lines = [f"# {title}", "", introduction]
    for section, model in sections.items():
        lines += ["", f"## {section}", "", "| key | default | meaning |", "|---|---|---|"]
        for name, field in model.model_fields.items():
            if field.description is None:
                continue
            default = "required" if field.is_required() else _show(field.get_default())
            if field.default is PydanticUndefined and not field.is_required():
                default = "none"
            meaning = " ".join(field.description.split())
            values = list(_choices(field.annotation))
            if not all(re.search(rf"\b{value}\b", meaning) for value in values):
                meaning += f" One of {', '.join(f'`{value}`' for value in values)}."
            meaning = meaning.replace("|", "\\|")
            lines.append(f"| `{field.alias or name}` | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _choices(annotation: Any) -> Iterator[str]:
    """The values that a field allows, where it names them; not those within its keys or items."""
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
    elif get_origin(annotation) in (Annotated, Union, UnionType):
        for part in get_args(annotation):
            yield from _choices(part)


def _show(value: object) -> str:
    if value is None or value == () or value == {}:
        return "none"
    if isinstance(value, tuple):
        value = list(value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    for name, page in pages().items():
        Path(__file__).with_name(name).write_text(page, encoding="utf-8")
