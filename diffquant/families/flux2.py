"""FLUX.2 (dev, klein): modulation shared by all blocks, gated feed-forwards, no biases at all.

A single-stream block is two linears: `attn.to_qkv_mlp_proj` gives q, k, v, gate and value;
`attn.to_out` reads attention and gated output side by side along K.
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
)
from diffquant.families._shapes import (
    Table,
    count,
    head_width,
    linear,
    norms,
    ratio,
    repeated,
    squares,
    two_linears,
)
from diffquant.families._shapes import inventory as assembled

DEFAULTS: Mapping[str, Any] = {
    "patch_size": 1,
    "in_channels": 128,
    "out_channels": None,
    "num_layers": 8,
    "num_single_layers": 48,
    "attention_head_dim": 128,
    "num_attention_heads": 48,
    "joint_attention_dim": 15360,
    "timestep_guidance_channels": 256,
    "mlp_ratio": 3.0,
    "guidance_embeds": True,
}


def inventory(config: Mapping[str, Any]) -> Inventory:
    """Every parameter of Flux2Transformer2DModel."""
    given = settings(DEFAULTS, config)
    head = given["attention_head_dim"]
    width = given["num_attention_heads"] * head
    hidden = int(width * given["mlp_ratio"])
    out = given["patch_size"] ** 2 * (given["out_channels"] or given["in_channels"])
    return assembled(
        _shared(given, width),
        repeated("transformer_blocks", given["num_layers"], _double(width, head, hidden)),
        repeated(
            "single_transformer_blocks", given["num_single_layers"], _single(width, head, hidden)
        ),
        {
            "norm_out.linear": linear(width, 2 * width, bias=False),
            "proj_out": linear(width, out, bias=False),
        },
    )


def _shared(given: Mapping[str, Any], width: int) -> Table:
    steps = given["timestep_guidance_channels"]
    guidance = two_linears("time_guidance_embed.guidance_embedder", steps, width, bias=False)
    return {
        **two_linears("time_guidance_embed.timestep_embedder", steps, width, bias=False),
        **(guidance if given["guidance_embeds"] else {}),
        "double_stream_modulation_img.linear": linear(width, 6 * width, bias=False),
        "double_stream_modulation_txt.linear": linear(width, 6 * width, bias=False),
        "single_stream_modulation.linear": linear(width, 3 * width, bias=False),
        "x_embedder": linear(given["in_channels"], width, bias=False),
        "context_embedder": linear(given["joint_attention_dim"], width, bias=False),
    }


def _double(width: int, head: int, hidden: int) -> Table:
    return {
        **squares(width, *QKV, "attn.to_out.0", *ADDED_QKV, "attn.to_add_out", bias=False),
        **norms(head, "attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k"),
        "ff.linear_in": linear(width, 2 * hidden, bias=False),
        "ff.linear_out": linear(hidden, width, bias=False),
        "ff_context.linear_in": linear(width, 2 * hidden, bias=False),
        "ff_context.linear_out": linear(hidden, width, bias=False),
    }


def _single(width: int, head: int, hidden: int) -> Table:
    return {
        "attn.to_qkv_mlp_proj": linear(width, 3 * width + 2 * hidden, bias=False),
        "attn.to_out": linear(width + hidden, width, bias=False),
        **norms(head, "attn.norm_q", "attn.norm_k"),
    }


#: What a config cannot be read without.
WITNESSES = {
    "x_embedder.weight",
    "context_embedder.weight",
    "time_guidance_embed.timestep_embedder.linear_1.weight",
    "proj_out.weight",
}


def config_from(shapes: Mapping[str, Shape]) -> Mapping[str, Any] | None:
    """The config those shapes belong to; patch_size and rope axes are the usual ones."""
    if not shapes.keys() >= WITNESSES:
        return None
    steps = shapes["time_guidance_embed.timestep_embedder.linear_1.weight"]
    width, in_channels = shapes["x_embedder.weight"]
    head = head_width(shapes, ".attn.norm_q.weight", width)
    return {
        "_class_name": "Flux2Transformer2DModel",
        "patch_size": 1,
        "in_channels": in_channels,
        "out_channels": shapes["proj_out.weight"][0],
        "num_layers": count(shapes, "transformer_blocks"),
        "num_single_layers": count(shapes, "single_transformer_blocks"),
        "attention_head_dim": head,
        "num_attention_heads": width // head,
        "joint_attention_dim": shapes["context_embedder.weight"][1],
        "timestep_guidance_channels": steps[1],
        "mlp_ratio": ratio(_hidden(shapes, width), width),
        "axes_dims_rope": (head // 4,) * 4,
        "guidance_embeds": "time_guidance_embed.guidance_embedder.linear_1.weight" in shapes,
    }


def _hidden(shapes: Mapping[str, Shape], width: int) -> int:
    """Width inside the feed-forwards, from whichever kind of block there is."""
    double = shapes.get("transformer_blocks.0.ff.linear_out.weight")
    single = shapes.get("single_transformer_blocks.0.attn.to_out.weight")
    if double is not None:
        return double[1]
    return single[1] - width if single is not None else 3 * width


DOUBLE = "transformer_blocks.{i}."
SINGLE = "single_transformer_blocks.{i}."

#: Black Forest Labs' own names, also of FLUX.2-dev-NVFP4 and ComfyUI.
BFL = (
    *rules(
        {
            "img_in": "x_embedder",
            "txt_in": "context_embedder",
            "time_in.in_layer": "time_guidance_embed.timestep_embedder.linear_1",
            "time_in.out_layer": "time_guidance_embed.timestep_embedder.linear_2",
            "guidance_in.in_layer": "time_guidance_embed.guidance_embedder.linear_1",
            "guidance_in.out_layer": "time_guidance_embed.guidance_embedder.linear_2",
            "double_stream_modulation_img.lin": "double_stream_modulation_img.linear",
            "double_stream_modulation_txt.lin": "double_stream_modulation_txt.linear",
            "single_stream_modulation.lin": "single_stream_modulation.linear",
            "final_layer.linear": "proj_out",
        }
    ),
    *rules(
        {
            "img_attn.qkv": QKV,
            "txt_attn.qkv": ADDED_QKV,
            "img_attn.proj": "attn.to_out.0",
            "txt_attn.proj": "attn.to_add_out",
            "img_mlp.0": "ff.linear_in",
            "img_mlp.2": "ff.linear_out",
            "txt_mlp.0": "ff_context.linear_in",
            "txt_mlp.2": "ff_context.linear_out",
            **BFL_DOUBLE_NORMS,
        },
        stored="double_blocks.{i}.",
        path=DOUBLE,
    ),
    *rules(
        {
            "linear1": "attn.to_qkv_mlp_proj",
            "linear2": "attn.to_out",
            **BFL_SINGLE_NORMS,
        },
        stored="single_blocks.{i}.",
        path=SINGLE,
    ),
    FINAL_MODULATION,
)

SGLANG = rules({"attn.to_qkv": QKV, "attn.to_added_qkv": ADDED_QKV}, DOUBLE, DOUBLE)

FAMILY = Family(
    class_names=("Flux2Transformer2DModel",),
    inventory=inventory,
    config_from=config_from,
    namings={
        "diffusers": Naming(),
        "bfl": Naming(BFL, falls_through=False),
        "sglang": Naming(SGLANG),
    },
    sensitive=(
        "x_embedder",
        "context_embedder",
        "time_guidance_embed.**",
        "double_stream_modulation_*.linear",
        "single_stream_modulation.linear",
        "norm_out.linear",
        "proj_out",
    ),
    blocks=("transformer_blocks", "single_transformer_blocks"),
    siblings=(QKV, ADDED_QKV),
    fed_by={
        "transformer_blocks.*.ff.linear_out": "silu_gate",
        "transformer_blocks.*.ff_context.linear_out": "silu_gate",
        "single_transformer_blocks.*.attn.to_out:1": "silu_gate",
    },
    chunked={
        "double_stream_modulation_*.linear": (6, (1, 4)),
        "single_stream_modulation.linear": (3, (1,)),
    },
    mlp=(
        "transformer_blocks.*.ff.*",
        "transformer_blocks.*.ff_context.*",
        "single_transformer_blocks.*.attn.*",
    ),
    attention=("transformer_blocks.*.attn.**", "single_transformer_blocks.*.attn.**"),
)
