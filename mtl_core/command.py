"""What every command shares: errors without tracebacks, exit codes, Ctrl-C and SIGTERM."""

from __future__ import annotations

import atexit
import gc
import io
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress

from mtl_core.errors import ConfigError, UserError
from mtl_core.folders import holds_cache
from mtl_core.storage import advise, storage_errors

INTERRUPTED = 130
QUIET = {
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
}
"""What the libraries read when they are imported, which is after a command has begun."""


def start_in_utf8() -> None:
    """Start Python anew in its UTF-8 mode where the locale says another encoding.

    Arguments and the names of files would be read in that encoding, by Ray's processes too.
    """
    if sys.getfilesystemencoding() != "utf-8":
        os.environ["PYTHONUTF8"] = "1"  # for Ray's processes
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])


def run_command(main: Callable[[], None]) -> None:
    """Run a command; a user's mistake gives its message and exit code 1.

    Ctrl-C and SIGTERM give 130, and leave nothing behind.
    """
    start_in_utf8()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Or Python goes through the libraries' objects again and again as they are made, for half a
    # second, and for a second as it ends.
    gc.set_threshold(100_000, 50, 50)
    atexit.register(gc.freeze)
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that lacks a sign must not end a run; in a file, too, lines come in order.
            stream.reconfigure(errors="replace", line_buffering=True)
    try:
        main()
    except UserError as error:
        fail(str(error))
    except OSError as error:
        fail(told(error))
    except storage_errors() as error:
        fail(f"storage: {advise(error)}")
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(INTERRUPTED)


def told(error: OSError) -> str:
    """An error of the system, and what to do where the cache cannot be used."""
    message = f"{error.strerror or error}: {error.filename or ''}".rstrip(": ")
    with suppress(ConfigError):
        mistaken = isinstance(error, IsADirectoryError)  # in whose name the cache's may begin
        if error.filename and not mistaken and holds_cache(str(error.filename)):
            message += "; set MTL_CACHE to another folder for the cache"
    return message


def fail(message: str) -> None:
    print(f"error: {message}", file=sys.stderr)
    sys.exit(1)
