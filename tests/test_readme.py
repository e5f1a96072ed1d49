"""Commands of the README and docs/usage.md, run as they stand on what `make demo` trained.

`make readme-check` runs them; test_docs looks at those of the other pages.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.commands import ROOT, environment
from tests.servers import real_server

README = (ROOT / "README.md").read_text(encoding="utf-8")
USAGE = (ROOT / "docs/usage.md").read_text(encoding="utf-8")
DEMO = ROOT / "runs/demo"

pytestmark = [
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not os.environ.get("README_CHECK"), reason="minutes: make readme-check"),
]


def section(title: str) -> str:
    return README.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def commands(text: str) -> list[str]:
    """Those that end by themselves and need nobody's account."""
    found = re.findall(r"^    (python -m .*)$", text, re.MULTILINE)
    servers = re.compile(r"python -m serve_app(?!.*--(ask|write-config))(?!\.)")
    return [c for c in found if "aws.prepare" not in c and not servers.match(c)]


COMMANDS = dict.fromkeys(
    [
        *commands(section("Use what it learned")),
        *commands(section("Find better settings")),
        *commands(USAGE),
    ]
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run in: the demo's run, the sweeps, and a file of the reader's own."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "runs").mkdir()
    (folder / "runs/demo").symlink_to(DEMO)
    (folder / "tune_configs").symlink_to(ROOT / "tune_configs")
    (folder / "train_jobs").mkdir()
    (folder / "train_jobs/configs").symlink_to(ROOT / "train_jobs/configs")
    (folder / "in.jsonl").write_text('{"text": "The food was cold."}\n', encoding="utf-8")
    labelled = '{"text": "The food was cold.", "sentiment": "negative"}\n'
    (folder / "other.jsonl").write_text(labelled, encoding="utf-8")
    own = yaml.safe_load((ROOT / "train_jobs/configs/demo.yaml").read_text(encoding="utf-8"))
    own |= {"name": "my", "data": [{"demo": True, "limit": 100}]}
    (folder / "my.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs(command: str, folder: Path) -> None:
    arguments = [sys.executable, *shlex.split(command)[1:]]
    assert subprocess.run(arguments, cwd=folder, env=environment(None), check=False).returncode == 0


def test_the_server_answers_what_the_page_says(tmp_path: Path) -> None:
    command, reply = re.findall(r"```\n\$ (curl .*)\n((?:.*\n)+?)```", section("Serve it"))[0]
    with real_server(DEMO / "artifact", tmp_path) as server:
        asked = shlex.split(command.replace("localhost:8000", server.url))
        done = subprocess.run(asked, capture_output=True, text=True, check=True)
    (found,), (told,) = json.loads(done.stdout)["results"], json.loads(reply)["results"]
    assert found["sentiment"]["label"] == told["sentiment"]["label"]
    spans = [[(e["word"], e["entity_group"]) for e in each["entities"]] for each in (found, told)]
    assert spans[0] == spans[1]
