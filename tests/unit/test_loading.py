"""The whole sentence, from flags to a pipeline that tells what it runs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import diffquant
from diffquant import loading
from diffquant.errors import KernelError, UsageError
from diffquant.loading import DryRun, RunFlags
from diffquant.resolve import ModelFlags
from tests import tiny

TESTS = Path(__file__).resolve().parents[1]
FP8 = TESTS / "data" / "modelopt" / "flux" / "fp8"
TO_Q = "transformer_blocks.0.attn.to_q"

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tiny.tiny_flux_pipeline(tmp_path_factory.mktemp("tiny") / "base")
    return folder


def dry(base: Path, **run: Any) -> DryRun:
    model = ModelFlags(model_path=str(base), component_paths={"transformer": str(FP8)})
    return loading.dry_run(model, RunFlags(**{"device": "cpu", **run}))


@pytest.fixture(scope="module")
def pipeline(base: Path) -> Any:
    return diffquant.load(str(base), transformer_path=str(FP8), device="cpu")


def test_what_comes_back_is_an_ordinary_pipeline(pipeline: Any) -> None:
    from diffusers import FluxPipeline, FluxTransformer2DModel

    assert type(pipeline) is FluxPipeline
    assert type(pipeline.transformer) is FluxTransformer2DModel
    assert pipeline.transformer.dtype == torch.bfloat16
    assert pipeline.device.type == "cpu"


def test_its_report_tells_what_runs(pipeline: Any) -> None:
    report = diffquant.report(pipeline)
    (line,) = report.truth_lines
    assert line.startswith("transformer: 33/36 linears fp8 via cpu_fp8 (weight-only), 3 bf16")
    told = json.loads(json.dumps(report.to_json()))
    assert told["components"]["transformer"]["kernels"][TO_Q] == "cpu_fp8"
    assert told["components"]["transformer"]["digest"] == report.plans["transformer"].digest


def test_numbers_of_the_truth_line_come_from_the_plan(pipeline: Any) -> None:
    plan = diffquant.report(pipeline).plans["transformer"]
    assert len(plan.quantized) == 33
    assert len(plan.layers) == 36


def test_it_draws(pipeline: Any) -> None:
    drawn = pipeline(
        "red apple", width=32, height=32, num_inference_steps=1, max_sequence_length=16
    )
    assert drawn.images[0].size == (32, 32)


def test_one_component_can_be_had_alone(base: Path) -> None:
    transformer = diffquant.load_component(
        "transformer", str(base), transformer_path=str(FP8), device="cpu"
    )
    assert type(transformer.get_submodule(TO_Q)).__name__ == "QuantLinear"


def test_progress_speaks_of_each_component(base: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    model = ModelFlags(model_path=str(base), component_paths={"transformer": str(FP8)})
    loading.load(model, RunFlags(device="cpu"), on_progress=lambda *told: seen.append(told))
    assert seen[0] == ("transformer", 1, 36)
    assert seen[-1] == ("transformer", 36, 36)


# before a weight is read


@pytest.mark.parametrize(
    ("run", "way"),
    [
        ({}, "via cpu_fp8 (weight-only)"),
        ({"numerics": "weight-only"}, "via cpu_fp8 (weight-only)"),
        ({"numerics": "faithful"}, "via reference (activations emulated)"),
        ({"kernel": "reference"}, "via reference"),
        ({"device": "sm90"}, "via torch_scaled_mm (activations quantized)"),
    ],
)
def test_flags_about_running_choose_the_way(base: Path, run: dict[str, Any], way: str) -> None:
    (line,) = dry(base, **run).truth_lines
    assert way in line


def test_strict_refuses_what_would_not_run_natively(base: Path) -> None:
    with pytest.raises(KernelError, match="no native kernel runs them here") as raised:
        dry(base, strict=True)
    assert "torch_scaled_mm: needs cuda, this is cpu" in str(raised.value)
    assert dry(base, strict=True, device="sm90").truth_lines


def test_pinned_kernels_are_demanded_layer_by_layer(base: Path) -> None:
    chosen = dry(base, pinned={"transformer": {TO_Q: "reference"}}).choices["transformer"]
    kernels = {choice.path: choice.kernel for choice in chosen}
    assert kernels[TO_Q] == "reference"
    assert set(kernels.values()) == {"reference", "cpu_fp8", "dense"}


def test_a_kernel_that_cannot_run_here_is_refused_with_the_reason(base: Path) -> None:
    with pytest.raises(KernelError, match="--kernel torch_scaled_mm cannot run fp8") as raised:
        dry(base, kernel="torch_scaled_mm")
    assert "needs cuda, this is cpu" in str(raised.value)


def test_an_unknown_dtype_is_refused_with_the_known(base: Path) -> None:
    with pytest.raises(UsageError, match="unknown dtype 'int7'") as raised:
        diffquant.load(str(base), transformer_path=str(FP8), device="cpu", dtype="int7")
    assert "bf16" in str(raised.value)


def test_an_inspection_is_json_with_its_stable_keys() -> None:
    told = json.loads(json.dumps(loading.inspect(str(FP8)).to_json()))
    assert {"format", "family", "evidence", "layers", "audit"} <= told.keys()
    layer = next(layer for layer in told["layers"] if layer["path"] == TO_Q)
    assert layer["shape"] == [128, 128]
    assert layer["encoding"] == {"name": "fp8", "options": {}}
    assert told["audit"] == {"ok": True, "problems": []}
