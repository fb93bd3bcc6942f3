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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import click
import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from diffquant import loading, preset
from diffquant.compare import budget as budgets
from diffquant.compare.alone import KINDS, Exchange, Questions, Unit
from diffquant.compare.budget import Budget
from diffquant.compare.chart import Chart, Point, picture
from diffquant.compare.sides import Side, loaded
from diffquant.compare.verdict import LEVELS, judge
from diffquant.converters._command import ConverterCommand
from diffquant.errors import ConvertError, UsageError
from diffquant.kernels import Numerics
from diffquant.loading import DTYPES, RunFlags
from diffquant.resolve import ModelFlags
from diffquant.run import DEFAULT_SEED, Request, fill

#: what is being done, done, of
Tell = Callable[[str, int, int], None]
#: For whoever names none.
PROMPTS = ("red apple", "fox face", "rocket", "birthday cake")
#: Calls of the model that are kept from each drawing.
STEPS = 4
#: Layers in the table.
WORST = 10
#: Points of the curve that are measured, beside those the search needs.
CURVE = 40
#: Layers that are named in the plot.
NAMED = 2
MB = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """What is measured, and on what.

    encoding  a value of --quantization
    keep_sensitive  layers that the family calls sensitive stay, whatever is measured
    steps     calls of the model kept from each drawing
    settings  size and steps of the drawings; what is open is the model's own
    """

    source: str
    encoding: str
    prompts: tuple[str, ...] = PROMPTS
    steps: int = STEPS
    seed: int = DEFAULT_SEED
    settings: Request = Request()
    component: str = "transformer"
    numerics: Numerics = "faithful"
    device: str | None = None
    dtype: str = "bfloat16"
    keep_sensitive: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """One point of the curve: the error and the bytes with the first units of the order kept.

    unit  the last of them; None where all that may be is quantized
    """

    kept: int
    bytes: int
    error: float
    unit: Unit | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Sensitivity:
    """What was measured and chosen.

    scheme      the module of `schemes/` the encoding stands for
    alone       every unit with the error it makes alone, the worst first
    curve       from everything quantized to everything dense
    kept        the units that stay dense to meet the budget
    error       one-step error with those kept, measured; likewise bytes and figures of the drawings
    everything  one-step error with every layer quantized, sensitive ones too
    """

    wish: Wish
    family: str
    scheme: str
    budget: Budget
    alone: tuple[tuple[Unit, float], ...]
    curve: tuple[Place, ...]
    kept: tuple[Unit, ...]
    error: float
    everything: float
    bytes: int
    wide_bytes: int
    figures: Mapping[str, float | None] = field(default_factory=dict)

    @property
    def levels(self) -> tuple[str, ...]:
        """Levels that the drawings keep."""
        return tuple(name for name in LEVELS if judge(name, {}, self.figures).ok)

    def preset(self) -> str:
        """TOML of the schema of `presets/`."""
        errors = dict(self.alone)
        name = Path(self.wish.source).name
        head = [
            *(f"# {line}" for line in self._story()),
            "",
            f"family = {_quoted(self.family)}",
            f"algorithms = [{_quoted(self.scheme)}]",
            f"models = [{_quoted(name)}]",
            *([] if self.wish.keep_sensitive else ["complete = true"]),
        ]
        kept = sorted(self.kept, key=lambda unit: -errors[unit])
        return "\n".join([*head, *(self._rule(unit, errors[unit]) for unit in kept)]) + "\n"

    def chart(self) -> Chart:
        """Error against bytes: every point is a set of layers, coloured by the one it keeps more."""
        return Chart(
            title=f"{Path(self.wish.source).name} to {self.scheme}: what keeping layers costs and brings",
            x=f"{self.wish.component}, MB",
            y="one-step error (relative L2)",
            points=(*self._points(), self._chosen()),
            is_line=True,
            limit=(str(self.budget), self.budget.most)
            if isinstance(self.budget, budgets.ErrorBudget)
            else None,
        )

    def to_json(self) -> dict[str, Any]:
        kept = set(self.kept)
        return {
            "model": self.wish.source,
            "component": self.wish.component,
            "family": self.family,
            "encoding": self.scheme,
            "numerics": self.wish.numerics,
            "prompts": list(self.wish.prompts),
            "steps_per_prompt": self.wish.steps,
            "seed": self.wish.seed,
            "budget": str(self.budget),
            "one_step_error": self.error,
            "one_step_error_all_quantized": self.everything,
            "bytes": self.bytes,
            "dense_bytes": self.wide_bytes,
            "drawings": {**self.figures, "levels": list(self.levels)},
            "layers": [
                {
                    "paths": list(unit.paths),
                    "kind": unit.kind,
                    "error_alone": error,
                    "saved_bytes": unit.saved,
                    "sensitive": unit.sensitive,
                    "kept": unit in kept,
                }
                for unit, error in self.alone
            ],
            "curve": [
                {"kept": place.kept, "bytes": place.bytes, "one_step_error": place.error}
                for place in self.curve
            ],
        }

    def table(self) -> str:
        """The most sensitive layers, for people."""
        kept = set(self.kept)
        rows = [
            (
                _short(unit),
                unit.kind,
                f"{error:.4f}",
                f"{unit.saved / MB:.3f} MB",
                "stays" if unit in kept else "",
            )
            for unit, error in self.alone[:WORST]
        ]
        return _table([("most sensitive layers", "kind", "alone", "saves", ""), *rows])

    def told(self) -> str:
        """The result in a few lines."""
        layers = sum(len(unit.paths) for unit, _ in self.alone)
        stay = sum(len(unit.paths) for unit in self.kept)
        drawn = ", ".join(
            f"{title} {self.figures[name]:.{digits}f}"
            for name, title, digits in (("psnr", "PSNR", 1), ("ssim", "SSIM", 3))
        )
        keeps = " and ".join(self.levels) or "no level"
        return "\n".join(
            [
                f"{stay} of {layers} layers stay {DTYPES[self.wish.dtype]}, the others are {self.scheme}",
                f"one-step error {self.error:.4f}, with all quantized {self.everything:.4f}",
                f"{self.bytes / MB:.2f} MB of {self.wide_bytes / MB:.2f} MB ({self.budget} was asked)",
                f"drawings: {drawn}; {keeps} kept",
            ]
        )

    def _story(self) -> Iterator[str]:
        wish = self.wish
        yield f"Measured on {len(wish.prompts)} prompts, {wish.steps} steps of each, {wish.numerics} numerics."
        yield (
            f"With these layers kept: one-step error {self.error:.4f}, {self.bytes / MB:.2f} MB "
            f"of {self.wide_bytes / MB:.2f} MB."
        )
        yield f"The budget was {self.budget}. With every layer quantized the error is {self.everything:.4f}."

    def _rule(self, unit: Unit, error: float) -> str:
        patterns = ", ".join(map(_quoted, unit.paths))
        measured = f"measured: relative L2 {error:.3g} when quantized alone"
        always = unit.sensitive and self.wish.keep_sensitive
        why = f"{measured}; the family calls it sensitive" if always else measured
        source = f"diffquant convert sensitivity --encoding {self.scheme}"
        return (
            f"\n[[keep]]\npatterns = [{patterns}]\nreason = {_quoted(why)}\n"
            f"source = {_quoted(source)}"
        )

    def _points(self) -> Iterator[Point]:
        for place in self.curve:
            kind = KINDS[-1] if place.unit is None else place.unit.kind
            yield Point(x=place.bytes / MB, y=place.error, kind=kind, name=self._name(place))

    def _name(self, place: Place) -> str:
        if place is self.curve[0]:
            told = "all quantized"
            return f"{told} but what the family keeps" if self.wish.keep_sensitive else told
        if place is self.curve[-1]:
            return "all dense"
        worst = [unit for unit, _ in self.alone[:NAMED]]
        return f"{_short(place.unit)} stays" if place.unit and place.unit in worst else ""

    def _chosen(self) -> Point:
        kind = self.kept[-1].kind if self.kept else KINDS[-1]
        name = f"chosen: {self.bytes / MB:.2f} MB, error {self.error:.3g}"
        return Point(x=self.bytes / MB, y=self.error, kind=kind, name=name, is_marked=True)


