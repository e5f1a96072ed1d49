"""The essentials over the real thing: the command, HAProxy, Ray Serve, a deployment a head."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import openai
import psutil
import pytest
from huggingface_hub import InferenceClient

from mtl_core.predictor import Predictor
from tests import preloaded
from tests.servers import (
    Answer,
    RealServer,
    call,
    heads,
    listening,
    metric,
    processes,
    real_server,
    wait_for,
)
from tests.small_runs import example

pytestmark = pytest.mark.cluster

TASKS = ["topic", "mood", "entities"]
SECRET = "Maria Lopez told Zoë 👍🏽 nothing in São Paulo"
TEXTS = [SECRET, "Zoë", "日本語 東京 は とても 楽しい", "a\u0000b"]
LONG = " ".join(example(number, set(TASKS)).text for number in range(12))


def close(left: Any, right: Any) -> bool:
    """Whether answers are the same but for 1e-5 in probabilities."""
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(close(left[k], right[k]) for k in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(close, left, right))
    if isinstance(left, float):
        return abs(left - right) < 1e-5
    return bool(left == right)


def test_answers_are_the_offline_ones(server: RealServer, predictor: Predictor) -> None:
    body = {"inputs": [*TEXTS, LONG], "truncate": True, "return_scores": True}
    answer = call(f"{server.url}/v1/predict", body)
    assert answer.status == 200
    assert close(answer.body["results"], predictor.predict([*TEXTS, LONG]))


def test_many_at_once_are_answered_from_one_pass_a_window(
    server: RealServer, predictor: Predictor
) -> None:
    draw = random.Random(4)
    pool = [*TEXTS, LONG, *(example(number, set(TASKS)).text for number in range(20))]
    offline = dict(zip(pool, predictor.predict(pool), strict=True))
    windows = {text: len(predictor.tokenize([text])[0].windows) for text in pool}
    asked = [
        (draw.choices(pool, k=draw.choice([1, 1, 2, 20])), draw.sample(TASKS, draw.randint(1, 3)))
        for _ in range(100)
    ]

    def ask(request: tuple[list[str], list[str]]) -> Answer:
        body = {"inputs": request[0], "tasks": request[1], "truncate": True, "return_scores": True}
        return call(f"{server.url}/v1/predict", body)

    before = metric(server.url, "mtl_encoder_passes_total")
    with ThreadPoolExecutor(32) as threads:
        answers = list(threads.map(ask, asked))
    for (texts, tasks), answer in zip(asked, answers, strict=True):
        assert answer.status == 200, answer.body
        assert close(answer.body["results"], [{t: offline[x][t] for t in tasks} for x in texts])
    passes = sum(
        windows[text] if "entities" in tasks else 1 for texts, tasks in asked for text in texts
    )
    assert metric(server.url, "mtl_encoder_passes_total") - before == passes


def test_clients_of_others_work(
    server: RealServer, predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        reply = client.embeddings.create(model="small", input=TEXTS)
        vectors = [item.embedding for item in reply.data]
        np.testing.assert_allclose(vectors, predictor.embed(TEXTS), atol=1e-5)
        with pytest.raises(openai.UnprocessableEntityError, match="text 1 is empty"):
            client.embeddings.create(model="small", input=" ")
    expected: Any = predictor.predict([SECRET], ["entities"])[0]["entities"]
    found = InferenceClient(model=f"{server.url}/tasks/entities").token_classification(SECRET)
    assert [(e.word, e.start, e.end) for e in found] == [
        (e["word"], e["start"], e["end"]) for e in expected
    ]
    for strategy in ("none", "first", "average", "max"):
        body = {"inputs": SECRET, "parameters": {"aggregation_strategy": strategy}}
        assert call(f"{server.url}/tasks/entities", body).status == 200
    labels = call(f"{server.url}/predict?task=topic", {"inputs": SECRET}).body
    assert {row["label"] for row in labels} == {"food", "phone", "music"}
    assert call(f"{server.url}/ready").status == 200


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/v1/predict", b"{", 422),
        ("/v1/predict", {"inputs": [SECRET, ""]}, 422),
        ("/v1/predict", {"inputs": LONG}, 413),
        ("/v1/predict", {"inputs": ["a"] * 257}, 413),
        ("/v1/predict", {"inputs": "x" * 2_100_000}, 413),
        ("/v1/predict", {"inputs": SECRET, "tasks": ["weather"]}, 404),
        ("/v1/predict", None, 405),
        ("/nothing", None, 404),
    ],
)
def test_errors_come_through_as_they_are(
    path: str, body: Any, status: int, server: RealServer
) -> None:
    answer = call(server.url + path, body)
    assert answer.status == status
    assert set(answer.body) == {"error", "error_type"}
    assert SECRET not in answer.body["error"]


def test_a_large_body_within_the_limit_is_answered(
    server: RealServer, predictor: Predictor
) -> None:
    texts = [f"{number} {LONG}" * 3 for number in range(250)]
    assert sum(map(len, texts)) > 500_000
    answer = call(f"{server.url}/embed", {"inputs": texts, "truncate": True})
    assert answer.status == 200
    np.testing.assert_allclose(answer.body, predictor.embed(texts), atol=1e-5)


def test_a_body_that_never_comes_times_out(server: RealServer) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    received = b""
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(b"POST /embed HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        while not received.endswith(b"}"):  # HAProxy leaves the connection open
            received += connection.recv(65_536)
    assert received.startswith(b"HTTP/1.1 408 ")
    assert "10 s" in json.loads(received.partition(b"\r\n\r\n")[2])["error"]


def test_what_is_no_http_gets_the_page_that_the_document_tells_of(server: RealServer) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall("GET /predict?task=größe HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        received = connection.makefile("rb").read()
    head, _, _ = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400 ")
    described = call(f"{server.url}/openapi.json").body["paths"]["/predict"]["post"]["responses"]
    (media_type,) = described["400"]["content"]
    assert f"Content-Type: {media_type}".encode() in head


def test_an_id_is_given_back_and_logged_and_texts_are_not(server: RealServer) -> None:
    given = call(f"{server.url}/v1/predict", {"inputs": SECRET}, x_request_id="mine-42")
    assert given.headers["x-request-id"] == "mine-42"
    made = call(f"{server.url}/v1/predict", {"inputs": SECRET}).headers["x-request-id"]
    assert len(made) > 8
    by_id: dict[str, Any] = {}
    deadline = time.monotonic() + 10
    while made not in by_id and time.monotonic() < deadline:  # lines pass through a pipe
        written = logs(server)
        by_id = {row["id"]: row for text in written for row in rows(text) if "route" in row}
    for identifier in ("mine-42", made):
        assert by_id[identifier]["route"] == "/v1/predict"
        assert by_id[identifier]["status"] == 200
    everything = "\n".join([*written, server.log.read_text(encoding="utf-8")])
    for piece in ("Lopez", "told", "東京"):
        assert piece not in everything


@pytest.mark.parametrize(
    ("header", "value"),
    [("x_request_timeout_seconds", "0.0001"), ("x_session_id", "\xff"), ("x_request_id", "\xff")],
)
def test_no_header_of_a_client_has_serve_answer_in_our_place(
    header: str, value: str, server: RealServer
) -> None:
    answer = call(f"{server.url}/v1/predict", {"inputs": SECRET}, **{header: value})
    assert answer.status == 200
    assert answer.headers["x-request-id"].isascii()


def test_a_replica_is_asked_only_when_its_artifact_is_loaded_and_warm(server: RealServer) -> None:
    assert call(f"{server.url}/health").status == 200
    asked: list[Any] = []
    deadline = time.monotonic() + 10
    while not asked and time.monotonic() < deadline:
        asked = [found for found in map(rows, logs(server)) if any("route" in r for r in found)]
    assert asked
    assert all(replica[0]["event"] == "artifact loaded" for replica in asked)


def logs(server: RealServer) -> list[str]:
    """Every log file of the server's Ray."""
    files = [path for path in (session_folder(server) / "logs").rglob("*") if path.is_file()]
    return [path.read_text(encoding="utf-8", errors="replace") for path in files]


