"""One linear layer of a transformer in every encoding: real `QuantLinear`s, with the kernel that a
pipeline on this machine would choose."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks._measuring import Goal
from diffquant import device
from diffquant.encodings import ENCODINGS, Granularity, Recipe
from diffquant.kernels import KERNELS, choose, spec_of
from diffquant.kernels._operator import multiplier
from diffquant.linear import QuantLinear
from diffquant.plan import Activation, Encoding, LayerPlan, Part, Piece, Role, Span, TensorRef

#: The widest layer of FLUX.1: K inputs, N outputs; M are tokens.
K, N = 3072, 12288
TOKENS = (256, 1024, 4096)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """One way to store the layer. goals: the ratio to bf16 wanted at each of TOKENS."""

    encoding: Encoding
    granularity: Granularity
    goals: tuple[float, ...] = ()
    group: int | None = None
    rank: int = 0
    activation: Activation | None = None
    kernel: str | None = None

    def goal(self, tokens: int) -> Goal | None:
        return Goal(self.goals[TOKENS.index(tokens)]) if self.goals else None


KINDS = {
    "fp8, tensor scale": Kind(
        encoding=Encoding("fp8"), granularity="tensor", goals=(1.40, 1.20, 1.08)
    ),
    "fp8, channel scale": Kind(
        encoding=Encoding("fp8"), granularity="channel", goals=(1.60, 1.20, 1.08)
    ),
    "fp8, 128 x 128 blocks": Kind(encoding=Encoding("fp8"), granularity="block", group=128),
    "mxfp8": Kind(encoding=Encoding("mxfp8"), granularity="group", goals=(1.70, 1.25, 1.12)),
    "nvfp4": Kind(encoding=Encoding("nvfp4"), granularity="group", goals=(2.00, 1.30, 1.20)),
    "mxfp4": Kind(encoding=Encoding("mxfp4"), granularity="group", goals=(2.00, 1.30, 1.15)),
    "int4 + rank 32": Kind(
        encoding=Encoding("int4", (("group", "64"),)),
        granularity="group",
        group=64,
        rank=32,
        goals=(1.80, 1.30, 1.15),
    ),
    "ggml Q8_0": Kind(encoding=Encoding("ggml_q8_0"), granularity="group"),
    "ggml Q4_0": Kind(encoding=Encoding("ggml_q4_0"), granularity="group"),
    "int8": Kind(encoding=Encoding("int8"), granularity="channel", goals=(1.25, 1.15, 1.12)),
    "int8, int8 inputs (opt-in)": Kind(
        encoding=Encoding("int8"),
        granularity="channel",
        activation=Activation(number="int8", granularity="token", mode="dynamic"),
        kernel="cpu_int8_w8a8",
        goals=(0.65, 0.65, 0.75),
    ),
}


def dense() -> nn.Linear:
    """The bf16 layer that all others are compared with; every encoding is made from its weight."""
    torch.manual_seed(0)
    layer = nn.Linear(K, N, bias=False, dtype=torch.bfloat16)
    layer.weight.data = (torch.randn(N, K) * 0.02).bfloat16()
    return layer.requires_grad_(False)


def encoded(weight_NK: Tensor, kind: Kind) -> QuantLinear:
    """The layer stored as `kind`, through the kernel chosen for it here."""
    codec = ENCODINGS.load(kind.encoding.name)
    assert codec.encode is not None
    recipe = Recipe(granularity=kind.granularity, group=kind.group)
    parts = {**codec.encode(weight_NK.float(), kind.encoding, recipe), **_branch(kind.rank)}
    if kind.rank:  # as SVDQuant files store them
        parts[Role.BLOCK_SCALE] = parts[Role.BLOCK_SCALE].bfloat16()
    piece = Piece(
        encoding=kind.encoding,
        stored_NK=(N, K),
        parts=tuple(Part(role, TensorRef(0, role)) for role in parts),
        out=Span(0, N),
        cols=Span(0, K),
        activation=kind.activation,
        lowrank_input="raw" if kind.rank else None,
    )
    layer = LayerPlan(path="layer", shape_NK=(N, K), pieces=(piece,), dtype="bfloat16", why="")
    choice = choose(layer, device.parse("cpu"), kernel=kind.kernel)
    product = multiplier(choice.kernels[0], choice.specs[0])
    return QuantLinear(layer, [parts], [product], bias=None, dtype=torch.bfloat16)


def error(layer: QuantLinear, kind: Kind) -> float:
    """Relative distance from what `reference` computes in float32 from the same parts, inputs as they
    are: what quantizing them loses is in it too."""
    (term,) = layer.terms
    spec = spec_of(term.piece, None)
    x_MK = torch.randn(64, K).bfloat16()
    parts = layer.parts(0)
    wanted = KERNELS.load("reference").build(spec)(x_MK.float(), parts)
    if kind.rank:
        down, up = parts[Role.LOWRANK_DOWN].float(), parts[Role.LOWRANK_UP].float()
        wanted += x_MK.float() @ down.T @ up.T
    return float((layer(x_MK).float() - wanted).norm() / wanted.norm())


def _branch(rank: int) -> dict[Role, Tensor]:
    """A low-rank branch; its numbers do not matter to its time."""
    if not rank:
        return {}
    up, down = torch.randn(N, rank) * 0.02, torch.randn(rank, K) * 0.02
    return {Role.LOWRANK_UP: up.bfloat16(), Role.LOWRANK_DOWN: down.bfloat16()}
