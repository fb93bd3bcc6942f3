"""FLUX.1 (dev, schnell, Krea, Kontext, Fill …): double-stream blocks, then single-stream blocks.

The single block's `proj_out` reads attention and GELU output side by side: columns 0 … D - 1 come
from attention, the rest from the feed-forward. Files that store them as two layers are two slices
along K of one module; `proj_out:1` names the second.
"""

from collections.abc import Mapping
from typing import Any

from diffquant.families import Family, Inventory, Naming, Shape
from diffquant.families._config import settings
from diffquant.families._names import (
    ADDED_QKV,
    BFL_DOUBLE_NORMS,
    BFL_SINGLE_NORMS,
    FINAL_MODULATION,
    QKV,
    rules,
    slices,
)
from diffquant.families._shapes import (
    Table,
    count,
    feed_forward,
    head_width,
    linear,
    norms,
    repeated,
    rope_axes,
    squares,
    two_linears,
)
from diffquant.families._shapes import inventory as assembled

DEFAULTS: Mapping[str, Any] = {
    "patch_size": 1,
    "in_channels": 64,
    "out_channels": None,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": False,
}
FREQUENCIES = 256
MLP_RATIO = 4


def inventory(config: Mapping[str, Any]) -> Inventory:
    """Every parameter of FluxTransformer2DModel."""
    given = settings(DEFAULTS, config)
    head = given["attention_head_dim"]
    width = given["num_attention_heads"] * head
    out = given["patch_size"] ** 2 * (given["out_channels"] or given["in_channels"])
    return assembled(
        _embedders(given, width),
        repeated("transformer_blocks", given["num_layers"], _double(width, head)),
        repeated("single_transformer_blocks", given["num_single_layers"], _single(width, head)),
        {"norm_out.linear": linear(width, 2 * width), "proj_out": linear(width, out)},
    )


def _embedders(given: Mapping[str, Any], width: int) -> Table:
    guidance = two_linears("time_text_embed.guidance_embedder", FREQUENCIES, width)
    return {
        **two_linears("time_text_embed.timestep_embedder", FREQUENCIES, width),
        **(guidance if given["guidance_embeds"] else {}),
        **two_linears("time_text_embed.text_embedder", given["pooled_projection_dim"], width),
        "context_embedder": linear(given["joint_attention_dim"], width),
        "x_embedder": linear(given["in_channels"], width),
    }


def _double(width: int, head: int) -> Table:
    return {
        "norm1.linear": linear(width, 6 * width),
        "norm1_context.linear": linear(width, 6 * width),
        **norms(head, "attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k"),
        **squares(width, *QKV, "attn.to_out.0", *ADDED_QKV, "attn.to_add_out"),
        **feed_forward("ff", width, MLP_RATIO * width),
        **feed_forward("ff_context", width, MLP_RATIO * width),
    }


def _single(width: int, head: int) -> Table:
    return {
        "norm.linear": linear(width, 3 * width),
        "proj_mlp": linear(width, MLP_RATIO * width),
        "proj_out": linear((1 + MLP_RATIO) * width, width),
        **norms(head, "attn.norm_q", "attn.norm_k"),
        **squares(width, *QKV),
    }


#: What a config cannot be read without.
WITNESSES = {
    "x_embedder.weight",
    "context_embedder.weight",
    "time_text_embed.text_embedder.linear_1.weight",
    "proj_out.weight",
}


def config_from(shapes: Mapping[str, Shape]) -> Mapping[str, Any] | None:
    """The config those shapes belong to; patch_size and rope axes are the usual ones."""
    if not shapes.keys() >= WITNESSES:
        return None
    width, in_channels = shapes["x_embedder.weight"]
    head = head_width(shapes, ".attn.norm_q.weight", width)
    return {
        "_class_name": "FluxTransformer2DModel",
        "patch_size": 1,
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0],
        "num_layers": count(shapes, "transformer_blocks"),
        "num_single_layers": count(shapes, "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "axes_dims_rope": rope_axes(head, 7),
    }


DOUBLE = "transformer_blocks.{i}."
SINGLE = "single_transformer_blocks.{i}."

