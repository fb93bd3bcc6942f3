"""Each way a file or a command line can be wrong has an error of its own, seen as a person sees it.

Every case is a true ModelOpt export broken in one place, given to `diffquant plan` as the transformer
of a pipeline: exit code, what is wrong with the name of it, and a hint. Nothing is read as something
else, and nothing ends in a traceback.
"""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffquant.cli import run

DATA = Path(__file__).resolve().parents[1] / "data"
FP8 = DATA / "modelopt" / "flux" / "fp8"
SVDQ = DATA / "nunchaku" / "tiny_flux" / "svdq-int4_r32-tiny-flux.safetensors"
WEIGHTS = "diffusion_pytorch_model.safetensors"
TO_Q = "transformer_blocks.0.attn.to_q"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 23802932552\n"

Break = Callable[[Path], object]


def rewritten(folder: Path, tensors: dict[str, Tensor | None]) -> None:
    """The weights with tensors replaced; None leaves one out."""
    held = {**load_file(folder / WEIGHTS), **tensors}
    save_file(
        {name: tensor for name, tensor in held.items() if tensor is not None}, folder / WEIGHTS
    )


def missing_scale(folder: Path) -> None:
    rewritten(folder, {f"{TO_Q}.weight_scale": None})


def wrong_shape(folder: Path) -> None:
    rewritten(folder, {f"{TO_Q}.weight": torch.ones(96, 128).to(torch.float8_e4m3fn)})


def truncated(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def truncated_header(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:1000])


def pointer(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(POINTER)


def twice_in_a_header(folder: Path) -> None:
    entry = '"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}'
    header = f"{{{entry}, {entry}}}".encode()
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header + b"\0")


def twice_in_shards(folder: Path) -> None:
    names = ("diffusion_pytorch_model-00001-of-00002", "diffusion_pytorch_model-00002-of-00002")
    for name in names:
        shutil.copy(folder / WEIGHTS, folder / f"{name}.safetensors")
    (folder / WEIGHTS).unlink()
    table = {name: f"{names[0]}.safetensors" for name in load_file(FP8 / WEIGHTS)}
    table["proj_out.weight"] = f"{names[1]}.safetensors"
    index = json.dumps({"metadata": {}, "weight_map": table})
    (folder / f"{WEIGHTS}.index.json").write_text(index)


def broken_header(folder: Path) -> None:
    header = b'{"a": {"dtype": '
    (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)


def broken_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"_class_name": "FluxTransformer2DModel",')


def another_format(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    shutil.copy(SVDQ, folder / SVDQ.name)


def no_config(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))


CASES: dict[str, tuple[Break, str, str]] = {
    "missing weight scale": (missing_scale, f"'{TO_Q}.weight' is fp8 without its scale", "inspect"),
    "wrong shape": (wrong_shape, "stores N 96", "inspect"),
    "truncated data": (truncated, "is truncated", "download it again"),
    "truncated header": (truncated_header, "is truncated: its header alone needs", "again"),
    "git-lfs pointer": (pointer, "is a Git LFS pointer", "git lfs pull"),
    "duplicate tensor in a file": (twice_in_a_header, "has the key 'a' twice", ""),
    "duplicate tensor in shards": (twice_in_shards, "is stored twice, in", ""),
    "unreadable header": (broken_header, "is not valid JSON", "download it again"),
    "unreadable config": (broken_config, "config.json", ""),
    "contradicting formats": (another_format, "claims to be of 2 formats", ""),
    "fp8 without a declaration": (no_config, "nothing in it says how", "config.json"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pipeline of a transformer alone, ModelOpt's own export; its files may be changed."""
    target = tmp_path / "base" / "transformer"
    target.mkdir(parents=True)
    for path in FP8.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    index = {"transformer": ["diffusers", "FluxTransformer2DModel"]}
    (tmp_path / "base" / "model_index.json").write_text(json.dumps(index))
    return target


def told(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    code = run(["plan", "--model-path", str(folder.parent), "--device", "cpu"])
    return code, capsys.readouterr().err


def test_the_whole_file_is_planned(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert told(folder, capsys) == (0, "")


@pytest.mark.parametrize("case", CASES)
def test_every_broken_file_is_refused_in_words(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, what, hint = CASES[case]
    damage(folder)
    code, said = told(folder, capsys)
    assert code == 1
    assert said.startswith("error: ")
    assert what in said
    assert hint in said.partition("hint: ")[2]
    assert "Traceback" not in said


@pytest.mark.parametrize("case", CASES)
def test_inspecting_the_folder_alone_refuses_it_too(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    CASES[case][0](folder)
    assert run(["inspect", str(folder)]) == 1
    out, err = capsys.readouterr()
    assert CASES[case][1] in " ".join((out + err).split()) or "problem" in out + err


@pytest.mark.parametrize(
    ("words", "typed", "near"),
    [
        (["plan", "--trnsformer", "x"], "--trnsformer", "--transformer"),
        (["generate", "--prompt", "x", "--numeric", "faithful"], "--numeric", "--numerics"),
        (["inspect", "x", "--depe"], "--depe", "--deep"),
    ],
)
def test_an_unknown_option_is_answered_with_the_nearest(
    words: list[str], typed: str, near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(words) == 2
    said = capsys.readouterr().err
    assert f"there is no option {typed!r}" in said
    assert near in said.partition("hint: ")[2]
