"""`diffquant explain`: what to type to run a file here, and who else can read it."""

import json
import shlex
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from diffquant import device, loading, preset, readers, sources
from diffquant.cli import _options, _talk
from diffquant.device import Device
from diffquant.errors import SourceError
from diffquant.plan import DENSE, Plan

#: Of the parameters in a config, those that say how a model was made and not what it is.
BESIDE_THE_POINT = ("quantization_config",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """Everything that is told.

    command  what runs it here, with BASE where only the person knows the base
    bases    models the family is known by; the file was made from one of them or a relative
    """

    plan: Plan
    tally: str
    device: Device
    command: str
    bases: tuple[str, ...]
    readers: tuple[readers.Reader, ...]
    problems: int

    def to_json(self) -> dict[str, Any]:
        """Stable keys."""
        return {
            "format": self.plan.format,
            "family": self.plan.family,
            "here": self.tally,
            "device": self.device.name,
            "command": self.command,
            "bases": list(self.bases),
            "readers": [asdict(reader) for reader in self.readers],
            "whole": not self.problems,
        }


@click.command(short_help="Say how to run a file here, and what else can read it.")
@click.argument("source")
@click.option("--model-path", metavar="SOURCE", help="The base, where you know it.")
@click.option(
    "--device", "device_name", metavar="NAME", help="Of another machine: rtx4090, sm89, cpu …"
)
@click.option("--local-files-only", is_flag=True, help="Never ask the hub.")
@_options.JSON
def COMMAND(
    source: str,
    model_path: str | None,
    device_name: str | None,
    local_files_only: bool,
    as_json: bool,
) -> int:
    """Say how to run SOURCE on this machine: the command, the kernels, and which other tools read
    the file, as far as that was ever looked up.

    Only headers are read. The exit code is 1 when the file is not whole.
    """
    place = device.probe() if device_name is None else device.parse(device_name)
    found = explained(source, model_path, place, local_files_only=local_files_only)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=2))
    else:
        click.echo("\n\n".join(_told(source, found)))
    return 1 if found.problems else 0


def explained(
    source: str, base: str | None, place: Device, *, local_files_only: bool = False
) -> Explained:
    """What there is to say of a source, from headers."""
    inspection = loading.inspect(source, local_files_only=local_files_only)
    plan = inspection.plan
    choices = loading.choose_all(plan, place, loading.RunFlags(), sources.COMPONENT)
    encodings = {name for layer in plan.quantized for name in layer.encodings} - {DENSE.name}
    return Explained(
        plan=plan,
        tally=loading.tally(plan, choices),
        device=place,
        command=_command(source, base, inspection.checkpoint, plan),
        bases=_bases(plan.family),
        readers=readers.readers(plan.format, encodings),
        problems=len(inspection.problems),
    )


def _command(source: str, base: str | None, found: sources.Checkpoint, plan: Plan) -> str:
    """The shortest command that draws with the file. A pipeline needs no base; a component with a
    config of its own and bare weights differ in the flag."""
    own = "_class_name" in found.config
    if _is_pipeline(source, found):
        words = ["--model-path", source]
    else:
        flag = "--transformer-path" if own else "--transformer-weights-path"
        bundled = base is None and _is_like_the_bundled(plan)
        words = [*([] if bundled else ["--model-path", base or "BASE"]), flag, source]
    return shlex.join(["diffquant", "generate", *words, "--prompt", "a red apple"])


def _is_pipeline(source: str, found: sources.Checkpoint) -> bool:
    """Whether the component was found inside what was named."""
    inside = found.root.name == sources.COMPONENT and Path(source).name != sources.COMPONENT
    return inside and not source.endswith((".safetensors", ".gguf"))


def _is_like_the_bundled(plan: Plan) -> bool:
    try:
        bundled = sources.checkpoint(sources.bundled_names()[0])
    except (IndexError, SourceError):
        return False
    return _shape(bundled.config) == _shape(plan.config)


def _shape(config: Any) -> dict[str, Any]:
    return {
        key: value
        for key, value in dict(config).items()
        if not key.startswith("_") and key not in BESIDE_THE_POINT
    }


def _bases(family: str) -> tuple[str, ...]:
    """Models that presets name for the family."""
    presets = (preset.load(name) for name in preset.names())
    return tuple(
        dict.fromkeys(model for each in presets if each.family == family for model in each.models)
    )


def _told(source: str, found: Explained) -> Iterator[str]:
    plan = found.plan
    yield _talk.facts(
        [
            ("source", source),
            ("format", f"{plan.format}, a {plan.family} transformer"),
            *(("evidence", sentence) for sentence in plan.evidence),
            (f"on {found.device.name}", found.tally),
            *(
                [("audit", f"{found.problems} problems: see diffquant inspect")]
                * bool(found.problems)
            ),
        ]
    )
    yield f"to draw with it:\n  {found.command}"
    if "BASE" in found.command.split() and found.bases:
        yield "BASE is the model it was made from, one of these or a relative:\n" + "\n".join(
            f"  {model}" for model in found.bases
        )
    rows = (
        (reader.tool, reader.version, reader.answer, _because(reader)) for reader in found.readers
    )
    yield "other tools:\n" + _talk.table(rows)


def _because(reader: readers.Reader) -> str:
    return "; ".join(filter(None, (reader.why, f"seen in {reader.source}" * bool(reader.source))))
