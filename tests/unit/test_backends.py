"""GEMM backends by name, each on every generation of hardware; the tables are written by hand."""

from dataclasses import replace

import pytest

from diffquant import aliases, device
from diffquant.device import Device
from diffquant.kernels import KERNELS, _backends

FP8, FP4 = "--fp8-gemm-backend", "--fp4-gemm-backend"
PLACES = (
    *("sm75", "sm80", "sm86", "sm89", "sm90", "sm100", "sm103", "sm120", "sm121"),
    *("gfx90a", "gfx942", "gfx950", "ascend-a2", "ascend-a5", "cpu"),
)
GPUS = PLACES[: PLACES.index("ascend-a2")]
AMPERE = ("sm80", "sm86", "sm89")
SM100, SM120 = ("sm100", "sm103"), ("sm120", "sm121")
AMD = ("gfx90a", "gfx942", "gfx950")

EXISTS = {
    (FP8, "deep_gemm"): ("sm90", *SM100),
    (FP8, "flashinfer_trtllm"): SM100,
    (FP8, "flashinfer_cutlass"): (*SM100, *SM120),
    (FP8, "flashinfer_deepgemm"): ("sm90",),
    (FP8, "cutlass"): ("sm90", *SM100, *SM120),
    (FP8, "triton"): GPUS,
    (FP8, "aiter"): AMD,
    (FP4, "cutlass"): (*SM100, *SM120),
    (FP4, "flashinfer_cutlass"): (*SM100, *SM120),
    (FP4, "flashinfer_cudnn"): (*SM100, *SM120),
    (FP4, "flashinfer_cutedsl"): SM100,
    (FP4, "flashinfer_trtllm"): SM100,
    (FP4, "marlin"): (*AMPERE, "sm90"),
}
AUTO = {
    FP8: dict.fromkeys(("sm75", *AMPERE, *SM120), "triton")
    | dict.fromkeys(("sm90", *SM100), "deep_gemm")
    | dict.fromkeys(AMD, "aiter"),
    FP4: dict.fromkeys((*AMPERE, "sm90"), "marlin")
    | dict.fromkeys(SM100, "flashinfer_cutedsl")
    | dict.fromkeys(SM120, "flashinfer_cutlass"),
}
OURS = {
    FP8: dict.fromkeys(("sm80", "sm86"), "triton_fp8")
    | dict.fromkeys(("sm89", "sm90", *SM100, *SM120), "torch_scaled_mm")
    | dict.fromkeys((*AMD, "ascend-a2", "ascend-a5"), "portable")
    | {"cpu": "cpu_fp8"},
    FP4: dict.fromkeys((*AMPERE, "sm90"), "triton_nvfp4")
    | dict.fromkeys((*SM100, *SM120), "flashinfer_fp4")
    | dict.fromkeys((*AMD, "ascend-a2", "ascend-a5"), "portable")
    | {"cpu": "cpu_nvfp4"},
}


def there(place: str) -> Device:
    """The device with what there is for it installed."""
    return replace(device.parse(place), packages={"flashinfer-python": "0.6", "triton": "3.6"})


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("flag", "name"), EXISTS)
def test_a_backend_exists_where_the_documentation_says(flag: str, name: str, place: str) -> None:
    exists = _backends.exists(flag, name, there(place))
    assert exists == (place in EXISTS[flag, name])


def test_the_table_has_every_backend_and_no_other() -> None:
    known = [(flag, name) for flag in _backends.FLAGS for name in _backends.names(flag)]
    assert sorted(known) == sorted(EXISTS)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("flag", [FP8, FP4])
def test_auto_takes_the_first_that_exists(flag: str, place: str) -> None:
    assert _backends.automatic(flag, there(place)) == AUTO[flag].get(place)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("flag", [FP8, FP4])
def test_each_is_answered_with_the_kernel_that_runs_here(flag: str, place: str) -> None:
    ours = OURS[flag].get(place, "reference")
    assert _backends.equivalent(flag, there(place)) == ours
    assert ours in KERNELS.names()
    assert _backends.told(flag, there(place)).endswith(f"in SGLang, {ours} here")


@pytest.mark.parametrize(
    ("place", "name"),
    [("sm100", "flashinfer_trtllm"), ("sm120", "flashinfer_cutlass"), ("cpu", None)],
)
def test_without_a_word_diffusion_takes_another_than_auto_on_sm100(
    place: str, name: str | None
) -> None:
    assert _backends.default(FP4, there(place)) == name


@pytest.mark.parametrize(("flag", "name"), EXISTS)
def test_typing_one_is_answered_with_why_and_where(flag: str, name: str) -> None:
    translation = aliases.translate([flag, name])
    assert translation.arguments == ()
    note = translation.notes[0]
    assert note.startswith(f"{flag} {name} is not needed: ")
    assert "here" in note or "portable" in note
    assert "there it is for " in note
