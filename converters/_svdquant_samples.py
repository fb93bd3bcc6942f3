"""Samples of what every linear of a transformer reads while it draws, and a plan that uses them.

The file is safetensors: layer -> [M, K] rows of its input, picked evenly at random from all tokens of
all steps of all prompts. It depends on the base model, the prompts and the steps alone, so one file
serves every precision and rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffquant import headers, patterns, preset
from diffquant.attach import hush
from diffquant.converters._inputs import pipeline_of
from diffquant.converters._progress import Tell, counted, untold
from diffquant.errors import ConvertError
from diffquant.loading import RunFlags, load
from diffquant.plan import LayerPlan, Piece, Plan, PlanFile, Recode, Role, TensorRef
from diffquant.resolve import ModelFlags
from diffquant.run import Request, fill, generate
from diffquant.writing import Declared, write_file

#: Rows that are kept of each layer.
ROWS = 256
SPELLED = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}


def capture(
    pipeline: Any,
    prompts: Sequence[str],
    *,
    defaults: Mapping[str, Any],
    component: str = "transformer",
    seed: int = 0,
    tell: Tell = untold,
) -> dict[str, Tensor]:
    """Layer -> rows of its input, [M, K] on the CPU.

    Raises ConvertError when a layer read a value that is not finite.
    """
    with _watched(getattr(pipeline, component)) as seen:
        for index, prompt in enumerate(prompts):
            request = fill(Request(prompt=prompt, seed=seed + index), pipeline, defaults)
            generate(pipeline, request)
            tell("sampling inputs", index + 1, len(prompts))
    found = {name: reservoir.rows for name, reservoir in sorted(seen.items())}
    broken = [name for name, rows in found.items() if not bool(rows.isfinite().all())]
    if broken:
        raise ConvertError(f"{broken[0]!r} saw inputs that are not finite")
    return found


def drawn(source: str, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Samples of the pipeline that `source`, or the component it names, belongs to."""
    model, component = pipeline_of(source)
    known = preset.for_model(model)
    hush()
    with counted() as tell:
        return capture(
            load(ModelFlags(model_path=model), RunFlags()),
            prompts,
            defaults={} if known is None else known.defaults,
            component=component,
            tell=tell,
        )


def save(samples: Mapping[str, Tensor], path: Path, *, overwrite: bool = True) -> None:
    """Writes the file, whole or not at all."""
    declared = [
        Declared(name, SPELLED[rows.dtype], tuple(rows.shape), rows.contiguous)
        for name, rows in samples.items()
    ]
    write_file(path, declared, overwrite=overwrite)


def smoothed(plan: Plan, path: Path) -> Plan:
    """The plan with the file's samples behind every layer that is quantized.

    Members of one stored weight read the same input, so the first one's samples serve all of them.

    Raises ConvertError for a file of another model.
    """
    stored = headers.read([path]).tensors
    _require_same_model(plan, {name: each.shape for name, each in stored.items()}, path)
    file = PlanFile(str(path), path.stat().st_size)
    refs = {name: TensorRef(len(plan.files), name) for name in stored}
    first: dict[str, TensorRef] = {}
    layers = tuple(_smoothed(layer, refs, first) for layer in plan.layers)
    return replace(plan, files=(*plan.files, file), layers=layers)


def _smoothed(
    layer: LayerPlan, refs: Mapping[str, TensorRef], first: dict[str, TensorRef]
) -> LayerPlan:
    if layer.path not in refs:
        return layer
    pieces = tuple(
        piece
        if piece.recode is None
        else _fed(piece, piece.recode, first.setdefault(_weight(piece, layer), refs[layer.path]))
        for piece in layer.pieces
    )
    return replace(layer, pieces=pieces)


def _weight(piece: Piece, layer: LayerPlan) -> str:
    """What the stored weight is called here."""
    fused = None if piece.recode is None else piece.recode.fused
    return fused or f"{layer.path} {piece.cols}"


def _fed(piece: Piece, recode: Recode, samples: TensorRef) -> Piece:
    """Weights beside a branch are smoothed; the others only learn what their bias should make up."""
    recode = replace(recode, samples=samples)
    if recode.rank is None:
        return replace(piece, recode=recode)
    recode = replace(recode, roles=recode.roles | {Role.SMOOTH})
    return replace(piece, recode=recode, smooth="divide")


def _require_same_model(plan: Plan, shapes: Mapping[str, Sequence[int]], path: Path) -> None:
    known = {layer.path: layer.shape_NK[1] for layer in plan.layers}
    for name, shape in shapes.items():
        if name not in known:
            near = patterns.nearest(name, known)
            raise ConvertError(
                f"{str(path)!r} speaks of {name!r}, which the model does not have",
                hint=f"nearest: {', '.join(near)}" if near else None,
            )
        if len(shape) != 2 or shape[1] != known[name]:
            raise ConvertError(
                f"{str(path)!r} has samples {list(shape)} of {name!r}, whose inputs have "
                f"{known[name]} columns"
            )


class _Reservoir:
    """Rows picked evenly at random from a stream of unknown length (Vitter 1985, algorithm R)."""

    def __init__(self) -> None:
        self._source = torch.Generator().manual_seed(0)
        self._kept: list[Tensor] = []
        self._count = 0

    def saw(self, rows_MK: Tensor) -> None:
        for row in self._chosen(len(rows_MK)):
            place, index = row
            value = rows_MK[index].detach().to("cpu", copy=True)
            if place == len(self._kept):
                self._kept.append(value)
            else:
                self._kept[place] = value
        self._count += len(rows_MK)

    def _chosen(self, count: int) -> Iterator[tuple[int, int]]:
        """(place, row) of the new rows that are kept, in order."""
        numbers = torch.arange(self._count, self._count + count)
        drawn = (torch.rand(count, generator=self._source) * (numbers + 1)).long()
        places = torch.where(numbers < ROWS, numbers, drawn)
        for index in (places < ROWS).nonzero().flatten().tolist():
            yield int(places[index]), index

    @property
    def rows(self) -> Tensor:
        return torch.stack(self._kept)


@contextmanager
def _watched(model: nn.Module) -> Iterator[dict[str, _Reservoir]]:
    """Watches the input of every linear while the block runs."""
    seen: dict[str, _Reservoir] = {}

    def watch(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.setdefault(name, _Reservoir()).saw(inputs[0].flatten(0, -2))

        return hook

    linears = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.Linear)]
    handles = [part.register_forward_pre_hook(watch(name)) for name, part in linears]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
