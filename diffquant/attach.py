"""Transformers into a pipeline: ordinary diffusers from here on."""

import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from diffquant import offload
from diffquant.compiling import compile_blocks
from diffquant.paging import Keep
from diffquant.residence import ON_DEVICE, Residence


def attach(
    root: Path,
    modules: Mapping[str, nn.Module],
    *,
    device: torch.device,
    dtype: torch.dtype,
    residence: Residence = ON_DEVICE,
    keep: Keep | None = None,
    compile: bool = False,
    handed: Mapping[str, Any] = MappingProxyType({}),
) -> Any:
    """The DiffusionPipeline in `root` with `modules` in place of its own, to draw on `device`.

    Components that are not given are loaded by diffusers in `dtype`; given ones are not touched.

    residence  where weights live; `keep` is what `offload.place` takes
    compile    the repeated blocks of `modules`
    handed     further components, as they are: a processor, a scheduler
    """
    pipeline = class_of(root).from_pretrained(
        root, dtype=dtype, local_files_only=True, **modules, **handed
    )
    for name, module in {**modules, **handed}.items():
        assert getattr(pipeline, name) is module, f"diffusers put another {name} in its place"
    pipeline.set_progress_bar_config(disable=True)
    for module in modules.values():
        if refusal := vars(module).get("save_pretrained"):
            # Before diffusers has written the components that come first.
            pipeline.save_pretrained = refusal
    if compile:
        compile_blocks(modules)
    return offload.place(pipeline, modules, device=device, residence=residence, keep=keep)


def class_of(root: Path) -> Any:
    """The class of the pipeline in `root`. `DiffusionPipeline` itself knows of no optional components, and
    loads Wan's transformers from the folder although they were given."""
    import diffusers

    name = diffusers.DiffusionPipeline.load_config(root)["_class_name"]
    return getattr(diffusers, name, diffusers.DiffusionPipeline)


def hush() -> None:
    """Diffusers and transformers report errors only, where their variables do not say otherwise, and
    show no bars of their own."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        if f"{library.__name__.upper()}_VERBOSITY" not in os.environ:
            library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
