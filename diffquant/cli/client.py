"""`diffquant client`: ask a server for pictures and watch them being drawn. Needs no torch."""

import base64
import http.client
import itertools
import json
import re
import ssl
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click

from diffquant.cli import _options, _talk
from diffquant.errors import RunError, SourceError, UsageError

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

SILENCE = 60.0  # seconds without a word after which the server counts as gone
LONGEST_STEM = 60
#: What a body calls a field that has another name on the command line.
BODY_NAMES = {"num_images_per_prompt": "n"}


@click.command(short_help="Draw on a server that `diffquant serve` runs.")
@_options.options(_options.PICTURE)
@click.option("--url", default="http://127.0.0.1:30000", show_default=True, metavar="URL")
@click.option("--api-key", envvar="DIFFQUANT_API_KEY", metavar="KEY", help="Of the server.")
@click.option("--output-path", default="outputs", show_default=True, metavar="DIR")
@_options.JSON
def COMMAND(url: str, api_key: str | None, output_path: str, as_json: bool, **values: Any) -> None:
    """Ask a server for pictures, with progress; Ctrl-C stops the server's work too.

    \b
    diffquant client --prompt 'red apple' --url http://127.0.0.1:30000
    """
    if not values["prompt"]:
        raise UsageError("there is no prompt", hint="diffquant client --prompt 'red apple'")
    body = {
        BODY_NAMES.get(name, name): value for name, value in values.items() if value is not None
    }
    drawn = list(_drawn(url, api_key, body))
    paths = [_saved(event, values["prompt"], Path(output_path), n) for n, event in enumerate(drawn)]
    for line in drawn[0]["truth"]:
        _talk.say(line)
    for line in drawn[0].get("notes", ()):
        _talk.note(line)
    _talk.say(f"drawn in {drawn[0]['inference_time_s']:.1f} s, saved as")
    told = {"paths": [str(path) for path in paths], **_without_picture(drawn[0])}
    click.echo(json.dumps(told, indent=2) if as_json else "\n".join(map(str, paths)))


def _drawn(url: str, api_key: str | None, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """The events that bring pictures; the others move the bar."""
    complete = False
    with _talk.progress() as bars:
        task = bars.add_task("asking", total=None)
        for event in _events(url, api_key, {**body, "stream": True, "progress": True}):
            if "error" in event:
                raise RunError(f"the server refuses: {event['error']['message']}")
            if event["type"] == "image_generation.completed":
                complete = True
                yield event
            else:
                _move(bars, task, event)
    if not complete:
        raise RunError("the server ended the connection before the picture was done")


def _move(bars: "Progress", task: "TaskID", event: Mapping[str, Any]) -> None:
    if event.get("state") == "queued" and event["position"]:
        bars.update(task, description=f"{event['position']} before you", total=None)
    else:
        bars.update(
            task, description="drawing", completed=event.get("step", 0), total=event.get("steps")
        )


def _events(url: str, api_key: str | None, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Server-sent events of one request. Raises SourceError where nobody answers."""
    headers = {"Content-Type": "application/json"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    with closing(_connection(url)) as connection:
        path = f"{urlsplit(url).path.rstrip('/')}/v1/images/generations"
        try:
            connection.request("POST", path, json.dumps(body), headers)
            answer = connection.getresponse()
        except ssl.SSLCertVerificationError as error:
            raise SourceError(
                f"the certificate of {url} is not trusted: {error.verify_message}",
                hint="SSL_CERT_FILE=cert.pem in the environment trusts that one",
            ) from error
        except OSError as error:
            raise SourceError(
                f"nobody answers at {url}: {error}", hint="diffquant serve"
            ) from error
        if answer.status != 200:
            raise RunError(f"the server refuses: {_refusal(answer)}")
        yield from (
            json.loads(line.removeprefix(b"data: "))
            for line in _lines(answer)
            if line.startswith(b"data: ")
        )


def _lines(answer: IO[bytes] | http.client.HTTPResponse) -> Iterator[bytes]:
    try:
        yield from answer
    except (OSError, http.client.HTTPException) as error:
        raise RunError(f"the connection broke: {error or type(error).__name__}") from error


def _connection(url: str) -> http.client.HTTPConnection:
    parts = urlsplit(url)
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    if parts.scheme not in kinds or parts.hostname is None:
        raise UsageError(f"{url!r} is no address of a server", hint="--url http://127.0.0.1:30000")
    kind = kinds[parts.scheme]
    found: http.client.HTTPConnection = kind(parts.hostname, parts.port, timeout=SILENCE)
    return found


def _refusal(answer: http.client.HTTPResponse) -> str:
    text = answer.read(65536).decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{answer.status} {answer.reason}"


def _saved(event: Mapping[str, Any], prompt: str, folder: Path, index: int) -> Path:
    """Write the picture under the first free name; nothing is ever overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    words = "-".join(re.findall(r"\w+", prompt.lower()))[:LONGEST_STEM].strip("-")
    stem = f"{words or 'picture'}-{event['seeds'][index]}"
    for number in itertools.count(1):
        path = folder / f"{stem if number == 1 else f'{stem}-{number}'}.png"
        try:
            with path.open("xb") as stream:
                stream.write(base64.b64decode(event["b64_json"]))
        except FileExistsError:
            continue
        return path
    raise AssertionError("unreachable")


def _without_picture(event: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in event.items() if name not in ("b64_json", "usage", "type")
    }
