"""The adapters of Nunchaku's compiled operators against a stand-in that keeps their contract on a CPU.

The stand-in checks names, shapes and dtypes, undoes the packing and computes with our own codecs, so
these tests hold what is handed over; they say nothing of the hardware. The file is a true one.
"""

import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffquant import device, headers, planner, sources
from diffquant.activations import quantized
from diffquant.device import Device
from diffquant.encodings import ENCODINGS, Recipe
from diffquant.kernels import KERNELS, Choice, Spec, choose, refusal
from diffquant.layouts import nunchaku_awq, nunchaku_mma
from diffquant.linear import QuantLinear
from diffquant.materialize import materialize, prepared
from diffquant.plan import Activation, Encoding, Plan, Role
from tests.unit.test_nunchaku import FLUX, error

TOKENS, GROUPS = 256, {False: 64, True: 16}
INPUTS = {
    False: Activation(number="int4", granularity="group", group=64, mode="dynamic"),
    True: Activation(number="nvfp4;outer=none", granularity="group", group=16, mode="dynamic"),
}
INSTALLED = {"nunchaku": "1.2.1+cu12.8torch2.10"}


def quantize(
    input: Tensor, *, lora_down: Tensor, smooth: Tensor, fp4: bool, pad_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Three tensors padded to whole tiles of tokens; only the second operator knows what they hold."""
    m, k = input.shape
    rank = lora_down.shape[1]
    assert input.dtype in (torch.bfloat16, torch.float16) and input.is_contiguous()
    assert lora_down.shape == (k, rank) and rank % 16 == 0 and smooth.shape == (k,)
    assert lora_down.dtype == smooth.dtype == input.dtype and pad_size == TOKENS
    down = nunchaku_mma.undo(lora_down, Role.LOWRANK_DOWN, (rank, k), ())
    h_MK = input / nunchaku_mma.undo(smooth, Role.SMOOTH, (k,), ())
    pad = (0, 0, 0, -m % TOKENS)
    codes = nn.functional.pad(quantized(h_MK, INPUTS[fp4], {}), pad)
    scales = input.new_zeros(k // GROUPS[fp4], len(codes))
    return codes, scales, nn.functional.pad(input.float() @ down.float().T, pad)


def gemm(
    *,
    act: Tensor,
    wgt: Tensor,
    out: Tensor,
    ascales: Tensor,
    wscales: Tensor,
    lora_act_in: Tensor,
    lora_up: Tensor,
    bias: Tensor | None,
    fp4: bool,
    alpha: float,
    wcscales: Tensor | None,
) -> None:
    """out [M, N] is written; every part lies in tiles."""
    (n, half), rank = wgt.shape, lora_up.shape[1]
    k, group = 2 * half, GROUPS[fp4]
    assert wgt.dtype == torch.int8 and n % 128 == k % 128 == 0 and out.shape[1] == n
    assert wscales.shape == (k // group, n) and ascales.shape == (k // group, len(act))
    assert wscales.dtype == (torch.float8_e4m3fn if fp4 else out.dtype)
    assert bias is None and alpha == 1.0 and isinstance(alpha, float) and lora_up.shape == (n, rank)
    parts = {
        Role.CODES: nunchaku_mma.undo(wgt, Role.CODES, (n, k), ()),
        Role.BLOCK_SCALE: nunchaku_mma.undo(wscales, Role.BLOCK_SCALE, (n, k // group), ()),
    }
    encoding = Encoding("nvfp4", (("outer", "none"),)) if fp4 else Encoding("int4")
    if wcscales is not None:
        assert wcscales.shape == (n,) and wcscales.dtype == out.dtype
        parts[Role.CHANNEL_SCALE] = nunchaku_mma.undo(wcscales, Role.CHANNEL_SCALE, (n,), ())
    weight = ENCODINGS.load(encoding.name).decode(parts, encoding, (n, k))
    up = nunchaku_mma.undo(lora_up, Role.LOWRANK_UP, (n, rank), ())
    out.copy_((act @ weight.T + lora_act_in @ up.float().T)[: len(out)])


def gemv(
    *,
    in_feats: Tensor,
    kernel: Tensor,
    scaling_factors: Tensor,
    zeros: Tensor,
    m: int,
    n: int,
    k: int,
    group_size: int,
) -> Tensor:
    """in_feats [m, k] times the weight, m at most 8."""
    assert in_feats.shape == (m, k) and 1 <= m <= 8 and group_size == 64
    assert kernel.shape == (n // 4, k // 2) and kernel.dtype == torch.int32
    assert scaling_factors.shape == zeros.shape == (k // 64, n)
    assert in_feats.dtype == scaling_factors.dtype == zeros.dtype
    scale, zero = (part.t().repeat_interleave(64, 1).float() for part in (scaling_factors, zeros))
    pairs = nunchaku_awq.undo(kernel, Role.CODES, (n, k), ())
    codes = torch.stack((pairs & 15, pairs >> 4), 2).flatten(1)
    return (in_feats.float() @ (codes * scale + zero).T).to(in_feats.dtype)


@pytest.fixture(autouse=True)
def nunchaku(monkeypatch: pytest.MonkeyPatch) -> None:
    operators: dict[str, dict[str, Any]] = {
        "quantize": {"svdq_quantize_w4a4_act_fuse_lora_cuda": quantize},
        "gemm": {"svdq_gemm_w4a4_cuda": gemm},
        "gemv": {"awq_gemv_w4a16_cuda": gemv},
    }
    package = ModuleType("nunchaku")
    package.__spec__ = ModuleSpec("nunchaku", None)
    monkeypatch.setitem(sys.modules, "nunchaku", package)
    monkeypatch.setitem(sys.modules, "nunchaku.ops", ModuleType("nunchaku.ops"))
    for name, held in operators.items():
        module = ModuleType(f"nunchaku.ops.{name}")
        vars(module).update(held)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def there(place: str, packages: dict[str, str] = INSTALLED) -> Device:
    return replace(device.parse(place), packages=packages)


# one layer -----------------------------------------------------------------------------------

N, K, M, RANK = 256, 384, 37, 16
LAYERS = ("nunchaku_int4", "nunchaku_nvfp4", "nunchaku_awq")
FILE_ENCODING = {
    "nunchaku_int4": Encoding("int4", (("group", "64"),)),
    "nunchaku_nvfp4": Encoding("nvfp4"),
    "nunchaku_awq": Encoding("int4", (("group", "64"), ("signed", "false"), ("zero", "scaled"))),
}
LAYOUT = {name: "nunchaku_awq" if name.endswith("awq") else "nunchaku_mma" for name in LAYERS}


def layer(kernel: str) -> tuple[Spec, dict[Role, Tensor], Tensor]:
    """Spec, canonical parts [256, 384] and an input [37, 384]."""
    noise = torch.Generator().manual_seed(0)
    encoding = FILE_ENCODING[kernel]
    codec = ENCODINGS.load(encoding.name)
    assert codec.encode is not None
    group = 16 if encoding.name == "nvfp4" else 64
    parts = codec.encode(
        torch.randn(N, K, generator=noise), encoding, Recipe(granularity="group", group=group)
    )
    activation = None
    if kernel != "nunchaku_awq":
        activation = INPUTS[kernel == "nunchaku_nvfp4"]
        parts[Role.SMOOTH] = torch.rand(K, generator=noise).bfloat16() + 0.5
        parts[Role.LOWRANK_DOWN] = torch.randn(RANK, K, generator=noise).bfloat16() / 20
        parts[Role.LOWRANK_UP] = torch.randn(N, RANK, generator=noise).bfloat16()
    if encoding.name == "int4":
        parts[Role.BLOCK_SCALE] = parts[Role.BLOCK_SCALE].bfloat16()
    spec = Spec(
        encoding=encoding,
        shape_NK=(N, K),
        roles=frozenset(parts),
        activation=activation,
        layout=LAYOUT[kernel],
    )
    return spec, parts, torch.randn(M, K, generator=noise).bfloat16()


def wanted(spec: Spec, parts: dict[Role, Tensor], x_MK: Tensor) -> Tensor:
    """The plan's equation by the reference, the smoothed input rounded as the kernel rounds it."""
    h_MK = x_MK / parts[Role.SMOOTH] if Role.SMOOTH in parts else x_MK
    y_MN = KERNELS.load("reference").build(spec)(h_MK, parts)
    if Role.LOWRANK_UP in parts:
        low = x_MK.float() @ parts[Role.LOWRANK_DOWN].float().T
        y_MN = y_MN + low @ parts[Role.LOWRANK_UP].float().T
    return y_MN


def product(kernel: str, spec: Spec, parts: dict[Role, Tensor], x_MK: Tensor) -> Tensor:
    found = KERNELS.load(kernel)
    return found.build(spec)(x_MK, prepared(found, spec, parts))


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one.float(), other.float())


