"""The page at `/`: one file, no build step, nothing loaded from anywhere."""

import base64
import hashlib
import re
from functools import cache
from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from diffquant.serve.service import Service

#: Nothing may come from anywhere but this server; only the page's own script and style run.
POLICY = (
    "default-src 'none'; img-src data: blob: 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; script-src {script}; style-src {style}"
)


@cache
def page() -> tuple[str, str]:
    """The page and its content security policy."""
    text = files("diffquant.serve").joinpath("page.html").read_text("utf-8")
    policy = POLICY.format(script=_hash(text, "script"), style=_hash(text, "style"))
    return text, policy


def _hash(text: str, tag: str) -> str:
    """The CSP word that allows the one inline element of that tag."""
    found = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    digest = hashlib.sha256(found[1].encode() if found else b"").digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def router(service: Service) -> APIRouter:
    """The page itself, the same for every service."""
    routes = APIRouter()

    @routes.get("/", include_in_schema=False)
    async def root() -> HTMLResponse:
        text, policy = page()
        headers = {"Content-Security-Policy": policy, "Referrer-Policy": "no-referrer"}
        return HTMLResponse(text, headers={**headers, "X-Content-Type-Options": "nosniff"})

    return routes