def rows(log: str) -> list[dict[str, Any]]:
    """A replica's own lines, those that are whole."""
    return [json.loads(line) for line in log.split("\n")[:-1] if line.startswith('{"time":')]


def session_folder(server: RealServer) -> Path:
    """Where this server's Ray keeps its logs."""
    for process in psutil.Process(server.process.pid).children(recursive=True):
        found = re.search(r"(/\S*/session_\d[^/\s]*)/", " ".join(process.cmdline()))
        if found:
            return Path(found[1])
    raise AssertionError("no Ray process")


def test_replicas_share_the_memory_of_what_they_have_loaded(server: RealServer) -> None:
    for task in TASKS:
        (head,) = heads(server, task)
        memory = head.memory_full_info()
        assert memory.rss > 200 * 2**20
        assert memory.uss < 100 * 2**20


def test_nothing_runs_that_only_a_cluster_needs(server: RealServer) -> None:
    family = psutil.Process(server.process.pid).children(recursive=True)
    lines = [" ".join(process.cmdline()) for process in family]
    assert any("raylet" in line for line in lines)
    for needless in ("dashboard.py", "monitor.py"):  # the autoscaler's, and that of logs
        assert not any(needless in line for line in lines)


def test_a_closed_terminal_is_for_the_command_alone(server: RealServer) -> None:
    """It needs the others to answer what is under way."""
    group = os.getpgid(server.process.pid)
    family = psutil.Process(server.process.pid).children(recursive=True)
    lasting = [process for process in family if process.name() in ("raylet", "gcs_server")]
    told = [process for process in lasting if os.getpgid(process.pid) == group]
    assert len(told) == 2
    for process in told:
        process.send_signal(signal.SIGHUP)
    _, alive = psutil.wait_procs(told, timeout=1)
    assert len(alive) == len(told)
    assert call(f"{server.url}/v1/predict", {"inputs": SECRET}).status == 200


