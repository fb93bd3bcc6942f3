"""From one dialect to another and back, bit for bit; and what a dialect has no word for, refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffquant import exporting, headers, planner, sources
from diffquant.converters._options import Reading
from diffquant.converters.transcode import main, transcode
from diffquant.errors import ConvertError, FormatError, PlanError

DATA = Path(__file__).resolve().parents[1] / "data"
MODELOPT = DATA / "modelopt"
WAN, MIXED = MODELOPT / "wan" / "fp8", MODELOPT / "wan" / "mixed"
FLUX, FLUX_FP4 = MODELOPT / "flux" / "fp8", MODELOPT / "flux" / "nvfp4_single"
NUNCHAKU = DATA / "nunchaku" / "tiny_flux" / "svdq-int4_r32-tiny-flux.safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def bits(path: Path) -> dict[str, bytes]:
    """Every stored tensor as bytes, its dtype and shape in front."""
    found = {}
    for name, tensor in load_file(path).items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        found[name] = f"{tensor.dtype} {list(tensor.shape)} ".encode() + raw
    return found


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as opened:
        return dict(opened.metadata())


@pytest.mark.parametrize("source", [MIXED, FLUX_FP4], ids=["wan", "flux"])
def test_modelopt_nvfp4_comes_back_from_comfy_bit_for_bit(source: Path, tmp_path: Path) -> None:
    comfy, back = tmp_path / "comfy.safetensors", tmp_path / "back"
    there = transcode(str(source), comfy, to="comfy")
    home = transcode(str(comfy), back, to="modelopt", reading=Reading(base=str(source)))
    assert (there.verdict, home.verdict) == ("lossless", "lossless")
    assert bits(back / WEIGHTS) == bits(source / WEIGHTS)
    assert bits(comfy).keys() != bits(source / WEIGHTS).keys()


def test_a_nibble_order_taken_wrong_on_the_way_does_not_come_back(tmp_path: Path) -> None:
    comfy, back = tmp_path / "comfy.safetensors", tmp_path / "back"
    transcode(str(FLUX_FP4), comfy, to="comfy")
    transcode(
        str(comfy), back, to="modelopt", reading=Reading(base=str(FLUX_FP4), nvfp4_nibbles="low")
    )
    changed = bits(back / WEIGHTS).items() ^ bits(FLUX_FP4 / WEIGHTS).items()
    assert {name.rpartition(".")[2] for name, _ in changed} == {"weight"}


def test_modelopt_fp8_becomes_comfys_under_the_original_names(tmp_path: Path) -> None:
    done = transcode(str(WAN), tmp_path / "wan.safetensors", to="comfy")
    held, made = load_file(WAN / WEIGHTS), load_file(done.files[0])
    assert done.verdict == "lossless"
    one, other = "blocks.0.attn1.to_q", "blocks.0.self_attn.q"
    for ending in ("weight_scale", "input_scale", "bias"):
        assert torch.equal(made[f"{other}.{ending}"], held[f"{one}.{ending}"])
    said = json.loads(metadata(done.files[0])["_quantization_metadata"])["layers"]
    assert said[other] == {"format": "float8_e4m3fn"}


def test_a_nunchaku_file_comes_out_as_the_bytes_it_was(tmp_path: Path) -> None:
    done = transcode(str(NUNCHAKU), tmp_path / "again.safetensors", to="nunchaku")
    assert bits(NUNCHAKU) == bits(done.files[0])
    said = json.loads(metadata(done.files[0])["quantization_config"])
    assert said == json.loads(metadata(NUNCHAKU)["quantization_config"])


@pytest.mark.parametrize(
    ("source", "to", "reason"),
    [
        (NUNCHAKU, "modelopt", "modelopt has one weight for it"),
        (FLUX, "comfy", "has a tensor_scale of its own"),
        (FLUX, "nunchaku", "nunchaku files hold int4 and nvfp4, and"),
        (WAN, "bfl", "family 'wan' has no such names"),
        (WAN, "diffusers", "diffusers files hold dense, and .* is fp8"),
        (MODELOPT / "layers" / "int8_sq", "comfy", "has a input_scale, for which comfy"),
        (MODELOPT / "layers" / "nvfp4_svdquant", "comfy", "for which comfy has no place"),
        (MODELOPT / "layers" / "int4_awq", "fp8", "fp8 files hold fp8, and .* is int4"),
        (DATA / "comfy" / "svdquant_w4a4.safetensors", "modelopt", "modelopt means multiply"),
        (DATA / "comfy" / "int8_convrot.safetensors", "modelopt", "is rotated"),
    ],
    ids=lambda value: value.stem if isinstance(value, Path) else None,
)
def test_what_cannot_be_said_is_refused_with_the_layer_and_the_reason(
    source: Path, to: str, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(FormatError, match=reason):
        transcode(str(source), tmp_path / "out.safetensors", to=to)
    assert not list(tmp_path.iterdir())


def test_another_meaning_of_the_inputs_is_a_loss_that_is_said(tmp_path: Path) -> None:
    source = DATA / "comfy" / "int8.safetensors"
    done = transcode(str(source), tmp_path / "out", to="modelopt")
    assert "int8:token:dynamic before, int8:tensor:dynamic after" in done.verdict
    assert (tmp_path / "out" / "config.json").exists()


def test_a_plain_model_is_not_transcoded(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="is quantized") as refusal:
        transcode(str(MODELOPT / "flux" / "bf16"), tmp_path / "out", to="modelopt")
    assert "--to diffusers" in str(refusal.value)


def test_plain_weights_may_be_rewritten_as_plain_weights(tmp_path: Path) -> None:
    source = MODELOPT / "wan" / "bf16"
    transcode(str(source), tmp_path / "out", to="diffusers")
    assert bits(tmp_path / "out" / WEIGHTS) == bits(source / WEIGHTS)


def test_one_file_dialects_want_a_file_name(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="is one file"):
        transcode(str(WAN), tmp_path / "folder", to="comfy")


def test_a_value_is_never_rounded_into_the_dialects_dtype(tmp_path: Path) -> None:
    """A scale that float32 cannot hold is no ModelOpt scale."""
    folder = shutil.copytree(MODELOPT / "layers" / "fp8_pc_pt", tmp_path / "wide")
    tensors = load_file(folder / WEIGHTS)
    (scale,) = (name for name in tensors if name.endswith("weight_scale"))
    tensors[scale] = tensors[scale].double() * (1 + 2**-40)
    (folder / WEIGHTS).chmod(0o644)
    save_file(tensors, folder / WEIGHTS)
    checkpoint = sources.checkpoint(str(folder))
    plan = planner.plan(checkpoint, headers.read(checkpoint.files), config=checkpoint.config)
    with pytest.raises(FormatError, match="is F64 and no exact F32"):
        exporting.save(exporting.prepare(plan, "modelopt"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_dry_run_says_what_would_be_written_and_writes_nothing(tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    done = CliRunner().invoke(main, [str(WAN), str(output), "--to", "comfy", "--dry-run"])
    assert done.exit_code == 0
    assert "quantized linears, modelopt to comfy: lossless" in done.output
    assert "nothing written" in done.output
    assert not list(tmp_path.iterdir())


def test_the_command_writes_and_does_not_overwrite(tmp_path: Path) -> None:
    output = tmp_path / "out.safetensors"
    arguments = [str(WAN), str(output), "--to", "comfy"]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code != 0
    assert "exists" in again.output
    assert CliRunner().invoke(main, [*arguments, "--overwrite"]).exit_code == 0


def test_a_comfy_file_without_config_needs_its_base(tmp_path: Path) -> None:
    comfy = tmp_path / "comfy.safetensors"
    transcode(str(MIXED), comfy, to="comfy")
    with pytest.raises((PlanError, ConvertError, FormatError)):
        transcode(str(comfy), tmp_path / "out", to="modelopt", reading=Reading(base=str(FLUX)))


def test_the_file_is_decoded_again_and_says_that_nothing_was_lost(tmp_path: Path) -> None:
    done = transcode(str(WAN), tmp_path / "out.safetensors", to="comfy", max_error=0.0)
    assert len(done.report.layers) == len(done.plan.quantized)
    assert done.report.sentence.endswith("layers decode to the same weights")
