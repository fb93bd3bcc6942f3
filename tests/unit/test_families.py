"""Inventories against the classes, namings against diffusers' converters and Nunchaku's key tables."""

import json
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from diffquant.families import FAMILIES, Inventory, Naming, Rule, located, spelled
from diffquant.families._shapes import ratio

Config = dict[str, Any]


def _flux1(random: Random) -> Config:
    return {
        "patch_size": random.choice([1, 2]),
        "in_channels": random.choice([4, 16, 64]),
        "out_channels": random.choice([None, 8]),
        "num_layers": random.randint(0, 2),
        "num_single_layers": random.randint(0, 2),
        "attention_head_dim": random.choice([4, 8, 12]),
        "num_attention_heads": random.randint(1, 3),
        "joint_attention_dim": random.choice([6, 10]),
        "pooled_projection_dim": random.choice([5, 7]),
        "guidance_embeds": random.choice([True, False]),
    }


def _flux2(random: Random) -> Config:
    shared = _flux1(random)
    del shared["pooled_projection_dim"]
    return {
        **shared,
        "timestep_guidance_channels": random.choice([16, 256]),
        "mlp_ratio": random.choice([3.0, 4, 2.7, 1 / 3]),
    }


def _qwen_image(random: Random) -> Config:
    return {
        "patch_size": random.choice([1, 2, 3]),
        "in_channels": random.choice([16, 64]),
        "out_channels": random.choice([None, 4, 16]),
        "num_layers": random.randint(0, 3),
        "attention_head_dim": random.choice([8, 12]),
        "num_attention_heads": random.randint(1, 3),
        "joint_attention_dim": random.choice([6, 10]),
        "axes_dims_rope": [4, 2, 2],
        "zero_cond_t": random.choice([True, False]),
        "use_additional_t_cond": random.choice([True, False]),
        "use_layer3d_rope": random.choice([True, False]),
    }


def _wan(random: Random) -> Config:
    image = random.choice([None, 8])
    return {
        "patch_size": random.choice([(1, 2, 2), [1, 1, 1], (2, 2, 2)]),
        "num_attention_heads": random.randint(1, 3),
        "attention_head_dim": random.choice([12, 16]),
        "in_channels": random.choice([16, 36, 48]),
        "out_channels": random.choice([16, 48, None]),
        "text_dim": random.choice([6, 10]),
        "freq_dim": random.choice([8, 256]),
        "ffn_dim": random.choice([20, 33]),
        "num_layers": random.randint(1, 3),
        "cross_attn_norm": random.choice([True, False]),
        "image_dim": image,
        "added_kv_proj_dim": random.choice([None, 24]),
        "rope_max_seq_len": 4,
        "pos_embed_seq_len": image and random.choice([None, 5]),
    }


def _wan_vace(random: Random) -> Config:
    config = _wan(random)
    controls = sorted({0, random.randrange(config["num_layers"])})
    return {
        **config,
        "_class_name": "WanVACETransformer3DModel",
        "vace_layers": controls,
        "vace_in_channels": random.choice([12, 96]),
    }


def _hunyuan_video(random: Random) -> Config:
    return {
        "in_channels": random.choice([16, 33]),
        "out_channels": random.choice([16, None]),
        "num_attention_heads": random.randint(1, 3),
        "attention_head_dim": random.choice([8, 12]),
        "num_layers": random.randint(0, 2),
        "num_single_layers": random.randint(0, 2),
        "num_refiner_layers": random.randint(0, 2),
        "mlp_ratio": random.choice([4.0, 2, 2.7]),
        "patch_size": random.choice([1, 2]),
        "patch_size_t": random.choice([1, 2]),
        "qk_norm": random.choice(["rms_norm", "layer_norm", "fp32_layer_norm", None]),
        "guidance_embeds": random.choice([True, False]),
        "text_embed_dim": random.choice([6, 10]),
        "pooled_projection_dim": random.choice([5, 7]),
        "image_condition_type": random.choice([None, "latent_concat", "token_replace"]),
    }


