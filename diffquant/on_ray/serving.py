"""The server on Ray Serve: the same app in every replica, as many of them as there is to do.

A replica is ready when its model is loaded and its kernels are right, and is replaced when it dies. The
proxy that listens is on the head of the cluster.
"""

import asyncio
import io
import logging
import time
from collections.abc import Callable, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffquant.errors import RunError
from diffquant.on_ray.cluster import Replicas
from diffquant.on_ray.place import settle
from diffquant.serve import logs
from diffquant.serve.app import application
from diffquant.serve.engine import Engine, Origin
from diffquant.serve.line import Line
from diffquant.serve.service import Service
from diffquant.serve.settings import Settings

if TYPE_CHECKING:
    from fastapi import FastAPI

APP = "diffquant"
LOOK = 0.2  # seconds between two looks
STARTS = 2  # of one replica, before the whole is given up
SPARE = 32  # requests beside those that draw or wait: whoever asks for health
UP, DOWN = 10.0, 300.0  # seconds of more, or less, to do before there are more or fewer replicas
#: Of Ray itself: what goes wrong. What is drawn is told by each replica.
RAYS_LEVEL = "WARNING"
REQUESTS_EACH = 2.0  # one is drawn and one waits


@dataclass(frozen=True, slots=True, kw_only=True)
class Offer:
    """What every replica serves.

    origin   where the pipeline comes from, found out on the replica's machine
    resolve  as `Service` takes it
    folder   in which paths were typed; entered on machines that have it
    threads  of torch, on a CPU
    """

    origin: Callable[[], Origin]
    resolve: Callable[[Mapping[str, Any]], Origin]
    settings: Settings
    model: str
    folder: str
    threads: int
    log_format: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How many replicas, what each needs of its machine, and how many requests each should have."""

    replicas: Replicas
    needs: Mapping[str, Any]
    requests_each: float = REQUESTS_EACH

    @property
    def options(self) -> dict[str, Any]:
        """As Ray Serve's deployments take them."""
        return {
            "ray_actor_options": dict(self.needs),
            "autoscaling_config": {
                "min_replicas": self.replicas.least,
                "max_replicas": self.replicas.most,
                "target_ongoing_requests": self.requests_each,
                "upscale_delay_s": UP,
                "downscale_delay_s": DOWN,
            },
        }


class Replica:
    """One pipeline and its app, in a process of Ray's."""

    # Ray waits for it; a class of ours is never made in any other way.
    async def __init__(self, offer: Offer) -> None:  # type: ignore[misc]
        logs.start(offer.log_format)
        settle(offer.folder, offer.threads)
        self.service = Service(
            Engine(offer.origin()), offer.settings, model=offer.model, resolve=offer.resolve
        )
        self.service.line.start()
        await asyncio.to_thread(_wait_until_open, self.service.line)

    def check_health(self) -> None:
        """Asked by Ray, which replaces a replica that raises."""
        if not self.service.line.is_alive:
            raise RunError("nothing will be drawn here any more") from self.service.line.failure

    def __serve_build_asgi_app__(self) -> "FastAPI":
        return application(self.service)


def deploy(offer: Offer, scale: Scale, ssl: Mapping[str, str | None]) -> None:
    """Ask Ray to serve; `watch` tells what became of it. Raises RunError where it cannot listen."""
    from ray import serve
    from ray.exceptions import RayTaskError

    settings = offer.settings
    quiet = {"log_level": RAYS_LEVEL, "enable_access_log": False}
    logging.getLogger("ray.serve").setLevel(RAYS_LEVEL)
    door = {"host": settings.host.strip("[]"), "port": settings.port, **ssl}
    try:
        serve.start(proxy_location="HeadOnly", http_options=door, logging_config=quiet)
    except RayTaskError as error:
        raise RunError(f"Ray Serve does not start: {error.cause}", hint="--port 30001") from error
    deployment = serve.deployment(
        name=APP,
        max_ongoing_requests=settings.queue_size + settings.max_batch + SPARE,
        max_queued_requests=settings.queue_size,
        graceful_shutdown_timeout_s=settings.drain,
        graceful_shutdown_wait_loop_s=LOOK,
        max_constructor_retry_count=STARTS,
        **scale.options,
    )(serve.ingress()(Replica))
    serve.run_many(
        [serve.RunTarget(deployment.bind(offer), name=APP, logging_config=quiet)],
        wait_for_ingress_deployment_creation=False,
        wait_for_applications_running=False,
    )


def watch(stopped: Callable[[], bool], *, ready: Callable[[], None]) -> None:
    """Returns when `stopped` says so, after `ready` was called once.

    Raises RunError where no replica gets ready.
    """
    from ray import serve

    is_ready = False
    while not stopped():
        app = serve.status().applications.get(APP)
        status = "" if app is None else str(app.status.value)
        if status == "DEPLOY_FAILED":
            raise RunError(_failure(app), hint="leave --engine ray out to see all of it")
        if status == "RUNNING" and not is_ready:
            is_ready = True
            ready()
        time.sleep(LOOK)


def end(patience: float) -> None:
    """Take nothing new, and let each replica finish what it has for `patience` seconds. A server of
    somebody else in the same cluster stays."""
    from ray import serve

    serve.delete(APP, _blocking=False)
    until = time.monotonic() + patience + SPARE
    while APP in serve.status().applications and time.monotonic() < until:
        time.sleep(LOOK)
    if not serve.status().applications:
        # Ray tells the end of its own controller as a failure.
        with redirect_stdout(io.StringIO()):
            serve.shutdown()


def _wait_until_open(line: Line) -> None:
    while not line.opened.wait(LOOK):
        if line.failure is not None:
            raise line.failure


def _failure(app: Any) -> str:
    """Why, in the words of our own error where there is one in Ray's text."""
    told = [app.message, *(each.message for each in app.deployments.values())]
    text: str = max(told, key=len).strip()
    ours = text.rpartition("diffquant.errors.")[2].partition(": ")[2]
    return (ours or text.splitlines()[-1]).strip()
