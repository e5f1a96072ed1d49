"""Prometheus metrics of one replica."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric

SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


class Metrics:
    """Counters and histograms; one registry a replica, so nothing is global.

    Every sample carries the replica's name: a scrape reaches one of them, now this, now that.
    """

    def __init__(self, replica: str) -> None:
        self.registry = CollectorRegistry()
        counter = partial(Counter, registry=self.registry)
        gauge = partial(Gauge, registry=self.registry)
        histogram = partial(Histogram, registry=self.registry)
        self.requests = counter("mtl_requests", "Requests answered", ("route", "status"))
        self.latency = histogram(
            "mtl_request_seconds", "From headers to answer", ("route",), buckets=SECONDS
        )
        self.stage = histogram(
            "mtl_stage_seconds",
            "Time in a stage: tokenise, queue, encoder, head-<task>",
            ("stage",),
            buckets=SECONDS,
        )
        self.batch_texts = histogram("mtl_batch_texts", "Texts in a batch", buckets=COUNTS)
        self.batch_tokens = histogram("mtl_batch_tokens", "Sub-words in a batch", buckets=COUNTS)
        self.texts = counter("mtl_texts", "Texts answered")
        self.tokens = counter("mtl_tokens", "Sub-words encoded")
        self.passes = counter(
            "mtl_encoder_passes", "Windows that went through the encoder: one a text that fits"
        )
        self.rejected = counter("mtl_rejected", "Requests refused because too much waits")
        self.head_failures = counter(
            "mtl_head_failures", "Head calls without an answer", ("task", "reason")
        )
        self.head_retries = counter(
            "mtl_head_retries", "Head calls sent again after a replica died", ("task",)
        )
        self.loads = counter("mtl_artifact_loads", "Artifact versions taken up", ("outcome",))
        self.unanswered = gauge("mtl_unanswered_texts", "Texts queued or in work")
        self.info = gauge("mtl_replica", "1, with names", ("replica", "runtime", "version"))
        self.replica = replica

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self)  # all it asks for is collect()

    def collect(self) -> Iterator[Metric]:
        """What was counted, with the replica's name."""
        for metric in self.registry.collect():
            metric.samples = [
                sample._replace(labels={**sample.labels, "replica": self.replica})
                for sample in metric.samples
            ]
            yield metric
