"""Any dialect -> a plain diffusers component folder, layer by layer.

    config.json                                    of the module, nothing about quantization
    diffusion_pytorch_model[-0000i-of-0000n].safetensors, with an index where there are several

Every parameter of the diffusers class is written under its own name, in its own shape: smoothing,
rotation and low rank are folded into the weight, constant shifts of the input into the bias. What
quantized activations would cost is not in the file. Modules the class keeps in float32 are written
in float32, tables of integers as they are. Nothing is written until the plan is whole, and at most
one layer is decoded at a time.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor

from diffquant import headers, planner, settle, sources
from diffquant.classes import kept_float32, skeleton
from diffquant.converters._command import ConverterCommand
from diffquant.errors import ConvertError
from diffquant.formats import NO_HINTS, Hints
from diffquant.loading import described_by
from diffquant.materialize import is_kept, plain_value
from diffquant.pieces import dense
from diffquant.plan import Plan
from diffquant.sources import Checkpoint
from diffquant.tensors import DTYPES, Weights
from diffquant.writing import GIB, Declared, Progress, write

#: What may be typed, as safetensors spells it.
WIDE: Mapping[str, str] = {"bf16": "BF16", "f32": "F32", "fp16": "F16"}
SPELLED: Mapping[torch.dtype, str] = {dtype: name for name, dtype in reversed(DTYPES.items())}


@dataclass(frozen=True, slots=True, kw_only=True)
class Dequantized:
    """What was written, and the plan it was read by."""

    plan: Plan
    shards: tuple[Path, ...]
    total_size: int


def dequantize(
    source: str,
    output: Path,
    *,
    base: str | None = None,
    dtype: str = "bf16",
    hints: Hints = NO_HINTS,
    subfolder: str | None = None,
    max_shard_size: int = 10 * GIB,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> Dequantized:
    """Write the plain component that `source` stands for to `output`.

    base   the model it was quantized from: answers open questions, and describes weights that come
           without a config.json
    dtype  of the floating-point parameters: bf16, f32 or fp16

    Raises PlanError when source and model do not fit or a question stays open, ConvertError when
    the class is not known or a value does not fit into `dtype`, SourceError for what is not found.
    """
    checkpoint = sources.checkpoint(source, subfolder=subfolder)
    original = None if base is None else sources.checkpoint(base)
    plan = _settled(checkpoint, original, hints)
    tensors = tuple(_declared(plan, dtype))
    written = write(
        output,
        tensors,
        origin=json.dumps([plan.digest, *_stamps(plan)]),
        config=plan.config,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        on_progress=on_progress,
    )
    return Dequantized(plan=plan, shards=written.shards, total_size=written.total_size)


def _settled(checkpoint: Checkpoint, base: Checkpoint | None, hints: Hints) -> Plan:
    config = described_by(checkpoint, base)
    header = headers.read(checkpoint.files)
    plan = planner.plan(checkpoint, header, config=config, hints=hints)
    if not plan.config.get("_class_name"):
        raise ConvertError(
            f"{checkpoint.origin!r} does not tell which diffusers class it is",
            hint="--base names the model it was quantized from, with a config.json",
        )
    return settle.settle(plan, settle.of_checkpoint(base, config) if plan.open else None)


def _stamps(plan: Plan) -> Iterator[tuple[str, int]]:
    for file in plan.files:
        yield file.path, Path(file.path).stat().st_mtime_ns


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
    weights = Weights([Path(file.path) for file in plan.files])
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


@click.command(cls=ConverterCommand)
@click.argument("source")
@click.argument("output", type=click.Path(path_type=Path))
@click.option("--base", metavar="SOURCE", help="The model it was quantized from.")
@click.option("--dtype", type=click.Choice(list(WIDE)), default="bf16", show_default=True)
@click.option("--subfolder", metavar="NAME", help="Where the component lies inside SOURCE.")
@click.option("--nvfp4-nibbles", type=click.Choice(["low", "high"]), help="Which comes first.")
@click.option("--scale-layout", type=click.Choice(["linear", "tiles"]), help="Of block scales.")
@click.option("--raw-fp8", is_flag=True, help="Accept float8 weights without any scale.")
@click.option("--max-shard-size", metavar="GIB", type=float, default=10.0, show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace the output directory.")
def main(
    source: str,
    output: Path,
    base: str | None,
    dtype: str,
    subfolder: str | None,
    nvfp4_nibbles: str | None,
    scale_layout: str | None,
    raw_fp8: bool,
    max_shard_size: float,
    overwrite: bool,
) -> None:
    """Write what SOURCE stands for as plain weights: a diffusers component in OUTPUT.

    SOURCE is a file, a folder or a repository of any format that `diffquant inspect` knows.
    """
    hints = Hints(nibbles=nvfp4_nibbles, scales=scale_layout, raw_fp8=raw_fp8)  # type: ignore[arg-type]
    with _bar() as on_progress:
        done = dequantize(
            source,
            output,
            base=base,
            dtype=dtype,
            hints=hints,
            subfolder=subfolder,
            max_shard_size=int(max_shard_size * GIB),
            overwrite=overwrite,
            on_progress=on_progress,
        )
    plan = done.plan
    click.echo(
        f"{len(plan.quantized)} of {len(plan.layers)} linears decoded from {plan.format}; "
        f"{done.total_size / 1e9:.2f} GB of {dtype}: {output}"
    )


@contextmanager
def _bar() -> Iterator[Progress | None]:
    """A bar on stderr, where stderr is a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    bar: Any
    with click.progressbar(length=1, label="decoding", file=sys.stderr) as bar:

        def told(done: int, total: int, name: str) -> None:
            bar.length = total
            bar.update(done - bar.pos)

        yield told


if __name__ == "__main__":
    main()
