"""msModelSlim has no owner that runs without an Ascend: files are spelled out from the description.

peer_sglang_loader.md, 8: "W8A8 | weight I8 [N,K]; weight_scale, weight_offset [N,1]; input_scale,
input_offset [1]; quant_bias I32 [N]; deq_scale [N] (f32 for bf16; int64-coded for fp16) |
npu_quantize by input_scale/offset, npu_quant_matmul with deq_scale + quant_bias".
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from diffquant import headers, planner
from diffquant.activations import quantized
from diffquant.errors import FormatError
from diffquant.families import FAMILIES, Inventory
from diffquant.formats.modelslim import SCHEMES, expert_folders
from diffquant.pieces import canonical, dense
from diffquant.plan import LayerPlan, Role
from diffquant.planner import Draft
from diffquant.sources import Checkpoint
from diffquant.tensors import Weights
from tests.published import fused

NAME = "quant_model_description_w8a8.json"
N, K = 6, 64


def drafted(
    folder: Path,
    types: dict[str, str],
    tensors: dict[str, Tensor],
    inventory: Inventory | None = None,
    config: dict[str, Any] | None = None,
) -> Draft:
    """The draft of a file and its description, which also has keys that are no weights."""
    side, path = folder / NAME, folder / "quant_model_weight.safetensors"
    side.write_text(json.dumps({"model_quant_type": "W8A8", "version": "1.0.0"} | types))
    save_file(tensors, path)
    source = Checkpoint(origin="a model", root=folder, files=(path,), sidecars={NAME: side})
    header = headers.read(source.files)
    return planner.draft(source, header, config=config or {}, inventory=inventory)


def weights(draft: Draft) -> Weights:
    return Weights([Path(file.path) for file in draft.plan.files])


def weight(draft: Draft, layer: LayerPlan | None = None) -> Tensor:
    return dense(layer or draft.plan.layers[0], weights(draft))[0]


def codes(low: int, high: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randint(low, high, shape, generator=generator, dtype=torch.int8)


def channels(offset: float = 0.0) -> dict[str, Tensor]:
    scale = (torch.arange(N).float() + 1).reshape(N, 1) / 64
    return {"a.weight_scale": scale, "a.weight_offset": torch.full((N, 1), offset)}


def static() -> dict[str, Tensor]:
    """A W8A8 layer of bias 1, 2, 3 …, quantized as its operator wants it."""
    held = {"a.weight": codes(-127, 128, N, K), **channels()}
    input_scale, input_offset = torch.tensor([0.03125]), torch.tensor([-5.0])
    deq_scale = input_scale * held["a.weight_scale"].flatten()
    folded = (torch.arange(N).float() + 1) / deq_scale - input_offset * held["a.weight"].sum(1)
    return held | {
        "a.input_scale": input_scale,
        "a.input_offset": input_offset,
        "a.quant_bias": folded.round().int(),
        "a.deq_scale": deq_scale,
    }


def on_the_device(x: Tensor, held: dict[str, Tensor]) -> Tensor:
    """The operator's own arithmetic: integers in, one scale and one integer bias out."""
    rounded = (x / held["a.input_scale"]).round() + held["a.input_offset"]
    product = rounded.clamp(-128, 127) @ held["a.weight"].float().T
    deq_scale = held["a.deq_scale"]
    if deq_scale.dtype == torch.int64:
        deq_scale = deq_scale.int().view(torch.float32)
    return (product + held["a.quant_bias"].float()) * deq_scale


def test_static_int8_is_what_the_operator_computes(tmp_path: Path) -> None:
    held = static()
    drawn = drafted(tmp_path, {"a.weight": "W8A8"}, held)
    (piece,) = drawn.plan.layers[0].pieces
    matrix, bias = dense(drawn.plan.layers[0], weights(drawn))
    assert not drawn.problems and bias is not None and piece.activation is not None
    assert str(piece.activation) == "int8:tensor:static:asymmetric"
    x = torch.randn(5, K, generator=torch.Generator().manual_seed(0))
    ours = quantized(x, piece.activation, canonical(piece, weights(drawn))) @ matrix.T + bias
    torch.testing.assert_close(ours, on_the_device(x, held), rtol=1e-5, atol=1e-4)


