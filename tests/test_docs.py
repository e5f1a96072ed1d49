"""The documentation says what the code does."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, TypeAdapter
from ray.scripts.scripts import cli as ray_cli
from ray.serve.scripts import cli as serve_cli

import serve_app.__main__
from aws import prepare
from docs.make_reference import EXPERIMENT, SERVER, SWEEP, pages, reference
from mtl_core.config import load_experiment, parse_experiment
from serve_app import environment, optimize
from serve_app.metrics import Metrics
from tests.pages import PAGES, VARIABLES, Tried, tried
from tests.pages import commands as every_command
from train_jobs import evaluate, predict, similarity, train, tune
from train_jobs.sweep import Sweep

ROOT = Path(__file__).parents[1]
COMMANDS: dict[str, Any] = {
    "train_jobs.train": train,
    "train_jobs.evaluate": evaluate,
    "train_jobs.predict": predict,
    "train_jobs.similarity": similarity,
    "train_jobs.tune": tune,
    "serve_app": serve_app.__main__,
    "aws.prepare": prepare,
    "serve_app.environment": environment,
    "serve_app.optimize": optimize,
}


def yaml_blocks() -> list[str]:
    return [
        block
        for page in PAGES
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    ]


def commands() -> list[str]:
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        found += re.findall(
            r"^\s*(?:\$ )?(?:\w+=\S+ )?(?:ray job submit .* -- )?"
            r"(python -m (?:train_jobs|serve_app|aws)\S* .*)$",
            text,
            re.MULTILINE,
        )
    return found


def test_the_references_are_current() -> None:
    for name, page in pages().items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == page, "make docs"


@pytest.mark.parametrize("model", [*EXPERIMENT.values(), *SERVER.values(), *SWEEP.values()])
def test_the_references_name_every_value_that_a_field_allows(model: type[BaseModel]) -> None:
    page = reference("", "", {"": model})
    for name, field in model.model_json_schema()["properties"].items():
        for part in (field, *field.get("anyOf", ())):
            for value in part.get("enum", ()):
                assert re.search(rf"\| `{name}` \|.*\b{value}\b", page), (name, value)


@pytest.mark.parametrize("model", [*EXPERIMENT.values(), *SERVER.values(), *SWEEP.values()])
def test_the_references_show_defaults_as_yaml_has_them(model: type[BaseModel]) -> None:
    shown = dict(re.findall(r"^\| `(\w+)` \| `(.+?)` \|", reference("", "", {"": model}), re.M))
    for name, field in model.model_fields.items():
        if name in shown:
            default = TypeAdapter(Any).dump_python(field.get_default(), mode="json")
            assert yaml.safe_load(shown[name]) == default, name


def test_whole_experiments_in_the_pages_are_valid() -> None:
    whole = [raw for raw in map(yaml.safe_load, yaml_blocks()) if "data" in raw]
    assert len(whole) >= 2
    for raw in whole:
        assert parse_experiment(raw).tasks


def test_whole_sweeps_in_the_pages_are_valid() -> None:
    whole = [raw for raw in map(yaml.safe_load, yaml_blocks()) if "space" in raw]
    assert whole
    for raw in whole:
        assert Sweep.model_validate({"name": "page", **raw}).space


def test_snippets_in_the_pages_use_known_keys() -> None:
    base = load_experiment(ROOT / "train_jobs/configs/demo.yaml").model_dump(mode="json")
    for block in yaml_blocks():
        if "data:" in block or "space:" in block:
            continue
        for line in filter(str.strip, block.splitlines()):
            parse_experiment({**base, **yaml.safe_load(line)})


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_commands_in_the_pages_name_existing_options(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _, _, module, *arguments = shlex.split(command, comments=True)
    if module == "serve_app.environment":  # what follows is another program
        arguments = []
    with pytest.raises(SystemExit):
        COMMANDS[module].main(["--help"])
    known = capsys.readouterr().out
    for argument in arguments:
        if argument.startswith("--"):
            assert argument in known, argument
        if argument.startswith(("train_jobs/configs/", "tune_configs/")):
            assert (ROOT / argument).is_file()


def test_every_command_in_the_pages_is_tried() -> None:
    assert {tried(command) for command in every_command()} == set(Tried)


def test_make_targets_in_the_pages_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    named = {
        target
        for page in PAGES
        for target in re.findall(r"`?make ([a-z][a-z-]+)`", page.read_text())
    }
    assert named
    assert named <= targets


def operations() -> str:
    return (ROOT / "docs/operations.md").read_text(encoding="utf-8")


def test_every_metric_is_documented_and_every_documented_one_exists() -> None:
    kinds = Metrics("replica").collect()
    exported = {m.name + ("_total" if m.type == "counter" else "") for m in kinds}
    documented = set(re.findall(r"^\| `(mtl_\w+)` \|", operations(), re.MULTILINE))
    assert documented == exported


def test_alerts_ask_for_metrics_that_exist_and_the_page_explains_each() -> None:
    rules = yaml.safe_load((ROOT / "docs/alerts.yml").read_text(encoding="utf-8"))
    alerts = [rule for group in rules["groups"] for rule in group["rules"]]
    exported = {m.name for m in Metrics("replica").collect()}
    for alert in alerts:
        assert alert.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        for name in re.findall(r"mtl_\w+", alert["expr"]):
            assert re.sub(r"_(total|bucket)$", "", name) in exported
    explained = re.findall(r"^\|((?: `[A-Z]\w+`,?)+) \|", operations(), re.MULTILINE)
    assert sorted(re.findall(r"\w+", " ".join(explained))) == sorted(a["alert"] for a in alerts)


def test_sizing_figures_are_measured_ones() -> None:
    measured = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    sizing = operations().partition("## Sizing")[2].partition("\n## ")[0]
    rates = re.findall(r"\b\d+(?:/s| %)", sizing)
    encoders = re.findall(r"\b(\d+)(?: sentences/s| in OpenVINO| in int8)", sizing)
    assert len(rates) >= 5
    assert len(encoders) == 3
    for figure in (*rates, *(f"| {each} |" for each in encoders)):
        assert re.search(rf"(?<![\d.]){re.escape(figure)}", measured), figure


def test_operations_run_what_exists() -> None:
    lines = re.findall(rf"^    ({VARIABLES}[a-z][\w.-]* .*)$", operations(), re.MULTILINE)
    services = yaml.safe_load((ROOT / "docker/docker-compose.yml").read_text())["services"]
    stages = re.findall(r" AS (\w+)", (ROOT / "docker/Dockerfile").read_text())
    for line in lines:
        for path in re.findall(r"(?<!\S)docker/[\w.-]+[a-z]\b(?!/)", line):
            assert (ROOT / path).exists() or path == "docker/secrets", line
        for target in re.findall(r"--target (\w+)|multitask-ray:(\w+)", line):
            assert set(target) - {""} <= set(stages), line
        for name in re.findall(r"(?:exec|--scale|--profile) (\w+)", line):
            assert name in services, line
        for program, verb in re.findall(r"\b(ray|serve) (start|status|deploy)\b", line):
            assert verb in {"ray": ray_cli, "serve": serve_cli}[program].commands, line


def test_containers_run_under_the_number_of_who_builds_them() -> None:
    """The Dockerfile and the Compose file know it from nowhere else, and take 1000."""
    found = re.findall(r"^.*docker (?:build|compose\b.* up)\b.*$", operations(), re.MULTILINE)
    assert len(found) >= 8
    for line in found:
        assert ("MTL_UID=$(id -u) " if "compose" in line else "--build-arg UID=$(id -u) ") in line


def test_links_between_pages_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
