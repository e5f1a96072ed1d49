"""How a contender is measured: some optimiser steps at a time, in turn with the others.

A contender trains as it always would, and calls `Pace.step` after every optimiser step. That halts
it between two slices, until a line on its standard input asks for the next one, so that whatever
else the machine does befalls all contenders alike. Only the standard library is needed here:
contenders run in environments of their own.
"""

from __future__ import annotations

import json
import resource
import sys
import time


class Pace:
    """Counts the steps of this process; one line of JSON on the standard output a slice."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        """Optimiser steps a slice."""
        self.done, self.tokens, self.seconds, self.cpu = 0, 0, 0.0, 0.0
        print(json.dumps({"ready": True}), flush=True)
        self._wait()

    def step(self, tokens: int, count: int = 1) -> None:
        """`count` optimiser steps over `tokens` real tokens have been taken."""
        now = time.perf_counter()
        self.seconds += now - self.since
        self.cpu += time.process_time() - self.cpu_since
        self.done += count
        self.tokens += tokens
        if self.done >= self.steps:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
            told = {"seconds": self.seconds, "tokens": self.tokens, "peak_mb": round(peak)}
            print(json.dumps({**told, "cpu_seconds": self.cpu}), flush=True)
            self.done, self.tokens, self.seconds, self.cpu = 0, 0, 0.0, 0.0
            self._wait()
        self.skip()

    def skip(self) -> None:
        """What happened since the last step was no training."""
        self.since, self.cpu_since = time.perf_counter(), time.process_time()

    def _wait(self) -> None:
        if not sys.stdin.readline():
            sys.exit(0)
        self.skip()
