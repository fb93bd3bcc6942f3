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
    AutoencoderKLHunyuanVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    FlowMatchEulerDiscreteScheduler,
    FluxFillPipeline,
    FluxKontextPipeline,
    FluxPipeline,
    FluxTransformer2DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    QwenImageEditPipeline,
    QwenImageTransformer2DModel,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BatchFeature,
    CLIPTextConfig,
    CLIPTextModel,
    LlamaConfig,
    LlamaModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

DATA = Path(__file__).parent / "data"

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
WAN_FP8 = DATA / "modelopt" / "wan" / "fp8"
#: That of the ModelOpt cases under `data/modelopt/wan`.
WAN_TRANSFORMER: dict[str, Any] = {
    "attention_head_dim": 64,
    "ffn_dim": 352,
    "freq_dim": 64,
    "in_channels": 16,
    "num_attention_heads": 2,
    "num_layers": 2,
    "out_channels": 16,
    "rope_max_seq_len": 64,
    "text_dim": 96,
}
WORDS = ("red", "green", "blue", "apple", "pear", "car", "a", "the", "of", "on")
TEXT_TOKENS = 16


def tiny_flux(**transformer: Any) -> FluxPipeline:
    """A FluxPipeline of 3 MB; keywords change the transformer's config."""
    torch.manual_seed(0)
    config = {**TRANSFORMER, **transformer}
    parts = {
        "vae": _vae((config.get("out_channels") or config["in_channels"]) // 4),
        "text_encoder": _clip(width=config["pooled_projection_dim"]),
        "text_encoder_2": _t5(config["joint_attention_dim"]),
        "transformer": FluxTransformer2DModel(**config),
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


def tiny_kontext() -> FluxKontextPipeline:
    """The tiny FLUX as an edit pipeline: the picture's tokens follow the latents'."""
    parts = tiny_flux().components
    parts.pop("image_encoder"), parts.pop("feature_extractor")
    pipeline = FluxKontextPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_fill() -> FluxFillPipeline:
    """The tiny FLUX as a fill pipeline: masked picture (64) and mask (16) are further channels."""
    parts = tiny_flux(in_channels=64 + 64 + 16, out_channels=64).components
    parts.pop("image_encoder"), parts.pop("feature_extractor")
    pipeline = FluxFillPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_wan(*, experts: int = 1, **transformer: Any) -> WanPipeline:
    """A WanPipeline of one or two transformers; keywords change the config of both."""
    torch.manual_seed(0)
    config = {**WAN_TRANSFORMER, **transformer}
    models = [WanTransformer3DModel(**config).to(torch.bfloat16).eval() for _ in range(experts)]
    second = {"transformer_2": models[1], "boundary_ratio": 0.875} if experts == 2 else {}
    pipeline = WanPipeline(
        tokenizer=_tokenizer(),
        text_encoder=_umt5().to(torch.bfloat16).eval(),
        vae=_video_vae().eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        transformer=models[0],
        **second,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_wan_pipeline(directory: Path, *, experts: int = 1, **transformer: Any) -> Path:
    """Save `tiny_wan` to `directory`."""
    tiny_wan(experts=experts, **transformer).save_pretrained(directory)
    _name_public_tokenizer_class(directory, ("tokenizer",))
    return directory


def tiny_wan_image_to_video() -> WanImageToVideoPipeline:
    """The tiny Wan that starts from a picture: mask (4) and picture (16) are further channels."""
    parts = tiny_wan(in_channels=36).components
    parts.pop("transformer_2")
    pipeline = WanImageToVideoPipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_qwen_image_edit() -> QwenImageEditPipeline:
    """A QwenImageEditPipeline whose language model reads the words and not the picture."""
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        axes_dims_rope=(8, 4, 4),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    pipeline = QwenImageEditPipeline(
        transformer=transformer.eval(),
        vae=vae.eval(),
        text_encoder=_qwen_vl().eval(),
        tokenizer=_tokenizer(),
        processor=WordsOnly(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class WordsOnly:
    """Stands in for Qwen2VLProcessor, which needs torchvision: the words, and no pixels."""

    def __init__(self) -> None:
        self.tokenizer = _tokenizer()
        self.tokenizer.model_max_length = 512

    def __call__(self, text: list[str], images: Any, **told: Any) -> BatchFeature:
        return BatchFeature(dict(self.tokenizer(text, **told)))


def _qwen_vl() -> Qwen2_5_VLForConditionalGeneration:
    text = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_scaling": {"mrope_section": [1, 1, 2], "rope_type": "default", "type": "default"},
        "vocab_size": 32,
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 16,
    }
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, vocab_size=32)
    return Qwen2_5_VLForConditionalGeneration(config)


def tiny_hunyuan_video() -> HunyuanVideoPipeline:
    """A HunyuanVideoPipeline whose language model is four numbers wide."""
    torch.manual_seed(0)
    parts = {
        "transformer": HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=1,
            num_single_layers=1,
            num_refiner_layers=1,
            patch_size=1,
            text_embed_dim=16,
            pooled_projection_dim=64,
            rope_axes_dim=(2, 4, 4),
        ),
        "vae": _hunyuan_vae(),
        "text_encoder": _llama(),
        "text_encoder_2": _clip(tokens=77),
    }
    pipeline = HunyuanVideoPipeline(
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        **{name: part.to(torch.bfloat16).eval() for name, part in parts.items()},
    )
    pipeline.vae.to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _umt5() -> UMT5EncoderModel:
    return UMT5EncoderModel(
        UMT5Config(vocab_size=32, d_model=96, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    )


def _llama() -> LlamaModel:
    return LlamaModel(
        LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=37,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
            pad_token_id=1,
        )
    )


def _video_vae() -> AutoencoderKLWan:
    return AutoencoderKLWan(
        base_dim=3,
        z_dim=16,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )


def _hunyuan_vae() -> AutoencoderKLHunyuanVideo:
    return AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
    )


def _vae(channels: int = 16) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def _clip(tokens: int = TEXT_TOKENS, width: int = 64) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=32,
            hidden_size=width,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=tokens,
            projection_dim=64,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
    )


def _t5(width: int = 96) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=32, d_model=width, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
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


def _name_public_tokenizer_class(
    directory: Path, tokenizers: tuple[str, ...] = ("tokenizer", "tokenizer_2")
) -> None:
    """transformers 5 writes an internal class name that `FluxPipeline.from_pretrained` warns of."""
    index_path = directory / "model_index.json"
    index = json.loads(index_path.read_text())
    for component in tokenizers:
        index[component] = ["transformers", "PreTrainedTokenizerFast"]
        config_path = directory / component / "tokenizer_config.json"
        config = json.loads(config_path.read_text())
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        config_path.write_text(json.dumps(config))
    index_path.write_text(json.dumps(index))
