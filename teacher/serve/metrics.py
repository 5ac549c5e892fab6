"""What a server measures, in Prometheus's text format: queue, batches, tokens, latency."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """One server's, in a registry of its own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"teacher_{name}", text, labels, registry=self._registry)

        self.requests = counter("requests", "Requests answered, by endpoint and status.", "endpoint", "status")
        self.scored_tokens = counter("scored_tokens", "Tokens of the sequences that were scored.")
        self.padding_tokens = counter("padding_tokens", "Places in scored batches that held no token.")
        self.prefix_lookup_tokens = counter(
            "prefix_lookup_tokens", "Tokens of sequences whose prefix was looked for, by what for.", "work"
        )
        self.prefix_hit_tokens = counter(
            "prefix_hit_tokens", "Tokens among them that were known and not read again.", "work"
        )
        self.batches = counter("batches", "Batches scored, by kind of target and shape.", "kind", "shape")
        self.generated_tokens = counter("generated_tokens", "Tokens generated.")
        self.queue_requests = Gauge(
            "teacher_queue_requests", "Requests that wait or are being answered.", registry=self._registry
        )
        self.queue_tokens = Gauge("teacher_queue_tokens", "Tokens of these requests.", registry=self._registry)
        self.held_bytes = Gauge(
            "teacher_held_bytes", "Bytes of requests and answers that are held.", registry=self._registry
        )
        self.seconds = Histogram(
            "teacher_request_seconds",
            "From a request's last byte to its answer.",
            ("endpoint",),
            buckets=_SECONDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
