"""Real Ray: two nodes of which one is killed mid-run, and a server whose replicas die and drain."""

import base64
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from PIL import Image

from tests.serving import free_port

pytest.importorskip("ray")
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings("ignore")]  # Ray warns of itself

STEPS = 12
SEEDS = range(1, 13)
PATIENCE = 300.0


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads that every process has alike, and no process of Ray's afterwards."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    yield
    end = time.monotonic() + 20
    while (left := rays_processes()) and time.monotonic() < end:
        time.sleep(0.2)
    for process in left:
        process.kill()
    assert [process.name() for process in left] == []


def rays_processes() -> list[psutil.Process]:
    """Those that descend from this one, or run in its empty home."""
    found = []
    for process in psutil.process_iter(["name"]):
        name = process.info["name"] or ""
        if name in ("raylet", "gcs_server") or name.startswith("ray::"):
            try:
                if process.environ().get("HOME") == os.environ["HOME"]:
                    found.append(process)
            except psutil.Error:
                continue
    return found


def words(tmp_path: Path, out: str, *more: str) -> list[str]:
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "red apple", "seed": seed} for seed in SEEDS]
    file.write_text("\n".join([*map(json.dumps, lines), "no json"]), "utf-8")
    command = [sys.executable, "-m", "diffquant", "generate", "--input-file", str(file)]
    settings = ["--num-inference-steps", str(STEPS), "--device", "cpu", "--json"]
    return [*command, "--output-path", str(tmp_path / out), *settings, *more]


def pixels(folder: Path) -> dict[str, bytes]:
    """Every file of the folder, decoded."""
    return {path.name: Image.open(path).convert("RGB").tobytes() for path in folder.iterdir()}


def test_a_node_killed_mid_run_loses_no_picture_and_doubles_none(tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        other = cluster.add_node(num_cpus=1)
        asked = words(tmp_path, "ray", "--engine", "ray", "--ray-address", cluster.address)
        with subprocess.Popen(
            asked, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        ) as run:
            told: list[dict[str, Any]] = []
            assert run.stdout is not None and run.stderr is not None
            for line in run.stdout:
                told.append(json.loads(line))
                if sum(outcome["state"] == "drawn" for outcome in told) == 3:
                    cluster.remove_node(other, allow_graceful=False)
            spoken = run.stderr.read()
            assert run.wait(PATIENCE) == 1  # the line that is no JSON
    finally:
        cluster.shutdown()
    assert "2 nodes" in spoken and "lost over line" in spoken
    assert sorted(outcome["line"] for outcome in told) == list(range(1, len(SEEDS) + 2))
    states = [outcome["state"] for outcome in told]
    assert (states.count("drawn"), states.count("failed")) == (len(SEEDS), 1)
    subprocess.run(words(tmp_path, "here"), check=False, capture_output=True)
    drawn, alone = pixels(tmp_path / "ray"), pixels(tmp_path / "here")
    assert len(drawn) == len(SEEDS)
    assert drawn == alone
    assert len(set(drawn.values())) == len(SEEDS), "seeds make no difference, nothing was compared"


def draw(url: str, seed: int, steps: int = STEPS, side: int = 64) -> Any:
    body = {"prompt": "red apple", "seed": seed, "num_inference_steps": steps}
    sized = {**body, "size": f"{side}x{side}"}
    return httpx.post(f"{url}/v1/images/generations", json=sized, timeout=PATIENCE)


def drawn_by(url: str, seeds: Sequence[int]) -> dict[int, bytes]:
    with ThreadPoolExecutor(4) as clients:
        answers = dict(zip(seeds, clients.map(lambda seed: draw(url, seed), seeds), strict=True))
    assert {answer.status_code for answer in answers.values()} == {200}
    return {
        seed: Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))
        .convert("RGB")
        .tobytes()
        for seed, answer in answers.items()
    }


def test_two_replicas_draw_what_one_process_draws_survive_a_death_and_drain(
    tmp_path: Path,
) -> None:
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "diffquant", "serve", "--engine", "ray", "--replicas", "2"]
    asked = [*command, "--port", str(port), "--device", "cpu"]
    with subprocess.Popen(asked, stderr=subprocess.PIPE, text=True) as server:
        watchdog = threading.Timer(PATIENCE, server.kill)
        watchdog.start()
        try:
            assert server.stderr is not None
            told = iter(server.stderr.readline, "")
            assert any(line.startswith("serving emoji_flux at") for line in told)
            threading.Thread(target=lambda: list(told), daemon=True).start()
            assert httpx.get(f"{url}/ready").json()["status"] == "ready"
            served = drawn_by(url, SEEDS)
            replicas = [each for each in rays_processes() if "ServeReplica" in each.name()]
            assert len(replicas) == 2
            replicas[0].kill()
            assert drawn_by(url, SEEDS) == served
            with ThreadPoolExecutor(1) as client:
                last = client.submit(draw, url, 1, steps=100, side=128)
                time.sleep(1.5)
                server.send_signal(signal.SIGTERM)
                assert last.result().status_code == 200
            assert server.wait(60) == 0
        finally:
            watchdog.cancel()
            server.kill()
    subprocess.run(words(tmp_path, "here"), check=False, capture_output=True)
    assert sorted(served.values()) == sorted(pixels(tmp_path / "here").values())
