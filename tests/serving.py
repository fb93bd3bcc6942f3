"""Servers for tests: a real one on loopback, and ways to ask it."""

import base64
import io
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import uvicorn
from PIL import Image

from diffquant.preset import for_model
from diffquant.serve.app import listen, server
from diffquant.serve.engine import Engine, Origin
from diffquant.serve.service import Service
from diffquant.serve.settings import Settings

PATIENCE = 30.0


class Served:
    """A running server and ways to ask it."""

    def __init__(self, service: Service, running: uvicorn.Server, port: int) -> None:
        self.service = service
        self.running = running
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=PATIENCE)
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def draw(self, **body: Any) -> httpx.Response:
        return self.http.post("/v1/images/generations", json=body)

    def pixels(self, **body: Any) -> bytes:
        answer = self.draw(**body)
        assert answer.status_code == 200, answer.text
        return decoded(answer.json()["data"][0]["b64_json"]).tobytes()

    def job(self, name: str) -> dict[str, Any]:
        answer: dict[str, Any] = self.http.get(f"/v1/jobs/{name}").json()
        return answer


def decoded(text: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(text)))
    image.load()
    return image


def until(true: Callable[[], bool]) -> None:
    """Wait for it, at most PATIENCE seconds."""
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)


@contextmanager
def serving(
    load: Callable[[], Any],
    ready: bool = True,
    resolve: Any = None,
    flags: Any = None,
    reference: Any = None,
    **settings: Any,
) -> Iterator[Served]:
    preset = for_model("emoji_flux")
    assert preset is not None
    engine = Engine(
        Origin(load=load, defaults=preset.defaults, flags=flags or {}, reference=reference)
    )
    service = Service(
        engine, Settings(**{"drain": 10.0, **settings}), model="emoji_flux", resolve=resolve
    )
    running = server(service)
    with listen("127.0.0.1", 0) as door:
        thread = threading.Thread(target=running.run, kwargs={"sockets": [door]}, daemon=True)
        thread.start()
        served = Served(service, running, door.getsockname()[1])
        try:
            until(lambda: running.started and (not ready or service.line.opened.is_set()))
            yield served
        finally:
            running.should_exit = True
            served.http.close()
            served.openai.close()
            thread.join(PATIENCE)
        assert not thread.is_alive()


def free_port() -> int:
    """One that is free now, and the one after it."""
    while True:
        with socket.create_server(("127.0.0.1", 0)) as one:
            port: int = one.getsockname()[1]
            try:
                socket.create_server(("127.0.0.1", port + 1)).close()
            except (OSError, OverflowError):
                continue
            return port
