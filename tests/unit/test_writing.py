"""What is written can be read back, is whole or absent, and survives being killed."""

import json
import os
import shutil
import signal
from collections import namedtuple
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from diffquant import writing
from diffquant.errors import ConvertError
from diffquant.writing import Declared, write, write_file

SHARD = 200  # bytes: two of the tensors below fit


def declare(name: str, tensor: Tensor, dtype: str) -> Declared:
    return Declared(name, dtype, tuple(tensor.shape), lambda: tensor)


def model(blocks: int = 4) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {f"blocks.{block}.weight": torch.randn(8, 3) for block in range(blocks)}


def declared(before: Callable[[int], None] = lambda number: None) -> list[Declared]:
    """The tensors of `model`; `before(number)` runs when one is about to be made."""

    def late(number: int, tensor: Tensor) -> Declared:
        return Declared(names[number], "F32", (8, 3), lambda: (before(number), tensor)[1])

    tensors = model()
    names = list(tensors)
    return [late(number, tensor) for number, tensor in enumerate(tensors.values())]


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


@pytest.fixture
def killed(tmp_path: Path) -> Callable[[int], Path]:
    """Write the model in a process that is killed with -9 when tensor `number` is made."""

    def run(number: int) -> Path:
        output = tmp_path / "out"
        child = os.fork()
        if not child:
            die = {number: signal.SIGKILL}
            write(
                output,
                declared(lambda at: os.kill(os.getpid(), die.get(at, 0))),
                max_shard_size=SHARD,
            )
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WTERMSIG(status) == signal.SIGKILL
        return output

    return run


def test_every_dtype_reads_back_as_it_was(tmp_path: Path) -> None:
    tensors = {
        "a.codes": (torch.randn(3, 5).to(torch.float8_e4m3fn), "F8_E4M3"),
        "a.scale": (torch.tensor(0.5), "F32"),
        "a.bias": (torch.randn(3, dtype=torch.bfloat16), "BF16"),
        "b.count": (torch.tensor([7]), "I64"),
        "b.half": (torch.randn(3, 3).half().T, "F16"),
        "c.empty": (torch.empty(0, 4), "F32"),
    }
    write(tmp_path / "out", [declare(name, *given) for name, given in tensors.items()])
    with safe_open(tmp_path / "out" / "diffusion_pytorch_model.safetensors", "pt") as stored:
        assert stored.metadata() == {"format": "pt"}
        read = {name: stored.get_tensor(name) for name in stored.keys()}
    assert read.keys() == tensors.keys()
    for name, (tensor, _) in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name].float(), tensor.float()), name


def test_shards_are_listed_in_an_index_and_hold_each_module_whole(tmp_path: Path) -> None:
    pairs = [
        declare(f"{module}.{leaf}", torch.ones(5), "F32")
        for module in "abc"
        for leaf in ("weight", "bias")
    ]
    written = write(tmp_path / "out", pairs, max_shard_size=60)
    index = json.loads(
        (tmp_path / "out/diffusion_pytorch_model.safetensors.index.json").read_text()
    )
    assert index["metadata"]["total_size"] == written.total_size == 120
    assert [index["weight_map"][f"{m}.weight"] for m in "abc"] == [p.name for p in written.shards]
    assert all(
        index["weight_map"][f"{m}.bias"] == index["weight_map"][f"{m}.weight"] for m in "abc"
    )


def test_every_tensor_starts_at_a_multiple_of_its_element(tmp_path: Path) -> None:
    odd = [
        declare("a", torch.ones(3, dtype=torch.uint8), "U8"),
        declare("b", torch.ones(3, dtype=torch.bfloat16), "BF16"),
        declare("c", torch.ones(3), "F32"),
        declare("d", torch.ones(3, dtype=torch.int64), "I64"),
    ]
    raw = write_file(tmp_path / "one.safetensors", odd).read_bytes()
    table = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    width = {"U8": 1, "BF16": 2, "F32": 4, "I64": 8}
    assert all(held["data_offsets"][0] % width[held["dtype"]] == 0 for held in table.values())


def test_config_is_merged_and_other_files_come_along_but_weights_do_not(tmp_path: Path) -> None:
    beside = tmp_path / "in"
    beside.mkdir()
    (beside / "config.json").write_text('{"_class_name": "X", "gone": 1, "kept": 2}')
    (beside / "note.txt").write_text("hello")
    (beside / "old.safetensors").write_bytes(b"weights")
    write(
        tmp_path / "out",
        declared(),
        beside=beside,
        config={"new": None},
        without=frozenset({"gone"}),
    )
    there = contents(tmp_path / "out")
    assert sorted(there) == ["config.json", "diffusion_pytorch_model.safetensors", "note.txt"]
    assert json.loads(there["config.json"]) == {"_class_name": "X", "kept": 2, "new": None}


def test_the_same_declaration_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write(tmp_path / name, declared(), metadata={"z": "1", "a": "2"}, max_shard_size=SHARD)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_only_one_tensor_is_alive_at_a_time(tmp_path: Path) -> None:
    made: list[str] = []
    seen: list[tuple[int, int, str]] = []

    def make(name: str) -> Tensor:
        assert [each[2] for each in seen] == made, "the one before is not on disk yet"
        made.append(name)
        return torch.ones(4)

    lazy = [Declared(name, "F32", (4,), lambda name=name: make(name)) for name in "abc"]
    write(tmp_path / "out", lazy, on_progress=lambda *args: seen.append(args))
    assert seen == [(16, 48, "a"), (32, 48, "b"), (48, 48, "c")]


