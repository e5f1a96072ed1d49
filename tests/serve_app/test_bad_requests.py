"""Requests that cannot be answered: a status that fits, JSON that names the fix, no echo."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from serve_app.heads import LocalHead
from tests.servers import Answer, call, local_server, metric, wait_for

SECRET = "Maria Lopez told nobody"
LONG = "n" * 1_000
OWN = ["/v1/predict", "/v1/similarity"]
BODIES = {
    "/v1/predict": "inputs",
    "/v1/similarity": "inputs",
    "/v1/embeddings": "input",
    "/embed": "inputs",
    "/predict?task=topic": "inputs",
    "/tokenize": "inputs",
    "/tasks/topic": "inputs",
    "/tasks/entities": "inputs",
}
"""Where each route takes its texts."""


def message(answer: Answer) -> str:
    """The error's text; the body must be of the documented shape."""
    assert answer.headers["content-type"] == "application/json"
    assert set(answer.body) == {"error", "error_type"}
    error = answer.body["error"]
    found = error["message"] if isinstance(error, dict) else error
    assert isinstance(found, str)
    assert found
    assert SECRET not in found
    return found


@pytest.fixture(scope="module")
def narrow_url(artifact: Path) -> Iterator[str]:
    """A server with low limits."""
    limits: dict[str, Any] = {
        "max_inputs": 4,
        "max_characters": 300,
        "max_body_bytes": 5_000,
        "max_tokens": 150,
        "body_timeout_s": 0.3,
    }
    with local_server(artifact, runtime="torch-fp32", **limits) as (url, _):
        yield url


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (b"", "JSON"),
        (b"{", "JSON"),
        (f'{{"inputs": "{SECRET}'.encode(), "JSON"),
        (b'{"inputs": "\xff"}', "JSON"),
        (b"inputs=a", "JSON"),
        (b"[" * 5_000, "JSON"),
        (b"null", "object"),
        (json.dumps([SECRET]).encode(), "object"),
    ],
)
def test_what_is_no_json_object_is_refused(body: bytes, names: str, local_url: str) -> None:
    for path in BODIES:
        answer = call(local_url + path, body)
        assert answer.status == 422, path
        assert names in message(answer), path


@pytest.mark.parametrize("wrong", [None, 5, True, {"text": SECRET}, [SECRET, 5], [SECRET, None]])
def test_texts_of_a_wrong_type_are_refused(wrong: Any, local_url: str) -> None:
    for path, field in BODIES.items():
        answer = call(local_url + path, {field: wrong})
        assert answer.status == 422, path
        assert message(answer).startswith(field), path


@pytest.mark.parametrize("path", BODIES)
def test_a_request_without_texts_is_told_where_they_belong(path: str, local_url: str) -> None:
    missing = call(local_url + path, {"text": SECRET})
    assert missing.status == 422
    assert f"{BODIES[path]}: Field required" in message(missing)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        *((path, f'{{"{field}": [WRONG]}}') for path, field in BODIES.items()),
        *((path, f'{{"{field}": [[WRONG]]}}') for path, field in BODIES.items()),
        ("/v1/predict", '{"inputs": "a", "tasks": [WRONG]}'),
        ("/tasks/entities", '{"inputs": "a", "parameters": {"ignore_labels": [WRONG]}}'),
    ],
)
def test_the_first_wrong_item_is_named_however_many_there_are(
    path: str, body: str, local_url: str
) -> None:
    one, many = (
        call(local_url + path, body.replace("WRONG", ",".join(["0.5"] * count)).encode())
        for count in (1, 400_000)
    )
    assert one.status == many.status == 422
    assert message(one) == message(many)


@pytest.mark.parametrize("path", BODIES)
def test_no_text_is_refused_and_a_blank_one_named(path: str, local_url: str) -> None:
    field = BODIES[path]
    nothing = call(local_url + path, {field: []})
    assert nothing.status == 422
    assert f"{field}: send at least one text" in message(nothing)
    if path != "/tokenize":
        for blank in ("", " \t\n", "\u2003"):
            answer = call(local_url + path, {field: [SECRET, blank]})
            assert answer.status == 422
            assert "text 2 is empty" in message(answer)


@pytest.mark.parametrize("path", BODIES)
def test_too_much_is_refused_with_the_limit(path: str, narrow_url: str) -> None:
    field, url = BODIES[path], narrow_url + path
    for texts, limit in ((["a"] * 5, "at most 4"), ([SECRET, "a" * 301], "at most 300")):
        answer = call(url, {field: texts})
        assert answer.status == 413
        assert limit in message(answer)
    assert "input 2" in message(answer)
    answer = call(url, {field: [SECRET] * 250})
    assert answer.status == 413
    assert "5000" in message(answer)


