"""What was typed about serving, and the limits of one request."""

import ipaddress
from dataclasses import dataclass, field

from diffquant.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most one request may ask for; more is refused before the model is touched.

    side, pixels   of one picture
    prompt         characters
    body, upload   bytes of a JSON body and of a multipart one
    uploaded       pixels of one picture that comes in
    """

    side: int = 4096
    pixels: int = 2048 * 2048
    steps: int = 200
    frames: int = 257
    pictures: int = 10
    prompt: int = 8000
    body: int = 256 * 1024
    upload: int = 32 * 1024 * 1024
    uploaded: int = 4096 * 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How to serve.

    queue_size   jobs that may wait; one more is answered with 429
    max_batch    pictures drawn at once, of requests that differ in words and seeds alone
    timeout      seconds from a request's arrival to its picture
    idle_unload  seconds without a job after which the model is let go; None: never
    drain        seconds that running and waiting jobs get after SIGTERM
    shared_by    the most servers behind this address; a job is known to the one that took it
    """

    host: str = "127.0.0.1"
    port: int = 30000
    api_key: str | None = None
    insecure: bool = False
    queue_size: int = 32
    max_batch: int = 1
    timeout: float = 600.0
    idle_unload: float | None = None
    drain: float = 60.0
    shared_by: int = 1
    limits: Limits = field(default_factory=Limits)

    @property
    def is_loopback(self) -> bool:
        return is_loopback(self.host)

    def require_safe(self) -> None:
        """Raise UsageError for a host others can reach without a key."""
        if self.api_key is not None and len(self.api_key) < 8:
            raise UsageError("--api-key is too short to be a secret", hint="openssl rand -hex 16")
        if not (self.is_loopback or self.api_key or self.insecure):
            raise UsageError(
                f"--host {self.host} lets others in without a key",
                hint='--api-key "$(openssl rand -hex 16)", or --insecure if that is meant',
            )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server on `host`."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
