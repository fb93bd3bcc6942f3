"""Offline conversion against other tools: one synthetic export to FP8, and packing into four bits.

The export is of the older kind, which leaves weights in BF16 and their amax in backbone.pt: the kind
that SGLang's tool (sglang/multimodal_gen/tools in its wheel) makes codes for as well. Each conversion
runs in a process of its own, imports not counted; sglang's runtime, which the tool wants one function
of, is left out.

    pip download --no-deps sglang && unzip -d peers sglang-*.whl 'sglang/multimodal_gen/tools/*'
    pip install --no-deps --target peers torchao==0.18.0 comfy-kitchen
    python -m benchmarks convert --peers peers
    python -m benchmarks.convert --gib 1 --peers peers      the same with another size, printed
"""

import argparse
import json
import os
import sys
import tempfile
import time
import types
from collections.abc import Callable, Iterator
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks import Section, Settings, _machine
from benchmarks._fresh import call, peak_resident
from benchmarks._measuring import Times, in_turns
from benchmarks._results import table
from diffquant.encodings import ENCODINGS, Recipe
from diffquant.plan import Encoding, Role

N, K = 3072, 12288
GIB = 2**30
LAYERS_PER_GIB = GIB // (2 * N * K)
#: At least this many times as fast, with at most this part of the memory.
FASTER, SMALLER, PACKING = 6.0, 0.1, 5.0
ROUNDS, EXPORT = 2, 4.0  # GiB
TOOL = "sglang.multimodal_gen.tools.build_modelopt_fp8_transformer"
OURS, UNCHECKED, THEIRS = "diffquant", "diffquant --no-check", "sglang"


def run(settings: Settings, gib: float = EXPORT) -> str:
    export = _export(settings.work / f"convert-{gib:g}", round(gib * LAYERS_PER_GIB))
    return "\n\n".join([_conversion(export, min(ROUNDS, settings.rounds)), _packing(settings)])


# one export to FP8 -----------------------------------------------------------------------------------


def _conversion(export: Path, rounds: int) -> str:
    peer = _tools()
    tasks = {
        OURS: partial(call, "benchmarks.convert:ours", str(export), False),
        UNCHECKED: partial(call, "benchmarks.convert:ours", str(export), True),
    }
    if peer is not None:
        tasks[THEIRS] = partial(call, "benchmarks.convert:theirs", str(export), str(peer))
    found: dict[str, list[dict[str, float]]] = {name: [] for name in tasks}
    for _ in range(rounds):
        for name, task in tasks.items():
            os.sync()  # nobody waits for the disk because of another's bytes
            found[name].append(task())
    size = (export / "diffusion_pytorch_model.safetensors").stat().st_size / GIB
    rows = [
        (name, f"{_least(done, 'seconds'):.2f} s", f"{_least(done, 'bytes') / 2**20:.0f} MiB")
        for name, done in found.items()
    ]
    about = (
        f"{size:.1f} GiB of BF16 [{N}, {K}] in one shard, to FP8 per tensor; least of {rounds} rounds, "
        "in turns. Memory is what the process grew by, mapped files included; diffquant writes through "
        "to the disk, and decodes what it wrote and compares, unless --no-check."
    )
    return "\n\n".join([about, table(("tool", "time", "memory"), rows), _against(found)])


def _against(found: dict[str, list[dict[str, float]]]) -> str:
    if THEIRS not in found:
        return "SGLang's tool was not there to compare with (--peers)."
    theirs = found[THEIRS]
    told = []
    for name in (OURS, UNCHECKED):
        faster = median(one["seconds"] for one in theirs) / median(
            one["seconds"] for one in found[name]
        )
        part = _least(found[name], "bytes") / _least(theirs, "bytes")
        told.append(f"{name}: {faster:.1f} times as fast, {part:.2f} of the memory")
    return f"{'; '.join(told)} (goals: {FASTER:g} times, {SMALLER:g})."


def _least(done: list[dict[str, float]], key: str) -> float:
    return min(one[key] for one in done)


