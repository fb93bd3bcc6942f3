"""Faithful numerics against the outputs ModelOpt itself predicted for the same files and inputs.

`<case>.fakequant_output.safetensors` is what ModelOpt 0.47 computed with its own fake quantization,
in a bf16 model, before it exported. The limits are those of an independent reader, printed to three
decimals; an error is taken over the outputs of both seeds together. A case is tested as soon as its
folder and its output lie in `data/modelopt`.

Most of what is left is lost in the export: it merges the scales of q, k and v after that forward and
makes FP8 codes by dividing in bf16. A file that lost nothing gives ModelOpt's output exactly.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from diffquant import device, headers, planner, sources
from diffquant.kernels import Numerics, Spec, choose
from diffquant.kernels._operator import multiplier
from diffquant.linear import QuantLinear
from diffquant.materialize import materialize
from diffquant.plan import Encoding, LayerPlan, Piece, Role, Span

DATA = Path(__file__).parents[1] / "data" / "modelopt"
LIMITS = {
    "flux/fp8": 0.019,
    "flux/nvfp4": 0.009,
    "flux/nvfp4_svdquant": 0.012,
    "flux/ex_nvfp4_mha": 0.014,
    "wan/mixed": 0.001,
    "wan/w4a16_nvfp4": 0.007,
    "wan/fp8": 0.009,
    "wan/ex_fp8": 0.004,
    "wan/fp8_pc_pt": 0.012,
    "wan/fp8_2d_blockwise": 0.006,
    "wan/int8_sq": 0.006,
    "wan/int8_wo": 0.004,
    "wan/ex_int8": 0.009,
    "wan/nvfp4": 0.025,
    "wan/nvfp4_awq": 0.046,
    "wan/nvfp4_svdquant": 0.038,
    "wan/ex_nvfp4_svdquant": 0.028,
    "wan/int4_awq": 0.026,
    "wan/w4a8_awq": 0.054,
}
STORED = [case for case in LIMITS if (DATA / f"{case}.fakequant_output.safetensors").exists()]
#: Cases whose activations are quantized at all, and those with a scale for it in the file.
WEIGHT_ONLY = {"wan/w4a16_nvfp4", "wan/fp8_2d_blockwise", "wan/int8_wo", "wan/int4_awq"}
QUANTIZED = [case for case in STORED if case not in WEIGHT_ONLY]
STATIC = [case for case in QUANTIZED if case != "wan/fp8_pc_pt"]
PRINTED = 0.0005


def built(
    case: str, numerics: Numerics = "faithful", dtype: torch.dtype = torch.bfloat16
) -> torch.nn.Module:
    checkpoint = sources.checkpoint(str(DATA / case))
    plan = planner.plan(checkpoint, headers.read(checkpoint.files), config=checkpoint.config)
    choices = [choose(layer, device.parse("cpu"), numerics=numerics) for layer in plan.layers]
    return materialize(plan, choices, device=torch.device("cpu"), dtype=dtype)


def outputs(model: torch.nn.Module, case: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Both seeds, one row each, float32."""
    stored = load_file(DATA / Path(case).parent / "inputs.safetensors")
    rows = []
    for seed in ("seed0.", "seed1."):
        given = {name[6:]: value for name, value in stored.items() if name.startswith(seed)}
        cast: dict[str, Any] = {
            name: value.to(dtype) if value.dtype == torch.bfloat16 else value
            for name, value in given.items()
        }
        with torch.no_grad():
            rows.append(model(**cast, return_dict=False)[0].float().flatten())
    return torch.stack(rows)


def error(model: torch.nn.Module, case: str, dtype: torch.dtype = torch.bfloat16) -> float:
    predicted = load_file(DATA / f"{case}.fakequant_output.safetensors")
    wanted = torch.stack([predicted[seed].flatten() for seed in ("seed0", "seed1")])
    return float((outputs(model, case, dtype) - wanted).norm() / wanted.norm())


def spoiled(case: str, role: Role, change: Callable[[Tensor], Tensor]) -> torch.nn.Module:
    """The model with one role of its quantized layers changed."""
    model = built(case)
    for layer in model.modules():
        if isinstance(layer, QuantLinear):
            for name in [name for name in layer._buffers if name.endswith(f"_{role.value}")]:
                layer._buffers[name] = change(layer.get_buffer(name))
    return model


