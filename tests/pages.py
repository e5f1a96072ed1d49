"""The commands that README and docs tell a reader to type, and where each of them is tried."""

from __future__ import annotations

import re
from enum import Enum

from tests.commands import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = (
    "python|make|ray|serve|curl|pip|aws|docker|echo|export|openssl|journalctl"
    "|cp|mv|rm|mkdir|tar|df|du"
)
VARIABLES = r"(?:\w+=(?:\$\(.*?\)|\S+) )*"
"""What a command's line may begin with."""


class Tried(Enum):
    """Where a command is tried."""

    READER = "in a folder of the reader's, on what `make demo` trained"
    SERVER = "the same; the command runs until it is stopped"
    CLUSTER = "on a node that `ray start` made, with a simulated AWS"
    BENCHMARK = "with fewer rounds"
    SETTING = "sets variables for the commands after it"
    MAKE = "by .ci/run, the workflows, or test_build"
    SIMULATED = "by test_aws, since Ray's launcher needs machines to log in to"
    ENGINE = "by test_containers as far as it goes without an engine for containers"


_WHERE = [
    (r"export ", Tried.SETTING),
    (r"pip install", Tried.MAKE),
    (r"docker|make up|make down|journalctl", Tried.ENGINE),
    (r"make (demo|serve|wheel|test|test-fast|check|notebook)\b", Tried.MAKE),
    (r"serve shutdown", Tried.CLUSTER),
    (r"ray (up|dashboard|attach|down)\b", Tried.SIMULATED),
    (r"benchmarks|make bench-|tune_configs/all.yaml", Tried.BENCHMARK),
    (r"s3://|aws\b|ray job|serve deploy|serve status|ray start|ray get-auth|/ready", Tried.CLUSTER),
    (r"(\w+=\S+ )*python -m serve_app (?!.*--(ask|write-config))", Tried.SERVER),
    (r"curl .*/v1/predict", Tried.SERVER),
    (r"python -m (train_jobs|serve_app)|(cp|mv|rm|mkdir|tar|df|du|openssl) ", Tried.READER),
]
"""What begins so or, past its first word, holds it: the first that fits counts."""


def commands(page: str = "") -> list[str]:
    """Commands of one page, or of all, in order: indented by four, or after a `$`."""
    found = []
    for path in PAGES:
        if page in ("", path.name):
            text = path.read_text(encoding="utf-8").replace("\\\n", " ")
            lines = re.findall(rf"^(?:    |\$ )({VARIABLES}(?:{PROGRAMS}) .*)$", text, re.MULTILINE)
            found += [" ".join(re.sub(r"\s# .*", "", line).split()) for line in lines]
    return found


def tried(command: str) -> Tried:
    """Where it is tried; KeyError for a command that nobody tries."""
    for pattern, where in _WHERE:
        if re.match(pattern, command) or re.search(rf"(?<![\w.-]){pattern}", command):
            return where
    raise KeyError(command)


def tried_in(where: Tried, *pages: str) -> list[str]:
    """The commands that are tried there, each once, page after page."""
    found = [c for page in pages or ("",) for c in commands(page)]
    return list(dict.fromkeys(command for command in found if tried(command) is where))
