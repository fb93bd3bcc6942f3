"""Our Triton kernels without a GPU: interpreted in float16 and float32 against the reference, and
compiled in bfloat16 for the hardware they are for. What they do there is tests/gpu's to tell.

The interpreter is wrong for bfloat16, so that no test runs it. See `tests/interpreted.py`.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from diffquant import device
from diffquant.kernels import KERNELS

CHILD = Path(__file__).parents[1] / "interpreted.py"
LIMIT = 3.5e-3
NAMES = [name for name in KERNELS.names() if name.startswith("triton_")]
#: Kind of `tests/interpreted.py` -> the operands its tensor cores multiply.
OPERANDS = {
    "nvfp4": "bf16",
    "mxfp4": "bf16",
    "mxfp8": "bf16",
    "int4 and a zero": "bf16",
    "fp8 in blocks": "bf16",
    "int8": "bf16",
    "fp8 w8a8": "e4m3",
    "svdq": ".s8",
}
WORDS = {80: "mma.sync", 89: "mma.sync", 90: "wgmma.mma_async", 120: "mma.sync"}

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def told(cache: Path, *words: str, **variables: str) -> list[dict[str, Any]]:
    """What the child prints, a record a line."""
    ran = subprocess.run(
        [sys.executable, str(CHILD), *words],
        env={**os.environ, "TRITON_CACHE_DIR": str(cache), **variables},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


@pytest.fixture(scope="module")
def errors(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return told(tmp_path_factory.mktemp("triton"), "errors", TRITON_INTERPRET="1")


@pytest.mark.parametrize("name", NAMES)
def test_it_agrees_with_the_reference_on_ragged_shapes_and_extreme_scales(
    name: str, errors: list[dict[str, Any]]
) -> None:
    right = [each for each in errors if each["kernel"] == name and each["wrong"] is None]
    assert len(right) >= 12
    assert [each for each in right if not each["error"] <= LIMIT] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_part_that_is_off_would_be_seen(name: str, errors: list[dict[str, Any]]) -> None:
    wrong = [each for each in errors if each["kernel"] == name and each["wrong"] is not None]
    assert {"codes"} < {each["wrong"] for each in wrong}
    assert [each for each in wrong if not each["error"] > LIMIT] == []


@pytest.mark.parametrize("role", ["smooth", "lowrank_down", "lowrank_up"])
def test_svdq_adds_the_low_rank_branch_itself(role: str, errors: list[dict[str, Any]]) -> None:
    whole = [each for each in errors if each["kind"].endswith("linear")]
    assert all(each["error"] <= LIMIT for each in whole if each["wrong"] is None)
    assert all(each["error"] > LIMIT for each in whole if each["wrong"] == role)
    assert len([each for each in whole if each["wrong"] == role]) == 2


@pytest.mark.long
def test_a_step_of_the_bundled_model_is_what_faithful_numerics_predict(tmp_path: Path) -> None:
    found = told(tmp_path, "step", TRITON_INTERPRET="1")
    errors = {each["numerics"]: each["error"] for each in found}
    assert errors["auto"] <= 1e-5
    assert errors["weight-only"] > 1e-2


def compiles(cache: Path, sm: int, kinds: list[str]) -> None:
    """Every launch makes code for the capability; the products multiply what they should."""
    for made in told(cache, "compiled", str(sm), *kinds):
        if made["launch"] == "_multiply":
            wide = made["tokens"] > 16
            assert made[WORDS[sm] if wide else "mma.sync"] or made["wgmma.mma_async"], made
            assert made[OPERANDS[made["kind"]]], made


def test_it_compiles_for_hopper_in_bfloat16(tmp_path: Path) -> None:
    compiles(tmp_path, 90, ["nvfp4", "fp8 w8a8", "svdq"])


@pytest.mark.long
@pytest.mark.parametrize("sm", WORDS)
def test_it_compiles_for_everything_it_says_it_runs_on(sm: int, tmp_path: Path) -> None:
    here = device.parse(f"sm{sm}")
    there = [kind for kind, kernel in kernels_by_kind().items() if admits(kernel, here)]
    compiles(tmp_path, sm, there)


def kernels_by_kind() -> dict[str, str]:
    own = {"int4 and a zero": "int4", "fp8 in blocks": "fp8", "fp8 w8a8": "fp8_w8a8"}
    return {kind: f"triton_{own.get(kind, kind)}" for kind in OPERANDS}


def admits(kernel: str, here: device.Device) -> bool:
    low, high = KERNELS.load(kernel).needs.sm or (0, 0)
    return here.sm is not None and low <= here.sm < high


@pytest.mark.parametrize("name", NAMES)
def test_it_says_that_it_was_not_run_and_needs_its_package(name: str) -> None:
    kernel = KERNELS.load(name)
    assert kernel.untried
    assert kernel.needs.packages == ("triton",)
    assert kernel.needs.devices == {"cuda"}