@pytest.mark.parametrize("kernel", LAYERS)
def test_it_is_what_faithful_numerics_predict(kernel: str) -> None:
    spec, parts, x_MK = layer(kernel)
    truth = wanted(spec, parts, x_MK)
    assert error(product(kernel, spec, parts, x_MK), truth) < 5e-3
    for role in parts.keys() - {Role.TENSOR_SCALE}:
        turned = parts[role].view(torch.uint8 if role is Role.CODES else parts[role].dtype)
        wrong = parts | {role: turned.roll(1, turned.ndim - 1)}
        assert error(product(kernel, spec, wrong, x_MK), truth) > 2e-2, role


@pytest.mark.parametrize("kernel", LAYERS)
def test_what_it_holds_comes_back_bit_by_bit(kernel: str) -> None:
    spec, parts, _ = layer(kernel)
    found = KERNELS.load(kernel)
    assert found.restore is not None
    back = found.restore(prepared(found, spec, parts), spec)
    assert back.keys() == parts.keys()
    for role, part in parts.items():
        assert same(back[role], part), role


def test_a_layer_without_smoothing_and_low_rank_runs_too() -> None:
    spec, parts, x_MK = layer("nunchaku_int4")
    bare = {role: parts[role] for role in (Role.CODES, Role.BLOCK_SCALE)}
    truth = wanted(spec, bare, x_MK)
    assert error(product("nunchaku_int4", spec, bare, x_MK), truth) < 5e-3


