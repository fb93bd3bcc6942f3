"""Writes tests/data/bitsandbytes: a tiny FLUX transformer in every way its owner stores weights.

Run where the owner is installed (it was: bitsandbytes 0.50.2, torch 2.13.0, CPU):

    pip install bitsandbytes==0.50.2 torch==2.13.0 diffusers
    python tests/oracle/write_bitsandbytes_cases.py tests/data/bitsandbytes

Tensors are those of the owner's own state dicts; 16 channels are a quarter of a block of 64.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import bitsandbytes
import tiny_flux
import torch
from bitsandbytes import functional
from bitsandbytes.backends.default.ops import _dequantize_4bit_compute
from torch import Tensor, nn

Made = tuple[dict[str, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """How one linear is stored, and what config.json says of it."""

    quantize: Callable[[str, nn.Linear], Made]
    told: dict[str, Any]


def four_bit(kind: str, double: bool) -> Case:
    def quantize(path: str, layer: nn.Linear) -> Made:
        weight = layer.weight.detach()
        codes, state = functional.quantize_4bit(
            weight, blocksize=64, quant_type=kind, compress_statistics=double
        )
        held = {f"{path}.weight": codes}
        held |= {f"{path}.weight.{key}": each for key, each in state.as_dict(packed=True).items()}
        return held, decoded(codes, state)

    told = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": kind,
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": "bfloat16",
    }
    return Case(quantize, told)


def decoded(codes: Tensor, state: functional.QuantState) -> Tensor:
    """By the owner's generic decoder: where rows end inside a block, its CPU kernel (0.50.2) takes the
    scale of another block than its own quantizer put the numbers in."""
    scale = state.absmax
    if state.nested:
        scale = functional.dequantize_blockwise(scale, state.state2) + state.offset
    return _dequantize_4bit_compute(
        codes.reshape(-1), scale, state.code, state.blocksize, state.shape, torch.float32
    )


def eight_bit(path: str, layer: nn.Linear) -> Made:
    made = bitsandbytes.nn.Linear8bitLt(
        layer.in_features, layer.out_features, layer.bias is not None, has_fp16_weights=False
    )
    codes, scale, _ = functional.int8_vectorwise_quant(layer.weight.detach().half())
    made.weight.data, made.weight.CB, made.weight.SCB = codes, codes, scale
    made.bias = None
    held = {f"{path}.{key}": each for key, each in made.state_dict().items()}
    return held, functional.int8_vectorwise_dequant(codes, scale)


CASES = {
    "nf4_double": four_bit("nf4", True),
    "nf4": four_bit("nf4", False),
    "fp4_double": four_bit("fp4", True),
    "int8": Case(eight_bit, {"load_in_8bit": True}),
}
FOLDERS = ("nf4_double", "int8")
#: 280 blocks of 64, of which the second 256 have a scale of their own; rows that end inside a block.
LONG, EVEN = (160, 112), (8, 128)


def main(root: Path) -> None:
    for name in FOLDERS:
        transformer = tiny_flux.model()
        stored: dict[str, Tensor] = {}
        decoded: dict[str, Tensor] = {}
        for path, layer in tiny_flux.block_linears(transformer).items():
            held, decoded[path] = CASES[name].quantize(path, layer)
            stored |= held
        told = {"quant_method": "bitsandbytes", **CASES[name].told}
        tiny_flux.save(root / name, transformer, stored, decoded, quantization=told)
    torch.manual_seed(1)
    stored, decoded = {}, {}
    for name, case in CASES.items():
        n, k = LONG if name == "nf4_double" else EVEN
        path = f"blocks.0.{name}"
        held, decoded[path] = case.quantize(path, nn.Linear(k, n, dtype=torch.bfloat16))
        stored |= held
    tiny_flux.save_layers(root / "cases.safetensors", stored, decoded)
    tiny_flux.provenance(root, Path(__file__).name, bitsandbytes=version("bitsandbytes"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
