"""`diffquant generate`: a prompt in, a picture with its whole history out."""

import json
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click

from diffquant import loading, ranks, video
from diffquant.cli import _on_ray, _options, _talk
from diffquant.cli._arguments import ModelCommand, Prepared
from diffquant.errors import UsageError
from diffquant.preset import for_model
from diffquant.resolve import ModelFlags

if TYPE_CHECKING:
    from rich.progress import Progress

    from diffquant.batch import Line, Outcome
    from diffquant.run import Request, Result

OUTPUTS = "outputs"
#: Fields of the flags that drawing a picture again does not repeat.
NOT_AGAIN = frozenset({"pinned", "save_quantized"})


@click.command(cls=ModelCommand, short_help="Draw a picture.")
@_options.options(_options.PICTURE)
@click.option("--output-path", default=OUTPUTS, show_default=True, metavar="DIR")
@click.option("--output-file-name", metavar="NAME", help="[made of prompt and seed]")
@click.option(
    "--input-file", metavar="FILE", help="One request a line: .jsonl, or a text file of prompts."
)
@_options.options(_on_ray.OPTIONS)
@click.option("--profile", metavar="DIR", help="Write a trace of the run and a table of layers.")
@_options.options(_options.MODEL, _options.SAVE, _options.RUN, _options.SETTINGS)
@_options.JSON
@click.pass_obj
def COMMAND(
    prepared: Prepared,
    /,
    output_path: str,
    output_file_name: str | None,
    input_file: str | None,
    as_json: bool,
    **values: Any,
) -> int:
    """Draw a picture with a pipeline whose transformer is, or is not, quantized.

    \b
    diffquant generate --prompt 'red apple'
    diffquant generate --prompt 'a fox' --model-path black-forest-labs/FLUX.1-dev \\
        --transformer-path lmsys/flux1-dev-modelopt-fp8-sglang-transformer

    Every component of the pipeline can be replaced: --transformer-2-path, --vae-path,
    --text-encoder-weights-path and so on. The picture's metadata holds all that is needed to draw it
    again with --config-from-metadata.
    """
    _require_prompt(values["prompt"], input_file, output_file_name)
    on_ray = _on_ray.is_asked_for_lines(values, input_file)
    model = _options.model_flags(values, prepared)
    run = _options.run_flags(values, prepared)
    is_first = _met(run, prepared, input_file).is_first
    # Everything that can be refused without torch is refused before the seconds torch needs.
    dry = loading.dry_run(model, run)
    if not (dry.device.present or on_ray):
        raise UsageError(
            f"there is no {dry.device.name} here to draw on",
            hint=f"diffquant plan --device {dry.device.name} says what would happen there",
        )
    _tell_notes(dry, prepared)
    if input_file is not None:
        return _draw_lines(dry, model, values, Path(input_file), Path(output_path), as_json)
    result = _drawn(dry, model, values, output_file_name)
    paths = _saved(result, Path(output_path), output_file_name) if is_first else []
    _tell_size(values, result)
    _talk.say(f"drawn in {result.seconds:.1f} s{_heard(result, output_file_name)}, saved as")
    told = json.dumps(_told(result, paths), indent=2) if as_json else "\n".join(map(str, paths))
    click.echo(told)
    return 0


def _require_prompt(prompt: str | None, input_file: str | None, name: str | None) -> None:
    if input_file is not None and (prompt or name):
        surplus = "--prompt" if prompt else "--output-file-name"
        raise UsageError(
            f"{surplus} says for one picture what --input-file {input_file!r} says for each",
            hint=f"leave {surplus} out",
        )
    if not (prompt or input_file):
        raise UsageError("there is no prompt", hint="diffquant generate --prompt 'red apple'")


def _met(run: loading.RunFlags, prepared: Prepared, input_file: str | None) -> ranks.Rank:
    """Which of the processes that draw together this is; the others hold their tongue from here on."""
    ranks.require_sense(run.processes, {"--input-file": input_file is not None})
    words = ["-m", "diffquant", "generate", *prepared.words, *prepared.component_words]
    rank = ranks.here()
    ranks.require(run.processes, rank, words)
    click.get_current_context().with_resource(_talk.only(rank.is_first))
    return rank


def _draw_lines(
    dry: loading.DryRun,
    model: ModelFlags,
    values: Mapping[str, Any],
    file: Path,
    folder: Path,
    as_json: bool,
) -> int:
    """Every line of a file; 1 when a line could not be drawn."""
    _talk.quiet()
    from diffquant import batch, run

    lines = batch.read(file, run.Request(**_options.given(run.Request, values)))
    folder.mkdir(parents=True, exist_ok=True)
    counted: Counter[str] = Counter()
    draws = _drawn_here if values["engine"] == _on_ray.LOCAL else _drawn_on_ray
    with _talk.progress() as bars:
        task = bars.add_task("lines", total=len(lines))
        with closing(draws(dry, model, values, lines, folder, bars)) as outcomes:
            for outcome in outcomes:
                counted[outcome.state] += 1
                bars.update(task, advance=1)
                _tell_outcome(outcome, as_json)
    _talk.say(", ".join(f"{counted[state]} {state}" for state in get_args(batch.State)))
    return 1 if counted["failed"] else 0


def _drawn_here(
    dry: loading.DryRun,
    model: ModelFlags,
    values: Mapping[str, Any],
    lines: "tuple[Line, ...]",
    folder: Path,
    bars: "Progress",
) -> "Generator[Outcome, None, None]":
    """Outcomes of the lines, drawn with one loaded pipeline."""
    from diffquant import batch

    pipeline, report = _loaded(dry, model, bars)
    with _profiled(values["profile"], pipeline, report):
        yield from batch.draw(
            pipeline,
            lines,
            folder,
            defaults=_defaults(dry),
            flags=_flags(model, dry.run),
            report=report.to_json(),
        )


