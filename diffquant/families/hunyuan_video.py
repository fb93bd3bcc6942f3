"""HunyuanVideo: FLUX-like double and single blocks behind a small refiner of the text tokens."""

from collections.abc import Mapping
from math import prod
from typing import Any

from diffquant.families import Family, Inventory, Naming, Shape
from diffquant.families._config import settings
from diffquant.families._names import ADDED_QKV, FINAL_MODULATION, QKV, Names, rules
from diffquant.families._shapes import (
    Table,
    conv,
    count,
    feed_forward,
    head_width,
    linear,
    norms,
    ratio,
    repeated,
    rope_axes,
    squares,
    two_linears,
)
from diffquant.families._shapes import inventory as assembled

DEFAULTS: Mapping[str, Any] = {
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 20,
    "num_single_layers": 40,
    "num_refiner_layers": 2,
    "mlp_ratio": 4.0,
    "patch_size": 2,
    "patch_size_t": 1,
    "qk_norm": "rms_norm",
    "guidance_embeds": True,
    "text_embed_dim": 4096,
    "pooled_projection_dim": 768,
}
FREQUENCIES = 256
REFINER_MLP_RATIO = 4

REFINER = "context_embedder.token_refiner.refiner_blocks"


def inventory(config: Mapping[str, Any]) -> Inventory:
    """Every parameter of HunyuanVideoTransformer3DModel."""
    given = settings(DEFAULTS, config)
    width = given["num_attention_heads"] * given["attention_head_dim"]
    hidden = int(width * given["mlp_ratio"])
    patch = (given["patch_size_t"], given["patch_size"], given["patch_size"])
    out = prod(patch) * (given["out_channels"] or given["in_channels"])
    return assembled(
        {"x_embedder.proj": conv(given["in_channels"], width, patch)},
        _context(given, width),
        _conditions(given, width),
        repeated("transformer_blocks", given["num_layers"], _double(given, width, hidden)),
        repeated(
            "single_transformer_blocks", given["num_single_layers"], _single(given, width, hidden)
        ),
        {"norm_out.linear": linear(width, 2 * width), "proj_out": linear(width, out)},
    )


def _context(given: Mapping[str, Any], width: int) -> Table:
    at, text = "context_embedder", given["text_embed_dim"]
    block = {
        **norms(width, "norm1", "norm2", bias=True),
        **squares(width, *QKV, "attn.to_out.0"),
        **feed_forward("ff", width, REFINER_MLP_RATIO * width),
        "norm_out.linear": linear(width, 2 * width),
    }
    return {
        **two_linears(f"{at}.time_text_embed.timestep_embedder", FREQUENCIES, width),
        **two_linears(f"{at}.time_text_embed.text_embedder", text, width),
        f"{at}.proj_in": linear(text, width),
        **repeated(REFINER, given["num_refiner_layers"], block),
    }


def _conditions(given: Mapping[str, Any], width: int) -> Table:
    guidance = two_linears("time_text_embed.guidance_embedder", FREQUENCIES, width)
    return {
        **two_linears("time_text_embed.timestep_embedder", FREQUENCIES, width),
        **two_linears("time_text_embed.text_embedder", given["pooled_projection_dim"], width),
        **(guidance if given["guidance_embeds"] else {}),
    }


def _double(given: Mapping[str, Any], width: int, hidden: int) -> Table:
    return {
        "norm1.linear": linear(width, 6 * width),
        "norm1_context.linear": linear(width, 6 * width),
        **_head_norms(
            given, "attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k"
        ),
        **squares(width, *QKV, *ADDED_QKV, "attn.to_out.0", "attn.to_add_out"),
        **feed_forward("ff", width, hidden),
        **feed_forward("ff_context", width, hidden),
    }


def _single(given: Mapping[str, Any], width: int, hidden: int) -> Table:
    return {
        **_head_norms(given, "attn.norm_q", "attn.norm_k"),
        **squares(width, *QKV),
        "norm.linear": linear(width, 3 * width),
        "proj_mlp": linear(width, hidden),
        "proj_out": linear(width + hidden, width),
    }


def _head_norms(given: Mapping[str, Any], *paths: str) -> Table:
    """Other kinds of `qk_norm` than these two have no parameters."""
    kind = given["qk_norm"]
    affine = kind in ("rms_norm", "layer_norm")
    return norms(given["attention_head_dim"], *paths, bias=kind == "layer_norm") if affine else {}


