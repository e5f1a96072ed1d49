"""The server's benchmark reads wrk, compares and judges rightly, and its peers do the same work."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import psutil
import pytest

from benchmarks.serve import __main__ as bench
from benchmarks.serve import corpus, servers
from benchmarks.serve.__main__ import Benchmark
from benchmarks.serve.checks import agreement, disagreements, utilisation
from benchmarks.serve.plan import OFFLINE, ROWS, Row, schedule
from benchmarks.serve.report import compare, table
from benchmarks.serve.scores import Scored, complaints
from benchmarks.serve.servers import SERVERS, Running, ServerError, running
from benchmarks.serve.wrk import LoadError, Sample, drive, parse, warm_up
from mtl_core.build import build_train_state
from mtl_core.encoder import load_tokenizer
from mtl_core.evaluation import evaluate
from mtl_core.predictor import Predictor
from tests.small_runs import data, example, examples, experiment, learned, write_artifact

WRK = """Running 6s test @ http://127.0.0.1:8000
  1 threads and 32 connections
Requests/sec:    123.45
RESULT {"requests": 600, "seconds": 6, "mean_ms": 40, "p50_ms": 41.5, "p99_ms": 80.25, "errors": %d}
"""


def rates(*values: float) -> list[dict[str, float]]:
    return [{"rate": value} for value in values]


def test_what_wrk_prints_is_read() -> None:
    sample = parse(WRK % 0, connections=4)
    assert sample == Sample(requests=600, seconds=6.0, mean_ms=40.0, p50_ms=41.5, p99_ms=80.25)
    assert sample.rate == 100.0


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (WRK % 3, "3 errors"),
        ("unable to connect to 127.0.0.1:8000 Connection refused", "no result"),
        ((WRK % 0).replace('"requests": 600', '"requests": 0'), "no answer"),
        ((WRK % 0).replace('"requests": 600', '"requests": 300'), "of 4 connections only 2.0"),
    ],
)
def test_a_measurement_with_errors_does_not_count(output: str, reason: str) -> None:
    with pytest.raises(LoadError, match=reason):
        parse(output, connections=4)


def test_what_answers_nothing_while_warmed_up_may_still_be_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = subprocess.CompletedProcess("wrk", 0, (WRK % 0).replace("600", "0"), "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: silent)
    warm_up(8000, "/v1/predict", tmp_path, connections=4, seconds=2)
    with pytest.raises(LoadError, match="no answer"):
        drive(8000, "/v1/predict", tmp_path, connections=4, seconds=2)


def test_a_load_that_does_not_end_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*_: object, timeout: float, **__: object) -> None:
        raise subprocess.TimeoutExpired("wrk", timeout)

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(LoadError, match="did not end within 96 s"):
        drive(8000, "/v1/predict", tmp_path, connections=1, seconds=6)


@pytest.mark.parametrize("listens", [True, False])
def test_a_dropped_connection_is_the_server_s_error(listens: bool) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if listens:
            listener.listen()
            Thread(target=lambda: listener.accept()[0].close(), daemon=True).start()
        with pytest.raises(ServerError, match="POST /v1/predict gave no answer"):
            Running(listener.getsockname()[1], 0.0).post("/v1/predict", b"{}")


SENTENCE = {"mood": {"label": "a", "score": 0.9}}
WHOLE = {"results": [SENTENCE, SENTENCE]}


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ({**WHOLE, "errors": {"entities": {"code": 503}}}, "tasks without an answer: entities"),
        ({"results": [SENTENCE]}, "1 answers to 2 texts"),
        ({"results": [SENTENCE, {}]}, "1 answers to 2 texts"),
        ({"results": [SENTENCE, {"mood": "a"}]}, "another shape"),
        ({"outputs": []}, "another shape"),
        (["a", "b"], "another shape"),
        ({"data": [{"embedding": [1.0]}, {"embedding": "AAAA"}]}, "another shape"),
        ({"data": [{"embedding": [1.0]}, {"embedding": []}]}, "1 answers to 2 texts"),
    ],
)
def test_an_answer_in_part_or_of_another_shape_fails_the_server(
    reply: object, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before its load and after: of the answers meanwhile wrk knows the status alone."""
    replies: list[Any] = [WHOLE, reply]

    class Answers(Running):
        def get(self, route: str) -> Any:
            return {"runtime": "openvino-int8"}

        def post(self, route: str, body: bytes) -> Any:
            return replies.pop(0)

    sample = Sample(requests=600, seconds=6.0, mean_ms=40.0, p50_ms=41.5, p99_ms=80.25)
    monkeypatch.setattr(servers, "running", lambda *_: nullcontext(Answers(8000, 1.0)))
    monkeypatch.setattr(bench, "warm_up", lambda *_: None)
    monkeypatch.setattr(bench, "drive", lambda *_: sample)
    monkeypatch.setattr(bench, "DRAIN_SECONDS", 0)
    measured = Unserved()
    measured.artifact = measured.folder = Path()
    measured.bodies, measured.texts, measured.values = {"sentence": Path()}, ["a", "b"], {}
    with pytest.raises(ServerError, match=reason):
        Benchmark.serve(measured, "ours", ["predict"])
    assert not measured.values
    assert measured.runtimes == {"ours": "openvino-int8"}
    replies += [WHOLE, WHOLE]
    Benchmark.serve(measured, "ours", ["predict"])
    assert measured.values["ours", "predict"][0]["rate"] == 100.0


