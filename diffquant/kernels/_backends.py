"""GEMM backends by the names that SGLang gives them: where each exists, what `auto` means there, and
which kernel multiplies here instead.

The table is in `aliases.toml`, beside the answer to each name. Source: SGLang's documentation of
`--fp8-gemm-backend` and `--fp4-gemm-backend`.
"""

from collections.abc import Sequence

from diffquant import aliases
from diffquant.device import Device
from diffquant.kernels import choose
from diffquant.plan import DENSE, LayerPlan, Piece, Span
from diffquant.schemes import SCHEMES

AUTO = "auto"
#: Flag -> the scheme of the layers it speaks of.
FLAGS = {"--fp8-gemm-backend": "fp8", "--fp4-gemm-backend": "nvfp4"}
#: A shape [N, K] that no kernel refuses.
EASY_NK = (256, 256)


def names(flag: str) -> Sequence[str]:
    """The backends a flag knows, without `auto`."""
    return [name for name in aliases.flags()[flag].values if name != AUTO]


def exists(flag: str, name: str, device: Device) -> bool:
    """Whether SGLang has that backend on the device."""
    return not {device.kind, _generation(device)}.isdisjoint(aliases.flags()[flag].values[name].on)


def automatic(flag: str, device: Device) -> str | None:
    """The backend that `auto` takes on the device; None where there is none."""
    order = aliases.flags()[flag].order
    tried = order.get(_generation(device), order["any"])
    return next((name for name in tried if exists(flag, name, device)), None)


def default(flag: str, device: Device) -> str | None:
    """The backend a diffusion transformer gets when nobody names one."""
    return aliases.flags()[flag].default.get(_generation(device)) or automatic(flag, device)


def equivalent(flag: str, device: Device) -> str:
    """The kernel of ours that multiplies such layers on the device."""
    n, k = EASY_NK
    scheme = FLAGS[flag]
    piece = Piece(
        encoding=DENSE,
        stored_NK=EASY_NK,
        parts=(),
        out=Span(0, n),
        cols=Span(0, k),
        recode=SCHEMES.load(scheme).recode(),
    )
    layer = LayerPlan(path=scheme, shape_NK=EASY_NK, pieces=(piece,), dtype="bfloat16", why=flag)
    return choose(layer, device).kernel


def told(flag: str, device: Device) -> str:
    """What runs without any word, there and here."""
    there = default(flag, device)
    return f"{there or 'nothing'} in SGLang, {equivalent(flag, device)} here"


def _generation(device: Device) -> str:
    """sm80 for compute capabilities 8.0 to 8.9, and so on; elsewhere the kind of device."""
    return device.kind if device.sm is None else f"sm{device.sm // 10 * 10}"
