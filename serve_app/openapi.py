"""The OpenAPI document and its page, from the table of routes."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, TypeAdapter

from serve_app.schemas import ErrorReply

OF_THE_PROXY = ("408", "500", "502", "503", "504")
"""What HAProxy answers itself, too: with an `ErrorReply` on every route."""
PAGE = {"text/html": {"schema": {"type": "string"}}}
"""What HAProxy says to a 400, whatever its configuration is (version 2.8)."""
ERRORS = {
    "400": "The request is no HTTP that can be read.",
    "401": "The API key is missing or wrong.",
    "403": "No keys are set, and another host was asked for, or another site's page asks.",
    "404": "Unknown task or route.",
    "405": "The route answers another method.",
    "408": "The body took too long to arrive.",
    "413": "Too many or too large inputs.",
    "422": "The body is not valid.",
    "429": "Overloaded; Retry-After says when to try again.",
    "500": "An error of the server.",
    "502": "No replica answered; Retry-After says when to try again.",
    "503": "Not ready, or a head is not available.",
    "504": "No replica answered; Retry-After says when to try again.",
}


@dataclass(frozen=True)
class Operation:
    """A route: what it takes and gives."""

    method: str
    path: str
    handler: Callable[[Any], Awaitable[Any]]
    request: type[BaseModel] | None
    reply: Any
    open: bool = False
    """Whether it answers without a key."""
    media_type: str = "application/json"
    query: Sequence[str] = ()
    error: type[BaseModel] = ErrorReply
    """The shape of its errors."""
    truncate: str = "truncate: true"
    """What to send for a text longer than the model reads."""

    @property
    def summary(self) -> str:
        return (self.handler.__doc__ or "").strip().splitlines()[0]


def openapi_document(
    operations: Sequence[Operation], with_keys: bool, tasks: Mapping[str, str]
) -> dict[str, Any]:
    """OpenAPI 3.1 for these routes; `tasks` are names with levels."""
    schemas: dict[str, Any] = {}
    paths: dict[str, Any] = {}
    for operation in operations:
        paths.setdefault(operation.path, {})[operation.method.lower()] = _describe(
            operation, schemas, with_keys, tasks
        )
    components: dict[str, Any] = {"schemas": schemas}
    if with_keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "multitask-ray",
            "version": "1",
            "description": "One sentence encoder, many tasks.",
        },
        "paths": paths,
        "components": components,
    }


def _describe(
    operation: Operation, schemas: dict[str, Any], with_keys: bool, tasks: Mapping[str, str]
) -> dict[str, Any]:
    names = re.findall(r"{(\w+)}", operation.path)
    identifier = re.sub(r"\W+", "_", f"{operation.method.lower()}{operation.path}").rstrip("_")
    described: dict[str, Any] = {
        "summary": operation.summary,
        "operationId": identifier,
        "parameters": [_parameter(name, "path", list(tasks)) for name in names]
        + [
            _parameter(name, "query", [t for t, level in tasks.items() if level == "sentence"])
            for name in operation.query
        ],
        "responses": {
            "200": {
                "description": "The answer.",
                "content": {operation.media_type: {"schema": _schema(operation.reply, schemas)}},
            }
        },
    }
    for status, description in ERRORS.items():
        shape = operation.error | ErrorReply if status in OF_THE_PROXY else operation.error
        failure = {"application/json": {"schema": _schema(shape, schemas)}}
        content = PAGE if status == "400" else failure
        described["responses"][status] = {"description": description, "content": content}
    if operation.request is not None:
        body = {"application/json": {"schema": _schema(operation.request, schemas)}}
        described["requestBody"] = {"required": True, "content": body}
    if with_keys and not operation.open:
        described["security"] = [{"key": []}]
    return described


def _parameter(name: str, place: str, tasks: Sequence[str]) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "string"}
    if name == "task" and tasks:
        schema["enum"] = list(tasks)
    required = place == "path" or len(tasks) > 1  # the only task need not be named
    return {"name": name, "in": place, "required": required, "schema": schema}


def _schema(kind: Any, schemas: dict[str, Any]) -> dict[str, Any]:
    """A type's JSON schema, with its named parts moved to the components."""
    schema = TypeAdapter(kind).json_schema(ref_template="#/components/schemas/{model}")
    schemas.update(schema.pop("$defs", {}))
    title = schema.get("title")
    if isinstance(kind, type) and issubclass(kind, BaseModel) and title:
        schemas[title] = schema
        return {"$ref": f"#/components/schemas/{title}"}
    return schema


def documentation_page(document: dict[str, Any]) -> str:
    """The document as a plain page that needs nothing from elsewhere."""
    lines = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        "<meta name=viewport content='width=device-width'>",
        "<title>multitask-ray API</title><link rel=stylesheet href=page/style.css>",
        "<main><h1>multitask-ray API</h1>",
        "<p>The same as <a href=openapi.json>an OpenAPI document</a>.</p>",
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            lines.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            lines.append(f"<p>{html.escape(operation['summary'])}</p>")
            body = operation.get("requestBody")
            if body:
                (content,) = body["content"].values()
                name = content["schema"]["$ref"].rsplit("/", 1)[-1]
                text = json.dumps(document["components"]["schemas"][name], indent=2)
                lines.append(f"<details><summary>{name}</summary><pre>{html.escape(text)}</pre>")
                lines.append("</details>")
    return "\n".join([*lines, "</main></html>"])
