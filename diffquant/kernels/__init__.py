"""Ways to multiply by an encoded weight: one file per kernel, its needs stated as data.

Needs are checked before anything is loaded and every refusal is kept; try/except is not dispatch.
`reference` is last and always possible, and it is the definition of correct.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from typing import TYPE_CHECKING, Literal

from diffquant.device import Device
from diffquant.errors import KernelError
from diffquant.plan import DENSE, ROW_MAJOR, Activation, Encoding, LayerPlan, Piece, Role
from diffquant.plugins import Registry

if TYPE_CHECKING:
    from torch import Tensor

    Parts = Mapping[Role, Tensor]
    Multiply = Callable[[Tensor, Parts], Tensor]

Numerics = Literal["auto", "faithful", "weight-only"]

#: Roles a kernel sees; smoothing, low rank and bias are computed around it, in `linear.py`.
KERNEL_ROLES = frozenset(Role) - {
    Role.SMOOTH,
    Role.LOWRANK_UP,
    Role.LOWRANK_DOWN,
    Role.BIAS,
    Role.INT_BIAS,
}
SCALE_ROLES = frozenset(
    {Role.BLOCK_SCALE, Role.CHANNEL_SCALE, Role.TENSOR_SCALE, Role.OUTER_SCALE, Role.ZERO_POINT}
    | {Role.CODEBOOK, Role.CORRECTION, Role.GROUP_INDEX}
    | {Role.NESTED_SCALE, Role.NESTED_MAP, Role.NESTED_OFFSET}
)
#: Kinds of device on which torch has no float8, and what cannot be read or rounded without it.
WITHOUT_FLOAT8 = frozenset({"mps"})
FLOAT8 = frozenset({"fp8", "mxfp8", "nvfp4"})
WEIGHT_ONLY = "none"
ANY_ACTIVATION = "any"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """What a kernel must know about one piece, beside its tensors.

    shape_NK    of the canonical weight; parts are in canonical order (see `plan.Role`)
    roles       the parts there are
    activation  how to quantize the input, None for weight-only arithmetic
    layout      the order in which the file stores the codes; kernels get canonical rows all the same,
                unless they `prepare` another order
    """

    encoding: Encoding
    shape_NK: tuple[int, int]
    roles: frozenset[Role]
    activation: Activation | None = None
    layout: str = ROW_MAJOR.name


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What must hold for a kernel to run a piece. Empty sets mean "any".

    encodings    names of encodings
    options      of the encoding that it knows, None: all;  requires: those that must be spelled
    scales       weight-scale roles it can apply; the piece's must be among them
    activations  canonical activation strings it quantizes itself; "none" is weight-only, "any" all
    layouts      orders in which a file may store the codes
    devices      cpu, cuda, rocm, mps …;  sm: half-open range of compute capabilities such as 89..121
    without_sm   half-open range inside `sm` for which the kernel was not built
    multiple_of_N, multiple_of_K   shape constraints
    packages     distributions that must be installed on the device's machine
    """

    encodings: frozenset[str] = frozenset()
    options: frozenset[str] | None = None
    requires: frozenset[str] = frozenset()
    scales: frozenset[Role] = frozenset()
    activations: frozenset[str] = frozenset({WEIGHT_ONLY})
    layouts: frozenset[str] = frozenset()
    devices: frozenset[str] = frozenset()
    sm: tuple[int, int] | None = None
    without_sm: tuple[int, int] | None = None
    multiple_of_N: int = 1
    multiple_of_K: int = 1
    packages: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One kernel.

    rank       lower is tried first among those whose needs hold
    build      Spec -> multiply(x [M, K], parts) -> [M, N]; imports vendors inside; no bias
    fuses      roles that `multiply` takes over from `linear.py`: smoothing, low rank; without smoothing
               it finds l · Dᵀ [M, R] in the place of LOWRANK_DOWN
    prepare    canonical parts -> the same parts in the order that `multiply` reads, on their way to
               the device; None: as they are
    restore    the way back, bit by bit
    float32    `multiply` returns its float32 sum, so that the bias joins it before the one rounding
    opt_in     only runs when named by --kernel
    predicts   only runs for faithful numerics, or when named: a weight-only kernel is faster
    keeps      asks `_keeping.rows_of` for decoded rows, which may then stay: bit-identical either way
    untried    never run on the hardware it needs; the README's matrix says so
    """

    rank: int
    needs: Needs
    build: "Callable[[Spec], Multiply]"
    fuses: frozenset[Role] = frozenset()
    prepare: "Callable[[Parts, Spec], dict[Role, Tensor]] | None" = None
    restore: "Callable[[Parts, Spec], dict[Role, Tensor]] | None" = None
    float32: bool = False
    opt_in: bool = False
    predicts: bool = False
    keeps: bool = False
    untried: bool = False


KERNELS: Registry[Kernel] = Registry("diffquant.kernels", "KERNEL")


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a kernel that is tried before the chosen one may not run a piece."""

    kernel: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The kernels of one layer on one device, one per piece, and why better ones refused.

    specs      what each kernel was told, activation quantization included
    """

    path: str
    kernels: tuple[str, ...]
    specs: tuple[Spec, ...]
    refusals: tuple[Refusal, ...] = ()

    @property
    def kernel(self) -> str:
        """The distinct kernels, joined."""
        return "+".join(dict.fromkeys(self.kernels))


def choose(
    layer: LayerPlan,
    device: Device,
    *,
    numerics: Numerics = "auto",
    kernel: str | None = None,
    strict: bool = False,
    kernels: Mapping[str, Kernel] | None = None,
) -> Choice:
    """The best kernel for each piece of the layer.

    auto         a kernel that quantizes activations as the format asks, else weight-only
    faithful     activations quantized as the format asks, on any device, emulated if need be
    weight-only  activations are never quantized
    kernel       demand this one wherever it knows the encoding; KernelError where it refuses
    strict       KernelError when a format asks for quantized activations and no native kernel runs

    Raises KernelError when nothing may run.
    """
    contest = _everybody(KERNELS.names()) if kernels is None else _Contest(kernels)
    chosen: list[str] = []
    specs: list[Spec] = []
    refusals: list[Refusal] = []
    for piece in layer.pieces:
        asked = spec_of(piece, wanted(piece), frozenset(Role))
        name, spec, refused = _choose_piece(asked, device, contest, numerics, kernel)
        if strict:
            _require_native(layer.path, asked, name, spec, refused, contest.kernels)
        chosen.append(name)
        specs.append(spec)
        refusals.extend(item for item in refused if item not in refusals)
    return Choice(
        path=layer.path, kernels=tuple(chosen), specs=tuple(specs), refusals=tuple(refusals)
    )


def refusal(kernel: Kernel, spec: Spec, device: Device) -> str | None:
    """Why the kernel may not run such a piece on the device; None when it may."""
    checks = (_refuses_numbers, _refuses_device, _refuses_layout, _refuses_shape)
    for check in (*checks, _refuses_packages):
        reason = check(kernel.needs, spec, device)
        if reason is not None:
            return reason
    return _refuses_float8(kernel, spec, device)


def spec_of(
    piece: Piece, activation: Activation | None, fuses: frozenset[Role] = frozenset()
) -> Spec:
    """The kernel's view of a piece whose input is quantized by `activation` (None: not at all).

    fuses  what the kernel sees besides its own roles
    """
    held = piece.roles if piece.recode is None else piece.recode.roles
    codes = None if piece.recode is not None else piece.part(Role.CODES)
    return Spec(
        encoding=piece.runs_as,
        shape_NK=(len(piece.out), len(piece.cols)),
        roles=held & (KERNEL_ROLES | fuses),
        activation=activation,
        layout=(ROW_MAJOR if codes is None else codes.layout).name,
    )


def wanted(piece: Piece) -> Activation | None:
    """The activation quantization the piece's format, or recode, asks for."""
    return piece.activation if piece.recode is None else piece.recode.activation