def _export(folder: Path, layers: int) -> Path:
    """Weights in BF16, and backbone.pt with the amax of weights and inputs."""
    if (folder / "backbone.pt").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    first = torch.randn(N, K).mul_(0.02).to(torch.bfloat16)
    weights, state = {}, {}
    for number in range(layers):
        name = f"blocks.{number}.ff"
        weights[f"{name}.weight"] = first.roll(number, 0)
        state[f"{name}.weight_quantizer._amax"] = weights[f"{name}.weight"].abs().max().float()
        state[f"{name}.input_quantizer._amax"] = torch.tensor(8.0)
    save_file(weights, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    block = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": []}
    config = {"_class_name": "Synthetic", "quantization_config": block}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    torch.save({"model_state_dict": state}, folder / "backbone.pt")
    return folder


def ours(export: str, no_check: bool) -> dict[str, float]:
    from diffquant.converters._options import Writing
    from diffquant.converters.build_modelopt_fp8_transformer import build

    def convert(output: Path) -> None:
        writing = Writing(output_dir=output, no_check=no_check)
        build(writing, export=export, backbone=Path(export), model_type="none")

    return _measured(convert, Path(export).parent)


def theirs(export: str, tools: str) -> dict[str, float]:
    _stub(Path(tools))
    build = import_module(TOOL).build_modelopt_fp8_transformer

    def convert(output: Path) -> None:
        build(
            modelopt_hf_dir=export,
            modelopt_backbone_ckpt=export,
            output_dir=str(output),
            model_type="none",
        )

    return _measured(convert, Path(export).parent)


def _measured(convert: Callable[[Path], None], work: Path) -> dict[str, float]:
    from benchmarks._fresh import resident

    with tempfile.TemporaryDirectory(dir=work) as scratch:
        before, start = resident(), time.perf_counter()
        convert(Path(scratch) / "out")
        return {"seconds": time.perf_counter() - start, "bytes": peak_resident() - before}


def _tools() -> Path | None:
    """The folder that holds sglang's tools, among the places Python looks in."""
    wanted = Path(*TOOL.split(".")).with_suffix(".py")
    return next((Path(place) for place in sys.path if (Path(place) / wanted).is_file()), None)


def _stub(tools: Path) -> None:
    """Packages without their __init__, which would import a whole serving runtime."""
    for name in ("sglang", "sglang.multimodal_gen", "sglang.multimodal_gen.tools"):
        package = types.ModuleType(name)
        package.__path__ = [str(tools / Path(*name.split(".")))]
        sys.modules[name] = package
    name = "sglang.multimodal_gen.runtime.utils.quantization_utils"
    helper: Any = types.ModuleType(name)
    helper.normalize_flat_modelopt_quant_config = lambda config: None
    sys.modules[name] = helper


# packing ---------------------------------------------------------------------------------------------


def _packing(settings: Settings) -> str:
    torch.manual_seed(0)
    weight = torch.randn(N, K).mul_(0.02).to(torch.bfloat16)
    rows = [row for kind in ("nvfp4", "mxfp4") for row in _packed(kind, weight, settings)]
    about = (
        f"Packing BF16 [{N}, {K}], eager on the CPU, {settings.threads} threads, in turns: how many "
        f"times as long another library takes (median of rounds, goal {PACKING:g}), and how many "
        "code bytes are ours: in the arithmetic of ModelOpt, which files have unless their dialect is "
        "another tool's, and in the library's own."
    )
    head = ("encoding", "library", "theirs / ours", "equal codes", "in its arithmetic")
    return f"{about}\n\n{table(head, rows) if rows else 'No other library was there (--peers).'}"


def _packed(kind: str, weight: Tensor, settings: Settings) -> Iterator[tuple[str, ...]]:
    packers = {"diffquant": partial(_pack, kind, weight)}
    packers |= {
        package: partial(pack, weight)
        for (package, number), pack in PACKERS.items()
        if number == kind and find_spec(package) is not None
    }
    times: Times = in_turns(packers, min(ROUNDS, settings.rounds))
    for package in list(packers)[1:]:
        codes = packers[package]().view(torch.uint8)
        ratio = times.ratio(package, "diffquant").median
        equal = (_equal(codes, _pack(kind, weight, way)) for way in ("modelopt", OWN[package]))
        yield (kind, package, f"{ratio:.1f}", *equal)


def _equal(codes: Tensor, ours: Tensor) -> str:
    different = int((codes != ours).sum())
    return "all" if not different else f"{1 - different / codes.numel():.4%}"


def _pack(kind: str, weight: Tensor, arithmetic: str = "modelopt") -> Tensor:
    encode = ENCODINGS.load(kind).encode
    assert encode is not None, "both can be written"
    group = ENCODINGS.load(kind).group
    recipe = Recipe(granularity="group", group=group, arithmetic=arithmetic)
    return encode(weight, Encoding(kind), recipe)[Role.CODES]


def _kitchen_nvfp4(weight: Tensor) -> Tensor:
    from comfy_kitchen.backends.eager.quantization import quantize_nvfp4

    codes: Tensor = quantize_nvfp4(weight, _outer(weight), 0.0, False, hi_first=False)[0]
    return codes


def _torchao_nvfp4(weight: Tensor) -> Tensor:
    from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize

    codes: Tensor = nvfp4_quantize(weight, 16, _outer(weight))[1]
    return codes


def _torchao_mxfp4(weight: Tensor) -> Tensor:
    from torchao.prototype.mx_formats.mx_tensor import ScaleCalculationMode, to_mx

    ceil = ScaleCalculationMode.RCEIL
    codes: Tensor = to_mx(weight, torch.float4_e2m1fn_x2, 32, ceil)[1]
    return codes


def _outer(weight: Tensor) -> Tensor:
    return weight.float().abs().max() / (6 * 448)


#: Package -> the name of its arithmetic.
OWN = {"comfy_kitchen": "comfy", "torchao": "torchao"}
PACKERS: dict[tuple[str, str], Callable[[Tensor], Tensor]] = {
    ("comfy_kitchen", "nvfp4"): _kitchen_nvfp4,
    ("torchao", "nvfp4"): _torchao_nvfp4,
    ("torchao", "mxfp4"): _torchao_mxfp4,
}


def main() -> None:
    """Print the section for a size of one's own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convert", description=__doc__)
    parser.add_argument("--gib", type=float, default=EXPORT, help="size of the export [4]")
    parser.add_argument("--peers", type=Path, action="append", default=[], help="may be repeated")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    sys.path[:0] = [str(folder.resolve()) for folder in options.peers]
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as work:
        settings = Settings(rounds=options.rounds, work=Path(work), threads=threads)
        sys.stdout.write(f"{_machine.description(threads)}\n\n{run(settings, options.gib)}\n")


SECTION = Section(order=70, title="Converting", run=run)

if __name__ == "__main__":
    main()
