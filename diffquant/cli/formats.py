"""`diffquant formats`: what can be read, how numbers may be stored, and what multiplies them."""

import json
from importlib import import_module
from typing import Any

import click

from diffquant.cli import _options, _talk
from diffquant.encodings import ENCODINGS
from diffquant.families import FAMILIES
from diffquant.formats import FORMATS
from diffquant.headers import CONTAINERS
from diffquant.kernels import KERNELS
from diffquant.plugins import Registry

REGISTRIES: dict[str, Registry[Any]] = {
    "formats": FORMATS,
    "encodings": ENCODINGS,
    "families": FAMILIES,
    "kernels": KERNELS,
    "containers": CONTAINERS,
}


@click.command(short_help="List what can be read and what runs it.")
@_options.JSON
def COMMAND(as_json: bool) -> None:
    """List formats, encodings, families, kernels and containers; each is one file of the package."""
    listed = {
        title: {name: _first_line(registry, name) for name in registry.names()}
        for title, registry in REGISTRIES.items()
    }
    if as_json:
        click.echo(json.dumps(listed, indent=2))
        return
    click.echo(
        "\n\n".join(f"{title}\n{_talk.table(named.items())}" for title, named in listed.items())
    )


def _first_line(registry: Registry[Any], name: str) -> str:
    document = import_module(f"{registry.package}.{name}").__doc__ or ""
    return document.strip().partition("\n")[0]
