"""The forecast counts what headers tell, and child processes hold it to what they measure."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from diffquant import device, headers, loading, planner, sources
from diffquant.device import Device
from diffquant.forecast import CHUNKS, Forecast, canvas, forecast, recoded_bytes, stored_bytes
from diffquant.online import Online, requantized
from diffquant.plan import Plan
from diffquant.residence import BUDGET, Mode, Residence, bytes_of
from diffquant.resolve import ModelFlags
from diffquant.sources import PipelineFolder
from tests import tiny

FP8 = Path(__file__).parents[1] / "data" / "modelopt" / "flux" / "fp8"
PEAKS = Path(__file__).parents[1] / "peaks.py"
CPU = Device(kind="cpu", arch="x86_64", name="a CPU")
GPU = device.parse("sm89")
VAE = 1000  # bytes
#: How far a measured peak may be from its forecast.
TOLERANCE = 0.15
#: A FLUX of blocks of 70 and 170 MB.
WIDE = {"attention_head_dim": 128, "axes_dims_rope": [16, 56, 56], "num_attention_heads": 12}
#: Every weight of it stays decoded.
KEPT = {"memory_budget": "1GiB"}


@pytest.fixture(scope="module")
def plan() -> Plan:
    checkpoint = sources.checkpoint(str(FP8))
    header = headers.read(checkpoint.files)
    return planner.plan(checkpoint, header, config=checkpoint.config)


@pytest.fixture
def pipeline(tmp_path: Path) -> PipelineFolder:
    """A transformer that the plan replaces, and a VAE of 1000 bytes."""
    index = {"transformer": ["diffusers", "A"], "vae": ["diffusers", "B"]}
    header = json.dumps({"a": {"dtype": "U8", "shape": [VAE], "data_offsets": [0, VAE]}}).encode()
    for name in index:
        (tmp_path / name).mkdir()
        content = len(header).to_bytes(8, "little") + header + bytes(VAE)
        (tmp_path / name / "diffusion_pytorch_model.safetensors").write_bytes(content)
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    return PipelineFolder(origin="base", root=tmp_path, index=index)


def dense_plan() -> Plan:
    checkpoint = sources.checkpoint("emoji_flux/transformer")
    header = headers.read(checkpoint.files)
    return planner.plan(checkpoint, header, config=checkpoint.config)


def stages(peaks: Forecast) -> dict[str, tuple[int, int]]:
    return {stage.name: (stage.host, stage.device) for stage in peaks.stages}


# ---------------------------------------------------------------------------------------- from headers


def test_stored_bytes_are_the_bytes_of_the_file_without_its_header(plan: Plan) -> None:
    header = headers.read([Path(plan.files[0].path)])
    assert stored_bytes(plan) == sum(tensor.nbytes for tensor in header.tensors.values())


def test_a_cpu_reads_weights_where_they_are_mapped_when_they_are_needed(
    plan: Plan, pipeline: PipelineFolder
) -> None:
    found = stages(forecast({"transformer": plan}, pipeline, CPU))
    assert {on_device for _, on_device in found.values()} == {0}
    load, encode, denoise, decode = (host for host, _ in found.values())
    assert load < encode < denoise
    assert denoise - encode >= stored_bytes(plan)
    assert decode - denoise == VAE


def test_a_gpu_holds_all_weights_unless_they_wait_elsewhere(
    plan: Plan, pipeline: PipelineFolder
) -> None:
    def on_device(mode: Mode) -> int:
        living = Residence(mode=mode)
        return forecast({"transformer": plan}, pipeline, GPU, residence=living).device_peak_bytes

    assert on_device("none") == stored_bytes(plan) + VAE
    assert on_device("model") == stored_bytes(plan)
    assert on_device("layerwise") < on_device("model")


def test_blocks_that_stay_and_blocks_that_come_early_take_their_room(
    plan: Plan, pipeline: PipelineFolder
) -> None:
    def on_device(**wanted: int) -> int:
        living = Residence(mode="layerwise", **wanted)
        return forecast({"transformer": plan}, pipeline, GPU, residence=living).device_peak_bytes

    assert on_device(prefetch=0) < on_device(prefetch=1) < on_device(prefetch=2)
    assert on_device(prefetch=2) == on_device(prefetch=9)
    assert on_device(prefetch=0) < on_device(prefetch=0, resident=1)


def test_what_is_quantized_while_loading_replaces_its_source(pipeline: PipelineFolder) -> None:
    dense = dense_plan()
    plan = requantized(dense, Online(scheme="fp8", quantize_all=True))
    largest = max(n * k for n, k in (layer.shape_NK for layer in plan.layers)) * 2
    before = stages(forecast({"transformer": dense}, pipeline, CPU))
    after = stages(forecast({"transformer": plan}, pipeline, CPU))
    beside = after["load"][0] - before["load"][0] - recoded_bytes(plan)
    assert 2 * largest <= beside < 2.1 * largest
    assert after["denoise"][0] - CHUNKS < before["denoise"][0]


def test_a_gpu_never_holds_what_it_was_made_from(pipeline: PipelineFolder) -> None:
    dense = dense_plan()
    plan = requantized(dense, Online(scheme="nvfp4", quantize_all=True))
    before, after = (forecast({"transformer": it}, pipeline, GPU).stages[1] for it in (dense, plan))
    assert after.device < 0.4 * before.device


def test_larger_pictures_take_more_than_smaller_ones(plan: Plan, pipeline: PipelineFolder) -> None:
    def peak(**asked: int) -> int:
        drawn = canvas({"max_sequence_length": 16, **asked}, pipeline)
        return forecast({"transformer": plan}, pipeline, GPU, drawn=drawn).device_peak_bytes

    small = peak(width=256, height=256)
    assert small < peak(width=512, height=256) < peak(width=512, height=512)
    assert small < peak(width=256, height=256, num_images_per_prompt=2)
    assert small < peak(width=256, height=256, num_frames=9)


def test_what_stays_decoded_is_counted_up_to_the_budget(
    plan: Plan, pipeline: PipelineFolder
) -> None:
    choices = {
        "transformer": loading.choose_all(plan, CPU, loading.RunFlags(device="cpu"), "transformer")
    }

    def drawing(budget: int) -> int:
        found = forecast({"transformer": plan}, pipeline, CPU, choices=choices, budget=budget)
        return stages(found)["denoise"][0]

    weights = sum(n * k for n, k in (layer.shape_NK for layer in plan.quantized))
    assert drawing(1000) - drawing(0) == 1000
    assert drawing(1 << 40) - drawing(0) == 2 * weights  # in bfloat16


def test_kernels_that_keep_nothing_take_nothing_of_the_budget(
    plan: Plan, pipeline: PipelineFolder
) -> None:
    faithful = loading.RunFlags(device="cpu", numerics="faithful")
    choices = {"transformer": loading.choose_all(plan, CPU, faithful, "transformer")}
    given = {"choices": choices, "budget": 1 << 40}
    with_budget = forecast({"transformer": plan}, pipeline, CPU, **given)
    assert with_budget == forecast({"transformer": plan}, pipeline, CPU, choices=choices)


def test_a_canvas_counts_tokens_as_the_pipeline_does(pipeline: PipelineFolder) -> None:
    config = {"block_out_channels": [128, 256, 512, 512]}
    (pipeline.root / "vae" / "config.json").write_text(json.dumps(config))
    drawn = canvas({"width": 1024, "height": 512, "max_sequence_length": 256}, pipeline)
    assert (drawn.tokens, drawn.channels) == (64 * 32 + 256, 256)
    assert str(drawn) == "1024x512"


# ---------------------------------------------------------------------------------------- as measured


def measured(flags: dict[str, Any], request: dict[str, Any], cache: Path) -> dict[str, int]:
    """The peaks of a process of its own, which remembers times in `cache` only."""
    asked = json.dumps({"flags": {"device": "cpu", **flags}, "request": request})
    found = subprocess.run(
        [sys.executable, str(PEAKS), asked],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(cache)},
    )
    peaks: dict[str, int] = json.loads(found.stdout.splitlines()[-1])["stages"]
    return peaks


def foretold(flags: dict[str, Any], request: dict[str, Any]) -> dict[str, int]:
    model = {name: flags[name] for name in ("model_path", "quantization") if name in flags}
    budget = flags.get("memory_budget")
    run = loading.RunFlags(device="cpu", offload=flags.get("offload", "none"), memory_budget=budget)
    dry = loading.dry_run(ModelFlags(**model), run)
    folder = dry.resolution.pipeline
    peaks = forecast(
        dry.plans,
        folder,
        dry.device,
        choices=dry.choices,
        residence=dry.residence,
        drawn=canvas(request, folder),
        budget=bytes_of(BUDGET, budget) if budget else 0,
    )
    return {stage.name: stage.host for stage in peaks.stages}


def holds(flags: dict[str, Any], side: int, cache: Path) -> None:
    request = {
        "prompt": "red apple",
        "width": side,
        "height": side,
        "num_inference_steps": 2,
        "max_sequence_length": 16,
    }
    found, told = measured(flags, request, cache), foretold(flags, request)
    assert found == pytest.approx(told, rel=TOLERANCE)


linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads and resets /proc")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A FLUX of 310 MB: one double and two single blocks."""
    folder = tmp_path_factory.mktemp("models") / "wide"
    return str(tiny.tiny_flux_pipeline(folder, **WIDE, num_layers=1, num_single_layers=2))


