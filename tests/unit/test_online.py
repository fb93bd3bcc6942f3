"""`--quantization` on a plan: which layers it reaches, what they become, and what is said of it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from diffquant import headers, planner, sources
from diffquant.errors import PresetError, UsageError
from diffquant.online import Online, requantized
from diffquant.plan import LayerPlan, Plan, TensorRef, to_json

FP8 = Path(__file__).parents[1] / "data" / "modelopt" / "flux" / "fp8"
TO_Q = "transformer_blocks.0.attn.to_q"


def planned(source: str) -> Plan:
    checkpoint = sources.checkpoint(source)
    header = headers.read(checkpoint.files)
    return planner.plan(checkpoint, header, config=checkpoint.config)


@pytest.fixture(scope="module")
def dense() -> Plan:
    return planned("emoji_flux/transformer")


def reached(plan: Plan) -> set[str]:
    return {layer.path for layer in plan.layers if any(piece.recode for piece in layer.pieces)}


def all_but(plan: Plan) -> set[str]:
    return {layer.path for layer in plan.layers} - reached(plan)


def test_sensitive_layers_and_those_of_the_preset_stay_and_say_why(dense: Plan) -> None:
    plan = requantized(dense, Online(scheme="fp8"))
    assert len(reached(plan)) == 18
    assert plan.layer(TO_Q).why == "--quantization fp8"
    assert plan.layer("x_embedder").why.endswith("stays: family flux1 calls it sensitive")
    assert plan.layer("transformer_blocks.0.ff.net.2").why.endswith("stays: preset flux1-fp8")
    assert "18 layers are quantized to fp8 while loading" in plan.notes
    assert any(note.startswith("4 layers stay: preset flux1-fp8 (modul") for note in plan.notes)


def test_a_preset_for_four_bits_keeps_more(dense: Plan) -> None:
    eight, four = (requantized(dense, Online(scheme=name)) for name in ("fp8", "nvfp4"))
    assert reached(four) < reached(eight)


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("hunyuan_video-nvfp4", "is for hunyuan_video, the model is flux1"),
        ("flux1-dev", "keeps no layer, it has defaults"),
    ],
)
def test_a_preset_that_cannot_be_meant_is_refused(dense: Plan, named: str, said: str) -> None:
    with pytest.raises(PresetError, match=said) as refused:
        requantized(dense, Online(scheme="fp8", preset=named))
    assert "flux1-fp8, flux1-nvfp4, flux1-svdq" in str(refused.value.hint)
    whole = requantized(dense, Online(scheme="fp8", preset="flux1-nvfp4"))
    assert reached(whole) < reached(requantized(dense, Online(scheme="fp8")))


def test_quantize_all_takes_every_linear_that_fits(dense: Plan) -> None:
    assert all_but(requantized(dense, Online(scheme="fp8", quantize_all=True))) == set()
    blocks = requantized(dense, Online(scheme="fp8_block", quantize_all=True))
    assert all_but(blocks) == {"x_embedder"}
    assert blocks.layer("x_embedder").why.endswith("K is 32, fp8_block needs a multiple of 128")
    assert "1 layer stays: K is 32, fp8_block needs a multiple of 128" in blocks.notes


@pytest.mark.parametrize(("scope", "word"), [("mlp", "proj_"), ("attention", "attn.")])
def test_a_scope_reaches_only_its_own_layers(dense: Plan, scope: str, word: str) -> None:
    plan = requantized(dense, Online(scheme="fp8", scope=scope))
    assert reached(plan)
    assert all(word in path for path in reached(plan))
    assert f"--quantization-scope {scope}" in plan.layer("norm_out.linear").why


def test_a_scope_of_a_family_nobody_described_is_refused(dense: Plan) -> None:
    with pytest.raises(UsageError, match="nothing is known about where"):
        requantized(replace(dense, family="generic"), Online(scheme="fp8", scope="mlp"))


def test_ignored_layers_stay_by_module_path(dense: Plan) -> None:
    plan = requantized(dense, Online(scheme="fp8", ignored=("attn.to_",)))
    assert reached(plan)
    assert not any("attn.to_" in path for path in reached(plan))
    assert plan.layer(TO_Q).why.endswith("stays: --quantization-ignored-layers attn.to_")


def test_ignored_layers_stay_by_the_name_the_file_uses(dense: Plan) -> None:
    layer = dense.layer(TO_Q)
    renamed = replace(dense, layers=tuple(stored_as(it, "img_attn.qkv") for it in (layer,)))
    with pytest.raises(UsageError, match="reaches none of 1 linear layers"):
        requantized(renamed, Online(scheme="mxfp8", ignored=("qkv",), quantize_all=True))
    assert reached(requantized(renamed, Online(scheme="mxfp8", quantize_all=True))) == {TO_Q}


def stored_as(layer: LayerPlan, name: str) -> LayerPlan:
    pieces = (
        replace(
            piece,
            parts=tuple(
                replace(part, ref=TensorRef(0, f"{name}.{part.ref.name.rpartition('.')[2]}"))
                for part in piece.parts
            ),
        )
        for piece in layer.pieces
    )
    return replace(layer, pieces=tuple(pieces))


def test_a_pattern_that_hits_no_linear_is_an_error_with_near_names(dense: Plan) -> None:
    with pytest.raises(UsageError, match="attn.to_qq hits no linear layer") as caught:
        requantized(dense, Online(scheme="fp8", ignored=("attn.to_qq",)))
    assert "attn.to_q" in str(caught.value.hint)


def test_siblings_share_a_tensor_scale_and_nothing_else_does(dense: Plan) -> None:
    plan = requantized(dense, Online(scheme="nvfp4"))
    keys = {name: shared(plan, f"transformer_blocks.0.attn.{name}") for name in ("to_q", "to_v")}
    assert set(keys.values()) == {TO_Q}
    assert shared(plan, "transformer_blocks.0.attn.to_out.0") is None
    assert shared(requantized(dense, Online(scheme="fp8")), TO_Q) is None


def test_a_sibling_that_stays_has_no_say_in_the_scale(dense: Plan) -> None:
    plan = requantized(dense, Online(scheme="fp8_tensor", ignored=("attn.to_k", "add_k_proj")))
    assert shared(plan, "transformer_blocks.0.attn.to_v") == TO_Q
    alone = requantized(dense, Online(scheme="fp8_tensor", ignored=("attn.to_q", "attn.to_k")))
    assert shared(alone, "transformer_blocks.0.attn.to_v") is None


def shared(plan: Plan, path: str) -> str | None:
    recode = plan.layer(path).pieces[0].recode
    return None if recode is None else recode.shared_amax


def test_the_plan_is_json_and_tells_quantized_from_plain(dense: Plan) -> None:
    plan = requantized(dense, Online(scheme="svdq_int4"))
    layers = {layer["path"]: layer for layer in json.loads(json.dumps(to_json(plan)))["layers"]}
    assert layers[TO_Q]["pieces"][0]["recode"]["encoding"] == "int4;group=64"
    assert "lowrank_up" in layers[TO_Q]["pieces"][0]["recode"]["roles"]
    assert plan.digest == requantized(dense, Online(scheme="svdq_int4")).digest
    assert plan.digest != dense.digest


def test_quantized_layers_are_left_alone_unless_asked_twice() -> None:
    stored = planned(str(FP8))
    once = requantized(stored, Online(scheme="int8", quantize_all=True))
    assert all(set(stored.layer(path).encodings) == {"dense"} for path in reached(once))
    twice = requantized(stored, Online(scheme="int8", quantize_all=True, requantize=True))
    assert all_but(twice) == set()
    assert twice.layer(TO_Q).why == "--quantization int8, after fp8: quantized twice"
    assert any("quantized twice" in note for note in twice.notes)