#: What a config cannot be read without.
WITNESSES = {
    "x_embedder.proj.weight",
    "context_embedder.proj_in.weight",
    "time_text_embed.text_embedder.linear_1.weight",
    "proj_out.weight",
}


def config_from(shapes: Mapping[str, Shape]) -> Mapping[str, Any] | None:
    """The config those shapes belong to; how an image condition enters is guessed from channels."""
    if not shapes.keys() >= WITNESSES:
        return None
    width, in_channels, patch_t, patch, _ = shapes["x_embedder.proj.weight"]
    out_channels = shapes["proj_out.weight"][0] // (patch_t * patch * patch)
    head = head_width(shapes, ".attn.norm_q.weight", width)
    doubled = in_channels == 2 * out_channels + 1
    return {
        "_class_name": "HunyuanVideoTransformer3DModel",
        "in_channels": in_channels,
        "out_channels": out_channels,
        "num_attention_heads": width // head,
        "attention_head_dim": head,
        "num_layers": count(shapes, "transformer_blocks"),
        "num_single_layers": count(shapes, "single_transformer_blocks"),
        "num_refiner_layers": count(shapes, REFINER),
        "mlp_ratio": ratio(_hidden(shapes, width), width),
        "patch_size": patch,
        "patch_size_t": patch_t,
        "qk_norm": _qk_norm(shapes),
        "guidance_embeds": "time_text_embed.guidance_embedder.linear_1.weight" in shapes,
        "text_embed_dim": shapes["context_embedder.proj_in.weight"][1],
        "pooled_projection_dim": shapes["time_text_embed.text_embedder.linear_1.weight"][1],
        "rope_axes_dim": rope_axes(head, 7),
        "image_condition_type": "latent_concat" if doubled else None,
    }


def _hidden(shapes: Mapping[str, Shape], width: int) -> int:
    """Width inside the feed-forwards, from whichever kind of block there is."""
    double = shapes.get("transformer_blocks.0.ff.net.2.weight")
    single = shapes.get("single_transformer_blocks.0.proj_out.weight")
    if double is not None:
        return double[1]
    return single[1] - width if single is not None else 4 * width


def _qk_norm(shapes: Mapping[str, Shape]) -> str | None:
    if any(name.endswith(".attn.norm_q.bias") for name in shapes):
        return "layer_norm"
    return "rms_norm" if any(name.endswith(".attn.norm_q.weight") for name in shapes) else None


DOUBLE = "transformer_blocks.{i}."
SINGLE = "single_transformer_blocks.{i}."
REFINED = REFINER + ".{i}."
TEXT = "context_embedder.time_text_embed."

#: Tencent's names, as far as SGLang kept them.
TENCENT = (
    *rules(
        {
            "img_in.proj": "x_embedder.proj",
            "txt_in.input_embedder": "context_embedder.proj_in",
            "final_layer.linear": "proj_out",
        }
    ),
    *rules(
        {
            "img_mod.linear": "norm1.linear",
            "img_attn_qkv": QKV,
            "img_attn_q_norm": "attn.norm_q",
            "img_attn_k_norm": "attn.norm_k",
            "img_attn_proj": "attn.to_out.0",
            "txt_mod.linear": "norm1_context.linear",
            "txt_attn_qkv": ADDED_QKV,
            "txt_attn_q_norm": "attn.norm_added_q",
            "txt_attn_k_norm": "attn.norm_added_k",
            "txt_attn_proj": "attn.to_add_out",
        },
        stored="double_blocks.{i}.",
        path=DOUBLE,
    ),
    *rules(
        {
            "modulation.linear": "norm.linear",
            "linear1": (*QKV, "proj_mlp"),
            "linear2": "proj_out",
            "q_norm": "attn.norm_q",
            "k_norm": "attn.norm_k",
        },
        stored="single_blocks.{i}.",
        path=SINGLE,
    ),
)
REFINER_BLOCK: Names = {
    "norm1": "norm1",
    "norm2": "norm2",
    "self_attn_qkv": QKV,
    "self_attn_proj": "attn.to_out.0",
}

