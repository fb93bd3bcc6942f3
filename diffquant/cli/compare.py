"""`diffquant compare`: BF16 against quantized, with numbers, a verdict and an exit code."""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from diffquant import aliases
from diffquant.cli import _options, _talk
from diffquant.cli._arguments import ModelCommand, Prepared
from diffquant.errors import UsageError

if TYPE_CHECKING:
    from diffquant.compare import Candidate, Comparison, Question
    from diffquant.compare.means import Mean

FAILED = 1
#: Layers that are named where many could be.
SHOWN = 4
#: Defects that are told one by one.
MANY = 8


def _pairs(ctx: click.Context, param: click.Parameter, value: Sequence[str]) -> dict[str, str]:
    """`C=P` words as a mapping; hyphens of component names are underscores."""
    found = {}
    for word in value:
        name, equals, text = word.partition("=")
        if not (name and equals and text):
            raise UsageError(f"{param.opts[0]} {word!r} is not of the form NAME=VALUE")
        found[name.replace("-", "_")] = text
    return found


def _thresholds(
    ctx: click.Context, param: click.Parameter, value: Sequence[str]
) -> dict[str, float]:
    pairs = _pairs(ctx, param, value)
    try:
        return {name: float(text) for name, text in pairs.items()}
    except ValueError:
        said = ", ".join(f"{name}={text}" for name, text in pairs.items())
        raise UsageError(f"{param.opts[0]} {said}: no number", hint="--threshold psnr=28") from None


def _seeds(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in (value or "").split(",") if word.strip())
    except ValueError:
        raise UsageError(f"--seeds {value!r} is no list of numbers", hint="--seeds 0,1,2") from None


def _file(ctx: click.Context, param: click.Parameter, value: str | None) -> Path | None:
    """A file that can be written, known before minutes are spent on what is to stand in it."""
    if value is None:
        return None
    path = Path(value)
    folder = next((each for each in path.absolute().parents if each.exists()), path)
    if path.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UsageError(f"{param.opts[0]} {value!r}: no file can be written there")
    return path


PROMPTS = (
    click.option("--prompt", multiple=True, metavar="TEXT", help="What to draw; repeatable."),
    click.option("--prompts", metavar="FILE", help="A file of prompts, one a line."),
    click.option(
        "--seeds", metavar="SEEDS", callback=_seeds, help="Drawn with each prompt: 0,1,2. [42]"
    ),
)
SIDES = (
    click.option("--reference-model-path", metavar="SOURCE", help="Base of the reference."),
    click.option("--reference-transformer-path", metavar="SOURCE", help="[the base's own]"),
    click.option(
        "--reference-component-path", multiple=True, metavar="NAME=SOURCE", callback=_pairs
    ),
    click.option(
        "--candidate-transformer-path", multiple=True, metavar="SOURCE", help="One candidate each."
    ),
    click.option(
        "--candidate-quantization", multiple=True, metavar="NAME", help="One candidate each."
    ),
    click.option(
        "--candidate-component-path",
        multiple=True,
        metavar="NAME=SOURCE",
        callback=_pairs,
        help="For all candidates.",
    ),
    click.option(
        "--candidate-numerics",
        type=click.Choice(["auto", "faithful", "weight-only"]),
        help="For all candidates, as --numerics.",
    ),
    click.option("--candidate-fp4-gemm-backend", metavar="NAME", help="As the peers spell it."),
    click.option("--reference", metavar="FILE", help="Use a captured reference, draw none."),
    click.option(
        "--save-reference", metavar="FILE", callback=_file, help="Capture the reference for later."
    ),
)
ANSWERS = (
    click.option("--level", default="smoke", show_default=True, help="smoke or strict."),
    click.option(
        "--threshold",
        multiple=True,
        metavar="FIGURE=VALUE",
        callback=_thresholds,
        help="In place of the level's: psnr=28. Repeatable.",
    ),
    click.option(
        "--report", metavar="FILE", callback=_file, help="A page: pictures, plots, numbers."
    ),
    click.option(
        "--output-json", metavar="FILE", callback=_file, help="The same as --json, into a file."
    ),
    click.option(
        "--repeat",
        type=click.IntRange(min=1),
        default=1,
        show_default=True,
        metavar="ROUNDS",
        help="Measure time and memory so often, the sides in turns.",
    ),
    click.option("--profile", metavar="DIR", help="A trace and a table of layers of each side."),
    click.option("--markdown", is_flag=True, help="A table for a model card, on stdout."),
)
#: As in `generate`; only --prompt, the first, is repeatable here.
PICTURE = _options.PICTURE[1:]
#: A request's fields that every drawing of a comparison has of its own.
OF_EACH = frozenset({"prompt", "seed", "num_images_per_prompt"})


