"""Time to plan and to load against the number of layers, up to 60 GB of FP8 in sparse files.

The files hold true headers and true scales; codes are holes, which take no room on the disk. They are
mapped and not read, as in every load, so this is the work that grows with the model's layers.
"""

import gc
import json
import shutil
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import FOLDER, Section, Settings, _flux
from benchmarks._plots import Line, lines
from benchmarks._results import table
from diffquant import device, headers, planner, sources
from diffquant.families import FAMILIES
from diffquant.kernels import choose
from diffquant.materialize import materialize

#: Single blocks beside 19 double ones; a block is 141 MB in FP8.
BLOCKS = (40, 125, 210, 294, 378)
SHARD = 8 * 2**30
ROUNDS = 3
PLOT = "scaling.png"
#: Seconds per layer of the largest may be this much of the smallest.
LINEAR = 1.25


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One size: bytes and layers of it, the least seconds to plan and to plan and load."""

    size: int
    layers: int
    plan: float
    load: float


def run(settings: Settings) -> str:
    _flux.imported()
    points = [_measured(blocks, settings) for blocks in BLOCKS]
    lines(
        FOLDER / PLOT,
        "seconds against layers, FP8 FLUX.1-shaped files up to 60 GB",
        ("linear layers", "seconds"),
        [
            Line("plan", tuple((point.layers, point.plan) for point in points)),
            Line("plan and load", tuple((point.layers, point.load) for point in points)),
        ],
    )
    return f"{_about(points)}\n\n{_table(points)}\n\n![seconds against layers]({PLOT})"


def _measured(blocks: int, settings: Settings) -> Point:
    folder = settings.work / f"sparse-{blocks}"
    try:
        size = _write(folder, blocks)
        timed = [_timed(folder) for _ in range(min(ROUNDS, settings.rounds) + 1)][1:]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    layers = timed[0][0]
    return Point(
        size=size,
        layers=layers,
        plan=min(found[1] for found in timed),
        load=min(found[2] for found in timed),
    )


def _timed(folder: Path) -> tuple[int, float, float]:
    """Layers, seconds to plan, seconds to plan and load."""
    gc.collect()
    start = time.perf_counter()
    checkpoint, place = sources.checkpoint(str(folder)), device.parse("cpu")
    plan = planner.plan(checkpoint, headers.read(checkpoint.files), config=checkpoint.config)
    choices = [choose(layer, place) for layer in plan.layers]
    planned = time.perf_counter() - start
    materialize(plan, choices, device=torch.device("cpu"), dtype=torch.bfloat16)
    return len(plan.layers), planned, time.perf_counter() - start


def _write(folder: Path, blocks: int) -> int:
    """A ModelOpt FP8 component folder of that many single blocks; its bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**_flux.CONFIG, "num_layers": 19, "num_single_layers": blocks}
    quantization = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": []}
    written = {
        "_class_name": "FluxTransformer2DModel",
        **config,
        "quantization_config": quantization,
    }
    (folder / "config.json").write_text(json.dumps(written))
    shards = list(_shards(config))
    homes: dict[str, str] = {}
    for number, tensors in enumerate(shards, start=1):
        name = f"diffusion_pytorch_model-{number:05}-of-{len(shards):05}.safetensors"
        _sparse(folder / name, tensors)
        homes.update(dict.fromkeys(tensors, name))
    index = json.dumps({"metadata": {}, "weight_map": homes})
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(index)
    return sum(file.stat().st_size for file in folder.iterdir())


Tensors = dict[str, tuple[str, tuple[int, ...]]]
WIDTHS = {"F8_E4M3": 1, "BF16": 2, "F32": 4}


def _shards(config: dict[str, object]) -> Iterator[Tensors]:
    """Every parameter of the model with dtype and shape, in files of SHARD bytes."""
    shard, held = Tensors(), 0
    for name, shape in _parameters(config):
        shard[name] = ("BF16", shape)
        held += 2 * shape[0]
        if name.endswith(".weight") and len(shape) == 2:
            shard |= {name: ("F8_E4M3", shape), f"{name}_scale": ("F32", ())}
            held += shape[0] * shape[1]
        if held > SHARD:
            yield shard
            shard, held = Tensors(), 0
    yield shard


def _parameters(config: dict[str, object]) -> Iterator[tuple[str, tuple[int, ...]]]:
    inventory = FAMILIES.load("flux1").inventory(config)
    yield from inventory.shapes.items()


def _sparse(path: Path, tensors: Tensors) -> None:
    """A safetensors file whose data are holes but for its scales."""
    header, start, scales = {}, 0, []
    for name, (dtype, shape) in tensors.items():
        size = WIDTHS[dtype]
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, start + size)}
        scales += [start] if dtype == "F32" else []
        start += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        begin = file.tell()
        for offset in scales:
            file.seek(begin + offset)
            file.write(struct.pack("<f", 1e-3))
        file.truncate(begin + start)


def _about(points: list[Point]) -> str:
    first, last = points[0], points[-1]
    grown = (last.load / last.layers) / (first.load / first.layers)
    verdict = "linear" if grown <= LINEAR else "**more than linear**"
    return (
        "FLUX.1-shaped transformers with more and more single blocks. Codes are holes in sparse "
        "files, headers and scales are true; times are the least of three. The largest takes "
        f"{grown:.2f} times as long per layer as the smallest (at most {LINEAR} is {verdict})."
    )


def _table(points: list[Point]) -> str:
    rows = [
        (
            f"{point.size / 1e9:.1f} GB",
            f"{point.layers}",
            f"{point.plan:.3f} s",
            f"{point.load:.3f} s",
            f"{1e3 * point.load / point.layers:.2f} ms",
        )
        for point in points
    ]
    return table(("files", "linears", "plan", "plan and load", "per linear"), rows)


SECTION = Section(order=60, title="Growing models", run=run)