def test_true_bias_comes_back_only_with_the_zero_points_share(tmp_path: Path) -> None:
    held = static()
    drawn = drafted(tmp_path, {"a.weight": "W8A8"}, held)
    _, bias = dense(drawn.plan.layers[0], weights(drawn))
    assert bias is not None
    true = torch.arange(N).float() + 1
    assert float((bias - true).abs().max()) < 0.01
    without = held["a.quant_bias"].float() * held["a.deq_scale"]
    assert float((without - true).abs().max()) > 1


def test_a_scale_coded_in_int64_is_the_same_scale(tmp_path: Path) -> None:
    held = static()
    plain = dense(*_first(drafted(tmp_path, {"a.weight": "W8A8"}, held)))[1]
    held["a.deq_scale"] = held["a.deq_scale"].view(torch.int32).long()
    coded = dense(*_first(drafted(tmp_path, {"a.weight": "W8A8"}, held)))[1]
    assert plain is not None and coded is not None and torch.equal(plain, coded)


def _first(draft: Draft) -> tuple[LayerPlan, Weights]:
    return draft.plan.layers[0], weights(draft)


@pytest.mark.parametrize("lost", ["deq_scale", "input_offset", "input_scale"])
def test_a_folded_bias_without_what_unfolds_it_is_refused(lost: str, tmp_path: Path) -> None:
    held = static()
    del held[f"a.{lost}"]
    with pytest.raises(FormatError, match="'a.weight' has .* without"):
        drafted(tmp_path, {"a.weight": "W8A8"}, held)


def test_the_unfolded_bias_beside_a_folded_one_is_not_added_twice(tmp_path: Path) -> None:
    held = static() | {"a.bias": torch.ones(N)}
    drawn = drafted(tmp_path, {"a.weight": "W8A8"}, held)
    assert {ref.name: why for ref, why in drawn.plan.unused.items()}["a.bias"].startswith("folded")
    assert not drawn.problems


# dynamic schemes ---------------------------------------------------------------------------------


def test_dynamic_int8_multiplies_rows(tmp_path: Path) -> None:
    held = {"a.weight": codes(-127, 128, N, K), **channels()}
    drawn = drafted(tmp_path, {"a.weight": "W8A8_DYNAMIC"}, held)
    assert torch.equal(weight(drawn), held["a.weight"].float() * held["a.weight_scale"])
    assert str(drawn.plan.layers[0].pieces[0].activation) == "int8:token:dynamic"
    assert Role.ZERO_POINT not in drawn.plan.layers[0].pieces[0].roles


def test_an_offset_that_is_not_zero_is_subtracted_from_the_code(tmp_path: Path) -> None:
    held = {"a.weight": codes(-127, 128, N, K), **channels(offset=3.0)}
    drawn = drafted(tmp_path, {"a.weight": "W8A8_DYNAMIC"}, held)
    assert torch.equal(weight(drawn), (held["a.weight"].float() - 3) * held["a.weight_scale"])


def test_int4_in_bytes_and_int4_in_pairs_of_rows_are_one_weight(tmp_path: Path) -> None:
    # "int8 container (two nibbles) -> packed int4": two adjacent rows share a byte, even row low
    whole = codes(-8, 8, N, K)
    paired = whole[0::2] & 15 | whole[1::2] << 4
    types = {"a.weight": "W4A4_DYNAMIC"}
    container = drafted(tmp_path, types, {"a.weight": whole, **channels()})
    expected = whole.float() * channels()["a.weight_scale"]
    assert torch.equal(weight(container), expected)
    packed = drafted(tmp_path, types, {"a.weight": paired, **channels()})
    assert packed.plan.layers[0].shape_NK == (N, K)
    assert torch.equal(weight(packed), expected)
    assert str(packed.plan.layers[0].pieces[0].activation) == "int4:token:dynamic"


