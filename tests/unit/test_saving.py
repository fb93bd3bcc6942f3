"""`--save-quantized`: what is refused, what lies there, and how much memory the way to it takes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from diffquant import loading
from diffquant.cli import run
from diffquant.errors import UsageError
from diffquant.loading import RunFlags
from diffquant.resolve import ModelFlags
from diffquant.run import read_metadata

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves


def asked(folder: Path, **flags: str) -> loading.DryRun:
    model = ModelFlags(model_path="emoji_flux", **flags)  # type: ignore[arg-type]
    return loading.dry_run(model, RunFlags(device="cpu", save_quantized=str(folder)))


def test_nothing_to_save_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has nothing to save"):
        asked(tmp_path / "new")


def test_a_folder_that_exists_is_never_written_into(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists"):
        asked(tmp_path, quantization="fp8")


def test_a_dialect_of_single_files_becomes_a_component_folder(tmp_path: Path) -> None:
    dry = asked(tmp_path / "new", quantization="int8")
    loading.save_quantized(dry)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    config = json.loads((tmp_path / "new" / "config.json").read_text())
    assert config == dict(dry.plans["transformer"].config)


def test_generate_saves_and_what_it_saved_draws_the_same_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["generate", "--prompt", "fox", "--num-inference-steps", "2", "--device", "cpu"]
    online = ["--quantization", "mxfp8", "--quantization-scope", "attention"]
    assert run([*words, *online, "--save-quantized", "kept"]) == 0
    first = Path(capsys.readouterr().out.strip())
    assert "save_quantized" not in read_metadata(first)["flags"]
    stored = ["--model-path", "emoji_flux", "--transformer-path", "./kept"]
    assert run([*words, *stored]) == 0
    second = Path(capsys.readouterr().out.strip())
    with Image.open(first) as one, Image.open(second) as other:
        assert one.tobytes() == other.tobytes()


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("scheme", ["fp8", "nvfp4", "int8_block"])
def test_private_memory_stays_below_the_result_and_two_layers(scheme: str, tmp_path: Path) -> None:
    """In a process of its own, on a model of 270 MB; the mapped source is the page cache's."""
    found = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), scheme],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    told = json.loads(found.stdout.splitlines()[-1])
    slack = 24 * 2**20  # of the interpreter and of torch's first matrix product
    assert told["peak"] < told["made"] + 2 * told["largest"] + slack
    assert told["made"] + 2 * told["largest"] + slack < told["stored"]


MEASURE = """
import json, sys, threading, time
from pathlib import Path
import torch
from diffusers import FluxTransformer2DModel
from diffquant import forecast, headers, loading, online, planner, sources
from diffquant.device import parse
from diffquant.materialize import materialize, skeleton

folder, scheme = Path(sys.argv[1]), sys.argv[2]
config = dict(num_attention_heads=12, num_layers=1, num_single_layers=2)
small = dict(joint_attention_dim=64, pooled_projection_dim=64)
model = FluxTransformer2DModel(**config, **small).to(torch.bfloat16)
model.save_pretrained(folder)
del model

def private():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024

checkpoint = sources.checkpoint(str(folder))
header = headers.read(checkpoint.files)
dense = planner.plan(checkpoint, header, config=checkpoint.config)
plan = online.requantized(dense, online.Online(scheme=scheme, quantize_all=True))
run = loading.RunFlags(device="cpu")
choices = loading.choose_all(plan, parse("cpu"), run, "transformer")
skeleton(plan.config)
before, seen, done = private(), [], threading.Event()

def watch():
    while not done.wait(0.002):
        seen.append(private())

watcher = threading.Thread(target=watch)
watcher.start()
held = materialize(plan, choices, device=torch.device("cpu"), dtype=torch.bfloat16)
done.set()
watcher.join()
sizes = [2 * n * k for n, k in (layer.shape_NK for layer in plan.layers)]
told = {"peak": max(seen) - before, "made": forecast.recoded_bytes(plan)}
print(json.dumps({**told, "largest": max(sizes), "stored": forecast.stored_bytes(dense)}))
"""
