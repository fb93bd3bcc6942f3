"""LTX-2: video and its sound in one transformer, two streams of blocks that read each other.

Every module of the video has a twin of the audio. The two attentions between the streams are as
wide inside as the audio. LTX-2.3 adds gates to attention and modulates what prompts say.
"""

from collections.abc import Mapping
from typing import Any

from diffquant.families import Family, Inventory, Naming, Shape
from diffquant.families._config import settings
from diffquant.families._names import Names, rules
from diffquant.families._shapes import (
    Table,
    count,
    head_width,
    linear,
    lone,
    norms,
    repeated,
    two_linears,
)
from diffquant.families._shapes import inventory as assembled

DEFAULTS: Mapping[str, Any] = {
    "in_channels": 128,
    "out_channels": 128,
    "num_attention_heads": 32,
    "attention_head_dim": 128,
    "cross_attention_dim": 4096,
    "gated_attn": False,
    "cross_attn_mod": False,
    "audio_in_channels": 128,
    "audio_out_channels": 128,
    "audio_num_attention_heads": 32,
    "audio_attention_head_dim": 64,
    "audio_cross_attention_dim": 2048,
    "audio_gated_attn": False,
    "audio_cross_attn_mod": False,
    "num_layers": 48,
    "norm_elementwise_affine": False,
    "caption_channels": 3840,
    "attention_bias": True,
    "attention_out_bias": True,
    "use_prompt_embeddings": True,
    "ff_bias": True,
    "audio_ff_bias": True,
    "use_prompt_adaln_single": True,
    "use_keyframes_abs_pos_embedding": False,
}
TIME = 256  # sines and cosines of a timestep
STREAMS = ("", "audio_")


def inventory(config: Mapping[str, Any]) -> Inventory:
    """Every parameter of LTX2VideoTransformer3DModel."""
    given = settings(DEFAULTS, config)
    keyframes = {"keyframes_abs_pos_embedding": lone(1, _width(given, ""))}
    return assembled(
        keyframes if given["use_keyframes_abs_pos_embedding"] else {},
        *(_around(given, stream) for stream in STREAMS),
        _between(given),
        repeated("transformer_blocks", given["num_layers"], _block(given)),
    )


def _width(given: Mapping[str, Any], stream: str) -> int:
    width: int = given[f"{stream}num_attention_heads"] * given[f"{stream}attention_head_dim"]
    return width


def _parameters(given: Mapping[str, Any], stream: str) -> int:
    """Shift, scale and gate of self-attention and feed-forward; of prompts too in LTX-2.3."""
    return 9 if given[f"{stream}cross_attn_mod"] else 6


def _modulates_prompts(given: Mapping[str, Any]) -> bool:
    return any(given[f"{stream}cross_attn_mod"] for stream in STREAMS)


def _around(given: Mapping[str, Any], stream: str) -> Table:
    """What stands before and behind the blocks of one stream."""
    width, channels = _width(given, stream), given[f"{stream}in_channels"]
    prompts = _modulates_prompts(given) and given["use_prompt_adaln_single"]
    captions = two_linears(f"{stream}caption_projection", given["caption_channels"], width)
    return {
        f"{stream}proj_in": linear(channels, width),
        **(captions if given["use_prompt_embeddings"] else {}),
        **_modulation(f"{stream}time_embed", width, _parameters(given, stream)),
        **(_modulation(f"{stream}prompt_adaln", width, 2) if prompts else {}),
        f"{stream}scale_shift_table": lone(2, width),
        f"{stream}proj_out": linear(width, given[f"{stream}out_channels"] or channels),
    }


def _between(given: Mapping[str, Any]) -> Table:
    """Modulation of the attentions from one stream to the other."""
    video, audio = (_width(given, stream) for stream in STREAMS)
    return {
        **_modulation("av_cross_attn_video_scale_shift", video, 4),
        **_modulation("av_cross_attn_audio_scale_shift", audio, 4),
        **_modulation("av_cross_attn_video_a2v_gate", video, 1),
        **_modulation("av_cross_attn_audio_v2a_gate", audio, 1),
    }


def _modulation(path: str, width: int, parameters: int) -> Table:
    return {
        **two_linears(f"{path}.emb.timestep_embedder", TIME, width),
        f"{path}.linear": linear(width, parameters * width),
    }


