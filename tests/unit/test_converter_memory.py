"""Memory of a conversion: it does not grow with the file, whatever the size of its one shard."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

LIMIT = 512 << 20

MEASURE = """
import json, sys, threading
from pathlib import Path
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from diffquant.converters import build_modelopt_fp8_transformer as fp8, build_mx_transformer as mx
from diffquant.converters._options import Choosing, Writing

folder, kind = Path(sys.argv[1]), sys.argv[2]
with torch.device("meta"):
    model = FluxTransformer2DModel(num_layers=1, num_single_layers=2)
state = {
    name: torch.full(value.shape, 0.5, dtype=torch.bfloat16)
    for name, value in model.state_dict().items()
}
folder.mkdir()
save_file(state, folder / "diffusion_pytorch_model.safetensors")
(folder / "config.json").write_text(model.to_json_string())
size = sum(value.nbytes for value in state.values())
del state, model

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) * 1024

before, seen, done = resident(), [], threading.Event()

def watch():
    while not done.wait(0.005):
        seen.append(resident())

watcher = threading.Thread(target=watch, daemon=True)
watcher.start()
writing = Writing(output_dir=folder / "out", max_shard_size=100.0)
if kind == "fp8":
    fp8.build(writing, from_bf16=str(folder), model_type="none")
else:
    mx.build(str(folder), writing, encoding=kind, choosing=Choosing(preset="none"))
done.set()
watcher.join()
print(json.dumps({"grown": max(seen) - before, "size": size}))
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["fp8", "mxfp8"])
def test_a_conversion_grows_by_half_a_gibibyte_at_most(kind: str, tmp_path: Path) -> None:
    words = [sys.executable, "-W", "ignore", "-c", MEASURE, str(tmp_path / "model"), kind]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["size"] > 2 * LIMIT, "a file that would not fit"
    assert found["grown"] < LIMIT
