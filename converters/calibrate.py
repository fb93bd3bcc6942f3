"""Measure the inputs of every linear of a transformer while it draws: amax per layer, as JSON.

The file is what `--calibration` of the converters takes: {layer: amax of its input}. It depends on
the base model, the prompts and the steps alone, so one file serves every encoding and every preset.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from diffquant import preset
from diffquant.errors import ConvertError, UsageError
from diffquant.loading import RunFlags, load
from diffquant.resolve import ModelFlags
from diffquant.run import Request, fill, generate

#: How one amax is taken from the many inputs a layer sees.
METHODS = ("max", "percentile")


def calibrate(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    defaults: Mapping[str, Any],
    component: str = "transformer",
    method: str = "max",
    percentile: float = 99.99,
    seed: int = 0,
) -> dict[str, float]:
    """Layer -> amax of its input over all steps of all prompts.

    method  max: the largest value seen; percentile: the largest of the inputs' percentiles, which
            ignores rare outliers at the price of clipping them

    Raises ConvertError when a layer saw a value that is not finite.
    """
    model = getattr(pipeline, component)
    with _observed(model, method, percentile) as seen:
        for index, prompt in enumerate(prompts):
            request = fill(Request(prompt=prompt, seed=seed + index), pipeline, defaults)
            generate(pipeline, request)
    broken = [name for name, amax in seen.items() if not torch.isfinite(torch.tensor(amax))]
    if broken:
        raise ConvertError(f"{broken[0]!r} saw inputs that are not finite")
    return dict(sorted(seen.items()))


def save(amax: Mapping[str, float], path: Path) -> None:
    """Writes the calibration file, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(dict(amax), indent=1) + "\n", "utf-8")
    partial.replace(path)


@contextmanager
def _observed(model: nn.Module, method: str, percentile: float) -> Iterator[dict[str, float]]:
    """Watches the input of every linear while the block runs."""
    if method not in METHODS:
        raise UsageError(f"unknown method {method!r}", hint=f"one of: {', '.join(METHODS)}")
    seen: dict[str, float] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            size = inputs[0].detach().abs().float().flatten()
            found = size.max() if method == "max" else _percentile(size, percentile)
            seen[name] = max(seen.get(name, 0.0), float(found))

        return hook

    linears = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    handles = [part.register_forward_pre_hook(watch(name)) for name, part in linears]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _percentile(size: Tensor, percentile: float) -> Tensor:
    rank = max(1, round(size.numel() * percentile / 100))
    return size.kthvalue(rank).values


@click.command()
@click.argument("model_path")
@click.argument("output", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--prompts", type=click.Path(exists=True, path_type=Path), help="one prompt a line")
@click.option("--prompt", "typed", multiple=True, help="a prompt; repeatable")
@click.option("--component", default="transformer", show_default=True)
@click.option("--method", type=click.Choice(METHODS), default="max", show_default=True)
@click.option("--percentile", default=99.99, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(
    model_path: str,
    output: Path,
    prompts: Path | None,
    typed: tuple[str, ...],
    component: str,
    method: str,
    percentile: float,
    seed: int,
) -> None:
    """Measure the inputs of MODEL_PATH's transformer over some prompts and write OUTPUT (JSON)."""
    lines = [] if prompts is None else prompts.read_text("utf-8").splitlines()
    wanted = [*typed, *(line for line in lines if line.strip())]
    if not wanted:
        raise UsageError(
            "calibration needs prompts", hint="--prompt 'a red apple', or --prompts FILE"
        )
    pipeline = load(ModelFlags(model_path=model_path), RunFlags())
    known = preset.for_model(model_path)
    amax = calibrate(
        pipeline,
        wanted,
        defaults={} if known is None else known.defaults,
        component=component,
        method=method,
        percentile=percentile,
        seed=seed,
    )
    save(amax, output)
    click.echo(f"{len(amax)} layers measured over {len(wanted)} prompts: {output}")


if __name__ == "__main__":
    main()
