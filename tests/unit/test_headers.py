"""Headers: what is read from whole files, and how each kind of broken one is refused."""

import json
import struct
import time
from pathlib import Path
from typing import Any

import pytest

from diffquant.errors import HeaderError
from diffquant.headers import SMALL, read

F32 = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
NEXT = {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}


def safetensors(path: Path, header: Any, data: bytes = b"\0" * 4) -> Path:
    """A file with that header, which may be wrong on purpose."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(HeaderError) as caught:
        read([path])
    return str(caught.value)


def test_safetensors_values_are_where_the_header_says(data: Path) -> None:
    header = read([data / "headers" / "safetensors.safetensors"])
    bias = header.tensors["a.bias"]
    assert (bias.dtype, bias.shape, bias.nbytes) == ("BF16", (4,), 8)
    assert header.tensors["b.weight_scale"].dtype == "F8_E8M0"
    assert header.read_small("a.bias") == header.files[0].read_bytes()[bias.start : bias.stop]
    assert header.metadata["note"] == "a tiny true file"


def test_gguf_shapes_read_rows_first_and_blocks_lie_along_columns(data: Path) -> None:
    tensors = read([data / "headers" / "gguf.gguf"]).tensors
    assert (tensors["a.weight"].dtype, tensors["a.weight"].shape) == ("GGML_Q4_K", (3, 512))
    assert tensors["a.weight"].nbytes == 3 * 512 // 256 * 144
    assert tensors["d.weight"].nbytes == 2 * 128 // 64 * 36
    assert tensors["e.weight"].dtype == "BF16"


def test_gguf_tensors_stored_reshaped_get_their_shape_back(data: Path) -> None:
    header = read([data / "headers" / "gguf.gguf"])
    assert header.tensors["conv.weight"].shape == (2, 4, 2, 16)
    assert not any(key.startswith("comfy.gguf.orig_shape") for key in header.metadata)


def test_gguf_scalars_and_strings_are_metadata(data: Path) -> None:
    metadata = read([data / "headers" / "gguf.gguf"]).metadata
    assert metadata["general.architecture"] == "flux"
    assert (metadata["test.flag"], metadata["test.half"]) == ("true", "0.5")
    assert "test.words" not in metadata


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"\n<!DOCTYPE html><html></html>", "is a web page"),
        (b"<html><body>", "is a web page"),
        (b"PK\x03\x04" + b"\0" * 30, "save the weights again as safetensors"),
        (b"\x80\x02}q\0(X\x05\0\0\0a.b", "is a pickle"),
        (b'{"weight_map": {}}', "is JSON"),
        (b"what is this?", "is no weights file"),
    ],
)
def test_strangers_are_named(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    assert word in refusal(path)
    assert str(path) in refusal(path)


def test_a_missing_file_and_a_directory_are_named(tmp_path: Path) -> None:
    assert "no file" in refusal(tmp_path / "gone.safetensors")
    assert "directory" in refusal(tmp_path)


def test_a_header_of_640_bytes_is_no_pickle(tmp_path: Path) -> None:
    text = json.dumps({"a": F32}).encode().ljust(0x280)
    path = safetensors(tmp_path / "a.safetensors", text)
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert list(read([path]).tensors) == ["a"]


@pytest.mark.parametrize(
    ("header", "word"),
    [
        ({"a": F32, "b": NEXT}, "truncated: 'b' ends at byte"),
        ({"a": {**F32, "data_offsets": [0, 2], "dtype": "F16"}}, "2 bytes after 'a'"),
        ({"a": F32, "b": F32}, "'b' of"),
        ({"a": NEXT}, "leaves a gap after the header"),
        ({"a": {**F32, "shape": [2]}}, "spans 4 bytes, F32 [2] needs 8"),
        ({"a": {**F32, "shape": [-1]}}, "no list of sizes"),
        ({"a": {**F32, "shape": [True]}}, "no list of sizes"),
        ({"a": {**F32, "dtype": "F33"}}, "unknown dtype 'F33'"),
        ({"a": {**F32, "data_offsets": [4, 0]}}, "byte range"),
        ({"a": {**F32, "data_offsets": [0.0, 4]}}, "byte range"),
        ({"a": {"dtype": "F32"}}, "lacks one of"),
        ({"a": 3}, "lacks one of"),
        ({"__metadata__": {"n": 1}, "a": F32}, "metadata 'n'"),
        ({"__metadata__": "x", "a": F32}, "'__metadata__'"),
        (b'{"a": 1,}', "not valid JSON"),
        (b'{"a\xff": 1}', "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b'{"a": {}, "b": {}, "a": {}}', "the key 'a' twice"),
    ],
)
def test_each_fault_of_a_safetensors_header_is_told(tmp_path: Path, header: Any, word: str) -> None:
    assert word in refusal(safetensors(tmp_path / "a.safetensors", header))


def test_header_lengths_that_cannot_be_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(struct.pack("<Q", 1000) + b"{}")
    assert "its header alone needs 1008 bytes" in refusal(path)
    path.write_bytes(struct.pack("<Q", 100_000_001) + b"{}")
    assert "announces a header of 100000001 bytes" in refusal(path)


def test_four_bit_floats_count_as_elements(tmp_path: Path) -> None:
    entry = {"dtype": "F4", "shape": [2, 4], "data_offsets": [0, 4]}
    tensor = read([safetensors(tmp_path / "a.safetensors", {"a": entry})]).tensors["a"]
    assert (tensor.shape, tensor.nbytes) == ((2, 4), 4)


def gguf(
    path: Path, *, version: int = 3, infos: bytes = b"", tensors: int = 0, tail: int = 0
) -> Path:
    """A GGUF file without key-values."""
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, 0) + infos
    path.write_bytes(head.ljust(-(-len(head) // 32) * 32, b"\0") + b"\0" * tail)
    return path


def info(name: bytes, size: int, kind: int, offset: int) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, size, kind, offset)


@pytest.mark.parametrize(
    ("kinds", "word"),
    [
        ({"version": 1}, "GGUF version 1"),
        ({"version": 3 << 24}, "big-endian"),
        ({"tensors": 2**60}, "truncated"),
        ({"tensors": 1, "infos": info(b"a", 32, 5, 0)}, "unknown ggml type 5"),
        ({"tensors": 1, "infos": info(b"a", 31, 2, 0)}, "rows of 31 values"),
        ({"tensors": 1, "infos": info(b"a", 32, 2, 0)}, "'a' ends at byte"),
        ({"tensors": 1, "infos": info(b"a", 8, 0, 32), "tail": 64}, "leaves a gap"),
        ({"tensors": 2, "infos": 2 * info(b"a", 0, 0, 0)}, "the tensor 'a' twice"),
        (
            {"tensors": 2, "infos": info(b"a", 8, 0, 0) + info(b"b", 8, 0, 0), "tail": 64},
            "'b' of",
        ),
        ({"tensors": 1, "infos": info(b"\xff", 8, 0, 0), "tail": 32}, "no UTF-8"),
    ],
)
def test_each_fault_of_a_gguf_header_is_told(
    tmp_path: Path, kinds: dict[str, Any], word: str
) -> None:
    assert word in refusal(gguf(tmp_path / "a.gguf", **kinds))


def test_shards_become_one_table_that_knows_the_files(tmp_path: Path) -> None:
    first = safetensors(tmp_path / "1.safetensors", {"__metadata__": {"format": "pt"}, "a": F32})
    second = safetensors(tmp_path / "2.safetensors", {"__metadata__": {"format": "np"}, "b": F32})
    header = read([first, second])
    assert {name: tensor.file for name, tensor in header.tensors.items()} == {"a": 0, "b": 1}
    assert header.metadata == {"format": "pt"}


def test_shards_that_store_one_name_are_both_named(tmp_path: Path) -> None:
    paths = [safetensors(tmp_path / f"{n}.safetensors", {"a": F32}) for n in (1, 2)]
    with pytest.raises(HeaderError, match=r"'a' is stored twice.*1\.safetensors.*2\.safetensors"):
        read(paths)


def test_shards_whose_metadata_contradict_are_both_named(tmp_path: Path) -> None:
    paths = [
        safetensors(tmp_path / f"{n}.safetensors", {"__metadata__": {"algo": n}, n: F32})
        for n in ("fp8", "int8")
    ]
    with pytest.raises(HeaderError, match=r"'algo'.*int8\.safetensors.*fp8\.safetensors"):
        read(paths)


def test_a_marker_larger_than_64_kib_is_refused(tmp_path: Path) -> None:
    entry = {"dtype": "U8", "shape": [SMALL + 1], "data_offsets": [0, SMALL + 1]}
    path = safetensors(tmp_path / "a.safetensors", {"a": entry}, b"\0" * (SMALL + 1))
    with pytest.raises(HeaderError, match="a marker has at most 65536"):
        read([path]).read_small("a")


def test_reading_is_linear_in_the_number_of_tensors(tmp_path: Path) -> None:
    def seconds(count: int) -> float:
        entries = {
            f"blocks.{n}.weight": {**F32, "data_offsets": [4 * n, 4 * n + 4]} for n in range(count)
        }
        path = safetensors(tmp_path / f"{count}.safetensors", entries, b"\0" * 4 * count)
        times = []
        for _ in range(5):
            start = time.process_time()
            read([path])
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(8000) < 20 * seconds(1000)
