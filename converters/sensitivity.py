"""Measure what quantizing each layer does to the output, and write the preset that meets a budget.

    1  the dense model draws some prompts, and a few questions to it are kept from each drawing
    2  every layer is quantized alone, in place, and the questions are asked again
    3  layers are put in order: squared error that keeping one takes away, for a byte
    4  as many of the first stay dense as the budget asks for, decided by measuring the whole set

What comes out is a preset (TOML, every kept layer with its figure), a plot of error against bytes,
and the figures as JSON. The model is asked with the scheme's own arithmetic (`--numerics faithful`),
so what is measured here is what hardware with native kernels shows.

Memory: the dense pipeline and the encoded transformer, side by side.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, get_args

import click

from diffquant.attach import hush
from diffquant.compare import budget as budgets
from diffquant.compare.budget import Budget
from diffquant.compare.chart import picture
from diffquant.converters._command import ConverterCommand
from diffquant.converters._progress import Tell, counted, untold
from diffquant.converters._sensitivity_figures import PROMPTS, STEPS, Sensitivity, Wish
from diffquant.converters._sensitivity_trial import Trial
from diffquant.errors import ConvertError, UsageError
from diffquant.kernels import Numerics
from diffquant.loading import DTYPES
from diffquant.run import DEFAULT_SEED, Request

__all__ = ["Sensitivity", "Wish", "main", "sensitivity"]

#: Points of the curve that are measured, beside those the search needs.
CURVE = 40


def sensitivity(wish: Wish, budget: Budget, tell: Tell = untold) -> Sensitivity:
    """Measure every layer, choose, and measure what was chosen.

    Raises ConvertError for a budget that cannot be met, UsageError for an encoding or a component
    there is none of, and for a model that is quantized already.
    """
    trial = Trial.of(wish, tell)
    kept = budget.kept(trial)
    return Sensitivity(
        wish=wish,
        family=trial.family,
        scheme=trial.scheme,
        budget=budget,
        alone=tuple(sorted(trial.alone.items(), key=lambda item: -item[1])),
        curve=tuple(trial.curve(CURVE)),
        kept=kept,
        error=trial.error(kept),
        everything=trial.exchange.error(trial.exchange.units, trial.questions),
        bytes=trial.bytes(kept),
        wide_bytes=trial.wide_bytes,
        figures=trial.figures(kept),
    )


# the command -----------------------------------------------------------------------------------------


@click.command(cls=ConverterCommand, short_help="What each layer costs, and a preset.")
@click.argument("model")
@click.option("--encoding", required=True, metavar="NAME", help="A value of --quantization.")
@click.option(
    "--budget",
    "asked",
    required=True,
    metavar="KIND=VALUE",
    help="error=0.05 (one-step), size=20MB, size=0.4 (a share), or level=strict.",
)
@click.option("--prompt", multiple=True, metavar="TEXT", help="To draw; repeatable.")
@click.option(
    "--prompts", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="One a line."
)
@click.option("--steps-per-prompt", type=click.IntRange(min=1), default=STEPS, show_default=True)
@click.option("--seed", type=int, default=DEFAULT_SEED, show_default=True)
@click.option("--num-inference-steps", type=click.IntRange(min=1), help="[the model's own]")
@click.option("--width", type=click.IntRange(min=1), metavar="PIXELS", help="[the model's own]")
@click.option("--height", type=click.IntRange(min=1), metavar="PIXELS", help="[the model's own]")
@click.option("--component", default="transformer", show_default=True)
@click.option(
    "--numerics", type=click.Choice(get_args(Numerics)), default="faithful", show_default=True
)
@click.option("--device", metavar="DEVICE", help="[the best here]")
@click.option("--dtype", type=click.Choice(list(DTYPES)), default="bfloat16", show_default=True)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The preset; the plot lies beside it. [FAMILY-NAME-measured.toml]",
)
@click.option(
    "--report", type=click.Path(path_type=Path), metavar="FILE", help="All figures, as JSON."
)
@click.option(
    "--keep-sensitive", is_flag=True, help="Keep what the family calls sensitive, come what may."
)
@click.option("--overwrite", is_flag=True, help="Replace files that are there.")
def main(
    model: str,
    encoding: str,
    asked: str,
    prompt: tuple[str, ...],
    prompts: Path | None,
    steps_per_prompt: int,
    seed: int,
    component: str,
    numerics: Numerics,
    device: str | None,
    dtype: str,
    output: Path | None,
    report: Path | None,
    keep_sensitive: bool,
    overwrite: bool,
    **drawing: Any,
) -> None:
    """Measure each layer of MODEL quantized alone, and write a preset that meets a budget.

    \b
    diffquant convert sensitivity emoji_flux --encoding nvfp4 --budget error=0.1
    diffquant convert sensitivity BASE --encoding fp8 --budget level=strict --prompts FILE
    """
    budget = budgets.parsed(asked)
    wish = Wish(
        source=model,
        encoding=encoding,
        prompts=_prompts(prompt, prompts),
        steps=steps_per_prompt,
        seed=seed,
        settings=Request(**{key: value for key, value in drawing.items() if value is not None}),
        component=component,
        numerics=numerics,
        device=device,
        dtype=dtype,
        keep_sensitive=keep_sensitive,
    )
    _require_new([output, _plot(output), report], overwrite)
    hush()
    with counted() as tell:
        found = sensitivity(wish, budget, tell)
    written = output or Path(f"{found.family}-{found.scheme}-measured.toml")
    _require_new([written, _plot(written)], overwrite)
    _write(found, written, report)
    click.echo(f"{found.table()}\n\n{found.told()}\n\npreset: {written}\nplot: {_plot(written)}")
    click.echo(
        f"diffquant generate --model-path {model} --quantization {found.scheme} "
        f"--quantization-preset {written} --prompt {json.dumps(wish.prompts[0])}"
    )


def _prompts(typed: Sequence[str], file: Path | None) -> tuple[str, ...]:
    lines = [] if file is None else file.read_text("utf-8").splitlines()
    found = (*typed, *(line.strip() for line in lines if line.strip()))
    if file is not None and not found:
        raise UsageError(f"--prompts {file} holds no prompt", hint="one prompt a line")
    if not found:
        click.echo(f"no prompts were named: {', '.join(PROMPTS)}", err=True)
    return found or PROMPTS


def _plot(preset_file: Path | None) -> Path | None:
    return None if preset_file is None else preset_file.with_suffix(".png")


def _require_new(files: Iterable[Path | None], overwrite: bool) -> None:
    """Before minutes are spent on what nobody could keep."""
    taken = next((file for file in files if file is not None and file.exists()), None)
    if taken is not None and not overwrite:
        raise ConvertError(f"{str(taken)!r} exists", hint="--overwrite, or another --output")


def _write(found: Sensitivity, written: Path, report: Path | None) -> None:
    """The preset last: where it lies, everything does."""
    written.parent.mkdir(parents=True, exist_ok=True)
    picture(found.chart()).save(written.with_suffix(".png"), optimize=True)
    if report is not None:
        report.write_text(json.dumps(found.to_json(), indent=1) + "\n", "utf-8")
    partial = written.with_name(f"{written.name}.partial")
    partial.write_text(found.preset(), "utf-8")
    partial.replace(written)


if __name__ == "__main__":
    main()
