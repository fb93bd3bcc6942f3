"""Every resolution rule: that it fires, what it decides, and what it says when it cannot."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffquant import resolve as rules
from diffquant import sources
from diffquant.errors import AmbiguousSourceError, FormatError, SourceError, UsageError
from diffquant.online import Online
from diffquant.resolve import ModelFlags, Resolution, resolve

FP8 = Path(__file__).parents[1] / "data" / "modelopt" / "flux" / "fp8"
FLUX = "FluxTransformer2DModel"
WAN = "WanTransformer3DModel"


def folder(directory: Path, config: dict[str, Any], weights: Path | None = None) -> Path:
    """A component: its config and, copied from true ones, its weights (default: one dense tensor)."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    target = directory / "diffusion_pytorch_model.safetensors"
    return dense(target).parent if weights is None else Path(shutil.copy(weights, target)).parent


def dense(path: Path, name: str = "blocks.0.attn.to_q") -> Path:
    """A safetensors file with one BF16 matrix."""
    entry = {"dtype": "BF16", "shape": [2, 2], "data_offsets": [0, 8]}
    header = json.dumps({f"{name}.weight": entry}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    return path


def pipeline(directory: Path, class_name: str = FLUX, transformers: int = 1) -> Path:
    names = ("transformer", "transformer_2")[:transformers]
    index = {"_class_name": "TestPipeline", **{name: ["diffusers", class_name] for name in names}}
    for name in names:
        folder(directory / name, {"_class_name": class_name, "num_layers": 1})
    (directory / "model_index.json").write_text(json.dumps(index))
    return directory


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return pipeline(tmp_path / "base")


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return pipeline(tmp_path / "two", WAN, transformers=2)


def fired(resolution: Resolution) -> list[str]:
    return [entry.rule for entry in resolution.fired]


# rule 1


def test_rule_1_takes_the_typed_pipeline(base: Path) -> None:
    resolution = resolve(ModelFlags(model_path=str(base)))
    transformer = resolution.components["transformer"]
    assert fired(resolution) == ["1"]
    assert transformer.class_name == FLUX
    assert not transformer.override
    assert transformer.weights.root == base / "transformer"


def test_rule_1_without_a_path_takes_the_bundled_pipeline_and_its_override(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources._reference, "MODELS", tmp_path)
    pipeline(tmp_path / rules.BUNDLED_PIPELINE)
    folder(tmp_path / rules.BUNDLED_OVERRIDE, {"_class_name": FLUX})
    resolution = resolve(ModelFlags())
    assert fired(resolution) == ["1b", "1c"]
    assert resolution.components["transformer"].weights.root.name == rules.BUNDLED_OVERRIDE
    assert rules.BUNDLED_PIPELINE in resolution.model_names


def test_rule_1_leaves_the_bundled_override_out_when_another_was_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources._reference, "MODELS", tmp_path)
    pipeline(tmp_path / rules.BUNDLED_PIPELINE)
    mine = folder(tmp_path / "mine", {"_class_name": FLUX})
    resolution = resolve(ModelFlags(transformer_path=str(mine)))
    assert fired(resolution) == ["1b", "2"]
    assert resolution.components["transformer"].weights.root == mine