@click.command(cls=ModelCommand, short_help="Hold quantized against BF16.")
@_options.options(PROMPTS, SIDES, ANSWERS, PICTURE)
@_options.options(_options.MODEL, _options.RUN, _options.SETTINGS)
@_options.JSON
@click.pass_obj
def COMMAND(prepared: Prepared, /, **values: Any) -> int:
    """Draw the same noise with the BF16 base and with the quantized transformer, and judge.

    \b
    diffquant compare --prompt 'red apple' --report report.html
    diffquant compare --prompt 'a fox' --model-path BASE --candidate-transformer-path FP8 \\
        --candidate-transformer-path NVFP4 --level strict

    Options of `generate` describe the candidate; the reference is the same base without them.
    Exits with 1, and names the first figure that misses, when a candidate does not keep the level.
    """
    question = _question(values, prepared)
    for text in prepared.notes:
        _talk.note(text)
    comparison = _answered(question)
    _tell(comparison)
    _write(comparison, values)
    if comparison.first_failure is not None:
        _talk.say(f"{question.level} is missed: {comparison.first_failure}")
        return FAILED
    return 0


def _question(values: Mapping[str, Any], prepared: Prepared) -> "Question":
    _talk.quiet()
    from diffquant.compare import Question, requests
    from diffquant.compare.asking import sides
    from diffquant.run import Request

    _require_sense(values)
    run = _options.run_flags(values, prepared)
    _options.require_one_process(run, "compare")
    ours, candidates = sides(
        _options.model_flags(values, prepared),
        run,
        reference=_reference(values),
        candidates=_candidates(values),
    )
    typed = {name: value for name, value in values.items() if name not in OF_EACH}
    prompts, seeds, saved = _prompts(values), _all_seeds(values), _path(values["reference"])
    asked = Request(**_options.given(Request, typed))
    return Question(
        reference=ours,
        candidates=candidates,
        requests=() if saved and not prompts else requests(asked, prompts, seeds),
        settings=asked,
        seeds=seeds,
        level=values["level"],
        thresholds=values["threshold"],
        saved=saved,
        save_reference=values["save_reference"],
        profile=_path(values["profile"]),
        repeat=values["repeat"],
        command=_command(prepared),
    )


def _reference(values: Mapping[str, Any]) -> dict[str, Any]:
    """What the reference has of its own."""
    own = {
        "model_path": values["reference_model_path"],
        "transformer_path": values["reference_transformer_path"],
        "component_paths": values["reference_component_path"],
    }
    return {name: value for name, value in own.items() if value}


