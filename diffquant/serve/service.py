"""Everything a route needs, made once: settings, engine, line, shelf, metrics."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from diffquant.serve import logs
from diffquant.serve.bodies import body_name
from diffquant.serve.engine import Engine, Facts, Origin
from diffquant.serve.jobs import Job
from diffquant.serve.line import Line
from diffquant.serve.metrics import Metrics
from diffquant.serve.pictures import Shelf
from diffquant.serve.refusals import FINAL, Refused
from diffquant.serve.settings import Settings


class Service:
    """One served pipeline.

    model    the name it is served under
    resolve  fields of `resolve.ModelFlags` and `lora` that are to be others -> where that pipeline
             comes from, from headers alone; None: the model cannot be switched
    failed   called when the model cannot be loaded, or a kernel is wrong
    """

    def __init__(
        self,
        engine: Engine,
        settings: Settings,
        *,
        model: str,
        resolve: Callable[[Mapping[str, Any]], Origin] | None = None,
        failed: Callable[[Exception], None] | None = None,
    ) -> None:
        self.engine = engine
        self.settings = settings
        self.model = model
        self.resolve = resolve
        self.created = int(time.time())
        self.shelf = Shelf()
        self.metrics = Metrics()
        self.line = Line(
            engine,
            size=settings.queue_size,
            batch=settings.max_batch,
            idle=settings.idle_unload,
            ended=self._ended,
            failed=failed,
        )
        self.metrics.gauge("queue_length", "Jobs that wait.", lambda: self.line.waiting)
        self.metrics.gauge("running", "Jobs on the device.", lambda: self.line.running is not None)
        self.metrics.gauge("loaded", "Whether the model is in memory.", lambda: self.line.is_open)

    @property
    def facts(self) -> Facts:
        """What is known of the pipeline. Raises Refused, 503, before it was loaded once."""
        if self.engine.facts is None:
            raise Refused(
                503, "the model is being loaded", code="not_ready", headers={"Retry-After": "5"}
            )
        return self.engine.facts

    def info(self) -> dict[str, Any]:
        """What runs here, for /server_info."""
        facts, limits = self.facts, self.settings.limits
        return {
            "model": self.model,
            "pipeline": facts.pipeline_class.__name__,
            "truth": list(facts.report.truth_lines),
            "device": facts.report.device,
            "dtype": facts.report.dtype,
            "numerics": facts.report.numerics,
            "loaded": self.line.is_open,
            "defaults": dict(facts.defaults),
            "fields": sorted(body_name(name) for name in facts.meaningful),
            "previews": facts.previews,
            "compares": facts.compares,
            "lora": facts.lora,
            "limits": {name: getattr(limits, name) for name in limits.__slots__},
            "queue": {
                "size": self.settings.queue_size,
                "waiting": self.line.waiting,
                "running": self.line.running is not None,
            },
            "timeout": self.settings.timeout,
            "replicas": self.settings.shared_by,
        }

    def require_alone(self, what: str, instead: str) -> None:
        """Raises Refused, 501, for what only one of several replicas could answer: the next request
        may meet another one, which would deny what it never knew."""
        if self.settings.shared_by > 1:
            raise Refused(
                501,
                f"{what}, and the next request may meet another of {self.settings.shared_by} "
                f"replicas: {instead}",
                code="several_replicas",
                headers=FINAL,
            )

    def _ended(self, job: Job, waited: float, drew: float) -> None:
        self.metrics.ended(job, waited, drew)
        logs.event(
            "job ended",
            job=job.id,
            state=str(job.state),
            user=job.user,
            steps=job.step,
            waited=round(waited, 3),
            drew=round(drew, 3),
        )
