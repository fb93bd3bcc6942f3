"""Rows: which of a stored weight a module takes, and in what order."""

from diffquant.families import Rule
from diffquant.formats import StoredLayer
from diffquant.plan import BiasOffset, Span

#: Multiples that writers pad N and K to: tensor cores' own, those of mxfp8, whole tiles.
PADDINGS = (16, 32, 128)


def fits(stored: int, wanted: int) -> bool:
    """Equal, or padded up to the next multiple that writers pad to."""
    return stored == wanted or any(stored == -(-wanted // pad) * pad for pad in PADDINGS)


def taken(
    layer: StoredLayer, rule: Rule, rows: Span, chunks: tuple[int, tuple[int, ...]] | None
) -> tuple[Span, ...]:
    """Stored rows that a module takes, in its own order; none for all of them as they lie."""
    if chunks is not None:
        count = chunks[0]
        return tuple(Span(chunk, len(rows), count) for chunk in range(count))
    if rule.chunks is not None:
        return permuted(len(rows), rule.chunks)
    whole = len(rule.rows) == 1 and len(rows) == layer.stored_NK[0]
    return () if whole else (rows,)


def permuted(count: int, chunks: tuple[int, ...]) -> tuple[Span, ...]:
    """Rows in module order, when stored chunk i is the module's chunk chunks[i]."""
    size = count // len(chunks)
    order = [chunks.index(wanted) for wanted in range(len(chunks))]
    return tuple(Span(index * size, (index + 1) * size) for index in order)


def offsets(count: int, chunks: tuple[int, tuple[int, ...]] | None) -> tuple[BiasOffset, ...]:
    """-1 on the scale chunks, whose bias was stored with 1 added."""
    if chunks is None:
        return ()
    size = count // chunks[0]
    return tuple(BiasOffset(Span(index * size, (index + 1) * size), -1.0) for index in chunks[1])
