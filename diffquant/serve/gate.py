"""The door: who may come in and how much may be carried in, before anything is parsed.

A page of another site can make a browser knock on 127.0.0.1. So a loopback server without a key
answers only to loopback names (a rebound DNS name is another name), and no page but our own may
post.
"""

import hmac
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from diffquant.serve.refusals import Refused
from diffquant.serve.settings import Settings, is_loopback

#: Seen without a key: the page, which holds nothing, and what a load balancer asks.
OPEN = frozenset({"/", "/health", "/ready"})
#: Pictures by an unguessable name: an <img> sends no key.
OPEN_PICTURES = ("/v1/images/", "/content")
#: Paths that take files.
UPLOADS = frozenset({"/v1/images/edits", "/v1/videos", "/v1/videos/sync"})
READING = frozenset({"GET", "HEAD"})


class Gate:
    """ASGI middleware around the whole app; `answered` is called with every status."""

    def __init__(self, app: ASGIApp, settings: Settings, answered: Callable[[int], None]) -> None:
        self.app = app
        self.settings = settings
        self.answered = answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.answered(message["status"])
            await send(message)

        try:
            self._check(scope)
        except Refused as refused:
            await refused.answer(scope, receive, counted)
            return
        await self.app(scope, self._measured(scope, receive), counted)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        self._check_host(headers)
        if scope["method"] not in READING:
            _check_origin(headers)
        if not _is_open(scope):
            self._check_key(headers)
        if int(_digits(headers.get("content-length", "0"))) > self._most(scope):
            raise self._too_large(scope)

    def _check_host(self, headers: Headers) -> None:
        # With a key a rebound name gains nothing, and a proxy in front may pass its own name on.
        if not self.settings.is_loopback or self.settings.api_key or self.settings.insecure:
            return
        host = _host(headers)
        if not is_loopback(host):
            raise Refused(403, f"this server is reached as 127.0.0.1, not {host!r}")

    def _check_key(self, headers: Headers) -> None:
        if self.settings.api_key is None:
            return
        word, _, given = headers.get("authorization", "").partition(" ")
        right = hmac.compare_digest(given.strip().encode(), self.settings.api_key.encode())
        if word.lower() != "bearer" or not right:
            raise Refused(
                401,
                "no API key, or a wrong one: send Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _most(self, scope: Scope) -> int:
        limits = self.settings.limits
        return limits.upload if scope["path"] in UPLOADS else limits.body

    def _too_large(self, scope: Scope) -> Refused:
        return Refused(413, f"the body is larger than {self._most(scope)} bytes", code="too_large")

    def _measured(self, scope: Scope, receive: Receive) -> Receive:
        """`receive` that stops a body whose length was not told, or was told wrong."""
        most, taken = self._most(scope), 0

        async def measured() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > most:
                raise HTTPException(413, self._too_large(scope).message)
            return message

        return measured


def _host(headers: Headers) -> str:
    try:
        return urlsplit(f"//{headers.get('host', '')}").hostname or ""
    except ValueError:
        return ""


def _is_open(scope: Scope) -> bool:
    path, (start, end) = scope["path"], OPEN_PICTURES
    shown = path in OPEN or (path.startswith(start) and path.endswith(end))
    return scope["method"] in READING and shown


def _check_origin(headers: Headers) -> None:
    origin = headers.get("origin")
    if origin is not None and origin.partition("://")[2] != headers.get("host"):
        raise Refused(403, f"pages of {origin} may not ask this server")


def _digits(text: str) -> str:
    return text if text.isascii() and text.isdigit() else "0"
