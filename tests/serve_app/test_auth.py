"""Several keys, changed while the server runs, compared in constant time."""

from __future__ import annotations

import hmac
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from mtl_core.errors import ConfigError
from serve_app.auth import GRACE_S, KEYS_VARIABLE, Keys, bearer
from serve_app.deployments import check_exposure
from serve_app.settings import Settings


@pytest.fixture(autouse=True)
def no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text("# the mobile app\nfirst-key\n\n  second-key  \n#third-key\n", encoding="utf-8")
    return path


def test_without_keys_everybody_may_ask() -> None:
    keys = Keys()
    assert not keys.required
    assert keys.first is None
    assert keys.accept(None)


def test_the_environment_holds_several_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, " one ,two,, ")
    keys = Keys()
    assert keys.required
    assert keys.first == "one"
    assert keys.accept("one")
    assert keys.accept("two")
    assert not any(keys.accept(wrong) for wrong in (None, "", " one ", "one,two", "on", "ONE"))


def test_comments_and_blank_lines_of_a_file_are_no_keys(file: Path) -> None:
    keys = Keys(str(file))
    assert keys.accept("first-key")
    assert keys.accept("second-key")
    assert not any(keys.accept(wrong) for wrong in ("", "third-key", "#third-key", "# the mobile"))


def test_keys_of_environment_and_file_count_alike(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEYS_VARIABLE, "fixed")
    keys = Keys(str(file))
    assert keys.accept("fixed")
    assert keys.accept("first-key")
    assert keys.first == "first-key"  # replicas elsewhere may have another environment


def test_a_key_is_rotated_without_a_restart(file: Path) -> None:
    keys = Keys(str(file), poll_seconds=0)
    file.write_text("second-key\nnew-key\n", encoding="utf-8")
    assert keys.accept("new-key")
    assert keys.accept("second-key")
    assert not keys.accept("first-key")


def test_a_file_replaced_by_another_of_the_same_time_is_read(file: Path, tmp_path: Path) -> None:
    keys = Keys(str(file), poll_seconds=0)
    other = tmp_path / "other"
    other.write_text("new-key\n", encoding="utf-8")
    time = file.stat().st_mtime_ns
    os.utime(other, ns=(time, time))
    other.replace(file)
    assert keys.accept("new-key")
    assert not keys.accept("first-key")


@pytest.mark.parametrize("content", [None, "", "# only words\n"])
def test_a_file_that_is_gone_or_empty_locks_nobody_out_for_a_moment_and_then_all(
    file: Path, content: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("serve_app.auth.time.monotonic", lambda: now)
    monkeypatch.setenv(KEYS_VARIABLE, "fixed")
    keys = Keys(str(file), poll_seconds=2)
    if content is None:
        file.unlink()
    else:
        file.write_text(content, encoding="utf-8")
    for later, taken in ((3.0, True), (GRACE_S, True), (GRACE_S + 2.1, False)):
        now = 1000.0 + later
        assert keys.accept("first-key") == taken
        assert keys.accept("fixed")
        assert not keys.accept(None)
        assert not keys.accept("wrong")
    now += 3
    file.write_text("new-key\n", encoding="utf-8")
    assert keys.accept("new-key")
    assert not keys.accept("first-key")


def test_a_file_emptied_while_nobody_asked_lets_nobody_in(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("serve_app.auth.time.monotonic", lambda: now)
    keys = Keys(str(file))
    file.write_text("", encoding="utf-8")
    now += 3600
    assert not keys.accept("first-key")
    assert not keys.accept(None)


def test_every_key_is_compared_in_constant_time(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared: list[bytes] = []
    real = hmac.compare_digest

    def compare(given: bytes, known: bytes) -> bool:
        compared.append(known)
        return real(given, known)

    keys = Keys(str(file))
    monkeypatch.setattr("serve_app.auth.hmac.compare_digest", compare)
    for given in ("first-key", "second-key", "wrong"):
        compared.clear()
        keys.accept(given)
        assert compared == [b"first-key", b"second-key"]  # a match does not end it early


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"keys_file: cannot read .*nowhere"):
        Keys(str(tmp_path / "nowhere"))


def test_a_folder_is_no_keys_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keys_file: cannot read"):
        Keys(str(tmp_path))


def test_a_file_without_a_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("# nothing yet\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds no key"):
        Keys(str(tmp_path / "keys"))


def test_a_key_of_any_bytes_is_refused_without_an_error(file: Path) -> None:
    assert not Keys(str(file)).accept("schlüssel \udcff 🔑")


def test_a_keys_file_may_begin_with_a_byte_order_mark(file: Path) -> None:
    file.write_text("first-key\nsecond-key\n", encoding="utf-8-sig")
    keys = Keys(str(file))
    assert keys.accept("first-key")
    assert keys.accept("second-key")


@pytest.mark.parametrize("key", ["schlüssel", "schl\udcfcssel", "two words", "a\x7f"])
def test_a_key_that_clients_cannot_send_is_refused(
    key: str, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file.write_bytes(b"first-key\n" + os.fsencode(key))
    with pytest.raises(ConfigError, match=r"keys_file: (keys are ASCII|cannot read)"):
        Keys(str(file))
    monkeypatch.setenv(KEYS_VARIABLE, f"fixed,{key}")
    with pytest.raises(ConfigError, match=f"{KEYS_VARIABLE}: keys are ASCII without spaces"):
        Keys()


@pytest.mark.parametrize(
    ("header", "key"),
    [
        ("Bearer abc", "abc"),
        ("bearer  abc ", "abc"),
        ("Basic abc", None),
        ("abc", None),
        ("", None),
        (None, None),
    ],
)
def test_a_key_comes_as_a_bearer_token(header: str | None, key: str | None) -> None:
    assert bearer(header) == key


@pytest.mark.parametrize(
    ("host", "refused"),
    [
        ("127.0.0.1", False),
        ("localhost", False),
        ("0.0.0.0", True),
        ("192.0.2.1", True),
        (None, True),
    ],
)
def test_without_a_key_a_replica_starts_only_where_serve_is_known_to_be_local(
    host: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = SimpleNamespace(http_config=SimpleNamespace(host=host))
    monkeypatch.setattr("ray.serve.context._get_global_client", lambda: client)
    settings = Settings(artifact="somewhere")
    if refused:
        with pytest.raises(ConfigError, match="no API key is set"):
            check_exposure(settings, Keys())
    else:
        check_exposure(settings, Keys())
    check_exposure(settings.model_copy(update={"insecure": True}), Keys())


def test_without_a_key_and_without_knowing_serve_a_replica_does_not_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray.serve.context._get_global_client", lambda: None)
    with pytest.raises(ConfigError, match="an unknown address"):
        check_exposure(Settings(artifact="somewhere"), Keys())
