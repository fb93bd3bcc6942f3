"""Answers 1 and 2, layer by layer: with a LoRA on both sides, and with a kernel that lies."""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import diffquant
from diffquant.compare.comparison import Comparison
from diffquant.errors import RunError
from diffquant.linear import QuantLinear
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves

BASE = Path(diffquant.__file__).parent / "models" / "emoji_flux" / "transformer"
LIAR = "single_transformer_blocks.0.attn.to_v"
RANK = 2


def compared(**flags: Any) -> Comparison:
    return diffquant.compare(prompts=["car"], num_inference_steps=2, device="cpu", **flags)


def adapter(path: Path) -> str:
    """A LoRA that was never trained, on every attention query and value."""
    noise = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    with safe_open(BASE / "diffusion_pytorch_model.safetensors", "pt") as file:
        for name in file.keys():
            if name.endswith(("to_q.weight", "to_v.weight")):
                rows, columns = file.get_slice(name).get_shape()
                stem = f"transformer.{name.removesuffix('.weight')}"
                down = torch.randn(RANK, columns, generator=noise) * 0.1
                up = torch.randn(rows, RANK, generator=noise) * 0.1
                tensors |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
    save_file(tensors, path)
    return str(path)


def test_a_lora_is_on_both_sides_and_every_layer_is_judged(tmp_path: Path) -> None:
    plain, with_lora = compared(), compared(lora=(adapter(tmp_path / "noise.safetensors"),))
    (without,), (candidate,) = plain.candidates, with_lora.candidates
    assert not torch.equal(candidate.pairs[0].reference_frames, without.pairs[0].reference_frames)
    assert with_lora.ok
    assert "--lora" in candidate.command and "--lora" in with_lora.reference_command
    assert [layer.path for layer in candidate.layers] == [layer.path for layer in without.layers]
    for layer in candidate.layers:
        assert layer.output is not None and layer.weight is not None, layer.path
        assert layer.kernel is not None or layer.encoding == "dense", layer.path


def test_a_lora_on_one_side_only_is_refused(tmp_path: Path) -> None:
    saved = tmp_path / "reference.safetensors"
    compared(save_reference=saved)
    noise = adapter(tmp_path / "noise.safetensors")
    with pytest.raises(RunError, match="unfair: lora is 'none' for the reference and 'noise x 1'"):
        diffquant.compare(saved_reference=saved, device="cpu", lora=(noise,))


def test_a_kernel_that_lies_is_named_by_answer_2_though_the_file_is_right(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a swizzle forgotten by a kernel does: the weights are right and the product is not."""
    layers = import_module("diffquant.compare.layers")  # the package has a function of that name
    honest = layers.kernel_error

    def judge(module: QuantLinear, dry: Any, path: str, rows: Tensor) -> float:
        if path.endswith(LIAR):
            product = module.forward
            monkeypatch.setattr(module, "forward", lambda x: product(x).roll(1, -1), raising=False)
        return float(honest(module, dry, path, rows))

    monkeypatch.setattr(layers, "kernel_error", judge)
    found = compared()
    (candidate,) = found.candidates
    (worst,) = candidate.worst(lambda layer: layer.kernel, 1)
    assert worst.path == f"transformer.{LIAR}"
    assert found.first_failure is not None
    assert "worst kernel error" in found.first_failure
    assert not candidate.verdict.defects


def test_a_layer_left_unquantized_among_its_like_is_listed_and_no_defect(tmp_path: Path) -> None:
    left = "single_transformer_blocks.1.attn.to_v"
    base = str(tiny.tiny_flux_pipeline(tmp_path / "base", num_single_layers=3))
    kept: dict[str, Any] = {
        "quantization_ignored_layers": (left,),
        "save_quantized": str(tmp_path / "fp8"),
    }
    diffquant.load(base, quantization="fp8", quantize_all=True, device="cpu", **kept)
    found = diffquant.compare(
        base, prompts=["red car"], max_sequence_length=16, device="cpu", num_inference_steps=1,
        width=32, height=32, transformer_path=str(tmp_path / "fp8"),
    )  # fmt: skip
    (candidate,) = found.candidates
    assert candidate.left_unquantized() == [f"transformer.{left}"]
    assert not [text for text in candidate.verdict.defects if "transformer." in text]
    assert "left unquantized" in found.to_html()