#: Black Forest Labs' own names, also ComfyUI's.
BFL = (
    *rules(
        {
            "img_in": "x_embedder",
            "txt_in": "context_embedder",
            "time_in.in_layer": "time_text_embed.timestep_embedder.linear_1",
            "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
            "vector_in.in_layer": "time_text_embed.text_embedder.linear_1",
            "vector_in.out_layer": "time_text_embed.text_embedder.linear_2",
            "guidance_in.in_layer": "time_text_embed.guidance_embedder.linear_1",
            "guidance_in.out_layer": "time_text_embed.guidance_embedder.linear_2",
            "final_layer.linear": "proj_out",
        }
    ),
    *rules(
        {
            "img_mod.lin": "norm1.linear",
            "txt_mod.lin": "norm1_context.linear",
            "img_attn.qkv": QKV,
            "txt_attn.qkv": ADDED_QKV,
            "img_attn.proj": "attn.to_out.0",
            "txt_attn.proj": "attn.to_add_out",
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
            **BFL_DOUBLE_NORMS,
        },
        stored="double_blocks.{i}.",
        path=DOUBLE,
    ),
    *rules(
        {
            "modulation.lin": "norm.linear",
            "linear1": (*QKV, "proj_mlp"),
            "linear2": "proj_out",
            **BFL_SINGLE_NORMS,
        },
        stored="single_blocks.{i}.",
        path=SINGLE,
    ),
    FINAL_MODULATION,
)

#: Every published Nunchaku FLUX.1 file.
NUNCHAKU = (
    *rules(
        {
            "qkv_proj": QKV,
            "qkv_proj_context": ADDED_QKV,
            "out_proj": "attn.to_out.0",
            "out_proj_context": "attn.to_add_out",
            "norm_q": "attn.norm_q",
            "norm_k": "attn.norm_k",
            "norm_added_q": "attn.norm_added_q",
            "norm_added_k": "attn.norm_added_k",
            "mlp_fc1": "ff.net.0.proj",
            "mlp_fc2": "ff.net.2",
            "mlp_context_fc1": "ff_context.net.0.proj",
            "mlp_context_fc2": "ff_context.net.2",
        },
        stored=DOUBLE,
        path=DOUBLE,
    ),
    *rules(
        {
            "qkv_proj": QKV,
            "norm_q": "attn.norm_q",
            "norm_k": "attn.norm_k",
            "mlp_fc1": "proj_mlp",
        },
        stored=SINGLE,
        path=SINGLE,
    ),
    *slices((SINGLE + "out_proj", SINGLE + "mlp_fc2"), SINGLE + "proj_out"),
)

#: Nunchaku's Python modules, as its second FLUX.1 implementation spells them.
NUNCHAKU_V2 = (
    *rules({"attn.to_qkv": QKV, "attn.add_qkv_proj": ADDED_QKV}, DOUBLE, DOUBLE),
    *rules({"attn.to_qkv": QKV, "mlp_fc1": "proj_mlp"}, SINGLE, SINGLE),
    *slices((SINGLE + "attn.to_out", SINGLE + "mlp_fc2"), SINGLE + "proj_out"),
)

SGLANG = (
    *rules({"attn.to_qkv": QKV, "attn.to_added_qkv": ADDED_QKV}, DOUBLE, DOUBLE),
    *rules({"attn.to_qkv": QKV}, SINGLE, SINGLE),
)

FAMILY = Family(
    class_names=("FluxTransformer2DModel",),
    inventory=inventory,
    config_from=config_from,
    namings={
        "diffusers": Naming(),
        "bfl": Naming(BFL, falls_through=False),
        "nunchaku": Naming(NUNCHAKU),
        "nunchaku_v2": Naming(NUNCHAKU_V2),
        "sglang": Naming(SGLANG),
    },
    sensitive=(
        "x_embedder",
        "context_embedder",
        "time_text_embed.**",
        "transformer_blocks.*.norm1.linear",
        "transformer_blocks.*.norm1_context.linear",
        "single_transformer_blocks.*.norm.linear",
        "norm_out.linear",
        "proj_out",
    ),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    siblings=(QKV, ADDED_QKV),
    joined={"single_transformer_blocks.*.proj_out": ("attn.to_v", "proj_mlp")},
    fed_by={
        "transformer_blocks.*.ff.net.2": "gelu_tanh",
        "transformer_blocks.*.ff_context.net.2": "gelu_tanh",
        "single_transformer_blocks.*.proj_out:1": "gelu_tanh",
    },
    chunked={
        "transformer_blocks.*.norm1.linear": (6, (1, 4)),
        "transformer_blocks.*.norm1_context.linear": (6, (1, 4)),
        "single_transformer_blocks.*.norm.linear": (3, (1,)),
    },
    mlp=(
        "transformer_blocks.*.ff.**",
        "transformer_blocks.*.ff_context.**",
        "single_transformer_blocks.*.proj_mlp",
        "single_transformer_blocks.*.proj_out",
    ),
    attention=("transformer_blocks.*.attn.**", "single_transformer_blocks.*.attn.**"),
)