class _Contest:
    """Kernels by name, and in the order in which they are tried; equal to itself alone."""

    def __init__(self, kernels: Mapping[str, Kernel]) -> None:
        self.kernels = kernels
        self.ordered = sorted(kernels.items(), key=lambda item: item[1].rank)


@cache
def _everybody(names: tuple[str, ...]) -> _Contest:
    return _Contest(KERNELS.load_all())


@lru_cache(maxsize=1024)
def _choose_piece(
    asked: Spec, device: Device, contest: _Contest, numerics: Numerics, demanded: str | None
) -> tuple[str, Spec, tuple[Refusal, ...]]:
    """Kernel, what it is told, and who refused before it. Thousands of layers ask a few questions.

    asked  the piece as it is stored, with the activation its format wants and all of its roles
    """
    refused: list[Refusal] = []
    for name, kernel in contest.ordered:
        for spec in _ways(asked, kernel, numerics):
            reason = _unwilling(name, kernel, demanded, numerics) or refusal(kernel, spec, device)
            if reason is None:
                return name, spec, tuple(refused)
            if _concerns(kernel, spec):
                refused.append(Refusal(name, reason))
    if demanded is not None:
        raise _unfit(demanded, contest.kernels[demanded], asked, device, numerics)
    raise KernelError(
        f"no kernel runs {asked.encoding} on {device.name}",
        hint="; ".join(f"{item.kernel}: {item.reason}" for item in refused) or None,
    )


