"""The routes put together, and the process around them."""

import asyncio
import errno
import os
import signal
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import uvicorn
from fastapi import FastAPI

from diffquant.errors import RunError
from diffquant.run import versions
from diffquant.serve import about, admin, edits, health, images, page, refusals, videos, watching
from diffquant.serve.bodies import FIELDS
from diffquant.serve.gate import Gate
from diffquant.serve.service import Service

#: Seconds an idle connection is kept. People look at a picture before they ask for the next one, and a
#: request that meets the closing of its connection fails.
KEPT_ALIVE = 75


def application(service: Service) -> FastAPI:
    """The ASGI app; the worker lives as long as it does."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.line.start()
        yield
        await asyncio.to_thread(service.line.close, service.settings.drain)

    # The interactive documentation is left out: it loads scripts from elsewhere.
    app = FastAPI(
        title="diffquant",
        version=versions()["diffquant"],
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    for room in (images, edits, videos, admin, watching, about, health, page):
        app.include_router(room.router(service))
    refusals.install(app, FIELDS)
    app.add_middleware(Gate, settings=service.settings, answered=service.metrics.answered)
    return app


class Server(uvicorn.Server):
    """Told to stop by a signal, it ends in order: the signal is not raised again afterwards."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = (signal.SIGINT, signal.SIGTERM)
        kept = {number: signal.signal(number, self.handle_exit) for number in numbers}
        try:
            yield
        finally:
            for number, handler in kept.items():
                signal.signal(number, handler)


def server(service: Service, **ssl: str | None) -> Server:
    """A server that, told to stop, takes nothing new and finishes what it has.

    ssl  ssl_keyfile, ssl_certfile: as uvicorn takes them
    """
    config = uvicorn.Config(
        application(service),
        timeout_keep_alive=KEPT_ALIVE,
        timeout_graceful_shutdown=max(int(service.settings.drain), 1),
        log_config=None,
        access_log=False,
        server_header=False,
        **ssl,  # type: ignore[arg-type]
    )
    return Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one. Raises RunError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host.strip("[]"), port), family=family, backlog=256)
    except OSError as error:
        raise RunError(
            f"cannot listen on {host} port {port}: {os.strerror(error.errno or 0).lower()}",
            hint=f"--port {port + 1}" if error.errno == errno.EADDRINUSE else "--host 127.0.0.1",
        ) from error
