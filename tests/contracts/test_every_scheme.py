"""What every scheme of `--quantization` promises, drawn with the bundled model.

A picture is held against the one that BF16 draws with the same noise. The bounds lie 3 dB below the
worst of the schemes of that width as measured on "red apple" at seed 42: 42.2 dB with eight bits, 32.9
with four. A model whose scales are rolled by one row is far below both.
"""

import json
import re
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffquant import forecast, loading
from diffquant.encodings import ENCODINGS
from diffquant.errors import UsageError
from diffquant.kernels import wanted
from diffquant.linear import QuantLinear, Term
from diffquant.loading import RunFlags
from diffquant.plan import Plan, Role, to_json
from diffquant.resolve import ModelFlags
from diffquant.schemes import SCHEMES

NAMES = SCHEMES.names()
#: Bits of a code -> the least PSNR in dB.
BOUNDS = {8: 39.0, 4: 29.5}
ON_CPU = RunFlags(device="cpu")
SCALES = (Role.CHANNEL_SCALE, Role.BLOCK_SCALE)

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves


@cache
def pipeline(quantization: str | None) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flags = ModelFlags(model_path="emoji_flux", quantization=quantization)
        return loading.load(flags, ON_CPU)


def drawn(pipe: Any) -> "np.ndarray[Any, np.dtype[np.float64]]":
    picture = pipe(
        "red apple",
        height=64,
        width=64,
        num_inference_steps=12,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(42),
        output_type="np",
    ).images[0]
    return np.asarray(picture, dtype=np.float64)


@cache
def bf16() -> "np.ndarray[Any, np.dtype[np.float64]]":
    return drawn(pipeline(None))


def psnr(picture: "np.ndarray[Any, np.dtype[np.float64]]") -> float:
    return float(-10 * np.log10(np.mean((picture - bf16()) ** 2)))


def layers(pipe: Any) -> list[QuantLinear]:
    return [module for module in pipe.transformer.modules() if isinstance(module, QuantLinear)]


def encodings(pipe: Any) -> set[str]:
    return {encoding(term) for module in layers(pipe) for term in module.terms}


def encoding(term: Term) -> str:
    """What the piece was quantized to while loading."""
    assert term.piece.recode is not None
    return term.piece.recode.encoding.name


def bound(name: str) -> float:
    return BOUNDS[int(ENCODINGS.load(SCHEMES.load(name).encoding.name).bits)]


@pytest.mark.parametrize("name", NAMES)
def test_it_draws_what_bf16_draws(name: str) -> None:
    assert psnr(drawn(pipeline(name))) > bound(name)


@pytest.mark.parametrize("name", ["fp8", "nvfp4", "svdq_int4"])
def test_the_bound_tells_a_right_picture_from_a_wrong_one(name: str) -> None:
    pipe = pipeline(name)
    saved = [(module, key, module.get_buffer(key)) for module, key in scales(pipe)]
    try:
        for module, key, scale in saved:
            module._buffers[key] = scale[torch.arange(len(scale)) - 1]
        assert psnr(drawn(pipe)) < bound(name)
    finally:
        for module, key, scale in saved:
            module._buffers[key] = scale


def scales(pipe: Any) -> list[tuple[QuantLinear, str]]:
    return [
        (module, name)
        for module in layers(pipe)
        for term in module.terms
        for role, name in term.names.items()
        if role in SCALES
    ]


@pytest.mark.parametrize("name", NAMES)
def test_the_truth_line_says_it_was_done_here_and_by_what(name: str) -> None:
    report = loading.report(pipeline(name))
    line = report.truth_lines[0]
    told = re.findall(r"(\d+)/34 linears (\w+) \(online\) via cpu_(\w+)", line)
    assert line.startswith("transformer: ")
    assert sum(int(count) for count, _, _ in told) == len(layers(pipeline(name)))
    assert {encoding for _, encoding, _ in told} == encodings(pipeline(name))
    assert all(encoding in kernel for _, encoding, kernel in told)


@pytest.mark.parametrize("name", NAMES)
def test_its_plan_is_json_and_says_why_of_every_layer(name: str) -> None:
    plan = loading.report(pipeline(name)).plans["transformer"]
    told = json.loads(json.dumps(to_json(plan)))
    whys = {layer["path"]: layer["why"] for layer in told["layers"]}
    assert sum(why == f"--quantization {name}" for why in whys.values()) == len(
        layers(pipeline(name))
    )
    assert all("stays" in why or why.startswith("--quantization") for why in whys.values())


@pytest.mark.parametrize("name", NAMES)
def test_what_it_holds_is_what_the_forecast_says_to_the_byte(name: str) -> None:
    plan = loading.report(pipeline(name)).plans["transformer"]
    held = sum(
        buffer.nbytes
        for module in layers(pipeline(name))
        for key, buffer in module.named_buffers()
        if key != "nan"
    )
    assert forecast.recoded_bytes(plan) == held


@pytest.mark.parametrize("name", NAMES)
def test_its_layers_never_hold_what_they_were_made_from(name: str) -> None:
    """Codes take the bits that the encoding says, and no layer keeps its dense weight beside them."""
    for module in layers(pipeline(name)):
        columns = 0
        for index, term in enumerate(module.terms):
            codes = module.parts(index)[Role.CODES]
            bits = ENCODINGS.load(encoding(term)).bits
            columns += codes.nbytes * 8 // int(bits * module.out_features)
        assert columns == module.in_features
        assert module.weight.untyped_storage().nbytes() == module.weight.element_size()


@pytest.mark.parametrize("name", [name for name in NAMES if SCHEMES.load(name).saved_as])
def test_what_it_saves_draws_the_same_picture_bit_for_bit(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    flags = ModelFlags(model_path="emoji_flux", quantization=name)
    dry = loading.dry_run(flags, replace(ON_CPU, save_quantized=str(folder)))
    loading.save_quantized(dry)
    saved = loading.load(ModelFlags(model_path="emoji_flux", transformer_path=str(folder)), ON_CPU)
    plan = loading.report(saved).plans["transformer"]
    assert plan.format == SCHEMES.load(name).saved_as
    assert not any(piece.recode for layer in plan.layers for piece in layer.pieces)
    assert asked(plan) == asked(dry.plans["transformer"])
    assert np.array_equal(drawn(saved), drawn(pipeline(name)))


def asked(plan: Plan) -> dict[str, list[str]]:
    """What every layer multiplies, and what its inputs become."""
    return {
        layer.path: [f"{piece.runs_as.name} {wanted(piece)}" for piece in layer.pieces]
        for layer in plan.layers
    }


@pytest.mark.parametrize("name", [name for name in NAMES if SCHEMES.load(name).saved_as is None])
def test_what_no_dialect_stores_is_refused_before_anything_is_read(
    name: str, tmp_path: Path
) -> None:
    flags = ModelFlags(model_path="emoji_flux", quantization=name)
    with pytest.raises(UsageError, match=f"no dialect stores {name}"):
        loading.dry_run(flags, replace(ON_CPU, save_quantized=str(tmp_path / "saved")))
