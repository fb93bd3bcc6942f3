"""Any dialect -> a plain diffusers component folder, layer by layer.

    config.json                                    of the module, nothing about quantization
    diffusion_pytorch_model[-0000i-of-0000n].safetensors, with an index where there are several

Every parameter of the diffusers class is written under its own name, in its own shape: smoothing,
rotation and low rank are folded into the weight, constant shifts of the input into the bias. What
quantized activations would cost is not in the file. Modules the class keeps in float32 are written
in float32, tables of integers as they are. Nothing is written until the plan is whole, and at most
one layer is decoded at a time.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from diffquant.classes import kept_float32, skeleton
from diffquant.converters._command import ConverterCommand
from diffquant.converters._contract import Judge, settled, stamped
from diffquant.converters._options import Reading, Writing, reading_options, writing_argument
from diffquant.converters._progress import Bar, bar, told
from diffquant.converters._report import NOTHING, Report
from diffquant.errors import ConvertError
from diffquant.materialize import is_kept
from diffquant.pieces import dense, plain_value
from diffquant.plan import Plan
from diffquant.tensors import DTYPES, Passing, Weights
from diffquant.writing import GIB, Declared, write

#: What may be typed, as safetensors spells it.
WIDE: Mapping[str, str] = {"bf16": "BF16", "f32": "F32", "fp16": "F16"}
SPELLED: Mapping[torch.dtype, str] = {dtype: name for name, dtype in reversed(DTYPES.items())}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dequantized:
    """What was written or would be, and the plan it was read by; no shards in a dry run."""

    plan: Plan
    total_size: int
    shards: tuple[Path, ...] = ()
    report: Report = NOTHING


def dequantize(
    source: str,
    output: Path,
    *,
    reading: Reading = Reading(),  # noqa: B008 - frozen
    dtype: str = "bf16",
    dry_run: bool = False,
    max_shard_size: int = 10 * GIB,
    max_error: float | None = None,
    report: Path | None = None,
    no_check: bool = False,
    overwrite: bool = False,
    bars: Bar | None = None,
) -> Dequantized:
    """Write the plain component that `source` stands for to `output`.

    dtype      of the floating-point parameters: bf16, f32 or fp16
    dry_run    everything but the writing
    max_error  relative error that no layer may have; what is lost is one rounding to `dtype`
    report     a file for the figures of all layers
    no_check   do not decode what was written

    Raises PlanError when source and model do not fit or a question stays open, ConvertError when
    the class is not known or a value does not fit into `dtype`, SourceError for what is not found.
    """
    plan = settled(source, reading)
    if not plan.config.get("_class_name"):
        raise ConvertError(
            f"{source!r} does not tell which diffusers class it is",
            hint="--base names the model it was quantized from, with a config.json",
        )
    tensors = tuple(_declared(plan, dtype))
    total = sum(tensor.nbytes for tensor in tensors)
    if dry_run:
        return Dequantized(plan=plan, total_size=total)
    judge = Judge(
        plan, plan.config, max_error=max_error, saved_to=report, on_progress=told(bars, "checking")
    )
    written = write(
        output,
        tensors,
        origin=stamped(plan),
        config=plan.config,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        check=None if no_check else judge,
        on_progress=told(bars, "decoding"),
    )
    return Dequantized(plan=plan, total_size=total, shards=written.shards, report=judge.report)


# tensors ---------------------------------------------------------------------------------------------


def _declared(plan: Plan, dtype: str) -> Iterator[Declared]:
    """Every parameter and stored buffer of the class, in its order.

    Raises ConvertError for one that the plan does not give.
    """
    model = skeleton(plan.config)
    makers, kept = _makers(plan), kept_float32(model)
    for name, empty in model.state_dict().items():
        make = makers.get(name)
        if make is None:
            raise ConvertError(f"{name!r} of {plan.config['_class_name']} has no stored tensor")
        wide = "F32" if is_kept(name, kept) else WIDE[dtype]
        stored = wide if empty.is_floating_point() else SPELLED[empty.dtype]
        cast = partial(_cast, name, make, DTYPES[stored])
        yield Declared(name=name, dtype=stored, shape=tuple(empty.shape), make=cast)


def _makers(plan: Plan) -> dict[str, Any]:
    """Parameter -> the function that makes it. Weight and bias of a layer share one decoding."""
    weights = Passing([Path(file.path) for file in plan.files])
    makers: dict[str, Any] = {
        plain.name: partial(plain_value, plain, weights) for plain in plan.plain
    }
    decoded = _Decoded(plan, weights)
    for layer in plan.layers:
        makers[f"{layer.path}.weight"] = partial(decoded.weight, layer.path)
        makers[f"{layer.path}.bias"] = partial(decoded.bias, layer.path)
    return makers


class _Decoded:
    """The layer decoded last."""

    def __init__(self, plan: Plan, weights: Weights) -> None:
        self._layers = {layer.path: layer for layer in plan.layers}
        self._weights = weights
        self._path = ""
        self._linear: tuple[Tensor, Tensor | None] = (torch.empty(0), None)

    def weight(self, path: str) -> Tensor:
        return self._dense(path)[0]

    def bias(self, path: str) -> Tensor:
        bias = self._dense(path)[1]
        assert bias is not None, "the planner names parameters without a source"
        return bias

    def _dense(self, path: str) -> tuple[Tensor, Tensor | None]:
        if path != self._path:
            self._path, self._linear = path, dense(self._layers[path], self._weights)
        return self._linear


def _cast(name: str, make: Any, dtype: torch.dtype) -> Tensor:
    made: Tensor = make()
    cast = made.to(dtype)
    if (
        dtype == torch.float16
        and bool(torch.isinf(cast).any())
        and bool(torch.isfinite(made).all())
    ):
        raise ConvertError(
            f"{name!r} reaches {float(made.abs().max()):.0f}, fp16 ends at 65504",
            hint="--dtype bf16",
        )
    return cast


# the command -----------------------------------------------------------------------------------------


@click.command(cls=ConverterCommand, short_help="Plain weights again, of any format.")
@click.argument("source")
@writing_argument
@click.option("--dtype", type=click.Choice(list(WIDE)), default="bf16", show_default=True)
@reading_options
def main(source: str, writing: Writing, dtype: str, reading: Reading) -> None:
    """Write what SOURCE stands for as plain weights: a diffusers component in OUTPUT.

    SOURCE is a file, a folder or a repository of any format that `diffquant inspect` knows.
    """
    with bar() as bars:
        done = dequantize(
            source,
            writing.output_dir,
            reading=reading,
            dtype=dtype,
            dry_run=writing.dry_run,
            max_shard_size=writing.shard_bytes,
            max_error=writing.max_error,
            report=writing.report,
            no_check=writing.no_check,
            overwrite=writing.overwrite,
            bars=bars,
        )
    plan = done.plan
    place = "nothing written (--dry-run)" if writing.dry_run else writing.output_dir
    click.echo(
        f"{len(plan.quantized)} of {len(plan.layers)} linears decoded from {plan.format}; "
        f"{done.total_size / 1e9:.2f} GB of {dtype}: {place}{done.report.sentence}"
    )


if __name__ == "__main__":
    main()
