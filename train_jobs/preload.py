"""What the processes of a run need, for the one that they are forks of."""

from __future__ import annotations

from unittest.mock import patch

from mtl_core.forks import OsRandomIds


def load_libraries() -> None:
    import pandas  # noqa: F401
    import transformers

    import mtl_core.build
    import mtl_core.loop  # noqa: F401

    for name in ("AutoConfig", "AutoModel", "AutoTokenizer", "PreTrainedModel"):
        getattr(transformers, name)  # they are loaded on first use


def load_ray() -> None:
    import ray.actor

    with patch.object(ray.actor, "ActorClassID", OsRandomIds(ray.ActorClassID)):
        import ray.data
        import ray.train.torch
