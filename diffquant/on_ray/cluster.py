"""The Ray cluster: joined, or started on this machine for as long as it is needed."""

import io
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from types import FrameType
from typing import Any, TextIO

from diffquant.errors import RunError, UsageError

START = "`ray start --head` starts one and prints its address"
KNOCK = 5.0  # seconds
FEWEST, MOST = 1, 1024  # replicas


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What there is to share: machines that live, and what they offer."""

    nodes: int
    cpus: int
    gpus: int

    def __str__(self) -> str:
        return f"{self.nodes} node{'s' * (self.nodes != 1)}, {self.cpus} CPUs, {self.gpus} GPUs"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicas:
    """How many pipelines: `least` always, up to `most` while there is more to do."""

    least: int
    most: int

    def __str__(self) -> str:
        span = f"{self.least}" if self.least == self.most else f"{self.least} to {self.most}"
        return f"{span} replica{'s' * (self.most != 1)}"

    @classmethod
    def parsed(cls, text: str) -> "Replicas":
        """`2`, or `1:4`. Raises UsageError for anything else."""
        first, colon, last = text.partition(":")
        try:
            least, most = int(first), int(last if colon else first)
        except ValueError:
            least, most = 0, 0
        if not FEWEST <= least <= most <= MOST:
            raise UsageError(
                f"--replicas {text!r} is neither a number nor two",
                hint="--replicas 2, or --replicas 1:4 to follow the load",
            )
        return cls(least=least, most=most)


def require_installed(package: str = "ray") -> None:
    """Raises UsageError where Ray, or the part of it that is needed, is not installed."""
    if find_spec("ray") is None or find_spec(package) is None:
        raise UsageError("--engine ray needs ray", hint="pip install 'diffquant[ray]'")


@contextmanager
def joined(address: str | None, *, logs: str | None = None) -> Iterator[Cluster]:
    """Within, this process is a driver. A cluster that was started for it ends with it.

    address  host:port, or `auto`; None: what Ray finds, else one of its own on this machine
    logs     what its processes say is shown on stderr, as `text` that names them, or bare for those who
             read it by machine; None: it is not

    Raises RunError where no cluster answers there.
    """
    # Whether Ray counts its users is for a person to decide, not for a flag of ours.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")
    os.environ.setdefault("RAY_DISABLE_WORKER_LOG_PREFIX", "0" if logs == "text" else "1")
    import ray

    _require_listening(address or os.environ.get("RAY_ADDRESS", ""))
    try:
        ray.init(
            address=address,
            include_dashboard=None if address else False,
            log_to_driver=logs is not None,
            logging_level="ERROR",
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise RunError(
            f"no Ray cluster answers at {address!r}: {str(error).splitlines()[0]}", hint=START
        ) from error
    try:
        with _ended_by_sigterm(), redirect_stdout(_Ours(sys.stdout, sys.stderr if logs else None)):
            yield look()
    finally:
        ray.shutdown()


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends this process in order, where Ray would abort it with a dump of its stack."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    kept = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, kept)


def _require_listening(address: str) -> None:
    """Raises RunError at once where nobody listens; Ray itself would try for minutes."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if not (host and port.isdecimal()):
        return
    try:
        socket.create_connection((host, int(port)), timeout=KNOCK).close()
    except (OSError, OverflowError) as error:
        raise RunError(f"no Ray cluster answers at {address!r}: {error}", hint=START) from error


class _Ours(io.TextIOBase):
    """Standard output for this thread alone: Ray's own tell there of machines that are lost."""

    def __init__(self, ours: TextIO, theirs: TextIO | None) -> None:
        self.ours = ours
        self.theirs = theirs
        self._speaker = threading.get_ident()

    def write(self, text: str) -> int:
        sink = self.ours if threading.get_ident() == self._speaker else self.theirs
        return len(text) if sink is None else sink.write(text)

    def flush(self) -> None:
        self.ours.flush()


def look() -> Cluster:
    """The cluster as it is now."""
    import ray

    offered: dict[str, float] = ray.cluster_resources()
    return Cluster(
        nodes=sum(bool(node["Alive"]) for node in ray.nodes()),
        cpus=int(offered.get("CPU", 0)),
        gpus=int(offered.get("GPU", 0)),
    )


def needs(cluster: Cluster, device: str | None) -> dict[str, Any]:
    """What a replica asks of a machine: a GPU where there is one, unless another device was typed.

    Raises UsageError for a device that the cluster does not have, or that Ray hands out itself.
    """
    kind, _, index = (device or "").partition(":")
    if kind == "cuda" and index:
        raise UsageError(
            f"--device {device}: Ray gives every replica a GPU of its own", hint="--device cuda"
        )
    if kind == "cuda" and not cluster.gpus:
        raise UsageError(f"the Ray cluster has no GPU: {cluster}", hint="--device cpu")
    on_gpu = bool(cluster.gpus) and kind in ("", "cuda")
    return {"num_cpus": 1, "num_gpus": 1 if on_gpu else 0}
