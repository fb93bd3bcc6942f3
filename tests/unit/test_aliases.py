"""What people paste from other tools is answered, one entry of the table at a time."""

from itertools import pairwise

import pytest

from diffquant import aliases
from diffquant.aliases import Flag, from_environment, heard, quantizations, translate
from diffquant.errors import UsageError
from diffquant.schemes import SCHEMES

OLD_NAMES = ("--quantized-model-path", "--transformer-quantized-path")


@pytest.mark.parametrize("flag", OLD_NAMES)
def test_older_names_of_the_weights_path_become_ours(flag: str) -> None:
    translation = translate(["--prompt", "fox", flag, "x.safetensors"])
    assert translation.arguments == (
        "--prompt", "fox", "--transformer-weights-path", "x.safetensors",
    )  # fmt: skip
    assert flag in translation.notes[0]


@pytest.mark.parametrize("spelling", [["--num_gpus", "1"], ["--num-gpus=1"]])
def test_underscores_and_equals_signs_are_understood(spelling: list[str]) -> None:
    assert translate(spelling).arguments == ()


@pytest.mark.parametrize("flag", aliases.flags())
def test_every_foreign_flag_becomes_ours_or_is_answered(flag: str) -> None:
    entry = aliases.flags()[flag]
    if entry.to == flag:
        assert translate([flag]) == aliases.Translation((flag,))
        return
    for value in entry.values or {entry.only or "x": None}:
        arguments = [flag] if entry.switch else [flag, value]
        assert _answered(entry, arguments), f"{arguments} is silently ignored"


def _answered(entry: Flag, arguments: list[str]) -> bool:
    if entry.refused and not entry.only:
        with pytest.raises(UsageError, match=entry.refused):
            translate(arguments)
        return True
    translation = translate(arguments)
    return arguments[0] in translation.notes[0] and arguments[0] not in translation.arguments


def test_a_value_that_asks_for_weights_in_parts_is_refused() -> None:
    with pytest.raises(UsageError, match="--tp-size 2: every process holds all weights"):
        translate(["--tp-size", "2"])


def test_the_word_for_sequences_wins_over_that_for_devices() -> None:
    pasted = ["--ulysses-degree", "2", "--num-gpus", "4"]
    assert translate(pasted).arguments == ("--ulysses-degree", "4", "--ulysses-degree", "2")


@pytest.mark.parametrize(
    "pasted",
    [["--enable-svdquant"], ["--enable-svdquant", "true"], ["--enable_svdquant=True"]],
)
def test_a_switch_of_ours_may_be_pasted_with_true(pasted: list[str]) -> None:
    translation = translate([*pasted, "--quantization-rank", "32"])
    assert translation.arguments == ("--enable-svdquant", "--quantization-rank", "32")
    assert not translation.notes


def test_a_switch_of_ours_that_is_false_is_left_out() -> None:
    translation = translate(["--enable-svdquant", "false"])
    assert translation.arguments == ()
    assert translation.notes == ("--enable-svdquant false is not needed: that is how it is here",)


def test_a_switch_set_to_false_asks_for_nothing() -> None:
    assert translate(["--dit-layerwise-offload", "false", "--seed", "1"]).arguments == (
        "--seed",
        "1",
    )


@pytest.mark.parametrize(
    "pasted",
    [
        ["--dit-layerwise-offload", "--text-encoder-cpu-offload", "true", "--vae-cpu-offload"],
        ["--dit-cpu-offload", "true", "--dit-layerwise-offload", "true"],
    ],
)
def test_moving_components_yields_to_moving_blocks(pasted: list[str]) -> None:
    ours = translate(["--seed", "1", *pasted]).arguments
    assert [word for flag, word in pairwise(ours) if flag == "--offload"][-1] == "layerwise"


def test_switches_become_our_words_with_their_values() -> None:
    assert translate(["--dit-cpu-offload"]).arguments == ("--offload", "model")
    assert translate(["--enable-torch-compile"]).arguments == ("--compile",)
    assert translate(["--dit-offload-prefetch-size", "2"]).arguments == ("--offload-prefetch", "2")


def test_a_switch_does_not_swallow_the_word_behind_it() -> None:
    assert translate(["--save-output", "--seed", "1"]).arguments == ("--seed", "1")
    with pytest.raises(UsageError, match="no value 'maybe'"):
        translate(["--save-output=maybe"])


def test_an_unknown_backend_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(UsageError, match="no value 'cublas'") as caught:
        translate(["--fp8-gemm-backend", "cublas"])
    assert "deep_gemm" in str(caught.value.hint)


def test_a_torchao_configuration_becomes_a_quantization() -> None:
    assert translate(["--torchao-config", "int8dq"]).arguments == ("--quantization", "w8a8_int8")


@pytest.mark.parametrize("flag", [entry for entry in aliases.flags().values() if entry.values])
def test_every_value_of_quantization_that_the_table_gives_is_known(flag: Flag) -> None:
    given = [value.to for value in flag.values.values() if value.to]
    known = {*SCHEMES.names(), *quantizations()}
    assert flag.to != "--quantization" or set(given) <= known


@pytest.mark.parametrize("name", quantizations())
def test_every_quantization_means_one_thing(name: str) -> None:
    entry = quantizations()[name]
    assert sum(bool(item) for item in (entry.online, entry.format, entry.refused)) == 1


def test_ignored_layers_from_the_environment_need_a_quantization() -> None:
    environ = {"SGLANG_FP4_IGNORED_LAYERS": "attn.to_q"}
    assert from_environment(environ, ["--quantization"]).arguments == (
        "--quantization-ignored-layers",
        "attn.to_q",
    )
    without = from_environment(environ, [])
    assert without.arguments == ()
    assert "no effect without --quantization" in without.notes[0]


def test_a_typed_flag_overrules_the_environment() -> None:
    name = "SGLANG_DIFFUSION_FLASHINFER_FP4_GEMM_BACKEND"
    translation = from_environment({name: "flashinfer_trtllm"}, ["--fp4-gemm-backend", "auto"])
    assert translation.arguments == ()
    assert translation.notes == (f"{name} is overruled by --fp4-gemm-backend",)


def test_variables_that_nothing_reads_are_heard_too() -> None:
    fates = heard({"SGLANG_FP4_IGNORED_LAYERS": "a", "SGLANG_PORT": "1", "HOME": "/"})
    assert fates == {
        "SGLANG_FP4_IGNORED_LAYERS": "read as --quantization-ignored-layers a",
        "SGLANG_PORT": "not read by diffquant",
    }
