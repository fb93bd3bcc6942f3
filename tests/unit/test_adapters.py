"""The dry run of a LoRA: the same spellings, without torch."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffquant import cli, loading
from diffquant.adapters import Asked, parsed
from diffquant.errors import HeaderError, SourceError

BASE = "emoji_flux_modelopt_fp8"
N = K = 256
STEMS = {
    "diffusers": "transformer.single_transformer_blocks.0.attn.to_q",
    "PEFT": "base_model.model.single_transformer_blocks.0.attn.to_q",
    "Kohya": "lora_unet_single_blocks_0_linear2",
    "Comfy": "diffusion_model.single_blocks.0.linear2",
    "module names alone": "single_blocks.0.linear2",
}


def written(file: Path, stem: str, n: int = N, k: int = K, rank: int = 4) -> str:
    down, up = ("lora_down", "lora_up") if "linear2" in stem else ("lora_A", "lora_B")
    tensors = {f"{stem}.{down}.weight": torch.zeros(rank, k)}
    save_file({**tensors, f"{stem}.{up}.weight": torch.zeros(n, rank)}, file)
    return str(file)


@pytest.mark.parametrize("spelling", STEMS)
def test_every_spelling_is_understood(spelling: str, tmp_path: Path) -> None:
    stem = STEMS[spelling]
    file = written(tmp_path / "x.safetensors", stem, k=5 * K if "linear2" in stem else K)
    reach = loading.inspect_lora(file, BASE)
    assert (reach.spelling, reach.ranks, reach.unmatched) == (spelling, (4,), ())
    assert reach.ok
    assert reach.encoded == 1


def test_a_fused_projection_reaches_all_it_is_made_of(tmp_path: Path) -> None:
    file = written(tmp_path / "x.safetensors", "lora_unet_double_blocks_0_img_attn_qkv", n=3 * N)
    reach = loading.inspect_lora(file, BASE)
    assert reach.layers == 3
    assert reach.ok


def test_a_typed_lora_is_source_and_scale_and_maybe_a_component() -> None:
    assert parsed("org/repo@main") == Asked("org/repo@main")
    assert parsed("style.safetensors:0.5") == Asked("style.safetensors", 0.5)
    assert parsed("transformer_2=a:b:-2") == Asked("a:b", -2.0, "transformer_2")


def test_plan_forecasts_what_a_lora_would_reach(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = written(tmp_path / "x.safetensors", STEMS["PEFT"])
    assert cli.run(["plan", "--device", "cpu", "--lora", f"{file}:0.5"]) == 0
    assert "1 modules matched, 1 layers touched (1 encoded)" in capsys.readouterr().err


def test_another_shape_is_a_misfit(tmp_path: Path) -> None:
    file = written(tmp_path / "x.safetensors", STEMS["diffusers"], k=96)
    reach = loading.inspect_lora(file, BASE)
    assert reach.misfits == (f"{STEMS['diffusers']} is 256x256, the LoRA is for 256x96",)
    assert not reach.ok


def test_the_command_says_it_and_fails_for_another_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = written(tmp_path / "ours.safetensors", STEMS["PEFT"])
    foreign = written(tmp_path / "wan.safetensors", "diffusion_model.blocks.0.self_attn.q")
    assert cli.run(["inspect", BASE, "--lora", ours]) == 0
    assert "fits" in capsys.readouterr().out
    assert cli.run(["inspect", BASE, "--lora", foreign]) == 1
    assert "not matched  1, first diffusion_model.blocks.0" in capsys.readouterr().out
    with pytest.raises(SourceError):
        loading.inspect_lora(str(tmp_path / "none.safetensors"), BASE)


def test_a_lora_that_cannot_be_read_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    words = tmp_path / "words.safetensors"
    words.write_text("hello\n")
    with pytest.raises(HeaderError, match="is no weights file that can be read"):
        loading.dry_run(loading.ModelFlags(), loading.RunFlags(lora=(f"{words}:0.5",)))
    good = written(tmp_path / "good.safetensors", STEMS["diffusers"])
    loading.dry_run(loading.ModelFlags(), loading.RunFlags(lora=(good,)))