def _z_image(random: Random) -> Config:
    heads = random.choice([1, 3, 20])
    patches = random.choice([((2,), (1,)), ([1, 2], [1, 1]), ((4, 2), (2, 1))])
    return {
        "all_patch_size": patches[0],
        "all_f_patch_size": patches[1],
        "in_channels": random.choice([4, 16]),
        "dim": 16 * heads,
        "n_layers": random.randint(0, 2),
        "n_refiner_layers": random.randint(0, 2),
        "n_heads": heads,
        "n_kv_heads": heads,
        "qk_norm": random.choice([True, False]),
        "cap_feat_dim": random.choice([6, 10]),
        "siglip_feat_dim": random.choice([None, 7]),
        "axes_dims": [4, 6, 6],
        "axes_lens": [8, 8, 8],
    }


def _ltx2(random: Random) -> Config:
    def yes() -> bool:
        return random.choice([True, False])

    return {
        "in_channels": random.choice([4, 8]),
        "out_channels": random.choice([4, 6]),
        "num_attention_heads": 2,
        "attention_head_dim": random.choice([8, 16]),
        "cross_attention_dim": random.choice([12, 16]),
        "gated_attn": yes(),
        "cross_attn_mod": yes(),
        "audio_in_channels": random.choice([4, 8]),
        "audio_out_channels": random.choice([4, 6]),
        "audio_num_attention_heads": random.choice([2, 4]),
        "audio_attention_head_dim": random.choice([4, 8]),
        "audio_cross_attention_dim": random.choice([8, 16]),
        "audio_gated_attn": yes(),
        "audio_cross_attn_mod": yes(),
        "num_layers": random.randint(1, 2),
        "norm_elementwise_affine": yes(),
        "caption_channels": random.choice([6, 10]),
        "attention_bias": yes(),
        "attention_out_bias": yes(),
        "use_prompt_embeddings": yes(),
        "ff_bias": yes(),
        "audio_ff_bias": yes(),
        "use_prompt_adaln_single": yes(),
        "use_keyframes_abs_pos_embedding": yes(),
    }


CONFIGS: Mapping[str, tuple[str, Callable[[Random], Config]]] = {
    "FluxTransformer2DModel": ("flux1", _flux1),
    "Flux2Transformer2DModel": ("flux2", _flux2),
    "QwenImageTransformer2DModel": ("qwen_image", _qwen_image),
    "WanTransformer3DModel": ("wan", _wan),
    "WanVACETransformer3DModel": ("wan", _wan_vace),
    "HunyuanVideoTransformer3DModel": ("hunyuan_video", _hunyuan_video),
    "ZImageTransformer2DModel": ("z_image", _z_image),
    "LTX2VideoTransformer3DModel": ("ltx2", _ltx2),
}


@pytest.mark.parametrize("class_name", CONFIGS)
def test_an_inventory_is_the_class_for_twenty_random_configs(class_name: str) -> None:
    family, draw = CONFIGS[class_name]
    for seed in range(20):
        config = draw(Random(seed))
        assert FAMILIES.load(family).inventory(config) == _built(class_name, config), config


@pytest.mark.parametrize("class_name", CONFIGS)
def test_shapes_tell_a_config_with_the_same_inventory(class_name: str) -> None:
    family, draw = CONFIGS[class_name]
    inventory, config_from = FAMILIES.load(family).inventory, FAMILIES.load(family).config_from
    assert config_from is not None
    for seed in range(100):
        given = inventory(draw(Random(seed)))
        told = config_from(given.shapes)
        assert told is not None
        assert told["_class_name"] == class_name
        assert inventory(told) == given


@pytest.mark.parametrize("class_name", CONFIGS)
def test_a_config_told_by_shapes_builds_the_class(class_name: str) -> None:
    family, draw = CONFIGS[class_name]
    given = FAMILIES.load(family).inventory({**draw(Random(1)), "rope_max_seq_len": 4})
    config_from = FAMILIES.load(family).config_from
    assert config_from is not None
    assert _built(class_name, dict(config_from(given.shapes) or {})) == given


@pytest.mark.parametrize("class_name", CONFIGS)
def test_too_few_shapes_tell_no_config(class_name: str) -> None:
    family, draw = CONFIGS[class_name]
    shapes = dict(FAMILIES.load(family).inventory(draw(Random(0))).shapes)
    config_from = FAMILIES.load(family).config_from
    assert config_from is not None
    assert config_from({}) is None
    assert config_from(dict(list(shapes.items())[-3:])) is None


