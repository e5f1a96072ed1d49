"""The command's own requests to the server it started."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from contextlib import suppress
from typing import Any

from mtl_core.errors import ConfigError


def request(url: str, body: object = None, key: str | None = None) -> Any:
    """One HTTP request's JSON reply."""
    headers = {"content-type": "application/json"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # despite http_proxy
    with direct.open(urllib.request.Request(url, data, headers), timeout=60) as reply:
        return json.load(reply)


def wait_until_ready(url: str, timeout_s: float = 60.0) -> None:
    """Return once every deployment answers.

    Raises:
        ConfigError: it does not within the time.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            request(f"{url}/ready")
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise ConfigError(f"{url} is not ready after {timeout_s:g} s: {error}") from error
            time.sleep(0.1)


def ask(url: str, text: str, key: str | None) -> None:
    """Ask one question over HTTP and print question and reply.

    Raises:
        ConfigError: the server refuses it; the message is its own.
    """
    body = {"inputs": text}
    print(f"POST {url}/v1/predict {json.dumps(body, ensure_ascii=False)}")
    try:
        reply = request(f"{url}/v1/predict", body, key)
    except urllib.error.HTTPError as error:
        raise ConfigError(f"--ask: {refusal(error)}") from error
    print(json.dumps(reply, indent=2, ensure_ascii=False))


def refusal(error: urllib.error.HTTPError) -> str:
    """What the server says is wrong; its status where that is not JSON of ours."""
    with suppress(ValueError, LookupError, TypeError):
        return str(json.load(error)["error"])
    return str(error)
