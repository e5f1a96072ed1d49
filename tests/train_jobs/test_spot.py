"""The watcher for AWS's spot notice, before a metadata service of the test's own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import pytest

from train_jobs import spot


class Metadata(BaseHTTPRequestHandler):
    """IMDSv2: a value only for who first fetched a token by PUT."""

    values: ClassVar[dict[str, str]] = {}
    asked: ClassVar[list[str]] = []
    failures = 0

    def do_PUT(self) -> None:
        assert self.path == "/latest/api/token"
        assert int(self.headers["X-aws-ec2-metadata-token-ttl-seconds"]) > 0
        self._answer(200, "a-token")

    def do_GET(self) -> None:
        name = self.path.removeprefix("/latest/meta-data/")
        type(self).asked.append(name)
        if self.headers["X-aws-ec2-metadata-token"] != "a-token":
            self._answer(401, "")
        elif type(self).failures:
            type(self).failures -= 1
            self._answer(500, "")
        elif name in self.values:
            self._answer(200, self.values[name])
        else:
            self._answer(404, "")

    def _answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        return


@pytest.fixture
def metadata() -> Iterator[str]:
    Metadata.values, Metadata.asked, Metadata.failures = {"instance-life-cycle": "spot"}, [], 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def notice(seconds: int) -> str:
    end = datetime.now(UTC) + timedelta(seconds=seconds)
    return json.dumps({"action": "terminate", "time": end.strftime("%Y-%m-%dT%H:%M:%SZ")})


def test_it_waits_for_the_notice_and_says_how_long_is_left(metadata: str) -> None:
    timer = threading.Timer(
        0.2, lambda: Metadata.values.update({"spot/instance-action": notice(120)})
    )
    timer.start()
    left = spot.wait_for_notice(metadata, poll=0.02)
    assert left is not None
    assert 115 <= left <= 120
    assert Metadata.asked.count("spot/instance-action") > 2


def test_a_metadata_service_that_fails_is_asked_again(
    metadata: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Metadata.failures = 2
    Metadata.values["spot/instance-action"] = notice(60)
    assert spot.wait_for_notice(metadata, poll=0.01) is not None
    assert capsys.readouterr().err.count("metadata: HTTP Error 500") == 2


def test_on_another_machine_it_ends_at_once(
    metadata: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Metadata.values["instance-life-cycle"] = "on-demand"
    spot.main(["--metadata", metadata])
    assert "not a spot machine" in capsys.readouterr().out


def test_it_drains_this_node_with_the_time_that_is_left(
    metadata: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Metadata.values["spot/instance-action"] = notice(90)
    called: list[list[str]] = []
    monkeypatch.setattr(spot.subprocess, "call", lambda command: called.append(command) or 3)
    with pytest.raises(SystemExit) as ended:
        spot.main(["--metadata", metadata, "--address", "10.0.0.1:6379"])
    assert ended.value.code == 3
    (command,) = called
    assert command[1:4] == ["-m", "ray.scripts.scripts", "drain-node"]
    assert command[command.index("--reason") + 1] == "DRAIN_NODE_REASON_PREEMPTION"
    assert 80 <= int(command[command.index("--deadline-remaining-seconds") + 1]) <= 90
    assert command[-2:] == ["--address", "10.0.0.1:6379"]
