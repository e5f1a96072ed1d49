"""Files behind URLs: artifacts as folders of this machine, and errors that say what to do."""

from __future__ import annotations

import errno
import hashlib
from pathlib import Path
from typing import Any

from mtl_core.errors import ArtifactError, ConfigError
from mtl_core.folders import atomic_folder, cache_root, file_sha256

LASTING = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
LASTING_NUMBERS = (
    None,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EINVAL,
    errno.ENAMETOOLONG,
)


def storage_errors() -> tuple[type[Exception], ...]:
    """What reading or writing a path or URL raises; S3's own errors are no OSErrors."""
    try:
        from botocore.exceptions import BotoCoreError, ClientError
    except ImportError:
        return (OSError,)
    return (OSError, BotoCoreError, ClientError)


def may_pass(error: BaseException | None) -> bool:
    """Whether storage may do later what it did not do now.

    Not what is missing, forbidden or full, nor what libraries call an OSError without a number: no
    model of that name, no gzip file. Of S3's own errors what the network or the service may mend,
    not keys or settings that are missing.
    """
    if isinstance(error, (TimeoutError, ConnectionError, *_passing_s3_errors())):
        return True
    if not isinstance(error, OSError) or isinstance(error, LASTING):
        return False
    return error.errno not in LASTING_NUMBERS


def _passing_s3_errors() -> tuple[type[Exception], ...]:
    try:
        from botocore import exceptions
    except ImportError:
        return ()
    return (
        exceptions.HTTPClientError,
        exceptions.ConnectionError,
        exceptions.CredentialRetrievalError,
        exceptions.ClientError,
    )


def advise(error: Exception) -> str:
    """What went wrong with storage, and what to do about it."""
    advice = {
        "NoCredentialsError": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the "
        "machine a role",
        "PermissionError": "give the key or the role the rights to this bucket "
        "(aws/worker-policy.json lists them)",
        "FileNotFoundError": "check the name; a bucket has to be there already",
    }
    names = [kind.__name__ for kind in type(error).__mro__]
    if "ConnectionError" in names or "HTTPClientError" in names:
        return f"{error}; check the network, AWS_DEFAULT_REGION and AWS_ENDPOINT_URL"
    found = [advice[name] for name in names if name in advice]
    return "; ".join([str(error), *found[:1]])


def fetch(artifact: str | Path) -> Path:
    """The artifact as a local folder; one behind a URL is copied into the cache, a version once.

    Raises:
        ArtifactError: it cannot be read, or a file is not the one that its manifest names.
    """
    if "://" not in str(artifact):
        return Path(artifact).expanduser()
    from fsspec.core import url_to_fs

    try:
        files, root = url_to_fs(artifact)
        manifest = files.cat_file(f"{root}/manifest.json")
        target = cache_root() / "artifacts" / version_of(manifest)
        if not (target / "manifest.json").is_file():
            _copy(files, root, manifest, target)
    except storage_errors() as error:
        raise ArtifactError(f"{artifact}: cannot be fetched: {advise(error)}") from error
    except (ValueError, KeyError, ImportError) as error:
        raise ArtifactError(f"{artifact}: cannot be fetched: {error}") from error
    return target


def manifest_of(artifact: str) -> bytes:
    """The manifest.json that stands at a path or URL now.

    Raises:
        ArtifactError: none can be had.
    """
    try:
        if "://" not in artifact:
            return (Path(artifact).expanduser() / "manifest.json").read_bytes()
        files, root = _filesystem(artifact)
        found: bytes = files.cat_file(f"{root}/manifest.json")
        return found
    except storage_errors() as error:
        raise ArtifactError(f"{artifact}: no artifact: {error}") from error
    except ConfigError as error:
        raise ArtifactError(str(error)) from error


def _copy(files: Any, root: str, manifest: bytes, target: Path) -> None:
    """Everything that a manifest names as a folder of this machine, whole or not at all."""
    from mtl_core.artifact import parse_manifest  # which imports this module

    wanted = parse_manifest(manifest, f"{root}/manifest.json").files
    with atomic_folder(target, replace=False) as partial:
        for name, expected in wanted.items():
            path = partial / name
            if not path.resolve().is_relative_to(partial.resolve()):
                raise ArtifactError(f"{root}/{name}: lies outside the artifact")
            path.parent.mkdir(parents=True, exist_ok=True)
            files.get_file(f"{root}/{name}", str(path))
            if file_sha256(path) != expected:
                raise ArtifactError(
                    f"{root}/{name}: not the file that manifest.json names; if a new version is "
                    "being put there, try again when it is whole"
                )
        (partial / "manifest.json").write_bytes(manifest)


def download(path: str, folder: Path) -> Path:
    """A file as one of this machine: itself, or a copy in `folder` of what is behind a URL.

    Raises:
        ConfigError: there is no such file behind the URL.
    """
    if "://" not in path:
        return Path(path)
    files, source = _filesystem(path)
    target = folder / Path(source).name
    try:
        files.get_file(source, str(target))
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such file") from error
    return target


def upload(folder: Path, url: str) -> None:
    """Put the files of a folder beside each other behind a URL."""
    files, target = _filesystem(url)
    for file in sorted(folder.iterdir()):
        files.put_file(str(file), f"{target}/{file.name}")


def exists(path: str) -> bool:
    """Whether a file or URL is there."""
    files, target = _filesystem(path)
    return bool(files.exists(target))


def remove(url: str) -> None:
    """Delete the file behind a URL if there is one."""
    files, target = _filesystem(url)
    if files.exists(target):
        files.rm_file(target)


def _filesystem(url: str) -> tuple[Any, str]:
    """What reads and writes behind a URL, and the path there.

    Raises:
        ConfigError: nothing does.
    """
    from fsspec.core import url_to_fs

    try:
        files, path = url_to_fs(url)
    except (ValueError, ImportError) as error:
        raise ConfigError(f"{url}: {error}") from error
    return files, path


def version_of(manifest: bytes) -> str:
    """A short name of what a manifest vouches for."""
    return hashlib.sha256(manifest).hexdigest()[:16]
