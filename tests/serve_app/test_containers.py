"""The image and the compose file: what can be checked of them without a container engine.

`make docker-check` also installs what the image installs into a fresh virtual environment and
starts its command there, which takes minutes.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import yaml

import serve_app.__main__
from serve_app.environment import SERVE_ENVIRONMENT
from serve_app.errors import unavailable
from serve_app.haproxy import free_ports, haproxy_files
from tests.servers import call, local_server

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker/docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
TARGETS = ("cpu", "gpu", "jupyter")


def stages() -> dict[str, list[tuple[str, str]]]:
    """Stage → its instructions, FROM included, lines joined."""
    text = (ROOT / "docker/Dockerfile").read_text(encoding="utf-8")
    text = re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ")
    found: dict[str, list[tuple[str, str]]] = {"": []}
    for line in filter(str.strip, text.splitlines()):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            found[rest.split()[2]] = []
        found[list(found)[-1]].append((word, rest.strip()))
    return found


def instructions(stage: str, word: str) -> Iterator[str]:
    """A stage's instructions of one kind, after those of the stages it builds on."""
    if stage in (known := stages()):
        base = next(rest for found, rest in known[stage] if found == "FROM").split()[0]
        yield from instructions(base, word)
        yield from (rest for found, rest in known[stage] if found == word)


def command(stage: str) -> list[str]:
    """ENTRYPOINT and CMD as they are started."""
    parts = [json.loads([*instructions(stage, word)][-1]) for word in ("ENTRYPOINT", "CMD")]
    return [*parts[0], *parts[1]]


def sent_to_the_builder(path: str) -> bool:
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    sent, parts = True, path.split("/")
    for pattern in patterns:
        name = pattern.lstrip("!").removeprefix("**/")
        # What holds for a folder holds for what is in it.
        if any(fnmatch(part, name) for part in (parts if "**/" in pattern else parts[:1])):
            sent = pattern.startswith("!")
    return sent


def test_the_base_is_pinned_to_a_full_version() -> None:
    (base,) = (rest for word, rest in stages()[""] if word == "ARG")
    assert re.fullmatch(r"BASE=python:\d+\.\d+\.\d+-slim-\w+", base)
    outside = {rest.split()[0] for stage in stages().values() for w, rest in stage if w == "FROM"}
    assert outside - set(stages()) == {"${BASE}"}


def test_what_is_copied_exists_and_is_sent_to_the_builder() -> None:
    copies = [rest for stage in stages().values() for word, rest in stage if word == "COPY"]
    words = [w for c in copies if "--from" not in c for w in shlex.split(c)[:-1]]
    sources = {word for word in words if not word.startswith("--")}
    assert {"pyproject.toml", "constraints.txt", "serve_app"} <= sources
    for source in sources:
        assert (ROOT / source).exists(), source
        assert sent_to_the_builder(source), source
    left = (".git", ".venv", "runs", "tests", "docker", "mtl_core/data/__pycache__")
    left += ("notebooks/runs/demo", "notebooks/.ipynb_checkpoints")
    assert not any(map(sent_to_the_builder, left))


def test_packages_are_a_layer_that_other_code_leaves_as_it_is() -> None:
    copies = [rest for stage in stages().values() for word, rest in stage if word == "COPY"]
    packages = [copy for copy in copies if copy.endswith("/opt/venv")]
    assert len(packages) == 3
    assert all(copy.startswith("--link ") for copy in packages)


