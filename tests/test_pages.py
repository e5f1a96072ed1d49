"""Commands of README and docs, run as they stand: `make readme-check`; tests/pages.py says where.

Places and sizes that are not here are put in their place (`Account.run`, `LESS`).
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from serve_app.haproxy import free_ports
from tests.commands import ROOT, environment
from tests.head_node import HeadNode, head_node
from tests.pages import Tried, tried_in
from tests.s3_server import ACCESS, s3_server
from tests.servers import call, real_server, wait_for

DEMO = ROOT / "runs/demo"
READER = ["README.md", "usage.md", "serving.md", "operations.md"]
AWS = ["operations.md", "tuning.md", "deploy-aws.md", "README.md", "serving.md"]

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(900)]
if not os.environ.get("README_CHECK"):
    pytest.skip("many minutes: make readme-check", allow_module_level=True)


def run(command: str, folder: Path, **changes: str) -> None:
    """Have a shell run it, as a reader does whose environment is this one."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**environment(None, **changes), "PATH": path}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=env, input="y\n", text=True, check=False
    )
    assert done.returncode == 0, command


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to run in: the demo's run, the sweeps, and files of the reader's own."""
    folder = tmp_path_factory.mktemp("reader")
    shutil.copytree(DEMO, folder / "runs/demo")
    shutil.copytree(DEMO / "artifact", folder / "runs/next/artifact")
    (folder / "tune_configs").symlink_to(ROOT / "tune_configs")
    (folder / "train_jobs").mkdir()
    (folder / "train_jobs/configs").symlink_to(ROOT / "train_jobs/configs")
    (folder / "in.jsonl").write_text('{"text": "The food was cold."}\n', encoding="utf-8")
    (folder / ".multitask-ray").mkdir()
    (folder / ".multitask-ray/api_keys").write_text("first\n", encoding="utf-8")
    labelled = '{"text": "The food was cold.", "sentiment": "negative"}\n'
    (folder / "other.jsonl").write_text(labelled, encoding="utf-8")
    own = yaml.safe_load((ROOT / "train_jobs/configs/demo.yaml").read_text(encoding="utf-8"))
    for name in ("my", "reviews"):
        own |= {"name": name, "data": [{"demo": True, "limit": 100}]}
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(own), encoding="utf-8")
    return folder


@pytest.mark.parametrize("command", tried_in(Tried.READER, *READER))
def test_a_command_runs(command: str, folder: Path) -> None:
    run(command, folder)


@pytest.mark.parametrize(
    "command", [c for c in tried_in(Tried.SERVER) if not c.startswith("curl ")]
)
def test_a_server_answers_until_it_is_stopped(command: str, folder: Path) -> None:
    variables = re.match(r"(?:\w+=\S+ )*", command)
    assert variables
    env = dict(word.split("=", 1) for word in variables[0].split())
    line = command[variables.end() :].replace("0.0.0.0", "127.0.0.1")
    options = shlex.split(line.replace("~", str(folder)))
    assert options[:4] == ["python", "-m", "serve_app", "--artifact"]
    key = "first" if env or "--keys-file" in options else None
    with real_server(folder / options[4], folder, *options[5:], env=env, cwd=folder) as server:
        url = f"{server.url}/v1/predict"
        assert call(url, {"inputs": "I loved Lisbon."}, key=key).status == 200
        if key:
            assert call(url, {"inputs": "I loved Lisbon."}).status == 401
        assert server.stop(signal.SIGINT) == 0


@pytest.mark.parametrize("page", ["README.md", "serving.md", "usage.md"])
def test_the_server_answers_what_the_page_says(page: str, tmp_path: Path) -> None:
    path = ROOT / page if page == "README.md" else ROOT / "docs" / page
    text = path.read_text(encoding="utf-8")
    ((command, reply),) = re.findall(r"```\n\$ (curl .*/v1/predict .*)\n((?:.*\n)+?)```", text)
    with real_server(DEMO / "artifact", tmp_path) as server:
        asked = shlex.split(command.replace("localhost:8000", server.url))
        done = subprocess.run(asked, capture_output=True, text=True, check=True)
    (found,), (told,) = json.loads(done.stdout)["results"], json.loads(reply)["results"]
    assert found["sentiment"]["label"] == told["sentiment"]["label"]
    spans = [[(e["word"], e["entity_group"]) for e in each["entities"]] for each in (found, told)]
    assert spans[0] == spans[1]


@dataclass
class Account:
    """A simulated AWS, and the node that stands for its cluster."""

    node: HeadNode
    port: str
    """What Serve is to listen on."""
    folder: Path
    """The reader's."""

    def run(self, command: str) -> None:
        """Run a command of the pages, with what is here in the place of what is not."""
        here = {
            "http://localhost:8265": self.node.dashboard,
            "http://127.0.0.1:8265": self.node.dashboard,
            "localhost:8000": f"127.0.0.1:{self.port}",
            "10.0.0.5:6379": self.node.gcs,
            "scale.gpu=true": "scale.gpu=false",
            "; ray down cluster.yaml": "",
            "$(sed ": f"$(cd {ROOT}; sed ",
        }
        for there, place in here.items():
            command = command.replace(there, place)
        if "train_jobs.train" in command:
            command += " --set training.epochs=1"
        if "train_jobs.tune" in command:
            command += " --set baselines=false --set seeds=1 --set budget.trials=2"
        if "python -m serve_app " in command:
            command += f" --port {self.port}"
        if "RAY_ADDRESS=" in command:
            command += " --ask 'I loved Lisbon.'"
        settings = "; ".join(tried_in(Tried.SETTING)).replace(
            "http://localhost:8265", self.node.dashboard
        )
        needs_checkout = "job submit" in command or "aws.prepare" in command
        run(f"{settings}; {command}", ROOT if needs_checkout else self.folder, **self.node.env)
        if "serve deploy" in command:
            wait_for(self.ready, 120)

    def ready(self) -> bool:
        try:
            return call(f"http://127.0.0.1:{self.port}/ready").status == 200
        except OSError:
            return False


