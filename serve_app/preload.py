"""What the processes of a server need, for the one that they are forks of."""

from __future__ import annotations

from unittest.mock import patch

from mtl_core.forks import OsRandomIds


def load_libraries() -> None:
    import transformers

    import mtl_core.predictor  # noqa: F401
    import serve_app.app  # noqa: F401

    for name in ("AutoConfig", "AutoTokenizer"):
        getattr(transformers, name)  # they are loaded on first use


def load_ray() -> None:
    import ray.actor

    with patch.object(ray.actor, "ActorClassID", OsRandomIds(ray.ActorClassID)):
        import ray.serve._private.controller
        import ray.serve._private.haproxy
        import ray.serve._private.replica

        import serve_app.deployments  # noqa: F401
