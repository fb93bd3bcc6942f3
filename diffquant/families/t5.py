"""T5 and UMT5 encoders, in the names their checkpoints have (transformers, ComfyUI, Nunchaku alike).

The table of words is stored as `shared`, as `encoder.embed_tokens`, or as both.
"""

from diffquant.families import Family, Naming, Rule, told_by_header

FAMILY = Family(
    part="text_encoder",
    class_names=("T5EncoderModel", "UMT5EncoderModel", "MT5EncoderModel"),
    inventory=told_by_header,
    namings={
        "diffusers": Naming(),
        "tied": Naming((Rule("encoder.embed_tokens", ("shared",)),)),
    },
    tables=("shared", "encoder.embed_tokens", "**.relative_attention_bias"),
    tied={"encoder.embed_tokens.weight": "shared.weight"},
    surplus={
        "decoder.**": "of the T5's decoder, which an encoder does not have",
        "lm_head.**": "of the T5's decoder, which an encoder does not have",
        "spiece_model": "the tokenizer, which the pipeline brings itself",
    },
    sensitive=("**.wo",),
    reasons={
        "**.wo": "its inputs outgrow float16, for which transformers keeps it in float32",
    },
    blocks=("encoder.block",),
    siblings=(
        ("SelfAttention.q", "SelfAttention.k", "SelfAttention.v"),
        ("DenseReluDense.wi_0", "DenseReluDense.wi_1"),
    ),
    mlp=("**.DenseReluDense.*",),
    attention=("**.SelfAttention.*",),
)
