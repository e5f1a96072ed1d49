"""The API is what /openapi.json says it is: schemathesis asks everything the document allows."""

from __future__ import annotations

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, settings
from openapi_spec_validator import validate
from schemathesis import Case

from tests.servers import call


@pytest.fixture(scope="module")
def api(local_url: str) -> Any:
    return schemathesis.openapi.from_url(f"{local_url}/openapi.json")


schema = schemathesis.pytest.from_fixture("api")


@pytest.mark.slow
@schema.parametrize()
@settings(
    max_examples=20,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
def test_answers_are_as_documented(case: Case) -> None:
    case.call_and_validate()


def test_the_document_is_valid_openapi(local_url: str) -> None:
    document = call(f"{local_url}/openapi.json").body
    validate(document)
    assert {"/v1/predict", "/v1/embeddings", "/embed", "/predict", "/tasks/{task}"} <= set(
        document["paths"]
    )
