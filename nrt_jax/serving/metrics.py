"""Metrics of the server for Prometheus: `/metrics`."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKEN_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """The metrics of one server, in its own registry."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "nrt_requests_total",
            "Requests answered, by route and status (499: the client went away).",
            ["route", "status"],
            registry=self.registry,
        )
        self.tokens_in = Counter(
            "nrt_prompt_tokens_total", "Tokens of accepted prompts.", registry=self.registry
        )
        self.tokens_out = Counter(
            "nrt_generated_tokens_total", "Tokens written for clients.", registry=self.registry
        )
        self.errors = Counter(
            "nrt_engine_errors_total",
            "Failures of the engine, after which it was built anew.",
            registry=self.registry,
        )
        self.first_token = Histogram(
            "nrt_time_to_first_token_seconds",
            "From the arrival of a request to its first token.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.per_token = Histogram(
            "nrt_time_per_token_seconds",
            "Mean time between two tokens of a sequence.",
            buckets=TOKEN_SECONDS,
            registry=self.registry,
        )

    def gauge(self, name: str, description: str, value: Callable[[], float]) -> None:
        """Add a gauge whose value is read on demand."""
        Gauge(f"nrt_{name}", description, registry=self.registry).set_function(value)
