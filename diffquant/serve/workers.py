"""One server per device: processes of their own, each at a port of its own, ended together.

A job lives in the process that took it, so a balancer in front has to keep a client at one port.
A worker that dies is started again; one that dies before it was ever ready ends them all, because
starting it again would end the same way.
"""

import os
import signal
import ssl
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from urllib.error import URLError
from urllib.request import urlopen

from diffquant.errors import RunError, UsageError

LOOK = 0.2  # seconds between two looks at the workers
PAUSE = 1.0  # seconds before one that died is started again
#: What a CUDA process sees of the devices of its machine.
VISIBLE = "CUDA_VISIBLE_DEVICES"

Start = Callable[["Worker"], "subprocess.Popen[bytes]"]


@dataclass(frozen=True, slots=True)
class Worker:
    """One process. `device` is the number of its CUDA device, None on other machines."""

    number: int
    port: int
    device: int | None

    @property
    def environment(self) -> dict[str, str]:
        """The caller's, with one visible device."""
        return {**os.environ, **({} if self.device is None else {VISIBLE: str(self.device)})}


def workers(count: int, port: int, cuda_devices: int) -> tuple[Worker, ...]:
    """The workers to start. Raises UsageError where there is no port or no device for each."""
    if port == 0:
        raise UsageError("--workers needs a first port, 0 takes any", hint="--port 30000")
    if port + count - 1 > 65535:
        raise UsageError(f"there are no {count} ports from {port} on", hint="--port 30000")
    if 0 < cuda_devices < count:
        raise UsageError(
            f"--workers {count} asks for one CUDA device each, and there are {cuda_devices}",
            hint=f"--workers {cuda_devices}",
        )
    return tuple(
        Worker(number, port + number, number if cuda_devices else None) for number in range(count)
    )


def supervise(
    wanted: Sequence[Worker],
    start: Start,
    *,
    is_ready: Callable[[Worker], bool],
    tell: Callable[[str], None],
) -> None:
    """Runs until a signal, which every worker gets too. Raises RunError where one never got ready."""
    with stopping() as stopped:
        running = {worker: start(worker) for worker in wanted}
        ready: set[Worker] = set()
        try:
            while not stopped():
                ready |= {worker for worker in wanted if worker not in ready and is_ready(worker)}
                for worker, process in running.items():
                    if process.poll() is not None:
                        running[worker] = _again(worker, process, worker in ready, start, tell)
                time.sleep(LOOK)
        finally:
            _end(running.values())


def answers(worker: Worker, *, scheme: str = "http", timeout: float = 1.0) -> bool:
    """Whether its /ready says so. Its certificate names another host than this one asks."""
    trusting = ssl._create_unverified_context()
    try:
        with urlopen(
            f"{scheme}://127.0.0.1:{worker.port}/ready", timeout=timeout, context=trusting
        ) as answer:
            return bool(answer.status == 200)
    except (URLError, OSError):
        return False


def _again(
    worker: Worker,
    process: "subprocess.Popen[bytes]",
    was_ready: bool,
    start: Start,
    tell: Callable[[str], None],
) -> "subprocess.Popen[bytes]":
    if not was_ready:
        raise RunError(
            f"worker {worker.number} ended with code {process.returncode} before it was ready",
            hint="leave --workers out to see why",
        )
    tell(f"worker {worker.number} died with code {process.returncode} and is started again")
    time.sleep(PAUSE)
    return start(worker)


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Whether a signal came, in place of what signals did before."""
    came: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        came.append(number)

    kept = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in kept.items():
            signal.signal(number, handler)


def _end(processes: "Iterable[subprocess.Popen[bytes]]") -> None:
    """Ask all, then wait for each: a server drains before it ends."""
    asked = list(processes)
    for process in asked:
        if process.poll() is None:
            process.terminate()
    for process in asked:
        process.wait()