@pytest.mark.parametrize(("number", "resumed"), [(0, 0), (1, 0), (2, 1), (3, 1)])
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_killed_run_is_resumed_and_ends_with_the_same_bytes(
    killed: Callable[[int], Path], number: int, resumed: int, tmp_path: Path
) -> None:
    output = killed(number)
    assert not output.exists(), "nothing half-written has the output's name"
    written = write(output, declared(), max_shard_size=SHARD)
    write(tmp_path / "straight", declared(), max_shard_size=SHARD)
    assert written.resumed == resumed
    assert contents(output) == contents(tmp_path / "straight")
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["out", "straight"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_killed_run_of_another_origin_or_a_damaged_shard_is_not_trusted(
    killed: Callable[[int], Path],
) -> None:
    output = killed(3)
    assert write(output, declared(), origin="other", max_shard_size=SHARD).resumed == 0
    shutil.rmtree(output)
    output = killed(3)
    shard = next(output.with_name("out.partial").glob("*00001*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    assert write(output, declared(), max_shard_size=SHARD).resumed == 0


def test_an_error_leaves_nothing_behind_and_the_former_output_as_it_was(tmp_path: Path) -> None:
    write(tmp_path / "out", declared())
    before = contents(tmp_path / "out")

    def fail(number: int) -> None:
        if number == 3:
            raise ConvertError("no")

    with pytest.raises(ConvertError, match="no"):
        write(tmp_path / "out", declared(fail), overwrite=True, max_shard_size=SHARD)
    assert contents(tmp_path / "out") == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_keeps_finished_shards_for_the_next_run(tmp_path: Path) -> None:
    def interrupt(number: int) -> None:
        if number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", declared(interrupt), max_shard_size=SHARD)
    assert len(list((tmp_path / "out.partial").glob("*.safetensors"))) == 1
    assert write(tmp_path / "out", declared(), max_shard_size=SHARD).resumed == 1


def test_an_existing_output_is_replaced_only_when_asked(tmp_path: Path) -> None:
    write(tmp_path / "out", declared(), max_shard_size=SHARD)
    with pytest.raises(ConvertError, match="exists") as refused:
        write(tmp_path / "out", declared())
    assert "--overwrite" in str(refused.value.hint)
    write(tmp_path / "out", declared(), overwrite=True)
    assert list(contents(tmp_path / "out")) == ["diffusion_pytorch_model.safetensors"]


def test_a_run_killed_between_its_renames_gives_the_former_output_back(tmp_path: Path) -> None:
    write(tmp_path / "out", declared())
    (tmp_path / "out").rename(tmp_path / "out.old")
    with pytest.raises(ConvertError, match="exists"):
        write(tmp_path / "out", declared())


@pytest.mark.parametrize(
    ("tensor", "shape", "dtype"),
    [
        (torch.ones(2, 3), (3, 2), "F32"),
        (torch.ones(2, 3), (2, 3), "F16"),
        (torch.ones(2, 3).half(), (2, 3), "BF16"),
    ],
)
def test_a_tensor_that_is_not_what_was_declared_stops_the_writing(
    tmp_path: Path, tensor: Tensor, shape: tuple[int, ...], dtype: str
) -> None:
    with pytest.raises(ConvertError, match="'x' was declared"):
        write_file(tmp_path / "x.safetensors", [Declared("x", dtype, shape, lambda: tensor)])
    assert list(tmp_path.iterdir()) == []


def test_two_tensors_of_one_name_and_none_at_all_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="'x' is declared twice"):
        write(tmp_path / "out", [declare("x", torch.ones(1), "F32")] * 2)
    with pytest.raises(ConvertError, match="nothing to write"):
        write(tmp_path / "out", [])


def test_a_disk_too_small_is_seen_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(free=10))
    never = [Declared("x", "F32", (4,), lambda: pytest.fail("was made"))]
    with pytest.raises(ConvertError, match="are free at"):
        write(tmp_path / "out", never)
    assert list(tmp_path.iterdir()) == []


def die_at(number: int) -> Callable[[int], None]:
    return lambda at: os.kill(os.getpid(), signal.SIGKILL if at == number else 0)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("kind", [write, write_file])
def test_a_killed_run_goes_on_inside_a_shard_where_it_was_surely_written(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "MARK", 90)  # bytes: every tensor is noted
    output, made = tmp_path / "out.safetensors", []
    child = os.fork()
    if not child:
        kind(output, declared(die_at(3)))
    os.waitpid(child, 0)
    assert not output.exists()
    kind(output, declared(made.append))
    kind(tmp_path / "straight.safetensors", declared())
    assert made == [3]
    files = [sorted(each.rglob("*")) if each.is_dir() else [each] for each in tmp_path.iterdir()]
    first, second = (b"".join(file.read_bytes() for file in found) for found in files)
    assert first == second


@pytest.mark.parametrize("kind", [write, write_file])
def test_a_check_sees_whole_files_and_what_it_refuses_does_not_stay(
    kind: Any, tmp_path: Path
) -> None:
    seen: list[list[str]] = []

    def check(files: Sequence[Path]) -> None:
        with safe_open(files[0], "pt") as opened:
            seen.append(list(opened.keys()))
        raise ConvertError("lost too much")

    with pytest.raises(ConvertError, match="lost too much"):
        kind(tmp_path / "out.safetensors", declared(), check=check)
    assert seen == [list(model())]
    assert not list(tmp_path.iterdir())
