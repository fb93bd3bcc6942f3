"""msModelSlim's Wan 2.2 becomes a diffusers pipeline: other names, the same numbers."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffquant import headers, planner, sources
from diffquant.converters import wan_repack
from diffquant.converters._options import Writing
from diffquant.converters.wan_repack import MODELS, main, renamed, repack
from diffquant.errors import ConvertError, PlanError
from diffquant.families import FAMILIES, spelled
from diffquant.formats.modelslim import EXPERTS
from diffquant.linear import QuantLinear
from diffquant.loading import RunFlags, load
from diffquant.pieces import dense
from diffquant.resolve import ModelFlags
from diffquant.tensors import Weights
from tests.tiny import tiny_wan_pipeline

WAN = FAMILIES.load("wan")
ORIGINAL = WAN.namings["original"]
#: What SGLang's tool of the same name (0.5.23) replaces in every name, in this order.
PEER = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
    "modulation": "scale_shift_table",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm2": "norm__placeholder",
    "norm3": "norm2",
    "norm__placeholder": "norm3",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "self_attn.q": "attn1.to_q",
    "self_attn.k": "attn1.to_k",
    "self_attn.v": "attn1.to_v",
    "self_attn.o": "attn1.to_out.0",
    "self_attn.norm_q": "attn1.norm_q",
    "self_attn.norm_k": "attn1.norm_k",
    "cross_attn.q": "attn2.to_q",
    "cross_attn.k": "attn2.to_k",
    "cross_attn.v": "attn2.to_v",
    "cross_attn.o": "attn2.to_out.0",
    "cross_attn.norm_q": "attn2.norm_q",
    "cross_attn.norm_k": "attn2.norm_k",
    "attn2.to_k_img": "attn2.add_k_proj",
    "attn2.to_v_img": "attn2.add_v_proj",
    "attn2.norm_k_img": "attn2.norm_added_k",
    ".linear.": ".",
    ".div.": ".",
}
SMOOTHED = "attn1.to_q"


def by_the_peer(name: str) -> str:
    for old, new in PEER.items():
        name = name.replace(old, new)
    return name


def original_name(parameter: str) -> str:
    stem, _, leaf = parameter.rpartition(".")
    whole = spelled(ORIGINAL, parameter)[0]
    return whole if whole != parameter else f"{spelled(ORIGINAL, stem)[0]}.{leaf}"


def modelslim(folder: Path, plain: dict[str, Tensor]) -> Path:
    """A folder as msModelSlim writes it: INT8 linears of the blocks, to_q wrapped and smoothed."""
    tensors: dict[str, Tensor] = {}
    types: dict[str, Any] = {"model_quant_type": "W8A8_DYNAMIC", "version": "1.0.0"}
    for name, value in plain.items():
        stored, stem = original_name(name), name.removesuffix(".weight")
        if not (name.startswith("blocks.") and name.endswith(".weight") and value.dim() == 2):
            tensors[stored], types[stored] = value, "FLOAT"
            continue
        layer = stored.removesuffix(".weight")
        if stem.endswith(SMOOTHED):
            tensors[f"{layer}.div.mul_scale"] = torch.full((value.shape[1],), 2.0)
            value, layer = value / 2, f"{layer}.linear"
        scale = value.float().abs().amax(1, keepdim=True) / 127
        held = {
            "weight": (value.float() / scale).round().to(torch.int8),
            "weight_scale": scale,
            "weight_offset": torch.zeros_like(scale),
        }
        tensors |= {f"{layer}.{leaf}": tensor for leaf, tensor in held.items()}
        types |= {f"{layer}.{leaf}": "W8A8_DYNAMIC" for leaf in held}
    folder.mkdir(parents=True)
    half = len(tensors) // 2
    for part, names in enumerate((list(tensors)[:half], list(tensors)[half:])):
        stored = {name: tensors[name].contiguous() for name in names}
        save_file(stored, folder / f"quant_model_weight_w8a8_dynamic-{part}.safetensors")
    (folder / "quant_model_description_w8a8.json").write_text(json.dumps(types))
    return folder


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_wan_pipeline(tmp_path_factory.mktemp("wan") / "base", experts=2)


@pytest.fixture(scope="module")
def quantized(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("modelslim")
    for component, name in EXPERTS.items():
        modelslim(folder / name, stored(pipeline / component))
    return folder


def stored(component: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in component.glob("*.safetensors"):
        found |= load_file(path)
    return found


def built(pipeline: Path, quantized: Path, output: Path, **options: Any) -> Path:
    writing = Writing(output_dir=output, **options)
    repack(pipeline, quantized, writing, model_type="Wan2.2-T2V-A14B")
    return output


@pytest.mark.parametrize("image", [False, True])
def test_every_name_becomes_what_the_peer_makes_of_it(image: bool) -> None:
    more = {"image_dim": 64, "added_kv_proj_dim": 64, "pos_embed_seq_len": 8} if image else {}
    config = {"_class_name": "WanTransformer3DModel", "num_layers": 2, **more}
    inventory = WAN.inventory(config)
    for parameter in inventory.shapes:
        name = original_name(parameter)
        assert renamed(name, ORIGINAL) == by_the_peer(name) == parameter
        assert renamed(parameter, ORIGINAL) == parameter, "what has diffusers' names keeps them"
    for layer in inventory.linears:
        stem = original_name(f"{layer}.weight").removesuffix(".weight")
        for wrapped in (f"{stem}.linear.weight_scale", f"{stem}.div.mul_scale"):
            assert renamed(wrapped, ORIGINAL) == by_the_peer(wrapped)


def test_the_repacked_pipeline_loads_with_both_experts(
    pipeline: Path, quantized: Path, tmp_path: Path
) -> None:
    output = built(pipeline, quantized, tmp_path / "out")
    loaded = load(ModelFlags(model_path=str(output)), RunFlags())
    for component in EXPERTS:
        model, plain = getattr(loaded, component), stored(pipeline / component)
        layers = [name for name, part in model.named_modules() if isinstance(part, QuantLinear)]
        assert len(layers) == 2 * 10 and all(name.startswith("blocks.") for name in layers)
        source = sources.checkpoint(str(output / component))
        plan = planner.plan(source, headers.read(source.files), config=source.config)
        for name in layers:
            wanted = plain[f"{name}.weight"].float()
            weight, _ = dense(plan.layer(name), Weights(source.files))
            assert (weight - wanted).norm() < 0.01 * wanted.norm(), name
        kept = model.condition_embedder.text_embedder.linear_1.weight
        assert torch.equal(kept, plain["condition_embedder.text_embedder.linear_1.weight"])


def test_numbers_and_types_are_those_of_the_source(
    pipeline: Path, quantized: Path, tmp_path: Path
) -> None:
    output = built(pipeline, quantized, tmp_path / "out", max_shard_size=2.0**-12)
    assert len(list((output / "transformer").glob("*.safetensors"))) > 1
    source, written = stored(quantized / "low_noise_model"), stored(output / "transformer_2")
    assert written.keys() == {by_the_peer(name) for name in source}
    assert all(torch.equal(value, written[by_the_peer(name)]) for name, value in source.items())
    types = json.loads((output / "transformer" / "quant_model_description.json").read_text())
    assert types["blocks.0.attn1.to_q.weight"] == "W8A8_DYNAMIC"
    assert types["model_quant_type"] == "W8A8_DYNAMIC"
    assert (output / "vae" / "config.json").exists()
    assert not list(tmp_path.glob("*.partial"))


def test_the_experts_are_not_exchanged(pipeline: Path, quantized: Path, tmp_path: Path) -> None:
    output = built(pipeline, quantized, tmp_path / "out")
    high = stored(quantized / EXPERTS["transformer"])
    written = stored(output / "transformer")
    other = stored(output / "transformer_2")
    name = "blocks.0.ffn.0.weight"
    assert torch.equal(high[name], written[by_the_peer(name)])
    assert not torch.equal(high[name], other[by_the_peer(name)])


def test_a_model_of_one_expert_lies_in_the_folder_itself(tmp_path: Path) -> None:
    base = tiny_wan_pipeline(tmp_path / "base")
    folder = modelslim(tmp_path / "quant", stored(base / "transformer"))
    done = repack(base, folder, Writing(output_dir=tmp_path / "out"), model_type="Wan2.2-TI2V-5B")
    assert list(done) == ["transformer"]
    assert done["transformer"].to_json()["encodings"] == ["int8"]


def test_a_killed_run_goes_on_with_the_expert_it_had(
    pipeline: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, wrote = wan_repack.write, []

    def killed(output: Path, *given: Any, **more: Any) -> Any:
        wrote.append(output.name)
        if output.name == "transformer_2" and len(wrote) == 2:
            raise KeyboardInterrupt
        return whole(output, *given, **more)

    monkeypatch.setattr(wan_repack, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        built(pipeline, quantized, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    built(pipeline, quantized, tmp_path / "out")
    assert wrote == ["transformer", "transformer_2", "transformer_2"]


def test_what_is_no_whole_model_leaves_nothing(
    pipeline: Path, quantized: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "quant"
    for name in EXPERTS.values():
        held = stored(quantized / name)
        types = json.loads((quantized / name / "quant_model_description_w8a8.json").read_text())
        held["strange.weight"] = torch.ones(2, 2)
        (broken / name).mkdir(parents=True)
        save_file(held, broken / name / "quant_model_weight.safetensors")
        (broken / name / "quant_model_description.json").write_text(json.dumps(types))
    with pytest.raises(PlanError, match=r"'strange\.weight' belongs to no module"):
        built(pipeline, broken, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["quant"]


def test_the_command_says_what_became_of_each_transformer(
    pipeline: Path, quantized: Path, tmp_path: Path
) -> None:
    typed = ["--model-type", "Wan2.2-I2V-A14B", "--original-model-path", str(pipeline)]
    typed += ["--quant-path", str(quantized), "--output-path", str(tmp_path / "out")]
    dry = CliRunner().invoke(main, [*typed, "--dry-run"])
    assert dry.exit_code == 0, dry.stderr
    assert not (tmp_path / "out").exists()
    done = CliRunner().invoke(main, typed)
    assert json.loads(done.stdout) == json.loads(dry.stdout)
    assert json.loads(done.stdout)["transformer_2"]["quantized_layers"] == 20
    again = CliRunner().invoke(main, typed)
    assert again.exit_code == 1 and "--overwrite replaces it" in again.stderr
    assert CliRunner().invoke(main, [*typed, "--overwrite"]).exit_code == 0


def test_every_quantized_layer_decodes_to_the_weight_of_the_source(
    pipeline: Path, quantized: Path, tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    built(pipeline, quantized, tmp_path / "out", report=report)
    layers = json.loads(report.read_text())
    assert len(layers) == 2 * 2 * 10
    assert {layer["path"].partition(".")[0] for layer in layers} == set(EXPERTS)
    assert all(layer["relative_error"] == 0 for layer in layers)


def test_a_layer_that_decodes_otherwise_leaves_nothing_but_the_report(
    pipeline: Path, quantized: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exchanged(name: str, naming: Any) -> str:
        swapped = {"to_k": "to_q", "to_q": "to_k"}
        made = renamed(name, naming)
        return re.sub(r"(?<=blocks.1.attn2.)to_[qk]", lambda found: swapped[found[0]], made)

    monkeypatch.setattr(wan_repack, "renamed", exchanged)
    with pytest.raises(ConvertError, match=r"4 of 40 layers are worse than --max-error 0"):
        built(pipeline, quantized, tmp_path / "out", report=tmp_path / "report.json")
    assert [path.name for path in tmp_path.iterdir()] == ["report.json"]
    built(pipeline, quantized, tmp_path / "out", no_check=True)


@pytest.mark.parametrize("wrong", ["original", "quantized"])
def test_a_folder_of_another_kind_is_said_to_be_so(
    wrong: str, pipeline: Path, quantized: Path, tmp_path: Path
) -> None:
    given = {"original": pipeline, "quantized": quantized} | {wrong: tmp_path}
    with pytest.raises(ConvertError, match=r"no (file|quant_model_weight\*)") as refused:
        built(given["original"], given["quantized"], tmp_path / "out")
    assert refused.value.hint


def test_models_are_those_of_the_peer() -> None:
    assert list(MODELS) == ["Wan2.2-T2V-A14B", "Wan2.2-I2V-A14B", "Wan2.2-TI2V-5B"]