def test_a_ratio_survives_being_cut_to_an_integer() -> None:
    assert ratio(18432, 6144) == 3.0
    pairs = [(hidden, width) for width in range(1, 200, 7) for hidden in range(1, 600, 11)]
    assert all(int(width * ratio(hidden, width)) == hidden for hidden, width in pairs)


def test_block_numbers_travel_through_a_name() -> None:
    bfl = FAMILIES.load("flux1").namings["bfl"]
    block = "transformer_blocks.12.attn."
    assert located(bfl, "double_blocks.12.img_attn.qkv") == Rule(
        "double_blocks.12.img_attn.qkv", (block + "to_q", block + "to_k", block + "to_v")
    )
    assert spelled(bfl, block + "to_k") == ("double_blocks.12.img_attn.qkv",)
    assert spelled(bfl, block + "to_out.0.bias") == ("double_blocks.12.img_attn.proj.bias",)


def test_numbers_a_template_spells_out_must_agree() -> None:
    bfl = FAMILIES.load("flux1").namings["bfl"]
    first, second = (located(bfl, f"double_blocks.0.img_mlp.{place}") for place in (0, 2))
    assert first is not None
    assert second is not None
    assert first.rows == ("transformer_blocks.0.ff.net.0.proj",)
    assert second.rows == ("transformer_blocks.0.ff.net.2",)
    assert located(bfl, "double_blocks.0.img_mlp.1") is None


def test_a_name_under_no_rule_is_its_own_only_when_the_naming_falls_through() -> None:
    own = located(Naming(), "blocks.3.norm")
    assert own == Rule("blocks.3.norm", ("blocks.3.norm",))
    assert located(Naming(falls_through=False), "blocks.3.norm") is None
    assert spelled(Naming(falls_through=False), "blocks.3.norm.weight") == ()


def test_a_norms_scale_may_be_spelled_two_ways_and_the_first_is_written() -> None:
    bfl = FAMILIES.load("flux1").namings["bfl"]
    stored = "single_blocks.4.norm.query_norm"
    assert spelled(bfl, "single_transformer_blocks.4.attn.norm_q.weight") == (f"{stored}.scale",)
    whole, module = located(bfl, f"{stored}.scale"), located(bfl, stored)
    assert whole is not None
    assert module is not None
    assert whole.rows == ("single_transformer_blocks.4.attn.norm_q.weight",)
    assert module.rows == ("single_transformer_blocks.4.attn.norm_q",)


def test_two_stored_layers_are_slices_of_one_module_in_order() -> None:
    nunchaku = FAMILIES.load("flux1").namings["nunchaku"]
    block = "single_transformer_blocks.7."
    assert spelled(nunchaku, block + "proj_out") == (block + "out_proj", block + "mlp_fc2")
    second = located(nunchaku, block + "mlp_fc2")
    assert second is not None
    assert second.cols == 1


CONVERTERS = {
    "flux1": ("bfl", "convert_flux_transformer_checkpoint_to_diffusers", {"guidance_embeds": True}),
    "flux2": ("bfl", "convert_flux2_transformer_checkpoint_to_diffusers", {}),
    "wan": ("original", "convert_wan_transformer_to_diffusers", {"image_dim": 8}),
    "hunyuan_video": ("original", "convert_hunyuan_video_transformer_to_diffusers", {}),
    "z_image": ("original", "convert_z_image_transformer_checkpoint_to_diffusers", {}),
    "ltx2": ("original", "convert_ltx2_transformer_to_diffusers", {}),
}


@pytest.mark.parametrize("name", CONVERTERS)
def test_every_stored_row_lands_where_diffusers_converter_puts_it(name: str) -> None:
    naming, converter, extra = CONVERTERS[name]
    family = FAMILIES.load(name)
    truth = _numbered(family.inventory(_few_blocks(name) | extra))
    converted = _convert(converter, _stored(family.namings[naming], truth))
    assert {path: list(rows) for path, rows in converted.items()} == truth


