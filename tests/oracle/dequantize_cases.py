"""Dequantize every true ModelOpt case and load it strictly: `python tests/oracle/dequantize_cases.py CASES`.

CASES is the folder of true files (`cases/modelopt`). Each line gives the worst layer of a case against
the base; the exit code is 1 when one is above what its encoding costs.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from diffquant import loading
from diffquant.converters._options import Reading
from diffquant.converters.dequantize import dequantize
from diffquant.materialize import skeleton

#: Worst relative error of a weight that each encoding may have, in bfloat16.
LIMITS = {"fp8": 0.028, "mxfp8": 0.03, "int8": 0.035, "int4": 0.13, "nvfp4": 0.125, "dense": 0.004}


def cases(root: Path) -> Iterator[tuple[Path, Path]]:
    """Every folder with weights, and the base it was made from."""
    for folder in sorted({path.parent for path in root.rglob("*.safetensors")}):
        if (folder / "config.json").exists() and folder.name != "bf16":
            family = next(name for name in ("flux", "wan") if name in str(folder.relative_to(root)))
            yield folder, root / family / "bf16"


def worst(folder: Path, base: Path) -> dict[str, float]:
    """Encoding -> the largest error of its layers, after a strict load of what was written."""
    with tempfile.TemporaryDirectory() as scratch:
        done = dequantize(str(folder), Path(scratch) / "plain", reading=Reading(base=str(base)))
        _, told = type(skeleton(done.plan.config)).from_pretrained(
            Path(scratch) / "plain", dtype=torch.bfloat16, output_loading_info=True
        )
        assert not any(told.values()), told
        compared = loading.inspect(str(Path(scratch) / "plain"), base=str(base)).fidelity or ()
        encodings = {layer.path: "+".join(layer.encodings) for layer in done.plan.layers}
    found: dict[str, float] = {}
    for layer in compared:
        assert layer.fidelity is not None and layer.bias_error < 0.01, layer
        name = encodings[layer.path]
        found[name] = max(found.get(name, 0.0), layer.fidelity.relative_error)
    return found


def main(root: Path) -> int:
    failed = 0
    for folder, base in cases(root):
        found = worst(folder, base)
        passed = all(error <= LIMITS[name] for name, error in found.items())
        told = ", ".join(f"{name} {error:.4f}" for name, error in found.items())
        print(f"{'ok' if passed else 'FAILED'}  {folder.relative_to(root)}  {told}")
        failed += not passed
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
