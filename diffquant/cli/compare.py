"""`diffquant compare`: BF16 against quantized, with numbers, a verdict and an exit code."""

import json
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
    from diffquant.compare.comparison import Mean

FAILED = 1


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
    try:
        return {name: float(text) for name, text in _pairs(ctx, param, value).items()}
    except ValueError as error:
        raise UsageError(f"{param.opts[0]}: {error}", hint="--threshold psnr=28") from error


def _seeds(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in (value or "").split(",") if word.strip())
    except ValueError:
        raise UsageError(f"--seeds {value!r} is no list of numbers", hint="--seeds 0,1,2") from None


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
    click.option("--save-reference", metavar="FILE", help="Capture the reference for later."),
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
    click.option("--report", metavar="FILE", help="A page of its own: pictures, plots, numbers."),
    click.option("--output-json", metavar="FILE", help="The same as --json, into a file."),
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

    ours, candidates = sides(
        _options.model_flags(values, prepared),
        _options.run_flags(values, prepared),
        reference=_reference(values),
        candidates=_candidates(values),
    )
    typed = {name: value for name, value in values.items() if name not in OF_EACH}
    prompts, saved = _prompts(values), _path(values["reference"])
    asked = Request(**_options.given(Request, typed))
    return Question(
        reference=ours,
        candidates=candidates,
        requests=() if saved and not prompts else requests(asked, prompts, _all_seeds(values)),
        level=values["level"],
        thresholds=values["threshold"],
        saved=saved,
        save_reference=_path(values["save_reference"]),
        profile=_path(values["profile"]),
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
    lines = Path(values["prompts"]).read_text(encoding="utf-8").splitlines()
    return (*values["prompt"], *(line.strip() for line in lines if line.strip()))


def _all_seeds(values: Mapping[str, Any]) -> tuple[int, ...]:
    from diffquant.run import DEFAULT_SEED

    first = DEFAULT_SEED if values["seed"] is None else values["seed"]
    count = values["num_images_per_prompt"] or 1
    return values["seeds"] or tuple(range(first, first + count))


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
        Path(values["output_json"]).write_text(data + "\n", encoding="utf-8")
    if values["report"] is not None:
        from diffquant.compare.report import page

        Path(values["report"]).write_text(page(comparison), encoding="utf-8")
        _talk.say(f"the report is {values['report']}")
    if values["as_json"]:
        click.echo(data)
    elif values["markdown"]:
        click.echo(comparison.to_markdown(), nl=False)
    else:
        click.echo("\n\n".join(_answer(each, comparison) for each in comparison.candidates))


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
    defects = [("defect", text, "", "") for text in candidate.verdict.defects]
    ours, theirs = candidate.cost, comparison.reference_cost
    costs = [
        ("weights", _talk.size(ours.weight_bytes), "", f"{_talk.size(theirs.weight_bytes)} before"),
        ("seconds per step", f"{ours.step_seconds:.3f}", "", f"{theirs.step_seconds:.3f} before"),
    ]
    kept = "keeps" if candidate.verdict.ok else "misses"
    head = f"{candidate.name} {kept} {candidate.verdict.level}, {_intervals(candidate)}"
    return f"{head}\n{_talk.table([*defects, *rows, *costs])}"


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
