"""Any dialect as plain weights: true files, the same files renamed and resharded, and refusals."""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from click.testing import CliRunner
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffquant.converters._options import Reading
from diffquant.converters._progress import Bar
from diffquant.converters.dequantize import dequantize, main
from diffquant.errors import ConvertError, FormatError, PlanError
from diffquant.families import FAMILIES, spelled

DATA = Path(__file__).resolve().parents[1] / "data"
MODELOPT = DATA / "modelopt"
FLUX, WAN, Z_IMAGE = MODELOPT / "flux", MODELOPT / "wan", MODELOPT / "z_image"
TINY_FLUX = DATA / "nunchaku" / "tiny_flux"
STEM = "diffusion_pytorch_model"

Tensors = dict[str, Tensor]


def read(folder: Path) -> Tensors:
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


def error(found: Tensor, truth: Tensor) -> float:
    return float((found.float() - truth.float()).norm() / truth.float().norm())


def require_near(found: Tensors, base: Mapping[str, Tensor], limit: float) -> None:
    """The same parameters; matrices within `limit`, and everything else as in the base."""
    assert found.keys() == base.keys()
    for name, truth in base.items():
        assert found[name].shape == truth.shape, name
        is_weight = name.endswith(".weight") and truth.dim() == 2
        if is_weight:
            assert error(found[name], truth) <= limit, name
        else:
            assert torch.equal(found[name].to(truth.dtype), truth), name


def require_loads(folder: Path) -> None:
    """diffusers takes every tensor and misses none."""
    found = getattr(diffusers, config(folder)["_class_name"])
    _, told = found.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(told.values()), told


def save(path: Path, tensors: Tensors, **metadata: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata or None)
    return path


@pytest.fixture(scope="module")
def plain_flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What ModelOpt's FP8 export of FLUX stands for."""
    output = tmp_path_factory.mktemp("flux") / "plain"
    dequantize(str(FLUX / "fp8"), output)
    return output


def require_same(made: Path, truth: Path) -> None:
    ours, theirs = read(made), read(truth)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


# true files --------------------------------------------------------------------------------------


def test_modelopt_fp8_comes_back_near_its_base_and_loads_strictly(plain_flux: Path) -> None:
    require_near(read(plain_flux), read(FLUX / "bf16"), 0.0265)
    assert {tensor.dtype for tensor in read(plain_flux).values()} == {torch.bfloat16}
    assert "quantization_config" not in config(plain_flux)
    require_loads(plain_flux)


@pytest.mark.parametrize(
    ("source", "limit"), [(WAN / "fp8", 0.0265), (DATA / "settle" / "wan_nvfp4_swizzle", 0.097)]
)
def test_wan_comes_back_with_its_float32_modules(
    source: Path, limit: float, tmp_path: Path
) -> None:
    dequantize(str(source), tmp_path / "plain", reading=Reading(base=str(WAN / "bf16")))
    found, base = read(tmp_path / "plain"), read(WAN / "bf16")
    require_near(found, base, limit)
    kept = diffusers.WanTransformer3DModel._keep_in_fp32_modules
    for name, value in found.items():
        is_kept = any(word in name.split(".") for word in kept)
        assert value.dtype == (torch.float32 if is_kept else torch.bfloat16), name
    require_loads(tmp_path / "plain")


def test_sizes_that_fill_no_tile_come_back(tmp_path: Path) -> None:
    """48 wide, its scales swizzled into padded tiles of 128 x 4."""
    written = dequantize(str(Z_IMAGE / "nvfp4_swizzle"), tmp_path / "plain")
    torch.manual_seed(0)
    settings = {key: value for key, value in written.plan.config.items() if key[0] != "_"}
    base = diffusers.ZImageTransformer2DModel(**settings).to(torch.bfloat16)
    require_near(read(tmp_path / "plain"), base.state_dict(), 0.106)
    require_loads(tmp_path / "plain")


def test_scales_that_only_tiles_explain_are_not_taken_as_rows(tmp_path: Path) -> None:
    typed = Reading(scale_layout="linear")
    with pytest.raises(FormatError, match=r"has shape \[384, 8\] and --scale-layout linear"):
        dequantize(str(DATA / "settle" / "wan_nvfp4_swizzle"), tmp_path / "plain", reading=typed)


