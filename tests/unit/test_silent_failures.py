"""Ways to read a file wrongly that give a picture all the same, each on a true file: who notices.

audit     the plan is refused, by name of the tensor
evidence  shape or statistics of what is stored tell the right reading from the wrong one
fidelity  `diffquant inspect --base`: the layer's error is out of proportion

`table` renders them for the README. In every row the right reading of the same file passes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffquant import headers, planner, settle, sources
from diffquant.converters.dequantize import dequantize
from diffquant.errors import DiffquantError
from diffquant.fidelity import compare_plans
from diffquant.plan import ROW_MAJOR, Layout, LayerPlan, Piece, Plan, Question, Role, Span

DATA = Path(__file__).resolve().parents[1] / "data"
MODELOPT = DATA / "modelopt"
FLUX = MODELOPT / "flux" / "fp8"
WAN_NVFP4 = DATA / "settle" / "wan_nvfp4_swizzle"
WAN_INT8 = MODELOPT / "wan" / "ex_int8_cut"
Z_IMAGE = MODELOPT / "z_image" / "nvfp4"
NUNCHAKU = DATA / "nunchaku" / "tiny_flux" / "svdq-int4_r32-tiny-flux.safetensors"
BASES = {FLUX: MODELOPT / "flux" / "bf16", WAN_NVFP4: MODELOPT / "wan" / "bf16"}
BASES |= {WAN_INT8: BASES[WAN_NVFP4]}

TILES = Layout("tiles_128x4")
HIGH = Layout("row_major", (("nibbles", "high"),))

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """One silent failure.

    name   what is done wrongly
    file   the true file it is tried on
    by     who notices: audit, evidence or fidelity
    sees   what it then says, in part
    check  (file, directory for copies, whether to do it wrongly) -> what is noticed, or None
    """

    name: str
    file: Path
    by: str
    sees: str
    check: Callable[[Path, Path, bool], str | None]


# reading -----------------------------------------------------------------------------------------


@cache
def planned(source: Path) -> Plan:
    """The plan of a file; one that was cut down for these tests lacks parameters."""
    checkpoint = sources.checkpoint(str(source))
    header = headers.read(checkpoint.files)
    return planner.draft(checkpoint, header, config=checkpoint.config).plan


@cache
def base_of(source: Path) -> Plan:
    """What the file was made from; for Nunchaku, whose decoding is proved elsewhere, what it means."""
    if source in BASES:
        return planned(BASES[source])
    with TemporaryDirectory() as scratch:
        dequantize(str(source), Path(scratch) / "plain", dtype="f32")
        plan = planned(Path(scratch) / "plain")
        tensors = settle.of_plan(plan)
        assert tensors(plan.layers[0].path) is not None
    raise AssertionError("the folder is gone")


def worst(plan: Plan, base: Plan) -> str | None:
    """What `inspect --base` says of the worst layer, where it says anything."""
    held = {layer.path for layer in plan.layers}
    same = replace(base, layers=tuple(layer for layer in base.layers if layer.path in held))
    outliers = [layer for layer in compare_plans(plan, same) if layer.is_outlier()]
    if not outliers:
        return None
    return ""
