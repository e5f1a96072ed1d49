"""A headless Chromium that tests drive through the DevTools protocol over a pair of pipes."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

BINARIES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--remote-debugging-pipe",
    "--no-sandbox",  # containers seldom allow the namespaces that it needs; pages are our own
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)
# The protocol talks over descriptors 3 and 4 of the browser.
WRAPPER = 'exec "$@" 3<&"$TO_BROWSER" 4>&"$FROM_BROWSER"'
KEYS = {"Tab": (9, ""), "Enter": (13, "\r"), " ": (32, " ")}
CONTROL = 2

Reply = tuple[int, dict[str, str], bytes]
HOLD: Reply = (0, {}, b"")
"""The reply of a server that never answers."""
Intercept = Callable[[dict[str, Any]], Reply | None]


def find_browser() -> str | None:
    """The path of a Chromium, or None where none is installed."""
    return next(filter(None, map(shutil.which, BINARIES)), None)


class Browser:
    """A process with one tab; a context manager that ends it."""

    def __init__(self, binary: str, profile: Path, timeout: float = 30.0) -> None:
        self.timeout = timeout
        self.events: list[dict[str, Any]] = []
        """What the tab told since `open`, as protocol messages."""
        self._intercept: Intercept | None = None
        self._replies: dict[int, dict[str, Any]] = {}
        self._buffer = b""
        self._last_id = 0
        self._session: str | None = None
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        pipes = {"TO_BROWSER": str(theirs_in), "FROM_BROWSER": str(theirs_out)}
        self._process = subprocess.Popen(
            ["bash", "-c", WRAPPER, "bash", binary, *FLAGS, f"--user-data-dir={profile}"],
            env={**os.environ, **pipes},
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(timeout=self.timeout)
        os.close(self._to)
        os.close(self._from)

    # --- the protocol

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result."""
        number = self._send(method, parameters)
        deadline = time.monotonic() + self.timeout
        while number not in self._replies:
            if not self._receive(deadline - time.monotonic()):
                raise TimeoutError(f"{method} got no answer in {self.timeout} s")
        reply = self._replies.pop(number)
        if "error" in reply:
            raise RuntimeError(f"{method}: {reply['error']['message']}")
        result: dict[str, Any] = reply["result"]
        return result

    def _send(self, method: str, parameters: dict[str, Any]) -> int:
        self._last_id += 1
        message = {"id": self._last_id, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        return self._last_id

    def _receive(self, seconds: float) -> bool:
        """Take in what the browser says within this time; False if it stays silent."""
        if not select.select([self._from], [], [], max(seconds, 0))[0]:
            return False
        data = os.read(self._from, 1 << 20)
        if not data:
            raise RuntimeError("the browser ended")
        *messages, self._buffer = (self._buffer + data).split(b"\0")
        for raw in messages:
            message = json.loads(raw)
            if "id" in message:
                self._replies[message["id"]] = message
            elif message["method"] == "Fetch.requestPaused":
                self._answer(message["params"])
            else:
                self.events.append(message)
        return True

    # --- the tab

    def open(self, url: str, intercept: Intercept | None = None, **media: str) -> None:
        """Load a page in a fresh tab without cookies or storage.

        Args:
            url: where to.
            intercept: sees each request (with its `headers`) and answers it, or returns None.
            media: features such as prefers_color_scheme="dark".
        """
        self._session = None
        context = self.call("Target.createBrowserContext")["browserContextId"]
        target = self.call("Target.createTarget", url="about:blank", browserContextId=context)
        attached = self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        self.events.clear()
        self._intercept = intercept
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.call(f"{domain}.enable")
        if intercept:
            self.call("Fetch.enable", patterns=[{"urlPattern": "*"}])
        self.size(1000, 900)
        self.media(**media)
        self.call("Page.navigate", url=url)
        self.wait("document.readyState === 'complete'")

    def _answer(self, paused: dict[str, Any]) -> None:
        """Continue a request, or fulfil it with what `intercept` says."""
        request, number = paused["request"], paused["requestId"]
        reply = self._intercept(request) if self._intercept else None
        if reply is None:
            self._send("Fetch.continueRequest", {"requestId": number})
            return
        if reply is HOLD:
            return
        status, headers, body = reply
        parameters = {
            "requestId": number,
            "responseCode": status,
            "responseHeaders": [{"name": k, "value": v} for k, v in headers.items()],
            "body": base64.b64encode(body).decode(),
        }
        self._send("Fetch.fulfillRequest", parameters)

    def reload(self) -> None:
        """Load the page again; its tab keeps what it stores."""
        self.js("window.stale = true")
        self.call("Page.reload")
        self.wait("!window.stale && document.readyState === 'complete'")

    def js(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; promises are awaited."""
        result = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        if "exceptionDetails" in result:
            raise RuntimeError(f"{expression}: {result['exceptionDetails']}")
        return result["result"].get("value")

    def wait(self, condition: str) -> None:
        """Until a JavaScript expression is true."""
        deadline = time.monotonic() + self.timeout
        while not self.js(f"Boolean({condition})"):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{condition} stayed false; the page: {self.text('body')}")
            self._receive(0.02)

    def text(self, selector: str) -> str:
        """What the first such element contains."""
        return str(self.js(f"document.querySelector({json.dumps(selector)}).textContent"))

    def texts(self, selector: str) -> list[str]:
        """What each such element contains."""
        nodes = f"document.querySelectorAll({json.dumps(selector)})"
        return list(self.js(f"Array.from({nodes}, (node) => node.textContent)"))

    def click(self, selector: str) -> None:
        self.js(f"document.querySelector({json.dumps(selector)}).click()")

    def type(self, text: str) -> None:
        """Insert text where the focus is."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, control: bool = False) -> None:
        """Press and release a key, as the keyboard would."""
        code, text = KEYS[key]
        press: dict[str, Any] = {
            "key": key,
            "code": key,
            "windowsVirtualKeyCode": code,
            "modifiers": CONTROL if control else 0,
        }
        down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        self.call("Input.dispatchKeyEvent", **press, **down)
        self.call("Input.dispatchKeyEvent", **press, type="keyUp")

    def size(self, width: int, height: int, scale: float = 1.0) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **metrics)

    def media(self, **features: str) -> None:
        """Emulate media features: `prefers_color_scheme="dark"`."""
        pairs = [{"name": k.replace("_", "-"), "value": v} for k, v in features.items()]
        self.call("Emulation.setEmulatedMedia", features=pairs)

    def screenshot(self) -> bytes:
        """The whole page as PNG."""
        content = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {**content, "scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        return base64.b64decode(shot["data"])

    def accessibility(self) -> list[tuple[str, str]]:
        """(role, name) of every node that assistive technology sees, in order."""
        nodes = self.call("Accessibility.getFullAXTree")["nodes"]
        return [
            (node["role"]["value"], node.get("name", {}).get("value", ""))
            for node in nodes
            if not node["ignored"]
        ]

    def requests(self) -> list[str]:
        """Every URL that the page asked for."""
        sent = (e for e in self.events if e["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]

    def complaints(self) -> list[str]:
        """Uncaught exceptions and what the console holds against the page; not refused requests."""
        found = []
        for event in self.events:
            entry = event["params"].get("entry", {})
            if event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(event["params"]["exceptionDetails"]))
            elif entry.get("level") in ("warning", "error") and entry["source"] != "network":
                found.append(entry["text"])
        return found
