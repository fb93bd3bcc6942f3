"""What torchrun starts for test_ulysses.py: every job of a file, drawn by all processes together.

The first process alone writes each picture, and what becomes of it when tokens are not exchanged.
"""

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from diffquant import loading
from diffquant.cli import run as command
from diffquant.run import Request, draw, fill
from tests import pipelines


def load(folder: str, degree: int | None, handed: list[str], numerics: str = "auto") -> Any:
    """In float32, so that what differs is not the rounding."""
    return loading.load(
        loading.ModelFlags(model_path=folder, quantization="fp8", quantize_all=True),
        loading.RunFlags(device="cpu", dtype="float32", numerics=numerics, ulysses_degree=degree),  # type: ignore[arg-type]
        components={name: pipelines.Reader() for name in handed},
    )


def pixels(pipeline: Any, request: dict[str, Any]) -> "np.ndarray[Any, Any]":
    """[B, 3, H, W] of a picture, [B, F, 3, H, W] of a video, between 0 and 1."""
    pipelines.draw_small(SimpleNamespace(setattr=setattr))
    asked = fill(Request(**request), pipeline, {})
    pictures = draw(pipeline, asked, lambda pipeline, step, at, values: values)
    return np.asarray(pictures.float())


def exchange_nothing(pipeline: Any) -> None:
    """Every process attends over its own tokens alone, as with a broken Ulysses."""
    for name in loading.report(pipeline).plans:
        for module in getattr(pipeline, name).modules():
            if hasattr(getattr(module, "processor", None), "_parallel_config"):
                module.processor._parallel_config = None


def main() -> None:
    jobs = Path(sys.argv[1])
    for job in json.loads(jobs.read_text("utf-8")):
        if "words" in job:
            assert command(job["words"]) == 0
            continue
        pipeline = load(job["folder"], int(os.environ["WORLD_SIZE"]), job["handed"])
        together = pixels(pipeline, job["request"])
        exchange_nothing(pipeline)
        apart = pixels(pipeline, job["request"])
        if os.environ["RANK"] == "0":
            np.savez(jobs.parent / f"{job['name']}.npz", together=together, apart=apart)