# a whole transformer -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan() -> Plan:
    checkpoint = sources.checkpoint(str(FLUX))
    return planner.plan(checkpoint, headers.read(checkpoint.files), config={})


def model_of(plan: Plan, choices: list[Choice]) -> nn.Module:
    return materialize(plan, choices, device=torch.device("cpu"), dtype=torch.bfloat16)


def native(plan: Plan) -> Iterator[Choice]:
    """The choices of an RTX 4090, with the reference for what its operators do not do."""
    for each in plan.layers:
        choice = choose(each, there("sm89"))
        ours = all(name.startswith("nunchaku") or name == "dense" for name in choice.kernels)
        yield choice if ours else choose(each, there("cpu"), numerics="faithful")


def test_every_layer_of_a_true_file_is_what_faithful_numerics_predict(plan: Plan) -> None:
    choices = list(native(plan))
    assert {"nunchaku_int4", "nunchaku_awq"} <= {choice.kernel for choice in choices}
    faithful = [choose(each, there("cpu"), numerics="faithful") for each in plan.layers]
    predicted, noise = model_of(plan, faithful), torch.Generator().manual_seed(0)
    for path, linear in model_of(plan, choices).named_modules():
        if isinstance(linear, QuantLinear):
            x_MK = torch.randn(20, linear.in_features, generator=noise).bfloat16()
            truth = predicted.get_submodule(path)(x_MK).float()
            assert error(linear(x_MK), truth) < 1e-2, path


