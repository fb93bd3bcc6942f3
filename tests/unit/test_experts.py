"""Two experts: one missing, the same twice, exchanged, of another family, and right."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import diffquant
from diffquant import cli, experts, loading
from diffquant.errors import UsageError
from diffquant.linear import QuantLinear
from diffquant.resolve import ModelFlags
from tests import tiny

HERE = Path(__file__).parents[1]
WEIGHTS = "diffusion_pytorch_model.safetensors"

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wan2.2 with two experts whose norms were trained apart."""
    directory: Path = tmp_path_factory.mktemp("tiny") / "wan"
    tiny.tiny_wan_pipeline(directory, experts=2)
    for seed, name in enumerate(("transformer", "transformer_2")):
        torch.manual_seed(seed)
        file = directory / name / WEIGHTS
        tensors = load_file(file)
        for key, tensor in tensors.items():
            if tensor.dim() == 1 or "table" in key:
                tensors[key] = (tensor.float() + torch.randn(tensor.shape)).to(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def quantized(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An FP8 folder per expert: raw float8 codes with their scale, everything else as it was."""
    made = {}
    for name in ("transformer", "transformer_2"):
        folder = tmp_path_factory.mktemp("fp8") / name
        folder.mkdir()
        shutil.copy(base / name / "config.json", folder)
        save_file(dict(_encoded(load_file(base / name / WEIGHTS))), folder / WEIGHTS)
        config = json.loads((folder / "config.json").read_text())
        told = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": []}
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": told}))
        made[name] = str(folder)
    return made


def _encoded(tensors: dict[str, torch.Tensor]) -> Any:
    for key, tensor in tensors.items():
        if "attn" in key and key.endswith("to_q.weight"):
            scale = tensor.float().abs().max() / 448
            yield key, (tensor.float() / scale).to(torch.float8_e4m3fn)
            yield f"{key}_scale", scale
        else:
            yield key, tensor


def dry(base: Path, **paths: str) -> loading.DryRun:
    flags = ModelFlags(model_path=str(base), component_paths=paths)
    return loading.dry_run(flags, loading.RunFlags(device="cpu"))


def test_both_experts_in_their_places_are_confirmed_and_each_has_a_truth_line(
    base: Path, quantized: dict[str, str]
) -> None:
    held = dry(base, **quantized)
    sentences = [fired.sentence for fired in held.resolution.fired if fired.rule == "4c"]
    assert len(sentences) == 2
    first, second = held.truth_lines
    assert first.startswith("transformer: 4/")
    assert second.startswith("transformer_2: 4/")


def test_the_share_that_is_quantized_is_told_of_each(base: Path, quantized: dict[str, str]) -> None:
    flags = ModelFlags(
        model_path=str(base),
        component_paths={"transformer": quantized["transformer"]},
        component_quantizations={"transformer_2": "int8"},
        quantize_all=True,
    )
    held = loading.dry_run(flags, loading.RunFlags(device="cpu"))
    first, second = held.truth_lines
    assert first.startswith("transformer: 4/26 linears fp8 via")
    assert second.startswith("transformer_2: 26/26 linears int8 (online) via")
    assert any(note.startswith("they hold 9") for note in held.plans["transformer_2"].notes)


def test_exchanged_experts_are_refused(base: Path, quantized: dict[str, str]) -> None:
    swapped = {"transformer": quantized["transformer_2"], "transformer_2": quantized["transformer"]}
    with pytest.raises(UsageError, match="'transformer' was given the weights of 'transformer_2'"):
        dry(base, **swapped)
    with pytest.raises(UsageError) as caught:
        dry(base, transformer_2=quantized["transformer"])
    assert caught.value.hint == "exchange --transformer-2-path and --transformer-path"


def test_the_same_weights_twice_are_refused_copies_too(
    base: Path, quantized: dict[str, str], tmp_path: Path
) -> None:
    one = quantized["transformer"]
    with pytest.raises(UsageError, match="were given the same weights"):
        dry(base, transformer=one, transformer_2=one)
    copied = shutil.copytree(one, tmp_path / "copy")
    with pytest.raises(UsageError, match="in two copies"):
        dry(base, transformer=one, transformer_2=str(copied))


def test_a_missing_partner_is_told_with_its_flag(
    base: Path, quantized: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--model-path", str(base), "--device", "cpu"]
    assert cli.run([*words, "--transformer-path", quantized["transformer"]]) == 0
    assert "(to replace it: --transformer-2-path)" in "".join(capsys.readouterr())
    named = ["--component-paths.transformer_2", quantized["transformer_2"]]
    assert cli.run([*words, *named]) == 0
    assert "(to replace it: --transformer-path)" in "".join(capsys.readouterr())


def test_an_expert_of_another_family_is_refused(base: Path) -> None:
    flux = str(HERE / "data" / "modelopt" / "flux" / "fp8")
    with pytest.raises(UsageError, match="gives FluxTransformer2DModel"):
        dry(base, transformer_2=flux)


def test_a_base_without_weights_leaves_the_question_open(
    base: Path, quantized: dict[str, str], tmp_path: Path
) -> None:
    bare = shutil.copytree(base, tmp_path / "bare")
    for name in quantized:
        (bare / name / WEIGHTS).unlink()
    held = dry(bare, **quantized)
    assert [fired.rule for fired in held.resolution.fired if fired.rule.startswith("4")] == ["4d"]


def test_a_fingerprint_reads_every_kind_of_float(base: Path, tmp_path: Path) -> None:
    plan = loading.inspect(str(base / "transformer")).plan
    mine = experts.fingerprint(plan)
    truth = load_file(base / "transformer" / WEIGHTS)
    name, values = next(iter(mine.items()))
    assert list(values) == truth[name].flatten()[: experts.VALUES].float().tolist()
    half = torch.tensor([1.5, -2.0]).half().view(torch.uint8).numpy().tobytes()
    assert list(experts._DECODERS["F16"](half)) == [1.5, -2.0]


def test_the_loaded_pipeline_runs_both_experts(base: Path, quantized: dict[str, str]) -> None:
    pipeline = diffquant.load(str(base), component_paths=quantized, device="cpu")
    seen: list[str] = []
    for name in quantized:
        getattr(pipeline, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    pipeline(
        "red car",
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=4,
        guidance_scale=1.0,
        max_sequence_length=16,
    )
    assert set(seen) == set(quantized)
    for name in quantized:
        layers = [type(module) for module in getattr(pipeline, name).modules()]
        assert layers.count(QuantLinear) == 4
