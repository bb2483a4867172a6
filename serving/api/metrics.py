"""Metrics for Prometheus, under vLLM's names, so that dashboards and alerts made for it work unchanged.

Counts of the engine come from its latest `Stats`; times are measured here, where the outputs arrive.
"""

from collections.abc import Iterator
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from ..messages import Output, Stats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
LABELS = ("model_name", "engine")
FIRST_TOKEN = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
)
BETWEEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
WHOLE = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOKENS = tuple(step * 10**power for power in range(6) for step in (1, 2, 5))

GAUGES = {
    "vllm:num_requests_running": ("Requests in the engine's batch.", lambda s: s.running),
    "vllm:num_requests_waiting": ("Requests that wait for the engine.", lambda s: s.waiting),
    "vllm:kv_cache_usage_perc": ("Blocks in use, 1 is all.", lambda s: s.blocks_used / max(1, s.blocks_total)),
}
COUNTERS = {
    "vllm:prefix_cache_queries": ("Prompt tokens looked up in the prefix cache.", lambda s: s.prefix_queries),
    "vllm:prefix_cache_hits": ("Prompt tokens found there.", lambda s: s.prefix_hits),
    "vllm:num_preemptions": ("Requests that lost their blocks and began anew.", lambda s: s.preemptions),
    "vllm:prompt_tokens": ("Prompt tokens computed.", lambda s: s.prompt_tokens),
    "vllm:generation_tokens": ("Tokens generated.", lambda s: s.generation_tokens),
    "vllm:spec_decode_num_drafts": ("Drafts, one per request and step.", lambda s: s.drafts),
    "vllm:spec_decode_num_draft_tokens": ("Tokens drafted.", lambda s: s.draft_tokens),
    "vllm:spec_decode_num_accepted_tokens": ("Drafted tokens accepted.", lambda s: s.accepted_tokens),
}
HISTOGRAMS = {
    "vllm:time_to_first_token_seconds": ("From the request to its first token.", FIRST_TOKEN),
    "vllm:inter_token_latency_seconds": ("Between two tokens; those of one output share its time.", BETWEEN),
    "vllm:request_time_per_output_token_seconds": ("Mean time of a token after the first.", BETWEEN),
    "vllm:e2e_request_latency_seconds": ("From the request to its last token.", WHOLE),
    "vllm:request_queue_time_seconds": ("From the request to its first step in the engine.", WHOLE),
    "vllm:request_prefill_time_seconds": ("From its first step to its first token.", WHOLE),
    "vllm:request_decode_time_seconds": ("From the first token to the last.", WHOLE),
    "vllm:request_prompt_tokens": ("Prompt tokens of a request.", TOKENS),
    "vllm:request_generation_tokens": ("Generated tokens of a request.", TOKENS),
}
REASONS = ("stop", "length", "abort", "timeout", "error")


class Engine(Protocol):
    @property
    def stats(self) -> Stats: ...


class Metrics:
    """The registry of one server. model: the model's own name."""

    def __init__(self, model: str, engine: Engine) -> None:
        self._registry = CollectorRegistry()
        self._labels, self._engine = (model, "0"), engine
        self._registry.register(self)
        self._histograms = {
            name: Histogram(name, text, LABELS, buckets=buckets, registry=self._registry).labels(*self._labels)
            for name, (text, buckets) in HISTOGRAMS.items()
        }
        self._finished = Counter(
            "vllm:request_success", "Requests that ended.", (*LABELS, "finished_reason"), registry=self._registry
        )
        for reason in REASONS:
            self._finished.labels(*self._labels, reason)
        self._rejections = Counter(
            "vllm:admission_rejections",
            "Requests refused before they were queued.",
            ("model_name", "reason"),
            registry=self._registry,
        )

    def collect(self) -> Iterator[Metric]:
        """What the engine counts; called by the registry."""
        stats = self._engine.stats
        for name, (text, value) in GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=LABELS)
            gauge.add_metric(self._labels, value(stats))
            yield gauge
        for name, (text, value) in COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=LABELS)
            counter.add_metric(self._labels, value(stats))
            yield counter

    def page(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)

    def rejected(self, reason: str) -> None:
        self._rejections.labels(self._labels[0], reason).inc()

    def observe(self, name: str, value: float) -> None:
        self._histograms[name].observe(value)

    def finished(self, reason: str) -> None:
        self._finished.labels(*self._labels, reason if reason in REASONS else "error").inc()


class Timing:
    """The times of one request. Seconds of a monotonic clock."""

    def __init__(self, metrics: Metrics, prompt_tokens: int, now: float) -> None:
        self._metrics, self._prompt_tokens = metrics, prompt_tokens
        self._begin, self._first, self._last = now, 0.0, 0.0
        self.tokens = 0
        self._over = False

    def output(self, output: Output, now: float) -> None:
        metrics = self._metrics
        if output.tokens and not self.tokens:
            self._first = now
            metrics.observe("vllm:time_to_first_token_seconds", now - self._begin)
            metrics.observe("vllm:request_queue_time_seconds", output.queued)
            metrics.observe("vllm:request_prefill_time_seconds", max(0.0, now - self._begin - output.queued))
        elif output.tokens:
            for _ in output.tokens:
                metrics.observe("vllm:inter_token_latency_seconds", (now - self._last) / len(output.tokens))
        self._last = now
        self.tokens += len(output.tokens)
        if output.finish is not None:
            self.end(output.finish, now)

    def end(self, reason: str, now: float) -> None:
        """Of the request; only the first reason counts."""
        if self._over:
            return
        self._over = True
        metrics = self._metrics
        metrics.finished(reason)
        metrics.observe("vllm:e2e_request_latency_seconds", now - self._begin)
        metrics.observe("vllm:request_prompt_tokens", self._prompt_tokens)
        metrics.observe("vllm:request_generation_tokens", self.tokens)
        if self.tokens:
            metrics.observe("vllm:request_decode_time_seconds", self._last - self._first)
        if self.tokens > 1:
            mean = (self._last - self._first) / (self.tokens - 1)
            metrics.observe("vllm:request_time_per_output_token_seconds", mean)
