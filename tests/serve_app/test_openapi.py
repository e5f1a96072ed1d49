"""The API is what /openapi.json says it is: schemathesis asks whatever the document allows."""

from __future__ import annotations

import re
from pathlib import Path

import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from openapi_spec_validator import validate
from schemathesis import Case, GenerationMode

from serve_app.errors import ApiError, unavailable
from serve_app.haproxy import HAPROXY_ERRORS
from tests.servers import call, local_server

SERVING = Path(__file__).parents[2] / "docs" / "serving.md"
ROUTES = [
    ("GET", "/"),
    ("GET", "/page/{file}"),
    ("POST", "/v1/predict"),
    ("POST", "/v1/embeddings"),
    ("POST", "/v1/similarity"),
    ("POST", "/tasks/{task}"),
    ("POST", "/embed"),
    ("POST", "/predict"),
    ("POST", "/tokenize"),
    ("GET", "/info"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/metrics"),
    ("GET", "/openapi.json"),
    ("GET", "/docs"),
]

CASES = [(*route, GenerationMode.POSITIVE) for route in ROUTES] + [
    (*route, GenerationMode.NEGATIVE) for route in ROUTES if route[0] == "POST"
]
# A text may be longer than the window: schemathesis would not expect 413 for a valid request.
CONFIG = schemathesis.Config.from_dict(
    {"checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", "404", "413"]}}}
)


def suits_the_model(case: Case) -> bool:
    """What a schema cannot say: the model's dimension, and what a task's probabilities are."""
    body = case.body if isinstance(case.body, dict) else {}
    dimensions, parameters = body.get("dimensions"), body.get("parameters")
    if isinstance(dimensions, int | float) and dimensions > 32:
        return False
    served = "sigmoid" if "mood" in case.path_parameters.values() else "softmax"
    asked = parameters.get("function_to_apply") if isinstance(parameters, dict) else None
    return case.path != "/tasks/{task}" or asked in (None, served)


def test_the_document_is_valid_and_complete(local_url: str) -> None:
    document = call(f"{local_url}/openapi.json").body
    validate(document)
    listed = [(m.upper(), path) for path, methods in document["paths"].items() for m in methods]
    assert sorted(listed) == sorted(ROUTES)


@pytest.mark.parametrize("error", [*HAPROXY_ERRORS, unavailable("no replica answered")])
def test_the_document_allows_what_haproxy_answers_on_every_route(
    error: ApiError, local_url: str
) -> None:
    document = call(f"{local_url}/openapi.json").body
    validate(document)
    for method, path in ROUTES:
        reply = document["paths"][path][method.lower()]["responses"][str(error.status)]
        schema = {**reply["content"]["application/json"]["schema"], **document}
        jsonschema.validate(error.body(), schema)
        replica = error.openai_body() if path == "/v1/embeddings" else error.body()
        jsonschema.validate(replica, schema)


def test_a_key_is_needed_where_the_docs_and_the_document_say_so(
    artifact: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    keys.write_text("right\n", encoding="utf-8")
    before = SERVING.read_text(encoding="utf-8").partition(" answer without one")[0]
    listed = re.findall("`(.+?)`", before.rpartition(". ")[2])
    free = {path.replace("*", "{file}") for path in listed}
    with local_server(artifact, runtime="torch-fp32", keys_file=str(keys)) as (url, _):
        document = call(f"{url}/openapi.json").body
        for method, path in ROUTES:
            field = "input" if path == "/v1/embeddings" else "inputs"
            body = {field: ["a"]} if method == "POST" else None
            at = f"{url}{path.format(task='topic', file='style.css')}?task=topic"
            assert call(at, body).status == (200 if path in free else 401), path
            assert call(at, body, key="right").status == 200, path
            assert ("security" in document["paths"][path][method.lower()]) != (path in free), path
    validate(document)
    (scheme,) = document["components"]["securitySchemes"].values()
    assert scheme == {"type": "http", "scheme": "bearer"}


@pytest.mark.slow
@pytest.mark.parametrize(("method", "path", "mode"), CASES)
def test_answers_are_as_documented(
    method: str, path: str, mode: GenerationMode, local_url: str
) -> None:
    api = schemathesis.openapi.from_url(f"{local_url}/openapi.json", config=CONFIG)
    bodies = method == "POST"

    @settings(
        max_examples=50 if bodies else 3,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(case=api[path][method].as_strategy(generation_mode=mode).filter(suits_the_model))
    def ask(case: Case) -> None:
        case.call_and_validate()

    ask()
