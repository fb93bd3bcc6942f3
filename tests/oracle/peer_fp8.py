"""SGLang's FP8 tool and ours on the same exports.

    PYTHONPATH=.:<site-packages of nvidia-modelopt 0.47.0> python tests/oracle/peer_fp8.py FOLDER

FOLDER is where `unzip sglang-*.whl 'sglang/multimodal_gen/tools/*'` went. Tiny FLUX.1, FLUX.2 and
Qwen-Image transformers are quantized and exported by ModelOpt, then built by both tools, each with
its own list of layers that stay. Prints how many tensors have the same name, dtype, shape and bytes,
and names what differs.
"""

import copy
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from diffusers import Flux2Transformer2DModel, FluxTransformer2DModel, QwenImageTransformer2DModel
from modelopt.torch.export import export_hf_checkpoint
from safetensors.torch import load_file
from torch import Tensor, nn

from benchmarks.convert import TOOL, _stub
from diffquant.converters._options import Writing
from diffquant.converters.build_modelopt_fp8_transformer import build

HEADS: dict[str, Any] = {"attention_head_dim": 16, "num_attention_heads": 2}


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).bfloat16()


def flux1() -> tuple[nn.Module, dict[str, Any]]:
    model = FluxTransformer2DModel(
        **HEADS,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 6, 6),
    )
    return model, {"pooled_projections": random(1, 32), **_ids(3)}


def flux2() -> tuple[nn.Module, dict[str, Any]]:
    model = Flux2Transformer2DModel(
        **HEADS,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        joint_attention_dim=32,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )
    return model, {"guidance": torch.tensor([4.0]), **_ids(4)}


def qwen_image() -> tuple[nn.Module, dict[str, Any]]:
    model = QwenImageTransformer2DModel(
        **HEADS,
        in_channels=16,
        out_channels=4,
        num_layers=2,
        joint_attention_dim=32,
        axes_dims_rope=(8, 4, 4),
    )
    mask = torch.ones(1, 8, dtype=torch.bool)
    return model, {"encoder_hidden_states_mask": mask, "img_shapes": [[(1, 4, 4)]]}


def _ids(axes: int) -> dict[str, Tensor]:
    return {"img_ids": torch.zeros(16, axes), "txt_ids": torch.zeros(8, axes)}


def exported(work: Path, made: Callable[[], tuple[nn.Module, dict[str, Any]]]) -> None:
    """bf16/, export/ and backbone.pt of one model, as ModelOpt writes them."""
    torch.manual_seed(0)
    model, inputs = made()
    model = model.bfloat16().eval()
    inputs |= {
        "hidden_states": random(1, 16, 16),
        "encoder_hidden_states": random(1, 8, 32),
        "timestep": torch.tensor([0.5], dtype=torch.bfloat16),
    }
    if getattr(model.config, "guidance_embeds", False):
        inputs["guidance"] = torch.tensor([4.0])
    model.save_pretrained(work / "bf16")
    with torch.no_grad():
        quantized = mtq.quantize(
            model, copy.deepcopy(mtq.FP8_DEFAULT_CFG), lambda each: each(**inputs)
        )
    torch.save({"model_state_dict": quantized.state_dict()}, work / "backbone.pt")
    export_hf_checkpoint(quantized, dtype=torch.bfloat16, export_dir=work / "export")


def stored(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same(one: Tensor, other: Tensor) -> bool:
    alike = one.dtype == other.dtype and one.shape == other.shape
    return alike and torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def compare(name: str, made: Callable[[], tuple[nn.Module, dict[str, Any]]], tool: Any) -> str:
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        exported(work, made)
        tool(
            modelopt_hf_dir=str(work / "export"),
            modelopt_backbone_ckpt=str(work / "backbone.pt"),
            output_dir=str(work / "theirs"),
            base_transformer_dir=str(work / "bf16"),
        )
        build(
            Writing(output_dir=work / "ours"),
            export=str(work / "export"),
            backbone=work / "backbone.pt",
            base=str(work / "bf16"),
        )
        ours, theirs = stored(work / "ours"), stored(work / "theirs")
        differ = [each for each in theirs if each not in ours or not same(ours[each], theirs[each])]
        more = sorted(ours.keys() - theirs.keys())
        ignored = [
            set(
                json.loads((work / each / "config.json").read_text())["quantization_config"][
                    "ignore"
                ]
            )
            for each in ("ours", "theirs")
        ]
    narrow = sum(each.dtype == torch.float8_e4m3fn for each in theirs.values())
    return (
        f"{name}: {len(theirs) - len(differ)} of {len(theirs)} tensors are equal, {narrow} in FP8; "
        f"theirs that differ: {differ or 'none'}; only ours: {more or 'none'}; "
        f"ignored by them alone: {sorted(ignored[1] - ignored[0]) or 'none'}"
    )


def main() -> None:
    _stub(Path(sys.argv[1]))
    tool = __import__(TOOL, fromlist=["x"]).build_modelopt_fp8_transformer
    for made in (flux1, flux2, qwen_image):
        print(compare(made.__name__, made, tool))


if __name__ == "__main__":
    main()
