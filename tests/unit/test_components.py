"""Text encoders and autoencoders: other weights, quantized while loading, in names of their own."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import diffquant
from diffquant import cli, device, headers, loading, online, planner, resolve, sources
from diffquant.classes import respelled, skeleton
from diffquant.errors import FormatError, PlanError, UsageError
from diffquant.families import FAMILIES
from diffquant.kernels import choose
from diffquant.layouts import nunchaku_awq
from diffquant.linear import QuantLinear
from diffquant.materialize import materialize
from diffquant.plan import Plan, Role
from diffquant.resolve import ModelFlags
from tests import tiny

SMALL = ("--width", "32", "--height", "32", "--num-inference-steps", "2", "--device", "cpu")
IDS = torch.tensor([[3, 4, 5, 1]])
WORDS: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
EYES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves


def mistral() -> nn.Module:
    config = transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**WORDS),
        vision_config=transformers.PixtralVisionConfig(**EYES),
    )
    return transformers.Mistral3ForConditionalGeneration(config)


def gemma() -> nn.Module:
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**WORDS).to_dict(),
        vision_config=transformers.SiglipVisionConfig(**EYES).to_dict(),
        mm_tokens_per_image=4,
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def qwen(**told: Any) -> nn.Module:
    return transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**WORDS, **told))


#: Class -> a tiny one of it, how many linears it has, and how many are quantized by default.
ENCODERS = {
    "CLIPTextModel": (tiny._clip, 6, 6),
    "T5EncoderModel": (tiny._t5, 6, 5),
    "UMT5EncoderModel": (tiny._umt5, 7, 6),
    "LlamaModel": (tiny._llama, 21, 21),
    "Qwen3ForCausalLM": (lambda: qwen(tie_word_embeddings=True), 14, 14),
    "Qwen2_5_VLForConditionalGeneration": (tiny._qwen_vl, 27, 14),
    "Mistral3ForConditionalGeneration": (mistral, 24, 14),
    "Gemma3ForConditionalGeneration": (gemma, 23, 14),
}


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every encoder as transformers itself saves it, in bfloat16."""
    folder = tmp_path_factory.mktemp("encoders")
    for name, (make, _, _) in ENCODERS.items():
        torch.manual_seed(0)
        make().to(torch.bfloat16).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_flux_pipeline(tmp_path_factory.mktemp("tiny") / "flux")


def planned(folder: Path, class_name: str, library: str = "transformers") -> Plan:
    checkpoint = sources.checkpoint(str(folder))
    config = {**checkpoint.config, "_class_name": class_name, "_library": library}
    return planner.plan(checkpoint, headers.read(checkpoint.files), config=config)


