"""Tiny but real pipelines for tests: diffusers' own classes, random weights, no network.

The transformer has the shapes of the ModelOpt cases under `data/modelopt/flux`, so that those true
exports fit it as overrides.
"""

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

DATA = Path(__file__).parent / "data"
FP8_OVERRIDE = DATA / "modelopt" / "flux" / "fp8"

TRANSFORMER: dict[str, Any] = {
    "attention_head_dim": 64,
    "axes_dims_rope": [16, 24, 24],
    "guidance_embeds": True,
    "in_channels": 64,
    "joint_attention_dim": 96,
    "num_attention_heads": 2,
    "num_layers": 1,
    "num_single_layers": 2,
    "patch_size": 1,
    "pooled_projection_dim": 64,
}
WORDS = ("red", "green", "blue", "apple", "pear", "car", "a", "the", "of", "on")
TEXT_TOKENS = 16


def tiny_flux(**transformer: Any) -> FluxPipeline:
    """A FluxPipeline of 3 MB; keywords change the transformer's config."""
    torch.manual_seed(0)
    parts = {
        "vae": _vae(),
        "text_encoder": _clip(),
        "text_encoder_2": _t5(),
        "transformer": FluxTransformer2DModel(**{**TRANSFORMER, **transformer}),
    }
    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        **{name: part.to(torch.bfloat16).eval() for name, part in parts.items()},
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_flux_pipeline(directory: Path, **transformer: Any) -> Path:
    """Save `tiny_flux` to `directory`."""
    tiny_flux(**transformer).save_pretrained(directory)
    _name_public_tokenizer_class(directory)
    return directory


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def _clip() -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=32,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=TEXT_TOKENS,
            projection_dim=64,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def _t5() -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=32, d_model=96, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    )


def _tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: number for number, word in enumerate(("<s>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="</s>",
        model_max_length=TEXT_TOKENS,
    )


def _name_public_tokenizer_class(directory: Path) -> None:
    """transformers 5 writes an internal class name that `FluxPipeline.from_pretrained` warns of."""
    index_path = directory / "model_index.json"
    index = json.loads(index_path.read_text())
    for component in ("tokenizer", "tokenizer_2"):
        index[component] = ["transformers", "PreTrainedTokenizerFast"]
        config_path = directory / component / "tokenizer_config.json"
        config = json.loads(config_path.read_text())
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config_path.write_text(json.dumps(config))
    index_path.write_text(json.dumps(index))
