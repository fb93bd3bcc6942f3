"""Z-Image (Turbo, Omni): single-stream layers behind refiners of noise, text and image features.

The feed-forward is w2(silu(w1 x) * w3 x). Nunchaku stores w3 above w1 as one layer, SGLang w1 above
w3.
"""

from collections.abc import Mapping
from typing import Any

from diffquant.errors import PlanError
from diffquant.families import Family, Inventory, Naming, Shape
from diffquant.families._config import settings
from diffquant.families._names import rules
from diffquant.families._shapes import (
    Table,
    count,
    head_width,
    linear,
    lone,
    norm,
    norms,
    repeated,
    rope_axes,
    squares,
)
from diffquant.families._shapes import inventory as assembled

DEFAULTS: Mapping[str, Any] = {
    "all_patch_size": (2,),
    "all_f_patch_size": (1,),
    "in_channels": 16,
    "dim": 3840,
    "n_layers": 30,
    "n_refiner_layers": 2,
    "n_heads": 30,
    "qk_norm": True,
    "cap_feat_dim": 2560,
    "siglip_feat_dim": None,
}
FREQUENCIES = 256
TIMESTEP_HIDDEN = 1024
CONDITION = 256  # widest timestep embedding; narrower models use their own width

QKV = ("attention.to_q", "attention.to_k", "attention.to_v")
NORMS = ("attention_norm1", "ffn_norm1", "attention_norm2", "ffn_norm2")


def inventory(config: Mapping[str, Any]) -> Inventory:
    """Every parameter of ZImageTransformer2DModel."""
    given = settings(DEFAULTS, config)
    modulation = linear(_condition(given), 4 * given["dim"])
    modulated = {**_block(given), "adaLN_modulation.0": modulation}
    refiners = given["n_refiner_layers"]
    return assembled(
        _features(given, "cap", given["cap_feat_dim"]),
        {"x_pad_token": lone(1, given["dim"])},
        _patches(given),
        repeated("noise_refiner", refiners, modulated),
        repeated("context_refiner", refiners, _block(given)),
        _timestep(given),
        _siglip(given) if given["siglip_feat_dim"] is not None else {},
        repeated("layers", given["n_layers"], modulated),
    )


def _condition(given: Mapping[str, Any]) -> int:
    return min(CONDITION, int(given["dim"]))


def _patches(given: Mapping[str, Any]) -> Table:
    """One embedder and one final layer per patch size, named `<side>-<frames>`."""
    table: dict[str, Any] = {}
    width = given["dim"]
    all_sides, all_frames = given["all_patch_size"], given["all_f_patch_size"]
    if len(all_sides) != len(all_frames):
        raise PlanError(
            f"the config lists {len(all_sides)} all_patch_size and {len(all_frames)} "
            "all_f_patch_size, as many were needed",
            hint="is this the config.json of the module?",
        )
    for side, frames in zip(all_sides, all_frames, strict=True):
        values = side * side * frames * given["in_channels"]
        final = f"all_final_layer.{side}-{frames}"
        table[f"all_x_embedder.{side}-{frames}"] = linear(values, width)
        table[f"{final}.linear"] = linear(width, values)
        table[f"{final}.adaLN_modulation.1"] = linear(_condition(given), width)
    return table


def _timestep(given: Mapping[str, Any]) -> Table:
    return {
        "t_embedder.mlp.0": linear(FREQUENCIES, TIMESTEP_HIDDEN),
        "t_embedder.mlp.2": linear(TIMESTEP_HIDDEN, _condition(given)),
    }


def _features(given: Mapping[str, Any], name: str, features: int) -> Table:
    return {
        f"{name}_embedder.0": norm(features),
        f"{name}_embedder.1": linear(features, given["dim"]),
        f"{name}_pad_token": lone(1, given["dim"]),
    }


def _siglip(given: Mapping[str, Any]) -> Table:
    """The image features of the Omni variant."""
    return {
        **_features(given, "siglip", given["siglip_feat_dim"]),
        **repeated("siglip_refiner", given["n_refiner_layers"], _block(given)),
    }