def built(plan: Plan, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    own = respelled(plan)
    choices = [choose(layer, device.parse("cpu")) for layer in own.layers]
    return materialize(own, choices, device=torch.device("cpu"), dtype=dtype)


def hidden(model: nn.Module) -> Tensor:
    with torch.inference_mode():
        return model(input_ids=IDS, output_hidden_states=True).hidden_states[-1].float()


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


# every class ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_what_transformers_loads_bit_by_bit(stored: Path, name: str) -> None:
    plan = planned(stored / name, name)
    assert len(plan.layers) == ENCODERS[name][1]
    ours = built(plan)
    theirs = getattr(transformers, name).from_pretrained(stored / name, dtype=torch.bfloat16).eval()
    truth = dict(theirs.state_dict())
    assert ours.state_dict().keys() == truth.keys()
    for key, value in ours.state_dict().items():
        assert value.dtype == truth[key].dtype, key
        assert torch.equal(value, truth[key]), key
    assert torch.equal(hidden(ours), hidden(theirs))


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_is_quantized_but_for_what_its_family_calls_sensitive(
    stored: Path, name: str
) -> None:
    plan = planned(stored / name, name)
    changed = online.requantized(plan, online.Online(scheme="fp8"))
    model = built(changed)
    assert sum(isinstance(part, QuantLinear) for part in model.modules()) == ENCODERS[name][2]
    assert 0 < distance(hidden(model), hidden(built(plan))) < 0.1
    family = FAMILIES.load(plan.family)
    kept = [note for note in changed.notes if "calls it sensitive" in note]
    assert all(any(reason in note for reason in family.reasons.values()) for note in kept)


def test_every_pattern_of_the_families_is_alive(stored: Path) -> None:
    seen: dict[str, set[str]] = {}
    for name in ENCODERS:
        plan = planned(stored / name, name)
        tables = {each.name.removesuffix(".weight") for each in plan.plain}
        seen.setdefault(plan.family, set()).update({layer.path for layer in plan.layers} | tables)
    for name, paths in seen.items():
        family = FAMILIES.load(name)
        for pattern in (*family.sensitive, *family.mlp, *family.attention):
            found = [path for path in paths if online.patterns.matches(pattern, path)]
            assert found or pattern in ("text_projection", "visual_projection"), pattern
        for group in family.siblings:
            assert all(any(path.endswith(suffix) for path in paths) for suffix in group), group


def test_modules_that_transformers_keeps_in_float32_stay_there_in_float16_only(
    stored: Path,
) -> None:
    plan = planned(stored / "T5EncoderModel", "T5EncoderModel")
    for dtype, kept in ((torch.float16, torch.float32), (torch.bfloat16, torch.bfloat16)):
        model = built(plan, dtype)
        theirs = transformers.T5EncoderModel.from_pretrained(stored / "T5EncoderModel", dtype=dtype)
        found = {name: value.dtype for name, value in model.named_parameters()}
        assert found == {name: value.dtype for name, value in theirs.named_parameters()}
        assert found["encoder.block.0.layer.1.DenseReluDense.wo.weight"] is kept


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


# names ------------------------------------------------------------------------------------------


def test_a_plan_gets_the_names_that_transformers_has_in_memory() -> None:
    bundled = Path(diffquant.__file__).parent / "models" / "emoji_flux" / "text_encoder"
    plan = planned(bundled, "CLIPTextModel")
    assert plan.layers[0].path.startswith("text_model.encoder.layers.0.")
    own = respelled(plan)
    assert {layer.path for layer in own.layers} < set(dict(skeleton(plan.config).named_modules()))
    assert respelled(own) == own


def test_a_t5_may_store_its_words_under_either_name_or_both(stored: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stored / "T5EncoderModel", tmp_path / "t5")
    truth = hidden(built(planned(folder, "T5EncoderModel")))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    words = tensors.pop("shared.weight")
    for names in (
        ("encoder.embed_tokens.weight",),
        ("encoder.embed_tokens.weight", "shared.weight"),
    ):
        save_file({**tensors, **{name: words.clone() for name in names}}, file)
        plan = planned(folder, "T5EncoderModel")
        assert (
            list(plan.unused.values()) == ["the same numbers as 'shared.weight'"][: len(names) - 1]
        )
        assert torch.equal(hidden(built(plan)), truth)


def test_a_decoder_beside_the_encoder_is_nobodys_and_anything_else_is_refused(
    stored: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(stored / "T5EncoderModel", tmp_path / "t5")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    more = {"decoder.block.0.layer.0.SelfAttention.q.weight": torch.zeros(32, 96)}
    save_file({**tensors, **more}, file)
    plan = planned(folder, "T5EncoderModel")
    assert [ref.name for ref in plan.unused] == list(more)
    assert len(plan.layers) == ENCODERS["T5EncoderModel"][1]
    save_file({**tensors, "encoder.extra.weight": torch.zeros(4, 4)}, file)
    with pytest.raises(PlanError, match="'encoder.extra.weight' belongs to no module"):
        respelled(planned(folder, "T5EncoderModel"))
    tensors.pop("encoder.final_layer_norm.weight")
    save_file(tensors, file)
    with pytest.raises(PlanError, match="'encoder.final_layer_norm.weight' has no stored tensor"):
        respelled(planned(folder, "T5EncoderModel"))


def test_an_unknown_table_turns_out_to_be_no_linear_once_there_is_a_class(
    stored: Path, tmp_path: Path
) -> None:
    """As for any class nobody described: here T5 under the generic family."""
    plan = planned(stored / "T5EncoderModel", "T5EncoderModel")
    bias = "encoder.block.0.layer.0.SelfAttention.relative_attention_bias"
    generic = replace(planned(stored / "T5EncoderModel", "Unheard"), config=plan.config)
    assert generic.family == "generic"
    assert torch.equal(hidden(built(generic)), hidden(built(plan)))
    table = next(each for each in respelled(generic).plain if each.name == f"{bias}.weight")
    assert table.shape == (32, 2)


# pipelines --------------------------------------------------------------------------------------


def test_encoders_of_a_pipeline_are_quantized_and_every_one_has_its_truth_line(flux: Path) -> None:
    asked = {"text_encoder": "int8", "text_encoder_2": "fp8"}
    pipeline = diffquant.load(
        str(flux),
        component_quantizations=asked,
        component_quantization_ignored_layers={"text_encoder": ("fc1",)},
        device="cpu",
    )
    lines = diffquant.report(pipeline).truth_lines
    assert [line.partition(" linears")[0] for line in lines] == [
        "text_encoder: 5/6",
        "text_encoder_2: 5/6",
        "transformer: 0/36",
    ]
    for name, count in (("text_encoder", 5), ("text_encoder_2", 5), ("transformer", 0)):
        parts = getattr(pipeline, name).modules()
        assert sum(isinstance(part, QuantLinear) for part in parts) == count


def test_the_command_line_draws_saves_and_draws_again_from_what_it_saved(
    flux: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["generate", "--prompt", "red apple", "--model-path", str(flux), *SMALL]
    wish = ["--component-quantizations.text_encoder_2", "fp8", "--save-quantized", "t5"]
    pictures = []
    for more in (wish, ["--text-encoder-2-path", "t5"], []):
        assert cli.run([*words, "--max-sequence-length", "16", *more, "--json"]) == 0
        out, err = capsys.readouterr()
        (path,) = json.loads(out)["paths"]
        pictures.append(pixels(Path(path)))
        assert ("text_encoder_2: 5/6 linears fp8" in err) == bool(more)
    assert pictures[0] == pictures[1]
    assert pictures[0] != pictures[2]
    again = ["generate", "--config-from-metadata", "outputs/red-apple-42.png", "--json"]
    assert cli.run([*again, "--save-quantized", "again"]) == 0
    out, err = capsys.readouterr()
    assert "is not the one that drew the picture" not in err
    assert pixels(Path(json.loads(out)["paths"][0])) == pictures[0]


@pytest.fixture(scope="module")
def stored_in_the_base(flux: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline with its T5 stored as ModelOpt FP8, under the name transformers gives files."""
    base = shutil.copytree(flux, tmp_path_factory.mktemp("base") / "flux")
    wish = ModelFlags(model_path=str(flux), component_quantizations={"text_encoder_2": "fp8"})
    saved = tmp_path_factory.mktemp("t5") / "t5"
    loading.save_quantized(loading.dry_run(wish, loading.RunFlags(save_quantized=str(saved))))
    shutil.rmtree(base / "text_encoder_2")
    shutil.copytree(saved, base / "text_encoder_2")
    file = base / "text_encoder_2" / "diffusion_pytorch_model.safetensors"
    file.rename(file.with_name("model.safetensors"))
    return base


def test_an_encoder_that_the_base_stores_quantized_keeps_its_scales(
    flux: Path, stored_in_the_base: Path
) -> None:
    whole = diffquant.load(str(flux), device="cpu").text_encoder_2
    pipeline = diffquant.load(str(stored_in_the_base), device="cpu")
    assert "text_encoder_2: 5/6 linears fp8" in diffquant.report(pipeline).truth_lines[0]
    with torch.inference_mode():
        meant, found = (each(IDS).last_hidden_state for each in (whole, pipeline.text_encoder_2))
        unscaled = transformers.T5EncoderModel.from_pretrained(
            stored_in_the_base / "text_encoder_2", dtype=torch.bfloat16
        )
        wrong = unscaled(IDS).last_hidden_state
    assert (found - meant).norm() < 0.1 * meant.norm()
    assert (wrong - meant).norm() > 0.5 * meant.norm()  # which is what transformers makes of it


def test_an_encoder_of_the_base_that_nothing_explains_stops_the_load(
    stored_in_the_base: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(stored_in_the_base, tmp_path / "base")
    config = base / "text_encoder_2" / "config.json"
    told = json.loads(config.read_text())
    del told["quantization_config"]
    config.write_text(json.dumps(told))
    file = base / "text_encoder_2" / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if "scale" not in name}
    save_file(tensors, file)
    with pytest.raises(FormatError, match="the pipeline's own text_encoder_2 cannot be read") as no:
        loading.dry_run(ModelFlags(model_path=str(base)))
    assert no.value.hint == "--text-encoder-2-path DIR gives it other weights"


def test_a_vae_says_that_it_is_convolutions_and_takes_other_weights(
    flux: Path, tmp_path: Path
) -> None:
    flags = ModelFlags(model_path="emoji_flux", component_quantizations={"vae": "fp8"})
    with pytest.raises(UsageError, match="has no linear layers, only 36 convolutions"):
        loading.dry_run(flags)
    other = shutil.copytree(flux / "vae", tmp_path / "vae")
    file = other / "diffusion_pytorch_model.safetensors"
    tensors = {name: 2 * tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    pipeline = diffquant.load(str(flux), component_paths={"vae": str(other)}, device="cpu")
    loaded = pipeline.vae.state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_attention_in_a_vae_is_quantized_under_old_names_and_new(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = tiny._vae().to(torch.bfloat16).eval()
    vae.save_pretrained(tmp_path / "new")
    new = planned(tmp_path / "new", "AutoencoderKL", "diffusers")
    changed = online.requantized(new, online.Online(scheme="fp8"))
    share = next(note for note in changed.notes if note.startswith("they hold"))
    assert share.endswith("26 convolutions stay")
    model = built(changed)
    assert sum(isinstance(part, QuantLinear) for part in model.modules()) == 8
    old = shutil.copytree(tmp_path / "new", tmp_path / "old")
    save_file(dict(_before_018(load_file(old / VAE))), old / VAE)
    respelt = built(planned(old, "AutoencoderKL", "diffusers")).state_dict()
    assert all(torch.equal(respelt[name], value) for name, value in vae.state_dict().items())


VAE = "diffusion_pytorch_model.safetensors"


def _before_018(tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for name, tensor in tensors.items():
        for new, old in names.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        yield name, tensor


# Nunchaku's T5 ----------------------------------------------------------------------------------


def awq(name: str, shape_NK: tuple[int, int]) -> tuple[dict[str, Tensor], Tensor]:
    """A linear as Nunchaku stores it, and the weight it means."""
    n, k = shape_NK
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8)
    scales = (0.02 * torch.rand(k // 128, n) + 0.001).half()
    zeros = (torch.randn(k // 128, n) * 0.01 - 8 * scales.float()).half()
    packed = codes[:, 0::2] | (codes[:, 1::2] << 4)
    tensors = {
        f"{name}.qweight": nunchaku_awq.redo(packed, Role.CODES, (n, k), ()).view(torch.int16),
        f"{name}.scales": scales,
        f"{name}.scaled_zeros": zeros,
    }
    groups = codes.float().reshape(n, k // 128, 128)
    decoded = groups * scales.float().T[:, :, None] + zeros.float().T[:, :, None]
    return tensors, decoded.reshape(n, k)


@pytest.fixture(scope="module")
def nunchaku(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, nn.Module]:
    """A FLUX whose T5 is wide enough for groups of 128, Nunchaku's file of it, and what it means."""
    root = tmp_path_factory.mktemp("nunchaku")
    base = tiny.tiny_flux_pipeline(root / "flux", joint_attention_dim=128)
    config = transformers.T5Config(
        vocab_size=32,
        d_model=128,
        d_kv=32,
        d_ff=128,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    truth = transformers.T5EncoderModel(config).to(torch.bfloat16).eval()
    shutil.rmtree(base / "text_encoder_2")
    truth.save_pretrained(base / "text_encoder_2")
    truth = truth.float()
    file: dict[str, Tensor] = {"shared.weight": truth.shared.weight.detach()}
    for name, part in truth.named_modules():
        if isinstance(part, nn.Linear):
            tensors, decoded = awq(name, (part.out_features, part.in_features))
            part.weight.data = decoded
            file |= tensors
        elif name.endswith(("layer_norm", "relative_attention_bias")):
            file[f"{name}.weight"] = part.weight.detach()
    told = {"model_class": "NunchakuT5EncoderModel", "config": config.to_json_string()}
    save_file(file, root / "awq-int4-flux.1-t5xxl.safetensors", metadata=told)
    return base, root / "awq-int4-flux.1-t5xxl.safetensors", truth


def test_nunchakus_t5_runs_as_the_weights_it_means(
    nunchaku: tuple[Path, Path, nn.Module],
) -> None:
    base, file, truth = nunchaku
    pipeline = diffquant.load(
        str(base), component_paths={"text_encoder_2": str(file)}, device="cpu"
    )
    assert diffquant.report(pipeline).truth_lines[0].startswith("text_encoder_2: 7/7 linears int4")
    wanted = hidden(truth)
    assert distance(hidden(pipeline.text_encoder_2), wanted) < 0.01
    dense = diffquant.load(str(base), quantization=None, device="cpu").text_encoder_2
    assert distance(hidden(dense), wanted) > 0.1


def test_nunchakus_t5_for_a_narrower_base_is_refused_with_the_tensor(
    nunchaku: tuple[Path, Path, nn.Module], flux: Path
) -> None:
    flags = ModelFlags(
        model_path=str(flux), component_weights_paths={"text_encoder_2": str(nunchaku[1])}
    )
    with pytest.raises(PlanError, match="stores N 128, .* need 96|needs"):
        loading.dry_run(flags)
    assert resolve.resolve(flags).components["text_encoder_2"].base is not None