def test_the_dockerfile_has_no_known_mistake() -> None:
    hadolint = [Path(sys.executable).with_name("hadolint"), ROOT / "docker/Dockerfile"]
    done = subprocess.run(hadolint, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_compose_file_follows_its_schema() -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    file = ROOT / "docker/docker-compose.yml"
    done = subprocess.run([*check, file], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_jupyter_has_the_notebooks_as_its_user_s_and_what_they_link_to() -> None:
    copies = [*instructions("jupyter", "COPY")]
    assert "--chown=mtl notebooks ./notebooks" in copies
    (quickstart,) = (ROOT / "notebooks").glob("*.ipynb")
    linked = set(re.findall(r"\]\(\.\./(\w+)/", quickstart.read_text(encoding="utf-8")))
    assert linked == {"docs"}
    assert "docs ./docs" in copies


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_runs_as_root(target: str) -> None:
    assert [*instructions(target, "USER")] == ["${UID}"]
    assert "UID=1000" in [*instructions(target, "ARG")]


def requirements(folder: Path, python: Path) -> str:
    """Run the image's own way to name what it installs; the requirements."""
    (step,) = (run for run in instructions("packages", "RUN") if "tomllib" in run)
    for name in ("pyproject.toml", "constraints.txt"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    extract = step.partition("&&")[2]
    environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"}
    subprocess.run(["sh", "-ec", extract], cwd=folder, env=environment, check=True)
    return (folder / "requirements.txt").read_text(encoding="utf-8")


def test_the_image_installs_what_the_project_depends_on(tmp_path: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    expected = [*project["dependencies"], *project["optional-dependencies"]["s3"]]
    assert requirements(tmp_path, Path(sys.executable)).splitlines() == expected


@pytest.mark.slow
def test_what_is_installed_here_is_what_the_image_would_install(tmp_path: Path) -> None:
    requirements(tmp_path, Path(sys.executable))
    install = [*instructions("packages-gpu", "RUN")][-1]
    arguments = shlex.split(install[install.index("pip install") :])
    dry_run = [sys.executable, "-m", *arguments, "--dry-run", "--no-index"]
    done = subprocess.run(dry_run, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Would install" not in done.stdout


def test_ray_starts_with_what_serve_reads() -> None:
    printed = "import json, os; print(json.dumps(dict(os.environ)))"
    entry = [sys.executable, *command("cpu")[1:3], sys.executable, "-c", printed]
    kept = {"RAY_SERVE_HAPROXY_RETRIES": "1"}
    clean = {name: value for name, value in os.environ.items() if name not in SERVE_ENVIRONMENT}
    clean |= haproxy_files("/tmp/none")  # or a folder for them would stay
    out = subprocess.run(entry, cwd=ROOT, env={**clean, **kept}, stdout=subprocess.PIPE, check=True)
    found = json.loads(out.stdout)
    assert {name: found.get(name) for name in SERVE_ENVIRONMENT} == SERVE_ENVIRONMENT | kept


def test_the_image_refuses_to_serve_without_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *_, module, option, artifact, host_option, host = command("cpu")
    assert (module, option, artifact) == ("serve_app", "--artifact", "runs/demo/artifact")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MTL_API_KEYS", raising=False)
    with pytest.raises(ValueError, match="without a key"):
        serve_app.__main__.main([option, artifact, host_option, host])


def healthy(target: str, url: str) -> bool:
    """Run a target's health check, as it stands in the image, against a server elsewhere."""
    _, _, check = [*instructions(target, "HEALTHCHECK")][-1].partition(" CMD ")
    python, *arguments = json.loads(check)
    assert python == "python"
    words = [re.sub(r"http://127\.0\.0\.1:\d+", url, word) for word in arguments]
    # As Docker passes on a proxy of the machine's.
    env = {**os.environ, "http_proxy": f"http://127.0.0.1:{free_ports(1)[0]}"}
    done = subprocess.run([sys.executable, *words], stderr=subprocess.DEVNULL, check=False, env=env)
    assert done.returncode in (0, 1)  # Docker reserves the others
    return done.returncode == 0


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_a_container_is_healthy_while_it_serves(target: str, local_url: str) -> None:
    assert healthy(target, local_url)
    assert not healthy(target, f"http://127.0.0.1:{free_ports(1)[0]}")


def test_a_container_whose_heads_are_away_is_not_healthy(artifact: Path) -> None:
    async def no_heads() -> None:
        raise unavailable("head-topic does not answer")

    with local_server(artifact, runtime="torch-fp32", ready=no_heads) as (url, _):
        assert not healthy("cpu", url)


def test_published_ports_are_this_machines_alone() -> None:
    published = [port for service in SERVICES.values() for port in service.get("ports", ())]
    assert published
    assert all(port.startswith("127.0.0.1:") for port in published)


@pytest.mark.parametrize("service", SERVICES.values(), ids=list(SERVICES))
def test_every_container_has_a_token_and_no_rights(service: dict[str, Any]) -> None:
    assert service["build"]["dockerfile"] == "docker/Dockerfile"
    assert service["build"]["target"] in TARGETS
    assert service["environment"]["RAY_AUTH_MODE"] == "token"
    secrets = next(v for v in service["volumes"] if v["source"] == "./secrets")
    assert Path(service["environment"]["RAY_AUTH_TOKEN_PATH"]).parent == Path(secrets["target"])
    assert (service["cap_drop"], service["init"]) == (["ALL"], True)


def test_ray_knows_the_commands_of_the_compose_file(capsys: pytest.CaptureFixture[str]) -> None:
    from ray.scripts.scripts import cli

    commands = [SERVICES[name]["command"] for name in ("head", "worker")]
    checks = [SERVICES[name]["healthcheck"]["test"][1:] for name in ("head", "worker")]
    for program, verb, *options in [*commands, *checks]:
        assert program == "ray"
        known = {name for parameter in cli.commands[verb].params for name in parameter.opts}
        assert {option.partition("=")[0] for option in options} <= known


def test_the_compose_file_deploys_behind_a_key() -> None:
    from ray.serve.scripts import cli

    first, second = SERVICES["serve"]["command"][-1].replace("$$", "$").strip().splitlines()
    arguments = shlex.split(first)
    assert arguments[:3] == ["python", "-m", "serve_app"]
    assert "--insecure" not in arguments
    assert arguments[arguments.index("--keys-file") + 1] == "/run/mtl/api_keys"
    assert shlex.split(second)[-1] == arguments[arguments.index("--write-config") + 1]
    options = {name for parameter in cli.commands["deploy"].params for name in parameter.opts}
    assert "--address" in options


@pytest.mark.slow
@pytest.mark.skipif(not os.environ.get("DOCKER_CHECK"), reason="minutes: make docker-check")
def test_the_image_serves_from_a_fresh_environment(tmp_path: Path, artifact: Path) -> None:
    python = tmp_path / "venv/bin/python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    requirements(tmp_path, python)
    environment = {**os.environ, "PATH": f"{python.parent}:{os.environ['PATH']}"}
    for step in list(instructions("packages-cpu", "RUN"))[1:]:
        install = re.sub(r"^--mount=\S+\s+", "", step)
        subprocess.run(["sh", "-ec", install], cwd=tmp_path, env=environment, check=True)
    served = tmp_path / "runs/demo/artifact"
    served.parent.mkdir(parents=True)
    served.symlink_to(artifact)
    port = free_ports(1)[0]
    environment |= {"PYTHONPATH": str(ROOT), "MTL_API_KEYS": "first"}
    start = [*command("cpu"), "--port", str(port)]
    with subprocess.Popen(
        start, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            assert any("ready: " in line for line in process.stdout)
            url = f"http://127.0.0.1:{port}/v1/predict"
            assert call(url, {"inputs": "hello"}).status == 401
            assert call(url, {"inputs": "hello"}, key="first").status == 200
            assert healthy("cpu", f"http://127.0.0.1:{port}")
        finally:
            process.terminate()
            assert process.wait(90) == 0