@linux_only
def test_the_bundled_model_peaks_as_foretold(tmp_path: Path) -> None:
    holds({}, 64, tmp_path)


@linux_only
@pytest.mark.parametrize(
    "flags",
    [{"quantization": "fp8"}, {"quantization": "int8", **KEPT}, {"offload": "disk"}],
    ids=["fp8", "int8 kept decoded", "disk"],
)
def test_a_wide_model_peaks_as_foretold(wide: str, flags: dict[str, str], tmp_path: Path) -> None:
    holds({"model_path": wide, **flags}, 64, tmp_path)


@linux_only
def test_without_its_blocks_the_forecast_would_be_wrong(wide: str) -> None:
    """The tolerance tells streamed from resident."""
    request = {"width": 64, "height": 64, "max_sequence_length": 16}
    resident = foretold({"model_path": wide}, request)["denoise"]
    streamed = foretold({"model_path": wide, "offload": "disk"}, request)["denoise"]
    assert resident != pytest.approx(streamed, rel=0.05)
    encoded = {"model_path": wide, "quantization": "int8"}
    decoded = foretold({**encoded, **KEPT}, request)["denoise"]
    assert decoded != pytest.approx(foretold(encoded, request)["denoise"], rel=TOLERANCE)


@linux_only
@pytest.mark.long
@pytest.mark.parametrize("quantization", [None, "fp8", "nvfp4", "svdq_int4"])
@pytest.mark.parametrize("offload", ["none", "disk"])
def test_a_model_of_two_gigabytes_peaks_as_foretold(
    tmp_path: Path, quantization: str | None, offload: str
) -> None:
    folder = tiny.tiny_flux_pipeline(tmp_path / "large", **WIDE, num_layers=8, num_single_layers=10)
    flags = {"model_path": str(folder), "offload": offload}
    holds({**flags, **({"quantization": quantization} if quantization else {})}, 256, tmp_path)
