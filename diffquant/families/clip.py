"""CLIP's text and picture encoders, in the names their checkpoints have: with the prefix that
transformers 5 no longer has in memory."""

from diffquant.families import Family, Naming, told_by_header

FAMILY = Family(
    part="text_encoder",
    class_names=(
        "CLIPTextModel",
        "CLIPTextModelWithProjection",
        "CLIPVisionModel",
        "CLIPVisionModelWithProjection",
    ),
    inventory=told_by_header,
    namings={"diffusers": Naming()},
    tables=("**.token_embedding", "**.position_embedding"),
    surplus={
        "**.position_ids": "places counted from 0, which the class counts itself",
        "logit_scale": "weighs texts against pictures, which no encoder does alone",
    },
    sensitive=("text_projection", "visual_projection"),
    reasons={
        "text_projection": "the last projection: its error reaches the picture undamped",
        "visual_projection": "the last projection: its error reaches the picture undamped",
    },
    blocks=("text_model.encoder.layers", "vision_model.encoder.layers"),
    siblings=(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),),
    mlp=("**.mlp.*",),
    attention=("**.self_attn.*",),
)
