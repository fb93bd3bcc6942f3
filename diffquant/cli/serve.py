"""`diffquant serve`: a pipeline behind HTTP, until it is told to stop."""

import os
import ssl
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, fields, replace
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import click

from diffquant import loading
from diffquant.cli import _on_ray, _options, _talk
from diffquant.cli._arguments import ModelCommand, Prepared
from diffquant.device import probe_all
from diffquant.errors import UsageError
from diffquant.preset import for_model
from diffquant.resolve import ModelFlags

if TYPE_CHECKING:
    from diffquant.serve.engine import Origin
    from diffquant.serve.settings import Settings

NEEDED = ("fastapi", "uvicorn", "prometheus_client", "multipart")
ONLY_SERVING = (
    click.option("--host", default="127.0.0.1", show_default=True, metavar="ADDRESS"),
    click.option("--port", default=30000, show_default=True, type=click.IntRange(0, 65535)),
    click.option(
        "--api-key",
        envvar="DIFFQUANT_API_KEY",
        metavar="KEY",
        help="Asked of every client; better in DIFFQUANT_API_KEY, which `ps` does not show.",
    ),
    click.option("--insecure", is_flag=True, help="Let others than this machine in without a key."),
    click.option("--served-model-name", metavar="NAME", help="What clients call it. [the source]"),
    click.option(
        "--queue-size",
        default=32,
        show_default=True,
        type=click.IntRange(min=1),
        help="Requests that may wait; the next one is told to come back.",
    ),
    click.option(
        "--max-batch",
        default=1,
        show_default=True,
        type=click.IntRange(min=1),
        metavar="PICTURES",
        help="Drawn at once, of waiting requests that differ in words and seeds alone.",
    ),
    click.option(
        "--workers",
        default=1,
        show_default=True,
        type=click.IntRange(min=1),
        metavar="COUNT",
        help="One process per CUDA device, at this port and those after it.",
    ),
    click.option(
        "--timeout",
        default=600.0,
        show_default=True,
        type=click.FloatRange(min=0.1),
        metavar="SECONDS",
        help="From a request to its picture.",
    ),
    click.option(
        "--idle-unload",
        type=click.FloatRange(min=0.1),
        metavar="SECONDS",
        help="Let the model go after so long without a request. [never]",
    ),
    click.option(
        "--drain",
        default=60.0,
        show_default=True,
        type=click.FloatRange(min=0),
        metavar="SECONDS",
        help="What requests get that are here when the server is told to stop.",
    ),
    click.option(
        "--reference",
        is_flag=True,
        help="Keep the unquantized model too, for requests and the page that compare with it.",
    ),
    click.option(
        "--log-format",
        type=click.Choice(["text", "json"]),
        default="text",
        show_default=True,
        help="One line per event, on stderr.",
    ),
    click.option("--ssl-keyfile", type=click.Path(exists=True, dir_okay=False), metavar="FILE"),
    click.option("--ssl-certfile", type=click.Path(exists=True, dir_okay=False), metavar="FILE"),
)


@click.command(cls=ModelCommand, short_help="Put a pipeline behind HTTP.")
@_options.options(
    ONLY_SERVING, _on_ray.OPTIONS, _on_ray.SERVING, _options.MODEL, _options.RUN, _options.SETTINGS
)
@click.pass_obj
def COMMAND(prepared: Prepared, /, **values: Any) -> None:
    """Serve a pipeline to openai's clients, and to a browser at `/`.

    \b
    diffquant serve
    diffquant serve --model-path black-forest-labs/FLUX.1-dev \\
        --transformer-path lmsys/flux1-dev-modelopt-fp8-sglang-transformer --port 30000

    POST /v1/images/generations draws; /health, /ready, /server_info, /v1/plan and /metrics tell.
    SIGTERM takes nothing new and finishes what is here.
    """
    _require_installed()
    on_ray = _on_ray.is_asked_to_serve(values)
    model = _options.model_flags(values, prepared)
    run = _options.run_flags(values, prepared)
    _options.require_one_process(run, "serve")
    dry = loading.dry_run(model, run)
    if not (dry.device.present or on_ray):
        raise UsageError(f"there is no {dry.device.name} here to draw on", hint="--device cpu")
    for text in (
        *prepared.notes,
        *(fired.sentence for fired in dry.resolution.fired if fired.loud),
    ):
        _talk.note(text)
    _talk.quiet()
    if on_ray:
        _serve_on_ray(model, dry, values)
    elif values["workers"] > 1:
        _supervise(prepared, values)
    else:
        _serve(model, dry, values)


def _supervise(prepared: Prepared, values: Mapping[str, Any]) -> None:
    """The same command once per worker."""
    from diffquant.serve.workers import Worker, answers, supervise, workers

    _settings(values)
    cuda = [each for each in probe_all() if each.kind == "cuda"]
    wanted = workers(values["workers"], values["port"], len(cuda))
    words = ["serve", *prepared.words, *prepared.component_words]
    scheme = "https" if values["ssl_certfile"] else "http"

    def start(worker: Worker) -> "subprocess.Popen[bytes]":
        own = [*words, "--workers", "1", "--port", str(worker.port)]
        return subprocess.Popen([sys.executable, "-m", "diffquant", *own], env=worker.environment)

    ports = ", ".join(str(worker.port) for worker in wanted)
    _talk.say(f"{len(wanted)} workers at ports {ports}")
    supervise(wanted, start, is_ready=partial(answers, scheme=scheme), tell=_talk.note)
    _talk.say("stopped")


