"""Checkpoints of published size without their weights: the header of a key table, then a hole.

Planning reads headers only, so a sparse file of twelve gigabytes costs a megabyte and milliseconds.
"""

import json
from collections.abc import Iterator
from pathlib import Path

TABLES = Path(__file__).parent / "data" / "keytables"
#: Tables show one block for each list of blocks, its number as `*`.
BLOCKS = {
    "qwenimage": {"transformer_blocks": 60},
    "zimage": {"noise_refiner": 2, "context_refiner": 2, "layers": 30},
    "flux1": {"transformer_blocks": 19, "single_transformer_blocks": 38},
}
DTYPES = {
    "bfloat16": ("BF16", 2),
    "int8": ("I8", 1),
    "int32": ("I32", 4),
    "float8_e4m3fn": ("F8_E4M3", 1),
}
FUSED = ("to_qkv", "add_qkv_proj")

Entry = tuple[str, str, list[int]]


def sparse_checkpoint(table: str, directory: Path, class_name: str) -> Path:
    """A Nunchaku file with the keys, dtypes and shapes of a table and no data.

    `zimage_nvfp4_r128` is made from the int4 table by the rule that its key counts confirm: scales of
    16, an outer scale per row on the fused layer and per tensor on the others.
    """
    header: dict[str, object] = {}
    offset = 0
    for name, dtype, shape in _entries(table):
        spelled, size = DTYPES[dtype]
        for length in shape:
            size *= length
        header[name] = {"dtype": spelled, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    config = {"_class_name": class_name, "guidance_embeds": table.startswith("flux1")}
    if class_name.startswith("ZImage"):
        del config["guidance_embeds"]
    header["__metadata__"] = {"model_class": f"Nunchaku{class_name}", "config": json.dumps(config)}
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    file = directory / f"{table}.safetensors"
    with file.open("wb") as stream:
        stream.write(len(raw).to_bytes(8, "little") + raw)
        stream.truncate(8 + len(raw) + offset)
    return file


def _entries(table: str) -> Iterator[Entry]:
    family = table.split("_")[0]
    made = table == "zimage_nvfp4_r128"
    source = "zimage_int4_r128" if made else table
    keys = json.loads((TABLES / f"{source}.json").read_text())["keys"]
    for key, (dtype, shape) in keys.items():
        count = BLOCKS[family][key.split(".")[0]] if "*" in key else 1
        for index in range(count):
            entry = (key.replace("*", str(index)), dtype, shape)
            yield from _as_nvfp4(entry) if made else (_as_published(entry),)


def _as_published(entry: Entry) -> Entry:
    """Published nvfp4 files have wtscale where the module has wcscales of its own."""
    name, dtype, shape = entry
    stem, _, leaf = name.rpartition(".")
    if leaf == "wcscales" and not stem.endswith(FUSED):
        return f"{stem}.wtscale", dtype, [1]
    return entry


def _as_nvfp4(entry: Entry) -> Iterator[Entry]:
    name, _, shape = entry
    stem, _, leaf = name.rpartition(".")
    if leaf != "wscales":
        yield entry
        return
    yield name, "float8_e4m3fn", [4 * shape[0], shape[1]]
    fused = stem.endswith(FUSED)
    yield f"{stem}.{'wcscales' if fused else 'wtscale'}", "bfloat16", [shape[1] if fused else 1]