@pytest.fixture(scope="module")
def account(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Account]:
    """An account that `aws.prepare` prepared; the node has the token that it made."""
    (prepare,) = tried_in(Tried.CLUSTER, "usage.md")
    (start,) = [c for c in tried_in(Tried.CLUSTER, "serving.md") if "ray start" in c]
    home = tmp_path_factory.mktemp("home")
    with s3_server("bucket") as (client, access):
        import boto3

        names = {"endpoint_url": access["AWS_ENDPOINT_URL"], "region_name": "us-east-1"}
        keys = {name.lower(): ACCESS[name] for name in ACCESS if name != "AWS_DEFAULT_REGION"}
        boto3.client("iam", **names, **keys).create_user(UserName="NAME")
        env = {**access, "HOME": str(home)}
        run(prepare, ROOT, **env)
        token = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": f"{home}/.multitask-ray/ray_token",
        }
        with head_node({**env, **token}, shlex.split(start)) as node:
            client.put_object(
                Bucket="my-runs", Key="in.jsonl", Body=(folder / "in.jsonl").read_bytes()
            )
            yield Account(node, str(free_ports(1)[0]), folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "command", [c for c in tried_in(Tried.CLUSTER, *AWS) if "ray start" not in c]
)
def test_a_command_runs_on_a_cluster(command: str, account: Account) -> None:
    if command.startswith("aws ") and not shutil.which("aws"):
        pytest.skip("the AWS command line is not installed")
    account.run(command)


LESS = {
    "--vary rates": "--seeds 1 --only 'learning_rate 5e-4'",
    "--vary weighting": "--seeds 1 --only fixed",
    "benchmarks/freezing.py": "--seeds 1 --only 'encoder frozen'",
    "benchmarks/corpus_size.py": "--rows 4000 --shard-texts 500",
    "benchmarks/encoders.py": "--rounds 1 --steps 1",
    "benchmarks/startup.py": "--runs 1",
    "benchmarks/weighting.py": "--rounds 2 --steps 1 --warm-up 0",
    "benchmarks/frozen_sweep.py": "--trials 2",
    "benchmarks.train ": "--rounds 1 --only frozen",
    "benchmarks.train.scores": "--epochs 1 --seeds 1",
    "benchmarks.train.ours": "--steps 3",
    "benchmarks.scaling": "--rounds 1",
    "benchmarks.serve.scores": "",
    "benchmarks.serve": "--rounds 1 --seconds 1 --texts 200 --only predict",
    "train_jobs.tune": "--set seeds=1 --set budget.trials=1 --set set.training.epochs=1"
    " --set set.data.0.limit=4000",
}


@pytest.mark.parametrize("command", tried_in(Tried.BENCHMARK))
def test_a_benchmark_runs(command: str, tmp_path: Path) -> None:
    """With the command's own options and fewer rounds, so that it ends within a minute or two."""
    if "MTL_DATA=…" in command and not os.environ.get("MTL_DATA"):
        pytest.skip("MTL_DATA is not set")
    command = command.replace("MTL_DATA=… ", "")
    command = command.replace("runs/snips/artifact", str(DEMO / "artifact"))
    if "--int8" in command and torch.cpu._is_amx_tile_supported():
        pytest.skip("int8 is no faster than bf16 on AMX, so serve_app.optimize keeps none")
    if "serve" in command and "scores" not in command and not shutil.which("wrk"):
        pytest.skip("wrk is not installed")
    if command.startswith("make "):
        shown = subprocess.run(
            ["make", "-n", command.split()[1]], cwd=ROOT, stdout=subprocess.PIPE, text=True
        ).stdout
        command = next(line for line in shown.splitlines() if "benchmarks" in line)
    less = next(options for name, options in LESS.items() if name in f"{command} ")
    run(f"{command} {less}", ROOT)
