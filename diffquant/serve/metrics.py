"""What Prometheus sees: counts, gauges and times, one registry per app."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from diffquant.serve.jobs import Job, State

SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Names begin with `diffquant_`, times are seconds."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self.registry = registry
        self.jobs = Counter("diffquant_jobs", "Jobs that ended.", ["state"], registry=registry)
        self.pictures = Counter("diffquant_pictures", "Pictures drawn.", registry=registry)
        self.steps = Counter("diffquant_steps", "Denoising steps done.", registry=registry)
        self.answers = Counter(
            "diffquant_answers", "Answers, by HTTP status.", ["status"], registry=registry
        )
        self.waited = Histogram(
            "diffquant_queue_seconds", "In the queue.", buckets=SECONDS, registry=registry
        )
        self.drew = Histogram(
            "diffquant_draw_seconds", "On the device.", buckets=SECONDS, registry=registry
        )

    def gauge(self, name: str, what: str, read: Callable[[], float]) -> None:
        """A gauge that is read when Prometheus asks."""
        Gauge(f"diffquant_{name}", what, registry=self.registry).set_function(read)

    def answered(self, status: int) -> None:
        self.answers.labels(status=str(status)).inc()

    def ended(self, job: Job, waited: float, drew: float) -> None:
        self.jobs.labels(state=str(job.state)).inc()
        self.steps.inc(job.step)
        self.waited.observe(waited)
        if job.state is State.COMPLETED:
            self.drew.observe(drew)
            self.pictures.inc(len(job.request.seeds))

    def text(self) -> bytes:
        return generate_latest(self.registry)
