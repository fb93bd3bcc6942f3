"""The log, a line per event on stderr: for people, or as JSON for those who collect."""

import json
import logging
import time
from collections.abc import Mapping
from typing import Any

LOG = logging.getLogger("diffquant.serve")
FORMATS = ("text", "json")
#: Where a record carries the figures of an event.
FIGURES = "figures"


def event(what: str, **figures: Any) -> None:
    """Log an event and its figures."""
    LOG.info("%s", what, extra={FIGURES: figures})


def start(kind: str) -> None:
    """Send everything that is logged to stderr in this format."""
    handler = logging.StreamHandler()
    handler.setFormatter(_FORMATTERS[kind]())
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)


class _Text(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")

    def formatMessage(self, record: logging.LogRecord) -> str:
        told = " ".join(f"{name}={value}" for name, value in _figures(record).items())
        return f"{super().formatMessage(record)} {told}".rstrip()


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        told = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **_figures(record),
        }
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


def _figures(record: logging.LogRecord) -> Mapping[str, Any]:
    found: Mapping[str, Any] = getattr(record, FIGURES, {})
    return found


_FORMATTERS: Mapping[str, type[logging.Formatter]] = {"text": _Text, "json": _Json}
