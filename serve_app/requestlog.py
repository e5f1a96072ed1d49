"""A JSON line a request: what was asked of which route and how it ended, never what it held."""

from __future__ import annotations

import sys
import time
import traceback
from typing import TYPE_CHECKING, TextIO

import orjson

if TYPE_CHECKING:
    from serve_app.service import Answer


class RequestLog:
    """Writes to the replica's standard error, which Ray keeps in its log folder.

    Args:
        enabled: whether requests are logged; errors always are.
        stream: where to.
    """

    def __init__(self, enabled: bool = True, stream: TextIO | None = None) -> None:
        self.enabled = enabled
        self.stream = stream or sys.__stderr__ or sys.stderr

    def request(
        self,
        identifier: str,
        method: str,
        route: str,
        status: int,
        seconds: float,
        answer: Answer | None,
    ) -> None:
        if not self.enabled:
            return
        row = {
            "time": round(time.time(), 3),
            "id": identifier,
            "method": method,
            "route": route,
            "status": status,
            "ms": round(1000 * seconds, 2),
        }
        if answer is not None:
            row["texts"] = sum(len(part.items) for part in answer.parts)
            row["tokens"] = answer.num_tokens
            row["queue_ms"] = round(1000 * answer.queue, 2)
            row["version"] = answer.model.version
        self._write(row)

    def error(self, identifier: str, error: BaseException) -> None:
        """An error that is ours: type and place, but not its message, which may quote a text."""
        frames = traceback.extract_tb(error.__traceback__)
        places = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        row = {"time": round(time.time(), 3), "id": identifier, "error": type(error).__name__}
        self._write({**row, "trace": places})

    def event(self, what: str, **values: object) -> None:
        """Something that happened to the server itself."""
        self._write({"time": round(time.time(), 3), "event": what, **values})

    def _write(self, row: dict[str, object]) -> None:
        self.stream.write(orjson.dumps(row).decode() + "\n")
        self.stream.flush()