def _unfit(
    name: str, kernel: Kernel, asked: Spec, device: Device, numerics: Numerics
) -> KernelError:
    """Why a demanded kernel runs the piece in none of the ways it could."""
    ways = _ways(asked, kernel, numerics)
    reasons = dict.fromkeys(why for way in ways if (why := refusal(kernel, way, device)))
    return KernelError(
        f"--kernel {name} cannot run {asked.encoding} on {device.name}: it {', it '.join(reasons)}",
        hint="leave --kernel out; `diffquant plan` with the same words says which kernels run here",
    )


def _ways(asked: Spec, kernel: Kernel, numerics: Numerics) -> list[Spec]:
    """How this kernel could be asked to run the piece, the most faithful way first."""
    seen = replace(asked, roles=asked.roles & (KERNEL_ROLES | kernel.fuses))
    narrow = asked.activation is not None
    ways = []
    emulates = ANY_ACTIVATION in kernel.needs.activations
    if narrow and numerics != "weight-only" and not (emulates and numerics == "auto"):
        ways.append(seen)
    if not narrow or numerics != "faithful":
        ways.append(replace(seen, activation=None))
    # A kernel that only multiplies quantized activations has no weight-only way.
    weight_only = WEIGHT_ONLY in kernel.needs.activations
    return [way for way in ways if way.activation is not None or weight_only] or ways[:1]


def _unwilling(name: str, kernel: Kernel, demanded: str | None, numerics: Numerics) -> str | None:
    if demanded is None and kernel.opt_in:
        return "runs only when named by --kernel"
    if demanded is None and kernel.predicts and numerics != "faithful":
        return "predicts quantized inputs: --numerics faithful"
    weight_only = kernel.needs.activations == {WEIGHT_ONLY}
    if demanded is None and numerics == "faithful" and weight_only and name != DENSE.name:
        return "decodes in its own way, and faithful numerics are the reference's"
    if demanded is None:
        return None
    # Dense pieces of a layer have one kernel; a demand speaks of the encoded ones.
    return None if name in (demanded, "dense") else f"--kernel {demanded} was demanded"


def _concerns(kernel: Kernel, spec: Spec) -> bool:
    return not kernel.needs.encodings or spec.encoding.name in kernel.needs.encodings