def _candidates(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One per --candidate-transformer-path and --candidate-quantization, else one as typed."""
    shared = {
        "component_paths": values["candidate_component_path"],
        "numerics": values["candidate_numerics"],
        "kernel": _kernel(values["candidate_fp4_gemm_backend"]),
    }
    own = {name: value for name, value in shared.items() if value}
    each = [
        *({"transformer_path": source} for source in values["candidate_transformer_path"]),
        *({"quantization": name} for name in values["candidate_quantization"]),
    ]
    return [{**own, **one} for one in each or [{}]]


def _kernel(backend: str | None) -> str | None:
    """A backend in the peers' words as one of our kernels; a note where there is none."""
    if backend is None:
        return None
    ours = aliases.translate(["--fp4-gemm-backend", backend])
    for text in ours.notes:
        _talk.note(text)
    return ours.arguments[1] if ours.arguments else None


def _prompts(values: Mapping[str, Any]) -> tuple[str, ...]:
    if values["prompts"] is None:
        return tuple(values["prompt"])
    path = Path(values["prompts"])
    if not path.is_file():
        raise UsageError(f"--prompts {values['prompts']!r}: there is no such file")
    lines = path.read_text(encoding="utf-8").splitlines()
    return (*values["prompt"], *(line.strip() for line in lines if line.strip()))


def _all_seeds(values: Mapping[str, Any]) -> tuple[int, ...]:
    """The typed seeds, one way or the other; none where none were typed."""
    from diffquant.run import DEFAULT_SEED

    first, count = values["seed"], values["num_images_per_prompt"]
    if first is None and count is None:
        seeds: tuple[int, ...] = values["seeds"]
        return seeds
    begin = DEFAULT_SEED if first is None else first
    return tuple(range(begin, begin + (count or 1)))


def _require_sense(values: Mapping[str, Any]) -> None:
    """Raises UsageError for options of which one would be ignored."""
    for one, other in (
        ("seeds", "seed"),
        ("seeds", "num_images_per_prompt"),
        ("as_json", "markdown"),
    ):
        if values[one] and values[other] not in (None, False):
            names = [f"--{name.removeprefix('as_').replace('_', '-')}" for name in (one, other)]
            raise UsageError(f"{' and '.join(names)} exclude each other", hint=f"{names[0]} alone")


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _command(prepared: Prepared) -> str:
    components = (
        word
        for target, named in prepared.components.items()
        for name, source in named.items()
        for word in (f"--{target.replace('_', '-')}.{name}", source)
    )
    return shlex.join(["diffquant", "compare", *prepared.words, *components])


def _answered(question: "Question") -> "Comparison":
    with _talk.progress() as bars:
        task = bars.add_task("starting", total=None)
        _talk.quiet_bars()
        from diffquant.compare import compare

        def on_progress(what: str, done: int, of: int) -> None:
            bars.update(task, description=what, completed=done, total=of)

        return compare(question, on_progress)


# --------------------------------------------------------------------------------------------- talk


def _tell(comparison: "Comparison") -> None:
    for text in comparison.notes:
        _talk.note(text)
    for candidate in comparison.candidates:
        for line in (f"{candidate.name}: {line}" for line in candidate.truth_lines):
            _talk.say(line)
        for text in candidate.notes:
            _talk.note(f"{candidate.name}: {text}")


def _write(comparison: "Comparison", values: Mapping[str, Any]) -> None:
    """Data on stdout, files where they were asked for."""
    data = json.dumps(comparison.to_json(), indent=2, allow_nan=False)
    if values["output_json"] is not None:
        _save(values["output_json"], data + "\n")
    if values["report"] is not None:
        _save(values["report"], comparison.to_html())
        _talk.say(f"the report is {values['report']}")
    if values["as_json"]:
        click.echo(data)
    elif values["markdown"]:
        click.echo(comparison.to_markdown(), nl=False)
    else:
        click.echo("\n\n".join(_answer(each, comparison) for each in comparison.candidates))


def _save(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _answer(candidate: "Candidate", comparison: "Comparison") -> str:
    """Three answers and the cost of one candidate."""
    from diffquant.compare.verdict import FIGURES

    judged = {check.figure: check for check in candidate.verdict.checks}
    rows = [
        (
            FIGURES[name].title,
            FIGURES[name].shown(value),
            "" if name not in judged else ("ok" if judged[name].ok else "MISSED"),
            _who(candidate, name),
        )
        for name, value in candidate.figures.items()
        if value is not None
    ]
    defects = [("defect", "", "", text) for text in _few(candidate.verdict.defects)]
    kept = "keeps" if candidate.verdict.ok else "misses"
    head = f"{candidate.name} {kept} {candidate.verdict.level}, {_intervals(candidate)}"
    table = _talk.table([*defects, *rows, *_left(candidate), *_costs(candidate, comparison)])
    return f"{head}\n{table}"


def _few(defects: Sequence[str]) -> list[str]:
    more = len(defects) - MANY
    return [*defects[:MANY], *([f"… and {more} more"] if more > 0 else [])]


def _left(candidate: "Candidate") -> list[tuple[str, ...]]:
    left = candidate.left_unquantized()
    shown = ", ".join(left[:SHOWN]) + (" …" if len(left) > SHOWN else "")
    return [("left unquantized", _talk.count(len(left), "layer"), "", shown)] if left else []


def _costs(candidate: "Candidate", comparison: "Comparison") -> list[tuple[str, ...]]:
    ours, theirs = candidate.cost, comparison.reference_cost
    slower = comparison.slowdown(candidate)
    rows: list[tuple[str, ...]] = [
        ("weights", _talk.size(ours.weight_bytes), "", f"{_talk.size(theirs.weight_bytes)} before"),
        (
            "per step",
            _seconds(ours.step.value),
            "",
            f"{_seconds(theirs.step.value)} before: {_times(slower)}",
        ),
        ("loading", _seconds(ours.load.value), "", f"{_seconds(theirs.load.value)} before"),
    ]
    if ours.peak is not None and theirs.peak is not None:
        rows.append(("peak memory", _talk.size(ours.peak), "", f"{_talk.size(theirs.peak)} before"))
    return rows


def _seconds(value: float) -> str:
    return f"{1000 * value:.1f} ms" if value < 1 else f"{value:.2f} s"


def _times(slower: "Mean") -> str:
    if slower.low is None or slower.high is None:
        return f"{slower.value:.2f} times, from one round (--repeat 5 tells how sure that is)"
    return f"{slower.value:.2f} times, between {slower.low:.2f} and {slower.high:.2f} (95 %)"


def _intervals(candidate: "Candidate") -> str:
    from diffquant.compare.comparison import MEANS

    found: Mean = candidate.mean(MEANS["psnr_db"])
    many = f"{len(candidate.pairs)} drawings"
    if found.low is None:
        return "one drawing" if len(candidate.pairs) == 1 else many
    return f"{many}, PSNR between {found.low:.1f} and {found.high:.1f} dB (95 %)"


def _who(candidate: "Candidate", figure: str) -> str:
    """The layer behind a figure that is one layer's."""
    from diffquant.compare.comparison import BEHIND

    if figure not in BEHIND:
        return ""
    worst = candidate.worst(BEHIND[figure], 1)
    return f"{worst[0].path} ({worst[0].choice})" if worst else ""
