"""`diffquant formats`: what can be read, how numbers may be stored, and what multiplies them."""

import json
from collections.abc import Iterable, Iterator
from importlib import import_module
from itertools import groupby
from operator import itemgetter
from typing import Any

import click

from diffquant.cli import _options, _talk
from diffquant.device import CAPABILITIES
from diffquant.encodings import ENCODINGS
from diffquant.families import FAMILIES
from diffquant.formats import FORMATS, Format
from diffquant.headers import CONTAINERS
from diffquant.kernels import KERNELS, WEIGHT_ONLY, Kernel, Needs
from diffquant.plugins import Registry

REGISTRIES: dict[str, Registry[Any]] = {
    "formats": FORMATS,
    "encodings": ENCODINGS,
    "families": FAMILIES,
    "kernels": KERNELS,
    "containers": CONTAINERS,
}

#: Behind the name of a kernel that ran in emulation only.
UNTRIED = "°"


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
    """What is read, and what multiplies it, as two Markdown tables from the registries alone."""
    formats = [
        (name, ", ".join(format.encodings), _families(format), format.proof)
        for name, format in FORMATS.load_all().items()
    ]
    read = _table(("format", "encodings", "families", "proved by"), formats)
    run = _table(("encoding", "native kernel on", "weight-only kernel on"), _run())
    return f"{read}\n\n{run}\n\n{UNTRIED} *not run on hardware*"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    ruled = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in ruled)


def _run() -> Iterator[tuple[str, ...]]:
    """One row for all encodings that the same kernels run."""
    alike: dict[tuple[str, str], list[str]] = {}
    for encoding in ENCODINGS.names():
        alike.setdefault((_native(encoding), _portable(encoding)), []).append(encoding)
    for kernels, encodings in alike.items():
        yield ", ".join(encodings), *kernels


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
        f"{name} ({_hardware(kernel)}){UNTRIED if kernel.untried else ''}"
        for name, kernel in KERNELS.load_all().items()
        if encoding in kernel.needs.encodings
        and (WEIGHT_ONLY not in kernel.needs.activations) == native
    )


def _hardware(kernel: Kernel) -> str:
    devices = ", ".join(sorted(kernel.needs.devices)) or "any"
    return " ".join([devices, *_generations(kernel.needs)])


def _generations(needs: Needs) -> Iterator[str]:
    """Unbroken runs of the compute capabilities there are: sm89, sm80-sm90, sm100+."""
    if needs.sm is None:
        return
    without = range(*(needs.without_sm or (0, 0)))
    fits = [each in range(*needs.sm) and each not in without for each in CAPABILITIES]
    for suits, run in groupby(zip(fits, CAPABILITIES, strict=True), key=itemgetter(0)):
        if suits:
            numbers = [number for _, number in run]
            first, last = numbers[0], numbers[-1]
            until = "" if first == last else f"-sm{last}"
            yield f"sm{first}{'+' if last == CAPABILITIES[-1] else until}"


def _first_line(registry: Registry[Any], name: str) -> str:
    document = import_module(f"{registry.package}.{name}").__doc__ or ""
    return document.strip().partition("\n")[0]