@pytest.mark.parametrize("name", [name for name in SERVERS if name.startswith("ours")])
def test_ours_stays_on_the_cpus_as_its_peers_do(name: str, tmp_path: Path) -> None:
    assert dict(pairwise(SERVERS[name].command(tmp_path, 8000)))["--gpus"] == "0"


def test_an_artifact_that_peers_cannot_serve_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "heads/topics").mkdir(parents=True)
    (tmp_path / "heads/topics/head.json").write_text('{"kind": "multilabel"}', encoding="utf-8")
    words = ["bench", "--only", "offline", "--artifact", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        bench.main()
    assert "peers do not serve multilabel tasks, as topics is" in capsys.readouterr().err


class Unserved(Benchmark):
    """A benchmark whose servers do not start."""

    def __init__(self, *_: object) -> None:
        self.values = {("torch", OFFLINE): rates(20.0), ("ours", OFFLINE): rates(100.0)}
        self.starts, self.runtimes, self.answers, self.failures = {}, {}, {}, {}
        self.lengths = {"offline": [10], "sentence": [10]}
        self.rounds, self.seconds = 0, 6

    def serve(self, name: str, loads: Sequence[str]) -> None:
        raise ServerError(f"{name} did not start")

    def offline(self, engine: str) -> None:
        self.values["gemm", OFFLINE] = [{"bf16_square": 400.0, "int8_square": 800.0}]


@pytest.fixture
def unserved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Runs the command for some rows and reads what it wrote."""
    config = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder/config.json").write_text(json.dumps(config), encoding="utf-8")
    output = tmp_path / "build/found.json"
    monkeypatch.setattr(bench, "Benchmark", Unserved)
    monkeypatch.setattr(bench, "require_wrk", lambda: None)
    monkeypatch.setattr(bench, "versions", lambda rows: {})

    def run(error: type[BaseException] | None, *rows: str) -> dict[str, Any]:
        words = ["--rounds", "1", "--artifact", str(tmp_path), "--output", str(output), "--only"]
        monkeypatch.setattr(sys, "argv", ["bench", *words, *rows])
        with pytest.raises(error) if error else nullcontext():
            bench.main()
        found: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        return found

    return run


def test_rows_that_were_to_be_measured_and_were_not_fail_the_command(
    unserved: Callable[..., dict[str, Any]],
) -> None:
    assert unserved(None, "offline")["results"]["offline"]["result"] == 5.0
    assert unserved(None, "predict-bf16")["results"] == {"predict-bf16": None}, "nothing was asked"
    assert "did not start" in unserved(SystemExit, "predict", "offline")["failures"]["fastapi"]


def test_what_was_measured_is_kept_when_a_check_fails(
    unserved: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "agreement", lambda answers: answers["no such"])
    assert unserved(KeyError, "offline")["samples"]["ours offline"] == rates(100.0)


def test_a_peer_that_does_other_work_fails_the_command(
    unserved: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(self: Unserved, engine: str) -> None:
        self.values["gemm", OFFLINE] = [{"bf16_square": 400.0, "int8_square": 800.0}]
        self.answers[f"offline {engine}"] = [[1.0, 0.0]] if engine == "ours" else [[0.0, 1.0]]

    monkeypatch.setattr(Unserved, "offline", offline)
    found = unserved(SystemExit, "offline")
    assert found["results"]["offline"]["result"] == 5.0
    assert found["agreement"]["offline torch"] == {"least_cosine": 0.0}


def test_what_earlier_rounds_measured_is_kept(
    unserved: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(self: Unserved, engine: str) -> None:
        if self.rounds == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Unserved, "offline", offline)
    found = unserved(KeyboardInterrupt, "offline", "--rounds", "2")
    assert (found["rounds"], found["samples"]["ours offline"]) == (1, rates(100.0))


def test_products_that_cannot_be_measured_leave_out_the_utilisation_alone(
    unserved: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(self: Unserved, engine: str) -> None:
        if engine == "gemm":
            raise LoadError("no int8 products here")

    monkeypatch.setattr(Unserved, "offline", offline)
    found = unserved(None, "offline")
    assert found["failures"] == {"gemm": "no int8 products here"}
    assert (found["utilisation"], found["results"]["offline"]["result"]) == ({}, 5.0)


def test_offline_rows_need_no_wrk(
    unserved: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def require_wrk() -> None:
        raise LoadError("wrk is not installed")

    monkeypatch.setattr(bench, "require_wrk", require_wrk)
    assert unserved(None, "offline")["results"]["offline"]["result"] == 5.0
    assert unserved(SystemExit, "offline", "latency")["results"].keys() == {"offline"}, "of before"


def test_versions_are_of_the_commit_and_of_each_side_s_packages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MTL_CACHE", str(tmp_path))
    found = bench.versions([ROWS["embeddings"]])
    assert f"numpy=={np.__version__}" in found["ours"]
    assert found.keys() == {"commit", "ours", "infinity"}
    assert found["infinity"] is None, "it is not installed here"


def test_infinity_serves_the_encoder_of_the_artifact(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(servers, "environment", lambda wanted: tmp_path)
    command = SERVERS["infinity"].command(tmp_path / "artifact", 8000)
    options = dict(pairwise(command))
    assert options["--model-id"] == str(tmp_path / "artifact/encoder")
    (body, *_) = corpus.write_bodies(tmp_path, ["a"] * 32)["embed"].read_text().splitlines()
    assert json.loads(body)["model"] == options["--served-model-name"]


def test_a_rate_is_compared_by_medians_and_its_spread_by_rounds() -> None:
    row = Row("title", "predict", "ours", "fastapi", "rate", 10.0)
    values = {
        ("ours", "predict"): rates(900, 1200, 1000),
        ("fastapi", "predict"): rates(90, 100, 125),
    }
    found = compare(row, values)
    assert found is not None
    assert found["ours"] == {"median": 1000, "min": 900, "max": 1200}
    assert (found["result"], found["result_min"], found["result_max"]) == (10.0, 8.0, 12.0)
    assert found["met"]


def test_a_latency_counts_the_other_way_round() -> None:
    row = Row("title", "predict_alone", "ours", "fastapi", "p50", 1.0)
    values = {
        ("ours", "predict_alone"): [{"rate": 1, "p50_ms": 5.0}],
        ("fastapi", "predict_alone"): [{"rate": 9, "p50_ms": 4.0}],
    }
    found = compare(row, values)
    assert found is not None
    assert found["result"] == 0.8
    assert not found["met"]


@pytest.mark.parametrize(("ours", "cost", "met"), [(76, 0.24, True), (74, 0.26, False)])
def test_a_cost_is_the_share_that_is_lost(ours: float, cost: float, met: bool) -> None:
    values = {("ours", "predict"): rates(ours), ("ours_in_process", "predict"): rates(100)}
    found = compare(ROWS["heads"], values)
    assert found is not None
    assert found["result"] == pytest.approx(cost)
    assert found["met"] is met


def test_the_table_says_what_was_met_missed_and_not_measured() -> None:
    rows = {key: ROWS[key] for key in ("predict", "heads", "embeddings")}
    values = {
        ("ours", "predict"): rates(1000, 1100),
        ("fastapi", "predict"): rates(100, 110),
        ("ours_in_process", "predict"): rates(2000, 2200),
    }
    titles = {name: server.title for name, server in SERVERS.items()}
    lines = table(rows, {key: compare(row, values) for key, row in rows.items()}, titles)
    assert [line.count("|") for line in lines] == [8] * 5
    assert "1050/s (1000 to 1100)" in lines[2]
    assert "10.00 × (10.00 × to 10.00 ×) | at least 10.00 × | met" in lines[2]
    assert "50 % (50 % to 50 %) | at most 25 % | **missed**" in lines[3]
    assert "not measured" in lines[4]


def test_every_row_has_servers_and_each_side_is_measured_once_a_round() -> None:
    online = schedule(list(ROWS.values()), offline=False)
    assert online.keys() <= SERVERS.keys()
    assert online["ours"] == ["predict", "predict_alone", "predict_list", "embed"]
    assert schedule(list(ROWS.values()), offline=True) == {
        engine: [OFFLINE] for engine in ("ours", "torch", "openvino", "onnx")
    }


@pytest.mark.parametrize("row", ["predict", "latency"])
def test_fastapi_is_measured_in_bf16_too(row: str) -> None:
    fp32, bf16 = ROWS[row], ROWS[f"{row}-bf16"]
    assert (bf16.load, bf16.kind) == (fp32.load, fp32.kind)
    settings = {**SERVERS[fp32.peer].settings, "DTYPE": "bfloat16"}
    assert SERVERS[bf16.peer].settings == settings


def test_agreement_is_over_labels_and_places_not_scores() -> None:
    def answer(label: str, score: float, start: int) -> dict[str, object]:
        entity = {"entity_group": "place", "word": "x", "score": score, "start": start, "end": 9}
        return {"mood": {"label": label, "score": score}, "entities": [entity]}

    ours, theirs = (
        [answer("a", 0.9, 3), answer("b", 0.8, 3)],
        [answer("a", 0.7, 3), answer("a", 0.8, 4)],
    )
    assert agreement({"ours": ours, "fastapi": theirs}) == {
        "fastapi": {"mood": 0.5, "entities": 0.5}
    }
    vectors = {"offline ours": [[1.0, 0.0], [0.0, 1.0]], "offline torch": [[1.0, 0.0], [0.6, 0.8]]}
    assert agreement(vectors) == {"offline torch": {"least_cosine": 0.8}}
    vectors = {"embeddings infinity": [[3.0, 4.0]], "embeddings ours": [[1.0, 0.0]]}
    assert agreement(vectors) == {"embeddings infinity": {"least_cosine": 0.6}}


def test_a_task_or_a_vector_that_one_side_lacks_is_no_agreement() -> None:
    mood, both = {"mood": {"label": "a"}}, {"mood": {"label": "a"}, "entities": []}
    for ours, theirs in ((mood, both), (both, mood)):
        found = agreement({"ours": [ours], "fastapi": [theirs]})
        assert found == {"fastapi": {"mood": 1.0, "entities": 0.0}}
    for vector in ([0.0, 0.0], [1.0], [float("nan"), 1.0]):
        found = agreement({"offline ours": [[1.0, 0.0]] * 2, "offline torch": [[1.0, 0.0], vector]})
        assert found == {"offline torch": {"least_cosine": 0.0}}


def test_disagreement_is_beyond_what_runtimes_of_less_precision_explain() -> None:
    alike = {"fastapi": {"mood": 0.9, "entities": 1.0}, "offline torch": {"least_cosine": 0.99}}
    assert disagreements(alike) == []
    other = {"fastapi": {"mood": 0.85, "entities": 1.0}, "offline torch": {"least_cosine": 0.98}}
    assert disagreements(other) == [
        "fastapi does other work: mood 0.850, at least 0.9",
        "offline torch does other work: least_cosine 0.980, at least 0.99",
    ]


def test_utilisation_counts_the_operations_of_the_encoder(tmp_path: Path) -> None:
    config = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6}
    (tmp_path / "encoder").mkdir()
    (tmp_path / "encoder/config.json").write_text(json.dumps(config), encoding="utf-8")
    values = {
        ("gemm", OFFLINE): [{"bf16_square": 400.0, "bf16_minilm": 300.0, "int8_minilm": 800.0}],
        ("torch", OFFLINE): rates(500.0),
    }
    found = utilisation(tmp_path, {"offline": [10, 10], "sentence": [10]}, values)
    # 10.6 million weights, two operations each for each of ten tokens, and a little attention.
    assert found["torch_gflops"] == pytest.approx(500 * 10 * 2 * 10.6e6 / 1e9, rel=0.02)
    assert found["sentence_ceiling_bf16"] == pytest.approx(500 * 400 / found["torch_gflops"])
    assert found["sentence_ceiling_int8"] == pytest.approx(500 * 800 / found["torch_gflops"])
    assert found["torch_share_of_bf16"] == pytest.approx(found["torch_gflops"] / 400)


def test_sentences_are_seeded_distinct_and_of_the_lengths_announced(minilm: str) -> None:
    tokenizer = load_tokenizer(minilm)
    texts = corpus.sentences(tokenizer, 300)
    assert texts == corpus.sentences(tokenizer, 300)
    assert len(set(texts)) == 300
    assert {len(ids) for ids in tokenizer(texts)["input_ids"]} <= set(range(8, 31))
    lengths = [len(ids) for ids in tokenizer(corpus.mixed_lengths(texts, 500))["input_ids"]]
    assert min(lengths) < 15
    assert max(lengths) > 100


def test_answers_are_counted_as_offline_evaluation_counts(
    tiny_encoders: dict[str, Path],
) -> None:
    # A model that has learned nothing: labels at random, entities that begin inside words.
    config = experiment(tiny_encoders["bert"])
    encoded = data(config)
    model = build_train_state(config, encoded).model
    split = encoded.splits["train"]
    kinds = {task: settings.kind for task, settings in config.tasks.items()}
    scored = Scored(examples(0, 40), split, kinds, encoded.labels)
    answers = Predictor(model).predict([example.text for example in scored.examples])
    served, offline = scored.count("offline", answers), evaluate(model, split)
    assert split.num_truncated == 0
    for task, counts in offline.counts.items():
        assert np.array_equal(served.counts[task], counts)
    assert served.counts["entities"][:-1, 1].sum() > 20
    assert served.seqeval["entities"] == offline.scores()["entities"]["f1"]
    assert complaints(scored, offline, served, 0.0) == []
    label = answers[0]["topic"]["label"]
    answers[0]["topic"]["label"] = next(n for n in encoded.labels["topic"] if n != label)
    (complaint, *_) = complaints(scored, offline, scored.count("other", answers), 0.0)
    assert complaint == "other: topic: the counts are not the offline ones"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("fastapi", {"WEB_CONCURRENCY": "2", "PASSES": "1", "THREADS": "1"}),
        pytest.param("ray_serve", None, marks=pytest.mark.cluster),
    ],
)
def test_a_peer_gives_our_answers_and_leaves_no_process(
    name: str,
    settings: dict[str, str] | None,
    tiny_encoders: dict[str, Path],
    tmp_path: Path,
) -> None:
    # Greedy: peers have no Viterbi decoder, and on its own choice of tags nothing may differ.
    greedy = {"decoding": "greedy"}
    state, _, _ = learned(tiny_encoders["bert"], tasks=greedy)
    config = experiment(tiny_encoders["bert"], tasks=greedy)
    artifact = write_artifact(state.model, config, tmp_path / "artifact")
    texts = [example(number, {"topic"}).text for number in (0, 1, 2, 3, 10_000, 10_001)]
    tasks = ["topic", "entities"]
    body = json.dumps({"inputs": texts, "tasks": tasks}).encode()
    before = psutil.Process().children(recursive=True)
    with running(name, artifact, tmp_path, settings) as server:
        theirs = server.post("/v1/predict", body)["results"]
        started = [p for p in psutil.Process().children(recursive=True) if p not in before]
    assert len(started) > int((settings or {}).get("WEB_CONCURRENCY", "0"))
    ended = psutil.STATUS_ZOMBIE
    assert not [p for p in started if p.is_running() and p.status() != ended]
    ours = Predictor.load(artifact).predict(texts, tasks)
    assert any(row["entities"] for row in theirs)
    assert agreement({"ours": ours, name: theirs}) == {name: {"topic": 1.0, "entities": 1.0}}