def test_image_and_control_blocks_of_wan_land_there_too() -> None:
    extra = {"image_dim": 8, "added_kv_proj_dim": 6, "_class_name": "WanVACETransformer3DModel"}
    family = FAMILIES.load("wan")
    truth = _numbered(family.inventory({**_few_blocks("wan"), **extra, "vace_layers": [0, 1]}))
    stored = _stored(family.namings["original"], truth)
    assert "blocks.1.cross_attn.norm_k_img.weight" in stored
    assert "vace_blocks.0.before_proj.bias" in stored
    converted = _convert(CONVERTERS["wan"][1], stored)
    assert {path: list(rows) for path, rows in converted.items()} == truth


@pytest.mark.parametrize(("name", "stem"), [("flux1", "double_blocks"), ("z_image", "layers")])
def test_exchanged_q_and_k_do_not_pass_the_converter(name: str, stem: str) -> None:
    naming, converter, extra = CONVERTERS[name]
    family = FAMILIES.load(name)
    truth = _numbered(family.inventory(_few_blocks(name) | extra))
    wrong = _exchanged(family.namings[naming], stem)
    converted = _convert(converter, _stored(wrong, truth))
    astray = {path for path, rows in converted.items() if list(rows) != truth[path]}
    assert astray
    assert all("to_q." in path or "to_k." in path for path in astray)


def test_unswapped_halves_of_the_output_modulation_do_not_pass_the_converter() -> None:
    naming, converter, extra = CONVERTERS["flux1"]
    family = FAMILIES.load("flux1")
    truth = _numbered(family.inventory(_few_blocks("flux1") | extra))
    rules = family.namings[naming].rules
    wrong = replace(family.namings[naming], rules=tuple(replace(r, chunks=None) for r in rules))
    converted = _convert(converter, _stored(wrong, truth))
    astray = {path for path, rows in converted.items() if list(rows) != truth[path]}
    assert astray == {"norm_out.linear.weight", "norm_out.linear.bias"}


KEYTABLES = {
    "flux1_v1_tiny_int4": ("flux1", "nunchaku"),
    "flux1_v2_int4_r32": ("flux1", "nunchaku_v2"),
    "flux1_v2_nvfp4_r32": ("flux1", "nunchaku_v2"),
    "qwenimage_int4_r32": ("qwen_image", "nunchaku"),
    "qwenimage_nvfp4_r32": ("qwen_image", "nunchaku"),
    "zimage_int4_r128": ("z_image", "nunchaku"),
}


@pytest.mark.parametrize("table", KEYTABLES)
def test_a_nunchaku_file_covers_every_module_with_fitting_shapes(table: str, data: Path) -> None:
    name, naming = KEYTABLES[table]
    family = FAMILIES.load(name)
    keys, config = _keytable(data, table)
    inventory = family.inventory(config)
    assert _misfits(keys, family.namings[naming], inventory) == []


@pytest.mark.parametrize("table", KEYTABLES)
def test_the_wrong_naming_does_not_cover_a_nunchaku_file(table: str, data: Path) -> None:
    family = FAMILIES.load(KEYTABLES[table][0])
    keys, config = _keytable(data, table)
    assert _misfits(keys, Naming(), family.inventory(config)) != []


def _built(class_name: str, config: Config) -> Inventory:
    """The inventory of the real module, built without memory."""
    import diffusers
    import torch
    from accelerate import init_empty_weights

    keys = {key: value for key, value in config.items() if key != "_class_name"}
    with init_empty_weights():
        module = getattr(diffusers, class_name)(**keys)
    return Inventory(
        shapes={name: tuple(tensor.shape) for name, tensor in module.state_dict().items()},
        linears=frozenset(
            name for name, part in module.named_modules() if isinstance(part, torch.nn.Linear)
        ),
    )


