"""Where folders go that nobody named: the cache, and what has sockets in it."""

from __future__ import annotations

import os
import pwd
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from mtl_core import forks
from mtl_core.command import run_command
from mtl_core.errors import ConfigError
from mtl_core.folders import cache_root, socket_root


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container under a user's number that it does not know."""

    def unknown(number: int) -> None:
        raise KeyError(number)

    for name in ("HOME", "XDG_CACHE_HOME", "MTL_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("no_home")
def test_without_a_home_the_cache_is_where_a_variable_says(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="MTL_CACHE"):
        cache_root()
    monkeypatch.setenv("XDG_CACHE_HOME", "/of/user")
    assert cache_root() == Path("/of/user/multitask-ray")
    monkeypatch.setenv("MTL_CACHE", "/of/ours")
    assert cache_root() == Path("/of/ours")


@pytest.mark.parametrize(("place", "named"), [("file/a", True), ("file", True), ("free", False)])
def test_a_cache_that_cannot_be_written_is_told_with_the_variable_that_moves_it(
    place: str,
    named: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("MTL_CACHE", str(tmp_path / place))
    with pytest.raises(SystemExit):
        run_command((file / "a" / "encoded").mkdir)
    told = capsys.readouterr().err
    assert told.startswith(f"error: Not a directory: {file}/a/encoded")
    assert ("MTL_CACHE" in told) == named
    with pytest.raises(SystemExit):  # has nothing to do with the cache that it may hold
        run_command(lambda: tmp_path.write_text("x"))
    assert capsys.readouterr().err == f"error: Is a directory: {tmp_path}\n"


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder that pytest would give a longer path."""
    folder = Path(tempfile.mkdtemp(prefix="r-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder)


def test_what_has_sockets_is_beside_ray_s_own(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(short / "a"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(os.path, "exists", lambda _: False)  # no GPU
    monkeypatch.setattr(forks, "start_server", lambda *_: None)
    monkeypatch.setattr(forks, "end_server", lambda _: None)
    with forks.forked_workers("train_jobs.preload") as scripts:
        assert scripts is not None
        assert Path(scripts).parent == short / "a"


@pytest.mark.parametrize("chosen", ["", None, f"/tmp/{'long' * 10}"])
def test_it_is_in_tmp_where_ray_s_folder_is_not_chosen_or_too_long_for_a_socket(
    chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    if chosen is not None:
        monkeypatch.setenv("RAY_TMPDIR", chosen)
    assert socket_root() == "/tmp"
    assert not chosen or not Path(chosen).exists()
