"""A FLUX.1-shaped transformer in plain torch, for machines without diffusers: random weights, true widths.

Double and single blocks with the modulation, attention, rotary positions and MLPs of FLUX.1. What it
computes is no picture; what it costs is.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention, silu

HEAD = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Widths, numbers of blocks, and tokens of a step."""

    width: int
    mlp: int
    double: int
    single: int
    image: int
    text: int

    @property
    def tokens(self) -> int:
        return self.image + self.text


#: 12 billion parameters; 1024 x 1024 pixels and 512 words.
FLUX = Shape(width=3072, mlp=12288, double=19, single=38, image=4096, text=512)
#: To rehearse with.
SMALL = Shape(width=256, mlp=512, double=1, single=1, image=64, text=16)

#: path, N, K -> the linear there
Make = Callable[[str, int, int], nn.Module]


class Stream(nn.Module):
    """One of the two streams of a double block: what of it is the stream's own."""

    def __init__(self, path: str, make: Make, shape: Shape) -> None:
        super().__init__()
        width, mlp = shape.width, shape.mlp
        self.modulation = make(f"{path}.modulation", 6 * width, width)
        self.q, self.k, self.v, self.out = (
            make(f"{path}.{name}", width, width) for name in ("q", "k", "v", "out")
        )
        self.up = make(f"{path}.up", mlp, width)
        self.down = make(f"{path}.down", width, mlp)

    def heads(self, x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        h = modulated(x, shift, scale)
        return split(self.q(h)), split(self.k(h)), split(self.v(h))

    def after(self, x: Tensor, attended: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        gate, shift, scale, gate_mlp = parts
        x = x + gate * self.out(attended)
        hidden = gelu(self.up(modulated(x, shift, scale)), approximate="tanh")
        total: Tensor = x + gate_mlp * self.down(hidden)
        return total


class Double(nn.Module):
    """Two streams that attend to each other."""

    def __init__(self, path: str, make: Make, shape: Shape) -> None:
        super().__init__()
        self.image, self.text = (
            Stream(f"{path}.{name}", make, shape) for name in ("image", "text")
        )

    def forward(
        self, image: Tensor, text: Tensor, vector: Tensor, turns: Tensor
    ) -> tuple[Tensor, Tensor]:
        of_image = self.image.modulation(silu(vector))[:, None].chunk(6, -1)
        of_text = self.text.modulation(silu(vector))[:, None].chunk(6, -1)
        both = zip(
            self.text.heads(text, *of_text[:2]), self.image.heads(image, *of_image[:2]), strict=True
        )
        q, k, v = (torch.cat(pair, 2) for pair in both)
        attended = attention(q, k, v, turns)
        words = text.shape[1]
        return (
            self.image.after(image, attended[:, words:], of_image[2:]),
            self.text.after(text, attended[:, :words], of_text[2:]),
        )


class Single(nn.Module):
    """One stream; attention and MLP beside each other."""

    def __init__(self, path: str, make: Make, shape: Shape) -> None:
        super().__init__()
        width, mlp = shape.width, shape.mlp
        self.modulation = make(f"{path}.modulation", 3 * width, width)
        self.q, self.k, self.v = (make(f"{path}.{name}", width, width) for name in "qkv")
        self.up = make(f"{path}.up", mlp, width)
        self.out = make(f"{path}.out", width, width + mlp)

    def forward(self, x: Tensor, vector: Tensor, turns: Tensor) -> Tensor:
        shift, scale, gate = self.modulation(silu(vector))[:, None].chunk(3, -1)
        h = modulated(x, shift, scale)
        attended = attention(split(self.q(h)), split(self.k(h)), split(self.v(h)), turns)
        hidden = gelu(self.up(h), approximate="tanh")
        total: Tensor = x + gate * self.out(torch.cat((attended, hidden), -1))
        return total


class Flux(nn.Module):
    """The blocks; image, text [1, tokens, width] and vector [1, width] -> image."""

    def __init__(self, make: Make, shape: Shape) -> None:
        super().__init__()
        self.doubles = nn.ModuleList(
            Double(f"double.{at}", make, shape) for at in range(shape.double)
        )
        self.singles = nn.ModuleList(
            Single(f"single.{at}", make, shape) for at in range(shape.single)
        )

    def forward(self, image: Tensor, text: Tensor, vector: Tensor, turns: Tensor) -> Tensor:
        for block in self.doubles:
            image, text = block(image, text, vector, turns)
        x = torch.cat((text, image), 1)
        for block in self.singles:
            x = block(x, vector, turns)
        image = x[:, text.shape[1] :]
        return image


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:]) * (1 + scale) + shift


def split(x: Tensor) -> Tensor:
    """[1, tokens, width] -> [1, heads, tokens, 128]."""
    heads: Tensor = x.unflatten(-1, (-1, HEAD))
    return heads.transpose(1, 2)


def attention(q: Tensor, k: Tensor, v: Tensor, turns: Tensor) -> Tensor:
    out = scaled_dot_product_attention(turned(q, turns), turned(k, turns), v)
    return out.transpose(1, 2).flatten(2)


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """Rotary positions; turns [2, tokens, 64] are cosine and sine."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cosine, sine = turns
    return torch.stack((even * cosine - odd * sine, even * sine + odd * cosine), -1).flatten(-2)


def inputs(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What one step is given, in bfloat16."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device).bfloat16()

    angles = torch.arange(shape.tokens, device=device)[:, None] / 10000 ** (
        torch.arange(64, device=device) / 64
    )
    turns = torch.stack((angles.cos(), angles.sin())).bfloat16()
    image, text = (normal(1, count, shape.width) for count in (shape.image, shape.text))
    return image, text, normal(1, shape.width), turns
