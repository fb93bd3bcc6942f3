"""ggml's blocks on a CPU, inputs as they are: decoded exactly in float32, chunk by chunk.

Each is rounded once, to what the product is made in, on its way into the chunk that is multiplied.
A block's scales have eleven bits and more, so that no part of this could be left to bfloat16.
"""

from typing import TYPE_CHECKING

from diffquant.encodings import ENCODINGS
from diffquant.encodings._scales import row_spans
from diffquant.kernels import Kernel, Needs, Spec
from diffquant.kernels._cpu import buffer, by_rows
from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as Dtype

    from diffquant.kernels import Multiply, Parts


def _build(spec: Spec) -> "Multiply":
    k = spec.shape_NK[1]
    decoded = ENCODINGS.load(spec.encoding.name).decode

    def decode(parts: "Parts", rows: slice, dtype: "Dtype") -> "Tensor":
        codes = parts[Role.CODES][rows]
        chunk = buffer("blocks", len(codes) * k, dtype).view(len(codes), k)
        for span in row_spans((len(codes), k)):
            held = codes[span]
            chunk[span] = decoded({Role.CODES: held}, spec.encoding, (len(held), k))
        return chunk

    return by_rows(spec, decode, lambda parts, rows: None)


KERNEL = Kernel(
    rank=100,
    needs=Needs(
        encodings=frozenset(name for name in ENCODINGS.names() if name.startswith("ggml_")),
        devices=frozenset({"cpu"}),
    ),
    build=_build,
    keeps=True,
)
