"""Every flag, value and variable that users of SGLang-Diffusion paste does something or is answered.

The lists are written by hand from what that tool documents, so that an entry our own table lacks is
found here.
"""

import shlex
from pathlib import Path
from typing import Any

import pytest

from diffquant import loading
from diffquant.cli import _options, generate
from diffquant.errors import DiffquantError
from diffquant.resolve import ModelFlags
from tests import tiny

FP8 = tiny.DATA / "modelopt" / "flux" / "fp8"
VARIABLES = ("SGLANG_DIFFUSION_FLASHINFER_FP4_GEMM_BACKEND", "SGLANG_FP4_IGNORED_LAYERS")
QUANTIZED_WHILE_LOADING = (
    "fp8", "mxfp4", "mxfp8", "mxfp4_npu", "quark_mxfp4", "w8a8_fp8", "w8a8_int8", "blockwise_int8",
    "auto-round-int8",
)  # fmt: skip
SAY_WHAT_A_FILE_IS = (
    "modelopt", "modelopt_fp8", "modelopt_fp4", "modelslim", "compressed-tensors", "gguf", "awq",
    "awq_marlin", "gptq", "gptq_marlin", "auto-round", "bitsandbytes", "quark",
)  # fmt: skip
FOR_LANGUAGE_MODELS = ("nvfp4_online", "quark_int4fp8_moe", "petit_nvfp4", "moe_wna16")
TORCHAO = (
    "int8dq", "int8wo", "fp8wo", "fp8dq-per_tensor", "fp8dq-per_row",
    "int4wo-32", "int4wo-64", "int4wo-128",
)  # fmt: skip
FP8_BACKENDS = (
    "auto", "deep_gemm", "flashinfer_trtllm", "flashinfer_cutlass", "flashinfer_deepgemm", "cutlass",
    "triton", "aiter",
)  # fmt: skip
FP4_BACKENDS = (
    "auto", "cutlass", "flashinfer_cutlass", "flashinfer_cudnn", "flashinfer_cutedsl",
    "flashinfer_trtllm", "marlin",
)  # fmt: skip
SAID = (
    *(f"--quantization {name}" for name in QUANTIZED_WHILE_LOADING),
    *(f"--torchao-config {name}" for name in TORCHAO),
    *(f"--fp8-gemm-backend {name}" for name in FP8_BACKENDS),
    *(f"--fp4-gemm-backend {name}" for name in FP4_BACKENDS),
    "--model-id FLUX.1-dev",
    "--num-inference-steps 4",
    "--num-gpus 1",
    "--save-output",
    "--dit-cpu-offload",
    "--dit-cpu-offload false",
    "--dit-layerwise-offload true",
    "--quantization fp8 --quantization-ignored-layers attn.to_",
    f"--transformer-path {FP8}",
    f"--transformer-weights-path {FP8}",
    f"--quantized_model_path {FP8}",
    f"--transformer_quantized_path {FP8}",
    f"--transformer-path {FP8} --quantization modelopt_fp8",
)
REFUSED = (
    *((f"--quantization {name}", "all 80 tensors are plain BF16") for name in SAY_WHAT_A_FILE_IS),
    *((f"--quantization {name}", f"--quantization {name}") for name in FOR_LANGUAGE_MODELS),
    ("--torchao-config int4wo-256", "K is 128, int4_256 needs a multiple of 256"),
    (f"--transformer-path {FP8} --quantization fp8", "is already modelopt"),
    ("--modelopt_checkpoint_save_path x", "drawing does not calibrate"),
    ("--modelopt_checkpoint_restore_path x", "drawing does not calibrate"),
    ("--transformer-2-path x", "'transformer_2'"),
    ("--fp8-gemm-backend marvellous", "has no value 'marvellous'"),
)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_flux_pipeline(tmp_path_factory.mktemp("tiny") / "flux")


def decided(words: str, base: Path) -> tuple[loading.DryRun, Any]:
    """What `generate` would do with the words, and what it has to say about them."""
    typed = ["--prompt", "fox", "--model-path", str(base), "--device", "cpu", *shlex.split(words)]
    with generate.COMMAND.make_context("generate", typed) as context:
        model = _options.model_flags(context.params, context.obj)
        run = _options.run_flags(context.params, context.obj)
    return loading.dry_run(model, run), context.obj


@pytest.mark.parametrize("words", SAID)
def test_what_is_pasted_runs_and_what_is_put_differently_is_told(words: str, base: Path) -> None:
    dry, prepared = decided(words, base)
    flag = words.split()[0].replace("_", "-")
    ours = {option for param in generate.COMMAND.params for option in param.opts}
    assert dry.plans["transformer"].layers
    assert (flag in ours) != any(note.startswith(flag) for note in prepared.notes)


@pytest.mark.parametrize(("words", "why"), REFUSED, ids=[words for words, _ in REFUSED])
def test_what_cannot_be_is_refused_in_words(words: str, why: str, base: Path) -> None:
    with pytest.raises(DiffquantError, match=why) as caught:
        decided(words, base)
    assert caught.value.exit_code in (1, 2)
    assert caught.value.hint


@pytest.mark.parametrize("name", VARIABLES)
def test_their_variables_are_heard_and_named(
    name: str, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = {"SGLANG_FP4_IGNORED_LAYERS": "attn.to_"}.get(name, "flashinfer_cutlass")
    monkeypatch.setenv(name, value)
    _, prepared = decided("--quantization nvfp4", base)
    assert any(name in note for note in prepared.notes)


def test_svdquant_is_promised_in_the_words_of_the_mission(base: Path) -> None:
    words = "--enable-svdquant --quantization-precision int4 --quantization-rank 32"
    with pytest.raises(DiffquantError, match="SVDQuant was promised"):
        decided(words, base)
    assert ModelFlags(enable_svdquant=True, quantization_precision="int4").quantization_rank is None
