"""Transformers into a pipeline: ordinary diffusers from here on."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn


def attach(
    root: Path, modules: Mapping[str, nn.Module], *, device: torch.device, dtype: torch.dtype
) -> Any:
    """The DiffusionPipeline in `root` with `modules` in place of its own, on `device`.

    Components that are not given are loaded by diffusers in `dtype`; given ones are not touched.
    """
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(
        root, dtype=dtype, local_files_only=True, **modules
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)
