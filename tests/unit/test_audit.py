"""Is a file whole? A true export, broken in one place at a time."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffquant import loading
from diffquant.plan import Problem

DATA = Path(__file__).resolve().parents[1] / "data"
FP8 = DATA / "modelopt" / "native" / "fp8"
NVFP4 = DATA / "modelopt" / "native" / "nvfp4"
SMOOTHED = DATA / "modelopt" / "native" / "int8_sq"
WEIGHTS = "diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.0.attn.to_q"
SCALE = f"{LAYER}.weight_quantizer._scale"

Break = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def problems(
    source: Path, folder: Path, changed: dict[str, Tensor], *, deep: bool = False
) -> tuple[Problem, ...]:
    broken = shutil.copytree(source, folder / "broken")
    save_file(load_file(source / WEIGHTS) | changed, broken / WEIGHTS)
    return loading.inspect(str(broken), deep=deep).problems


@pytest.mark.parametrize(
    "source", [FP8, SMOOTHED, NVFP4, DATA / "modelopt" / "flux" / "fp8"], ids=str
)
@pytest.mark.parametrize("deep", [False, True])
def test_true_files_are_whole(source: Path, deep: bool) -> None:
    assert loading.inspect(str(source), deep=deep).problems == ()


@pytest.mark.parametrize(
    ("source", "tensor", "count", "needed"),
    [
        (FP8, f"{LAYER}.bias", 31, "needs 32 values"),
        (SMOOTHED, f"{LAYER}.input_quantizer._pre_quant_scale", 16, "needs 32 values"),
    ],
)
def test_a_part_of_another_size_is_named(
    source: Path, tensor: str, count: int, needed: str, tmp_path: Path
) -> None:
    (problem,) = problems(source, tmp_path, {tensor: torch.ones(count).bfloat16()})
    assert problem.tensor == tensor
    assert needed in problem.what and LAYER in problem.what


def test_codes_of_another_shape_are_named(tmp_path: Path) -> None:
    codes = torch.ones(32, 24).to(torch.float8_e4m3fn)
    (problem, *_) = problems(FP8, tmp_path, {f"{LAYER}.weight": codes})
    assert problem.tensor == LAYER
    assert "stores K 24" in problem.what


def test_block_scales_that_do_not_cover_the_weight_are_named(tmp_path: Path) -> None:
    scales = {SCALE: torch.ones(32, 3).to(torch.float8_e4m3fn)}
    (problem,) = problems(NVFP4, tmp_path, scales)
    assert problem.tensor == SCALE
    assert "has shape [32, 3]" in problem.what and "needs 64 values" in problem.what


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("tensor", [SCALE, f"{LAYER}.bias"])
def test_only_the_deep_audit_reads_values_and_it_names_the_tensor(
    tensor: str, value: float, tmp_path: Path
) -> None:
    shape = () if tensor == SCALE else (32,)
    changed = {tensor: torch.full(shape, value).bfloat16()}
    (problem,) = problems(FP8, tmp_path, changed, deep=True)
    assert problem.tensor == tensor and "not finite" in problem.what
    assert loading.inspect(str(tmp_path / "broken")).problems == ()


def test_a_negative_scale_is_named(tmp_path: Path) -> None:
    (problem,) = problems(FP8, tmp_path, {SCALE: torch.tensor(-1.0).bfloat16()}, deep=True)
    assert problem == Problem(SCALE, "is a negative scale")


def test_nan_codes_are_named_unless_their_scale_is_zero(tmp_path: Path) -> None:
    codes = {f"{LAYER}.weight": torch.full((32, 32), torch.nan).to(torch.float8_e4m3fn)}
    (problem,) = problems(FP8, tmp_path / "broken", codes, deep=True)
    assert problem.what == "holds 1024 values that are not finite"
    zero = codes | {SCALE: torch.tensor(0.0).bfloat16()}
    assert problems(FP8, tmp_path / "zero", zero, deep=True) == ()
