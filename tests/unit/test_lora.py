"""LoRA beside encoded weights: the change it makes on dense ones, and refusals instead of NaN."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

import diffquant
from diffquant import cli, lora
from diffquant.device import parse
from diffquant.errors import UsageError
from diffquant.headers import read
from diffquant.kernels import choose
from diffquant.linear import QuantLinear
from diffquant.materialize import materialize
from diffquant.pieces import dense
from diffquant.planner import plan as planned
from diffquant.sources import Checkpoint
from diffquant.tensors import Weights
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves

SVDQ = Path(__file__).parents[1] / "data/nunchaku/tiny_flux/svdq-int4_r32-tiny-flux.safetensors"
ATTENTION = "single_transformer_blocks.0.attn.to_q"
RANK = 4


def pairs(modules: dict[str, nn.Linear], size: float = 0.05) -> dict[str, Tensor]:
    """A LoRA for the modules, as PEFT names it."""
    noise = torch.Generator().manual_seed(0)
    tensors = {}
    for path, module in modules.items():
        down = torch.randn(RANK, module.in_features, generator=noise) * size
        up = torch.randn(module.out_features, RANK, generator=noise) * size
        tensors |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
    return tensors


def linears(model: nn.Module, word: str = "attn") -> dict[str, Any]:
    return {
        f"transformer.{path}": module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and word in path
    }


def draw(pipeline: Any) -> Tensor:
    drawn = pipeline(
        "red apple",
        height=64,
        width=64,
        num_inference_steps=2,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    )
    return drawn.images


@pytest.fixture(scope="module")
def loaded() -> Any:
    return diffquant.load(device="cpu")


@pytest.fixture
def pipeline(loaded: Any) -> Any:
    yield loaded
    loaded.unload_lora_weights()


def test_an_adapter_comes_changes_weight_and_goes_without_a_trace(pipeline: Any) -> None:
    before = draw(pipeline)
    pipeline.load_lora_weights(pairs(linears(pipeline.transformer)), adapter_name="style")
    full = draw(pipeline)
    assert not torch.equal(full, before)
    pipeline.set_adapters(["style"], [0.0])
    assert torch.equal(draw(pipeline), before)
    pipeline.unload_lora_weights()
    assert torch.equal(draw(pipeline), before)
    assert lora.adapters(pipeline) == ()
    assert isinstance(pipeline.transformer.get_submodule(ATTENTION), QuantLinear)


def test_diffusers_own_loader_breaks_on_a_weight_that_does_not_exist(pipeline: Any) -> None:
    tensors = pairs(linears(pipeline.transformer))
    with pytest.raises(KeyError):
        type(pipeline).load_lora_weights(pipeline, tensors)


@pytest.mark.parametrize("low_cpu_mem_usage", [True, False])
def test_the_report_counts_what_matched_and_how_much_it_changes(
    pipeline: Any, low_cpu_mem_usage: bool
) -> None:
    tensors = pairs(linears(pipeline.transformer) | {"transformer.nowhere.proj": nn.Linear(8, 8)})
    pipeline.load_lora_weights(tensors, low_cpu_mem_usage=low_cpu_mem_usage)
    (adapter,) = lora.adapters(pipeline)
    assert len(adapter.matched) == len(linears(pipeline.transformer, "base_layer"))
    assert adapter.unmatched == ("transformer.nowhere.proj",)
    assert adapter.encoded > 10
    assert "1 not matched, first 'transformer.nowhere.proj'" in str(adapter)


def test_the_relative_change_is_that_of_the_weights(pipeline: Any) -> None:
    path = "proj_out"
    module = pipeline.transformer.get_submodule(path)
    tensors = pairs({f"transformer.{path}": module})
    pipeline.load_lora_weights(tensors)
    down, up = tensors.values()
    exact = (up @ down).norm() / module.weight.float().norm()
    assert not isinstance(module, QuantLinear)
    assert lora.adapters(pipeline)[0].change == pytest.approx(float(exact), rel=0.25)


def test_an_adapter_lands_in_the_dtype_of_the_model(pipeline: Any) -> None:
    pipeline.load_lora_weights(pairs(linears(pipeline.transformer)), adapter_name="style")
    layer = pipeline.transformer.get_submodule(ATTENTION)
    assert layer.lora_A["style"].weight.dtype == torch.bfloat16
    from peft import get_peft_model_state_dict

    kept = get_peft_model_state_dict(pipeline.transformer, adapter_name="style")
    assert all("lora" in name and tensor.isfinite().all() for name, tensor in kept.items())


def test_nothing_matched_is_an_error_and_leaves_the_pipeline_alone(pipeline: Any) -> None:
    foreign = pairs({"transformer.blocks.0.attn1.to_q": nn.Linear(8, 8)})
    with pytest.raises(UsageError, match="nothing .* matches a layer of the FluxPipeline"):
        pipeline.load_lora_weights(foreign)
    assert pipeline.get_list_adapters() == {}


def test_an_encoded_layer_cannot_grow_and_dora_is_refused(pipeline: Any) -> None:
    grown = pairs({f"transformer.{ATTENTION}": nn.Linear(999, 256)})
    with pytest.raises(UsageError, match="an encoded layer cannot grow"):
        pipeline.load_lora_weights(grown)
    tensors = pairs({f"transformer.{ATTENTION}": pipeline.transformer.get_submodule(ATTENTION)})
    tensors[f"transformer.{ATTENTION}.lora_magnitude_vector"] = torch.ones(256)
    with pytest.raises(UsageError, match="is a DoRA"):
        pipeline.load_lora_weights(tensors)


def test_fusing_is_refused_with_the_reason(pipeline: Any) -> None:
    pipeline.load_lora_weights(pairs(linears(pipeline.transformer)))
    with pytest.raises(UsageError, match="cannot be fused into 'transformer': weights stay"):
        pipeline.fuse_lora()
    with pytest.raises(UsageError, match="projections of 'transformer' cannot be fused"):
        pipeline.transformer.fuse_qkv_projections()
    assert draw(pipeline).isfinite().all()


BLOCK = "single_transformer_blocks.0.proj_out"
SPELLINGS = {
    "diffusers": f"transformer.{BLOCK}.lora_{{AB}}.weight",
    "kohya": "lora_unet_single_blocks_0_linear2.lora_{side}.weight",
    "comfy": "diffusion_model.single_blocks.0.linear2.lora_{side}.weight",
    "bfl": "single_blocks.0.linear2.lora_{side}.weight",
    "peft": f"base_model.model.{BLOCK}.lora_{{AB}}.weight",
    "bare": f"{BLOCK}.lora_{{AB}}.weight",
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_reaches_the_same_layer(
    pipeline: Any, tmp_path: Path, spelling: str
) -> None:
    module = pipeline.transformer.get_submodule(BLOCK)
    down, up = pairs({"x": module}).values()
    file = tmp_path / f"{spelling}.safetensors"
    stored = {
        SPELLINGS[spelling].format(side=side, AB=letter): tensor
        for side, letter, tensor in (("down", "A", down), ("up", "B", up))
    }
    save_file(stored, file)
    lora.load(pipeline, (str(file),))
    (adapter,) = lora.adapters(pipeline)
    assert adapter.matched == (f"transformer.{BLOCK}",)
    assert torch.equal(
        pipeline.transformer.get_submodule(BLOCK).lora_B[spelling].weight, up.bfloat16()
    )


def test_the_scale_of_a_peft_folder_counts(pipeline: Any, tmp_path: Path) -> None:
    module = pipeline.transformer.get_submodule(BLOCK)
    tensors = pairs({f"base_model.model.{BLOCK}": module})
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(f'{{"r": {RANK}, "lora_alpha": {RANK * 3}}}')
    lora.load(pipeline, [str(tmp_path)])
    up = pipeline.transformer.get_submodule(BLOCK).lora_B[tmp_path.name].weight
    assert torch.equal(up, (3 * tensors[f"base_model.model.{BLOCK}.lora_B.weight"]).bfloat16())


def test_names_no_converter_understands_are_told(pipeline: Any) -> None:
    tensors = pairs({"base_model.model.double_blocks.0.img_mod.lin": nn.Linear(8, 8)})
    with pytest.raises(UsageError, match="converter for a FluxPipeline does not understand"):
        pipeline.load_lora_weights(tensors)


def test_sources_have_scales_and_several_add_up(pipeline: Any, tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_file(pairs(linears(pipeline.transformer)), tmp_path / f"{name}.safetensors")
    lora.load(pipeline, [f"{tmp_path}/one.safetensors:0.25", f"{tmp_path}/two.safetensors:-0.25"])
    assert [(item.name, item.scale) for item in lora.adapters(pipeline)] == [
        ("one", 0.25),
        ("two", -0.25),
    ]
    both = draw(pipeline)
    pipeline.unload_lora_weights()
    assert (both - draw(pipeline)).abs().mean() < 0.02


def test_a_picture_tells_its_loras_and_is_drawn_again_with_them(
    pipeline: Any, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(pairs(linears(pipeline.transformer)), tmp_path / "style.safetensors")
    words = ["generate", "--prompt", "key", "--num-inference-steps", "2", "--device", "cpu"]
    assert cli.run([*words, "--lora", "style.safetensors:0.5", "--json"]) == 0
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert "lora style x 0.5: " in err
    assert told["report"]["lora"][0]["scale"] == 0.5
    (first,) = told["paths"]
    assert cli.run(["generate", "--config-from-metadata", first]) == 0
    second = capsys.readouterr().out.strip()
    assert cli.run(words) == 0
    third = capsys.readouterr().out.strip()
    pictures = [Image.open(path).tobytes() for path in (first, second, third)]
    assert pictures[0] == pictures[1] != pictures[2]


def test_a_lora_of_another_model_stops_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = pairs({"diffusion_model.blocks.0.self_attn.q": nn.Linear(8, 8)})
    save_file(foreign, tmp_path / "wan.safetensors")
    words = ["generate", "--prompt", "key", "--device", "cpu", "--lora"]
    assert cli.run([*words, f"{tmp_path}/wan.safetensors"]) == 2
    assert "matches a layer of the FluxPipeline" in capsys.readouterr().err
    assert cli.run([*words, f"{tmp_path}/missing.safetensors"]) == 1


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_offloaded_groups_and_adapters_go_together_bit_for_bit(pipeline: Any, level: str) -> None:
    from diffusers.hooks import HookRegistry

    tensors = pairs(linears(pipeline.transformer))
    pipeline.load_lora_weights(tensors, adapter_name="style")
    wanted = draw(pipeline)
    pipeline.unload_lora_weights()
    cpu = torch.device("cpu")
    pipeline.transformer.enable_group_offload(
        onload_device=cpu, offload_device=cpu, offload_type=level, num_blocks_per_group=1
    )
    pipeline.load_lora_weights(tensors, adapter_name="style")
    assert torch.equal(draw(pipeline), wanted)
    for module in pipeline.transformer.modules():
        registry = HookRegistry.check_if_exists_or_initialize(module)
        for name in list(registry.hooks):
            registry.remove_hook(name, recurse=False)


# pieced layers


@pytest.fixture(scope="module")
def nunchaku() -> tuple[Any, Any]:
    """The plan of a true Nunchaku file and its model: proj_out is two pieces along K."""
    checkpoint = Checkpoint(origin=SVDQ.name, root=SVDQ.parent, files=(SVDQ,), config={})
    plan = planned(checkpoint, read([SVDQ]), config={})
    place = parse("cpu")
    choices = [choose(layer, place, numerics="weight-only") for layer in plan.layers]
    model = materialize(plan, choices, device=torch.device("cpu"), dtype=torch.float32)
    return plan, model


@pytest.mark.parametrize(
    "path",
    ["single_transformer_blocks.0.proj_out", "transformer_blocks.0.ff.net.2", ATTENTION],
)
def test_a_lora_on_a_pieced_layer_is_the_lora_on_its_dense_weight(nunchaku: Any, path: str) -> None:
    plan, model = nunchaku
    layer = plan.layer(path)
    weight, bias = dense(layer, Weights([SVDQ]))
    tensors = pairs({path: model.get_submodule(path)})
    model.load_lora_adapter(dict(tensors), prefix=None, adapter_name="style")
    x = torch.randn(3, layer.shape_NK[1], generator=torch.Generator().manual_seed(1))
    adapted = model.get_submodule(path)(x)
    model.delete_adapters("style")
    model.unload_lora()
    down, up = tensors.values()
    wanted = nn.functional.linear(x, weight + up @ down, bias)
    assert _error(adapted, wanted) < 1e-4
    assert _error(adapted, nn.functional.linear(x, weight + 2 * up @ down, bias)) > 1e-3


def _error(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


# two experts


def test_each_of_two_experts_gets_its_own_adapter(tmp_path: Path) -> None:
    base = tiny.tiny_wan_pipeline(tmp_path / "wan", experts=2)
    for name in ("high", "low"):
        query = {"transformer.blocks.0.attn1.to_q": nn.Linear(128, 128)}
        save_file(pairs(query), tmp_path / f"{name}.safetensors")
    asked = (f"{tmp_path}/high.safetensors", f"transformer_2={tmp_path}/low.safetensors:0.5")
    online = {"quantization": "fp8", "quantize_all": True}
    pipeline = diffquant.load(str(base), lora=asked, device="cpu", **online)
    high, low = diffquant.report(pipeline).lora
    assert high.matched == ("transformer.blocks.0.attn1.to_q",)
    assert low.matched == ("transformer_2.blocks.0.attn1.to_q",)
    assert pipeline.get_list_adapters() == {"transformer": ["high"], "transformer_2": ["low"]}
    first, second = (
        part.blocks[0].attn1.to_q for part in (pipeline.transformer, pipeline.transformer_2)
    )
    assert isinstance(first.base_layer, QuantLinear)
    assert (first.scaling, second.scaling) == ({"high": 1.0}, {"low": 0.5})


def test_a_lora_too_wide_for_a_dense_layer_is_one_clear_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, file = tiny.tiny_flux_pipeline(tmp_path / "flux"), tmp_path / "wide.safetensors"
    path = "transformer.transformer_blocks.0.attn.to_q"
    wide = {f"{path}.lora_A.weight": torch.ones(4, 999), f"{path}.lora_B.weight": torch.ones(7, 4)}
    save_file(wide, file)
    words = ["generate", "--prompt", "red car", "--model-path", str(base), "--device", "cpu"]
    assert cli.run([*words, "--lora", str(file), "--output-path", str(tmp_path)]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-2].startswith(f"error: the LoRA '{file}' does not fit the FluxPipeline: ")
    assert lines[-1].startswith("hint: is it a LoRA of another model?")
    assert "unsuccessful" not in "".join(lines)
