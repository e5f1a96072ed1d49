"""What a server is told: limits, keys, and how the graph is spread over a cluster."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationError

from mtl_core.config import Config, describe
from mtl_core.errors import ConfigError
from mtl_core.runtime import RuntimeName

ENCODER_CPUS, HEAD_CPUS = 1.0, 0.1
"""What Ray hands a replica, unless `ray_actor_options` of its deployment say otherwise."""
ENCODER = "encoder"
"""The name of the encoder's deployment and of its application."""
LOOPBACK = ("127.0.0.1", "localhost")
"""Hosts that only this machine reaches, of those that Serve's HAProxy can do with."""


def head_name(task: str) -> str:
    """The name of a head's deployment and of its application."""
    return f"head-{task}"


class Settings(Config):
    """Arguments of the encoder deployment; `args` of its application in serve_config.yaml."""

    artifact: str
    """Folder of the artifact, or an fsspec URL of one (s3://…). A new version that appears there
    is taken up without a restart."""
    runtime: RuntimeName = "auto"
    """How the encoder is executed."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of the encoder; all the replica has when 0."""
    heads: Literal["deployments", "in_process"] = "deployments"
    """Where heads run; in_process is for one small machine and for measuring what a hop costs."""
    keys_file: str | None = None
    """File with an API key a line, read again and again; emptied or removed, it lets nobody in
    after 10 s. MTL_API_KEYS holds keys too."""
    log_requests: bool = True
    """Write a JSON line a request to the replica's log; texts are never in it."""
    insecure: bool = False
    """Answer without a key even where others can reach the port."""
    cors_origins: tuple[str, ...] = ()
    """Web origins whose pages may call this server; none by default."""
    max_inputs: int = Field(default=256, ge=1)
    """Texts in one request."""
    max_characters: int = Field(default=200_000, ge=1)
    """Characters in one text."""
    max_tokens: int = Field(default=262_144, ge=1)
    """Sub-words the encoder may read for one request: of all windows of its texts where entities
    are asked for, else of the first of each; at `/tokenize` all of them count, up to 32,768."""
    max_body_bytes: int = Field(default=2_000_000, ge=1)
    """Bytes in one request's body."""
    body_timeout_s: float = Field(default=10.0, gt=0)
    """Seconds a client has to send its body; in front of the replicas HAProxy waits 10 s for it."""
    max_waiting: int = Field(default=512, ge=1)
    """Texts a replica holds unanswered; a request beyond that gets 429."""
    max_waiting_tokens: int = Field(default=131_072, ge=1)
    """Sub-words of texts that a replica holds unanswered before a request gets 429; the last one
    taken may bring up to `max_tokens` more."""
    retry_after_s: int = Field(default=1, ge=1)
    """What a 429 tells clients to wait."""
    batch_tokens: int = Field(default=2048, ge=1)
    """Sub-words the encoder takes at once."""
    head_timeout_s: float = Field(default=15.0, gt=0)
    """Seconds a head has for a batch before its task is answered with 503."""
    poll_seconds: float = Field(default=2.0, gt=0)
    """How often to look for a new version of the artifact and of the keys file."""


def parse_settings(args: dict[str, Any]) -> Settings:
    """Check arguments.

    Raises:
        ConfigError: naming each field that is wrong.
    """
    try:
        return Settings.model_validate(args)
    except ValidationError as error:
        raise ConfigError(describe(error, Settings)) from error