@pytest.mark.parametrize("path", BODIES)
def test_as_much_as_the_limits_say_is_taken(path: str, narrow_url: str) -> None:
    field, url = BODIES[path], narrow_url + path
    assert call(url, {field: ["a"] * 3 + ["a" * 300]}).status == 200
    assert call(url, json.dumps({field: ["a"]}).encode().ljust(5_000)).status == 200


@pytest.mark.parametrize("path", BODIES)
def test_too_many_tokens_are_refused_with_the_limit(path: str, narrow_url: str) -> None:
    answer = call(narrow_url + path, {BODIES[path]: ["! " * 40] * 4})
    assert answer.status == 413
    assert "tokens; at most 150 are taken: split them over requests" in message(answer)


def test_a_listing_of_sub_words_is_no_longer_than_other_replies(local_url: str) -> None:
    url, most = f"{local_url}/tokenize", 32_768
    body = {"inputs": ["! " * (most // 2), "! " * (most // 2)], "add_special_tokens": False}
    answer = call(url, body)
    assert answer.status == 200
    assert sum(map(len, answer.body)) == most
    assert int(answer.headers["content-length"]) < 2_500_000
    answer = call(url, {"inputs": "! " * 99_000})
    assert answer.status == 413
    assert f"at most {most} are taken: split them over requests" in message(answer)


def test_pages_of_other_origins_may_ask_only_where_they_are_named(
    artifact: Path, local_url: str
) -> None:
    origin = "https://app.example"
    asked = {"origin": origin, "access_control_request_method": "POST"}
    allowed = "access-control-allow-origin"
    for method, body in (("OPTIONS", None), ("POST", {"inputs": "a"})):
        answer = call(f"{local_url}/v1/predict", body, method=method, **asked)
        assert allowed not in answer.headers
    with local_server(artifact, runtime="torch-fp32", cors_origins=(origin,)) as (url, _):
        for method, body in (("OPTIONS", None), ("POST", {"inputs": "a"})):
            assert (
                call(f"{url}/v1/predict", body, method=method, **asked).headers[allowed] == origin
            )
            other = {**asked, "origin": "https://evil.example"}
            assert allowed not in call(f"{url}/v1/predict", body, method=method, **other).headers


@pytest.mark.parametrize("path", ["/v1/predict", "/v1/embeddings", "/tokenize"])
@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"host": "localhost:80"}, 200),
        ({"host": "LOCALHOST"}, 200),
        ({"host": "[::1]:8000"}, 200),
        ({"host": "rebound.example:8000"}, 403),
        ({"host": "localhost.rebound.example"}, 403),
        ({"host": "127.0.0.1.rebound.example"}, 403),
        ({"host": "192.0.2.1:8000"}, 403),
        ({"sec_fetch_site": "none"}, 200),
        ({"sec_fetch_site": "same-origin", "origin": "http://127.0.0.1:8000"}, 200),
        ({"sec_fetch_site": "same-site", "origin": "http://localhost:3000"}, 200),
        ({"sec_fetch_site": "cross-site"}, 403),
        ({"sec_fetch_site": "cross-site", "origin": "null"}, 403),
        ({"sec_fetch_site": "cross-site", "origin": "https://evil.example"}, 403),
        ({"sec_fetch_site": "cross-site", "origin": "https://app.example"}, 200),
    ],
)
def test_without_keys_pages_of_other_sites_are_refused(
    headers: dict[str, str], status: int, path: str, friendly_url: str
) -> None:
    answer = call(friendly_url + path, {BODIES[path]: "a"}, content_type="text/plain", **headers)
    assert answer.status == status
    if status == 403:
        assert "give it keys, name the page's origin in cors_origins" in message(answer)


@pytest.fixture(scope="module")
def friendly_url(artifact: Path) -> Iterator[str]:
    """A server that one other origin may ask."""
    origins = ("https://app.example",)
    with local_server(artifact, runtime="torch-fp32", cors_origins=origins) as (url, _):
        yield url


def test_probes_may_name_any_host(local_url: str) -> None:
    for path in ("/health", "/ready"):
        assert call(local_url + path, host="10.0.0.5:8000").status == 200