def test_nunchaku_comes_back_bit_for_bit(tmp_path: Path) -> None:
    dequantize(str(TINY_FLUX / "svdq-int4_r32-tiny-flux.safetensors"), tmp_path / "plain")
    sums = json.loads((TINY_FLUX / "expected_dense_int4_bf16.json").read_text())
    found = read(tmp_path / "plain")
    for name, expected in sums.items():
        raw = found[name].contiguous().view(torch.uint8).numpy().tobytes()
        assert hashlib.sha256(raw).hexdigest()[:16] == expected, name
    require_loads(tmp_path / "plain")


# the same weights in other clothes ---------------------------------------------------------------


def comfy(tensors: Tensors) -> tuple[Tensors, dict[str, str]]:
    """ComfyUI's older names, in a file without metadata."""
    endings = {"weight_scale": "scale_weight", "input_scale": "scale_input"}
    renamed = {}
    for name, tensor in tensors.items():
        stem, _, ending = name.rpartition(".")
        renamed[f"model.diffusion_model.{stem}.{endings.get(ending, ending)}"] = tensor
    marker = {"model.diffusion_model.scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    return renamed | marker, {}


def marked(tensors: Tensors) -> tuple[Tensors, dict[str, str]]:
    """ComfyUI's newer names: a JSON tensor says the format of each layer."""
    text = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    layers = [
        name.removesuffix(".weight")
        for name, tensor in tensors.items()
        if tensor.dtype == torch.float8_e4m3fn
    ]
    markers = {f"diffusion_model.{layer}.comfy_quant": text.clone() for layer in layers}
    return {f"diffusion_model.{name}": value for name, value in tensors.items()} | markers, {}


def in_metadata(tensors: Tensors) -> tuple[Tensors, dict[str, str]]:
    """The declaration in the header alone."""
    block = config(FLUX / "fp8")["quantization_config"]
    return tensors, {"quantization_config": json.dumps(block)}


def generic(tensors: Tensors) -> tuple[Tensors, dict[str, str]]:
    return tensors, {
        "quantization_config": json.dumps({"quant_method": "fp8", "activation_scheme": "static"})
    }


@pytest.mark.parametrize("dressed", [comfy, marked, in_metadata, generic])
def test_a_single_file_of_another_dialect_comes_back_alike(
    dressed: Callable[[Tensors], tuple[Tensors, dict[str, str]]], plain_flux: Path, tmp_path: Path
) -> None:
    tensors, metadata = dressed(read(FLUX / "fp8"))
    file = save(tmp_path / "weights" / "model.safetensors", tensors, **metadata)
    dequantize(str(file), tmp_path / "plain", reading=Reading(base=str(FLUX / "bf16")))
    require_same(tmp_path / "plain", plain_flux)


def test_shards_in_any_cut_come_back_alike(plain_flux: Path, tmp_path: Path) -> None:
    """Scales in other shards than their codes, as nothing forbids."""
    folder = tmp_path / "sharded"
    items = sorted(read(FLUX / "fp8").items(), key=lambda item: item[0][::-1])
    where = {}
    for number in range(3):
        file = f"{STEM}-{number + 1:05}-of-00003.safetensors"
        save(folder / file, dict(items[number::3]))
        where |= {name: file for name, _ in items[number::3]}
    index = {"metadata": {}, "weight_map": where}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(FLUX / "fp8" / "config.json", folder)
    dequantize(str(folder), tmp_path / "plain")
    require_same(tmp_path / "plain", plain_flux)


@pytest.mark.parametrize(("family", "naming"), [("wan", "original"), ("wan", "sglang")])
def test_names_of_other_projects_come_back_as_diffusers_spells_them(
    family: str, naming: str, tmp_path: Path
) -> None:
    names = FAMILIES.load(family).namings[naming]
    renamed = {}
    for name, tensor in read(WAN / "fp8").items():
        stem, _, ending = name.rpartition(".")
        is_scale = ending in ("weight_scale", "input_scale")
        stored = f"{spelled(names, stem)[0]}.{ending}" if is_scale else spelled(names, name)[0]
        renamed[stored] = tensor
    folder = tmp_path / "renamed"
    save(folder / "model.safetensors", renamed)
    shutil.copy(WAN / "fp8" / "config.json", folder)
    assert renamed.keys() != read(WAN / "fp8").keys()
    dequantize(str(folder), tmp_path / "plain")
    require_near(read(tmp_path / "plain"), read(WAN / "bf16"), 0.0265)


def test_a_plain_component_comes_back_as_it_was(tmp_path: Path) -> None:
    dequantize(str(FLUX / "bf16"), tmp_path / "plain")
    require_same(tmp_path / "plain", FLUX / "bf16")


# what is written ---------------------------------------------------------------------------------


def test_small_shards_have_an_index_and_load(plain_flux: Path, tmp_path: Path) -> None:
    written = dequantize(str(FLUX / "fp8"), tmp_path / "plain", max_shard_size=1_000_000)
    assert len(written.shards) > 2
    assert (tmp_path / "plain" / f"{STEM}.safetensors.index.json").exists()
    require_same(tmp_path / "plain", plain_flux)
    require_loads(tmp_path / "plain")


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("f32", "float32"), ("fp16", "float16")])
def test_another_dtype_may_be_asked_for(dtype: str, torch_dtype: str, tmp_path: Path) -> None:
    dequantize(str(FLUX / "fp8"), tmp_path / "plain", dtype=dtype)
    (file,) = (tmp_path / "plain").glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        assert opened.get_tensor("x_embedder.weight").dtype == getattr(torch, torch_dtype)