@pytest.fixture(scope="module")
def second(artifact: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    """Another server on the same machine, with short logs."""
    folder = tmp_path_factory.mktemp("second")
    env = {"RAY_ROTATION_MAX_BYTES": "4000", "RAY_ROTATION_BACKUP_COUNT": "2"}
    with real_server(artifact, folder, "--set", "runtime=torch-fp32", env=env) as running:
        yield running


def test_a_log_of_requests_does_not_grow_for_ever(second: RealServer) -> None:
    for _ in range(150):
        assert call(f"{second.url}/health").status == 200
    deadline = time.monotonic() + 10
    while sum(map(len, map(rows, logs(second)))) > 90 and time.monotonic() < deadline:
        time.sleep(0.2)  # the oldest goes when the third file is full
    sizes = [len(text) for text in logs(second) if rows(text)]
    assert len(sizes) == 1 + 2
    assert max(sizes) <= 4000


def test_a_second_server_on_the_machine_shares_no_port_with_the_first(
    server: RealServer, second: RealServer
) -> None:
    """HAProxy, and Serve's proxy behind it, would share one without a word and answer for both."""
    mine, others = ({address.port for address in listening(each)} for each in (server, second))
    assert min(len(mine), len(others)) > 10
    assert not mine & others
    for each in (server, second):
        assert call(f"{each.url}/v1/predict", {"inputs": SECRET}).status == 200


def test_without_the_process_that_forks_a_head_is_replaced_all_the_same(
    second: RealServer, predictor: Predictor
) -> None:
    family = psutil.Process(second.process.pid).children(recursive=True)
    files = haproxy_files(second)
    assert files.stat().st_mode & 0o077 == 0
    (head,) = heads(second, "topic")
    forks = head.parent()
    assert forks is not None
    forks.kill()
    head.kill()
    head.wait(5)
    expected = predictor.predict([SECRET])

    def answered() -> bool:  # on a busy machine later than a head may take: without its task first
        answer = call(f"{second.url}/v1/predict", {"inputs": SECRET, "return_scores": True})
        assert answer.status == 200
        return close(answer.body["results"], expected)

    wait_for(answered)
    assert {address.ip for address in listening(second)} <= {"127.0.0.1", "::1"}
    family += psutil.Process(second.process.pid).children(recursive=True)
    assert second.stop() == 0
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
    assert not files.exists()


def haproxy_files(server: RealServer) -> Path:
    """The folder that HAProxy's files are in, those of each node in one of its own."""
    line = processes(server, "haproxy")[0].cmdline()
    return Path(line[line.index("-f") + 1]).parents[1]


def test_a_proxy_that_is_not_ready_in_time_is_told_without_a_traceback(artifact: Path) -> None:
    env = {**os.environ, "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "0.0001"}  # grows with tries
    arguments = ("--artifact", str(artifact), "--port", "0")
    done = preloaded.run("serve_app", arguments, Path.cwd(), env, 120)
    assert done.returncode == 1
    assert "error: Serve's proxy did not start: " in done.stderr
    assert "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S" in done.stderr
    assert "Traceback" not in done.stderr


def test_sigterm_during_the_start_leaves_nothing_behind(artifact: Path, tmp_path: Path) -> None:
    with TemporaryDirectory(dir="/tmp") as short, (tmp_path / "log").open("w+b") as log:
        env = {**os.environ, "RAY_TMPDIR": short}
        arguments = ("--artifact", str(artifact), "--port", "0")
        process = preloaded.Process("serve_app", arguments, Path.cwd(), env, log, log)
        server = RealServer("not yet", process, tmp_path / "log")
        wait_for(lambda: processes(server, "ray::"))
        assert list(Path(short).glob("mtl-*"))
        started = psutil.Process(process.pid).children(recursive=True)
        assert server.stop(signal.SIGTERM) == 130
        log.seek(0)
        assert log.read().decode().splitlines() == [
            "starting Ray and the replicas …",
            "interrupted; run the same command again to go on",
        ]
        assert not list(Path(short).glob("mtl-*"))
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive


def test_a_second_ctrl_c_ends_it_at_once(server: RealServer) -> None:
    """The last one here: nothing is left of the server."""
    family = psutil.Process(server.process.pid).children(recursive=True)
    (head,) = heads(server, "mood")
    head.suspend()
    with ThreadPoolExecutor() as pool:
        asked = pool.submit(call, f"{server.url}/tasks/mood", {"inputs": TEXTS[0]})
        time.sleep(0.5)
        server.process.send_signal(signal.SIGINT)
        time.sleep(2)
        assert server.process.poll() is None
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 130
        asked.exception()
    _, alive = psutil.wait_procs(family, timeout=5)
    assert not alive
