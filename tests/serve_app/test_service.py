"""A head that fails, hangs or dies costs its own task; the others are answered."""

from __future__ import annotations

import asyncio
import contextvars
import dataclasses
import io
import json
import os
import shutil
import subprocess
import sys
import threading
import time
import weakref
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from mtl_core import answers
from mtl_core.answers import Features, Output
from mtl_core.artifact import read_manifest, write_manifest
from mtl_core.errors import ArtifactError
from mtl_core.folders import atomic_folder
from mtl_core.predictor import EncodingStage, Predictor
from mtl_core.windows import TooMany
from serve_app import deployments, heads, loaded
from serve_app.batcher import Overloaded
from serve_app.deployments import EncoderReplica
from serve_app.errors import ApiError
from serve_app.heads import HeadReplica, HeadUnavailable, LocalHead, RemoteHead, StoredHead
from serve_app.loaded import ServedModel, current_version, load_artifact
from serve_app.metrics import Metrics
from serve_app.requestlog import RequestLog
from serve_app.service import INLINE_CHARACTERS, Service
from serve_app.settings import Settings
from tests.servers import call, local_server

TEXT = "Maria Lopez had the food at the table in Berlin wonderful"
TASKS = ("topic", "mood", "entities")
SETTINGS = Settings(artifact="")


@pytest.fixture(scope="module")
def model(artifact: Path) -> ServedModel:
    return load_artifact(str(artifact), "torch-fp32", 1, "cpu", 2048)


class Raising:
    """A head in this process with a fault."""

    def __init__(self, task: str = "mood") -> None:
        self.task = task

    async def __call__(self, head: StoredHead, features: Features, all_tags: bool) -> Output:
        raise HeadUnavailable(self.task, "error", "test")


class Broken:
    """A head with an error that nobody foresaw."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    async def __call__(self, head: StoredHead, features: Features, all_tags: bool) -> Output:
        raise self.error


def head_calls(faulty: Any, task: str = "mood") -> Any:
    """Local heads, but for one task."""
    return lambda name: faulty if name == task else LocalHead()


class Replica:
    """Stands for a head deployment's handle: a replica that fails as it is told."""

    def __init__(self, *faults: BaseException | float) -> None:
        self.replica = HeadReplica()
        self.faults = list(faults)
        self.calls = 0

    async def __call__(self, *arguments: Any) -> Any:
        self.calls += 1
        if self.faults:
            fault = self.faults.pop(0)
            if isinstance(fault, BaseException):
                raise fault
            await asyncio.sleep(fault)
        return self.replica.answer(*arguments)


def remote(model: ServedModel, replica: Any, timeout_s: float = 5.0) -> tuple[Service, Metrics]:
    """Local heads, but for one behind a handle."""
    metrics = Metrics("test")
    return Service(
        model, head_calls(RemoteHead(replica, "mood", timeout_s, metrics)), metrics, SETTINGS
    ), metrics


