"""What runs natively where, and what says no. The tables are written by hand from what vendors say
of their hardware; they are not recorded from the code.

Native means: a kernel quantizes the input as the format asks and multiplies the codes. Elsewhere the
same file runs weight-only, so no cell of the table is a model that cannot be loaded.
"""

from dataclasses import replace

import pytest

from diffquant import device
from diffquant.device import Device
from diffquant.errors import KernelError
from diffquant.kernels import KERNELS, Choice, choose, refusal
from diffquant.plan import DENSE, LayerPlan, Piece, Span
from diffquant.schemes import SCHEMES

SCALED = "torch_scaled_mm"
FI_FP4 = "flashinfer_fp4"
MX = "torch_scaled_mm_mx"
TRITON = "triton_svdq"
#: The table is of machines that have what there is for them.
INSTALLED = {"flashinfer-python": "0.6", "triton": "3.6"}

#: Column of the table -> the scheme whose encoding and activations it stands for.
COLUMNS = {
    "fp8": "fp8",
    "nvfp4": "nvfp4",
    "mxfp8": "mxfp8",
    "mxfp4": "mxfp4",
    "svdq": "svdq_int4",
    "int8": "int8",
}

# FP8 tensor cores begin with Ada (sm89); torch multiplies on them up to sm121.
# FP4 and MX tensor cores begin with sm100; FlashInfer multiplies NVFP4 there and torch MXFP8,
# nothing does MXFP4 yet.
# INT4 tensor cores are those of sm75 to sm89, Hopper has none. Its int8 ones, as Ampere's and Ada's,
# multiply int4 codes to the same integers: that is our Triton kernel. (Nunchaku's own operators take
# only what Nunchaku packed; here weights are quantized while loading.) Blackwell's engines differ.
# CDNA3's FP8 is e4m3fnuz, which is not what the files hold. Ascend's MX kernels (A5) are not carried.
# int8 products on a CPU are opt-in: their activations lose more than the weights do.
NATIVE = {
    #              fp8     nvfp4   mxfp8 mxfp4 svdq    int8
    "sm75":      (None,    None,   None, None, None,   None),
    "sm80":      (None,    None,   None, None, TRITON, None),
    "sm86":      (None,    None,   None, None, TRITON, None),
    "sm89":      (SCALED,  None,   None, None, TRITON, None),
    "sm90":      (SCALED,  None,   None, None, TRITON, None),
    "sm100":     (SCALED,  FI_FP4, MX,   None, None,   None),
    "sm103":     (SCALED,  FI_FP4, MX,   None, None,   None),
    "sm120":     (SCALED,  FI_FP4, MX,   None, None,   None),
    "sm121":     (SCALED,  FI_FP4, MX,   None, None,   None),
    "gfx90a":    (None,    None,   None, None, None,   None),
    "gfx942":    (None,    None,   None, None, None,   None),
    "gfx950":    (None,    None,   None, None, None,   None),
    "mps":       (None,    None,   None, None, None,   None),
    "ascend-a2": (None,    None,   None, None, None,   None),
    "ascend-a5": (None,    None,   None, None, None,   None),
    "cpu":       (None,    None,   None, None, None,   None),
}  # fmt: skip

#: What multiplies the weights where no kernel is native.
PORTABLE = {
    "cpu": ("cpu_fp8", "cpu_nvfp4", "cpu_mxfp8", "cpu_mxfp4", "cpu_int4", "cpu_int8"),
    # Triton writes for Ampere and later.
    **dict.fromkeys(
        ("sm80", "sm86", "sm89", "sm90", "sm100", "sm103", "sm120", "sm121"),
        (
            "triton_fp8",
            "triton_nvfp4",
            "triton_mxfp8",
            "triton_mxfp4",
            "triton_int4",
            "triton_int8",
        ),
    ),
    # Where float8 is not the files' own, or not at all, it is read as bytes.
    **dict.fromkeys(
        ("gfx90a", "gfx942", "gfx950", "mps", "ascend-a2", "ascend-a5"),
        (*("portable",) * 4, "reference", "reference"),
    ),
}
EVERYWHERE_ELSE = ("reference",) * len(COLUMNS)

#: What the native FP8 kernel says where it may not run.
NO_FP8 = {
    "sm75": "needs sm89 to sm129, this is sm75",
    "sm80": "needs sm89 to sm129, this is sm80",
    "sm86": "needs sm89 to sm129, this is sm86",
    "gfx90a": "needs cuda, this is rocm",
    "gfx942": "needs cuda, this is rocm",
    "gfx950": "needs cuda, this is rocm",
    "mps": "needs cuda, this is mps",
    "ascend-a2": "needs cuda, this is ascend",
    "ascend-a5": "needs cuda, this is ascend",
    "cpu": "needs cuda, this is cpu",
}

#: What the native FP4 kernel says where it may not run.
NO_FP4 = {
    place: f"needs sm100 to sm121, this is {place}"
    for place in ("sm75", "sm80", "sm86", "sm89", "sm90")
} | {place: reason for place, reason in NO_FP8.items() if reason.startswith("needs cuda")}

