"""Write docs/experiment.md from the experiment file's own field descriptions."""

from __future__ import annotations

from pathlib import Path

from pydantic_core import PydanticUndefined

from mtl_core.config import (
    Config,
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

SECTIONS: dict[str, type[Config]] = {
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


def reference() -> str:
    """The page as Markdown."""
    lines = [
        "# The experiment file",
        "",
        "Every key, its default and what it does. `make docs` writes this page from the code.",
        "Unknown keys are errors. `--set section.key=value` changes one from the command line.",
    ]
    for title, model in SECTIONS.items():
        lines += ["", f"## {title}", "", "| key | default | meaning |", "|---|---|---|"]
        for name, field in model.model_fields.items():
            if field.description is None:
                continue
            default = "required" if field.is_required() else _show(field.get_default())
            if field.default is PydanticUndefined and not field.is_required():
                default = "none"
            meaning = " ".join(field.description.split()).replace("|", "\\|")
            lines.append(f"| `{name}` | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _show(value: object) -> str:
    if value is None or value == () or value == {}:
        return "none"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


if __name__ == "__main__":
    Path(__file__).with_name("experiment.md").write_text(reference(), encoding="utf-8")
