"""Layers of GPTQ and of its relatives: codes and zero points in 32-bit words, scales [G, N]."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from typing import Any

from diffquant.errors import FormatError
from diffquant.formats import Reading, StoredLayer, StoredPart
from diffquant.headers import SMALL, Header, Tensor
from diffquant.plan import Encoding, Layout, Options, Role

ENCODINGS = {4: "int4", 8: "int8"}
ORDERED = "columns are in the order of their groups"


@dataclass(frozen=True, slots=True, kw_only=True)
class Packing:
    """How words are filled.

    layout     of codes, zero points and scales
    zeros      options of zero points' layout
    along_N    codes of one word are rows of the weight, as AWQ has them; else columns
    """

    layout: str
    zeros: Options = ()
    along_N: bool = False


GPTQ = Packing(layout="gptq", zeros=(("numbers", "less_one"),))
GPTQ_V2 = Packing(layout="gptq")
AWQ = Packing(layout="awq", along_N=True)


def read(header: Header, packing: Packing, where: str, block: Mapping[str, Any]) -> Reading:
    """Every layer that has words of codes. `where` says what `block` is called.

    Raises FormatError for what is not whole, and for bits that are not read.
    """
    names = [name for name in header.tensors if name.endswith(".qweight")]
    layers = tuple(_layer(header.tensors[name], header, packing, where, block) for name in names)
    used = {part.tensor for layer in layers for part in layer.parts}
    indices = (f"{layer.name}.g_idx" for layer in layers)
    unused = {name: ORDERED for name in indices if name in header.tensors and name not in used}
    return Reading(layers=layers, unused=unused)


def _layer(
    codes: Tensor, header: Header, packing: Packing, where: str, block: Mapping[str, Any]
) -> StoredLayer:
    name = codes.name.removesuffix(".qweight")
    zeros = header.tensors.get(f"{name}.qzeros")
    if zeros is None:
        raise FormatError(f"{codes.name!r} has no zero points '{name}.qzeros'")
    if not len(codes.shape) == len(zeros.shape) == 2 or codes.dtype != "I32":
        raise FormatError(
            f"{codes.name!r} is {codes.dtype} of {list(codes.shape)}, words were needed"
        )
    bits, n, k = _sizes(codes, zeros, packing)
    group = _group(block.get("group_size"), zeros, k, where)
    return StoredLayer(
        name=name,
        stored_NK=(n, k),
        encoding=_encoding(bits, group),
        parts=tuple(_parts(name, header, packing, bits, k, group, block)),
        why=f"{where}: {bits} bits in groups of {group}",
    )


def _sizes(codes: Tensor, zeros: Tensor, packing: Packing) -> tuple[int, int, int]:
    """Bits, N and K. Raises FormatError for bits that are not read."""
    if packing.along_N:
        if codes.shape[1] != zeros.shape[1]:
            raise FormatError(
                f"{zeros.name!r} has {list(zeros.shape)} words beside {codes.shape[1]}"
            )
        return 4, 8 * codes.shape[1], codes.shape[0]
    n = codes.shape[1]
    if not n:
        raise FormatError(f"{codes.name!r} has no rows")
    bits = 32 * zeros.shape[1] // n
    if bits not in ENCODINGS or bits * n != 32 * zeros.shape[1]:
        raise FormatError(
            f"{zeros.name!r} has {zeros.shape[1]} words for {n} rows, {32 * zeros.shape[1] / n:.3g} "
            "bits each; 4 and 8 are read"
        )
    return bits, n, codes.shape[0] * 32 // bits


def _group(told: Any, zeros: Tensor, k: int, where: str) -> int:
    """Columns of a group; -1 means all. Raises FormatError where there are not as many groups."""
    count = zeros.shape[0]
    group = told if type(told) is int and told > 0 else k
    if -(-k // group) != count:
        raise FormatError(
            f"{where} says group_size {told!r:.20}, and {zeros.name!r} has {count} groups of {k} columns"
        )
    return group


def _encoding(bits: int, group: int) -> Encoding:
    """Groups of 128 need no word."""
    told = {4: ("group", str(group)), 8: ("block", f"1x{group}")}[bits]
    return Encoding(ENCODINGS[bits], () if bits == 4 and group == 128 else (told,))


def _parts(
    name: str,
    header: Header,
    packing: Packing,
    bits: int,
    k: int,
    group: int,
    block: Mapping[str, Any],
) -> Iterator[StoredPart]:
    width: Options = () if bits == 4 else (("bits", str(bits)),)
    yield StoredPart(Role.CODES, f"{name}.qweight", Layout(packing.layout, width))
    zeros = Layout(packing.layout, (*width, *packing.zeros))
    yield StoredPart(Role.ZERO_POINT, f"{name}.qzeros", zeros)
    if f"{name}.scales" in header.tensors:
        yield StoredPart(Role.BLOCK_SCALE, f"{name}.scales", Layout(packing.layout))
    index = header.tensors.get(f"{name}.g_idx")
    if index is None and block.get("desc_act") and not block.get("static_groups"):
        raise FormatError(f"'{name}.qweight' has columns in another order (desc_act), and no g_idx")
    if index is None or _in_order(index, header, k, group):
        return
    if bits != 4:
        raise FormatError(f"{index.name!r} reorders columns, which is read for 4 bits only")
    yield StoredPart(Role.GROUP_INDEX, index.name)


def _in_order(index: Tensor, header: Header, k: int, group: int) -> bool:
    """Whether the file says that column k is of group k // group. Raises FormatError for no indices."""
    if index.dtype != "I32" or prod(index.shape) != k:
        raise FormatError(
            f"{index.name!r} is {index.dtype} of {list(index.shape)}, one I32 per column"
        )
    # Larger ones are taken at their word: decoding by them is the same where they are in order.
    return index.nbytes <= SMALL and header.read_small(index.name) == _ascending(k, group)


@cache
def _ascending(k: int, group: int) -> bytes:
    return b"".join((column // group).to_bytes(4, "little") for column in range(k))
