"""One request on its way from the door to its pictures."""

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from PIL import Image

from diffquant.run import Request, Result


class State(StrEnum):
    QUEUED = "queued"
    RUNNING = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class Stopped(Exception):
    """Raised between two steps of a job that is to end; says why."""


@dataclass(frozen=True, slots=True)
class Preview:
    """What the picture looks like after `step` steps."""

    step: int
    image: Image.Image


def _promised() -> "Future[Result]":
    """A future that only the worker ends: who stops waiting for it must not cancel it."""
    future: Future[Result] = Future()
    future.set_running_or_notify_cancel()
    return future


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One request and where it stands. The worker writes; anyone reads, and anyone may stop it.

    id         unguessable: knowing it is the right to see its pictures
    name       what the client calls it, in X-Request-Id
    previews   steps after which a preview is wanted
    lora       LoRAs to draw with, name -> scale; None: those of the server
    reference  whether the unquantized model draws it too, into `compared`
    deadline   by time.monotonic(), as are arrived and began
    tell       called on the worker's thread when the state, the step or the preview changes
    """

    request: Request
    deadline: float
    name: str | None = None
    user: str | None = None
    previews: frozenset[int] = frozenset()
    lora: Mapping[str, float] | None = None
    reference: bool = False
    compared: Result | None = None
    tell: Callable[["Job", Preview | None], None] | None = None
    id: str = field(default_factory=lambda: secrets.token_urlsafe(18))
    created: int = field(default_factory=lambda: int(time.time()))
    arrived: float = field(default_factory=time.monotonic)
    began: float | None = None
    state: State = State.QUEUED
    step: int = 0
    outcome: "Future[Result]" = field(default_factory=_promised)
    _why: str | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def steps(self) -> int:
        """Of all that is drawn for it."""
        return (self.request.num_inference_steps or 1) * (2 if self.reference else 1)

    @property
    def steps_left(self) -> int:
        return max(self.steps - self.step, 0)

    @property
    def step_seconds(self) -> float | None:
        """Of its own steps so far, once there are two to judge by."""
        if self.began is None or self.step < 2:
            return None
        return (time.monotonic() - self.began) / self.step

    @property
    def why_stopped(self) -> str | None:
        """Why it is to end before its pictures; None while it may go on."""
        if self._why is None and time.monotonic() > self.deadline:
            self.stop("timed out")
        return self._why

    def stop(self, why: str) -> None:
        """End it at its next step, or before its first; the first reason stays."""
        with self._lock:
            self._why = self._why or why

    def require_going(self) -> None:
        """Raise Stopped when somebody stopped it or its time is over."""
        if self.why_stopped is not None:
            raise Stopped(self.why_stopped)

    def moved(self, preview: Preview | None = None) -> None:
        if self.tell is not None:
            self.tell(self, preview)

    def goes_with(self, other: "Job") -> bool:
        """Whether both can be drawn as one batch: they differ in words and seeds alone, and nobody
        watches a picture of them come."""
        alone = any(job.previews or job.reference for job in (self, other))
        return self._kind == other._kind and not alone

    @property
    def _kind(self) -> tuple[Any, ...]:
        said = self.request.negative_prompt is not None
        alike = replace(
            self.request, prompt=None, seed=None, negative_prompt=None, num_images_per_prompt=None
        )
        alone = self.id if self.request.image else None
        return alike, said, self.lora, alone

    def to_json(self) -> dict[str, Any]:
        """Without its prompt: a list of jobs is read by others than who asked."""
        return {
            "id": self.id,
            "object": "job",
            "request_id": self.name,
            "state": str(self.state),
            "created": self.created,
            "step": self.step,
            "steps": self.steps,
        }


#: Called with a job of a batch that is stopped, and why.
Left = Callable[[Job, Stopped], None]
