"""`diffquant plan`: everything `generate` would decide, before a weight is read."""

import json
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

import click

from diffquant import forecast, loading
from diffquant.cli import _layers, _options, _talk
from diffquant.cli._arguments import ModelCommand, Prepared
from diffquant.kernels import Choice
from diffquant.plan import Plan

ONLY_HERE = ("--json",)
HEADINGS = ("layer", "weight", "kernel", "why")


@click.command(cls=ModelCommand, short_help="Say what generate would do, without doing it.")
@_options.options(_options.MODEL, _options.SAVE, _options.RUN, _options.PICTURE)
@click.option("--output-path", metavar="DIR", help="As for generate.")
@click.option("--output-file-name", metavar="NAME", help="As for generate.")
@_options.options(_options.SETTINGS)
@_options.JSON
@click.pass_obj
def COMMAND(prepared: Prepared, /, as_json: bool, **values: Any) -> None:
    """Say what `generate` with the same options would do: the rules that fired, the kernel of every
    layer and why better ones refused, and the memory it would take.

    --device also takes architectures that are not here: sm89, sm90, sm120, gfx942.
    """
    for text in prepared.notes:
        _talk.note(text)
    model = _options.model_flags(values, prepared)
    dry = loading.dry_run(model, _options.run_flags(values, prepared))
    reaches = loading.reaches(dry, local_files_only=model.local_files_only)
    peaks = forecast.forecast(dry.plans, dry.resolution.pipeline, dry.device)
    command = _command(prepared, values)
    if as_json:
        found = {text: reach.to_json() for text, reach in reaches.items()}
        click.echo(json.dumps({**_json(dry, peaks, command), "lora": found}, indent=2))
    else:
        for text, reach in reaches.items():
            _talk.say(f"lora {text}: {reach}")
        click.echo("\n\n".join(_told(dry, peaks, command)))


def _told(dry: loading.DryRun, peaks: forecast.Forecast, command: str) -> Iterator[str]:
    rules = ((f"rule {fired.rule}", fired.sentence) for fired in dry.resolution.fired)
    yield _talk.facts([*rules, ("device", _device(dry))])
    for name, plan in dry.plans.items():
        choices = {choice.path: choice for choice in dry.choices[name]}
        yield "\n".join([f"{name}: {loading.tally(plan, dry.choices[name])}", *_notes(plan)])
        rows = ((layer.path, (*_encoded(choices[layer.path]), layer.why)) for layer in plan.layers)
        yield _talk.table([HEADINGS, *_layers.grouped(rows)])
        if refusals := list(_refusals(dry.choices[name])):
            yield "\n".join(["refused:", _talk.table(refusals)])
    yield "\n".join(["peaks, without activations:", _talk.table(_peaks(peaks))])
    yield command


def _device(dry: loading.DryRun) -> str:
    name, arch = dry.device.name, dry.device.arch
    return name if name == arch else f"{name} ({arch})"


def _encoded(choice: Choice) -> tuple[str, str]:
    """What multiplies, and through which kernel with which activations."""
    stored = " + ".join(dict.fromkeys(str(spec.encoding) for spec in choice.specs))
    asked = dict.fromkeys(str(spec.activation) for spec in choice.specs if spec.activation)
    return stored, f"{choice.kernel} [{' + '.join(asked)}]" if asked else choice.kernel


def _notes(plan: Plan) -> Iterator[str]:
    yield from (f"  note: {note}" for note in plan.notes)
    yield from (f"  undecided until loading: {item.topic}, {item.why}" for item in plan.open)


def _refusals(choices: tuple[Choice, ...]) -> Iterator[tuple[str, str, str]]:
    """Kernel, for how many layers, and why; every different reason once."""
    counted: dict[tuple[str, str], int] = {}
    for choice in choices:
        for refusal in choice.refusals:
            key = (refusal.kernel, refusal.reason)
            counted[key] = counted.get(key, 0) + 1
    for (kernel, reason), count in counted.items():
        yield kernel, _talk.count(count, "layer"), reason


def _peaks(peaks: forecast.Forecast) -> Iterator[tuple[str, str, str]]:
    for stage in peaks.stages:
        yield stage.name, f"host {_talk.size(stage.host)}", f"device {_talk.size(stage.device)}"


def _command(prepared: Prepared, values: Mapping[str, Any]) -> str:
    """The generate command of the same words."""
    words = [word for word in prepared.words if word not in ONLY_HERE]
    components = (
        word
        for target, named in prepared.components.items()
        for name, source in named.items()
        for word in (f"--{target.replace('_', '-')}.{name}", source)
    )
    prompt = () if values["prompt"] else ("--prompt", "red apple")
    return shlex.join(["diffquant", "generate", *prompt, *words, *components])


def _json(dry: loading.DryRun, peaks: forecast.Forecast, command: str) -> dict[str, Any]:
    return {
        "rules": [
            {"rule": fired.rule, "sentence": fired.sentence} for fired in dry.resolution.fired
        ],
        "device": {"kind": dry.device.kind, "arch": dry.device.arch, "name": dry.device.name},
        "components": {
            name: {
                "format": plan.format,
                "family": plan.family,
                "digest": plan.digest,
                "tally": loading.tally(plan, dry.choices[name]),
                "notes": list(plan.notes),
                "layers": [_layer_json(choice) for choice in dry.choices[name]],
            }
            for name, plan in dry.plans.items()
        },
        "peaks": [
            {"stage": stage.name, "host": stage.host, "device": stage.device}
            for stage in peaks.stages
        ],
        "command": command,
    }


def _layer_json(choice: Choice) -> dict[str, Any]:
    return {
        "path": choice.path,
        "kernels": list(choice.kernels),
        "refusals": [
            {"kernel": refusal.kernel, "reason": refusal.reason} for refusal in choice.refusals
        ],
    }
