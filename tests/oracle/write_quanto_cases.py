"""Writes tests/data/quanto: tiny FLUX transformers and lone layers, by optimum-quanto itself.

Run where the owner is installed (it was: optimum-quanto 0.2.7, torch 2.13.0, CPU):

    pip install optimum-quanto==0.2.7 torch==2.13.0 diffusers
    python tests/oracle/write_quanto_cases.py tests/data/quanto

Answers are the owner's, asked for in float32: its scales and shifts are widened first.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import tiny_flux
import torch
from optimum.quanto import (
    freeze,
    qfloat8_e5m2,
    qint2,
    qint4,
    qint8,
    qtype,
    quantization_map,
    quantize,
)
from optimum.quanto.tensor import WeightQBitsTensor, WeightQBytesTensor
from torch import Tensor, nn

#: Rows and columns, which the owner puts into groups of 128, of 96, of 32 and whole rows.
LAYERS: dict[str, tuple[qtype, int, int]] = {
    "int4": (qint4, 6, 256),
    "int4_narrower": (qint4, 8, 192),
    "int4_odd": (qint4, 5, 160),
    "int4_rows": (qint4, 8, 100),
    "int2": (qint2, 6, 256),
    "float8_e5m2": (qfloat8_e5m2, 8, 64),
}


def decoded(weight: WeightQBitsTensor | WeightQBytesTensor) -> Tensor:
    wide = {"scale": weight._scale.float()}
    shape = {"size": weight.size(), "stride": weight.stride(), "data": weight._data}
    if isinstance(weight, WeightQBytesTensor):
        made = WeightQBytesTensor(weight.qtype, weight.axis, **shape, **wide, activation_qtype=None)
        return made.dequantize()
    wide["shift"] = weight._shift.float()
    return WeightQBitsTensor(
        weight.qtype, weight.axis, weight._group_size, **shape, **wide
    ).dequantize()


def frozen(model: nn.Module, weights: qtype, **chosen: str) -> dict[str, Tensor]:
    """Quantizes in place; the decoded weight of every layer."""
    quantize(model, weights=weights, **chosen)
    freeze(model)
    kinds = (WeightQBitsTensor, WeightQBytesTensor)
    modules = {path: getattr(each, "weight", None) for path, each in model.named_modules()}
    return {path: decoded(each) for path, each in modules.items() if isinstance(each, kinds)}


def main(root: Path) -> None:
    transformer = tiny_flux.model()
    answers = frozen(transformer, qint8, include="single_transformer_blocks*")
    told = {"quant_method": "quanto", "weights_dtype": "int8", "modules_to_not_convert": []}
    tiny_flux.save(root / "int8", transformer, {}, answers, quantization=told)
    qmap = json.dumps(quantization_map(transformer), indent=1)
    (root / "int8" / "quantization_map.json").write_text(qmap + "\n")
    stored: dict[str, Tensor] = {}
    every: dict[str, Tensor] = {}
    for name, (kind, n, k) in LAYERS.items():
        # bfloat16 in groups of 128 would become another class for the owner's own kernel.
        holder = nn.ModuleDict({name: nn.Linear(k, n, dtype=torch.float16)})
        found = frozen(holder, kind)
        every |= {f"blocks.0.{path}": each for path, each in found.items()}
        stored |= {f"blocks.0.{path}": each for path, each in holder.state_dict().items()}
    tiny_flux.save_layers(root / "cases.safetensors", stored, every)
    tiny_flux.provenance(root, Path(__file__).name, **{"optimum-quanto": version("optimum-quanto")})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
