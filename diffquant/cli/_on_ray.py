"""`--engine ray`: the options of commands that can use more machines than one, and how they do."""

import os
from collections.abc import Callable, Generator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from diffquant import loading
from diffquant.cli import _talk
from diffquant.errors import UsageError
from diffquant.on_ray import cluster
from diffquant.on_ray.cluster import Replicas

if TYPE_CHECKING:
    from pathlib import Path

    from diffquant.batch import Line, Outcome
    from diffquant.serve.engine import Origin
    from diffquant.serve.settings import Settings


def _replicas(ctx: click.Context, param: click.Parameter, value: str | None) -> Replicas | None:
    return None if value is None else Replicas.parsed(value)


LOCAL, RAY = "local", "ray"
OPTIONS = (
    click.option(
        "--engine",
        type=click.Choice([LOCAL, RAY]),
        default=LOCAL,
        show_default=True,
        help="This machine, or a Ray cluster.",
    ),
    click.option(
        "--ray-address",
        metavar="HOST:PORT",
        help="Of a cluster that runs. [one that Ray finds, else one of its own here]",
    ),
    click.option(
        "--replicas",
        metavar="COUNT or LEAST:MOST",
        callback=_replicas,
        help="Pipelines in the cluster. [one a GPU, or a machine; a server: 1]",
    ),
)
SERVING = (
    click.option(
        "--target-ongoing-requests",
        type=click.FloatRange(min=0, min_open=True),
        metavar="COUNT",
        help="For --replicas LEAST:MOST: requests per replica above which there will be one more. [2]",
    ),
)
#: What only says something about a cluster.
_OF_RAY = ("ray_address", "replicas", "target_ongoing_requests")


def is_asked(values: Mapping[str, Any], surplus: Mapping[str, Any]) -> bool:
    """Whether the command is to use Ray. Raises UsageError for options that would be ignored.

    surplus  option -> its value, of those that mean nothing with Ray
    """
    if values["engine"] == LOCAL:
        typed = [name for name in _OF_RAY if values.get(name) is not None]
        if typed:
            flag = f"--{typed[0].replace('_', '-')}"
            raise UsageError(f"{flag} speaks of a Ray cluster", hint=f"--engine ray {flag} …")
        return False
    cluster.require_installed()
    for flag, value in surplus.items():
        if value:
            raise UsageError(f"{flag} means nothing with --engine ray", hint=f"leave {flag} out")
    return True


def is_asked_for_lines(values: Mapping[str, Any], input_file: str | None) -> bool:
    """As `is_asked`, for work that is known from the start."""
    once = {"--profile": values["profile"], "--save-quantized": values["save_quantized"]}
    if not is_asked(values, once):
        return False
    if input_file is None:
        raise UsageError(
            "--engine ray shares out lines, and this is one picture",
            hint="--input-file prompts.jsonl, or leave --engine ray out",
        )
    replicas = values["replicas"]
    if replicas is not None and replicas.least != replicas.most:
        raise UsageError(
            "--replicas LEAST:MOST is for a server: the lines of a file do not come and go",
            hint=f"--replicas {replicas.most}",
        )
    return True


def drawn(
    lines: "tuple[Line, ...]",
    folder: "Path",
    dry: loading.DryRun,
    *,
    values: Mapping[str, Any],
    commission: Mapping[str, Any],
) -> "Generator[Outcome, None, None]":
    """Every line's outcome as it comes, from wherever in the cluster.

    commission  fields of `on_ray.painter.Commission` that do not depend on the cluster
    """
    import torch

    from diffquant.on_ray import batch
    from diffquant.on_ray.crew import RayCrew
    from diffquant.on_ray.painter import Commission

    with cluster.joined(values["ray_address"]) as found:
        needs = cluster.needs(found, values["device"])
        replicas = _count(values["replicas"], found, needs)
        _talk.say(f"drawing on Ray: {found}; {_talk.count(replicas, 'pipeline')}")
        # Those that share a machine share its threads.
        threads = max(torch.get_num_threads() // -(-replicas // found.nodes), 1)
        asked = Commission(folder=os.getcwd(), threads=threads, **commission)
        yield from batch.draw(
            lines,
            RayCrew(asked, needs),
            folder,
            replicas=replicas,
            digests={name: plan.digest for name, plan in dry.plans.items()},
            tell=_talk.say,
        )


def _count(wanted: Replicas | None, found: cluster.Cluster, needs: Mapping[str, Any]) -> int:
    """As typed, else one for each GPU, else one for each machine."""
    if wanted is not None:
        return wanted.most
    return found.gpus if needs["num_gpus"] else found.nodes


def is_asked_to_serve(values: Mapping[str, Any]) -> bool:
    """As `is_asked`, for a server."""
    if not is_asked(values, {"--workers": values["workers"] > 1}):
        return False
    if values["port"] == 0:
        raise UsageError("--engine ray needs a port, 0 takes any", hint="--port 30000")
    target, replicas = values["target_ongoing_requests"], values["replicas"]
    if target is not None and (replicas is None or replicas.least == replicas.most):
        raise UsageError(
            "--target-ongoing-requests says when there are more replicas, and their number is fixed",
            hint="--replicas 1:4",
        )
    return True


def serve(
    settings: "Settings",
    *,
    values: Mapping[str, Any],
    model: str,
    address: str,
    resolve: "Callable[[Mapping[str, Any]], Origin]",
) -> None:
    """The server on Ray, until a signal, or until it turns out that no replica gets ready.

    model    the name it is served under
    address  of the server, for people
    resolve  changes of the flags -> where the pipeline comes from
    """
    import torch

    from diffquant.on_ray import serving
    from diffquant.serve.workers import stopping

    log_format = values["log_format"]
    with cluster.joined(values["ray_address"], logs=log_format) as found, stopping() as stopped:
        replicas = values["replicas"] or Replicas(least=1, most=1)
        needs = cluster.needs(found, values["device"])
        _talk.say(f"deploying on Ray: {found}; {replicas}")
        offer = serving.Offer(
            origin=partial(resolve, {}),
            resolve=resolve,
            settings=replace(settings, shared_by=replicas.most),
            model=model,
            folder=os.getcwd(),
            threads=max(torch.get_num_threads() // -(-replicas.most // found.nodes), 1),
            log_format=log_format,
        )
        each = values["target_ongoing_requests"] or serving.REQUESTS_EACH * settings.max_batch
        scale = serving.Scale(replicas=replicas, needs=needs, requests_each=each)
        serving.deploy(offer, scale, _ssl(values))
        try:
            serving.watch(stopped, ready=lambda: _talk.say(f"serving {model} at {address}"))
        finally:
            serving.end(settings.drain)
    _talk.say("stopped")


def _ssl(values: Mapping[str, Any]) -> dict[str, str]:
    return {
        name: values[name] for name in ("ssl_keyfile", "ssl_certfile") if values[name] is not None
    }