def test_progress_ends_at_the_whole(tmp_path: Path) -> None:
    shown = Progress(disable=True)
    done = dequantize(str(FLUX / "fp8"), tmp_path / "plain", bars=Bar(shown))
    decoding, checking = shown.tasks
    assert decoding.completed == decoding.total == done.total_size
    assert checking.completed == checking.total


def test_nothing_is_left_where_decoding_stops(tmp_path: Path) -> None:
    tensors = read(FLUX / "fp8")
    tensors["x_embedder.weight_scale"] = torch.tensor(1e6)
    folder = tmp_path / "large"
    save(folder / "model.safetensors", tensors)
    shutil.copy(FLUX / "fp8" / "config.json", folder)
    with pytest.raises(ConvertError, match=r"'x_embedder.weight' reaches \d+, fp16 ends at 65504"):
        dequantize(str(folder), tmp_path / "plain", dtype="fp16")
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


def test_a_scale_that_is_missing_stops_before_anything_is_written(tmp_path: Path) -> None:
    tensors = read(FLUX / "fp8")
    del tensors["x_embedder.weight_scale"]
    folder = tmp_path / "dropped"
    save(folder / "model.safetensors", tensors)
    shutil.copy(FLUX / "fp8" / "config.json", folder)
    with pytest.raises(PlanError, match=r"'x_embedder.weight' is fp8 without its scale"):
        dequantize(str(folder), tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_a_file_that_says_nothing_asks_for_its_config(tmp_path: Path) -> None:
    file = save(tmp_path / "model.safetensors", read(FLUX / "fp8"))
    with pytest.raises(FormatError, match="nothing in it says how"):
        dequantize(str(file), tmp_path / "plain")


def test_weights_of_no_known_class_ask_for_a_base(tmp_path: Path) -> None:
    file = save(tmp_path / "model.safetensors", {"layers.0.weight": torch.ones(2, 2)})
    with pytest.raises(ConvertError, match="which diffusers class") as raised:
        dequantize(str(file), tmp_path / "plain")
    assert "--base" in str(raised.value)


def test_the_command_tells_what_it_did(tmp_path: Path) -> None:
    ran = CliRunner().invoke(main, [str(FLUX / "fp8"), str(tmp_path / "plain")])
    assert ran.exit_code == 0, ran.output
    assert ran.stdout.startswith("33 of 36 linears decoded from modelopt; 0.00 GB of bf16: ")
    again = CliRunner().invoke(main, [str(FLUX / "fp8"), str(tmp_path / "plain")])
    assert again.exit_code == 1
    assert "hint: --overwrite" in again.stderr


def test_what_decoding_lost_is_one_rounding_and_is_told(tmp_path: Path) -> None:
    done = dequantize(str(FLUX / "fp8"), tmp_path / "plain", report=tmp_path / "all.json")
    errors = [each["relative_error"] for each in json.loads((tmp_path / "all.json").read_text())]
    assert len(errors) == len(done.plan.quantized) == len(done.report.layers)
    assert 0 < max(errors) < 2**-8
    exact = dequantize(str(FLUX / "fp8"), tmp_path / "wide", dtype="f32", max_error=0.0)
    assert exact.report.layers[0].fidelity is not None


def test_a_dry_run_writes_nothing(tmp_path: Path) -> None:
    typed = [str(FLUX / "fp8"), str(tmp_path / "plain"), "--dry-run"]
    ran = CliRunner().invoke(main, typed)
    assert "33 of 36 linears decoded from modelopt" in ran.stdout
    assert "nothing written (--dry-run)" in ran.stdout
    assert not list(tmp_path.iterdir())