def test_mxfp8_scales_are_row_major_powers_of_two(tmp_path: Path) -> None:
    held = {
        "a.weight": torch.ones(N, K, dtype=torch.float8_e4m3fn),
        "a.weight_scale": torch.arange(120, 120 + 2 * N, dtype=torch.uint8).reshape(N, 2),
    }
    drawn = drafted(tmp_path, {"a.weight": "W8A8_MXFP8"}, held)
    powers = 2.0 ** (held["a.weight_scale"].float() - 127)
    assert torch.equal(weight(drawn), powers.repeat_interleave(32, 1))


def dual(columns: int = 1024) -> dict[str, Tensor]:
    """Every code is 1.0 (code 2): the weight is its scales."""
    outer = torch.arange(1.0, 1 + 2 * N).reshape(N, 2, 1)
    return {
        "a.weight": torch.full((N, columns // 2), 0x22, dtype=torch.uint8),
        "a.weight_scale": torch.full((N, columns // 32), 128, dtype=torch.uint8),
        "a.weight_dual_scale": outer,
    }


def test_dual_scale_multiplies_blocks_of_512_above_those_of_32(tmp_path: Path) -> None:
    held = dual()
    drawn = drafted(tmp_path, {"a.weight": "W4A4_MXFP4_DUALSCALE"}, held)
    expected = 2 * held["a.weight_dual_scale"].flatten(1).repeat_interleave(512, 1)
    assert torch.equal(weight(drawn), expected)
    (piece,) = drawn.plan.layers[0].pieces
    parts = tuple(part for part in piece.parts if part.role is not Role.OUTER_SCALE)
    single = replace(drawn.plan.layers[0], pieces=(replace(piece, parts=parts),))
    assert not torch.equal(weight(drawn, single), expected)


def test_every_activation_can_be_emulated(tmp_path: Path) -> None:
    x = torch.randn(3, 1024, generator=torch.Generator().manual_seed(1))
    for scheme in SCHEMES.values():
        parts = {Role.INPUT_SCALE: torch.tensor(0.05), Role.INPUT_ZERO_POINT: torch.tensor(2.0)}
        near = quantized(x, scheme.activation, parts)
        assert 0 < float((near - x).norm() / x.norm()) < 0.2


# smoothing and names -----------------------------------------------------------------------------


def test_the_writers_wrapper_is_taken_off_names(tmp_path: Path) -> None:
    held = {
        "blocks.0.ffn.0.linear.weight": codes(-127, 128, N, K),
        "blocks.0.ffn.0.linear.weight_scale": channels()["a.weight_scale"],
        "blocks.0.ffn.0.linear.bias": torch.ones(N),
        "blocks.0.ffn.0.div.mul_scale": torch.arange(1.0, K + 1),
        "blocks.0.norm1.linear.weight": torch.ones(N, K),
    }
    types = {
        "blocks.0.ffn.0.linear.weight": "W8A8_DYNAMIC",
        "blocks.0.norm1.linear.weight": "FLOAT",
    }
    drawn = drafted(tmp_path, types, held)
    assert not drawn.problems
    assert {layer.path for layer in drawn.plan.layers} == {
        "blocks.0.ffn.0",
        "blocks.0.norm1.linear",
    }
    layer = drawn.plan.layer("blocks.0.ffn.0")
    raw = held["blocks.0.ffn.0.linear.weight"].float() * channels()["a.weight_scale"]
    # mul_scale multiplies the input, so the weight that sees the raw input is multiplied too
    assert torch.equal(weight(drawn, layer), raw * torch.arange(1.0, K + 1))


def test_a_whole_wan_in_the_writers_names_fits_its_module(tmp_path: Path) -> None:
    config = {
        "_class_name": "WanTransformer3DModel",
        "num_attention_heads": 1,
        "attention_head_dim": 32,
        "text_dim": 16,
        "freq_dim": 16,
        "ffn_dim": 64,
        "num_layers": 2,
    }
    family = FAMILIES.load("wan")
    held, types = {}, {}
    for name, shape in fused(family, "original", family.inventory(config)).items():
        stem, _, leaf = name.rpartition(".")
        quantized_here = name.startswith("blocks.") and leaf == "weight" and len(shape) == 2
        if not quantized_here:
            held[name.replace("ffn.2.", "ffn.2.linear.")] = torch.ones(shape)
            continue
        if stem.endswith("ffn.2"):
            held[f"{stem}.div.mul_scale"], stem = torch.ones(shape[1]), f"{stem}.linear"
        types[f"{stem}.weight"] = "W8A8_DYNAMIC"
        held[f"{stem}.weight"] = torch.ones(shape, dtype=torch.int8)
        held[f"{stem}.weight_scale"] = torch.ones(shape[0], 1)
        held[f"{stem}.weight_offset"] = torch.zeros(shape[0], 1)
    drawn = drafted(tmp_path, types, held, config=config)
    assert not drawn.problems and len(drawn.plan.quantized) == 2 * 10
    assert drawn.plan.layer("blocks.1.ffn.net.2").pieces[0].smooth == "multiply"


def test_a_float_layer_may_be_smoothed_as_well(tmp_path: Path) -> None:
    held = {"a.weight": torch.ones(N, K), "a.mul_scale": torch.full((K,), 2.0)}
    drawn = drafted(tmp_path, {"a.weight": "FLOAT"}, held)
    assert torch.equal(weight(drawn), torch.full((N, K), 2.0))


def test_a_quantized_embedding_is_decoded(tmp_path: Path) -> None:
    held = {"a.weight": codes(-127, 128, N, K), **channels()}
    inventory = Inventory(shapes={"a.weight": (N, K)}, linears=frozenset())
    drawn = drafted(tmp_path, {"a.weight": "W8A8_DYNAMIC"}, held, inventory)
    (plain,) = drawn.plan.plain
    assert not drawn.problems and not drawn.plan.layers
    assert "decoded while loading" in plain.why


# refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ("W4A8_DYNAMIC", "W4A8_DYNAMIC, which is not read: .* expert"),
        ("W8A16", "W8A16, which is not read"),
        ("W2A2", "W2A2, a type that is not known"),
        ("FLOAT", "is I8, and .* calls it FLOAT"),
    ],
)
def test_other_schemes_are_refused_by_name(stated: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=message):
        drafted(tmp_path, {"a.weight": stated}, {"a.weight": codes(-8, 8, N, K), **channels()})


def test_experts_are_refused(tmp_path: Path) -> None:
    name = "blocks.0.mlp.experts.3.up.weight"
    with pytest.raises(FormatError, match="expert layers"):
        drafted(tmp_path, {name: "W8A8_DYNAMIC"}, {name: codes(-8, 8, N, K)})


def test_a_weight_that_is_not_described_is_named(tmp_path: Path) -> None:
    held = {"a.weight": torch.ones(N, K), "b.weight": codes(-8, 8, N, K)}
    with pytest.raises(FormatError, match="'b.weight' is I8, and .* does not name it"):
        drafted(tmp_path, {"a.weight": "FLOAT"}, held)


def test_a_lost_scale_is_named(tmp_path: Path) -> None:
    held = {"a.weight": codes(-8, 8, N, K)}
    (problem,) = drafted(tmp_path, {"a.weight": "W8A8_DYNAMIC"}, held).problems
    assert problem.tensor == "a.weight" and "without its scale" in problem.what


def test_expert_folders_need_both() -> None:
    names = ["high_noise_model", "low_noise_model", "vae"]
    assert expert_folders(names) == {
        "transformer": "high_noise_model",
        "transformer_2": "low_noise_model",
    }
    assert expert_folders(names[:1]) == {}
