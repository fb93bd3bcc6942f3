"""`diffquant plan`: everything `generate` would decide, before a weight is read."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import click

from diffquant import forecast, loading, ranks
from diffquant.cli import _layers, _options, _talk
from diffquant.cli._arguments import ModelCommand, Prepared
from diffquant.kernels import Choice
from diffquant.plan import Plan
from diffquant.preset import for_model
from diffquant.residence import BUDGET, MODES, Mode, Residence, bytes_of

ONLY_HERE = ("--json",)
MEMORY = "--memory"
HEADINGS = ("layer", "weight", "kernel", "why")


def _bytes(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    return None if value is None else bytes_of(MEMORY, value)


@click.command(cls=ModelCommand, short_help="Say what generate would do, without doing it.")
@_options.options(_options.MODEL, _options.SAVE, _options.RUN, _options.PICTURE)
@click.option("--output-path", metavar="DIR", help="As for generate.")
@click.option("--output-file-name", metavar="NAME", help="As for generate.")
@click.option(MEMORY, metavar="SIZE", callback=_bytes, help="Of the device: 24GiB. [its own]")
@_options.options(_options.SETTINGS)
@_options.JSON
@click.pass_obj
def COMMAND(prepared: Prepared, /, as_json: bool, memory: int | None, **values: Any) -> None:
    """Say what `generate` with the same options would do: the rules that fired, the kernel of every
    layer and why better ones refused, and the memory it would take.

    --device also takes what is not here: 'RTX 4090', h100, mi300x, or an architecture: sm89, gfx942.
    --memory says how much such a device has, and the table says which --offload fits into it.
    """
    for text in prepared.notes:
        _talk.note(text)
    model = _options.model_flags(values, prepared)
    dry = loading.dry_run(model, _options.run_flags(values, prepared))
    reaches = loading.reaches(dry, local_files_only=model.local_files_only)
    dry = replace(dry, device=replace(dry.device, memory=memory or dry.device.memory))
    drawn = forecast.canvas(_drawn(dry, values), dry.resolution.pipeline)
    ways = {mode: _forecast(dry, drawn, mode) for mode in _modes(dry)}
    command = _command(prepared, values, dry)
    if as_json:
        found = {text: reach.to_json() for text, reach in reaches.items()}
        click.echo(json.dumps({**_json(dry, ways, command), "lora": found}, indent=2))
    else:
        for text, reach in reaches.items():
            _talk.say(f"lora {text}: {reach}")
        click.echo("\n\n".join([*_told(dry), *_memory(dry, drawn, ways), command]))


def _told(dry: loading.DryRun) -> Iterator[str]:
    rules = ((f"rule {fired.rule}", fired.sentence) for fired in dry.resolution.fired)
    together = (("processes", line) for line in ranks.told(dry.run.processes))
    yield _talk.facts([*rules, ("device", _device(dry)), *together])
    for name, plan in dry.plans.items():
        choices = {choice.path: choice for choice in dry.choices[name]}
        yield "\n".join([f"{name}: {loading.tally(plan, dry.choices[name])}", *_notes(plan)])
        rows = ((layer.path, (*_encoded(choices[layer.path]), layer.why)) for layer in plan.layers)
        yield _talk.table([HEADINGS, *_layers.grouped(rows)])
        if refusals := list(_refusals(dry.choices[name])):
            yield "\n".join(["refused:", _talk.table(refusals)])


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


def _drawn(dry: loading.DryRun, values: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the request: typed, or the preset's."""
    preset = for_model(*dry.resolution.model_names)
    typed = {name: value for name, value in values.items() if value is not None}
    return {**(preset.defaults if preset else {}), **typed}


def _modes(dry: loading.DryRun) -> tuple[Mode, ...]:
    """Ways of living that are different ones on this device."""
    each = [Residence(mode=mode) for mode in MODES]
    return tuple(wish.mode for wish in each if wish.on(dry.device) == wish)


