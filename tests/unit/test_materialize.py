"""From a plan to the module itself: diffusers' own class, encoded layers encoded, all else plain."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffquant import device, headers, planner, sources
from diffquant.errors import PlanError
from diffquant.kernels import choose
from diffquant.linear import QuantLinear
from diffquant.materialize import materialize, skeleton
from diffquant.plan import Plan, Role

DATA = Path(__file__).resolve().parents[1] / "data"
FLUX = DATA / "modelopt" / "flux" / "fp8"
PLAIN = DATA / "modelopt" / "flux" / "bf16"
WAN = DATA / "modelopt" / "wan" / "fp8"
TO_Q = "transformer_blocks.0.attn.to_q"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def planned(folder: Path) -> Plan:
    checkpoint = sources.checkpoint(str(folder))
    return planner.plan(checkpoint, headers.read(checkpoint.files), config=checkpoint.config)


def built(plan: Plan, dtype: torch.dtype = torch.bfloat16, **wanted: object) -> nn.Module:
    choices = [choose(layer, device.parse("cpu")) for layer in plan.layers]
    return materialize(plan, choices, device=torch.device("cpu"), dtype=dtype, **wanted)  # type: ignore[arg-type]


def quantized(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    return ((name, it) for name, it in model.named_modules() if isinstance(it, QuantLinear))


def test_the_class_is_diffusers_own_and_every_layer_is_what_the_plan_says() -> None:
    from diffusers import FluxTransformer2DModel

    plan = planned(FLUX)
    model = built(plan)
    assert isinstance(model, FluxTransformer2DModel)
    assert {name for name, _ in quantized(model)} == {layer.path for layer in plan.quantized}
    assert not any(value.is_meta for value in (*model.parameters(), *model.buffers()))
    assert not model.training and not any(value.requires_grad for value in model.parameters())


def test_codes_and_scales_are_those_of_the_file() -> None:
    stored = load_file(FLUX / "diffusion_pytorch_model.safetensors")
    for name, layer in quantized(built(planned(FLUX))):
        parts = layer.parts(0)
        codes = stored[f"{name}.weight"]
        assert torch.equal(parts[Role.CODES].view(torch.uint8), codes.view(torch.uint8))
        assert torch.equal(parts[Role.TENSOR_SCALE], stored[f"{name}.weight_scale"])


def test_a_plain_checkpoint_becomes_exactly_what_diffusers_loads() -> None:
    from diffusers import FluxTransformer2DModel

    wanted = FluxTransformer2DModel.from_pretrained(PLAIN, torch_dtype=torch.bfloat16).state_dict()
    found = built(planned(PLAIN)).state_dict()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_wan_keeps_in_float32_what_its_class_keeps() -> None:
    model = built(planned(WAN))
    kept = model.get_submodule("condition_embedder.time_embedder.linear_1")
    assert kept.weight.dtype == torch.float32
    assert model.get_parameter("scale_shift_table").dtype == torch.float32
    assert model.get_submodule("blocks.0.attn1.to_q").weight.dtype == torch.bfloat16


def test_progress_counts_every_layer() -> None:
    plan, seen = planned(FLUX), []
    built(plan, on_layer=lambda done, total: seen.append((done, total)))
    assert seen == [(done, len(plan.layers)) for done in range(1, len(plan.layers) + 1)]


def test_computed_buffers_are_real() -> None:
    model = skeleton(planned(FLUX).config)
    assert all(value.is_meta for value in model.parameters())
    assert not any(value.is_meta for value in model.buffers())


def test_a_parameter_without_a_value_is_named() -> None:
    plan = planned(FLUX)
    short = dataclasses.replace(plan, plain=plan.plain[1:])
    with pytest.raises(PlanError, match="1 parameters .* got no value, first") as raised:
        built(short)
    assert repr(plan.plain[0].name) in str(raised.value)


def test_a_class_diffusers_does_not_have_is_named() -> None:
    with pytest.raises(PlanError, match="has no class 'FluxTransformer9DModel'") as raised:
        skeleton({"_class_name": "FluxTransformer9DModel"})
    assert "pip install --upgrade diffusers" in str(raised.value)


def drawn(model: nn.Module, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    with torch.no_grad():
        found: Tensor = model(
            hidden_states=random(1, 16, 64),
            encoder_hidden_states=random(1, 8, 96),
            pooled_projections=random(1, 64),
            timestep=torch.tensor([0.5]).to(dtype),
            guidance=torch.tensor([3.5]).to(dtype),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(8, 3),
            return_dict=False,
        )[0]
    return found.float()


def test_the_quantized_model_draws_nearly_what_its_base_draws() -> None:
    wanted = drawn(built(planned(PLAIN), torch.float32), torch.float32)
    ours = drawn(built(planned(FLUX), torch.float32), torch.float32)
    assert 1e-3 < (ours - wanted).norm() / wanted.norm() < 0.1


def test_a_model_cast_after_loading_draws_the_same() -> None:
    first = drawn(built(planned(FLUX), torch.float16), torch.float16)
    second = drawn(built(planned(FLUX), torch.float32).to(torch.float16), torch.float16)
    assert (first - second).norm() / second.norm() < 1e-2
