"""Measure the inputs of every linear of a transformer while it draws: amax per layer, as JSON.

The file is what `--calibration` of the converters takes: {layer: amax of its input}. By `max` and
`percentile` it depends on the base model, the prompts and the steps alone, so that one file serves
every encoding and every preset; `mse` weighs clipping against the rounding of one number.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import click
import torch
from torch import Tensor, nn

from diffquant import preset
from diffquant.activations import quantized
from diffquant.attach import hush
from diffquant.converters._command import ConverterCommand
from diffquant.converters._progress import Tell, counted, untold
from diffquant.errors import ConvertError, UsageError
from diffquant.loading import RunFlags, load
from diffquant.plan import Activation, Role
from diffquant.recode import input_scale
from diffquant.resolve import ModelFlags
from diffquant.run import Request, fill, generate
from diffquant.writing import require_absent

PERCENTILE = 99.99
#: Numbers that `mse` can weigh: those with one scale for the whole input.
NUMBERS = ("fp8", "int8")


class Watcher(Protocol):
    """Sees the magnitudes of one layer's inputs, call after call, and settles on one amax."""

    def saw(self, size: Tensor) -> None: ...

    @property
    def amax(self) -> float: ...


def calibrate(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    defaults: Mapping[str, Any],
    component: str = "transformer",
    method: str = "max",
    percentile: float = PERCENTILE,
    number: str = "fp8",
    seed: int = 0,
    tell: Tell = untold,
) -> dict[str, float]:
    """Layer -> amax of its input over all steps of all prompts.

    method  max: the largest value seen; percentile: the largest of the inputs' percentiles, which
            ignores rare outliers at the price of clipping them; mse: the clip of all values seen
            that loses least when they become `number`

    Raises UsageError for an unknown method or number, ConvertError when a layer saw a value that is
    not finite.
    """
    model = getattr(pipeline, component)
    watchers = _watchers(method, percentile, number)
    with _observed(model, watchers) as seen:
        for index, prompt in enumerate(prompts):
            request = fill(Request(prompt=prompt, seed=seed + index), pipeline, defaults)
            generate(pipeline, request)
            tell("measuring inputs", index + 1, len(prompts))
    found = {name: watcher.amax for name, watcher in sorted(seen.items())}
    broken = [name for name, amax in found.items() if not torch.isfinite(torch.tensor(amax))]
    if broken:
        raise ConvertError(f"{broken[0]!r} saw inputs that are not finite")
    return found


