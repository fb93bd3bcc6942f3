"""What the server adds to the pipeline it serves, and how it bears two hundred requests at once."""

import base64
import contextlib
import io
import os
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
from PIL import Image

from benchmarks import Section, Settings
from benchmarks._measuring import in_turns
from benchmarks._results import table

WORDS: dict[str, Any] = {"prompt": "red apple", "num_inference_steps": 12, "seed": 42}
QUEUED = 200
QUEUES = 5  # one after the other
PATIENCE = 240.0  # seconds
LOOKS = 0.02  # seconds between two looks at /health
ARRIVAL = 0.002  # seconds between two looks whether a request has arrived
LEAST_RATE, SLOWEST_HEALTH, MOST_GROWTH = 0.95, 0.050, 64e6


def run(settings: Settings) -> str:
    """Throughput against the bare pipeline in turns; then full queues, watched."""
    from diffquant import loading, preset
    from diffquant.run import Request, fill, generate

    pipeline = loading.load(run=loading.RunFlags(device="cpu"))
    known = preset.for_model("emoji_flux")
    assert known is not None
    request = fill(Request(**WORDS), pipeline, known.defaults)
    with _server(settings.threads) as (client, process):
        tasks = {
            "bare": lambda: _png(generate(pipeline, request).images[0]),
            "served": lambda: _drawn(client),
        }
        times = in_turns(tasks, max(settings.rounds * 4, 8))
        queues, held = [], []
        for _ in range(QUEUES):
            queues.append(_queue(client))
            held.append(process.memory_info().rss)
    seconds, errors, moved = (sum(figures) for figures in list(zip(*queues, strict=True))[:3])
    health = [look for *_, looks in queues for look in looks]
    rate, slowest = times.ratio("bare", to="served").median, _percentile(health, 99)
    asked, growth = QUEUED * QUEUES, held[-1] - held[0]
    rows = [
        ("throughput at concurrency 1, of the bare pipeline's", "≥ 0.95", f"{rate:.3f}",
         rate >= LEAST_RATE),
        (f"requests that failed, of {asked}, {QUEUED} at once", "0", str(errors), errors == 0),
        ("pictures that came in another order than asked", "0", str(moved), moved == 0),
        (f"memory after {asked} requests, more than after {QUEUED}", "< 64 MB",
         f"{growth / 1e6:.1f} MB", growth < MOST_GROWTH),
        (f"`/health` meanwhile, 99th percentile of {len(health)}", "< 50 ms",
         f"{slowest * 1e3:.1f} ms", slowest < SLOWEST_HEALTH),
    ]  # fmt: skip
    told = [(*row[:3], "met" if row[3] else "**missed**") for row in rows]
    return (
        "The bundled model, 64×64, 12 steps, PNG encoding on both sides; the server is a process of "
        f"its own. A picture takes {times.median('bare'):.3f} s bare and "
        f"{times.median('served'):.3f} s served; {asked} requests of 2 steps drained in "
        f"{seconds:.1f} s.\n\n{table(('', 'target', 'measured', ''), told)}"
    )


SECTION = Section(order=80, title="Serving", run=run)


@contextlib.contextmanager
def _server(threads: int) -> Iterator[tuple[httpx.Client, psutil.Process]]:
    """`diffquant serve`, ready."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        port = door.getsockname()[1]
    words = ["--port", str(port), "--queue-size", str(QUEUED + 8), "--timeout", str(PATIENCE)]
    process = subprocess.Popen(
        [sys.executable, "-m", "diffquant", "serve", "--device", "cpu", *words],
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        stderr=subprocess.DEVNULL,
    )
    limits = httpx.Limits(max_connections=QUEUED + 16)
    with httpx.Client(
        base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE, limits=limits
    ) as client:
        try:
            _until_ready(client)
            yield client, psutil.Process(process.pid)
        finally:
            process.terminate()
            process.wait(timeout=60)


def _until_ready(client: httpx.Client) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        with contextlib.suppress(httpx.TransportError):
            if client.get("/ready").status_code == 200:
                return
        time.sleep(0.2)
    raise TimeoutError("the server was not ready within two minutes")


def _seconds(does: Callable[[], Any]) -> float:
    start = time.perf_counter()
    does()
    return time.perf_counter() - start


def _drawn(client: httpx.Client, *, name: str | None = None, **words: Any) -> bytes:
    headers = {"X-Request-Id": name} if name else {}
    answer = client.post("/v1/images/generations", json={**WORDS, **words}, headers=headers)
    answer.raise_for_status()
    return base64.b64decode(answer.json()["data"][0]["b64_json"])


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _queue(client: httpx.Client) -> tuple[float, int, int, list[float]]:
    """Seconds, failures, pictures out of order, and the seconds every look at /health took."""
    ended: list[int] = []
    failures: list[int] = []
    looks: list[float] = []
    watching = threading.Event()

    def ask(number: int) -> None:
        try:
            _drawn(client, name=f"asked-{number}", seed=number, num_inference_steps=2)
            ended.append(number)
        except httpx.HTTPError:
            failures.append(number)

    def watch() -> None:
        while not watching.is_set():
            looks.append(_seconds(lambda: client.get("/health").raise_for_status()))
            time.sleep(LOOKS)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    with ThreadPoolExecutor(QUEUED) as pool:
        for number in range(QUEUED):
            asked = pool.submit(ask, number)
            # What is asked first is to arrive first, however busy the machine.
            while not asked.done() and client.get(f"/v1/jobs/asked-{number}").status_code == 404:
                time.sleep(ARRIVAL)
    watching.set()
    watcher.join()
    moved = sum(one != other for one, other in zip(ended, sorted(ended), strict=True))
    return time.perf_counter() - start, len(failures), moved, looks


def _percentile(values: list[float], share: int) -> float:
    return statistics.quantiles(values, n=100)[share - 1]
