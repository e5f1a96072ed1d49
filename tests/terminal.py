"""A command in a real pseudo-terminal, and the screen that a person would see."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from tests.commands import ROOT, environment

TOKEN = re.compile(r"\x1b\[(\?)?([\d;]*)([A-Za-z])|\x1b[()][A-Z0-9]|([\r\n])|([^\x1b\r\n]+)")


class Screen:
    """Enough of a terminal for what `rich` writes: text, lines, cursor up, erase, hide and show."""

    def __init__(self) -> None:
        self.lines = [""]
        self.row = self.column = self.erased = 0
        self.cursor_visible = True

    def feed(self, text: str) -> None:
        for mark, numbers, letter, control, words in TOKEN.findall(text):
            count = int(numbers) if numbers.isdigit() else 0
            if words:
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = (
                    line[: self.column] + words + line[self.column + len(words) :]
                )
                self.column += len(words)
            elif control == "\r":
                self.column = 0
            elif control == "\n":
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif mark and count == 25:
                self.cursor_visible = letter == "h"
            elif letter == "A":
                self.row -= count or 1
                assert self.row >= 0, "the cursor left the screen"
            elif letter == "K":
                self.lines[self.row] = ""
                self.erased += 1

    @property
    def text(self) -> str:
        return "\n".join(line.rstrip() for line in self.lines)


class Terminal:
    """Runs `python -m train_jobs.<command>` with a terminal of its own as input and output."""

    def __init__(self, command: str, *arguments: str, rows: int = 40, columns: int = 100) -> None:
        self.screen, self.output, self.rest = Screen(), "", b""
        self.side, inner = pty.openpty()
        fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        env = environment(None, TERM="xterm-256color")
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            env.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", f"train_jobs.{command}", *arguments],
            cwd=ROOT,
            env=env,
            stdin=inner,
            stdout=inner,
            stderr=inner,
            start_new_session=True,
            # Its controlling terminal, so that Ctrl-C typed there becomes a signal.
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )
        os.close(inner)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.side)

    def type(self, keys: bytes) -> None:
        os.write(self.side, keys)

    def wait_until(self, condition: Callable[[], bool], seconds: float = 90) -> None:
        """Take in what the command writes until the condition holds."""
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, f"waited too long; the screen:\n{self.screen.text}"
            assert self._read(), f"the command has ended; the screen:\n{self.screen.text}"

    def wait(self, seconds: float = 60) -> int:
        """Take in the rest; the exit code."""
        end = time.monotonic() + seconds
        while self._read():
            assert time.monotonic() < end, f"waited too long; the screen:\n{self.screen.text}"
        return self.process.wait(timeout=seconds)

    def _read(self) -> bool:
        """Whether the command may still write."""
        if not select.select([self.side], [], [], 0.2)[0]:
            return True
        try:
            data = os.read(self.side, 65536)
        except OSError:  # Linux ends a terminal that nobody has open with EIO
            return False
        # An escape sequence or a character may be cut at the end of what has come.
        complete, self.rest = _whole(self.rest + data)
        self.output += complete
        self.screen.feed(complete)
        return bool(data)


def _whole(data: bytes) -> tuple[str, bytes]:
    escape = data.rfind(b"\x1b")
    if escape >= 0 and not re.search(rb"[A-Za-z]", data[escape:]):
        return data[:escape].decode("utf-8", "replace"), data[escape:]
    for cut in range(4):
        try:
            return data[: len(data) - cut].decode(), data[len(data) - cut :]
        except UnicodeDecodeError:
            continue
    return data.decode("utf-8", "replace"), b""
