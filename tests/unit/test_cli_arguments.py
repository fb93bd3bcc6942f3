"""Everything a person said, anywhere, becomes one row of words; the strongest last."""

import json
from pathlib import Path

import pytest

from diffquant.cli._arguments import Prepared, config_words, prepare, record_words
from diffquant.errors import UsageError

KNOWN = frozenset(
    {
        "--model-path",
        "--output-path",
        "--prompt",
        "--seed",
        "--transformer-path",
        "--transformer-weights-path",
    }
)


def prepared(*typed: str, environ: dict[str, str] | None = None) -> Prepared:
    return prepare(typed, KNOWN, environ or {})


def test_typed_words_come_after_those_of_a_config_file(tmp_path: Path) -> None:
    config = tmp_path / "run.json"
    config.write_text(json.dumps({"seed": 1, "model_path": "base"}))
    words = prepared("--seed", "2", "--config", str(config)).words
    assert words == ("--seed", "1", "--model-path", "base", "--seed", "2")


def test_a_config_file_may_be_toml_with_tables_for_components(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        'strict = true\nlocal-files-only = false\n[component_paths]\nvae = "there"\n'
        '[component_quantization_ignored_layers]\ntransformer = ["a", "b"]\n'
    )
    assert list(config_words(config)) == [
        "--strict",
        "--component-paths.vae",
        "there",
        "--component-quantization-ignored-layers.transformer",
        "a,b",
    ]


@pytest.mark.parametrize(("name", "text"), [("a.json", "{"), ("a.toml", "="), ("a.yaml", "a: 1")])
def test_a_config_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=name):
        prepared("--config", str(tmp_path / name))


def test_a_record_becomes_the_options_a_picture_was_made_with() -> None:
    record = {
        "flags": {"model_path": "base", "component_paths": {"vae": "there"}},
        "request": {"seed": 3, "prompt": "fox"},
    }
    assert list(record_words(record)) == [
        "--model-path", "base", "--component-paths.vae", "there", "--seed", "3", "--prompt", "fox",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("option", "field", "component"),
    [
        ("--transformer-2-path", "component_paths", "transformer_2"),
        ("--transformer-2-weights-path", "component_weights_paths", "transformer_2"),
        ("--vae-path", "component_paths", "vae"),
        ("--text-encoder-quantization", "component_quantizations", "text_encoder"),
        ("--component-paths.text-encoder-2", "component_paths", "text_encoder_2"),
        ("--component-weights-paths.vae", "component_weights_paths", "vae"),
        ("--component-quantizations.transformer", "component_quantizations", "transformer"),
    ],
)
def test_every_component_has_options_of_its_own(option: str, field: str, component: str) -> None:
    for typed in ([option, "there"], [f"{option}=there"]):
        assert prepared(*typed).components == {field: {component: "there"}}


@pytest.mark.parametrize("typo", ["--mdel-path", "--ouput-path", "--transformr-path"])
def test_a_misspelled_path_option_is_no_component(typo: str) -> None:
    assert prepared(typo, "there").words == (typo, "there")


def test_a_component_option_without_a_value_is_refused() -> None:
    with pytest.raises(UsageError, match="--vae-path needs a value"):
        prepared("--vae-path", "--seed", "1")


@pytest.mark.parametrize("typed", [["a,b"], ["a", "b"], ["a,", "b"]])
def test_ignored_layers_are_separated_by_commas_or_spaces(typed: list[str]) -> None:
    words = prepared("--quantization-ignored-layers", *typed, "--seed", "1").words
    assert words[0] == "--quantization-ignored-layers"
    assert words[1].replace(",,", ",") == "a,b"
    assert words[2:] == ("--seed", "1")


def test_foreign_words_are_translated_wherever_they_were_said(tmp_path: Path) -> None:
    config = tmp_path / "run.json"
    config.write_text(json.dumps({"quantized_model_path": "there"}))
    told = prepared("--config", str(config), "--num-gpus", "1")
    assert told.words == ("--transformer-weights-path", "there")
    assert len(told.notes) == 2


def test_the_environment_is_the_weakest_source() -> None:
    environ = {"SGLANG_FP4_IGNORED_LAYERS": "x"}
    asked = ("--quantization", "fp8")
    assert prepared(*asked, environ=environ).words == (
        "--quantization-ignored-layers",
        "x",
        *asked,
    )
    typed = prepared(*asked, "--quantization-ignored-layers", "y", environ=environ)
    assert "x" not in typed.words
    assert "overruled" in typed.notes[0]
