"""Language models that read prompts: Llama, Mistral, Qwen and Gemma, with or without eyes.

What they share is one kind of block. Their checkpoints spell what stands before it in several ways
(`model.`, `language_model.model.`, `model.language_model.`), and transformers respells it.
"""

from diffquant.families import Family, Naming, told_by_header

EYES = "reads the picture of an edit, in widths few encodings divide, and is small beside the words"
WORDS = "the way back to words, from which no picture is drawn"

FAMILY = Family(
    part="text_encoder",
    class_names=(
        "LlamaModel",
        "LlamaForCausalLM",
        "MistralModel",
        "MistralForCausalLM",
        "Mistral3ForConditionalGeneration",
        "Qwen2Model",
        "Qwen2ForCausalLM",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3Model",
        "Qwen3ForCausalLM",
        "Qwen3VLForConditionalGeneration",
        "GemmaModel",
        "Gemma2Model",
        "Gemma3Model",
        "Gemma3ForCausalLM",
        "Gemma3ForConditionalGeneration",
    ),
    inventory=told_by_header,
    namings={"diffusers": Naming()},
    tables=("**.embed_tokens", "**.pos_embed", "**.position_embedding"),
    sensitive=(
        "**.lm_head",
        "**.visual.**",
        "**.vision_tower.**",
        "**.multi_modal_projector.**",
    ),
    reasons={
        "**.lm_head": WORDS,
        "**.visual.**": EYES,
        "**.vision_tower.**": EYES,
        "**.multi_modal_projector.**": EYES,
    },
    siblings=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.gate_proj", "mlp.up_proj"),
    ),
    mlp=("**.mlp.*",),
    attention=("**.self_attn.*",),
)
