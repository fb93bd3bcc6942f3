"""The forecast counts what is stored and the largest layer decoded."""

import json
from pathlib import Path

import pytest

from diffquant import headers, planner, sources
from diffquant.device import Device
from diffquant.forecast import COMPUTE_BYTES, forecast, stored_bytes
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