def _drawn_on_ray(
    dry: loading.DryRun,
    model: ModelFlags,
    values: Mapping[str, Any],
    lines: "tuple[Line, ...]",
    folder: Path,
    bars: "Progress",
) -> "Generator[Outcome, None, None]":
    """Outcomes of the lines, drawn by pipelines all over a cluster."""
    commission = {
        "model": model,
        "run": dry.run,
        "defaults": _defaults(dry),
        "flags": _flags(model, dry.run),
    }
    return _on_ray.drawn(lines, folder, dry, values=values, commission=commission)


def _defaults(dry: loading.DryRun) -> Mapping[str, Any]:
    preset = for_model(*dry.resolution.model_names)
    return preset.defaults if preset else {}


def _tell_outcome(outcome: "Outcome", as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(outcome.to_json()))
    elif outcome.error is not None:
        _talk.say(f"line {outcome.number} failed: {outcome.error}")
    else:
        click.echo("\n".join(map(str, outcome.paths)))
        if outcome.note is not None:
            _talk.note(f"line {outcome.number}: {outcome.note}")


def _tell_notes(dry: loading.DryRun, prepared: Prepared) -> None:
    """Foreign words, rules that deserve attention, and weights other than a record's."""
    for text in prepared.notes:
        _talk.note(text)
    for fired in dry.resolution.fired:
        if fired.loud:
            _talk.note(fired.sentence)
    recorded = prepared.record.get("report", {}).get("components", {})
    for name, plan in dry.plans.items():
        if name in recorded and recorded[name]["digest"] != plan.digest:
            _talk.note(f"{name} is not the one that drew the picture: its plan differs")
    settings = prepared.record.get("report", {}).get("settings", {})
    for name, found in dry.resolution.weightless.items():
        if name in settings and settings[name]["digest"] != found.digest:
            _talk.note(f"{name} is not the one that drew the picture: its files differ")


def _drawn(
    dry: loading.DryRun, model: ModelFlags, values: Mapping[str, Any], name: str | None
) -> "Result":
    _talk.quiet()
    with _talk.progress() as bars:
        from diffquant import run as running

        request = _request(dry, values)
        running.require_name(name, is_video=request.num_frames is not None)
        pipeline, report = _loaded(dry, model, bars)

        def on_step(done: int, total: int) -> None:
            bars.update(task, completed=done, total=total)

        task = bars.add_task("drawing", total=request.num_inference_steps)
        with _profiled(values["profile"], pipeline, report):
            result = running.generate(pipeline, request, on_step)
    return running.recorded(result, flags=_flags(model, dry.run), report=report.to_json())


def _request(dry: loading.DryRun, values: Mapping[str, Any]) -> "Request":
    """What is to be drawn, every value known; refused before the pipeline is loaded, if at all."""
    from diffquant import run
    from diffquant.attach import class_of

    asked = run.Request(**_options.given(run.Request, values))
    return run.fill(asked, class_of(dry.resolution.pipeline.root), _defaults(dry))


def _loaded(dry: loading.DryRun, model: ModelFlags, bars: "Progress") -> tuple[Any, loading.Report]:
    """The pipeline, and its truth lines on stderr."""
    task = bars.add_task("loading", total=None)
    _talk.quiet_bars()

    def on_layer(component: str, done: int, total: int) -> None:
        bars.update(task, description=f"loading {component}", completed=done, total=total)

    pipeline = loading.load(model, dry.run, on_progress=on_layer)
    report = loading.report(pipeline)
    for line in (*report.truth_lines, *map(str, report.lora)):
        _talk.say(line)
    bars.remove_task(task)
    return pipeline, report


def _profiled(
    directory: str | None, pipeline: Any, report: loading.Report
) -> AbstractContextManager[None]:
    if directory is None or not ranks.here().is_first:
        return nullcontext()
    from diffquant.profiling import profiled

    modules = {name: getattr(pipeline, name) for name in report.plans}
    return profiled(modules, Path(directory))


def _tell_size(values: Mapping[str, Any], result: "Result") -> None:
    from diffquant.run import Request, rounded

    asked = Request(width=values["width"], height=values["height"])
    if note := rounded(asked, result.request):
        _talk.note(note)


def _heard(result: "Result", name: str | None) -> str:
    """That there is sound in the file, or that the file has no place for it."""
    if not result.sounds:
        return ""
    kind, sound = video.ending(name), result.sounds[0]
    if kind in video.SOUNDING:
        return f" with sound ({sound})"
    _talk.note(
        f"what is heard ({sound}) is left out, {kind} holds no sound; "
        "--output-file-name with .mp4 keeps it"
    )
    return " without its sound"


def _flags(model: ModelFlags, run: loading.RunFlags) -> dict[str, Any]:
    """What was typed; empty fields, what a record keeps elsewhere, and what is done once are left
    out."""
    typed = {**asdict(model), **asdict(run)}
    return {name: value for name, value in typed.items() if value and name not in NOT_AGAIN}


def _saved(result: "Result", folder: Path, name: str | None) -> list[Path]:
    from diffquant.run import save

    return save(result, folder, name)


def _told(result: "Result", paths: list[Path]) -> dict[str, Any]:
    return {
        "paths": [str(path) for path in paths],
        "step_seconds": [round(seconds, 4) for seconds in result.step_seconds],
        **result.record,
    }