def _block(given: Mapping[str, Any]) -> Table:
    video, audio = (_width(given, stream) for stream in STREAMS)
    prompts = {
        f"{stream}prompt_scale_shift_table": lone(2, _width(given, stream)) for stream in STREAMS
    }
    return {
        **_stream(given, ""),
        **_stream(given, "audio_"),
        **_attention(given, "audio_to_video_attn", "", (video, audio, audio)),
        **_attention(given, "video_to_audio_attn", "audio_", (audio, video, audio)),
        "video_a2v_cross_attn_scale_shift_table": lone(5, video),
        "audio_a2v_cross_attn_scale_shift_table": lone(5, audio),
        **(prompts if _modulates_prompts(given) else {}),
        **(
            {**norms(video, "audio_to_video_norm"), **norms(audio, "video_to_audio_norm")}
            if given["norm_elementwise_affine"]
            else {}
        ),
    }


def _stream(given: Mapping[str, Any], stream: str) -> Table:
    """Self-attention, attention to the prompt and feed-forward of one stream."""
    width, bias = _width(given, stream), given[f"{stream}ff_bias"]
    affine = norms(width, *(f"{stream}norm{place}" for place in (1, 2, 3)))
    prompt = given[f"{stream}cross_attention_dim"]
    return {
        f"{stream}scale_shift_table": lone(_parameters(given, stream), width),
        **(affine if given["norm_elementwise_affine"] else {}),
        **_attention(given, f"{stream}attn1", stream, (width, width, width)),
        **_attention(given, f"{stream}attn2", stream, (width, prompt, width)),
        f"{stream}ff.net.0.proj": linear(width, 4 * width, bias),
        f"{stream}ff.net.2": linear(4 * width, width, bias),
    }


def _attention(
    given: Mapping[str, Any], path: str, stream: str, widths: tuple[int, int, int]
) -> Table:
    """widths: of what asks (and is answered), of what is asked, of the heads together."""
    asks, asked, inner = widths
    between = path.endswith("_attn")
    heads = given["audio_num_attention_heads" if between else f"{stream}num_attention_heads"]
    bias = given["attention_bias"]
    gates = {f"{path}.to_gate_logits": linear(asks, heads)}
    return {
        **norms(inner, f"{path}.norm_q", f"{path}.norm_k"),
        f"{path}.to_q": linear(asks, inner, bias),
        f"{path}.to_k": linear(asked, inner, bias),
        f"{path}.to_v": linear(asked, inner, bias),
        f"{path}.to_out.0": linear(inner, asks, given["attention_out_bias"]),
        **(gates if given[f"{stream}gated_attn"] else {}),
    }


BLOCK = "transformer_blocks.0."
#: What a config cannot be read without.
WITNESSES = {
    "proj_in.weight",
    "proj_out.weight",
    "audio_proj_in.weight",
    "audio_proj_out.weight",
    f"{BLOCK}attn2.to_k.weight",
    f"{BLOCK}audio_attn2.to_k.weight",
    f"{BLOCK}audio_to_video_attn.to_q.weight",
    f"{BLOCK}scale_shift_table",
    f"{BLOCK}audio_scale_shift_table",
}


def config_from(shapes: Mapping[str, Shape]) -> Mapping[str, Any] | None:
    """The config those shapes belong to; where nothing is gated the width of heads is guessed."""
    if not shapes.keys() >= WITNESSES:
        return None
    captions = shapes.get("caption_projection.linear_1.weight")
    return {
        "_class_name": "LTX2VideoTransformer3DModel",
        "num_layers": count(shapes, "transformer_blocks"),
        "norm_elementwise_affine": f"{BLOCK}norm1.weight" in shapes,
        "caption_channels": captions[1] if captions else DEFAULTS["caption_channels"],
        "use_prompt_embeddings": captions is not None,
        "attention_bias": f"{BLOCK}attn1.to_q.bias" in shapes,
        "attention_out_bias": f"{BLOCK}attn1.to_out.0.bias" in shapes,
        "use_prompt_adaln_single": "prompt_adaln.linear.weight" in shapes,
        "use_keyframes_abs_pos_embedding": "keyframes_abs_pos_embedding" in shapes,
        **_stream_config(shapes, ""),
        **_stream_config(shapes, "audio_"),
    }


