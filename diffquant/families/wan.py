"""Wan 2.1 and 2.2: text to video, image to video, the 5B hybrid, and VACE.

Heads share one norm over the whole width, so shapes do not tell how many there are. Timestep
embedder, tables and norms are kept in float32 by the class.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

from diffquant.families import Family, Inventory, Naming, Shape
from diffquant.families._config import settings
from diffquant.families._names import rules
from diffquant.families._shapes import (
    Table,
    conv,
    count,
    feed_forward,
    head_width,
    linear,
    lone,
    norm,
    norms,
    repeated,
    squares,
    two_linears,
)
from diffquant.families._shapes import inventory as assembled

DEFAULTS: Mapping[str, Any] = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 40,
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "ffn_dim": 13824,
    "num_layers": 40,
    "cross_attn_norm": True,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
    "vace_layers": (0, 5, 10, 15, 20, 25, 30, 35),
    "vace_in_channels": 96,
}
VACE = "WanVACETransformer3DModel"


def inventory(config: Mapping[str, Any]) -> Inventory:
    """Every parameter of WanTransformer3DModel, or of WanVACETransformer3DModel if that is the
    config's `_class_name`."""
    given = settings(DEFAULTS, config)
    width = given["num_attention_heads"] * given["attention_head_dim"]
    patch = given["patch_size"]
    out = (given["out_channels"] or given["in_channels"]) * prod(patch)
    return assembled(
        {
            "scale_shift_table": lone(1, 2, width),
            "patch_embedding": conv(given["in_channels"], width, patch),
        },
        _conditions(given, width),
        repeated("blocks", given["num_layers"], _block(given, width)),
        _vace(given, width) if given.get("_class_name") == VACE else {},
        {"proj_out": linear(width, out)},
    )


def _conditions(given: Mapping[str, Any], width: int) -> Table:
    at = "condition_embedder"
    return {
        **two_linears(f"{at}.time_embedder", given["freq_dim"], width),
        f"{at}.time_proj": linear(width, 6 * width),
        **two_linears(f"{at}.text_embedder", given["text_dim"], width),
        **(_image(given, width) if given["image_dim"] is not None else {}),
    }


def _image(given: Mapping[str, Any], width: int) -> Table:
    """Image to video of Wan 2.1: features of an image encoder, as wide inside as they come."""
    at = "condition_embedder.image_embedder"
    wide, length = given["image_dim"], given["pos_embed_seq_len"]
    return {
        **({f"{at}.pos_embed": lone(1, length, wide)} if length is not None else {}),
        f"{at}.norm1": norm(wide, bias=True),
        **feed_forward(f"{at}.ff", wide, wide, width),
        f"{at}.norm2": norm(width, bias=True),
    }


def _block(given: Mapping[str, Any], width: int) -> Table:
    added = given["added_kv_proj_dim"]
    images = {
        "attn2.add_k_proj": linear(added or 0, width),
        "attn2.add_v_proj": linear(added or 0, width),
        "attn2.norm_added_k": norm(width),
    }
    return {
        "scale_shift_table": lone(1, 6, width),
        **squares(width, *SELF_QKV, "attn1.to_out.0", *CROSS_QKV, "attn2.to_out.0"),
        **norms(width, "attn1.norm_q", "attn1.norm_k", "attn2.norm_q", "attn2.norm_k"),
        **(images if added is not None else {}),
        **({"norm2": norm(width, bias=True)} if given["cross_attn_norm"] else {}),
        **feed_forward("ffn", width, given["ffn_dim"]),
    }


def _vace(given: Mapping[str, Any], width: int) -> Table:
    """A block per control layer, each with its way out; only the first has a way in."""
    block = {**_block(given, width), "proj_out": linear(width, width)}
    return {
        "vace_patch_embedding": conv(given["vace_in_channels"], width, given["patch_size"]),
        "vace_blocks.0.proj_in": linear(width, width),
        **repeated("vace_blocks", len(given["vace_layers"]), block),
    }


#: What a config cannot be read without.
WITNESSES = {
    "patch_embedding.weight",
    "condition_embedder.time_embedder.linear_1.weight",
    "condition_embedder.text_embedder.linear_1.weight",
    "blocks.0.ffn.net.2.weight",
    "proj_out.weight",
}


def config_from(shapes: Mapping[str, Shape]) -> Mapping[str, Any] | None:
    """The config those shapes belong to; the head width is guessed."""
    if not shapes.keys() >= WITNESSES:
        return None
    width, in_channels, *patch = shapes["patch_embedding.weight"]
    head = head_width({}, "", width)
    image = shapes.get("condition_embedder.image_embedder.norm1.weight")
    positions = shapes.get("condition_embedder.image_embedder.pos_embed")
    added = shapes.get("blocks.0.attn2.add_k_proj.weight")
    config: dict[str, Any] = {
        "_class_name": "WanTransformer3DModel",
        "patch_size": tuple(patch),
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0] // prod(patch),
        "text_dim": shapes["condition_embedder.text_embedder.linear_1.weight"][1],
        "freq_dim": shapes["condition_embedder.time_embedder.linear_1.weight"][1],
        "ffn_dim": shapes["blocks.0.ffn.net.2.weight"][1],
        "num_layers": count(shapes, "blocks"),
        "cross_attn_norm": "blocks.0.norm2.weight" in shapes,
        "image_dim": image[0] if image else None,
        "added_kv_proj_dim": added[1] if added else None,
        "pos_embed_seq_len": positions[1] if positions else None,
    }
    return config | _vace_config(shapes, config["num_layers"])


