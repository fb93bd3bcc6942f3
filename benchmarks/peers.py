"""The same linear layer in other libraries, against ours in the nearest numbers, in the same rounds.

What is compared is overhead: how much longer than bf16 `F.linear` a layer takes. Each peer has a
process of its own: one that decodes into fresh memory pays for its pages at every call, unless what
another library left in the heap has room for 75 MB.

    pip install --no-deps --target peers torchao==0.18.0 optimum-quanto gguf ninja comfy-kitchen
    python -m benchmarks peers --peers peers
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from benchmarks import Section, Settings
from benchmarks._fresh import call
from benchmarks._layers import KINDS, K, N, dense, encoded
from benchmarks._measuring import in_turns
from benchmarks._results import table

PLAIN, OURS = "bf16 `F.linear`", "ours"
TOKENS = (256, 1024)
#: Our overhead may be at most this part of a peer's.
SHARE = 0.5
ROUNDS = 7

Linear = Callable[[Tensor], Tensor]
#: Of theirs and of ours, the median ratios to bf16.
Pair = tuple[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Peer:
    """A layer of another library.

    package  the module that must be there
    nearest  which of ours stores the weight in the nearest numbers
    build    the bf16 layer -> theirs, through their public way of quantizing a linear
    """

    package: str
    nearest: str
    build: Callable[[nn.Linear], Linear]


def _torchao(config: str) -> Callable[[nn.Linear], Linear]:
    def build(layer: nn.Linear) -> Linear:
        from torchao import quantization

        model = nn.Sequential(_copy(layer))
        quantization.quantize_(model, getattr(quantization, config)())
        return model

    return build


def _quanto(kind: str) -> Callable[[nn.Linear], Linear]:
    def build(layer: nn.Linear) -> Linear:
        from optimum import quanto

        model = nn.Sequential(_copy(layer))
        quanto.quantize(model, weights=getattr(quanto, kind))
        quanto.freeze(model)
        return model

    return build


def _gguf(kind: str) -> Callable[[nn.Linear], Linear]:
    def build(layer: nn.Linear) -> Linear:
        import gguf
        from diffusers.quantizers.gguf.utils import GGUFLinear, GGUFParameter

        number = gguf.GGMLQuantizationType[kind]
        stored = gguf.quants.quantize(layer.weight.float().numpy(), number)
        with torch.device("meta"):
            model = GGUFLinear(K, N, compute_dtype=torch.bfloat16)
        model.weight = GGUFParameter(torch.from_numpy(stored), quant_type=number)
        linear: Linear = model
        return linear

    return build


def _comfy_fp8(layer: nn.Linear) -> Linear:
    from comfy_kitchen.backends.eager import quantization as eager

    scale = layer.weight.float().abs().max() / 448
    codes = eager.quantize_per_tensor_fp8(layer.weight, scale)
    return lambda x: nn.functional.linear(x, eager.dequantize_per_tensor_fp8(codes, scale))


def _comfy_nvfp4(layer: nn.Linear) -> Linear:
    from comfy_kitchen.backends.eager import quantization as eager

    scale = layer.weight.float().abs().max() / (448 * 6)
    codes, blocks = eager.quantize_nvfp4(layer.weight, scale)
    return lambda x: nn.functional.linear(x, eager.dequantize_nvfp4(codes, scale, blocks))


def _comfy_mxfp8(layer: nn.Linear) -> Linear:
    from comfy_kitchen.backends.eager import quantization as eager

    codes, blocks = eager.quantize_mxfp8(layer.weight)
    return lambda x: nn.functional.linear(x, eager.dequantize_mxfp8(codes, blocks))


def _copy(layer: nn.Linear) -> nn.Linear:
    own = nn.Linear(K, N, bias=False, dtype=layer.weight.dtype)
    own.weight.data = layer.weight.data.clone()
    return own.requires_grad_(False)


PEERS = {
    "torchao Float8WeightOnly": Peer(
        package="torchao",
        nearest="fp8, channel scale",
        build=_torchao("Float8WeightOnlyConfig"),
    ),
    "torchao Int8WeightOnly": Peer(
        package="torchao", nearest="int8", build=_torchao("Int8WeightOnlyConfig")
    ),
    "quanto qfloat8": Peer(
        package="optimum.quanto", nearest="fp8, channel scale", build=_quanto("qfloat8")
    ),
    "quanto qint8": Peer(package="optimum.quanto", nearest="int8", build=_quanto("qint8")),
    "quanto qint4": Peer(
        package="optimum.quanto", nearest="int4 + rank 32", build=_quanto("qint4")
    ),
    "diffusers GGUF Q8_0": Peer(package="gguf", nearest="ggml Q8_0", build=_gguf("Q8_0")),
    "diffusers GGUF Q4_0": Peer(package="gguf", nearest="ggml Q4_0", build=_gguf("Q4_0")),
    "comfy-kitchen eager fp8": Peer(
        package="comfy_kitchen", nearest="fp8, tensor scale", build=_comfy_fp8
    ),
    "comfy-kitchen eager mxfp8": Peer(package="comfy_kitchen", nearest="mxfp8", build=_comfy_mxfp8),
    "comfy-kitchen eager nvfp4": Peer(package="comfy_kitchen", nearest="nvfp4", build=_comfy_nvfp4),
}


def run(settings: Settings) -> str:
    there = {name: peer for name, peer in PEERS.items() if is_installed(peer.package)}
    absent = sorted({peer.package for name, peer in PEERS.items() if name not in there})
    rounds = min(settings.rounds, ROUNDS)
    timed = {name: call(f"{__name__}:measured", name, rounds) for name in there}
    missing = f"\n\nNot installed, so not measured: {', '.join(absent)}." if absent else ""
    return f"{_about()}\n\n{_table(timed)}{missing}"


def is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # the parent of a dotted name
        return False


def measured(name: str, rounds: int) -> list[Pair]:
    """One peer at each of TOKENS, for a process of its own."""
    logging.disable(logging.WARNING)  # torchao says at every import what of torch is deprecated
    with torch.no_grad():
        plain = dense()
        ours = encoded(plain.weight, KINDS[PEERS[name].nearest])
        layers: dict[str, Linear] = {PLAIN: plain, OURS: ours, name: PEERS[name].build(plain)}
        return [_timed(layers, name, tokens, rounds) for tokens in TOKENS]


def _timed(layers: Mapping[str, Linear], name: str, tokens: int, rounds: int) -> Pair:
    x_MK = torch.randn(tokens, K).bfloat16()
    times = in_turns({each: partial(layer, x_MK) for each, layer in layers.items()}, rounds)
    return times.ratio(name, PLAIN).median, times.ratio(OURS, PLAIN).median


def _about() -> str:
    return (
        f"The layer [{N}, {K}] of the section above, each peer with ours and bf16 in a process of its "
        "own, where what is decoded into fresh memory pays for its pages at every call. Ratios are "
        f"medians to {PLAIN}. *part* is our overhead over bf16 as a part of theirs, at most {SHARE} is "
        "the goal. Our int4 carries a low-rank branch besides. comfy-kitchen is its eager decode and "
        "`F.linear`, which is what it does without a GPU."
    )


def _table(timed: Mapping[str, list[Pair]]) -> str:
    header = ("peer", "ours", *(f"M = {tokens}: theirs, ours, part" for tokens in TOKENS))
    rows = [
        (name, PEERS[name].nearest, *(_cell(*pair) for pair in pairs))
        for name, pairs in timed.items()
    ]
    return table(header, rows)


def _cell(theirs: float, ours: float) -> str:
    part = max(0.0, ours - 1) / (theirs - 1) if theirs > 1 else float("inf")
    verdict = "met" if part <= SHARE else "**missed**"
    return f"{theirs:.2f}, {ours:.2f}, {part:.2f} {verdict}"


SECTION = Section(order=20, title="Other libraries", run=run)
