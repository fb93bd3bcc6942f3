"""Qwen-Image and its editing variants: sixty double-stream blocks, image and text."""

from collections.abc import Mapping
from typing import Any

from diffquant.families import Family, Inventory, Naming, Shape
from diffquant.families._config import settings
from diffquant.families._names import ADDED_QKV, QKV, rules
from diffquant.families._shapes import (
    Table,
    count,
    embedding,
    feed_forward,
    head_width,
    linear,
    norm,
    norms,
    repeated,
    rope_axes,
    squares,
    two_linears,
)
from diffquant.families._shapes import inventory as assembled

DEFAULTS: Mapping[str, Any] = {
    "patch_size": 2,
    "in_channels": 64,
    "out_channels": 16,
    "num_layers": 60,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 3584,
    "use_additional_t_cond": False,
}
FREQUENCIES = 256
MLP_RATIO = 4


def inventory(config: Mapping[str, Any]) -> Inventory:
    """Every parameter of QwenImageTransformer2DModel."""
    given = settings(DEFAULTS, config)
    head = given["attention_head_dim"]
    width = given["num_attention_heads"] * head
    out = given["patch_size"] ** 2 * (given["out_channels"] or given["in_channels"])
    return assembled(
        _embedders(given, width),
        repeated("transformer_blocks", given["num_layers"], _block(width, head)),
        {"norm_out.linear": linear(width, 2 * width), "proj_out": linear(width, out)},
    )


def _embedders(given: Mapping[str, Any], width: int) -> Table:
    extra = {"time_text_embed.addition_t_embedding": embedding(2, width)}
    return {
        **two_linears("time_text_embed.timestep_embedder", FREQUENCIES, width),
        **(extra if given["use_additional_t_cond"] else {}),
        "txt_norm": norm(given["joint_attention_dim"]),
        "img_in": linear(given["in_channels"], width),
        "txt_in": linear(given["joint_attention_dim"], width),
    }


def _block(width: int, head: int) -> Table:
    return {
        "img_mod.1": linear(width, 6 * width),
        **norms(head, "attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k"),
        **squares(width, *QKV, *ADDED_QKV, "attn.to_out.0", "attn.to_add_out"),
        **feed_forward("img_mlp", width, MLP_RATIO * width),
        "txt_mod.1": linear(width, 6 * width),
        **feed_forward("txt_mlp", width, MLP_RATIO * width),
    }


#: What a config cannot be read without.
WITNESSES = {"img_in.weight", "txt_norm.weight", "proj_out.weight"}


def config_from(shapes: Mapping[str, Shape]) -> Mapping[str, Any] | None:
    """The config those shapes belong to. Shapes do not tell `zero_cond_t` (2511) from its absence."""
    if not shapes.keys() >= WITNESSES:
        return None
    width, in_channels = shapes["img_in.weight"]
    head = head_width(shapes, ".attn.norm_q.weight", width)
    out = shapes["proj_out.weight"][0]
    patch = 2 if out % 4 == 0 else 1
    return {
        "_class_name": "QwenImageTransformer2DModel",
        "patch_size": patch,
        "in_channels": in_channels,
        "out_channels": out // patch**2,
        "num_layers": count(shapes, "transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["txt_norm.weight"][0],
        "axes_dims_rope": rope_axes(head, 7),
        "use_additional_t_cond": "time_text_embed.addition_t_embedding.weight" in shapes,
    }


BLOCK = "transformer_blocks.{i}."

NUNCHAKU = Naming(rules({"attn.to_qkv": QKV, "attn.add_qkv_proj": ADDED_QKV}, BLOCK, BLOCK))

SGLANG = rules(
    {
        "attn.to_qkv": QKV,
        "attn.to_added_qkv": ADDED_QKV,
        "img_mod": "img_mod.1",
        "txt_mod": "txt_mod.1",
    },
    BLOCK,
    BLOCK,
)

FAMILY = Family(
    class_names=("QwenImageTransformer2DModel",),
    inventory=inventory,
    config_from=config_from,
    namings={
        "diffusers": Naming(),
        "original": Naming(),  # published in diffusers' names; ComfyUI only adds a prefix
        "nunchaku": NUNCHAKU,  # never had names of its own: files spell upstream's modules
        "nunchaku_v2": NUNCHAKU,
        "sglang": Naming(SGLANG),
    },
    sensitive=(
        "img_in",
        "txt_in",
        "time_text_embed.**",
        "transformer_blocks.*.img_mod.1",
        "transformer_blocks.*.txt_mod.1",
        "norm_out.linear",
        "proj_out",
    ),
    blocks=("transformer_blocks",),
    siblings=(QKV, ADDED_QKV),
    fed_by={
        "transformer_blocks.*.img_mlp.net.2": "gelu_tanh",
        "transformer_blocks.*.txt_mlp.net.2": "gelu_tanh",
    },
    chunked={
        "transformer_blocks.*.img_mod.1": (6, (1, 4)),
        "transformer_blocks.*.txt_mod.1": (6, (1, 4)),
    },
    mlp=("transformer_blocks.*.img_mlp.**", "transformer_blocks.*.txt_mlp.**"),
    attention=("transformer_blocks.*.attn.**",),
)
