"""Contenders side by side: processes that each train a slice when told to (see pace.py)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

Slice = dict[str, float]
"""Seconds, of them CPU time of all threads, real tokens, the process's peak memory in MB."""


def in_turn(commands: Mapping[str, Sequence[str]], rounds: int) -> dict[str, list[Slice]]:
    """Start all contenders and let each train a slice a round, another one first each time.

    Args:
        commands: name → command line of a process that keeps a Pace.
        rounds: that count; one more before them warms up, and fills our cache of frozen states.
    """
    slices: dict[str, list[Slice]] = {name: [] for name in commands}
    with ExitStack() as stack:
        running = {name: stack.enter_context(_started(words)) for name, words in commands.items()}
        names = list(running)
        for number in range(rounds + 1):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                found = _slice(running[name])
                print(f"round {number} of {rounds}, {name}: {found}", file=sys.stderr, flush=True)
                if number:
                    slices[name].append(found)
    return slices


@contextmanager
def _started(words: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    threads = str(len(os.sched_getaffinity(0)))
    env = {**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, env=env, stdin=pipe, stdout=pipe, text=True)
    try:
        _answer(process)  # that it is ready: nobody trains while another one starts
        yield process
    finally:
        process.kill()
        process.communicate()


def _slice(process: subprocess.Popen[str]) -> Slice:
    assert process.stdin is not None
    process.stdin.write("go\n")
    process.stdin.flush()
    return _answer(process)


def _answer(process: subprocess.Popen[str]) -> Slice:
    """The next line of a contender's Pace; libraries may print other things."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(('{"ready"', '{"seconds"')):
            found: Slice = json.loads(line)
            return found
    raise SystemExit(f"a contender ended with status {process.wait()}: {process.args}")
