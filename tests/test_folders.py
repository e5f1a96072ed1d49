"""Where folders go that nobody named: the cache."""

from __future__ import annotations

import pwd
from pathlib import Path

import pytest

from mtl_core.command import run_command
from mtl_core.config import ConfigError
from mtl_core.folders import cache_root


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