def smoothed_lowrank(
    codes: Tensor, smooth: Tensor, down: Tensor, up: Tensor, bias: Tensor
) -> QuantLinear:
    """An fp8 layer of scale 0.3 with smoothing and a low-rank branch, in a bf16 model."""
    n, k = codes.shape
    parts = {Role.CODES: codes, Role.TENSOR_SCALE: torch.tensor(0.3)}
    piece = Piece(
        encoding=Encoding("fp8"),
        stored_NK=(n, k),
        parts=(),
        out=Span(0, n),
        cols=Span(0, k),
        smooth="multiply",
        lowrank_input="smoothed",
    )
    spec = Spec(encoding=piece.encoding, shape_NK=(n, k), roles=frozenset(parts))
    around = {Role.SMOOTH: smooth, Role.LOWRANK_DOWN: down, Role.LOWRANK_UP: up}
    return QuantLinear(
        LayerPlan(path="layer", shape_NK=(n, k), pieces=(piece,), dtype="bfloat16", why="by hand"),
        [{**parts, **around}],
        [multiplier("reference", spec)],
        bias=bias,
        dtype=torch.bfloat16,
        float32=True,
    )


def test_the_cases_that_must_be_there_are() -> None:
    assert {"flux/fp8", "wan/fp8", "wan/mixed"} <= set(STORED)


@pytest.mark.parametrize("case", STORED)
def test_faithful_numerics_predict_what_modelopt_predicted(
    case: str, record_property: Callable[[str, object], None]
) -> None:
    ours, limit = error(built(case), case), LIMITS[case]
    record_property("error", ours)
    assert ours < limit + PRINTED, f"ours {ours:.5f} beside {limit:.3f}"


@pytest.mark.parametrize("case", QUANTIZED)
def test_activations_left_alone_are_over_the_limit(case: str) -> None:
    ours, limit = error(built(case, "weight-only"), case), LIMITS[case]
    assert ours > limit + PRINTED, f"ours {ours:.5f} beside {limit:.3f}"


@pytest.mark.parametrize("case", STATIC)
def test_a_scale_that_divides_is_over_the_limit(case: str) -> None:
    inverse = spoiled(case, Role.INPUT_SCALE, torch.reciprocal)
    assert error(inverse, case) > 5 * LIMITS[case]


def test_a_layer_rounds_its_smoothed_input_its_weight_its_sum_and_its_low_rank() -> None:
    generator = torch.Generator().manual_seed(0)
    x, smooth, down, up, bias = (
        torch.randn(*shape, generator=generator).bfloat16()
        for shape in ((8, 64), (64,), (4, 64), (32, 4), (32,))
    )
    codes = torch.randn(32, 64, generator=generator).to(torch.float8_e4m3fn)
    found, weight = smoothed_lowrank(codes, smooth, down, up, bias)(x), codes.float() * 0.3
    h = x * smooth
    linear = (h.float() @ weight.bfloat16().float().T + bias.float()).bfloat16()
    assert torch.equal(found, linear + (h @ down.T) @ up.T)
    raw = x.float() * smooth.float()
    wide = raw @ weight.T + bias.float() + (raw @ down.float().T) @ up.float().T
    assert not torch.equal(found, wide.bfloat16())
    assert torch.allclose(found.float(), wide, atol=0.02 * float(wide.abs().max()))


def test_a_layer_without_its_smoothing_is_another_layer() -> None:
    generator = torch.Generator().manual_seed(0)
    x, smooth, down, up, bias = (
        torch.randn(*shape, generator=generator).bfloat16()
        for shape in ((8, 64), (64,), (4, 64), (32, 4), (32,))
    )
    codes = torch.randn(32, 64, generator=generator).to(torch.float8_e4m3fn)
    right = smoothed_lowrank(codes, smooth, down, up, bias)(x)
    wrong = smoothed_lowrank(codes, torch.ones_like(smooth), down, up, bias)(x)
    assert float((right - wrong).norm() / right.norm()) > 0.5


def test_a_file_that_lost_nothing_gives_modelopts_output_itself() -> None:
    assert error(built("wan/mixed"), "wan/mixed") < 1e-4


def test_a_float32_model_does_not_because_modelopts_rounded() -> None:
    wide = error(built("wan/mixed", dtype=torch.float32), "wan/mixed", torch.float32)
    assert 0.005 < wide < 0.02


def test_what_is_missing_in_flux_fp8_is_the_codes_the_exporter_divided_in_bf16() -> None:
    base = load_file(DATA / "flux" / "bf16" / "diffusion_pytorch_model.safetensors")
    model, changed = built("flux/fp8"), 0
    for path, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            weight = base[f"{path}.weight"].float()
            codes = (weight * (448.0 / weight.abs().max())).to(torch.float8_e4m3fn)
            changed += int((codes.float() != layer.parts(0)[Role.CODES].float()).sum())
            layer._buffers["piece0_codes"] = codes
    assert changed > 0
    assert error(model, "flux/fp8") < 0.1 * LIMITS["flux/fp8"]