def value(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0


async def ask(service: Service, *tasks: str) -> Any:
    return await asyncio.wait_for(service.answer([TEXT], tasks or TASKS), 10)


async def said(line: RemoteHead, model: ServedModel) -> str:
    """Whether a head answers, and if not why."""
    pooled = np.zeros((1, model.stage.hidden_size), np.float32)
    features = Features(pooled, np.zeros((0, 0), np.float32), np.zeros(0, np.int64))
    try:
        await line(model.heads["mood"], features, False)
    except HeadUnavailable as error:
        return error.reason
    return "an answer"


async def refused_unasked(service: Service, replica: Replica) -> None:
    calls = replica.calls
    assert (await ask(service, "mood")).failures
    assert replica.calls == calls


def test_answers_are_those_of_the_offline_predictor(
    model: ServedModel, predictor: Predictor
) -> None:
    service = Service(model, lambda _: LocalHead(), Metrics("test"), SETTINGS)
    answer = asyncio.run(ask(service))
    expected = predictor.predict([TEXT])[0]
    assert next(answer.predictions("topic"))["label"] == expected["topic"]["label"]
    found = [(e["start"], e["end"]) for e in next(answer.predictions("entities"))]
    assert found == [(e["start"], e["end"]) for e in expected["entities"]]


class Noting(LocalHead):
    """A head that keeps what it was sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Features] = []

    async def __call__(self, head: StoredHead, features: Features, all_tags: bool) -> Output:
        self.sent.append(features)
        return await super().__call__(head, features, all_tags)


def test_a_head_is_sent_what_it_reads_of_the_texts_that_ask_for_it(model: ServedModel) -> None:
    sent = {task: Noting() for task in TASKS}
    service = Service(model, sent.__getitem__, Metrics("test"), SETTINGS)

    async def both() -> None:
        first = service.answer([TEXT, "Berlin"], ["topic"])
        second = service.answer(["Maria"], ["topic", "entities"])
        await asyncio.gather(first, second)

    asyncio.run(both())
    assert not sent["mood"].sent
    (topics,) = sent["topic"].sent
    assert topics.pooled.shape[0] == 3
    assert topics.states.size == 0
    (entities,) = sent["entities"].sent
    assert entities.pooled.size == 0
    tokens = [item.num_tokens for item in model.stage.windows.split(["Maria"])]
    assert entities.lengths.tolist() == [len(entities.states)]
    assert 1 <= len(entities.states) <= tokens[0]


def test_windows_that_nobody_reads_take_no_room(model: ServedModel) -> None:
    long, window = " ".join([TEXT] * 16), model.stage.windows.max_length
    (item,) = model.stage.windows.split([long])
    assert item.num_tokens > 4 * window
    metrics = Metrics("test")
    limits = Settings(artifact="", batch_tokens=4 * window, max_tokens=4 * window)
    service = Service(model, lambda _: LocalHead(), metrics, limits)

    async def asked() -> None:
        for tasks in ((), ("topic",)):
            answer = await service.answer([long] * 4, tasks)
            assert answer.num_tokens == 4 * window
            assert answer.beginnings == [0, 1, 2, 3]
            assert len(answer.parts) == 1
        with pytest.raises(TooMany, match=f"at least {item.num_tokens} tokens"):
            await service.answer([long], ["topic", "entities"])

    asyncio.run(asked())
    assert value(metrics, "mtl_tokens_total") == 8 * window
    assert value(metrics, "mtl_encoder_passes_total") == 8


class Watched:
    """A runtime that notes which threads run it."""

    def __init__(self, runtime: Any, threads: set[int]) -> None:
        self.runtime = runtime
        self.threads = threads

    def __getattr__(self, name: str) -> Any:
        return getattr(self.runtime, name)

    def __call__(self, layouts: Any) -> Any:
        self.threads.add(threading.get_ident())
        return self.runtime(layouts)


def test_no_model_runs_on_the_event_loop(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding: set[int] = set()
    judging: set[int] = set()

    def run_head(*arguments: Any) -> Output:
        judging.add(threading.get_ident())
        return answers.run_head(*arguments)

    monkeypatch.setattr(heads, "run_head", run_head)
    monkeypatch.setattr(model.stage, "runtime", Watched(model.stage.runtime, encoding))
    service = Service(model, lambda _: LocalHead(), Metrics("test"), SETTINGS)

    async def all_that_runs_them() -> int:
        await service.warm_up(model)
        await service.reach_heads(model)
        await asyncio.gather(*[ask(service) for _ in range(4)])
        return threading.get_ident()

    loop = asyncio.run(all_that_runs_them())
    assert len(encoding) == 1
    assert len(judging) == len(TASKS)
    assert loop not in encoding | judging


def test_texts_that_are_being_tokenised_count_as_waiting(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, split = threading.Event(), model.stage.windows.split

    def slow(*arguments: Any) -> Any:
        assert gate.wait(10)
        return split(*arguments)

    monkeypatch.setattr(model.stage.windows, "split", slow)
    narrow = Settings(artifact="", max_waiting=1)
    service = Service(model, lambda _: LocalHead(), Metrics("test"), narrow)
    long = "a long text " * INLINE_CHARACTERS

    async def crowd() -> None:
        first = asyncio.create_task(service.answer([long], ["mood"]))
        await asyncio.sleep(0.01)
        for another in (service.answer([long], ["mood"]), service.tokens([long], True)):
            with pytest.raises(Overloaded):
                await another
        gate.set()
        assert not (await first).failures
        assert await service.tokens(["a"], True)

    asyncio.run(crowd())


def test_long_texts_are_tokenised_one_request_at_a_time(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    running, most, windows = 0, 0, model.stage.windows

    def watched(work: Any) -> Any:
        def run(*arguments: Any) -> Any:
            nonlocal running, most
            running += 1
            most = max(most, running)
            time.sleep(0.02)
            running -= 1
            return work(*arguments)

        return run

    for name in ("split", "tokens"):
        monkeypatch.setattr(windows, name, watched(getattr(windows, name)))
    service = Service(model, lambda _: LocalHead(), Metrics("test"), SETTINGS)
    long = "a long text " * INLINE_CHARACTERS

    async def crowd() -> None:
        labels = [service.answer([long], ["mood"]) for _ in range(4)]
        await asyncio.gather(*labels, *[service.tokens([long], True) for _ in range(4)])

    asyncio.run(crowd())
    assert most == 1


@pytest.fixture
def replica(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> EncoderReplica:
    """As Serve makes it, with heads that answer."""
    for name, found in {"replica_name": "test", "exposed_host": None, "has_gpu": False}.items():
        monkeypatch.setattr(deployments, name, lambda found=found: found)
    made = EncoderReplica(artifact=str(artifact), runtime="torch-fp32", threads=1)
    made.service.head_call = lambda _: LocalHead()
    return made


def test_a_replica_is_warm_when_serve_finds_it_healthy(replica: EncoderReplica) -> None:
    encoded = replica.service.model.stage
    assert encoded.num_windows == 0

    async def looked_at_twice() -> None:
        await replica.check_health()
        warm = encoded.num_windows
        assert warm >= 1 + 4 + 16
        await replica.check_health()
        assert encoded.num_windows == warm
        assert replica.watcher is not None
        replica.watcher.cancel()

    asyncio.run(looked_at_twice())


@pytest.mark.parametrize("faults", [1, 1000])
def test_a_replica_whose_encoder_fails_is_healthy_again_only_if_it_recovers(
    faults: int, replica: EncoderReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = replica.service
    stage, left = (
        service.model.stage,
        [RuntimeError("CUDA error: an illegal memory access")] * faults,
    )
    encode = stage.encode

    def faulty(*texts: Any) -> Features:
        if left:
            raise left.pop()
        return encode(*texts)

    async def looked_at() -> None:
        await replica.check_health()
        assert replica.watcher is not None
        replica.watcher.cancel()
        monkeypatch.setattr(stage, "encode", faulty)
        with pytest.raises(RuntimeError, match="CUDA error"):
            await ask(service)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="CUDA error") if left else nullcontext():
                await replica.check_health()
        if not left:
            assert not (await ask(service)).failures
            before = stage.num_windows
            await replica.check_health()  # as cheap as ever
            assert stage.num_windows == before

    asyncio.run(looked_at())


def test_a_replica_whose_encoder_failed_and_is_busy_is_left_to_finish(
    replica: EncoderReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployments, "HEALTH_TIMEOUT_S", 0.2)
    busy = threading.Event()

    async def looked_at() -> None:
        await replica.check_health()
        assert replica.watcher is not None
        replica.watcher.cancel()
        replica.service.batcher.last_failed = True
        replica.service.batcher.thread.submit(busy.wait, 30)
        await replica.check_health()
        busy.set()

    asyncio.run(looked_at())


def test_other_requests_go_on_while_a_long_text_is_tokenised(model: ServedModel) -> None:
    service = Service(model, lambda _: LocalHead(), Metrics("test"), SETTINGS)

    async def gaps() -> list[float]:
        turns = [time.perf_counter()]
        tokens = asyncio.create_task(service.tokens(["wonderfulness " * 5_000], special=True))
        while not tokens.done():
            await asyncio.sleep(0)
            turns.append(time.perf_counter())
        assert len(tokens.result()[0]) > 5_000
        return [later - earlier for earlier, later in pairwise(turns)]

    found = asyncio.run(gaps())
    assert max(found) < sum(found) / 3


def test_whoever_asks_whether_it_is_ready_a_replica_looks_once(replica: EncoderReplica) -> None:
    encoded = replica.service.model.stage

    async def asked() -> None:
        await asyncio.gather(*[replica.check_ready() for _ in range(50)])
        await replica.check_ready()
        assert encoded.num_windows == 1
        replica.service.calls.clear()
        replica.service.head_call = head_calls(Raising())
        replica.look_again = -1.0
        for number in (2, 3):  # a bad look does not hold
            with pytest.raises(ApiError):
                await replica.check_ready()
            assert encoded.num_windows == number

    asyncio.run(asked())


def test_a_head_that_is_not_deployed_costs_its_own_task_and_is_looked_for_now_and_then(
    replica: EncoderReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[str] = []

    def remote_call(task: str) -> Any:
        looks.append(task)
        if task == "mood" and looks.count("mood") == 1:
            raise KeyError("Deployment(name='head-mood', app='head-mood') does not exist.")
        return Replica()

    service = replica.service
    following = dataclasses.replace(service.model, version="next")
    monkeypatch.setattr(replica, "_load", lambda _: following)
    monkeypatch.setattr(deployments, "remote_call", remote_call)
    monkeypatch.setattr(deployments, "current_version", lambda _: "next")
    service.head_call = replica._head_call

    async def asked() -> None:
        mine, others = await asyncio.gather(ask(service, "mood"), ask(service, "topic"))
        assert "not deployed" in str(mine.failures["mood"])
        assert not others.failures
        with pytest.raises(ApiError, match="not deployed") as caught:
            await replica.check_ready()
        assert caught.value.status == 503
        await replica._refresh(asyncio.get_running_loop())
        assert replica.waiting is following
        assert looks.count("mood") == 1
        replica.absent["mood"] -= deployments.READY_FOR_S
        assert not (await ask(service)).failures

    asyncio.run(asked())
    assert value(replica.metrics, "mtl_head_failures_total", task="mood", reason="missing") == 3


def test_a_probe_that_leaves_ends_no_look_and_a_look_that_was_ended_is_taken_again(
    replica: EncoderReplica,
) -> None:
    async def asked() -> None:
        line = OfServe()
        replica.service.head_call = lambda task: RemoteHead(line, task, 5.0, replica.metrics)
        impatient = of("probe", replica.check_ready())
        await line.reached()
        impatient.cancel()
        assert line.sent == {"none"}
        replica.service.head_call = lambda _: LocalHead()
        assert replica.looking is not None
        assert not replica.looking.done()
        replica.looking.cancel()
        await asyncio.wait([replica.looking])
        replica.service.calls.clear()
        await replica.check_ready()

    asyncio.run(asked())


def test_a_version_that_cannot_be_loaded_is_left_alone_for_a_while(
    replica: EncoderReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, served = [], replica.service.model

    def load(previous: ServedModel) -> ServedModel:
        loads.append(previous)
        raise MemoryError("no room for a second encoder")

    monkeypatch.setattr(replica, "_load", load)
    monkeypatch.setattr(deployments, "current_version", lambda _: "next")

    async def looked() -> None:
        for _ in range(3):
            await replica._refresh(asyncio.get_running_loop())

    asyncio.run(looked())
    assert len(loads) == 1
    assert replica.service.model is served
    assert value(replica.metrics, "mtl_artifact_loads_total", outcome="refused") == 1


def test_a_version_that_waits_for_a_head_is_loaded_once(
    replica: EncoderReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, served = [], replica.service.model
    following = dataclasses.replace(served, version="next")

    def load(previous: ServedModel) -> ServedModel:
        loads.append(previous)
        return following

    monkeypatch.setattr(replica, "_load", load)
    monkeypatch.setattr(deployments, "current_version", lambda _: "next")

    async def looked() -> None:
        replica.service.head_call = head_calls(Raising())
        for _ in range(3):
            await replica._refresh(asyncio.get_running_loop())
        assert replica.service.model is served
        replica.service.calls.clear()
        replica.service.head_call = lambda _: LocalHead()
        await replica._refresh(asyncio.get_running_loop())
        assert replica.service.model is following

    asyncio.run(looked())
    assert len(loads) == 1
    assert replica.waiting is None


@pytest.mark.parametrize("times", [1, 99])
def test_an_artifact_that_is_replaced_while_it_is_read_is_never_half_of_each(
    times: int, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, load = tmp_path / "served", EncodingStage.load
    shutil.copytree(artifact, served)
    versions = [read_manifest(served).name]
    stages: list[weakref.ref[EncodingStage]] = []

    def replaced(*arguments: Any) -> EncodingStage:
        assert not any(stage() for stage in stages)  # two of them may not fit
        if len(versions) <= times:
            versions.append(f"version {len(versions)}")
            with atomic_folder(served) as partial:
                shutil.copytree(artifact, partial, dirs_exist_ok=True)
                manifest = dataclasses.replace(read_manifest(artifact), name=versions[-1])
                write_manifest(partial, manifest)
        stage = load(*arguments)
        stages.append(weakref.ref(stage))
        return stage

    monkeypatch.setattr(EncodingStage, "load", replaced)
    if times > 1:
        with pytest.raises(ArtifactError, match="replaced again and again"):
            load_artifact(str(served), "torch-fp32", 1, "cpu", 2048)
        return
    found = load_artifact(str(served), "torch-fp32", 1, "cpu", 2048)
    assert found.name == versions[-1]
    assert found.version == current_version(str(served))


def test_between_two_renames_an_artifact_may_be_away_for_a_moment(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served, away, load = tmp_path / "served", tmp_path / "away", EncodingStage.load
    with pytest.raises(ArtifactError, match=r"served: no artifact: .*No such file"):
        load_artifact(str(served), "torch-fp32", 1, "cpu", 2048)
    shutil.copytree(artifact, away)
    looks: list[int] = []

    def interrupted(*arguments: Any) -> EncodingStage:
        stage = load(*arguments)
        if len(looks) == 1:
            served.rename(away)
        return stage

    def pause(_: float) -> None:
        looks.append(1)
        away.rename(served)

    monkeypatch.setattr(EncodingStage, "load", interrupted)
    monkeypatch.setattr(loaded, "time", SimpleNamespace(sleep=pause))
    found = load_artifact(str(served), "torch-fp32", 1, "cpu", 2048)
    assert found.version == current_version(str(served))
    assert len(looks) == 2


ONE_THREAD = """
import asyncio, json
import numpy as np, psutil
from safetensors.torch import save
from mtl_core.answers import Features
from mtl_core.config import TaskConfig
from mtl_core.heads import build_head
from serve_app.heads import HeadReplica

head = build_head(384, ["place"], TaskConfig(kind="token_classification"))
stored = json.dumps(head.describe()).encode(), save(head.state_dict())
states = np.zeros((300, 384), np.float32)
features = Features(np.zeros((0, 0), np.float32), states, np.array([300]))
threads = lambda: {thread.id for thread in psutil.Process().threads()}
replica, before = HeadReplica(), threads()
asyncio.run(replica("version", features, False, stored))
print(len(threads() - before))
"""


def test_a_head_computes_in_one_thread() -> None:
    several = {**os.environ, "OMP_NUM_THREADS": "2"}
    found = subprocess.run(
        [sys.executable, "-c", ONE_THREAD], env=several, capture_output=True, text=True, check=True
    )
    assert found.stdout.split() == ["1"]


def test_every_stage_is_timed(model: ServedModel) -> None:
    metrics = Metrics("test")
    asyncio.run(ask(Service(model, lambda _: LocalHead(), metrics, SETTINGS)))
    for stage in ("tokenise", "queue", "encoder", *(f"head-{task}" for task in TASKS)):
        assert value(metrics, "mtl_stage_seconds_count", stage=stage) == 1


@pytest.mark.parametrize("busy", [False, True])
def test_a_request_of_several_parts_does_not_wait_for_itself(
    busy: bool, model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = model.stage.encode

    def slow(*texts: Any) -> Features:
        time.sleep(0.05)
        return encode(*texts)

    monkeypatch.setattr(model.stage, "encode", slow)
    settings = Settings(artifact="", batch_tokens=1)
    service = Service(model, lambda _: LocalHead(), Metrics("test"), settings)

    async def asked() -> tuple[Any, float]:
        others = asyncio.create_task(service.answer([TEXT] * 4, ()))
        await (asyncio.sleep(0) if busy else others)
        started = time.perf_counter()
        answer = await service.answer([TEXT] * 6, ())
        seconds = time.perf_counter() - started
        await others
        return answer, seconds

    answer, seconds = asyncio.run(asked())
    assert len(answer.parts) == 6
    encoder = sum(part.encoder for part in answer.parts)
    assert 6 * 0.05 < encoder <= answer.inference
    assert answer.tokenize + answer.queue + encoder <= seconds
    assert (answer.queue > 2 * 0.05) == busy


@pytest.mark.parametrize(
    ("route", "options"),
    [
        ("embed", {}),
        ("embed", {"normalize": False}),
        ("predict?task=topic", {}),
        ("tasks/mood", {}),
        ("tasks/entities", {}),
        ("tasks/entities", {"parameters": {"aggregation_strategy": "max", "ignore_labels": []}}),
    ],
)
def test_a_request_of_several_parts_gets_the_answer_of_each_text_alone(
    route: str, options: dict[str, Any], artifact: Path
) -> None:
    texts = [TEXT, "Berlin", "Maria Lopez had the song in Lisbon"]
    with local_server(artifact, runtime="torch-fp32", batch_tokens=1) as (url, _):
        whole = call(f"{url}/{route}", {"inputs": texts, **options}).body
        each = [call(f"{url}/{route}", {"inputs": [text], **options}).body for text in texts]
    assert [[row] for row in whole] == each


def test_a_task_whose_head_fails_is_missing_and_the_others_are_there(model: ServedModel) -> None:
    service = Service(model, head_calls(Raising()), Metrics("test"), SETTINGS)
    answer = asyncio.run(ask(service))
    assert set(answer.failures) == {"mood"}
    assert list(answer.predictions("topic"))
    assert list(answer.predictions("entities"))


@pytest.mark.parametrize(
    ("task", "routes"),
    [("mood", ["tasks/mood", "predict?task=mood"]), ("entities", ["tasks/entities"])],
)
def test_over_http_it_is_a_503_for_that_task_alone(
    task: str, routes: list[str], artifact: Path
) -> None:
    calls = head_calls(Raising(task), task)
    with local_server(artifact, calls, runtime="torch-fp32") as (url, _):
        both = call(f"{url}/v1/predict", {"inputs": TEXT, "tasks": ["topic", task]})
        only = call(f"{url}/v1/predict", {"inputs": TEXT, "tasks": [task]})
        compatible = [call(f"{url}/{route}", {"inputs": TEXT}) for route in routes]
        other = call(f"{url}/tasks/topic", {"inputs": TEXT})
    assert both.status == 200
    assert "topic" in both.body["results"][0]
    assert both.body["errors"][task]["error_type"] == "Unhealthy"
    assert other.status == 200
    for refused in (only, *compatible):
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        assert f"{task!r}" in refused.body["error"]


@pytest.mark.parametrize("error", [ZeroDivisionError(), asyncio.CancelledError()], ids=repr)
def test_an_unforeseen_error_of_a_head_is_an_answer_too(
    error: BaseException, artifact: Path
) -> None:
    with local_server(artifact, head_calls(Broken(error)), runtime="torch-fp32") as (url, _):
        assert call(f"{url}/tasks/mood", {"inputs": TEXT}, timeout=5).status == 500
        assert call(f"{url}/tasks/topic", {"inputs": TEXT}, timeout=5).status == 200


def test_a_head_in_this_process_that_cannot_be_built_is_unavailable(model: ServedModel) -> None:
    broken = StoredHead("mood", "multilabel", "sentence", ("a",), b"{}", b"")
    features = Features(*[None] * 3)  # type: ignore[arg-type]
    with pytest.raises(HeadUnavailable, match="'mood'"):
        asyncio.run(LocalHead()(broken, features, False))


def test_a_failure_of_a_head_in_this_process_is_counted_and_leaves_a_trace(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_head(*_: Any) -> Output:
        raise ValueError(TEXT)

    monkeypatch.setattr(heads, "run_head", run_head)
    metrics, log = Metrics("test"), RequestLog(False, io.StringIO())
    answer = asyncio.run(ask(Service(model, lambda _: LocalHead(), metrics, SETTINGS, log), "mood"))
    assert "ValueError" in str(answer.failures["mood"])
    assert value(metrics, "mtl_head_failures_total", task="mood", reason="error") == 1
    (line,) = log.stream.getvalue().splitlines()
    row = json.loads(line)
    assert (row["id"], row["error"]) == ("head-mood", "ValueError")
    assert any("run_head" in place for place in row["trace"])
    assert TEXT not in line


def test_other_tasks_do_not_wait_for_a_head_that_hangs(model: ServedModel) -> None:
    async def scenario() -> None:
        service, metrics = remote(model, Replica(60.0, 60.0), timeout_s=2)
        hanging = asyncio.create_task(ask(service, "mood"))
        await asyncio.sleep(0.05)
        assert not (await ask(service, "topic")).failures
        assert not hanging.done()
        assert set((await hanging).failures) == {"mood"}
        assert value(metrics, "mtl_head_failures_total", task="mood", reason="timeout") == 1

    asyncio.run(scenario())


@pytest.mark.parametrize("answers", [True, False])
def test_a_timeout_means_a_pause_unless_another_call_was_answered_since(
    answers: bool, model: ServedModel
) -> None:
    async def scenario() -> None:
        line = RemoteHead(Replica(60.0), "mood", 0.5, Metrics("test"))
        stuck = asyncio.create_task(said(line, model))
        await asyncio.sleep(0.1)
        if answers:  # by another replica
            assert await said(line, model) == "an answer"
        assert await stuck == "timeout"
        assert await said(line, model) == ("an answer" if answers else "paused")

    asyncio.run(scenario())


def test_a_head_that_answers_with_an_error_after_a_timeout_is_asked_again(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "PAUSE_AFTER_TIMEOUT_S", 0.0)

    async def scenario() -> None:
        line = RemoteHead(Replica(60.0, ValueError()), "mood", 0.5, Metrics("test"))
        assert [await said(line, model) for _ in range(3)] == ["timeout", "error", "an answer"]

    asyncio.run(scenario())


def test_after_a_timeout_the_head_is_left_alone_and_then_tried_by_one_request(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "PAUSE_AFTER_TIMEOUT_S", 0.3)

    async def scenario() -> None:
        replica = Replica(60.0, 60.0)
        service, _ = remote(model, replica, timeout_s=0.5)
        assert (await ask(service, "mood")).failures
        await refused_unasked(service, replica)
        assert replica.calls == 1
        await asyncio.sleep(0.3)
        probe = asyncio.create_task(ask(service, "mood"))
        await asyncio.sleep(0.05)
        await refused_unasked(service, replica)
        assert not probe.done()  # another one finds out; this need not wait
        assert (await probe).failures
        await asyncio.sleep(0.4)
        assert not (await ask(service, "mood")).failures
        assert not (await ask(service, "mood")).failures

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "death",
    [
        ActorDiedError(),
        ActorUnavailableError("the replica is gone", None),
        ConnectionResetError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_call_whose_replica_dies_is_sent_again(model: ServedModel, death: BaseException) -> None:
    async def scenario() -> None:
        service, metrics = remote(model, Replica(death, death))
        answer = await ask(service)
        assert not answer.failures
        assert value(metrics, "mtl_head_retries_total", task="mood") == 2

    asyncio.run(scenario())


CLIENT = contextvars.ContextVar("client", default="none")


class OfServe(Replica):
    """A handle that knows the requests in whose context calls are made; Serve ends them with it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.sent: set[str] = set()

    async def __call__(self, *arguments: Any) -> Any:
        self.sent.add(CLIENT.get())
        await self.gate.wait()
        return self.replica.answer(*arguments)

    async def reached(self) -> None:
        async with asyncio.timeout(10):
            while not self.sent:
                await asyncio.sleep(0.01)


def of(client: str, asked: Any) -> asyncio.Task[Any]:
    context = contextvars.copy_context()
    context.run(CLIENT.set, client)
    return asyncio.get_running_loop().create_task(asked, context=context)


@pytest.mark.parametrize("fault", [ZeroDivisionError(), asyncio.CancelledError(), None], ids=repr)
def test_a_head_that_hangs_or_fails_keeps_no_other_task_of_its_batch_waiting(
    fault: BaseException | None, model: ServedModel
) -> None:
    metrics, hanging = Metrics("test"), OfServe()
    faulty = Broken(fault) if fault else RemoteHead(hanging, "mood", 60.0, metrics)
    asked: list[tuple[str, ...]] = [("topic", "mood"), ("topic",), (), ("entities", "topic")]

    async def scenario() -> None:
        service = Service(model, head_calls(faulty), metrics, SETTINGS)
        first, *others = [
            asyncio.create_task(service.answer([TEXT] * count, tasks))
            for count, tasks in enumerate(asked, 1)
        ]
        few, _, many = answers = await asyncio.wait_for(asyncio.gather(*others), 10)
        assert [len(answer.vectors()) for answer in answers] == [2, 3, 4]
        assert list(many.predictions("topic")) == list(few.predictions("topic")) * 2
        assert len(list(many.predictions("entities"))) == 4
        assert first.done() == bool(fault)
        hanging.gate.set()
        with pytest.raises((RuntimeError, ZeroDivisionError)) if fault else nullcontext():
            assert list((await first).predictions("mood"))

    asyncio.run(scenario())
    assert value(metrics, "mtl_batch_texts_sum") == 10
    assert value(metrics, "mtl_batch_texts_count") == 1


@pytest.mark.parametrize("batch_tokens", [2048, 1], ids=["in its batch", "in later batches"])
def test_a_client_that_leaves_takes_nobody_s_answer_with_it(
    batch_tokens: int, model: ServedModel
) -> None:
    async def scenario() -> None:
        replica, metrics = OfServe(), Metrics("test")
        calls = head_calls(RemoteHead(replica, "mood", 5.0, metrics))
        settings = Settings(artifact="", batch_tokens=batch_tokens)
        service = Service(model, calls, metrics, settings)
        leaves, *stay = [of(name, ask(service, "mood")) for name in "abc"]
        await replica.reached()
        leaves.cancel()
        replica.gate.set()
        for answer in await asyncio.gather(*stay):
            assert list(answer.predictions("mood"))
        assert replica.sent == {"none"}
        assert service.batcher.unanswered == 0
        assert value(metrics, "mtl_head_retries_total", task="mood") == 0

    asyncio.run(scenario())


def test_a_replica_that_refuses_is_not_asked_again(model: ServedModel) -> None:
    async def scenario() -> None:
        replica = Replica(ValueError("what was sent must not be quoted"))
        service, metrics = remote(model, replica)
        failure = (await ask(service)).failures["mood"]
        assert "ValueError" in str(failure)
        assert "quoted" not in str(failure)
        assert replica.calls == 1
        assert value(metrics, "mtl_head_failures_total", task="mood", reason="error") == 1

    asyncio.run(scenario())


def test_a_head_whose_replicas_stay_dead_is_given_up(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "RETRY_FOR_S", 0.3)

    async def scenario() -> None:
        service, metrics = remote(model, Replica(*[ActorDiedError() for _ in range(99)]))
        assert "died" in str((await ask(service)).failures["mood"])
        assert value(metrics, "mtl_head_failures_total", task="mood", reason="died") == 1

    asyncio.run(scenario())


def test_while_a_dead_replica_is_replaced_requests_wait_longer(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "RETRY_FOR_S", 2.0)

    async def scenario() -> None:
        service, _ = remote(model, Replica(ActorDiedError(), 0.5), timeout_s=0.1)
        assert not (await ask(service, "mood")).failures

    asyncio.run(scenario())


def test_they_wait_no_longer_than_for_its_replacement(
    model: ServedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "RETRY_FOR_S", 1.0)

    async def scenario() -> None:
        deaths = [ActorDiedError() for _ in range(4)]  # 0.75 s of retries
        line = RemoteHead(Replica(*deaths, 60.0), "mood", 0.1, Metrics("test"))
        started = time.perf_counter()
        assert await said(line, model) == "timeout"
        assert 0.9 < time.perf_counter() - started < 1.5

    asyncio.run(scenario())


def test_a_replica_is_sent_a_version_once(model: ServedModel) -> None:
    async def scenario() -> None:
        replica = Replica()
        service, _ = remote(model, replica)
        await ask(service)
        assert replica.calls == 2  # it does not know the version; now with the weights
        await ask(service)
        assert replica.calls == 3

    asyncio.run(scenario())


def test_a_version_is_reached_only_when_every_head_answers(model: ServedModel) -> None:
    service = Service(model, head_calls(Raising()), Metrics("test"), SETTINGS)
    with pytest.raises(HeadUnavailable):
        asyncio.run(service.reach_heads(model))
    asyncio.run(Service(model, lambda _: LocalHead(), Metrics("test"), SETTINGS).reach_heads(model))