def _forecast(dry: loading.DryRun, drawn: forecast.Canvas, mode: Mode) -> forecast.Forecast:
    return forecast.forecast(
        dry.plans,
        dry.resolution.pipeline,
        dry.device,
        choices=dry.choices,
        residence=replace(dry.residence, mode=mode),
        drawn=drawn,
        compute=forecast.WIDTHS[loading.DTYPES[dry.run.dtype]],
        budget=bytes_of(BUDGET, dry.run.memory_budget) if dry.run.memory_budget else 0,
    )


def _memory(
    dry: loading.DryRun, drawn: forecast.Canvas, ways: Mapping[Mode, forecast.Forecast]
) -> Iterator[str]:
    peaks = ways[dry.residence.mode]
    beside = f" and {BUDGET} {dry.run.memory_budget}" if dry.run.memory_budget else ""
    way = f"peaks at {drawn} with --offload {dry.residence.mode}{beside}, estimated:"
    yield "\n".join([way, _talk.table(_peaks(peaks))])
    rows = [
        (
            f"--offload {mode}",
            *_sizes(each.host_peak_bytes, each.device_peak_bytes),
            _room(dry, each),
        )
        for mode, each in ways.items()
    ]
    yield "\n".join(["the highest of them, wherever weights wait:", _talk.table(rows)])


def _peaks(peaks: forecast.Forecast) -> Iterator[tuple[str, ...]]:
    for stage in peaks.stages:
        yield stage.name, *_sizes(stage.host, stage.device)


def _sizes(host: int, device: int) -> tuple[str, ...]:
    """One column on a CPU, whose memory is the host's."""
    told = f"host {_talk.size(host)}"
    return (told, f"device {_talk.size(device)}") if device else (told,)


def _room(dry: loading.DryRun, peaks: forecast.Forecast) -> str:
    """Whether it fits, as far as anybody knows how much there is."""
    needed, there = _needed(dry, peaks)
    if there is None:
        return f"{MEMORY} 24GiB would say whether it fits"
    fits = "fits" if needed <= there else "does not fit"
    return f"{fits} into {_talk.size(there)}"


def _needed(dry: loading.DryRun, peaks: forecast.Forecast) -> tuple[int, int | None]:
    """The peak where the model computes, and the memory there."""
    if dry.device.kind == "cpu":
        return peaks.host_peak_bytes, dry.device.memory
    return peaks.device_peak_bytes, dry.device.memory


def _command(prepared: Prepared, values: Mapping[str, Any], dry: loading.DryRun) -> str:
    """The generate command of the same words, as it is typed on the machine that was meant."""
    given = _without(prepared.words, MEMORY)
    given = given if dry.device.present else _without(given, "--device")
    words = [word for word in given if word not in ONLY_HERE]
    prompt = () if values["prompt"] else ("--prompt", "red apple")
    processes = dry.run.processes
    start = (*ranks.launcher(processes), "-m") if processes > 1 else ()
    told = ("diffquant", "generate", *prompt, *words, *prepared.component_words)
    return shlex.join([*start, *told])


def _without(words: Sequence[str], option: str) -> list[str]:
    """The words without the option and its value."""
    kept = list(words)
    while option in kept:
        place = kept.index(option)
        del kept[place : place + 2]
    return kept


def _json(
    dry: loading.DryRun, ways: Mapping[Mode, forecast.Forecast], command: str
) -> dict[str, Any]:
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
            for stage in ways[dry.residence.mode].stages
        ],
        "offload": [_way_json(dry, mode, each) for mode, each in ways.items()],
        "command": command,
    }


def _way_json(dry: loading.DryRun, mode: Mode, peaks: forecast.Forecast) -> dict[str, Any]:
    needed, there = _needed(dry, peaks)
    return {
        "mode": mode,
        "host": peaks.host_peak_bytes,
        "device": peaks.device_peak_bytes,
        "fits": None if there is None else needed <= there,
    }


def _layer_json(choice: Choice) -> dict[str, Any]:
    return {
        "path": choice.path,
        "kernels": list(choice.kernels),
        "refusals": [
            {"kernel": refusal.kernel, "reason": refusal.reason} for refusal in choice.refusals
        ],
    }
