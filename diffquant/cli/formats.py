"""`diffquant formats`: what can be read, how numbers may be stored, and what multiplies them."""

import json
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import click

from diffquant.cli import _options, _talk
from diffquant.encodings import ENCODINGS
from diffquant.families import FAMILIES
from diffquant.formats import FORMATS, Format
from diffquant.headers import CONTAINERS
from diffquant.kernels import KERNELS, WEIGHT_ONLY, Kernel
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
@click.option("--markdown", is_flag=True, help="The README's matrix of formats, families, devices.")
def COMMAND(as_json: bool, markdown: bool) -> None:
    """List formats, encodings, families, kernels and containers; each is one file of the package."""
    if markdown:
        click.echo(matrix())
        return
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


def matrix() -> str:
    """Format x encoding x family x device as a Markdown table, from the registries alone."""
    rows = [row for name, format in FORMATS.load_all().items() for row in _rows(name, format)]
    head = (
        "format",
        "encoding",
        "families",
        "native kernel on",
        "weight-only kernel on",
        "proved by",
    )
    ruled = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in ruled)


def _rows(name: str, format: Format) -> Iterator[tuple[str, ...]]:
    """One row for all encodings that the same kernels run."""
    alike: dict[tuple[str, str], list[str]] = {}
    for encoding in format.encodings:
        alike.setdefault((_native(encoding), _portable(encoding)), []).append(encoding)
    for kernels, encodings in alike.items():
        yield name, ", ".join(encodings), _families(format), *kernels, format.proof


def _families(format: Format) -> str:
    """Every described family whose namings a file of this format may follow."""
    if not format.namings:
        return "all"
    families = FAMILIES.load_all().items()
    followed = {*format.namings}
    return ", ".join(
        name for name, each in families if each.is_described and followed & {*each.namings}
    )


def _native(encoding: str) -> str:
    """Kernels that quantize activations themselves, with the hardware they need."""
    return _kernels(encoding, native=True) or "-"


def _portable(encoding: str) -> str:
    """Kernels that decode the weight; `reference` runs everything everywhere."""
    return ", ".join(filter(None, (_kernels(encoding, native=False), "reference (any)")))


def _kernels(encoding: str, *, native: bool) -> str:
    return ", ".join(
        f"{name} ({_hardware(kernel)})"
        for name, kernel in KERNELS.load_all().items()
        if encoding in kernel.needs.encodings
        and (WEIGHT_ONLY not in kernel.needs.activations) == native
    )


def _hardware(kernel: Kernel) -> str:
    devices = ", ".join(sorted(kernel.needs.devices)) or "any"
    where = devices if kernel.needs.sm is None else f"{devices} sm{kernel.needs.sm[0]}+"
    return f"{where}, *not run on hardware*" if kernel.untried else where


def _first_line(registry: Registry[Any], name: str) -> str:
    document = import_module(f"{registry.package}.{name}").__doc__ or ""
    return document.strip().partition("\n")[0]