def _vace_config(shapes: Mapping[str, Shape], layers: int) -> dict[str, Any]:
    """Control layers are spread evenly, as in every published model."""
    controls = count(shapes, "vace_blocks")
    if not controls:
        return {}
    return {
        "_class_name": VACE,
        "vace_layers": tuple(index * layers // controls for index in range(controls)),
        "vace_in_channels": shapes["vace_patch_embedding.weight"][1],
    }


SELF_QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
CROSS_QKV = ("attn2.to_q", "attn2.to_k", "attn2.to_v")
ADDED_KV = ("attn2.add_k_proj", "attn2.add_v_proj")

#: Wan's own block. Its third norm stands before cross-attention and is diffusers' second; its
#: first two have no parameters.
BLOCK = {
    "modulation": "scale_shift_table",
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "cross_attn.k_img": "attn2.add_k_proj",
    "cross_attn.v_img": "attn2.add_v_proj",
    "cross_attn.norm_k_img": "attn2.norm_added_k",
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
}

#: The names of the Wan repositories, also of msModelSlim, LightX2V and ComfyUI.
ORIGINAL = (
    *rules(
        {
            "time_embedding.0": "condition_embedder.time_embedder.linear_1",
            "time_embedding.2": "condition_embedder.time_embedder.linear_2",
            "time_projection.1": "condition_embedder.time_proj",
            "text_embedding.0": "condition_embedder.text_embedder.linear_1",
            "text_embedding.2": "condition_embedder.text_embedder.linear_2",
            "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
            "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
            "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
            "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
            "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
            "head.modulation": "scale_shift_table",
            "head.head": "proj_out",
        }
    ),
    *rules(BLOCK, "blocks.{i}.", "blocks.{i}."),
    *rules(
        BLOCK | {"before_proj": "proj_in", "after_proj": "proj_out"},
        "vace_blocks.{i}.",
        "vace_blocks.{i}.",
    ),
)

SGLANG = (
    *rules(
        {
            "patch_embedding.proj": "patch_embedding",
            "condition_embedder.time_embedder.mlp.fc_in": (
                "condition_embedder.time_embedder.linear_1"
            ),
            "condition_embedder.time_embedder.mlp.fc_out": (
                "condition_embedder.time_embedder.linear_2"
            ),
            "condition_embedder.time_modulation.linear": "condition_embedder.time_proj",
            "condition_embedder.text_embedder.fc_in": "condition_embedder.text_embedder.linear_1",
            "condition_embedder.text_embedder.fc_out": "condition_embedder.text_embedder.linear_2",
            "condition_embedder.image_embedder.ff.fc_in": (
                "condition_embedder.image_embedder.ff.net.0.proj"
            ),
            "condition_embedder.image_embedder.ff.fc_out": (
                "condition_embedder.image_embedder.ff.net.2"
            ),
        }
    ),
    *rules(
        {
            "to_q": "attn1.to_q",
            "to_k": "attn1.to_k",
            "to_v": "attn1.to_v",
            "to_out": "attn1.to_out.0",
            "norm_q": "attn1.norm_q",
            "norm_k": "attn1.norm_k",
            "attn2.to_out": "attn2.to_out.0",
            "self_attn_residual_norm.norm": "norm2",
            "ffn.fc_in": "ffn.net.0.proj",
            "ffn.fc_out": "ffn.net.2",
        },
        "blocks.{i}.",
        "blocks.{i}.",
    ),
)

FAMILY = Family(
    class_names=("WanTransformer3DModel", VACE),
    inventory=inventory,
    config_from=config_from,
    namings={
        "diffusers": Naming(),
        "original": Naming(ORIGINAL),
        "sglang": Naming(SGLANG),
    },
    sensitive=(
        "patch_embedding",
        "vace_patch_embedding",
        "condition_embedder.**",
        "vace_blocks.*.proj_in",
        "vace_blocks.*.proj_out",
        "proj_out",
    ),
    blocks=("blocks", "vace_blocks"),
    siblings=(SELF_QKV, CROSS_QKV[1:], ADDED_KV),
    fed_by={"blocks.*.ffn.net.2": "gelu_tanh", "vace_blocks.*.ffn.net.2": "gelu_tanh"},
    float32=(
        "condition_embedder.time_embedder.*",
        "condition_embedder.image_embedder.norm*",
        "scale_shift_table",
        "blocks.*.scale_shift_table",
        "blocks.*.norm2",
        "vace_blocks.*.scale_shift_table",
        "vace_blocks.*.norm2",
    ),
    mlp=("blocks.*.ffn.**", "vace_blocks.*.ffn.**"),
    attention=("blocks.*.attn*.**", "vace_blocks.*.attn*.**"),
)
