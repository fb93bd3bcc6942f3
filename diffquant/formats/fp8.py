"""Generic FP8, as vLLM and SGLang write it: `quant_method: fp8`, or an `activation_scheme`.

    X.weight        beside it                                          granularity    activation
    F8 [N, K]       weight_scale () or [1]                             tensor         token, dynamic
    F8 [N, K]       weight_scale [N] or [N, 1]                         row            token, dynamic
    F8 [N, K]       weight_scale_inv [ceil(N / bn), ceil(K / bk)]      block          groups of bk

All scales multiply; `_inv` in the third name is historic. Blocks are `weight_block_size` of the
configuration, 128 x 128 where it gives none. With `activation_scheme: static` inputs are quantized
per tensor by X.input_scale; a layer that lacks it quantizes per token like the others.

The declaration is `quantization_config` in config.json or in the header. Without one, F8 weights
with scales belong to no format: which activations they want would be a guess.
Source: SGLang's and vLLM's fp8 loaders as described in public.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from diffquant.errors import FormatError
from diffquant.formats import Export, Format, Hints, Outgoing, Reading, StoredLayer, StoredPart
from diffquant.formats._comfy_kinds import FP8_ENCODINGS
from diffquant.formats._json import blocks
from diffquant.formats._outgoing import (
    BIAS,
    DENSE_SPELLING,
    Joined,
    Spelling,
    exported,
    joined,
    naming_of,
    spelled_layer,
)
from diffquant.formats._scales import scale_role
from diffquant.headers import Header, Tensor
from diffquant.plan import DENSE, Activation, Encoding, Plan, Role
from diffquant.sources import Checkpoint

METHOD = "fp8"
KEY = "quantization_config"
SCHEMES = ("static", "dynamic")
SCALES = ("weight_scale", "weight_scale_inv")
BLOCK = (128, 128)


def _evidence(checkpoint: Checkpoint, header: Header) -> str | None:
    found = _declared(checkpoint, header)
    if found is None:
        return None
    where, block = found
    return f"{where} says quant_method {METHOD}, activation_scheme {block.get('activation_scheme')}"


def _read(checkpoint: Checkpoint, header: Header, hints: Hints) -> Reading:
    found = _declared(checkpoint, header)
    assert found is not None, "read is called only where evidence was found"
    where, block = found
    layers = tuple(_layer(weight, header, block, where) for weight in _weights(header))
    return Reading(layers=layers, notes=tuple(_notes(block, layers)))


def _declared(checkpoint: Checkpoint, header: Header) -> tuple[str, Mapping[str, Any]] | None:
    found = blocks(checkpoint, header, KEY)
    return next(((where, block) for where, block in found if _is_ours(block)), None)


def _is_ours(block: Mapping[str, Any]) -> bool:
    method = block.get("quant_method")
    return method == METHOD or (method is None and block.get("activation_scheme") in SCHEMES)


def _weights(header: Header) -> Iterator[Tensor]:
    for name, tensor in header.tensors.items():
        if name.endswith(".weight") and tensor.dtype in FP8_ENCODINGS and len(tensor.shape) == 2:
            yield tensor


def _layer(weight: Tensor, header: Header, block: Mapping[str, Any], where: str) -> StoredLayer:
    name = weight.name.removesuffix(".weight")
    rows, columns = weight.shape
    cell = _cell(block, where)
    parts = [StoredPart(Role.CODES, weight.name)]
    for ending in SCALES:
        scale = header.tensors.get(f"{name}.{ending}")
        if scale is not None:
            parts.append(StoredPart(_role(scale, rows, columns, cell), scale.name))
    static = block.get("activation_scheme") != "dynamic" and f"{name}.input_scale" in header.tensors
    if static:
        parts.append(StoredPart(Role.INPUT_SCALE, f"{name}.input_scale"))
    roles = {part.role for part in parts}
    return StoredLayer(
        name=name,
        stored_NK=(rows, columns),
        encoding=_encoding(weight, roles, cell),
        parts=tuple(parts),
        activation=_activation(roles, cell),
        why=f"{where} says quant_method {METHOD}",
    )


def _cell(block: Mapping[str, Any], where: str) -> tuple[int, int]:
    """Rows and columns per block scale."""
    found = block.get("weight_block_size") or BLOCK
    is_pair = isinstance(found, list | tuple) and len(found) == 2
    if not is_pair or not all(type(side) is int and side > 0 for side in found):
        raise FormatError(f"{where} has {found!r:.60} as weight_block_size, [N, K] was needed")
    return found[0], found[1]


def _role(scale: Tensor, rows: int, columns: int, cell: tuple[int, ...]) -> Role:
    """By shape; where one block is the whole weight, or a row, the name tells what inputs become."""
    blocks = (-(-rows // cell[0]), -(-columns // cell[1]))
    if scale.name.endswith("_inv") and scale.shape == blocks:
        return Role.BLOCK_SCALE
    role = scale_role(scale, rows)
    if role is Role.BLOCK_SCALE and scale.shape != blocks:
        raise FormatError(
            f"{scale.name!r} has shape {list(scale.shape)}, blocks of {cell[0]} x {cell[1]} "
            f"on {[rows, columns]} need {list(blocks)}",
            hint="the configuration's weight_block_size must be the one the file was written with",
        )
    return role


def _encoding(weight: Tensor, roles: set[Role], cell: tuple[int, ...]) -> Encoding:
    encoding = FP8_ENCODINGS[weight.dtype]
    if Role.BLOCK_SCALE not in roles or cell == BLOCK:
        return encoding
    return Encoding(encoding.name, (*encoding.options, ("block", f"{cell[0]}x{cell[1]}")))


def _activation(roles: set[Role], cell: tuple[int, ...]) -> Activation:
    if Role.BLOCK_SCALE in roles:
        return Activation(number="fp8", granularity="group", group=cell[1], mode="dynamic")
    if Role.INPUT_SCALE in roles:
        return Activation(number="fp8", granularity="tensor", mode="static")
    return Activation(number="fp8", granularity="token", mode="dynamic")


def _notes(block: Mapping[str, Any], layers: tuple[StoredLayer, ...]) -> Iterator[str]:
    if block.get("activation_scheme") != "static":
        return
    lacking = [
        layer.name
        for layer in layers
        if layer.activation is not None and layer.activation.mode == "dynamic"
    ]
    if lacking:
        yield (
            f"{len(lacking)} layers lack input_scale though activation_scheme is static and "
            f"quantize dynamically, first {lacking[0]!r}"
        )


# the way out -------------------------------------------------------------------------------------

SPELLINGS = {
    dtype: Spelling(
        parts=(
            Outgoing(role=Role.CODES, tensor="weight", dtype=dtype),
            Outgoing(role=Role.TENSOR_SCALE, tensor="weight_scale", dtype="F32"),
            Outgoing(role=Role.CHANNEL_SCALE, tensor="weight_scale", dtype="F32", axes="column"),
            Outgoing(role=Role.BLOCK_SCALE, tensor="weight_scale_inv", dtype="F32"),
            Outgoing(role=Role.INPUT_SCALE, tensor="input_scale", dtype="F32"),
            BIAS,
        )
    )
    for dtype in FP8_ENCODINGS
}


def _write(plan: Plan) -> Export:
    naming = naming_of(plan, ("diffusers",), METHOD)
    weights = joined(plan, naming, METHOD)
    return exported(
        plan,
        tuple(spelled_layer(each, _spelling(each), METHOD) for each in weights),
        naming,
        config={KEY: _block(weights)},
    )


def _spelling(weight: Joined) -> Spelling | None:
    """By number; which blocks there are is said once, in the configuration."""
    encoding = weight.piece.encoding
    if encoding == DENSE:
        return DENSE_SPELLING
    bare = Encoding(encoding.name, tuple(item for item in encoding.options if item[0] != "block"))
    dtypes = (dtype for dtype, known in FP8_ENCODINGS.items() if known == bare)
    return SPELLINGS.get(next(dtypes, ""))


def _block(weights: tuple[Joined, ...]) -> dict[str, object]:
    """Raises FormatError for blocks of two sizes: the configuration has room for one."""
    quantized = [each.piece for each in weights if each.piece.encoding != DENSE]
    cells = {
        piece.encoding.option("block", f"{BLOCK[0]}x{BLOCK[1]}")
        for piece in quantized
        if Role.BLOCK_SCALE in piece.roles
    }
    if len(cells) > 1:
        raise FormatError(f"{METHOD} has one size of blocks, the layers have {sorted(cells)}")
    static = any(Role.INPUT_SCALE in piece.roles for piece in quantized)
    block: dict[str, object] = {
        "quant_method": METHOD,
        "activation_scheme": "static" if static else "dynamic",
        "modules_to_not_convert": [each.name for each in weights if each.piece.encoding == DENSE],
    }
    if cells:
        block["weight_block_size"] = [int(side) for side in cells.pop().split("x")]
    return block


FORMAT = Format(
    evidence=_evidence,
    read=_read,
    explains=frozenset({"diffusers"}),
    encodings=("fp8",),
    proof="from description",
    write=_write,
)
