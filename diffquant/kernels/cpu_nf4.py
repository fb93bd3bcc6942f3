"""NF4 and FP4 on a CPU, inputs as they are: a byte is looked up as two levels, times its block's scale.

Levels and scales are float32, and neither would survive in bfloat16: a chunk is made in float32 and
rounded once. Coded block scales are decoded with their rows: one for 64 weights costs little.
"""

from typing import TYPE_CHECKING

from diffquant.encodings import nf4
from diffquant.encodings._nibbles import pair_table
from diffquant.encodings._scales import row_spans
from diffquant.kernels import Kernel, Needs, Spec
from diffquant.kernels._cpu import buffer, by_rows, grouped
from diffquant.plan import Role

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as Dtype

    from diffquant.kernels import Multiply, Parts


def _build(spec: Spec) -> "Multiply":
    import torch

    k, group = spec.shape_NK[1], int(spec.encoding.option("block", str(nf4.GROUP)))

    def decode(parts: "Parts", rows: slice, dtype: "Dtype") -> "Tensor":
        codes, scale = parts[Role.CODES][rows], nf4.magnitudes(parts, rows)
        # Both numbers of a byte as one integer: half as many to look up.
        pairs = pair_table(nf4.levels(parts, spec.encoding), codes).view(torch.int64).reshape(256)
        chunk = buffer("levels", len(codes) * k, dtype).view(len(codes), k)
        for span in row_spans((len(codes), k)):
            chunk[span] = grouped(_looked_up(codes[span], pairs, k), scale[span], group)
        return chunk

    return by_rows(spec, decode, lambda parts, rows: None)


def _looked_up(codes: "Tensor", pairs: "Tensor", columns: int) -> "Tensor":
    """Float32 levels [n, K] of packed codes [n, ceil(K / 2)]; valid until this thread's next call."""
    import torch

    count = codes.numel()
    index = buffer("index", count, torch.int32).copy_(codes.reshape(-1).view(torch.uint8))
    found = buffer("level pairs", count, torch.int64)
    torch.index_select(pairs, 0, index, out=found)
    return found.view(torch.float32).view(len(codes), -1)[:, :columns]


KERNEL = Kernel(
    rank=100,
    needs=Needs(encodings=frozenset({"nf4"}), devices=frozenset({"cpu"})),
    build=_build,
    keeps=True,
)
