"""Autoencoders. Nearly all of one is convolutions, which nothing here quantizes; where the middle has
attention, its four projections are linears.

Checkpoints from before diffusers 0.18 call them query, key, value and proj_attn.
"""

from diffquant.families import Family, Naming, told_by_header
from diffquant.families._names import rules

OLD = {
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "proj_attn": "to_out.0",
}
MIDDLE = "mid_block.attentions.{i}."

FAMILY = Family(
    part="autoencoder",
    class_names=(
        "AutoencoderKL",
        "AutoencoderKLFlux2",
        "AutoencoderKLQwenImage",
        "AutoencoderKLWan",
        "AutoencoderKLHunyuanVideo",
        "AutoencoderKLLTX2Video",
        "AutoencoderKLLTX2Audio",
    ),
    inventory=told_by_header,
    namings={
        "diffusers": Naming(),
        "old": Naming(
            (
                *rules(OLD, f"encoder.{MIDDLE}", f"encoder.{MIDDLE}"),
                *rules(OLD, f"decoder.{MIDDLE}", f"decoder.{MIDDLE}"),
            )
        ),
    },
    tables=("**.*embed*.**",),
    siblings=(("to_q", "to_k", "to_v"),),
    attention=("**.attentions.**",),
)
