"""What Prometheus reads at /metrics."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
TOKENS = ("prompt", "completion", "memory", "context")


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self):
        self._registry = CollectorRegistry()
        into = {"registry": self._registry}
        self._requests = Counter(
            "icae_requests", "requests, by route and status", ["route", "status"], **into
        )
        self._seconds = Histogram(
            "icae_request_seconds", "until a response has ended", ["route"], buckets=SECONDS, **into
        )
        self._first = Histogram(
            "icae_first_token_seconds",
            "from having a prompt to its first new token, waiting included",
            buckets=SECONDS,
            **into,
        )
        self._tokens = Counter(
            "icae_tokens",
            "tokens read before the first new one (prompt), generated (completion), of memories "
            "among those read (memory), and of the texts that they stand for (context)",
            ["kind"],
            **into,
        )
        for kind in TOKENS:
            self._tokens.labels(kind)
        self._compressed = Counter("icae_compressed_tokens", "tokens of compressed texts", **into)
        self._compressing = Counter("icae_compressing_seconds", "spent compressing", **into)

    def watch(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Adds a gauge, whose value is asked for when it is read."""
        Gauge(name, text, registry=self._registry).set_function(value)

    def request(self, route: str, status: int, seconds: float) -> None:
        """Counts a response."""
        self._requests.labels(route, status).inc()
        self._seconds.labels(route).observe(seconds)

    def first_token(self, seconds: float) -> None:
        """Counts a prompt's wait."""
        self._first.observe(seconds)

    def tokens(self, usage: dict[str, int]) -> None:
        """Counts the tokens of a response's usage."""
        for kind in TOKENS:
            self._tokens.labels(kind).inc(usage[f"{kind}_tokens"])

    def compressed(self, tokens: int, seconds: float) -> None:
        """Counts texts that were compressed."""
        self._compressed.inc(tokens)
        self._compressing.inc(seconds)

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
