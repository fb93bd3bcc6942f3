"""The commands as a person sees them: what they print where, and how they refuse."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from diffquant.cli import run
from diffquant.cli._discovered import SUBCOMMANDS

FP8 = Path(__file__).parents[1] / "data" / "modelopt" / "flux" / "fp8"
GENERATE_OPTIONS = """
--prompt --negative-prompt --width --height --num-inference-steps --guidance-scale --true-cfg-scale
--seed --num-images-per-prompt --image --mask-image --num-frames --fps --guidance-scale-2 --max-sequence-length
--output-path --output-file-name --input-file --engine --ray-address --replicas --profile
--model-path --transformer-path --transformer-weights-path --model-id --revision --local-files-only
--quantization --quantization-ignored-layers --quantization-scope --quantization-preset --quantize-all --requantize
--enable-svdquant --quantization-precision
--quantization-rank --nvfp4-nibbles --scale-layout --raw-fp8
--save-quantized
--device --dtype --numerics --kernel --strict --lora
--offload --offload-prefetch --resident-layers --compile --memory-budget --ulysses-degree
--config --config-from-metadata
--json
"""
HEAVY = {"torch", "numpy", "diffusers", "transformers", "huggingface_hub"}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A pipeline of a transformer alone: ModelOpt's own FP8 export."""
    shutil.copytree(FP8, tmp_path / "base" / "transformer")
    index = {"transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
    return tmp_path / "base"


# refusals


def test_help_names_every_command_and_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--help"]) == 0
    told = capsys.readouterr().out
    assert all(name in told for name in SUBCOMMANDS.names())
    assert "diffquant generate --prompt" in told


@pytest.mark.parametrize("words", [[], ["-h"], ["convert"]])
def test_a_person_who_says_nothing_gets_help(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Usage: diffquant")
    assert err == ""


def test_no_option_of_generate_appears_or_vanishes_by_accident() -> None:
    options = [option for param in SUBCOMMANDS.load("generate").params for option in param.opts]
    assert options == GENERATE_OPTIONS.split()


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.startswith("diffquant, version ")


@pytest.mark.parametrize("name", SUBCOMMANDS.names())
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([name, "--help"]) == 0
    assert f"Usage: diffquant {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "what", "hint"),
    [
        (["genrate"], "there is no command 'genrate'", "generate"),
        (["generate", "--promt", "x"], "there is no option '--promt'", "--prompt"),
        (["generate", "--transformr-path", "x"], "no option '--transformr-path'", "--transformer"),
        (["generate"], "there is no prompt", "--prompt 'red apple'"),
        (["generate", "--width", "0"], "--width 0 is too small", "--width 1"),
        (["generate", "--numerics", "best"], "'best' is not one of", "generate --help"),
        (["plan", "--kernel", "cpu_fp9"], "no kernel is called 'cpu_fp9'", "cpu_fp8"),
        (["generate", "--ring-degree", "2"], "ring attention is not", "leave --ring-degree out"),
        (["inspect"], "missing argument 'SOURCE'", "inspect --help"),
        (["convert", "nothing"], "there is no command 'nothing'", "one of"),
    ],
)
def test_wrong_usage_is_told_in_two_lines_with_exit_code_2(
    words: list[str], what: str, hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == 2
    out, err = capsys.readouterr()
    first, second = err.splitlines()
    assert out == ""
    assert first.startswith("error: ")
    assert what in first
    assert second.startswith("hint: ")
    assert hint in second


def test_a_refusal_below_the_command_line_has_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["inspect", str(tmp_path / "nothing")]) == 1
    assert "error: " in capsys.readouterr().err


def test_debug_lets_the_traceback_through(tmp_path: Path) -> None:
    from diffquant.errors import SourceError

    with pytest.raises(SourceError):
        run(["inspect", str(tmp_path / "nothing"), "--debug"])


# inspect


def test_inspect_tells_format_evidence_family_layers_and_audit(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["inspect", str(FP8)]) == 0
    told = capsys.readouterr().out
    assert "format    modelopt" in told
    assert "config.json" in told
    assert "flux1 (FluxTransformer2DModel)" in told
    assert "single_transformer_blocks.0-1.proj_mlp" in told
    assert "audit     whole" in told


def test_inspect_json_has_the_stable_keys(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", str(FP8), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {"format", "family", "evidence", "layers", "audit"} <= set(told)
    assert {"path", "shape", "encoding", "activation", "why"} <= set(told["layers"][0])
    assert set(told["layers"][0]["encoding"]) == {"name", "options"}
    assert told["audit"] == {"ok": True, "problems": []}


def test_inspect_fails_when_the_audit_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(FP8, tmp_path / "broken")
    config = json.loads((broken / "config.json").read_text())
    config["num_single_layers"] = 1
    (broken / "config.json").write_text(json.dumps(config))
    assert run(["inspect", str(broken), "--json"]) == 1
    problems = json.loads(capsys.readouterr().out)["audit"]["problems"]
    assert any("single_transformer_blocks.1" in problem["tensor"] for problem in problems)


def test_inspect_imports_nothing_heavy() -> None:
    probe = (
        "import sys\nfrom diffquant.cli import run\n"
        f"code = run(['inspect', {str(FP8)!r}])\n"
        f"print(code, *sorted(set(sys.modules) & {HEAVY!r}))"
    )
    ran = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, timeout=300)
    assert ran.stdout.splitlines()[-1] == "0"


# plan


def test_plan_tells_rules_kernels_refusals_peaks_and_the_command(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", "--model-path", str(base), "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert "rule 1  the base pipeline is" in told
    assert "33/36 linears fp8 via cpu_fp8" in told
    assert "torch_scaled_mm" in told
    assert "needs cuda, this is cpu" in told
    assert told.splitlines()[-1] == (
        f"diffquant generate --prompt 'red apple' --model-path {base} --device cpu"
    )


def test_plan_for_a_device_that_is_not_here_chooses_its_native_kernel(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", "--model-path", str(base), "--device", "sm89", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    kernels = {
        layer["path"]: layer["kernels"] for layer in told["components"]["transformer"]["layers"]
    }
    assert kernels["transformer_blocks.0.attn.to_q"] == ["torch_scaled_mm"]
    assert told["device"]["arch"] == "sm89"


def test_plan_refuses_a_component_the_pipeline_does_not_have(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", "--model-path", str(base), "--vae-path", "x"]) == 2
    assert "--vae-path names a component 'vae'" in capsys.readouterr().err


def test_how_to_quantize_needs_what_to_quantize_to(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["plan", "--model-path", str(base), "--quantize-all"]) == 2
    assert "--quantize-all has nothing to act on" in capsys.readouterr().err


def test_foreign_words_are_answered_on_stderr(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", "--model-path", str(base), "--fp8-gemm-backend", "deep_gemm", "--json"]
    assert run(words) == 0
    out, err = capsys.readouterr()
    assert "note: --fp8-gemm-backend deep_gemm is not needed" in err
    assert json.loads(out)["components"]


# doctor, formats, presets


def test_doctor_tells_versions_devices_kernels_and_every_foreign_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SGLANG_SOMETHING", "1")
    assert run(["doctor", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["kernels"]["reference"]["cpu"] is None
    assert "needs cuda" in told["kernels"]["torch_scaled_mm"]["cpu"]
    assert told["environment"] == {"SGLANG_SOMETHING": "not read by diffquant"}
    assert any(device["chosen"] for device in told["devices"])


def test_doctor_reads_as_text_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor"]) == 0
    told = capsys.readouterr().out
    assert "no SGLANG_* variable is set" in told
    assert "reference" in told


def test_formats_lists_every_registry(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["formats", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {"formats", "encodings", "families", "kernels"} <= set(told)
    assert all(line for named in told.values() for line in named.values())


def test_presets_lists_all_and_shows_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["presets"]) == 0
    assert "flux1-fp8" in capsys.readouterr().out
    assert run(["presets", "flux1-fp8"]) == 0
    assert "keeps" in capsys.readouterr().out
    assert run(["presets", "flux1-fp9"]) == 2
    assert "flux1-fp8" in capsys.readouterr().err
