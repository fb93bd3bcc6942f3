"""Cut the true ModelOpt and SGLang files down to what the FP8 converter's tests need.

    python tests/oracle/write_modelopt_fp8_cases.py ../shared/cases/modelopt

Exports are copied. Of a backbone.pt the `_amax` buffers and the state around them stay; of what the
peer's tool wrote, every tensor's dtype, shape and digest, and its configuration.
"""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

CASES = Path(__file__).resolve().parents[1] / "data" / "modelopt"
WEIGHTS = "diffusion_pytorch_model.safetensors"


def digests(file: Path) -> dict[str, list[object]]:
    """Tensor -> dtype, shape, and the beginning of the SHA-256 of its bytes."""
    found: dict[str, list[object]] = {}
    with safe_open(file, "pt") as stored:
        for name in sorted(stored.keys()):
            tensor = stored.get_tensor(name)
            raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            shape = list(tensor.shape)
            found[name] = [str(tensor.dtype), shape, hashlib.sha256(raw).hexdigest()[:16]]
    return found


def write(cases: Path) -> None:
    for family in ("flux", "wan"):
        target = CASES / family
        (target / "sglang_fp8").mkdir(parents=True, exist_ok=True)
        shutil.copytree(cases / family / "fp8", target / "fp8", dirs_exist_ok=True)
        backbone = torch.load(
            cases / "backbone" / f"{family}_fp8_backbone.pt", weights_only=True, map_location="cpu"
        )
        buffers = backbone["model_state_dict"]
        kept = {name: buffers[name].clone() for name in buffers if name.endswith("_amax")}
        torch.save({**backbone, "model_state_dict": kept}, target / "fp8_backbone.pt")
        peer = cases / "sglang_out" / f"{family}_fp8"
        table = json.dumps(digests(peer / WEIGHTS), indent=0) + "\n"
        (target / "sglang_fp8" / "digests.json").write_text(table)
        shutil.copyfile(peer / "config.json", target / "sglang_fp8" / "config.json")
    shutil.copytree(cases / "flux" / "bf16", CASES / "flux" / "bf16", dirs_exist_ok=True)
    shutil.copytree(cases / "wan" / "bf16", CASES / "wan" / "bf16", dirs_exist_ok=True)
    cut(cases / "wan" / "ex_int8", CASES / "wan" / "ex_int8_cut")


def cut(export: Path, target: Path) -> None:
    """Layers that are ignored and smoothed all the same, and one that is quantized."""
    kept = ("blocks.0.attn1.", "blocks.1.attn1.to_q")
    target.mkdir(parents=True, exist_ok=True)
    with safe_open(export / WEIGHTS, "pt") as stored:
        names = [name for name in stored.keys() if name.startswith(kept)]
        save_file({name: stored.get_tensor(name) for name in names}, target / WEIGHTS)
    shutil.copyfile(export / "config.json", target / "config.json")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