def _few_blocks(name: str) -> Config:
    """Full widths, because diffusers' converters assume 3072, and two blocks of a kind."""
    layers = {"num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 2}
    return {**layers, "n_layers": 2, "siglip_feat_dim": 8 if name == "z_image" else None}


def _numbered(inventory: Inventory) -> dict[str, list[int]]:
    """A number of its own for every row of every parameter."""
    truth, start = {}, 0
    for path, shape in inventory.shapes.items():
        truth[path] = list(range(start, start + shape[0]))
        start += shape[0]
    return truth


def _stored(naming: Naming, truth: Mapping[str, list[int]]) -> dict[str, list[int]]:
    """The file as the naming says it is: rows of its tensors in stored order."""
    stored = {}
    for name in {spelled(naming, path)[0] for path in truth}:
        stem, dot, leaf = name.rpartition(".")
        module = leaf in ("weight", "bias")
        rule = located(naming, stem if module else name)
        assert rule is not None
        ending = dot + leaf if module else ""
        rows = [number for row in rule.rows for number in truth[row + ending]]
        stored[name] = _reordered(rows, rule.chunks)
    return stored


def _reordered(rows: list[int], chunks: tuple[int, ...] | None) -> list[int]:
    if chunks is None:
        return rows
    size = len(rows) // len(chunks)
    return [row for chunk in chunks for row in rows[chunk * size : (chunk + 1) * size]]


def _convert(converter: str, stored: Mapping[str, list[int]]) -> dict[str, list[int]]:
    import torch
    from diffusers.loaders import single_file_utils

    tensors = {name: torch.tensor(rows) for name, rows in stored.items()}
    converted = getattr(single_file_utils, converter)(tensors)
    return {path: rows.tolist() for path, rows in converted.items()}


def _exchanged(naming: Naming, stem: str) -> Naming:
    """The naming with q and k exchanged in the fused rules below `stem`."""
    rules = tuple(
        replace(rule, rows=(rule.rows[1], rule.rows[0], *rule.rows[2:]))
        if len(rule.rows) >= 3 and rule.stored.startswith(stem) and "txt" not in rule.stored
        else rule
        for rule in naming.rules
    )
    assert rules != naming.rules
    return replace(naming, rules=rules)


def _keytable(data: Path, table: str) -> tuple[dict[str, tuple[str, list[int]]], Config]:
    """Names with dtypes and shapes (first block of a kind for `*`), and the config they belong to."""
    read = json.loads((data / "keytables" / f"{table}.json").read_text())
    keys = {name.replace("*", "0"): tuple(found) for name, found in read["keys"].items()}
    one = {"num_layers": 1, "num_single_layers": 1, "n_layers": 1, "n_refiner_layers": 1}
    return keys, read.get("config", {**one, "guidance_embeds": True})


def _misfits(
    keys: Mapping[str, tuple[str, list[int]]], naming: Naming, inventory: Inventory
) -> list[str]:
    """Stored layers without a fitting place, and modules that are not covered once and wholly."""
    wrong, found = [], defaultdict(list)
    for stem, shape in _logical(keys).items():
        rule = located(naming, stem)
        rows = [_weight(inventory, row) for row in rule.rows] if rule else [None]
        if rule is None or None in rows or sum(row[0] for row in rows if row) != shape[0]:
            wrong.append(stem)
            continue
        for row in rule.rows:
            found[row].append(shape[1:])
    whole = {path: shape for path in _modules(inventory) if (shape := _weight(inventory, path))}
    for path, shape in whole.items():
        widths = [sum(sizes) for sizes in zip(*found[path], strict=True)] if found[path] else None
        if widths != list(shape[1:]) or (len(shape) == 1 and len(found[path]) != 1):
            wrong.append(path)
    return wrong


def _logical(keys: Mapping[str, tuple[str, list[int]]]) -> dict[str, tuple[int, ...]]:
    """Stored modules and lone parameters with their logical shape: codes are two to a byte, four
    rows of AWQ to an int32 row."""
    shapes = {}
    for name, (dtype, shape) in keys.items():
        stem, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            rows = 4 if dtype.lower() in ("int32", "i32") else 1
            shapes[stem] = (shape[0] * rows, shape[1] * 2)
        elif leaf == "weight" or not stem:
            shapes[stem or name] = tuple(shape)
    return shapes


def _modules(inventory: Inventory) -> set[str]:
    return {name.removesuffix(".weight") for name in inventory.shapes if not name.endswith(".bias")}


def _weight(inventory: Inventory, path: str) -> tuple[int, ...] | None:
    return inventory.shapes.get(f"{path}.weight", inventory.shapes.get(path))


def test_patch_sizes_that_do_not_pair_up_are_refused_by_name() -> None:
    from diffquant.errors import PlanError
    from diffquant.families.z_image import FAMILY

    with pytest.raises(PlanError, match="1 all_patch_size and 0 all_f_patch_size"):
        FAMILY.inventory({"all_patch_size": [2], "all_f_patch_size": []})