def test_with_keys_or_insecure_any_host_may_be_named(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("right\n", encoding="utf-8")
    options: list[dict[str, Any]] = [
        {"keys_file": str(tmp_path / "keys")},
        {"insecure": True},
        {"cors_origins": ("*",)},
    ]
    for option, host in zip(options, ["api.example", "api.example", "localhost"], strict=True):
        with local_server(artifact, runtime="torch-fp32", **option) as (url, _):
            asked = {"host": host, "origin": "https://a.example", "sec_fetch_site": "cross-site"}
            assert call(f"{url}/info", key="right", **asked).status == 200


def test_pages_may_send_any_header_and_read_ours(artifact: Path) -> None:
    asked = {"origin": "https://app.example", "access_control_request_method": "POST"}
    sent = "authorization, content-type, x-stainless-lang"
    with local_server(artifact, runtime="torch-fp32", cors_origins=(asked["origin"],)) as (url, _):
        preflight = call(
            f"{url}/v1/embeddings",
            method="OPTIONS",
            access_control_request_headers=sent,
            **asked,
        )
        assert preflight.status == 200
        assert preflight.headers["access-control-allow-headers"] == sent
        headers = call(f"{url}/v1/embeddings", {"input": "a"}, **asked).headers
    readable = set(headers["access-control-expose-headers"].split(", "))
    ours = {name for name in headers if name.startswith("x-")}
    assert len(ours) == 8
    assert readable == {*ours, "retry-after", "x-request-id"}


def test_a_large_body_is_refused_however_it_is_sent(narrow_url: str) -> None:
    body = json.dumps({"inputs": [SECRET] * 1_000}).encode()
    chunks = b"".join(
        f"{len(part):x}\r\n".encode() + part + b"\r\n"
        for part in (body[i : i + 997] for i in range(0, len(body), 997))
    )
    head = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    sized = head + f"Content-Length: {len(body)}\r\n\r\n".encode() + body
    chunked = head + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"
    for request in (sized, chunked):
        reply = talk(narrow_url, [request])
        assert reply.startswith(b"HTTP/1.1 413 ")
        assert b"5000 bytes" in reply or b"at most 5000" in reply
    small = b'{"inputs": "Zo\\u00eb", "tasks": ["topic"]}'
    request = head + b"Transfer-Encoding: chunked\r\n\r\n" + b"%x\r\n%s\r\n0\r\n\r\n"
    assert talk(narrow_url, [request % (len(small), small)]).startswith(b"HTTP/1.1 200 ")


def talk(url: str, pieces: list[bytes], pause: float = 0.0) -> bytes:
    """Send pieces over a socket, slowly; everything that comes back until the server closes."""
    host, port = url.removeprefix("http://").split(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)
        except OSError:
            pass  # the server has answered and left
        while data := connection.recv(65_536):
            received += data
    return received


def test_a_body_that_drips_in_times_out(narrow_url: str) -> None:
    head = b"POST /v1/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\n"
    began = time.monotonic()
    reply = talk(narrow_url, [head, *[b" "] * 8], pause=0.1)
    assert time.monotonic() - began < 5
    assert reply.startswith(b"HTTP/1.1 408 ")
    status, _, body = reply.partition(b"\r\n\r\n")
    assert b"connection: close" in status.lower()
    assert "0.3 s" in json.loads(body)["error"]
    assert call(f"{narrow_url}/v1/predict", {"inputs": "a"}).status == 200


def test_a_client_that_leaves_halfway_harms_nobody(narrow_url: str) -> None:
    host, port = narrow_url.removeprefix("http://").split(":")

    def counted(status: int) -> float:
        return metric(narrow_url, f'mtl_requests_total{{route="/embed",status="{status}"}}')

    left, failed = counted(499), counted(500)
    for _ in range(20):
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(
                b"POST /embed HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
            )
    assert call(f"{narrow_url}/embed", {"inputs": "a"}).status == 200
    wait_for(lambda: counted(499) == left + 20, 10)
    assert counted(500) == failed


@pytest.mark.parametrize("path", ["/v1/predict", "/tasks/weather"])
def test_an_unknown_task_is_answered_with_the_known_ones(path: str, local_url: str) -> None:
    body: dict[str, Any] = {"inputs": SECRET}
    if path == "/v1/predict":
        body["tasks"] = ["topic", "weather"]
    answer = call(local_url + path, body)
    assert answer.status == 404
    assert answer.body["error_type"] == "NotFound"
    assert message(answer) == "unknown task 'weather'; there is: topic, mood, entities"


def test_a_typo_in_a_task_is_answered_with_the_nearest_one(local_url: str) -> None:
    answer = call(f"{local_url}/tasks/topics", {"inputs": SECRET})
    assert answer.status == 404
    assert "unknown task 'topics'; did you mean 'topic'? there is:" in message(answer)


@pytest.mark.parametrize("path", OWN)
def test_a_typo_in_a_key_is_refused_with_the_known_ones(path: str, local_url: str) -> None:
    answer = call(local_url + path, {"inputs": [SECRET], "trunkate": True})
    assert answer.status == 422
    assert "trunkate: unknown key; did you mean 'truncate'? there is: inputs" in message(answer)


def test_very_many_unknown_keys_are_counted_and_not_listed(local_url: str) -> None:
    body = {"inputs": SECRET} | {f"{SECRET} {number}": 0 for number in range(2_000)}
    answer = call(f"{local_url}/v1/similarity", body)
    assert answer.status == 422
    assert message(answer) == "2001 things are wrong; known keys: inputs, truncate"


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/similarity", {"inputs": ["a"], LONG: 1}, 422),
        ("/v1/predict", {"inputs": "a", "tasks": [LONG]}, 404),
        (f"/tasks/{LONG}", {"inputs": "a"}, 404),
        (f"/page/{LONG}", None, 404),
        (f"/{LONG}", None, 404),
    ],
)
def test_of_a_long_name_an_error_repeats_the_beginning(
    path: str, body: Any, status: int, local_url: str
) -> None:
    answer = call(local_url + path, body)
    assert answer.status == status
    assert LONG[:79] in message(answer)
    assert len(message(answer)) < 300


