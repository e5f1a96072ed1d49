"""API keys: who may ask."""

from __future__ import annotations

import hmac
import os
import re
import time
from collections.abc import Collection, Mapping
from pathlib import Path

from mtl_core.errors import ConfigError

KEYS_VARIABLE = "MTL_API_KEYS"
KEY = re.compile(rb"[\x21-\x7e]+")
"""What every client can send."""
OWN_HOST = re.compile(r"(127\.0\.0\.1|localhost|\[::1\])(:\d*)?", re.IGNORECASE)
"""How this machine names itself."""
GRACE_S = 10.0
"""How long keys count after a look at their file found none: long enough for a file that is being
written, short enough for an operator who empties or removes it to let nobody in."""


class Keys:
    """Keys from the environment and a file, which is read again and again.

    Args:
        file: a key a line; blank lines and lines that begin with # do not count.
        poll_seconds: how often to read it.

    Raises:
        ConfigError: the file cannot be read or holds no key, or a key is not ASCII without spaces.
    """

    def __init__(self, file: str | None = None, poll_seconds: float = 2.0) -> None:
        listed = os.environ.get(KEYS_VARIABLE, "").split(",")
        self.fixed = [os.fsencode(key.strip()) for key in listed if key.strip()]
        self.file = Path(file).expanduser() if file else None
        self.poll_seconds = poll_seconds
        self.from_file = read_keys(self.file) if self.file else []
        for origin, keys in ((KEYS_VARIABLE, self.fixed), ("keys_file", self.from_file)):
            if not all(map(KEY.fullmatch, keys)):
                raise ConfigError(f"{origin}: keys are ASCII without spaces")
        self.looked = self.found = time.monotonic()

    @property
    def required(self) -> bool:
        return bool(self.fixed or self.file)

    @property
    def first(self) -> str | None:
        """A key to ask with; of the file if there is one, which all replicas read."""
        return next((key.decode() for key in (*self.from_file, *self.fixed)), None)

    def accept(self, key: str | None) -> bool:
        """Whether the key is one of ours; takes as long for a near miss as for a far one."""
        if not self.required:
            return True
        self._refresh()
        given = (key or "").encode("utf-8", "surrogateescape")
        matches = [hmac.compare_digest(given, known) for known in (*self.fixed, *self.from_file)]
        return any(matches)

    def _refresh(self) -> None:
        now = time.monotonic()
        if self.file is None or now < self.looked + self.poll_seconds:
            return
        self.looked = now
        try:
            self.from_file = read_keys(self.file)
            self.found = now
        except ConfigError:
            # Counted from when keys were last seen: nobody may have asked since they went.
            if now > self.found + GRACE_S:
                self.from_file = []


def read_keys(file: Path) -> list[bytes]:
    """The keys of a file.

    Raises:
        ConfigError: it cannot be read, or holds none.
    """
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"keys_file: cannot read {file}: {error}") from error
    keys = [line.strip() for line in lines]
    found = [key.encode() for key in keys if key and not key.startswith("#")]
    if not found:
        raise ConfigError(f"keys_file: {file} holds no key")
    return found


def bearer(header: str | None) -> str | None:
    """The key of an Authorization header."""
    kind, _, key = (header or "").partition(" ")
    return key.strip() if kind.lower() == "bearer" else None


def from_another_site(headers: Mapping[str, str], origins: Collection[str]) -> bool:
    """Whether a browser of this machine asks for a page from elsewhere, of none of these origins.

    Browsers mark such requests, but where the page's own name was made to lead here (DNS
    rebinding): then it stands in the Host header.
    """
    if not OWN_HOST.fullmatch(headers.get("host", "localhost")):
        return True
    marked = headers.get("sec-fetch-site") == "cross-site"
    return marked and not {"*", headers.get("origin")} & {*origins}