def test_rule_1_says_what_a_folder_that_is_no_pipeline_lacks(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(SourceError, match=r"model_index\.json"):
        resolve(ModelFlags(model_path=str(tmp_path)))


# rule 2


def test_rule_2_takes_config_and_weights_from_the_component_folder(
    base: Path, tmp_path: Path
) -> None:
    mine = folder(tmp_path / "mine", {"_class_name": FLUX, "num_layers": 7})
    resolution = resolve(ModelFlags(model_path=str(base), transformer_path=str(mine)))
    transformer = resolution.components["transformer"]
    assert fired(resolution) == ["1", "2"]
    assert transformer.override
    assert transformer.config["num_layers"] == 7
    assert transformer.base is not None
    assert transformer.base.root == base / "transformer"


def test_rule_2_never_inherits_the_quantization_config_of_the_base(
    base: Path, tmp_path: Path
) -> None:
    config = base / "transformer" / "config.json"
    config.write_text(json.dumps({"_class_name": FLUX, "quantization_config": {"quant_algo": "X"}}))
    weights = dense(tmp_path / "mine.safetensors")
    flags = ModelFlags(model_path=str(base), transformer_weights_path=str(weights))
    transformer = resolve(flags).components["transformer"]
    assert "quantization_config" not in transformer.config
    assert transformer.weights.config == {}


def test_rule_2_refuses_a_component_the_pipeline_does_not_have(base: Path, tmp_path: Path) -> None:
    mine = folder(tmp_path / "mine", {"_class_name": FLUX})
    flags = ModelFlags(model_path=str(base), component_paths={"transformer-2": str(mine)})
    with pytest.raises(UsageError, match="--transformer-2-path names a component 'transformer_2'"):
        resolve(flags)


def test_rule_2_refuses_a_transformer_of_another_model(base: Path, tmp_path: Path) -> None:
    mine = folder(tmp_path / "mine", {"_class_name": WAN})
    with pytest.raises(UsageError, match=f"gives {WAN}, .* is {FLUX}"):
        resolve(ModelFlags(model_path=str(base), transformer_path=str(mine)))


def test_rule_2_asks_for_a_config_where_there_is_none(base: Path, tmp_path: Path) -> None:
    mine = dense(tmp_path / "mine" / "model.safetensors").parent
    with pytest.raises(UsageError, match=r"has no config\.json") as caught:
        resolve(ModelFlags(model_path=str(base), transformer_path=str(mine)))
    assert caught.value.hint == f"--transformer-weights-path {mine}"


def test_rule_2_refuses_one_component_named_twice(base: Path) -> None:
    flags = ModelFlags(
        model_path=str(base), transformer_path="a", component_paths={"transformer": "b"}
    )
    with pytest.raises(UsageError, match="names both 'a' and 'b'"):
        resolve(flags)


# rule 3


def test_rule_3_takes_weights_alone_and_keeps_the_config_of_the_base(
    base: Path, tmp_path: Path
) -> None:
    weights = dense(tmp_path / "mine.safetensors")
    flags = ModelFlags(model_path=str(base), transformer_weights_path=str(weights))
    transformer = resolve(flags).components["transformer"]
    assert fired(resolve(flags)) == ["1", "3"]
    assert transformer.weights.files == (weights,)
    assert transformer.config["num_layers"] == 1


def test_rule_3_holds_for_a_component_path_that_names_a_file(base: Path, tmp_path: Path) -> None:
    weights = dense(tmp_path / "mine.safetensors")
    resolution = resolve(ModelFlags(model_path=str(base), transformer_path=str(weights)))
    assert fired(resolution) == ["3b", "1", "3"]
    assert resolution.components["transformer"].config["num_layers"] == 1


def test_rule_3_wins_over_rule_2_for_weights_but_not_for_the_config(
    base: Path, tmp_path: Path
) -> None:
    mine = folder(tmp_path / "mine", {"_class_name": FLUX, "num_layers": 7})
    weights = dense(tmp_path / "other.safetensors")
    flags = ModelFlags(
        model_path=str(base), transformer_path=str(mine), transformer_weights_path=str(weights)
    )
    transformer = resolve(flags).components["transformer"]
    assert fired(resolve(flags)) == ["1", "3c"]
    assert transformer.weights.files == (weights,)
    assert transformer.config["num_layers"] == 7


def test_rule_3_refuses_two_weights_files_for_one_component(base: Path) -> None:
    flags = ModelFlags(
        model_path=str(base),
        transformer_path="a.safetensors",
        transformer_weights_path="b.safetensors",
    )
    with pytest.raises(UsageError, match="both give weights to 'transformer'"):
        resolve(flags)


# rule 4


def test_rule_4_says_loudly_that_one_of_two_transformers_stays(two: Path, tmp_path: Path) -> None:
    mine = folder(tmp_path / "mine", {"_class_name": WAN})
    resolution = resolve(ModelFlags(model_path=str(two), transformer_path=str(mine)))
    entry = next(entry for entry in resolution.fired if entry.rule == "4")
    assert entry.loud
    assert "--transformer-2-path" in entry.sentence
    assert not resolution.components["transformer_2"].override


def test_rule_4_is_silent_when_both_are_overridden(two: Path, tmp_path: Path) -> None:
    mine = str(folder(tmp_path / "mine", {"_class_name": WAN}))
    flags = ModelFlags(
        model_path=str(two), transformer_path=mine, component_paths={"transformer_2": mine}
    )
    assert "4" not in fired(resolve(flags))


def test_rule_4b_lets_one_source_serve_both_experts(two: Path, tmp_path: Path) -> None:
    both = pipeline(tmp_path / "both", WAN, transformers=2)
    resolution = resolve(ModelFlags(model_path=str(two), transformer_path=str(both)))
    assert "4b" in fired(resolution)
    assert "4" not in fired(resolution)
    roots = [source.weights.root for source in resolution.components.values()]
    assert roots == [both / "transformer", both / "transformer_2"]


def test_rule_4b_refuses_an_expert_of_another_architecture(two: Path, tmp_path: Path) -> None:
    both = pipeline(tmp_path / "both", WAN, transformers=2)
    (both / "transformer_2" / "config.json").write_text(
        json.dumps({"_class_name": WAN, "num_layers": 2})
    )
    with pytest.raises(UsageError, match="num_layers is 2, the base has 1"):
        resolve(ModelFlags(model_path=str(two), transformer_path=str(both)))


def test_rule_4e_takes_both_experts_from_the_folders_of_their_writer(
    two: Path, tmp_path: Path
) -> None:
    for name in ("high_noise_model", "low_noise_model"):
        folder(tmp_path / "experts" / name, {"_class_name": "WanModel", "dim": 5120})
    typed = str(tmp_path / "experts")
    resolution = resolve(ModelFlags(model_path=str(two), transformer_path=typed))
    roots = {name: source.weights.root.name for name, source in resolution.components.items()}
    assert roots == {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
    assert [rule for rule in fired(resolution) if rule[0] == "4"] == ["4e", "4e"]
    assert resolution.components["transformer"].config["_class_name"] == WAN


def test_rule_4e_leaves_an_expert_with_a_flag_of_its_own(two: Path, tmp_path: Path) -> None:
    for name in ("high_noise_model", "low_noise_model"):
        folder(tmp_path / "experts" / name, {})
    mine = folder(tmp_path / "mine", {"_class_name": WAN, "num_layers": 1})
    resolution = resolve(
        ModelFlags(
            model_path=str(two),
            transformer_path=str(tmp_path / "experts"),
            component_paths={"transformer_2": str(mine)},
        )
    )
    assert resolution.components["transformer"].weights.root.name == "high_noise_model"
    assert resolution.components["transformer_2"].weights.root == mine


def test_rule_4e_needs_both_folders(two: Path, tmp_path: Path) -> None:
    folder(tmp_path / "experts" / "high_noise_model", {})
    with pytest.raises(SourceError):
        resolve(ModelFlags(model_path=str(two), transformer_path=str(tmp_path / "experts")))


# rule 5


def test_rule_5_runs_a_quantized_pipeline_without_any_other_flag(base: Path) -> None:
    shutil.copytree(FP8, base / "transformer", dirs_exist_ok=True)
    transformer = resolve(ModelFlags(model_path=str(base))).components["transformer"]
    assert "quantization_config" in transformer.weights.config
    assert "quantization_config" not in transformer.config


def test_rule_5_knows_the_base_of_lone_weights_by_their_tensors(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(rules.KNOWN_BASES, "flux1", str(base))
    lone = folder(
        tmp_path / "lone", {"_class_name": FLUX}, FP8 / "diffusion_pytorch_model.safetensors"
    )
    resolution = resolve(ModelFlags(model_path=str(lone)))
    assert fired(resolution) == ["1", "5", "3"]
    assert resolution.pipeline.root == base
    assert resolution.components["transformer"].weights.root == lone


def test_rule_5_asks_for_the_base_of_weights_nobody_knows(tmp_path: Path) -> None:
    lone = dense(tmp_path / "lone" / "model.safetensors").parent
    with pytest.raises(UsageError, match=r"no model_index\.json") as caught:
        resolve(ModelFlags(model_path=str(lone)))
    assert caught.value.hint == f"--model-path BASE --transformer-weights-path {lone}"


# rule 6


def test_rule_6_lists_candidates_with_format_size_and_whether_they_run(
    base: Path, tmp_path: Path
) -> None:
    dense(tmp_path / "many" / "plain.safetensors")
    shutil.copy(
        FP8 / "diffusion_pytorch_model.safetensors", tmp_path / "many" / "scaled.safetensors"
    )
    flags = ModelFlags(model_path=str(base), transformer_weights_path=str(tmp_path / "many"))
    with pytest.raises(AmbiguousSourceError) as caught:
        resolve(flags)
    plain, scaled = caught.value.what.splitlines()[1:]
    assert "diffusers  runs here" in plain
    assert "does not run here" in scaled
    assert "looks quantized" in scaled
    assert "--transformer-weights-path" in str(caught.value.hint)


def test_rule_6_takes_the_only_mixed_file_and_says_so(base: Path, tmp_path: Path) -> None:
    dense(tmp_path / "many" / "model.safetensors")
    mixed = dense(tmp_path / "many" / "model-mixed.safetensors")
    flags = ModelFlags(model_path=str(base), transformer_weights_path=str(mixed.parent))
    resolution = resolve(flags)
    assert resolution.components["transformer"].weights.files == (mixed,)
    assert [entry.loud for entry in resolution.fired if entry.rule == "6"] == [True]


# rule 7


def test_rule_7_reads_the_promise_of_a_name(base: Path, tmp_path: Path) -> None:
    weights = tmp_path / "svdq-fp4_r32-flux.safetensors"
    shutil.copytree(FP8, tmp_path / "svdq")
    shutil.move(tmp_path / "svdq" / "diffusion_pytorch_model.safetensors", weights)
    shutil.move(tmp_path / "svdq" / "config.json", tmp_path / "config.json")
    flags = ModelFlags(model_path=str(base), transformer_weights_path=str(weights))
    resolution = resolve(flags)
    hints = resolution.components["transformer"].hints
    assert "7" in fired(resolution)
    assert (hints.precision, hints.rank) == ("nvfp4", 32)


@pytest.mark.parametrize("typed", [{"quantization_precision": "nvfp4"}, {"quantization_rank": 128}])
def test_rule_7_refuses_flags_that_contradict_the_name(
    base: Path, tmp_path: Path, typed: dict[str, Any]
) -> None:
    weights = dense(tmp_path / "svdq-int4_r32-flux.safetensors")
    flags = ModelFlags(model_path=str(base), transformer_weights_path=str(weights), **typed)
    with pytest.raises(UsageError, match="promises SVDQuant int4 of rank 32"):
        resolve(flags)


def test_rule_7_refuses_a_promise_that_plain_tensors_deny(base: Path, tmp_path: Path) -> None:
    weights = dense(tmp_path / "svdq-int4_r32-flux.safetensors")
    flags = ModelFlags(model_path=str(base), transformer_weights_path=str(weights))
    with pytest.raises(FormatError, match="is not quantized"):
        resolve(flags)


# rule 8


def test_rule_8_quantizes_a_dense_component(base: Path) -> None:
    resolution = resolve(ModelFlags(model_path=str(base), quantization="w8a8_int8"))
    assert "8" in fired(resolution)
    assert resolution.components["transformer"].online.scheme == "int8"


@pytest.mark.parametrize("override", [False, True])
def test_rule_8_refuses_to_quantize_what_is_quantized(base: Path, override: bool) -> None:
    if override:
        flags = ModelFlags(model_path=str(base), transformer_path=str(FP8), quantization="fp8")
    else:
        shutil.copytree(FP8, base / "transformer", dirs_exist_ok=True)
        flags = ModelFlags(model_path=str(base), quantization="fp8")
    with pytest.raises(UsageError, match="already modelopt"):
        resolve(flags)


def test_rule_8_accepts_the_name_of_the_format_a_file_has(base: Path) -> None:
    flags = ModelFlags(model_path=str(base), transformer_path=str(FP8), quantization="modelopt_fp8")
    resolution = resolve(flags)
    assert "8b" in fired(resolution)
    assert resolution.components["transformer"].online is None


@pytest.mark.parametrize("name", ["modelopt_fp4", "gguf"])
def test_rule_8_refuses_the_name_of_another_format(base: Path, name: str) -> None:
    flags = ModelFlags(model_path=str(base), transformer_path=str(FP8), quantization=name)
    with pytest.raises(FormatError, match="it is modelopt fp8"):
        resolve(flags)


def test_rule_8_refuses_by_name_what_is_not_for_diffusion(base: Path) -> None:
    with pytest.raises(UsageError, match="petit_nvfp4 is refused: it names a ROCm kernel"):
        resolve(ModelFlags(model_path=str(base), quantization="petit_nvfp4"))


def test_rule_8_suggests_the_nearest_name(base: Path) -> None:
    with pytest.raises(UsageError, match="'fp9'") as caught:
        resolve(ModelFlags(model_path=str(base), quantization="fp9"))
    assert "fp8" in str(caught.value.hint)


def test_rule_8_quantizes_twice_when_asked_and_says_so(base: Path) -> None:
    flags = ModelFlags(
        model_path=str(base), transformer_path=str(FP8), quantization="int8", requantize=True
    )
    resolution = resolve(flags)
    (told,) = [fired for fired in resolution.fired if fired.rule == "8c"]
    assert told.loud
    assert "quantized twice" in told.sentence
    assert resolution.components["transformer"].online.scheme == "int8"


def test_rule_8_reaches_one_component_with_words_of_its_own(base: Path) -> None:
    flags = ModelFlags(
        model_path=str(base),
        component_quantizations={"transformer": "svdq-int4"},
        component_quantization_ignored_layers={"transformer": ("ff.net",)},
        quantization_scope="mlp",
        quantize_all=True,
    )
    assert resolve(flags).components["transformer"].online == Online(
        scheme="svdq_int4", ignored=("ff.net",), scope="mlp", quantize_all=True
    )


@pytest.mark.parametrize(
    "typed",
    [
        {"quantize_all": True},
        {"requantize": True},
        {"quantization_scope": "mlp"},
        {"quantization_preset": "flux1-nvfp4"},
    ],
)
def test_words_about_quantizing_need_something_to_quantize_to(
    base: Path, typed: dict[str, Any]
) -> None:
    with pytest.raises(UsageError, match="has nothing to act on"):
        resolve(ModelFlags(model_path=str(base), **typed))


def test_rule_8_takes_a_preset_in_the_place_of_the_familys_own(base: Path) -> None:
    flags = ModelFlags(model_path=str(base), quantization="fp8", quantization_preset="flux1-nvfp4")
    online = resolve(flags).components["transformer"].online
    assert online == Online(scheme="fp8", preset="flux1-nvfp4")
    with pytest.raises(UsageError, match="--quantize-all keeps none"):
        resolve(replace(flags, quantize_all=True))


def test_words_that_name_no_component_mean_transformers() -> None:
    flags = ModelFlags(
        model_path="emoji_flux",
        component_paths={"vae": "emoji_flux/vae"},
        component_quantizations={"text_encoder": "int8"},
        quantization="fp8",
        quantization_ignored_layers=("attn.to_q",),
    )
    found = resolve(flags).components
    assert found["transformer"].online == Online(scheme="fp8", ignored=("attn.to_q",))
    assert found["text_encoder"].online == Online(scheme="int8")
    assert found["vae"].online is None


def test_what_has_no_weights_is_not_quantized_and_not_passed_over() -> None:
    flags = ModelFlags(model_path="emoji_flux", component_quantizations={"tokenizer": "fp8"})
    with pytest.raises(UsageError, match="'tokenizer' .* has no weights to quantize"):
        resolve(flags)
    flags = ModelFlags(component_quantization_ignored_layers={"text_encodr": ("q_proj",)})
    with pytest.raises(UsageError, match="names a component 'text_encodr'"):
        resolve(flags)


def test_the_weights_of_another_kind_of_encoder_are_refused() -> None:
    flags = ModelFlags(component_paths={"text_encoder": "emoji_flux/text_encoder_2"})
    with pytest.raises(UsageError, match="gives t5, and 'text_encoder' .* is clip_text_model"):
        resolve(flags)


# rule 9


def test_rule_9_knows_module_paths_of_a_file_with_names_of_its_own(base: Path) -> None:
    file = base / "transformer" / "diffusion_pytorch_model.safetensors"
    dense(file, "double_blocks.0.img_attn.proj")
    for pattern in ("attn.to_out", "img_attn.proj"):
        flags = ModelFlags(
            model_path=str(base), quantization="fp8", quantization_ignored_layers=(pattern,)
        )
        assert resolve(flags).components["transformer"].online.ignored == (pattern,)


def test_rule_9_keeps_the_layers_a_pattern_hits(base: Path) -> None:
    flags = ModelFlags(
        model_path=str(base), quantization="fp8", quantization_ignored_layers=("attn.to_",)
    )
    resolution = resolve(flags)
    assert "9" in fired(resolution)
    assert resolution.components["transformer"].online.ignored == ("attn.to_",)


def test_rule_9_refuses_a_pattern_that_hits_nothing(base: Path) -> None:
    flags = ModelFlags(
        model_path=str(base), quantization="fp8", quantization_ignored_layers=("attn.to_x",)
    )
    with pytest.raises(UsageError, match="attn.to_x matches no layer") as caught:
        resolve(flags)
    assert "attn.to_q" in str(caught.value.hint)


def test_rule_9_refuses_patterns_with_nothing_to_quantize(base: Path) -> None:
    flags = ModelFlags(model_path=str(base), quantization_ignored_layers=("attn.to_",))
    with pytest.raises(UsageError, match="nothing to act on"):
        resolve(flags)


# rules 10 and 11 are about evidence and about words: see test_planner, test_aliases and test_cli_*


def test_rule_10_an_unexplained_file_is_an_error_not_a_guess(base: Path, tmp_path: Path) -> None:
    weights = tmp_path / "mystery.safetensors"
    shutil.copy(FP8 / "diffusion_pytorch_model.safetensors", weights)
    flags = ModelFlags(
        model_path=str(base), transformer_weights_path=str(weights), quantization="fp8"
    )
    with pytest.raises(FormatError, match="looks quantized and nothing in it says how"):
        resolve(flags)


def test_every_rule_that_fires_has_a_sentence_that_can_be_filled() -> None:
    assert all(sentence and not sentence.endswith(".") for sentence in rules.RULES.values())
