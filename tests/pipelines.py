"""A tiny real pipeline of every kind: diffusers' own classes, random weights, no network.

`PIPELINES` names them; `saved` puts one on disk as `from_pretrained` wants it.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.ltx2 import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from torch import nn

from tests import tiny

SCHEDULER = diffusers.FlowMatchEulerDiscreteScheduler
CHAT = "{% for message in messages %}{{ message.content if message.content is string else message.content[0].text }} {% endfor %}"


class Reader(tiny.WordsOnly, transformers.ProcessorMixin):
    """The stand-in as `from_pretrained` takes it."""


def flux_control() -> Any:
    """The depth or edges to follow are as many channels again."""
    return _flux(diffusers.FluxControlPipeline, in_channels=128, out_channels=64)


def flux_schnell() -> Any:
    """FLUX without guidance."""
    return tiny.tiny_flux(guidance_embeds=False)


def flux2() -> Any:
    text = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**_words(31)),
        vision_config=transformers.PixtralVisionConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        ),
    )
    return diffusers.Flux2Pipeline(
        text_encoder=_bf16(transformers.Mistral3ForConditionalGeneration(text)),
        **_flux2(guidance_embeds=True),
    )


def flux2_klein() -> Any:
    text = transformers.Qwen3Config(**_words(28))
    return diffusers.Flux2KleinPipeline(
        text_encoder=_bf16(transformers.Qwen3ForCausalLM(text)),
        is_distilled=True,
        **_flux2(guidance_embeds=False),
    )


def qwen_image() -> Any:
    return _qwen_image(diffusers.QwenImagePipeline)


def qwen_image_edit() -> Any:
    return _qwen_image(diffusers.QwenImageEditPipeline, processor=Reader())


def qwen_image_edit_plus() -> Any:
    return _qwen_image(diffusers.QwenImageEditPlusPipeline, processor=Reader())


def z_image() -> Any:
    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    )
    # its pads are torch.empty, which is whatever memory held
    nn.init.normal_(transformer.x_pad_token), nn.init.normal_(transformer.cap_pad_token)
    return diffusers.ZImagePipeline(
        transformer=_bf16(transformer),
        vae=_bf16(tiny._vae()),
        text_encoder=_bf16(transformers.Qwen3Model(transformers.Qwen3Config(**_words(2)))),
        tokenizer=_talking(),
        scheduler=SCHEDULER(),
    )


def wan_experts() -> Any:
    return tiny.tiny_wan(experts=2)


def wan_image_to_video_experts() -> Any:
    """Wan2.2 I2V-A14B: two experts, and the picture as further channels."""
    parts = tiny.tiny_wan(experts=2, in_channels=36).components
    return diffusers.WanImageToVideoPipeline(**parts, boundary_ratio=0.9)


def wan_hybrid() -> Any:
    """Wan2.2 TI2V-5B, where each place has a time of its own."""
    parts = tiny.tiny_wan().components
    return diffusers.WanPipeline(**parts, expand_timesteps=True)


def wan_hybrid_image_to_video() -> Any:
    parts = tiny.tiny_wan().components
    return diffusers.WanImageToVideoPipeline(**parts, expand_timesteps=True)


def ltx2() -> Any:
    torch.manual_seed(0)
    words = transformers.Gemma3TextConfig(**_words(2))
    text = transformers.Gemma3ForConditionalGeneration(
        transformers.Gemma3Config(
            text_config=words.to_dict(),
            vision_config=transformers.SiglipVisionConfig(
                hidden_size=16,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                image_size=28,
                patch_size=14,
            ).to_dict(),
            mm_tokens_per_image=4,
        )
    )
    parts = {"text_encoder": text, **_ltx2_models(words.hidden_size), **_ltx2_sound()}
    return diffusers.LTX2Pipeline(
        tokenizer=tiny._tokenizer(),
        scheduler=SCHEDULER(),
        **{name: _bf16(part) for name, part in parts.items()},
    )


def aura_flow() -> Any:
    """Of no family: UMT5 and a transformer nobody described."""
    torch.manual_seed(0)
    transformer = diffusers.AuraFlowTransformer2DModel(
        sample_size=16,
        in_channels=16,
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=96,
        caption_projection_dim=32,
        out_channels=16,
        pos_embed_max_size=64,
    )
    return diffusers.AuraFlowPipeline(
        transformer=_bf16(transformer),
        text_encoder=_bf16(tiny._umt5()),
        vae=_bf16(tiny._vae()),
        tokenizer=tiny._tokenizer(),
        scheduler=SCHEDULER(),
    )


def stable_diffusion() -> Any:
    """Of no family either: a UNet, most of which is convolutions."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=16,
        in_channels=16,
        out_channels=16,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        norm_num_groups=4,
    )
    return diffusers.StableDiffusionPipeline(
        unet=_bf16(unet),
        text_encoder=_bf16(tiny._clip()),
        vae=_bf16(tiny._vae()),
        tokenizer=tiny._tokenizer(),
        scheduler=diffusers.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """How to make a pipeline, and what to ask of it.

    family     of its transformers
    pictures   how many it starts from; None: it cannot take one
    masked     whether it needs to know where to paint
    video      whether it makes frames
    request    what it is asked beside the usual
    """

    make: Callable[[], Any]
    family: str
    pictures: int | None = None
    masked: bool = False
    video: bool = False
    request: dict[str, Any] = field(default_factory=lambda: {"max_sequence_length": 16})


PIPELINES = {
    "flux-dev": Kind(make=tiny.tiny_flux, family="flux1"),
    "flux-schnell": Kind(make=flux_schnell, family="flux1"),
    "flux-kontext": Kind(make=tiny.tiny_kontext, family="flux1", pictures=1),
    "flux-fill": Kind(make=tiny.tiny_fill, family="flux1", pictures=1, masked=True),
    "flux-control": Kind(make=flux_control, family="flux1", pictures=1),
    "flux2-dev": Kind(make=flux2, family="flux2"),
    "flux2-klein": Kind(make=flux2_klein, family="flux2"),
    "qwen-image": Kind(make=qwen_image, family="qwen_image"),
    "qwen-image-edit": Kind(make=qwen_image_edit, family="qwen_image", pictures=1),
    "qwen-image-edit-plus": Kind(make=qwen_image_edit_plus, family="qwen_image", pictures=2),
    "z-image": Kind(make=z_image, family="z_image"),
    "wan-t2v": Kind(make=tiny.tiny_wan, family="wan", video=True),
    "wan-t2v-experts": Kind(make=wan_experts, family="wan", video=True),
    "wan-i2v-experts": Kind(make=wan_image_to_video_experts, family="wan", pictures=1, video=True),
    "wan-ti2v": Kind(make=wan_hybrid, family="wan", video=True),
    "wan-ti2v-from-a-picture": Kind(
        make=wan_hybrid_image_to_video, family="wan", pictures=1, video=True
    ),
    "hunyuan-video": Kind(
        make=tiny.tiny_hunyuan_video,
        family="hunyuan_video",
        video=True,
        request={"max_sequence_length": 32},
    ),
    "ltx2": Kind(make=ltx2, family="ltx2", video=True),
    "aura-flow": Kind(make=aura_flow, family="generic"),
    "stable-diffusion": Kind(make=stable_diffusion, family="generic", request={}),
}


def draw_small(monkeypatch: Any) -> None:
    """Editing scales pictures to a megapixel; a tiny pipeline on two cores is not asked to."""
    modules = diffusers.pipelines
    kontext = modules.flux.pipeline_flux_kontext
    monkeypatch.setattr(kontext, "PREFERRED_KONTEXT_RESOLUTIONS", [(32, 32)])
    edit, plus = (
        getattr(modules.qwenimage, f"pipeline_qwenimage_{name}") for name in ("edit", "edit_plus")
    )
    monkeypatch.setattr(edit, "calculate_dimensions", lambda *_: (64, 64, None))
    monkeypatch.setattr(plus, "calculate_dimensions", lambda *_: (64, 64))


def saved(kind: Kind, directory: Path) -> tuple[Path, dict[str, Any]]:
    """The pipeline on disk, and the components that cannot lie there: a stand-in for a processor."""
    pipeline = kind.make()
    pipeline.set_progress_bar_config(disable=True)
    handed = {name: part for name, part in pipeline.components.items() if isinstance(part, Reader)}
    index = directory / "model_index.json"
    for name in handed:
        pipeline.register_modules(**{name: None})
        (directory / name).mkdir(parents=True)
    pipeline.save_pretrained(directory)
    told = json.loads(index.read_text())
    told |= {name: ["transformers", "Qwen2VLProcessor"] for name in handed}
    index.write_text(json.dumps(told))
    tokenizers = tuple(name for name in told if name.startswith("tokenizer"))
    tiny._name_public_tokenizer_class(directory, tokenizers)
    return directory, handed


def loaded(directory: Path, handed: dict[str, Any]) -> Any:
    """What diffusers alone makes of it."""
    name = json.loads((directory / "model_index.json").read_text())["_class_name"]
    pipeline = getattr(diffusers, name).from_pretrained(directory, dtype=torch.bfloat16, **handed)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _flux(pipeline: Any, **transformer: Any) -> Any:
    parts = tiny.tiny_flux(**transformer).components
    parts.pop("image_encoder"), parts.pop("feature_extractor")
    return pipeline(**parts)


def _flux2(**told: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        **told,
    )
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    return {
        "transformer": _bf16(transformer),
        "vae": _bf16(vae),
        "tokenizer": _talking(),
        "scheduler": SCHEDULER(),
    }


def _qwen_image(pipeline: Any, **more: Any) -> Any:
    parts = tiny.tiny_qwen_image_edit().components
    parts.pop("processor")
    for part in parts.values():
        _bf16(part)
    parts["tokenizer"].model_max_length = 512
    return pipeline(**parts, **more)


def _ltx2_models(words: int) -> dict[str, nn.Module]:
    rope = {"rope_double_precision": False, "rope_type": "split"}
    streams: dict[str, Any] = {}
    for stream in ("video", "audio"):
        streams |= {
            f"{stream}_connector_num_attention_heads": 2,
            f"{stream}_connector_attention_head_dim": 8,
            f"{stream}_connector_num_layers": 1,
            f"{stream}_connector_num_learnable_registers": None,
        }
    return {
        "transformer": diffusers.LTX2VideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=16,
            num_layers=8,
            caption_channels=words,
            **rope,
        ),
        "connectors": LTX2TextConnectors(
            caption_channels=words,
            text_proj_in_factor=3,
            connector_rope_base_seq_len=32,
            **streams,
            **rope,
        ),
        "vae": diffusers.AutoencoderKLLTX2Video(
            latent_channels=4,
            block_out_channels=(8,),
            decoder_block_out_channels=(8,),
            layers_per_block=(1,),
            decoder_layers_per_block=(1, 1),
            spatio_temporal_scaling=(True,),
            decoder_spatio_temporal_scaling=(True,),
            decoder_inject_noise=(False, False),
            downsample_type=("spatial",),
            upsample_residual=(False,),
            upsample_factor=(1,),
            patch_size=1,
        ),
    }


def _ltx2_sound() -> dict[str, nn.Module]:
    heard = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4,
        output_channels=2,
        ch_mult=(1,),
        num_res_blocks=1,
        resolution=32,
        latent_channels=2,
        mel_bins=8,
    )
    spoken = LTX2Vocoder(
        in_channels=2 * 8,
        hidden_channels=16,
        out_channels=2,
        # a hundred mel frames a second, as the autoencoder counts them, make 8000 samples
        upsample_kernel_sizes=[20, 16],
        upsample_factors=[10, 8],
        output_sampling_rate=8000,
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
    )
    return {"audio_vae": heard, "vocoder": spoken}


def _words(layers: int) -> dict[str, Any]:
    """A language model sixteen numbers wide."""
    return {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
    }


def _talking() -> Any:
    """A tokenizer that takes conversations."""
    tokenizer = tiny._tokenizer()
    tokenizer.chat_template = CHAT
    return tokenizer


def _bf16(part: Any) -> Any:
    return part.to(torch.bfloat16).eval() if isinstance(part, nn.Module) else part