#: Tencent's repository, also ComfyUI.
ORIGINAL = (
    *TENCENT,
    *rules(
        {
            "t_embedder.mlp.0": "timestep_embedder.linear_1",
            "t_embedder.mlp.2": "timestep_embedder.linear_2",
            "c_embedder.linear_1": "text_embedder.linear_1",
            "c_embedder.linear_2": "text_embedder.linear_2",
        },
        stored="txt_in.",
        path=TEXT,
    ),
    *rules(
        {
            "time_in.mlp.0": "timestep_embedder.linear_1",
            "time_in.mlp.2": "timestep_embedder.linear_2",
            "guidance_in.mlp.0": "guidance_embedder.linear_1",
            "guidance_in.mlp.2": "guidance_embedder.linear_2",
            "vector_in.in_layer": "text_embedder.linear_1",
            "vector_in.out_layer": "text_embedder.linear_2",
        },
        path="time_text_embed.",
    ),
    *rules(
        {
            **REFINER_BLOCK,
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
            "adaLN_modulation.1": "norm_out.linear",
        },
        stored="txt_in.individual_token_refiner.blocks.{i}.",
        path=REFINED,
    ),
    *rules(
        {
            "img_mlp.fc1": "ff.net.0.proj",
            "img_mlp.fc2": "ff.net.2",
            "txt_mlp.fc1": "ff_context.net.0.proj",
            "txt_mlp.fc2": "ff_context.net.2",
        },
        stored="double_blocks.{i}.",
        path=DOUBLE,
    ),
    FINAL_MODULATION,
)

#: SGLang renames what it reads in diffusers' names, so the halves of the output modulation stay as
#: diffusers has them.
SGLANG = (
    *TENCENT,
    *rules(
        {
            "t_embedder.mlp.fc_in": "timestep_embedder.linear_1",
            "t_embedder.mlp.fc_out": "timestep_embedder.linear_2",
            "c_embedder.fc_in": "text_embedder.linear_1",
            "c_embedder.fc_out": "text_embedder.linear_2",
        },
        stored="txt_in.",
        path=TEXT,
    ),
    *rules(
        {
            "time_in.mlp.fc_in": "timestep_embedder.linear_1",
            "time_in.mlp.fc_out": "timestep_embedder.linear_2",
            "guidance_in.mlp.fc_in": "guidance_embedder.linear_1",
            "guidance_in.mlp.fc_out": "guidance_embedder.linear_2",
            "vector_in.fc_in": "text_embedder.linear_1",
            "vector_in.fc_out": "text_embedder.linear_2",
        },
        path="time_text_embed.",
    ),
    *rules(
        {
            **REFINER_BLOCK,
            "mlp.fc_in": "ff.net.0.proj",
            "mlp.fc_out": "ff.net.2",
            "adaLN_modulation.linear": "norm_out.linear",
        },
        stored="txt_in.refiner_blocks.{i}.",
        path=REFINED,
    ),
    *rules(
        {
            "img_mlp.fc_in": "ff.net.0.proj",
            "img_mlp.fc_out": "ff.net.2",
            "txt_mlp.fc_in": "ff_context.net.0.proj",
            "txt_mlp.fc_out": "ff_context.net.2",
        },
        stored="double_blocks.{i}.",
        path=DOUBLE,
    ),
    *rules({"final_layer.adaLN_modulation.linear": "norm_out.linear"}),
)

FAMILY = Family(
    class_names=("HunyuanVideoTransformer3DModel",),
    inventory=inventory,
    config_from=config_from,
    namings={
        "diffusers": Naming(),
        "original": Naming(ORIGINAL, falls_through=False),
        "sglang": Naming(SGLANG, falls_through=False),
    },
    sensitive=(
        "x_embedder.proj",
        "context_embedder.**",
        "time_text_embed.**",
        "transformer_blocks.*.norm1.linear",
        "transformer_blocks.*.norm1_context.linear",
        "single_transformer_blocks.*.norm.linear",
        "norm_out.linear",
        "proj_out",
    ),
    blocks=("transformer_blocks", "single_transformer_blocks", REFINER),
    siblings=(QKV, ADDED_QKV),
    fed_by={
        "transformer_blocks.*.ff.net.2": "gelu_tanh",
        "transformer_blocks.*.ff_context.net.2": "gelu_tanh",
        "single_transformer_blocks.*.proj_out:1": "gelu_tanh",
        REFINER + ".*.ff.net.2": "silu",
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