def _require_native(
    path: str,
    wish: Spec,
    name: str,
    spec: Spec,
    refused: Sequence[Refusal],
    known: Mapping[str, Kernel],
) -> None:
    asked = wish.activation
    emulated = ANY_ACTIVATION in known[name].needs.activations
    if asked is not None and (spec.activation is None or emulated):
        reasons = "; ".join(f"{item.kernel}: {item.reason}" for item in refused)
        raise KernelError(
            f"{path!r} asks for {asked} activations and no native kernel runs them here",
            hint=f"without --strict it runs through {name}. {reasons}",
        )


def _refuses_numbers(needs: Needs, spec: Spec, device: Device) -> str | None:
    if needs.encodings and spec.encoding.name not in needs.encodings:
        return f"multiplies {_listed(needs.encodings)}, not {spec.encoding.name}"
    if needs.options is not None and not _spelled_options(spec.encoding) <= needs.options:
        return f"does not know {spec.encoding}"
    if not needs.requires <= _spelled_options(spec.encoding):
        return f"needs {_listed(needs.requires)}, this is {spec.encoding}"
    scales = spec.roles & SCALE_ROLES
    if needs.scales and not scales <= needs.scales:
        return f"cannot apply {_listed(scales - needs.scales)}"
    asked = WEIGHT_ONLY if spec.activation is None else str(spec.activation)
    if ANY_ACTIVATION not in needs.activations and asked not in needs.activations:
        if asked == WEIGHT_ONLY:
            return f"quantizes activations ({_listed(needs.activations)}), weight-only is wanted"
        return f"does not quantize activations as {asked}"
    return None


def _refuses_float8(kernel: Kernel, spec: Spec, device: Device) -> str | None:
    """Where a device has no such dtype, weights are held as bytes by a kernel that says so, and inputs
    cannot be quantized to it."""
    if device.kind not in WITHOUT_FLOAT8 or not _concerns(kernel, spec):
        return None
    number = "" if spec.activation is None else spec.activation.number.partition(";")[0]
    if number in FLOAT8:
        return f"cannot round inputs to {number}: {device.kind} has no float8"
    # A tensor scale above block scales: the weight passes through float8 on its way.
    stored = {Role.BLOCK_SCALE, Role.TENSOR_SCALE} <= spec.roles or spec.encoding.name in FLOAT8
    if stored and kernel.prepare is None:
        return f"reads {spec.encoding.name} as float8, which {device.kind} does not have"
    return None


def _refuses_layout(needs: Needs, spec: Spec, device: Device) -> str | None:
    if needs.layouts and spec.layout not in needs.layouts:
        return f"reads weights stored as {_listed(needs.layouts)}, these are {spec.layout}"
    return None


def _refuses_device(needs: Needs, spec: Spec, device: Device) -> str | None:
    if needs.devices and device.kind not in needs.devices:
        return f"needs {_listed(needs.devices)}, this is {device.kind}"
    if needs.sm is not None and device.sm is not None:
        low, high = needs.sm
        if not low <= device.sm < high:
            return f"needs sm{low} to sm{high - 1}, this is sm{device.sm}"
        low, high = needs.without_sm or (0, 0)
        if low <= device.sm < high:
            return f"is not built for sm{low} to sm{high - 1}, this is sm{device.sm}"
    return None


def _refuses_shape(needs: Needs, spec: Spec, device: Device) -> str | None:
    n, k = spec.shape_NK
    if n % needs.multiple_of_N:
        return f"needs N to be a multiple of {needs.multiple_of_N}, this layer has {n}"
    if k % needs.multiple_of_K:
        return f"needs K to be a multiple of {needs.multiple_of_K}, this layer has {k}"
    return None


def _refuses_packages(needs: Needs, spec: Spec, device: Device) -> str | None:
    missing = [name for name in needs.packages if name not in device.packages]
    return f"needs {_listed(frozenset(missing))} installed" if missing else None


def _spelled_options(encoding: Encoding) -> frozenset[str]:
    return frozenset(f"{key}={value}" for key, value in encoding.options)


def _listed(names: frozenset[str] | frozenset[Role]) -> str:
    return ", ".join(sorted(str(name) for name in names))