def _stream_config(shapes: Mapping[str, Shape], stream: str) -> dict[str, Any]:
    width, channels = shapes[f"{stream}proj_in.weight"]
    gates = shapes.get(f"{BLOCK}{stream}attn1.to_gate_logits.weight")
    between = shapes.get(f"{BLOCK}audio_to_video_attn.to_gate_logits.weight")
    told = gates or (between if stream else None)
    heads = told[0] if told else width // head_width({}, "", width)
    return {
        f"{stream}num_attention_heads": heads,
        f"{stream}attention_head_dim": width // heads,
        f"{stream}in_channels": channels,
        f"{stream}out_channels": shapes[f"{stream}proj_out.weight"][0],
        f"{stream}cross_attention_dim": shapes[f"{BLOCK}{stream}attn2.to_k.weight"][1],
        f"{stream}gated_attn": gates is not None,
        f"{stream}cross_attn_mod": shapes[f"{BLOCK}{stream}scale_shift_table"][0] == 9,
        f"{stream}ff_bias": f"{BLOCK}{stream}ff.net.2.bias" in shapes,
    }


ATTENTIONS = (
    "attn1",
    "attn2",
    "audio_attn1",
    "audio_attn2",
    "audio_to_video_attn",
    "video_to_audio_attn",
)
MODULATIONS = {
    "adaln_single": "time_embed",
    "audio_adaln_single": "audio_time_embed",
    "av_ca_video_scale_shift_adaln_single": "av_cross_attn_video_scale_shift",
    "av_ca_audio_scale_shift_adaln_single": "av_cross_attn_audio_scale_shift",
    "av_ca_a2v_gate_adaln_single": "av_cross_attn_video_a2v_gate",
    "av_ca_v2a_gate_adaln_single": "av_cross_attn_audio_v2a_gate",
}
MODULATION = ("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")
MODULATED: Names = {
    f"{old}.{inner}": f"{new}.{inner}" for old, new in MODULATIONS.items() for inner in MODULATION
}
BLOCKS: Names = {
    "scale_shift_table_a2v_ca_video": "video_a2v_cross_attn_scale_shift_table",
    "scale_shift_table_a2v_ca_audio": "audio_a2v_cross_attn_scale_shift_table",
    **{f"{path}.q_norm": f"{path}.norm_q" for path in ATTENTIONS},
    **{f"{path}.k_norm": f"{path}.norm_k" for path in ATTENTIONS},
}

#: Lightricks' own names, also those of ComfyUI; what is not listed is spelled as in diffusers.
ORIGINAL = (
    *rules({"patchify_proj": "proj_in", "audio_patchify_proj": "audio_proj_in"}),
    *rules(MODULATED),
    *rules(BLOCKS, "transformer_blocks.{i}.", "transformer_blocks.{i}."),
)

CONNECTOR = "of the connectors, a component of its own"
ELSEWHERE = "of another component, which lies in the same file"

FAMILY = Family(
    class_names=("LTX2VideoTransformer3DModel",),
    inventory=inventory,
    config_from=config_from,
    namings={"diffusers": Naming(), "original": Naming(ORIGINAL)},
    surplus={
        "**.video_embeddings_connector.**": CONNECTOR,
        "**.audio_embeddings_connector.**": CONNECTOR,
        "text_embedding_projection.**": CONNECTOR,
        "vae.**": ELSEWHERE,
        "audio_vae.**": ELSEWHERE,
        "vocoder.**": ELSEWHERE,
    },
    sensitive=(
        "proj_in",
        "audio_proj_in",
        "caption_projection.**",
        "audio_caption_projection.**",
        "time_embed.**",
        "audio_time_embed.**",
        "av_cross_attn_*.**",
        "proj_out",
        "audio_proj_out",
    ),
    blocks=("transformer_blocks",),
    siblings=tuple(
        (f"{path}.to_q", f"{path}.to_k", f"{path}.to_v") for path in ("attn1", "audio_attn1")
    )
    + tuple((f"{path}.to_k", f"{path}.to_v") for path in ATTENTIONS if not path.endswith("1")),
    fed_by={
        "transformer_blocks.*.ff.net.2": "gelu_tanh",
        "transformer_blocks.*.audio_ff.net.2": "gelu_tanh",
    },
    mlp=("transformer_blocks.*.ff.**", "transformer_blocks.*.audio_ff.**"),
    attention=("transformer_blocks.*.*attn*.**",),
)
