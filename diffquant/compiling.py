"""`--compile`: the repeated blocks of a transformer through torch.compile.

One block is compiled and serves all that are like it, so that a model costs seconds and not minutes
to compile. Kernels are one operator to the compiler, whatever they do (kernels/_operator.py).
"""

import os
import shutil
from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffquant.device import Device
from diffquant.errors import UsageError

if TYPE_CHECKING:
    from torch import nn

#: What torch's compiler looks for on a CPU when CXX names nothing.
CPU_COMPILERS = ("g++", "clang++")


def require_compiler(device: Device, environ: Mapping[str, str] | None = None) -> None:
    """Raises UsageError where torch.compile would fail at the first step, minutes from now."""
    named = (os.environ if environ is None else environ).get("CXX")
    wanted = (named,) if named else CPU_COMPILERS
    if device.kind == "cpu" and not any(map(shutil.which, wanted)):
        raise UsageError(
            f"--compile needs a C++ compiler on a CPU, and there is no {' or '.join(wanted)}",
            hint="apt install g++, or leave --compile out",
        )
    if device.kind in ("cuda", "rocm") and device.present and "triton" not in device.packages:
        raise UsageError(
            f"--compile needs triton on {device.name}, and it is not installed",
            hint="pip install triton, or leave --compile out",
        )


def compile_blocks(models: "Mapping[str, nn.Module]", *, backend: str = "inductor") -> None:
    """Compile the blocks that diffusers calls repeated in a model's class; at the first call, not now.

    Raises UsageError where no class names any.
    """
    named = [model for model in models.values() if getattr(model, "_repeated_blocks", None)]
    if not named:
        raise UsageError(
            f"diffusers names no repeated blocks to compile in any of {', '.join(models)}",
            hint="leave --compile out",
        )
    for model in named:
        model.compile_repeated_blocks(backend=backend)  # type: ignore[operator]
