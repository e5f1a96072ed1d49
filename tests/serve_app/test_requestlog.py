"""A line a request in the log, never a word of what was asked."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from serve_app.heads import LocalHead
from serve_app.requestlog import RequestLog
from tests.servers import call, local_server

SECRET = "Maria Lopez told Zoë nothing"
Lines = Callable[[], list[dict[str, Any]]]


class Breakable(LocalHead):
    """A head whose error quotes the text."""

    broken = False

    async def __call__(self, *call: Any) -> Any:
        if self.broken:
            raise ValueError(f"cannot read {SECRET}")
        return await super().__call__(*call)


@pytest.fixture(scope="module")
def logged(artifact: Path) -> Iterator[tuple[str, io.StringIO, Breakable]]:
    stream, head = io.StringIO(), Breakable()
    log = RequestLog(True, stream)
    with local_server(artifact, lambda _: head, log, runtime="torch-fp32") as (url, _):
        yield url, stream, head


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    """What was logged since the last look."""
    text = stream.getvalue()
    stream.seek(0)
    stream.truncate()
    assert "Maria" not in text
    assert "Lopez" not in text
    assert "Zo" not in text
    return [json.loads(line) for line in text.splitlines()]


def test_a_request_is_a_line_with_its_id(logged: tuple[str, io.StringIO, Breakable]) -> None:
    url, stream, _ = logged
    lines(stream)
    answer = call(f"{url}/v1/predict", {"inputs": [SECRET, "a"]}, x_request_id="abc-1")
    assert answer.status == 200
    (row,) = lines(stream)
    assert row["id"] == "abc-1"
    assert (row["method"], row["route"], row["status"]) == ("POST", "/v1/predict", 200)
    assert (row["texts"], row["tokens"]) == (2, answer.body["usage"]["tokens"])
    assert 0 <= row["queue_ms"] <= row["ms"]
    assert len(row["version"]) == 16
    assert row["time"] > 1_700_000_000


def test_refused_requests_are_logged_without_their_texts(
    logged: tuple[str, io.StringIO, Breakable],
) -> None:
    url, stream, _ = logged
    lines(stream)
    refused: list[tuple[str, Any, int]] = [
        ("/v1/predict", {"inputs": SECRET, "tasks": [SECRET]}, 404),
        ("/v1/predict", {"inputs": SECRET, SECRET: 1}, 422),
        ("/v1/predict", {"inputs": [SECRET, " "]}, 422),
        ("/v1/predict", f'{{"inputs": "{SECRET}'.encode(), 422),
        ("/embed", {"inputs": f"{SECRET} " * 100}, 413),
        ("/tasks/Maria%20Lopez", {"inputs": SECRET}, 404),
        ("/predict?task=Maria%20Lopez", {"inputs": SECRET}, 404),
    ]
    for path, body, status in refused:
        assert call(url + path, body).status == status
    rows = lines(stream)
    assert [row["status"] for row in rows] == [status for _, _, status in refused]
    assert rows[-2]["route"] == "/tasks/{task}"


def test_what_no_route_answers_is_logged_and_counted_without_its_path(
    logged: tuple[str, io.StringIO, Breakable],
) -> None:
    url, stream, _ = logged
    lines(stream)
    assert call(f"{url}/v2/Maria%20Lopez").status == 404
    assert call(f"{url}/v1/predict", method="DELETE").status == 405
    assert [(row["route"], row["status"]) for row in lines(stream)] == [
        ("none", 404),
        ("none", 405),
    ]
    found = call(f"{url}/metrics").body
    assert 'mtl_requests_total{replica="local",route="none",status="404"} 1.0' in found


def test_keys_are_never_logged(artifact: Path, tmp_path: Path) -> None:
    stream, file = io.StringIO(), tmp_path / "keys.txt"
    file.write_text("right-key\n")
    log = RequestLog(True, stream)
    with local_server(artifact, None, log, runtime="torch-fp32", keys_file=str(file)) as (url, _):
        for key, status in (("right-key", 200), ("wrong-key", 401)):
            assert call(f"{url}/v1/predict", {"inputs": SECRET}, key=key).status == status
        metrics = call(f"{url}/metrics", key="right-key").body
    assert "-key" not in stream.getvalue()
    assert len(lines(stream)) == 3
    assert "-key" not in metrics


def test_an_error_of_the_server_is_logged_with_its_place_but_not_its_words(
    logged: tuple[str, io.StringIO, Breakable],
) -> None:
    url, stream, head = logged
    lines(stream)
    head.broken = True
    try:
        answer = call(f"{url}/v1/predict", {"inputs": SECRET}, x_request_id="bad-1")
    finally:
        head.broken = False
    assert answer.status == 500
    error, request = lines(stream)
    assert (error["id"], error["error"]) == ("bad-1", "ValueError")
    assert any(__file__ in place for place in error["trace"])
    assert (request["id"], request["status"]) == ("bad-1", 500)


def test_an_id_cannot_forge_a_line(logged: tuple[str, io.StringIO, Breakable]) -> None:
    url, stream, _ = logged
    lines(stream)
    call(f"{url}/health", x_request_id='"}{"id": "' + "x" * 500)
    (row,) = lines(stream)
    assert len(row["id"]) == 128


def test_requests_are_not_logged_when_that_is_off_but_errors_are(artifact: Path) -> None:
    stream, head = io.StringIO(), Breakable()
    head.broken = True
    log = RequestLog(False, stream)
    with local_server(artifact, lambda _: head, log, runtime="torch-fp32") as (url, _):
        call(f"{url}/embed", {"inputs": SECRET})
        assert lines(stream) == []
        call(f"{url}/v1/predict", {"inputs": SECRET})
        assert [row["error"] for row in lines(stream)] == ["ValueError"]