@pytest.mark.parametrize("path", sorted(set(BODIES) - set(OWN)))
def test_routes_of_others_ignore_keys_of_others(path: str, local_url: str) -> None:
    answer = call(local_url + path, {BODIES[path]: ["Zoë"], "dtype": "x", "user": "me"})
    assert answer.status == 200


@pytest.mark.parametrize(
    ("path", "key", "same", "other"),
    [
        ("/embed", "truncation_direction", ["right", "Right"], "left"),
        ("/predict?task=topic", "truncation_direction", ["right", "Right"], "Left"),
        ("/embed", "prompt_name", [], "query"),
        ("/tokenize", "prompt_name", [], "query"),
    ],
)
def test_a_key_of_others_that_would_change_the_answer_is_refused(
    path: str, key: str, same: list[str], other: str, local_url: str
) -> None:
    for taken in (None, *same):
        assert call(local_url + path, {"inputs": "Zoë", key: taken}).status == 200
    answer = call(local_url + path, {"inputs": "Zoë", key: other})
    assert answer.status == 422
    assert message(answer).startswith(f"{key}: ")


@pytest.mark.parametrize("path", [*BODIES, "/info", "/health", "/metrics", "/", "/docs"])
def test_another_method_is_refused_with_the_right_one(path: str, local_url: str) -> None:
    right = "POST" if path in BODIES else "GET"
    for method in {"GET", "POST", "PUT", "DELETE", "PATCH"} - {right}:
        answer = call(local_url + path, b"{}", method=method)
        assert answer.status == 405, method
        assert right in answer.headers["allow"].split(", "), method
        assert right in message(answer), method


@pytest.mark.parametrize("path", ["/nothing", "/v1", "/v1/predict/more", "/tasks", "/page/x.js"])
def test_an_unknown_route_is_not_found(path: str, local_url: str) -> None:
    answer = call(local_url + path)
    assert answer.status == 404
    assert answer.body["error_type"] == "NotFound"
    message(answer)


@pytest.mark.parametrize("path", BODIES)
def test_a_slash_too_many_is_not_found_and_leads_nowhere_else(path: str, local_url: str) -> None:
    answer = call(f"{local_url}{path.partition('?')[0]}/", {BODIES[path]: "a"})
    assert answer.status == 404
    assert "location" not in answer.headers
    message(answer)


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None, "x"])
def test_the_content_type_does_not_matter(kind: str | None, local_url: str) -> None:
    assert call(f"{local_url}/embed", {"inputs": "Zoë"}, content_type=kind).status == 200


def test_nothing_waits_for_ever_when_a_head_breaks(artifact: Path) -> None:
    class Broken(LocalHead):
        async def __call__(self, *_: Any) -> Any:
            raise KeyError(SECRET)

    with local_server(artifact, lambda _: Broken(), runtime="torch-fp32") as (url, service):
        answer = call(f"{url}/v1/predict", {"inputs": SECRET}, timeout=10)
        assert answer.status == 500
        assert answer.body["error_type"] == "Backend"
        assert "log" in message(answer)
        assert call(f"{url}/embed", {"inputs": SECRET}).status == 200
        assert service.batcher.unanswered == 0
