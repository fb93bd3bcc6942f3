"""The routes put together, and the process around them."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from fastapi import FastAPI

from diffquant import __version__
from diffquant.serve import about, health, images, page, refusals, watching
from diffquant.serve.bodies import FIELDS
from diffquant.serve.gate import Gate
from diffquant.serve.service import Service

LOG = logging.getLogger("diffquant.serve")


def application(service: Service) -> FastAPI:
    """The ASGI app; the worker lives as long as it does."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.line.start()
        yield
        await asyncio.to_thread(service.line.close, service.settings.drain)

    # The interactive documentation is left out: it loads scripts from elsewhere.
    app = FastAPI(
        title="diffquant", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None
    )
    for room in (images, watching, about, health, page):
        app.include_router(room.router(service))
    refusals.install(app, FIELDS)
    app.add_middleware(Gate, settings=service.settings, answered=service.metrics.answered)
    return app


def server(service: Service, **ssl: str | None) -> uvicorn.Server:
    """A server that, told to stop, takes nothing new and finishes what it has.

    ssl  ssl_keyfile, ssl_certfile: as uvicorn takes them
    """
    config = uvicorn.Config(
        application(service),
        timeout_graceful_shutdown=max(int(service.settings.drain), 1),
        log_config=None,
        access_log=False,
        server_header=False,
        **ssl,  # type: ignore[arg-type]
    )
    return uvicorn.Server(config)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes any free one. Raises OSError where the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host.strip("[]"), port), family=family, backlog=256)
