"""The forecast counts what is stored and the largest layer decoded."""

import json
from pathlib import Path

import pytest

from diffquant import headers, planner, sources
from diffquant.device import Device
from diffquant.forecast import COMPUTE_BYTES, forecast, stored_bytes
from diffquant.online import Online, requantized
from diffquant.plan import Plan
from diffquant.sources import PipelineFolder

FP8 = Path(__file__).parents[1] / "data" / "modelopt" / "flux" / "fp8"
CPU = Device(kind="cpu", arch="x86_64", name="a CPU")
GPU = Device(kind="cuda", arch="sm90", name="a GPU", sm=90)
LARGEST = 768 * 128  # weights of norm1.linear


@pytest.fixture(scope="module")
def plan() -> Plan:
    checkpoint = sources.checkpoint(str(FP8))
    header = headers.read(checkpoint.files)
    return planner.plan(checkpoint, header, config=checkpoint.config)


@pytest.fixture
def pipeline(tmp_path: Path) -> PipelineFolder:
    """A transformer that the plan replaces, and a VAE of 1000 bytes."""
    index = {"transformer": ["diffusers", "A"], "vae": ["diffusers", "B"]}
    for name, size in (("transformer", 5), ("vae", 1000)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(bytes(size))
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    return PipelineFolder(origin="base", root=tmp_path, index=index)


def test_stored_bytes_are_the_bytes_of_the_file_without_its_header(plan: Plan) -> None:
    header = headers.read([Path(plan.files[0].path)])
    assert stored_bytes(plan) == sum(tensor.nbytes for tensor in header.tensors.values())


def test_a_cpu_holds_everything_once_and_the_largest_layer_decoded(
    plan: Plan, pipeline: PipelineFolder
) -> None:
    peaks = forecast({"transformer": plan}, pipeline, CPU)
    assert peaks.device_peak_bytes == 0
    assert peaks.host_peak_bytes == stored_bytes(plan) + 1000 + LARGEST * COMPUTE_BYTES


def test_a_gpu_holds_the_weights_and_the_host_only_what_passes(
    plan: Plan, pipeline: PipelineFolder
) -> None:
    peaks = forecast({"transformer": plan}, pipeline, GPU)
    assert peaks.device_peak_bytes == stored_bytes(plan) + 1000 + LARGEST * COMPUTE_BYTES
    assert 1000 <= peaks.host_peak_bytes < peaks.device_peak_bytes


def test_quantizing_while_loading_holds_source_result_and_two_layers(
    pipeline: PipelineFolder,
) -> None:
    dense = dense_plan()
    plan = requantized(dense, Online(scheme="fp8", quantize_all=True))
    made = sum(n * k + 4 * n for n, k in (layer.shape_NK for layer in plan.layers))
    largest = max(n * k + n for n, k in (layer.shape_NK for layer in plan.layers)) * COMPUTE_BYTES
    load, draw = forecast({"transformer": plan}, pipeline, CPU).stages
    assert load.host == stored_bytes(dense) + made + 1000 + 2 * largest
    assert draw.host < load.host


def test_a_gpu_never_holds_what_it_was_made_from(pipeline: PipelineFolder) -> None:
    dense = dense_plan()
    plan = requantized(dense, Online(scheme="nvfp4", quantize_all=True))
    before, after = (forecast({"transformer": it}, pipeline, GPU).stages[1] for it in (dense, plan))
    assert after.device < 0.4 * before.device


def dense_plan() -> Plan:
    checkpoint = sources.checkpoint("emoji_flux/transformer")
    header = headers.read(checkpoint.files)
    return planner.plan(checkpoint, header, config=checkpoint.config)
