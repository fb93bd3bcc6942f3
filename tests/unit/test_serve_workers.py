"""Servers side by side: started, started again, and ended together."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from diffquant.cli import run
from diffquant.errors import RunError, UsageError
from diffquant.serve.workers import Worker, supervise, workers

#: Ends orderly when it is told to.
WAITS = "import signal, sys, time; signal.signal(15, lambda *_: sys.exit(0)); time.sleep(60)"


class Watched:
    """Workers that do what they are told, and what became of them."""

    def __init__(self, does: Callable[[int], str]) -> None:
        self.does = does
        self.started: list[int] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.told: list[str] = []

    def start(self, worker: Worker) -> "subprocess.Popen[bytes]":
        self.started.append(worker.number)
        code = self.does(len(self.started))
        self.processes.append(subprocess.Popen([sys.executable, "-c", code]))
        return self.processes[-1]

    def run(self, count: int = 2, ready: bool = True) -> None:
        supervise(
            workers(count, 30000, 0),
            self.start,
            is_ready=lambda _: ready,
            tell=self.told.append,
        )


def later(seconds: float, does: Callable[[], Any]) -> None:
    threading.Timer(seconds, does).start()


def test_a_signal_ends_all_of_them_in_order() -> None:
    watched = Watched(lambda _: WAITS)
    later(1.5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    watched.run()
    assert watched.started == [0, 1]
    assert [process.returncode for process in watched.processes] == [0, 0]


def test_one_that_dies_is_started_again() -> None:
    watched = Watched(
        lambda start: "import time; time.sleep(0.5); exit(3)" if start == 2 else WAITS
    )
    later(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    watched.run()
    assert watched.started == [0, 1, 1]
    assert watched.told == ["worker 1 died with code 3 and is started again"]


def test_one_that_never_got_ready_ends_all() -> None:
    watched = Watched(lambda start: "exit(3)" if start == 2 else WAITS)
    with pytest.raises(RunError, match="worker 1 ended with code 3 before it was ready"):
        watched.run(ready=False)
    assert all(process.poll() is not None for process in watched.processes)


def test_each_sees_one_device_and_has_one_port() -> None:
    found = workers(2, 30000, 4)
    assert [(worker.port, worker.environment["CUDA_VISIBLE_DEVICES"]) for worker in found] == [
        (30000, "0"),
        (30001, "1"),
    ]
    assert workers(1, 30000, 0)[0].device is None


@pytest.mark.parametrize(("count", "port", "devices"), [(2, 0, 0), (2, 65535, 0), (3, 30000, 2)])
def test_what_there_are_no_ports_or_devices_for_is_refused(
    count: int, port: int, devices: int
) -> None:
    with pytest.raises(UsageError):
        workers(count, port, devices)


@pytest.mark.long
def test_two_real_servers_draw_and_end(tmp_path: Any) -> None:
    import httpx

    from tests.serving import free_port

    port = free_port()
    command = [sys.executable, "-m", "diffquant", "serve", "--workers", "2", "--port", str(port)]
    process = subprocess.Popen([*command, "--device", "cpu"], stderr=subprocess.DEVNULL)
    body = {"prompt": "red apple", "num_inference_steps": 1}
    try:
        for each in (port, port + 1):
            end = time.monotonic() + 120
            while time.monotonic() < end:
                try:
                    answer = httpx.post(
                        f"http://127.0.0.1:{each}/v1/images/generations", json=body, timeout=60
                    )
                except httpx.TransportError:
                    time.sleep(0.5)
                    continue
                if answer.status_code == 200:
                    break
                time.sleep(0.5)
            assert answer.status_code == 200
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0


def test_a_port_for_nobody_is_refused_by_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["serve", "--workers", "2", "--port", "0"]) == 2
    assert "--port 30000" in capsys.readouterr().err