def _serve(model: ModelFlags, dry: loading.DryRun, values: Mapping[str, Any]) -> None:
    """Until a signal, or until the model turns out not to be servable."""
    from diffquant.serve import logs
    from diffquant.serve.app import listen, server
    from diffquant.serve.engine import Engine
    from diffquant.serve.service import Service

    settings = _settings(values)
    _talk.quiet_bars()
    logs.start(values["log_format"])
    compares = bool(values["reference"])
    engine = Engine(_origin(model, dry, compares))
    failures: list[Exception] = []

    def failed(error: Exception) -> None:
        failures.append(error)
        running.should_exit = True

    service = Service(
        engine,
        settings,
        model=_name(dry, values),
        resolve=partial(_switched, model, dry.run, compares),
        failed=failed,
    )
    running = server(
        service, ssl_keyfile=values["ssl_keyfile"], ssl_certfile=values["ssl_certfile"]
    )
    with listen(settings.host, settings.port) as door:
        _talk.say(f"serving {service.model} at {_address(door.getsockname(), values)}")
        running.run(sockets=[door])
    if failures:
        raise failures[0]
    _talk.say("stopped")
    if service.line.is_alive:
        # In a step that outlasted the drain; an interpreter that ends around it would abort.
        sys.stderr.flush()
        os._exit(0)


def _serve_on_ray(model: ModelFlags, dry: loading.DryRun, values: Mapping[str, Any]) -> None:
    """The same pipeline in every replica, each finding out on its own machine what it runs there."""
    settings = _settings(values)
    _on_ray.serve(
        settings,
        values=values,
        model=_name(dry, values),
        address=_address((settings.host.strip("[]"), settings.port), values),
        resolve=partial(_switched, model, dry.run, bool(values["reference"])),
    )


def _origin(model: ModelFlags, dry: loading.DryRun, compares: bool = False) -> "Origin":
    from diffquant.serve.engine import Origin

    preset = for_model(*dry.resolution.model_names)
    return Origin(
        load=partial(loading.load, model, dry.run),
        defaults=preset.defaults if preset else {},
        flags=_flags(model, dry.run),
        reference=partial(_reference, model, dry.run) if compares else None,
    )


def _reference(model: ModelFlags, run: loading.RunFlags) -> Any:
    """The same base without any quantization, with the same LoRAs, as `diffquant compare` takes it."""
    from diffquant.compare.asking import sides

    side, _ = sides(model, run, reference={}, candidates=[])
    return loading.load(side.model, side.run)


def _switched(
    model: ModelFlags, run: loading.RunFlags, compares: bool, changes: Mapping[str, Any]
) -> "Origin":
    """The same command with other words, refused from headers where it cannot be."""
    known = {item.name for item in fields(ModelFlags)}
    other = replace(model, **{name: value for name, value in changes.items() if name in known})
    worn = replace(run, **{name: value for name, value in changes.items() if name not in known})
    return _origin(other, loading.dry_run(other, worn), compares)


def _settings(values: Mapping[str, Any]) -> "Settings":
    """Raises UsageError where they would let others in, or are half a certificate."""
    from diffquant.serve.settings import Settings

    if (values["ssl_keyfile"] is None) != (values["ssl_certfile"] is None):
        raise UsageError("--ssl-keyfile and --ssl-certfile belong together")
    if values["ssl_certfile"] is not None:
        _require_certificate(values["ssl_certfile"], values["ssl_keyfile"])
    settings = Settings(**_options.given(Settings, values))
    settings.require_safe()
    return settings


def _require_certificate(certificate: str, key: str) -> None:
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except (ssl.SSLError, OSError) as error:
        raise UsageError(
            f"{certificate!r} is no certificate, or {key!r} is not its key",
            hint="openssl req -x509 -newkey rsa:2048 -nodes -keyout key.pem -out cert.pem",
        ) from error


def _name(dry: loading.DryRun, values: Mapping[str, Any]) -> str:
    """As typed; a path's last part, because clients need not know where things lie."""
    typed = values["served_model_name"] or values["model_id"]
    return str(typed or dry.resolution.model_names[0].rstrip("/").rpartition("/")[2])


def _flags(model: ModelFlags, run: loading.RunFlags) -> dict[str, Any]:
    """For the record inside every picture: what was typed."""
    typed = {**asdict(model), **asdict(run)}
    return {name: value for name, value in typed.items() if value and name != "pinned"}


def _address(name: tuple[Any, ...], values: Mapping[str, Any]) -> str:
    host, port = name[:2]
    scheme = "https" if values["ssl_certfile"] else "http"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def _require_installed() -> None:
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise UsageError(
            f"serving needs {', '.join(missing)}", hint="pip install 'diffquant[serve]'"
        )
