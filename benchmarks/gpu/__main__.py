"""`python -m benchmarks.gpu [--output FILE] [--seconds N]`: FLUX.1-shaped steps on one NVIDIA GPU.

Needs torch for CUDA with its triton, and nothing else that is not in this repository: no diffusers,
no network, no file. With the defaults it takes under eight minutes on an H200, of which compiling is
most; what there is no time for is named as left out. Results are printed as they come.

First, single products at FLUX's shapes and 4,608 tokens against bf16 `F.linear`; then one denoising
step of 12 billion random parameters at 1024 x 1024 pixels and 512 words: eager, compiled, memory, and
the error of the step's result against bf16's. Weights are normal numbers, which no scheme is made
for: errors compare methods with each other and say nothing of pictures.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks.gpu._linears import Method, here, made
from benchmarks.gpu._model import DOUBLE, IMAGE, MLP, SINGLE, TEXT, WIDTH, Flux, inputs
from diffquant.device import Device
from diffquant.errors import KernelError

BF16 = "bf16"
METHODS = {
    BF16: Method(None),
    "fp8": Method("fp8"),
    "fp8, Triton's inputs": Method("fp8", "triton_scaled_mm"),
    "fp8, Triton": Method("fp8", "triton_fp8_w8a8"),
    "nvfp4, weight-only": Method("nvfp4", "triton_nvfp4"),
    "svdq-int4": Method("svdq_int4", "triton_svdq"),
}
#: Measured as products only.
PRODUCTS = METHODS | {
    "fp8, weight-only": Method("fp8", "triton_fp8"),
    "mxfp4, weight-only": Method("mxfp4", "triton_mxfp4"),
    "int4, weight-only": Method("int4", "triton_int4"),
    "svdq-int4, weight-only": Method("svdq_int4", "triton_int4"),
}
SHAPES_NK = ((WIDTH, WIDTH), (MLP, WIDTH), (WIDTH, MLP))
GIB = 2**30


def main() -> int:
    options = _options()
    if not torch.cuda.is_available():
        sys.exit("error: no GPU that torch can drive\nhint: `python -m benchmarks` is for a CPU")
    begun, place = time.perf_counter(), here()
    torch._dynamo.config.recompile_limit = 64
    lines = [f"{place.name} ({place.arch}), torch {torch.__version__}"]
    with torch.inference_mode():
        for section in (_products, _steps):
            for line in section(place, begun + options.seconds, options):
                print(line, flush=True)
                lines.append(line)
                if options.output:
                    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--output", type=Path, metavar="FILE", help="where lines are kept as well")
    parser.add_argument("--seconds", type=int, default=450, help="begin nothing later [450]")
    parser.add_argument("--double", type=int, default=DOUBLE, help="double blocks [19]")
    parser.add_argument("--single", type=int, default=SINGLE, help="single blocks [38]")
    return parser.parse_args()


def _products(place: Device, until: float, options: argparse.Namespace) -> "list[str]":
    """A table of single products; a row per method."""
    shapes = " | ".join(f"{n} x {k}" for n, k in SHAPES_NK)
    lines = [
        "",
        f"| {IMAGE + TEXT} tokens, ms and relative error | {shapes} |",
        "|---|---|---|---|",
    ]
    for name, method in PRODUCTS.items():
        cells = [_product(method, n, k, place) for n, k in SHAPES_NK]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def _product(method: Method, n: int, k: int, place: Device) -> str:
    x = torch.randn(IMAGE + TEXT, k, device="cuda").bfloat16()
    try:
        ours, plain = (made(each, "product", n, k, place) for each in (method, METHODS[BF16]))
    except KernelError as problem:
        return f"refused: {problem.hint or problem}"
    lost = _lost(ours(x), plain(x))
    return f"{1e3 * _seconds(lambda: ours(x), 20):.3f}, {lost:.2e}"


def _steps(place: Device, until: float, options: argparse.Namespace) -> "list[str]":
    """A table of whole steps; a row per method."""
    head = ("", "eager s", "compiled s", "weights GiB", "peak GiB", "error")
    lines = ["", f"| {' | '.join(head)} |", "|---|---|---|---|---|---|"]
    wanted: Tensor | None = None
    for name, method in METHODS.items():
        if time.perf_counter() > until:
            lines.append(f"| {name} | left out: no time | | | | |")
            continue
        try:
            cells, result = _step(method, place, options)
        except KernelError as problem:
            lines.append(f"| {name} | refused: {problem.hint or problem} | | | | |")
            continue
        wanted = result if wanted is None else wanted
        lines.append(f"| {name} | {' | '.join(cells)} | {_lost(result, wanted):.2e} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def _step(method: Method, place: Device, options: argparse.Namespace) -> tuple[list[str], Tensor]:
    """Seconds eager and compiled, weights, peak; and what the step returns."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = Flux(
        lambda path, n, k: made(method, path, n, k, place), options.double, options.single
    ).eval()
    torch.cuda.synchronize()
    gc.collect()
    held = torch.cuda.memory_allocated() - before
    given = inputs(torch.device("cuda"))
    torch.cuda.reset_peak_memory_stats()
    result = model(*given)
    peak = torch.cuda.max_memory_allocated() - before
    eager = _seconds(lambda: model(*given), 5)
    for block in (*model.doubles, *model.singles):
        _compile(block)
    compiled = _seconds(lambda: model(*given), 5)
    return [f"{eager:.3f}", f"{compiled:.3f}", f"{held / GIB:.2f}", f"{peak / GIB:.2f}"], result


def _compile(block: nn.Module) -> None:
    block.compile(fullgraph=True)


def _seconds(work: Callable[[], object], rounds: int) -> float:
    """The median of so many rounds, after two that do not count."""
    times = []
    for turn in range(rounds + 2):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        stop.record()
        torch.cuda.synchronize()
        if turn >= 2:
            times.append(start.elapsed_time(stop) / 1e3)
    return float(median(times))


def _lost(ours: Tensor, wanted: Tensor) -> float:
    return float((ours.float() - wanted.float()).norm() / wanted.float().norm())


if __name__ == "__main__":
    sys.exit(main())
