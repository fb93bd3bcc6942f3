"""Damaged headers and configs of every dialect: refused by name or planned, never anything else.

True headers are mutated: bytes flipped and cut, tensors renamed, dropped, doubled, of other dtypes and
shapes, metadata and JSON values exchanged for junk. Files are sparse, so sizes cost nothing. Whatever
is then asked of them may raise a DiffquantError and nothing else, in bounded time and memory.
"""

import copy
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from diffquant import audit, headers, planner, sources
from diffquant.errors import DiffquantError, PlanError
from diffquant.families import FAMILIES, spelled
from diffquant.formats import Hints
from diffquant.headers.safetensors import BITS
from diffquant.plan import to_json
from tests.published import fused

DATA = Path(__file__).resolve().parents[1] / "data"
WEIGHTS = "model.safetensors"
#: Bytes of small tensors are kept, because formats read markers and scalars.
SMALL = 4096
#: What one example may add to the process's address space, and how long it may take.
MEMORY, SECONDS = 3 << 30, 20
DESCRIPTION = "quant_model_description_w8a8.json"

Table = dict[str, tuple[str, list[int]]]


@dataclass(slots=True)
class Specimen:
    """A checkpoint without its large tensors: names, dtypes and shapes, metadata, JSON beside them."""

    tensors: Table
    metadata: dict[str, str] = field(default_factory=dict)
    beside: dict[str, Any] = field(default_factory=dict)
    small: dict[str, bytes] = field(default_factory=dict)

    def header(self) -> bytes:
        table: dict[str, Any] = {"__metadata__": self.metadata} if self.metadata else {}
        start = 0
        for name, (dtype, shape) in self.tensors.items():
            stop = start + prod(shape) * BITS[dtype] // 8
            table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
            start = stop
        text = json.dumps(table).encode()
        return len(text).to_bytes(8, "little") + text

    def save(self, folder: Path, damage: Callable[[bytes], bytes] = bytes) -> None:
        """`damage` is done to the header's bytes, length included."""
        for name, value in self.beside.items():
            (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
        raw = self.header()
        with (folder / WEIGHTS).open("wb") as stream:
            stream.write(damage(raw))
            offset = len(raw)
            for name, (dtype, shape) in self.tensors.items():
                stream.seek(offset)
                stream.write(self.small.get(name, b""))
                offset += prod(shape) * BITS[dtype] // 8
            stream.truncate(min(offset, 1 << 40))


# specimens ---------------------------------------------------------------------------------------


def specimen(path: Path) -> Specimen:
    """What lies in a true file, or a folder with one."""
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    header = headers.read(files)
    beside = {} if path.is_file() else json.loads((path / "config.json").read_text())
    return Specimen(
        tensors={
            name: (tensor.dtype, list(tensor.shape)) for name, tensor in header.tensors.items()
        },
        metadata=dict(header.metadata),
        beside={"config.json": beside} if beside else {},
        small={
            name: header.read_small(name)
            for name, tensor in header.tensors.items()
            if tensor.nbytes <= SMALL
        },
    )


def generic_fp8() -> Specimen:
    made = specimen(DATA / "modelopt" / "wan" / "fp8")
    block = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": [128, 128]}
    made.beside["config.json"]["quantization_config"] = block
    return made


def modelslim() -> Specimen:
    """Wan in the names of its authors, described as msModelSlim does."""
    made = specimen(DATA / "modelopt" / "wan" / "fp8")
    original = FAMILIES.load("wan").namings["original"]
    renamed: Table = {}
    for name, (dtype, shape) in made.tensors.items():
        stem, _, ending = name.rpartition(".")
        if ending == "input_scale":
            continue
        names = spelled(original, stem if ending == "weight_scale" else name)
        stored = f"{names[0]}.weight_scale" if ending == "weight_scale" else names[0]
        narrow = dtype == "F8_E4M3"
        rows = made.tensors[f"{stem}.weight"][1][:1] if ending == "weight_scale" else shape
        renamed[stored] = ("I8" if narrow else dtype, [*rows, 1] if rows is not shape else shape)
    types = {
        name: "W8A8_DYNAMIC" if dtype == "I8" else "FLOAT"
        for name, (dtype, _) in renamed.items()
        if name.endswith(".weight")
    }
    config = {k: v for k, v in made.beside["config.json"].items() if k != "quantization_config"}
    return Specimen(renamed, beside={"config.json": config, DESCRIPTION: types})


def bfl() -> Specimen:
    """A small FLUX.2 as its authors store it in NVFP4."""
    family = FAMILIES.load("flux2")
    config = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}
    tensors: Table = {}
    layers = {}
    for name, shape in fused(family, "bfl", family.inventory(config)).items():
        stem, _, ending = name.rpartition(".")
        if ending != "weight" or "blocks" not in name or len(shape) != 2:
            tensors[name] = ("BF16", list(shape))
            continue
        n, k = shape
        tensors[name] = ("U8", [n, k // 2])
        tensors[f"{stem}.weight_scale"] = ("F8_E4M3", [n, k // 16])
        tensors[f"{stem}.weight_scale_2"] = ("F32", [])
        tensors[f"{stem}.input_scale"] = ("F32", [])
        layers[stem] = {"format": "nvfp4"}
    block = {"format_version": "1.0", "layers": layers}
    return Specimen(tensors, {"_quantization_metadata": json.dumps(block)})


@cache
def specimens() -> dict[str, Specimen]:
    folders = ("flux/fp8", "wan/fp8", "wan/ex_int8_cut", "z_image/nvfp4_swizzle")
    comfy = sorted(
        path for path in (DATA / "comfy").glob("*.safetensors") if ".owner" not in path.name
    )
    return {
        **{folder: specimen(DATA / "modelopt" / folder) for folder in folders},
        **{path.stem: specimen(path) for path in comfy},
        "nunchaku": specimen(next((DATA / "nunchaku" / "tiny_flux").glob("svdq-*.safetensors"))),
        "fp8": generic_fp8(),
        "modelslim": modelslim(),
        "bfl": bfl(),
    }


# mutations ---------------------------------------------------------------------------------------

JUNK: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 3, 2.5, 10**9, 2**70, float("nan"), "", "x", "1e9", "nvfp4"),
    *([], [1], [1, 2, 3], [[]], [None], {}, {"a": 1}, {"format": 3}, {"": {}}),
)
TEXTS = ("", "{", "[]", "null", "3", '{"layers": 3}', '{"layers": {"a": 1}}', "[" * 5000, "\u0000")
LENGTHS = st.sampled_from((0, 1, 2, 3, 16, 127, 128, 1 << 20))

Mutation = Callable[[Specimen, st.DataObject], None]


def _name(made: Specimen, data: st.DataObject) -> str:
    return data.draw(st.sampled_from(sorted(made.tensors) or [""]))


def drop(made: Specimen, data: st.DataObject) -> None:
    made.tensors.pop(_name(made, data), None)


def rename(made: Specimen, data: st.DataObject) -> None:
    """To the ending or the stem of another tensor, or to anything."""
    old, other = _name(made, data), _name(made, data)
    stem, _, ending = old.rpartition(".")
    named = (f"{stem}.{other.rpartition('.')[2]}", f"{other.rpartition('.')[0]}.{ending}")
    new = data.draw(st.sampled_from(named) | st.text(max_size=12))
    if old in made.tensors and new != "__metadata__":
        made.tensors[new] = made.tensors.pop(old)


def double(made: Specimen, data: st.DataObject) -> None:
    old = _name(made, data)
    if old in made.tensors:
        made.tensors[data.draw(st.sampled_from(("model.", "x.", "a"))) + old] = made.tensors[old]


def retype(made: Specimen, data: st.DataObject) -> None:
    name = _name(made, data)
    if name in made.tensors:
        shape = made.tensors[name][1]
        dtype = data.draw(
            st.sampled_from([each for each in BITS if prod(shape) * BITS[each] % 8 == 0])
        )
        made.tensors[name] = (dtype, shape)


def reshape(made: Specimen, data: st.DataObject) -> None:
    name = _name(made, data)
    if name in made.tensors:
        dtype, shape = made.tensors[name]
        edits = (shape[::-1], shape[1:], [*shape, 1], [1, *shape], [prod(shape)], [])
        one = data.draw(st.lists(LENGTHS, max_size=4))
        new = data.draw(st.sampled_from((*edits, one)))
        if prod(new) * BITS[dtype] % 8 == 0 and prod(new) < 1 << 34:
            made.tensors[name] = (dtype, list(new))


def remark(made: Specimen, data: st.DataObject) -> None:
    keys = ("quantization_config", "_quantization_metadata", "config", "model_class", "format")
    key = data.draw(st.sampled_from((*keys, *made.metadata)))
    value = data.draw(st.sampled_from(TEXTS) | st.sampled_from(JUNK).map(json.dumps))
    found = made.metadata.get(key)
    if found is not None and found not in TEXTS and data.draw(st.booleans()):
        value = json.dumps(_spoiled(_parsed(found), data))
    made.metadata[key] = value


def _parsed(text: str) -> Any:
    return json.loads(text) if text[:1] == "{" else text


def spoil(made: Specimen, data: st.DataObject) -> None:
    """One value of a JSON file beside the weights."""
    names = (*made.beside, "config.json", "hf_quant_config.json", DESCRIPTION)
    name = data.draw(st.sampled_from(names))
    found = made.beside.get(name)
    if isinstance(found, dict):
        made.beside[name] = _spoiled(found, data)
    else:
        made.beside[name] = data.draw(st.sampled_from(TEXTS) | st.sampled_from(JUNK))


def _spoiled(value: Any, data: st.DataObject) -> Any:
    """The value with junk somewhere inside."""
    if not isinstance(value, dict) or not value or data.draw(st.integers(0, 5)) == 0:
        return data.draw(st.sampled_from(JUNK))
    key = data.draw(st.sampled_from(sorted(value)))
    if data.draw(st.integers(0, 7)) == 0:
        return {name: inner for name, inner in value.items() if name != key}
    return {**value, key: _spoiled(value[key], data)}


def mark(made: Specimen, data: st.DataObject) -> None:
    """The bytes of a small tensor."""
    if made.small:
        name = data.draw(st.sampled_from(sorted(made.small)))
        made.small[name] = data.draw(st.binary(max_size=64))


MUTATIONS: tuple[Mutation, ...] = (
    *(drop, rename, double, retype, reshape, remark, spoil, spoil, mark),
)


def damaged(data: st.DataObject) -> Callable[[bytes], bytes]:
    """Nothing, most of the time; else some bytes flipped, or the header cut or grown."""
    if data.draw(st.integers(0, 3)):
        return bytes
    places = data.draw(st.lists(st.integers(0, 1 << 14), min_size=1, max_size=3))
    byte = data.draw(st.integers(0, 255))

    def damage(raw: bytes) -> bytes:
        flipped = bytearray(raw)
        for place in places:
            flipped[place % len(flipped)] = byte
        return bytes(flipped)

    return damage


# what is asked -----------------------------------------------------------------------------------


def read_whole(folder: Path) -> None:
    """Everything the light zone does with a folder, told as JSON in the end."""
    for hints in (Hints(), Hints(raw_fp8=True, nibbles="high")):
        try:
            checkpoint = sources.checkpoint(str(folder))
            header = headers.read(checkpoint.files)
            drawn = planner.draft(checkpoint, header, config=checkpoint.config, hints=hints)
            problems = drawn.problems + audit.audit(drawn.plan, header)
            json.dumps(to_json(drawn.plan))
            assert all(problem.what for problem in problems)
        except DiffquantError as error:
            assert error.what


def fuzzed(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(specimens())))
    made = copy.deepcopy(specimens()[name])
    for mutation in data.draw(st.lists(st.sampled_from(MUTATIONS), max_size=3)):
        mutation(made, data)
    with tempfile.TemporaryDirectory() as folder:
        made.save(Path(folder), damaged(data))
        read_whole(Path(folder))


@pytest.fixture(autouse=True)
def bounded_memory() -> Iterator[None]:
    """A MemoryError instead of a machine that swaps."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


PATIENT = settings(
    deadline=timedelta(seconds=SECONDS),
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
)


@pytest.mark.parametrize("name", sorted(specimens()))
def test_an_undamaged_specimen_is_understood(name: str, tmp_path: Path) -> None:
    """So that mutations start from something that is read to the end."""
    specimens()[name].save(tmp_path)
    checkpoint = sources.checkpoint(str(tmp_path))
    drawn = planner.draft(checkpoint, headers.read(checkpoint.files), config=checkpoint.config)
    assert drawn.plan.quantized or drawn.problems


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_layers", 10**9),
        ("num_layers", None),
        ("num_attention_heads", {}),
        ("attention_head_dim", 0),
        ("patch_size", 2.5),
        ("ffn_dim", float("nan")),
        ("cross_attn_norm", "x"),
    ],
)
def test_a_config_value_that_cannot_be_meant_is_named(key: str, value: Any, tmp_path: Path) -> None:
    made = copy.deepcopy(specimens()["wan/fp8"])
    made.beside["config.json"][key] = value
    made.save(tmp_path)
    checkpoint = sources.checkpoint(str(tmp_path))
    with pytest.raises(PlanError, match=f"the config says '{key}' is"):
        planner.draft(checkpoint, headers.read(checkpoint.files), config=checkpoint.config)


def test_a_file_of_another_model_is_refused_in_time(tmp_path: Path) -> None:
    """A nearest name for each of hundreds of strangers took minutes."""
    made = copy.deepcopy(specimens()["wan/fp8"])
    made.beside["config.json"]["num_layers"] = 40
    made.tensors = {
        f"other.{i}.{name}": made.tensors[name] for i in range(20) for name in made.tensors
    }
    made.save(tmp_path)
    started = time.process_time()
    read_whole(tmp_path)
    assert time.process_time() - started < 10


@settings(PATIENT, max_examples=500)
@given(data=st.data())
def test_damaged_checkpoints_are_refused_or_planned(data: st.DataObject) -> None:
    fuzzed(data)


@pytest.mark.long
@settings(PATIENT, max_examples=20_000, derandomize=False)
@given(data=st.data())
def test_many_damaged_checkpoints_are_refused_or_planned(data: st.DataObject) -> None:
    fuzzed(data)


@settings(PATIENT, max_examples=100)
@given(st.lists(st.integers(0, 1 << 12), min_size=1, max_size=4), st.binary(min_size=1, max_size=4))
def test_damaged_gguf_files_are_refused_or_read(places: list[int], junk: bytes) -> None:
    raw = bytearray((DATA / "headers" / "gguf.gguf").read_bytes())
    for place in places:
        start = place % len(raw)
        raw[start : start + len(junk)] = junk
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model.gguf").write_bytes(raw)
        read_whole(Path(folder))
