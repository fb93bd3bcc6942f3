"""QuantLinear: what diffusers, PEFT, accelerate and torch.compile ask of a linear, on true layers."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffquant import device, headers, planner, sources
from diffquant.kernels import Numerics, choose
from diffquant.linear import QuantLinear
from diffquant.materialize import materialize
from diffquant.pieces import dense
from diffquant.plan import Plan, Role
from diffquant.tensors import Weights

NATIVE = Path(__file__).resolve().parents[1] / "data" / "modelopt" / "native"
SCHEMES = ("fp8", "int8_sq", "mxfp8", "nvfp4")
PATH = "transformer_blocks.0.attn.to_q"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def planned(scheme: str) -> Plan:
    checkpoint = sources.checkpoint(str(NATIVE / scheme))
    return planner.plan(checkpoint, headers.read(checkpoint.files), config=checkpoint.config)


def model(
    scheme: str, dtype: torch.dtype = torch.float32, numerics: Numerics = "weight-only"
) -> nn.Module:
    plan, place = planned(scheme), device.parse("cpu")
    choices = [choose(layer, place, numerics=numerics) for layer in plan.layers]
    return materialize(plan, choices, device=torch.device("cpu"), dtype=dtype)


def linear(scheme: str, dtype: torch.dtype = torch.float32) -> QuantLinear:
    found = model(scheme, dtype).get_submodule(PATH)
    assert isinstance(found, QuantLinear)
    return found


def stored_bytes(layer: QuantLinear) -> dict[str, bytes]:
    """Every buffer that no dtype may touch."""
    following = ("smooth", "nan")
    return {
        name: buffer.reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, buffer in layer.named_buffers()
        if not name.endswith(following)
    }


def inputs(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_computes_what_its_dense_weight_would(scheme: str) -> None:
    plan, layer = planned(scheme), linear(scheme)
    weight, bias = dense(plan.layer(PATH), Weights([Path(file.path) for file in plan.files]))
    wanted = nn.functional.linear(inputs(), weight, bias)
    assert torch.allclose(layer(inputs()), wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(layer(inputs().flip(-1)), wanted, rtol=1e-2, atol=1e-2)


def test_it_answers_as_a_linear_does() -> None:
    layer = linear("fp8", torch.bfloat16)
    assert isinstance(layer, nn.Linear)
    assert (layer.in_features, layer.out_features) == (32, 32)
    assert layer.weight.shape == (32, 32)
    assert layer.weight.dtype == torch.bfloat16
    assert layer.weight.device.type == "cpu"
    assert layer.bias is not None and layer.bias.shape == (32,)
    assert "fp8" in repr(layer)


def test_its_weight_holds_no_memory_and_nothing_but_nan() -> None:
    weight = linear("fp8").weight
    assert weight.untyped_storage().nbytes() == 4
    assert bool(weight.isnan().all())


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("cast", ["to", "half", "double", "to_device_and_dtype"])
def test_a_cast_leaves_codes_and_scales_as_they_lie_in_the_file(scheme: str, cast: str) -> None:
    layer = linear(scheme, torch.bfloat16)
    before = stored_bytes(layer)
    casts = {
        "to": lambda: layer.to(torch.float16),
        "half": layer.half,
        "double": layer.double,
        "to_device_and_dtype": lambda: layer.to("cpu", torch.float16),
    }
    casts[cast]()
    wanted = torch.float64 if cast == "double" else torch.float16
    assert stored_bytes(layer) == before
    assert layer.bias is not None
    assert layer.bias.dtype == layer.weight.dtype == wanted
    if Role.SMOOTH in layer.terms[0].names:
        assert layer.parts(0)[Role.SMOOTH].dtype == wanted


def test_a_cast_model_still_computes() -> None:
    layer = linear("int8_sq", torch.float32)
    before = layer(inputs())
    after = layer.to(torch.bfloat16)(inputs(torch.bfloat16))
    assert after.dtype == torch.bfloat16
    assert (after.float() - before).norm() / before.norm() < 0.02


def test_a_move_to_meta_and_back_keeps_every_shape_and_dtype() -> None:
    layer = linear("nvfp4")
    before = {name: (buffer.shape, buffer.dtype) for name, buffer in layer.named_buffers()}
    layer.to("meta")
    assert all(buffer.is_meta for buffer in layer.buffers())
    assert layer.weight.is_meta
    layer.to_empty(device="cpu")
    assert {name: (held.shape, held.dtype) for name, held in layer.named_buffers()} == before


def test_a_move_to_meta_with_a_dtype_casts_nothing_stored() -> None:
    layer = linear("fp8").to("meta", torch.float16)
    codes = layer.parts(0)[Role.CODES]
    assert codes.is_meta and codes.dtype == torch.float8_e4m3fn
    assert layer.bias is not None and layer.bias.dtype == torch.float16


def test_a_copy_and_a_state_dict_carry_the_layer() -> None:
    layer = linear("nvfp4")
    twin = copy.deepcopy(layer)
    for buffer in twin.buffers():
        buffer.zero_()
    assert not torch.equal(twin(inputs()), layer(inputs()))
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(linear("nvfp4")(inputs()), layer(inputs()))
    assert "nan" not in layer.state_dict()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiling_finds_no_graph_break(scheme: str, backend: str) -> None:
    layer = linear(scheme)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    with torch.no_grad():
        assert torch.equal(compiled(inputs()), layer(inputs()))


def test_saving_a_loaded_transformer_raises_with_what_to_do(tmp_path: Path) -> None:
    from diffquant.errors import UsageError

    with pytest.raises(UsageError, match="cannot be saved") as raised:
        model("fp8").save_pretrained(tmp_path)  # type: ignore[operator]
    assert "diffquant convert dequantize" in str(raised.value)
    assert not list(tmp_path.iterdir())


def forwarded(transformer: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        drawn: Tensor = transformer(
            hidden_states=torch.randn(1, 16, 16, generator=generator),
            encoder_hidden_states=torch.randn(1, 8, 32, generator=generator),
            pooled_projections=torch.randn(1, 32, generator=generator),
            timestep=torch.tensor([0.5]),
            img_ids=torch.zeros(16, 3),
            txt_ids=torch.zeros(8, 3),
            return_dict=False,
        )[0]
    return drawn


def with_lora(transformer: nn.Module) -> nn.Module:
    """A LoRA on the attention of the first block, its up matrices not zero."""
    from peft import LoraConfig

    adapter = LoraConfig(
        r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False
    )
    torch.manual_seed(3)
    transformer.add_adapter(adapter)  # type: ignore[operator]
    return transformer


@pytest.mark.parametrize("scheme", ["fp8", "int8_sq", "nvfp4"])
def test_a_lora_is_the_same_as_on_the_dequantized_model(scheme: str) -> None:
    plan, quantized = planned(scheme), model(scheme)
    weights = Weights([Path(file.path) for file in plan.files])
    plain = copy.deepcopy(quantized)
    for layer in plan.quantized:
        weight, bias = dense(layer, weights)
        replaced = nn.Linear(layer.shape_NK[1], layer.shape_NK[0], bias=bias is not None)
        replaced.weight.data = weight
        if bias is not None:
            replaced.bias.data = bias
        plain.set_submodule(layer.path, replaced)
    bare = forwarded(quantized)
    wanted, ours = forwarded(with_lora(plain)), forwarded(with_lora(quantized))
    assert (ours - wanted).norm() / wanted.norm() < 1e-4
    assert (ours - bare).norm() / bare.norm() > 1e-3


@pytest.mark.parametrize("safe", [False, True])
def test_a_lora_cannot_be_merged_into_a_weight_that_does_not_exist(safe: bool) -> None:
    wrapped = with_lora(model("fp8")).get_submodule(PATH)
    with pytest.raises((RuntimeError, ValueError), match="single memory location|NaNs detected"):
        wrapped.merge(safe_merge=safe)  # type: ignore[operator]