def test_layers_of_their_own_are_held_byte_for_byte_as_the_file_stores_them(plan: Plan) -> None:
    model, stored = model_of(plan, list(native(plan))), load_file(FLUX)
    linear = model.get_submodule("transformer_blocks.0.attn.to_out.0")
    assert isinstance(linear, QuantLinear)
    for role, name in {
        Role.CODES: "qweight",
        Role.BLOCK_SCALE: "wscales",
        Role.SMOOTH: "smooth",
        Role.LOWRANK_DOWN: "lora_down",
        Role.LOWRANK_UP: "lora_up",
    }.items():
        held = linear.get_buffer(f"piece0_{role.value}")
        assert torch.equal(held, stored[f"transformer_blocks.0.out_proj.{name}"]), role


def test_its_parts_are_canonical_to_everybody_else(plan: Plan) -> None:
    ours = model_of(plan, list(native(plan)))
    plain = model_of(plan, [choose(each, device.parse("cpu")) for each in plan.layers])
    for path in ("transformer_blocks.0.attn.to_k", "transformer_blocks.0.norm1.linear"):
        held, rows = ours.get_submodule(path), plain.get_submodule(path)
        assert isinstance(held, QuantLinear) and isinstance(rows, QuantLinear)
        for role, part in rows.parts(0).items():
            back = held.parts(0)[role]
            assert same(back, part), role


def test_layers_behind_gelu_go_to_another_kernel(plan: Plan) -> None:
    behind = next(each for each in plan.layers if each.path == "transformer_blocks.0.ff.net.2")
    choice = choose(behind, there("sm89"))
    assert not choice.kernel.startswith("nunchaku")
    told = {item.kernel: item.reason for item in choice.refusals}
    assert "unsigned" in told["nunchaku_int4"]


# where -----------------------------------------------------------------------------------------

INT4, FP4, NEITHER = (True, False, True), (False, True, True), (False, False, False)
#: Hardware -> whether it runs SVDQuant int4, SVDQuant nvfp4 and AWQ. From Nunchaku's own gate and the
#: machine code in its wheels, less sm75, which has no bfloat16.
RUNS = {
    "sm75": NEITHER,
    "sm80": INT4,
    "sm86": INT4,
    "sm89": INT4,
    "sm90": NEITHER,
    "sm100": NEITHER,
    "sm103": NEITHER,
    "sm120": FP4,
    "sm121": FP4,
    "gfx90a": NEITHER,
    "gfx942": NEITHER,
    "gfx950": NEITHER,
    "ascend-a2": NEITHER,
    "ascend-a5": NEITHER,
    "cpu": NEITHER,
}


@pytest.mark.parametrize("place", RUNS)
def test_it_runs_where_its_wheels_do(place: str) -> None:
    found = tuple(
        refusal(KERNELS.load(kernel), layer(kernel)[0], there(place)) is None for kernel in LAYERS
    )
    assert found == RUNS[place]


@pytest.mark.parametrize("kernel", LAYERS)
def test_the_statistics_package_of_that_name_does_not_count(kernel: str) -> None:
    told = refusal(KERNELS.load(kernel), layer(kernel)[0], there(home(kernel), packages={}))
    assert told == "needs nunchaku installed"


@pytest.mark.parametrize("kernel", LAYERS)
def test_weights_in_rows_are_left_to_others(kernel: str) -> None:
    rows = replace(layer(kernel)[0], layout="row_major")
    told = refusal(KERNELS.load(kernel), rows, there(home(kernel)))
    assert told == f"reads weights stored as {LAYOUT[kernel]}, these are row_major"


def home(kernel: str) -> str:
    return "sm120" if kernel == "nunchaku_nvfp4" else "sm89"


def test_hopper_is_told_that_nothing_is_built_for_it() -> None:
    told = refusal(KERNELS.load("nunchaku_awq"), layer("nunchaku_awq")[0], there("sm90"))
    assert told == "is not built for sm90 to sm119, this is sm90"


@pytest.mark.parametrize("kernel", LAYERS)
def test_other_hardware_is_told_so_before_anything_else(kernel: str) -> None:
    rows = replace(layer(kernel)[0], layout="row_major")
    assert refusal(KERNELS.load(kernel), rows, there("cpu")) == "needs cuda, this is cpu"
