"""Several processes draw the picture that one draws, and say who they are."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffquant import loading, ulysses
from diffquant.cli import run
from diffquant.errors import UsageError
from diffquant.run import read_metadata
from tests import pipelines, tiny, together
from tests.pipelines import PIPELINES

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves

#: Float32 pictures by two processes and by one are this close, in decibels; bfloat16 ones less so.
SAME, ROUNDED = 110.0, 45.0
#: Without the exchange of tokens they are not.
OTHER = 100.0
SPLITTABLE = [
    name
    for name, kind in PIPELINES.items()
    if kind.family in ("flux1", "flux2", "qwen_image", "wan")
]
IN_CI = ("flux-dev", "qwen-image-edit", "wan-t2v-experts")
ODD = {"flux-dev": {"width": 36, "height": 36}}
ROOT = Path(__file__).parents[2]
#: The checkout comes last: the diffquant that is tested may be an installed one.
JOBS = f"import sys; sys.path.append({str(ROOT)!r}); from tests import together; together.main()"


def psnr(ours: "np.ndarray[Any, Any]", theirs: "np.ndarray[Any, Any]") -> float:
    return float(-10 * np.log10(np.mean((ours - theirs) ** 2) + 1e-20))


def torchrun(folder: Path, count: int, *program: str) -> "subprocess.CompletedProcess[str]":
    """As a person types it in `folder`, with a port of its own."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*start, "--nproc-per-node", str(count), *program],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Any]]:
    """A job: the kind of pipeline on disk, and what to ask of it."""
    folder = tmp_path_factory.mktemp("asked")
    Image.new("RGB", (32, 32), "red").save(folder / "red.png")
    Image.new("RGB", (32, 32), "white").save(folder / "white.png")

    def asked(name: str) -> dict[str, Any]:
        kind = PIPELINES[name]
        saved, handed = pipelines.saved(kind, folder / name)
        request = {
            "prompt": "red apple on a car",
            "width": 32,
            "height": 32,
            "num_inference_steps": 2,
            **({"num_frames": 5} if kind.video else {}),
            **({"image": (str(folder / "red.png"),) * kind.pictures} if kind.pictures else {}),
            **({"mask_image": str(folder / "white.png")} if kind.masked else {}),
            **kind.request,
            **ODD.get(name, {}),
        }
        return {"name": name, "folder": str(saved), "handed": list(handed), "request": request}

    return asked


def drawn_by(count: int, jobs: list[dict[str, Any]], folder: Path) -> str:
    """What the processes said; their pictures lie in `folder`."""
    (folder / "jobs.json").write_text(json.dumps(jobs), "utf-8")
    done = torchrun(folder, count, "--no-python", sys.executable, "-c", JOBS, "jobs.json")
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def compare(job: dict[str, Any], folder: Path) -> tuple[float, float]:
    """Decibels between one process's picture and theirs; and without the exchange of tokens."""
    alone = together.pixels(together.load(job["folder"], None, job["handed"]), job["request"])
    pictures = np.load(folder / f"{job['name']}.npz")
    return psnr(alone, pictures["together"]), psnr(alone, pictures["apart"])


@pytest.fixture(scope="module")
def drawn(
    ask: Callable[..., dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, dict[str, Any]], Path, str]:
    """Jobs by name, the folder of their pictures, and what two processes said while they drew."""
    folder = tmp_path_factory.mktemp("drawn")
    words = ["generate", "--prompt", "red apple", "--device", "cpu", "--ulysses-degree", "2"]
    ours = {"words": [*words, "--output-path", str(folder), "--output-file-name", "emoji"]}
    jobs = {name: ask(name) for name in IN_CI}
    said = drawn_by(2, [ours, *jobs.values()], folder)
    return jobs, folder, said


@pytest.mark.parametrize("name", IN_CI)
def test_two_processes_draw_what_one_draws_with_encoded_layers_and_odd_lengths(
    name: str, drawn: tuple[dict[str, dict[str, Any]], Path, str]
) -> None:
    jobs, folder, _ = drawn
    theirs, apart = compare(jobs[name], folder)
    assert theirs > SAME
    assert apart < OTHER, "the figure cannot tell a broken exchange"


def test_the_bundled_model_is_drawn_by_two_and_one_of_them_talks_and_writes(
    drawn: tuple[dict[str, dict[str, Any]], Path, str], tmp_path: Path
) -> None:
    _, folder, said = drawn
    (picture,) = folder.glob("*.png")
    record = read_metadata(picture)
    assert record["flags"]["ulysses_degree"] == 2
    assert "ulysses 2: 2 processes draw one picture" in record["report"]["truth"]
    assert (said.count("saved as"), said.count("ulysses 2:"), said.count(".png")) == (1, 1, 1)
    one = [picture_of(seed, tmp_path) for seed in (42, 43)]
    ours = np.asarray(Image.open(picture)) / 255
    assert psnr(ours, one[0]) > ROUNDED > psnr(ours, one[1])


def picture_of(seed: int, folder: Path) -> "np.ndarray[Any, Any]":
    words = ["generate", "--prompt", "red apple", "--device", "cpu", "--seed", str(seed)]
    assert run([*words, "--output-path", str(folder)]) == 0
    return np.asarray(Image.open(folder / f"red-apple-{seed}.png")) / 255


@pytest.mark.parametrize("name", ["hunyuan-video", "z-image", "ltx2"])
def test_a_transformer_that_diffusers_cannot_split_is_refused_by_name(name: str) -> None:
    transformer = PIPELINES[name].make().transformer
    config = {"_class_name": type(transformer).__name__}
    with pytest.raises(UsageError, match=f"of transformer, a {type(transformer).__name__}"):
        ulysses.require_split({"transformer": config})


def test_a_device_whose_processes_cannot_talk_is_refused() -> None:
    with pytest.raises(UsageError, match="works on cpu and cuda, this is mps"):
        ulysses.join(2, torch.device("mps"))


def test_a_program_that_was_not_started_by_torchrun_is_told_how() -> None:
    with pytest.raises(UsageError, match="needs 2 processes, this is one") as refused:
        loading.load(run=loading.RunFlags(device="cpu", ulysses_degree=2))
    assert str(refused.value.hint).startswith("torchrun --nproc-per-node 2 ")


@pytest.mark.long
@pytest.mark.parametrize("name", SPLITTABLE)
def test_every_kind_that_can_be_split_is_drawn_alike(
    name: str, ask: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    job = ask(name)
    drawn_by(2, [job], tmp_path)
    theirs, apart = compare(job, tmp_path)
    assert theirs > SAME > OTHER > apart


@pytest.mark.long
def test_three_processes_share_three_heads_and_a_length_that_three_does_not_divide(
    ask: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    folder = tiny.tiny_flux_pipeline(tmp_path / "three", num_attention_heads=3)
    job = {**ask("flux-dev"), "folder": str(folder)}
    job["request"] |= {"width": 40, "height": 40}
    drawn_by(3, [job], tmp_path)
    theirs, apart = compare(job, tmp_path)
    assert theirs > SAME > OTHER > apart


@pytest.mark.long
def test_a_refusal_is_said_once_though_every_process_meets_it(tmp_path: Path) -> None:
    words = ("generate", "--prompt", "x", "--device", "cpu", "--ulysses-degree", "3")
    done = torchrun(tmp_path, 2, "-m", "diffquant", *words)
    assert done.returncode != 0
    assert done.stderr.count("error: ") == 1
    assert "hint: torchrun --nproc-per-node 3 -m diffquant generate" in done.stderr