def sensitivity(
    wish: Wish, budget: Budget, tell: Tell = lambda what, done, of: None
) -> Sensitivity:
    """Measure every layer, choose, and measure what was chosen.

    Raises ConvertError for a budget that cannot be met, UsageError for an encoding or a component
    there is none of, and for a model that is quantized already.
    """
    trial = _Trial.of(wish, tell)
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


class _Trial:
    """The model with any of its layers kept dense: what `budget` looks at."""

    def __init__(
        self,
        exchange: Exchange,
        questions: Questions,
        pipeline: Any,
        keep_sensitive: bool,
        tell: Tell,
    ) -> None:
        self.exchange, self.questions, self.pipeline = exchange, questions, pipeline
        self.family = self.scheme = ""
        self._tell = tell
        self._errors: dict[frozenset[Unit], float] = {}
        self.alone = dict(self._each_alone())
        ranked = sorted(self.alone, key=lambda unit: -budgets.worth(self.alone[unit], unit))
        self.always = tuple(unit for unit in ranked if unit.sensitive and keep_sensitive)
        self.order = tuple(unit for unit in ranked if unit not in self.always)
        self.wide_bytes = exchange.bytes(())

    @staticmethod
    def of(wish: Wish, tell: Tell) -> "_Trial":
        run = RunFlags(device=wish.device, dtype=wish.dtype, numerics=wish.numerics)
        quantized = loading.dry_run(
            ModelFlags(
                model_path=wish.source,
                component_quantizations={wish.component: wish.encoding},
                quantize_all=True,
            ),
            run,
        )
        here = loaded(Side(name="dense", model=ModelFlags(model_path=wish.source), run=run), tell)
        here.pipeline.set_progress_bar_config(disable=True)
        known = preset.for_model(*here.dry.resolution.model_names)
        requests = [
            fill(_request(wish, prompt), here.pipeline, known.defaults if known else {})
            for prompt in wish.prompts
        ]
        questions = Questions.of(
            here.pipeline,
            wish.component,
            requests,
            wish.steps,
            lambda done, of: tell("drawing", done, of),
        )
        twin = loading.build(
            quantized,
            wish.component,
            torch.device(quantized.device.torch_name),
            getattr(torch, DTYPES[wish.dtype]),
            on_progress=lambda _, done, of: tell(f"quantizing to {wish.encoding}", done, of),
        )
        plan = loading.settled_plan(quantized, wish.component)
        dense = getattr(here.pipeline, wish.component)
        exchange = Exchange(dense, twin, plan)
        trial = _Trial(exchange, questions, here.pipeline, wish.keep_sensitive, tell)
        online = quantized.resolution.components[wish.component].online
        assert online is not None, "resolution refuses an encoding it does not know"
        trial.family, trial.scheme = plan.family, online.scheme
        return trial

    def bytes(self, kept: Sequence[Unit]) -> int:
        return self.exchange.bytes(self._others(kept))

    def error(self, kept: Sequence[Unit]) -> float:
        key = frozenset(kept)
        if key not in self._errors:
            self._errors[key] = self.exchange.error(self._others(kept), self.questions)
        return self._errors[key]

    def figures(self, kept: Sequence[Unit]) -> Mapping[str, float | None]:
        self._tell("drawing with the chosen layers kept", 0, 1)
        return self.exchange.figures(self._others(kept), self.questions, self.pipeline)

    def curve(self, most: int) -> Iterator[Place]:
        """At most that many beginnings of the order, the empty and the whole one among them."""
        last = len(self.order)
        few = min(most, last + 1)
        for done, count in enumerate(sorted({last * i // max(1, few - 1) for i in range(few)})):
            kept = (*self.always, *self.order[:count])
            yield Place(
                kept=sum(len(unit.paths) for unit in kept),
                bytes=self.bytes(kept),
                error=self.error(kept),
                unit=self.order[count - 1] if count else None,
            )
            self._tell("measuring sets of layers", done + 1, few)

    def _each_alone(self) -> Iterator[tuple[Unit, float]]:
        units = self.exchange.units
        for done, unit in enumerate(units, start=1):
            yield unit, self.exchange.error([unit], self.questions)
            self._tell("quantizing one layer at a time", done, len(units))

    def _others(self, kept: Iterable[Unit]) -> list[Unit]:
        stays = frozenset(kept)
        return [unit for unit in self.exchange.units if unit not in stays]


def _request(wish: Wish, prompt: str) -> Request:
    return Request(**{**wish.settings.typed, "prompt": prompt, "seed": wish.seed})


def _quoted(text: str) -> str:
    """A TOML string."""
    return json.dumps(text, ensure_ascii=False)


def _short(unit: Unit) -> str:
    """The first layer's path, and what the others have instead of its last segment."""
    first, *others = unit.paths
    return ", ".join([first, *(path.rpartition(".")[2] for path in others)])


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


# the command -----------------------------------------------------------------------------------------


@click.command(cls=ConverterCommand)
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
    _quiet()
    with _bars() as tell:
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


def _quiet() -> None:
    """Libraries report errors only, and show no bars of their own."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


@contextmanager
def _bars() -> Iterator[Tell]:
    """One bar for each thing that is being done, where stderr is a terminal."""
    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bars:
        tasks: dict[str, Any] = {}

        def tell(what: str, done: int, of: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=of)
            bars.update(tasks[what], completed=done, total=of)

        yield tell


if __name__ == "__main__":
    main()