def save(amax: Mapping[str, float], path: Path) -> None:
    """Writes the calibration file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(dict(amax), indent=1) + "\n", "utf-8")
    partial.replace(path)


def prompts_of(path: Path) -> list[str]:
    """One prompt a line. Raises UsageError for a file without any."""
    found = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
    if not found:
        raise UsageError(f"{str(path)!r} has no prompts", hint="one prompt a line")
    return found


# watching --------------------------------------------------------------------------------------------


class Largest:
    """The largest value."""

    def __init__(self) -> None:
        self.amax = 0.0

    def saw(self, size: Tensor) -> None:
        self.amax = max(self.amax, float(size.max()))


class Percentile:
    """The largest of the percentiles of all calls."""

    def __init__(self, percentile: float) -> None:
        self._percentile = percentile
        self.amax = 0.0

    def saw(self, size: Tensor) -> None:
        rank = max(1, round(size.numel() * self._percentile / 100))
        self.amax = max(self.amax, float(size.kthvalue(rank).values))


class LeastError:
    """The clip that loses least when all values together become `number`, from their histogram.

    Bins are a power of two cut in `BINS`, so that none has to be moved when larger values come.
    """

    BINS, LOWEST, HIGHEST = 256, -30, 30
    #: Clips that are tried: the largest value over 2^(i / 8), down to an eighth of it.
    CLIPS = tuple(2 ** (-step / 8) for step in range(25))

    def __init__(self, number: str) -> None:
        self._activation = Activation(number=number, granularity="tensor", mode="static")
        self._counts = torch.zeros((self.HIGHEST - self.LOWEST) * self.BINS, dtype=torch.float64)
        self._largest = 0.0

    def saw(self, size: Tensor) -> None:
        self._largest = max(self._largest, float(size.max()))
        bins = ((size.log2() - self.LOWEST) * self.BINS).nan_to_num_(0.0)
        bins = bins.clamp_(0, len(self._counts) - 1).long()
        self._counts += torch.bincount(bins.cpu(), minlength=len(self._counts))

    @property
    def amax(self) -> float:
        if not 0 < self._largest < float("inf"):
            return self._largest
        return min((self._largest * clip for clip in self.CLIPS), key=self._error)

    def _error(self, amax: float) -> float:
        """Summed squares of what all values lose under that clip."""
        held = self._counts.nonzero().flatten()
        size = torch.exp2((held + 0.5) / self.BINS + self.LOWEST).clamp_(max=self._largest)
        scale = input_scale(self._activation, amax)
        rounded = quantized(size.float()[None], self._activation, {Role.INPUT_SCALE: scale})
        lost = (rounded[0].double() - size).square_()
        return float(lost @ self._counts[held])


#: How one amax is taken from the many inputs a layer sees.
METHODS = ("max", "percentile", "mse")


def _watchers(method: str, percentile: float, number: str) -> Callable[[], Watcher]:
    """What makes the watcher of one layer."""
    known: dict[str, Callable[[], Watcher]] = {
        "max": Largest,
        "percentile": lambda: Percentile(percentile),
        "mse": lambda: LeastError(number),
    }
    if method not in known:
        raise UsageError(f"unknown method {method!r}", hint=f"one of: {', '.join(METHODS)}")
    if method == "mse" and number not in NUMBERS:
        raise UsageError(
            f"mse weighs one scale for a whole input, {number} has scales of groups too",
            hint="--calibration-method max, or percentile",
        )
    return known[method]


@contextmanager
def _observed(model: nn.Module, watchers: Callable[[], Watcher]) -> Iterator[dict[str, Watcher]]:
    """Watches the input of every linear while the block runs."""
    seen: dict[str, Watcher] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            size = inputs[0].detach().abs().float().flatten()
            seen.setdefault(name, watchers()).saw(size)

        return hook

    linears = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    handles = [part.register_forward_pre_hook(watch(name)) for name, part in linears]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


# the command -----------------------------------------------------------------------------------------


@click.command(cls=ConverterCommand, short_help="Measure inputs while prompts are drawn.")
@click.argument("model_path")
@click.argument("output", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--prompts", type=click.Path(exists=True, path_type=Path), help="One prompt a line.")
@click.option("--prompt", "typed", multiple=True, help="A prompt; may be repeated.")
@click.option("--component", default="transformer", show_default=True)
@click.option("--method", type=click.Choice(METHODS), default="max", show_default=True)
@click.option("--percentile", default=PERCENTILE, show_default=True, help="For that method.")
@click.option(
    "--number",
    type=click.Choice(NUMBERS),
    default="fp8",
    show_default=True,
    help="What inputs will become; for the method mse.",
)
@click.option("--seed", default=0, show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace the output.")
def main(
    model_path: str,
    output: Path,
    prompts: Path | None,
    typed: tuple[str, ...],
    component: str,
    method: str,
    percentile: float,
    number: str,
    seed: int,
    overwrite: bool,
) -> None:
    """Measure the inputs of MODEL_PATH's transformer over some prompts and write OUTPUT (JSON)."""
    wanted = [*typed, *([] if prompts is None else prompts_of(prompts))]
    if not wanted:
        raise UsageError(
            "calibration needs prompts", hint="--prompt 'a red apple', or --prompts FILE"
        )
    require_absent(output, overwrite)
    hush()
    pipeline = load(ModelFlags(model_path=model_path), RunFlags())
    known = preset.for_model(model_path)
    with counted() as tell:
        amax = calibrate(
            pipeline,
            wanted,
            defaults={} if known is None else known.defaults,
            component=component,
            method=method,
            percentile=percentile,
            number=number,
            seed=seed,
            tell=tell,
        )
    save(amax, output)
    click.echo(f"{len(amax)} layers measured over {len(wanted)} prompts: {output}")


if __name__ == "__main__":
    main()