CELLS = [(place, column) for place in NATIVE for column in COLUMNS]


def there(place: str) -> Device:
    """A device for a dry run; mps has no architecture to name, so it is spelled out."""
    if place == "mps":
        return Device(kind="mps", arch="arm64", name="Apple GPU", packages=INSTALLED, present=False)
    return replace(device.parse(place), packages=INSTALLED)


def layer(scheme: str) -> LayerPlan:
    """A dense layer of 256 x 512 that is quantized while loading."""
    shape = (256, 512)
    piece = Piece(
        encoding=DENSE,
        stored_NK=shape,
        parts=(),
        out=Span(0, shape[0]),
        cols=Span(0, shape[1]),
        recode=SCHEMES.load(scheme).recode(),
    )
    return LayerPlan(path="proj", shape_NK=shape, pieces=(piece,), dtype="bfloat16", why="a test")


def chosen(place: str, column: str, strict: bool = False) -> Choice:
    return choose(layer(COLUMNS[column]), there(place), strict=strict)


def told(place: str, column: str) -> tuple[str | None, str]:
    """The table's cell: the native kernel, and the portable one."""
    at = list(COLUMNS).index(column)
    return NATIVE[place][at], PORTABLE.get(place, EVERYWHERE_ELSE)[at]


@pytest.mark.parametrize(("place", "column"), CELLS)
def test_the_kernel_is_the_one_the_hardware_has(place: str, column: str) -> None:
    native, portable = told(place, column)
    choice = chosen(place, column)
    assert choice.kernel == (native or portable)
    assert (choice.specs[0].activation is not None) == (native is not None)


@pytest.mark.parametrize(("place", "column"), CELLS)
def test_strict_stops_exactly_where_nothing_is_native(place: str, column: str) -> None:
    native, _ = told(place, column)
    if native is not None:
        assert chosen(place, column, strict=True).kernel == native
        return
    with pytest.raises(KernelError, match="no native kernel runs them here"):
        chosen(place, column, strict=True)


@pytest.mark.parametrize("place", NATIVE)
def test_native_fp8_says_why_it_does_not_run(place: str) -> None:
    refusals = {item.kernel: item.reason for item in chosen(place, "fp8").refusals}
    assert refusals.get(SCALED) == NO_FP8.get(place)


@pytest.mark.parametrize("place", NATIVE)
def test_native_fp4_says_why_it_does_not_run(place: str) -> None:
    refusals = {item.kernel: item.reason for item in chosen(place, "nvfp4").refusals}
    assert refusals.get(FI_FP4) == NO_FP4.get(place)


def test_native_fp4_needs_its_package() -> None:
    bare = replace(there("sm120"), packages={})
    refusals = {item.kernel: item.reason for item in choose(layer("nvfp4"), bare).refusals}
    assert refusals[FI_FP4] == "needs flashinfer-python installed"


@pytest.mark.parametrize("place", [place for place in NATIVE if place != "cpu"])
def test_kernels_of_the_cpu_stay_there(place: str) -> None:
    spec = chosen(place, "fp8").specs[0]
    for name in KERNELS.names():
        if name.startswith("cpu_"):
            reason = refusal(KERNELS.load(name), spec, there(place))
            assert reason is not None, name


@pytest.mark.parametrize(
    ("scheme", "kernel"),
    [
        ("fp8", SCALED),
        ("fp8_tensor", SCALED),
        ("fp8_block", "torch_scaled_mm_block"),
        ("svdq_nvfp4", "triton_nvfp4"),
    ],
)
def test_hopper_multiplies_fp8_natively_in_any_granularity(scheme: str, kernel: str) -> None:
    assert choose(layer(scheme), there("sm90")).kernel == kernel


#: What the native SVDQuant kernel says where it may not run.
NO_SVDQ = {
    place: f"needs sm80 to sm90, this is {place}"
    for place in ("sm75", "sm100", "sm103", "sm120", "sm121")
} | {place: reason for place, reason in NO_FP8.items() if reason.startswith("needs cuda")}


@pytest.mark.parametrize("place", NATIVE)
def test_native_svdq_says_why_it_does_not_run(place: str) -> None:
    refusals = {item.kernel: item.reason for item in chosen(place, "svdq").refusals}
    assert refusals.get(TRITON) == NO_SVDQ.get(place)


@pytest.mark.parametrize("column", COLUMNS)
def test_without_triton_an_ampere_gpu_has_the_reference(column: str) -> None:
    choice = choose(layer(COLUMNS[column]), replace(there("sm80"), packages={}))
    assert choice.kernel == "reference"
    assert "needs triton installed" in {item.reason for item in choice.refusals}


def test_inputs_behind_gelu_are_quantized_natively_on_hopper() -> None:
    """Nunchaku's int4 is unsigned there."""
    plan = layer("svdq_int4")
    recode = plan.pieces[0].recode
    assert recode is not None and recode.activation is not None
    behind = replace(recode, activation=replace(recode.activation, unsigned=True))
    moved = replace(plan, pieces=(replace(plan.pieces[0], recode=behind),))
    assert choose(moved, there("sm90")).kernel == TRITON