def _block(given: Mapping[str, Any]) -> Table:
    width = given["dim"]
    hidden = int(width / 3 * 8)
    head_norms = norms(width // given["n_heads"], "attention.norm_q", "attention.norm_k")
    return {
        **(head_norms if given["qk_norm"] else {}),
        **squares(width, *QKV, "attention.to_out.0", bias=False),
        "feed_forward.w1": linear(width, hidden, bias=False),
        "feed_forward.w2": linear(hidden, width, bias=False),
        "feed_forward.w3": linear(width, hidden, bias=False),
        **norms(width, *NORMS),
    }


#: What a config cannot be read without.
WITNESSES = {"cap_embedder.1.weight", "t_embedder.mlp.0.weight"}


def config_from(shapes: Mapping[str, Shape]) -> Mapping[str, Any] | None:
    """The config those shapes belong to; rope axes are the usual ones."""
    embedders = [name for name in shapes if name.startswith("all_x_embedder.")]
    patches = sorted({tuple(map(int, name.split(".")[1].split("-"))) for name in embedders})
    if not patches or not shapes.keys() >= WITNESSES:
        return None
    width, features = shapes["cap_embedder.1.weight"]
    side, frames = patches[0]
    head = head_width(shapes, ".attention.norm_q.weight", width)
    siglip = shapes.get("siglip_embedder.1.weight")
    return {
        "_class_name": "ZImageTransformer2DModel",
        "all_patch_size": tuple(side for side, _ in patches),
        "all_f_patch_size": tuple(frames for _, frames in patches),
        "in_channels": shapes[f"all_x_embedder.{side}-{frames}.weight"][1]
        // (side * side * frames),
        "dim": width,
        "n_layers": count(shapes, "layers"),
        "n_refiner_layers": count(shapes, "noise_refiner"),
        "n_heads": width // head,
        "n_kv_heads": width // head,
        "qk_norm": any(name.endswith(".attention.norm_q.weight") for name in shapes),
        "cap_feat_dim": features,
        "siglip_feat_dim": siglip[1] if siglip else None,
        "axes_dims": rope_axes(head, 6),
    }


BLOCKS = ("layers", "noise_refiner", "context_refiner", "siglip_refiner")


def _in_blocks(names: Mapping[str, str | tuple[str, ...]]) -> Naming:
    prefixes = [f"{blocks}.{{i}}." for blocks in BLOCKS]
    return Naming(tuple(rule for prefix in prefixes for rule in rules(names, prefix, prefix)))


#: ComfyUI's single files; the model itself was published in diffusers' names.
ORIGINAL = Naming(
    (
        *rules(
            {
                "x_embedder": "all_x_embedder.2-1",
                "final_layer.linear": "all_final_layer.2-1.linear",
                "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
            }
        ),
        *_in_blocks(
            {
                "attention.qkv": QKV,
                "attention.out": "attention.to_out.0",
                "attention.q_norm": "attention.norm_q",
                "attention.k_norm": "attention.norm_k",
            }
        ).rules,
    )
)

NUNCHAKU = _in_blocks(
    {
        "attention.to_qkv": QKV,
        "feed_forward.net.0.proj": ("feed_forward.w3", "feed_forward.w1"),
        "feed_forward.net.2": "feed_forward.w2",
    }
)

SGLANG = _in_blocks(
    {"attention.to_qkv": QKV, "feed_forward.w13": ("feed_forward.w1", "feed_forward.w3")}
)

FAMILY = Family(
    class_names=("ZImageTransformer2DModel",),
    inventory=inventory,
    config_from=config_from,
    namings={
        "diffusers": Naming(),
        "original": ORIGINAL,
        "nunchaku": NUNCHAKU,  # never had names of its own: files spell upstream's modules
        "nunchaku_v2": NUNCHAKU,
        "sglang": SGLANG,
    },
    sensitive=(
        "all_x_embedder.*",
        "cap_embedder.1",
        "siglip_embedder.1",
        "t_embedder.mlp.*",
        "*_refiner.**",
        "layers.*.adaLN_modulation.0",
        "all_final_layer.**",
    ),
    blocks=BLOCKS,
    siblings=(QKV, ("feed_forward.w1", "feed_forward.w3")),
    fed_by={f"{blocks}.*.feed_forward.w2": "silu_gate" for blocks in BLOCKS},
    chunked={
        "layers.*.adaLN_modulation.0": (4, (0, 2)),
        "noise_refiner.*.adaLN_modulation.0": (4, (0, 2)),
    },
    mlp=tuple(f"{blocks}.*.feed_forward.*" for blocks in BLOCKS),
    attention=tuple(f"{blocks}.*.attention.**" for blocks in BLOCKS),
)
