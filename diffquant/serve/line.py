"""The bounded queue in front of the model, and the one thread that works it off.

Only that thread touches the model. Whatever a job does, the next one finds the thread alive.
"""

import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from diffquant.run import Result
from diffquant.serve.jobs import Job, Left, State, Stopped
from diffquant.serve.refusals import Refused

LOG = logging.getLogger("diffquant.serve")
REMEMBERED = 256  # ended jobs whose state can still be asked for
NEWER_COUNTS = 0.3  # weight of the latest job in the running mean of seconds per step


class Worked(Protocol):
    """What the line works with: see `engine.Engine`."""

    def open(self) -> None: ...
    def draw(self, job: Job) -> Result: ...
    def draw_together(self, jobs: Sequence[Job], left: Left) -> Sequence[Result]: ...
    def recover(self) -> None: ...
    def close(self) -> None: ...


class Line:
    """Jobs in the order they came.

    batch   pictures drawn at once, of jobs that go together
    ended   called with each job that has ended, and the seconds it waited and ran
    failed  called when the engine cannot be opened at the start
    """

    def __init__(
        self,
        engine: Worked,
        *,
        size: int,
        batch: int = 1,
        idle: float | None = None,
        ended: Callable[[Job, float, float], None] | None = None,
        failed: Callable[[Exception], None] | None = None,
    ) -> None:
        self.engine = engine
        self.size = size
        self.batch = batch
        self.idle = idle
        self.running: Job | None = None
        self.failure: Exception | None = None
        self.opened = threading.Event()
        self._ended = ended
        self._failed = failed
        self._waiting: deque[Job] = deque()
        self._errands: deque[tuple[Callable[[], None], Future[None]]] = deque()
        self._live: OrderedDict[str, Job] = OrderedDict()
        self._past: OrderedDict[str, dict[str, object]] = OrderedDict()
        self._changed = threading.Condition()
        self._closing = False
        self._is_open = False
        self._step_seconds = 1.0
        self._thread = threading.Thread(target=self._work, name="diffquant-worker", daemon=True)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def is_alive(self) -> bool:
        """False once nothing will ever be drawn again."""
        return self._thread.is_alive() and self.failure is None

    @property
    def is_open(self) -> bool:
        """Whether the model is in memory."""
        return self._is_open

    def start(self) -> None:
        """Begin to load, unless that has begun."""
        if self._thread.ident is None:
            self._thread.start()

    def join(self, job: Job) -> None:
        """Put the job at the end. Raises Refused: 503 while nothing is drawn, 429 when full; the
        job has ended with it then."""
        try:
            self._admit(job)
        except Refused as refused:
            job.outcome.set_exception(refused)
            raise

    def _admit(self, job: Job) -> None:
        with self._changed:
            self._require_serving()
            if len(self._waiting) >= self.size:
                raise Refused(
                    429,
                    f"{self.size} requests wait already",
                    code="queue_full",
                    headers={"Retry-After": str(self._seconds_until_room())},
                )
            if job.name is not None and self.find(job.name) is not None:
                raise Refused(
                    409, f"a request called {job.name!r} is on its way", param="X-Request-Id"
                )
            self._waiting.append(job)
            self._live[job.id] = job
            self._changed.notify_all()

    def between_jobs(self, errand: Callable[[], None]) -> "Future[None]":
        """Have something done on the worker's thread before its next job; its end is in the future.

        Raises Refused, 503, where nothing is worked off.
        """
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        with self._changed:
            self._require_serving()
            self._errands.append((errand, future))
            self._changed.notify_all()
        return future

    def find(self, name: str) -> Job | None:
        """A job that has not ended, by its id or by what its client called it."""
        jobs = list(self._live.values())
        return next((job for job in jobs if name in (job.id, job.name)), None)

    def live(self) -> list[Job]:
        return list(self._live.values())

    def past(self, name: str) -> dict[str, object] | None:
        """What became of a job that has ended."""
        return self._past.get(name)

    def stop(self, job: Job, why: str) -> None:
        """End a job: at once while it waits, at its next step when it runs."""
        job.stop(why)
        with self._changed:
            if job in self._waiting:
                self._waiting.remove(job)
                self._finish(job, State.CANCELLED, Stopped(why))

    def position(self, job: Job) -> int:
        """Jobs before this one; 0 when it runs."""
        waiting = list(self._waiting)
        return waiting.index(job) + (self.running is not None) if job in waiting else 0

    def seconds_left(self, job: Job) -> float:
        """Estimated, from the seconds that recent steps took."""
        waiting = list(self._waiting)
        before = waiting[: waiting.index(job)] if job in waiting else []
        ahead = [*before, *([self.running] if self.running not in (None, job) else [])]
        steps = sum(each.steps_left for each in ahead if each is not None) + job.steps_left
        return steps * self._pace

    def close(self, patience: float) -> None:
        """Take nothing new, give what is here `patience` seconds, then stop it and the thread."""
        until = time.monotonic() + patience
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            while self._live and self._thread.is_alive() and time.monotonic() < until:
                self._changed.wait(timeout=0.1)
        for job in self.live():
            self.stop(job, "the server shuts down")
        if self._thread.is_alive():
            self._thread.join(timeout=30)

    # ------------------------------------------------------------------------- the worker's thread

    def _work(self) -> None:
        if not self._open_first():
            return
        while (job := self._next()) is not None:
            self._run_errands()
            self.running = job
            beside = self._companions(job)
            if beside:
                self._draw_together([job, *beside])
            else:
                self._draw(job)
            self.running = None
        self._run_errands()
        self._shut()

    def _open_first(self) -> bool:
        try:
            self.engine.open()
        except Exception as error:
            LOG.exception("the model cannot be served")
            self.failure = error
            if self._failed is not None:
                self._failed(error)
            return False
        self._is_open = True
        self.opened.set()
        return True

    def _next(self) -> Job | None:
        """Wait for a job; let the model go when none comes for long. None: the line is closed."""
        while True:
            with self._changed:
                patience = self.idle if self._is_open else None
                came = self._changed.wait_for(self._has_something, patience)
                if came and (self._waiting or not self._errands):
                    return self._waiting.popleft() if self._waiting else None
            # Outside the lock, which those who join hold on the event loop.
            self._run_errands() if came else self._shut()

    def _has_something(self) -> bool:
        return bool(self._waiting or self._errands or self._closing)

    def _run_errands(self) -> None:
        while self._errands:
            errand, future = self._errands.popleft()
            try:
                errand()
            except Exception as error:
                LOG.exception("an errand failed")
                future.set_exception(error)
            else:
                self._is_open = True
                future.set_result(None)

    def _shut(self) -> None:
        if self._is_open:
            self.engine.close()
            self._is_open = False

    def _companions(self, job: Job) -> list[Job]:
        """Waiting jobs that can be drawn with it; the order of the others stays."""
        room = self.batch - len(job.request.seeds)
        beside: list[Job] = []
        with self._changed:
            for each in list(self._waiting):
                if job.goes_with(each) and len(each.request.seeds) <= room:
                    room -= len(each.request.seeds)
                    self._waiting.remove(each)
                    beside.append(each)
        return beside

    def _draw_together(self, jobs: Sequence[Job]) -> None:
        """As one batch; where that fails each alone, so that nobody pays for a neighbour."""
        started = time.monotonic()

        def left(job: Job, why: Stopped) -> None:
            self._finish(job, State.CANCELLED, why, started)

        try:
            for job in jobs:
                self._begin(job, started)
            results = self.engine.draw_together(jobs, left)
        except Stopped:
            self._recover()
        except Exception:
            LOG.exception("%d jobs failed together; each is drawn alone", len(jobs))
            self._recover()
            for job in jobs:
                if not job.outcome.done():
                    self._draw(job)
        else:
            for job, result in zip(jobs, results, strict=True):
                if not job.outcome.done():
                    self._finish(job, State.COMPLETED, result, started)
            self._learn(jobs[0], results[0])

    def _begin(self, job: Job, started: float) -> None:
        job.state = State.RUNNING
        job.began = started
        job.step = 0
        job.moved()
        if not self._is_open:
            self.engine.open()
            self._is_open = True

    def _draw(self, job: Job) -> None:
        started = time.monotonic()
        try:
            job.require_going()
            self._begin(job, started)
            result = self.engine.draw(job)
        except Stopped as stopped:
            self._recover()
            self._finish(job, State.CANCELLED, stopped, started)
        except Exception as error:
            LOG.exception("job %s failed", job.id)
            self._recover()
            self._finish(job, State.FAILED, error, started)
        else:
            self._learn(job, result)
            self._finish(job, State.COMPLETED, result, started)

    def _recover(self) -> None:
        try:
            self.engine.recover()
        except Exception:
            LOG.exception("recovering failed")

    def _finish(
        self, job: Job, state: State, end: Result | Exception, started: float | None = None
    ) -> None:
        now = time.monotonic()
        began = now if started is None else started
        job.state = state
        with self._changed:
            self._live.pop(job.id, None)
            self._past[job.id] = job.to_json()
            while len(self._past) > REMEMBERED:
                self._past.popitem(last=False)
            self._changed.notify_all()
        if self._ended is not None:
            self._ended(job, began - job.arrived, now - began)
        if isinstance(end, Exception):
            job.outcome.set_exception(end)
        else:
            job.outcome.set_result(end)
        job.moved()

    def _learn(self, job: Job, result: Result) -> None:
        latest = result.seconds / job.steps
        self._step_seconds += NEWER_COUNTS * (latest - self._step_seconds)

    def _require_serving(self) -> None:
        if self._closing:
            raise Refused(503, "the server shuts down", code="closing")
        if not self.is_alive:
            raise Refused(503, "the model cannot be served; the log says why", code="not_ready")
        if not self.opened.is_set():
            raise Refused(
                503, "the model is being loaded", code="not_ready", headers={"Retry-After": "5"}
            )

    def _seconds_until_room(self) -> int:
        steps = self.running.steps_left if self.running else 1
        return max(math.ceil(steps * self._pace), 1)

    @property
    def _pace(self) -> float:
        """Seconds per step: of the job that runs, else of recent ones."""
        running = self.running
        return (running and running.step_seconds) or self._step_seconds
