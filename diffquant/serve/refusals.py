"""Every way a request ends without its picture, in the body OpenAI's clients expect.

{"error": {"message": …, "type": …, "param": …, "code": …}}
"""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from diffquant.errors import DiffquantError, NonFiniteError, UsageError

#: openai's clients repeat a request that failed with 408, 409, 429 or 5xx, unless told not to.
FINAL = {"x-should-retry": "false"}
#: What is wrong with a body as a whole, by the kind of pydantic's complaint.
WHOLE = {
    "missing": "there is no body: send a JSON object",
    "model_attributes_type": "the body is no JSON object, or not sent as application/json",
}
FLAG = re.compile(r"--([a-z][a-z-]*)")


class Refused(Exception):
    """An answer other than success: HTTP status and OpenAI's four fields."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, _type(self.status)),
                "param": self.param,
                "code": self.code,
            }
        }

    @property
    def answer(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, headers=self.headers)


_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


def _type(status: int) -> str:
    return "server_error" if status >= 500 else "invalid_request_error"


def of_failure(error: BaseException) -> Refused:
    """What a job's failure means to the one who asked."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, UsageError):
        told = _without_flags(_in_one_line(error))
        return Refused(400, told, param=_first_flag(error), code="invalid_value")
    if isinstance(error, NonFiniteError):
        # Its hint speaks of flags, which are the server's to type.
        return Refused(500, error.what, code="non_finite", headers=FINAL)
    if isinstance(error, DiffquantError):
        return Refused(500, _in_one_line(error), code="run_failed", headers=FINAL)
    if _is_out_of_memory(error):
        return Refused(
            500,
            "the device ran out of memory: ask for fewer or smaller pictures",
            code="out_of_memory",
            headers=FINAL,
        )
    # Anything else is a defect of ours; its text may hold paths, so only the log has it.
    return Refused(500, f"{type(error).__name__} while drawing; the log has it", headers=FINAL)


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"


def _in_one_line(error: DiffquantError) -> str:
    return f"{error.what} (hint: {error.hint})" if error.hint else error.what


def _without_flags(text: str) -> str:
    """A refusal in the words of a body: `--true-cfg-scale` is the field true_cfg_scale there."""
    return FLAG.sub(lambda found: _field(found[1]), text)


def _first_flag(error: DiffquantError) -> str | None:
    """The field at fault: the first that is named."""
    found = FLAG.search(error.what)
    return found and _field(found[1])


def _field(flag: str) -> str:
    return flag.replace("-", "_")


def of_validation(errors: Sequence[Any], known: Sequence[str]) -> Refused:
    """The first thing wrong with a body, naming the field."""
    first = errors[0]
    path = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    param = ".".join(path) or None
    if first["type"] == "extra_forbidden" and param is not None:
        near = _near(param, known)
        advice = f"; did you mean {near!r}?" if near else ""
        return Refused(
            400,
            f"unknown field {param!r} would be ignored{advice}",
            param=param,
            code="unknown_parameter",
        )
    if first["type"] == "json_invalid":
        return Refused(400, f"no JSON: {_reason(first)}", code="invalid_json")
    if param is None and first["type"] in WHOLE:
        return Refused(400, WHOLE[first["type"]], code="invalid_value")
    message = str(first["msg"]).removeprefix("Value error, ")
    told = message[:1].lower() + message[1:]
    return Refused(400, f"{param}: {told}" if param else told, param=param, code="invalid_value")


def _near(name: str, known: Sequence[str]) -> str | None:
    """A field spelled nearly so, or one that has these words among others: steps, cfg_scale."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    longer = [each for each in known if f"_{name}_" in f"_{each}_"]
    return next(iter([*close, *longer]), None)


def _reason(error: Any) -> str:
    """What the parser says, and where."""
    return f"{_lowered(str(error['ctx']['error']))} at character {error['loc'][-1]}"


def install(app: FastAPI, known: Sequence[str]) -> None:
    """Answer every refusal of the app in OpenAI's body."""

    async def refused(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Refused)
        return error.answer

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        return of_validation(error.errors(), known).answer

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        headers = error.headers or {}
        # "Not Found" is a title, what we raise ourselves a sentence.
        told = error.detail.lower() if error.detail.istitle() else error.detail
        return Refused(error.status_code, told, headers=headers).answer

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)


def _lowered(text: str) -> str:
    return text[:1].lower() + text[1:]
