"""`python -m benchmarks.gpu [--output FILE] [--seconds N]`: FLUX.1-shaped steps on one NVIDIA GPU.

Needs torch for CUDA with its triton, 40 GiB of the GPU's memory, and nothing else that is not in this
repository: no diffusers, no network, no file; torchao is measured where it is installed. With the
defaults it takes under eight minutes, of which compiling is most; what there is no time for is named
as left out. Rows are printed as they come, and kept in FILE, which may be a copy of RESULTS.md.

First, single products at FLUX's shapes and 4,608 tokens against bf16 `F.linear`; then one denoising
step of 12 billion random parameters at 1024 x 1024 pixels and 512 words: eager, compiled, memory, and
the error of the step's result against bf16's. Weights are normal numbers, which no scheme is made
for: errors compare methods with each other and say nothing of pictures.

`--rehearse` does all of it on a CPU with a small model, so that nothing is met for the first time
on a machine that is paid by the minute.
"""

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn

from benchmarks import _machine, _results
from benchmarks._measuring import Goal, Ratio
from benchmarks.gpu._linears import Method, here, made, torchao_fp8
from benchmarks.gpu._model import FLUX, SMALL, Flux, Shape, inputs
from diffquant.device import Device
from diffquant.errors import KernelError

ORDER, NAME, TITLE = 70, "gpu", "On a GPU"
BF16, FP8, SVDQ = "bf16", "fp8", "svdq-int4"
#: Those with goals first: time may run out.
METHODS = {
    BF16: Method(),
    FP8: Method("fp8"),
    SVDQ: Method("svdq_int4", "triton_svdq"),
    "nvfp4, weight-only": Method("nvfp4", "triton_nvfp4"),
    "torchao fp8": Method(theirs=torchao_fp8),
    "fp8, Triton": Method("fp8", "triton_fp8_w8a8"),
    "fp8, Triton's inputs": Method("fp8", "triton_scaled_mm"),
}
#: Measured as products only.
PRODUCTS = METHODS | {
    "fp8, weight-only": Method("fp8", "triton_fp8"),
    "mxfp4, weight-only": Method("mxfp4", "triton_mxfp4"),
    "int4, weight-only": Method("int4", "triton_int4"),
    "svdq-int4, weight-only": Method("svdq_int4", "triton_int4"),
}
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """Where, how large, and until when (of `time.perf_counter`) something may begin."""

    place: Device
    shape: Shape
    until: float

    @property
    def device(self) -> torch.device:
        return torch.device(self.place.kind)

    @property
    def backend(self) -> str:
        return "inductor" if self.place.kind == "cuda" else "eager"


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Seconds, bytes, and what the step returned."""

    eager: float
    compiled: float
    weights: int
    peak: int
    result: Tensor


@dataclass(frozen=True, slots=True)
class Aim:
    """What a method should need at most, as a ratio to bf16."""

    method: str
    what: str
    of: Callable[[Step], float]
    goal: Goal


AIMS = (
    Aim(FP8, "compiled time", lambda step: step.compiled, Goal(1 / 1.5)),
    Aim(SVDQ, "compiled time", lambda step: step.compiled, Goal(1.0)),
    Aim(SVDQ, "weights", lambda step: step.weights, Goal(0.32)),
    Aim(SVDQ, "peak memory", lambda step: step.peak, Goal(0.32)),
)


def main() -> int:
    options = _options()
    if not torch.cuda.is_available() and not options.rehearse:
        sys.exit(
            "error: no GPU that torch can drive\nhint: `--rehearse` takes a CPU, for the steps only"
        )
    asked = Asked(
        place=here(),
        shape=SMALL if options.rehearse else FLUX,
        until=time.perf_counter() + options.seconds,
    )
    torch._dynamo.config.recompile_limit = 64
    lines: list[str] = []
    with torch.inference_mode():
        for line in _told(asked):
            print(line, flush=True)
            lines.append(line)
            if options.output:
                _results.store(options.output, [(ORDER, NAME, "\n".join(lines))])
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the section is kept")
    parser.add_argument("--seconds", type=int, default=400, help="begin nothing later [400]")
    parser.add_argument("--rehearse", action="store_true", help="a small model, a CPU will do")
    return parser.parse_args()


def _told(asked: Asked) -> Iterator[str]:
    """The section, line by line. What it was measured on comes first: a run may be cut off."""
    shape, place = asked.shape, asked.place
    yield f"## {TITLE}\n"
    yield (
        f"{place.name} ({place.arch}). {shape.double} double and {shape.single} single blocks of "
        f"FLUX.1's kind, width {shape.width}, random weights, {shape.image} + {shape.text} tokens. "
        "Errors are relative to bf16's result.\n"
    )
    yield f"<sub>`python -m benchmarks.gpu`. {_machine.description(torch.get_num_threads())}</sub>\n"
    yield from _products(asked)
    yield ""
    yield from _steps(asked)


def _there(methods: dict[str, Method]) -> dict[str, Method]:
    """Without those of a library that is not installed."""
    own = find_spec("torchao") is not None
    return {name: method for name, method in methods.items() if own or method.theirs is None}


def _products(asked: Asked) -> Iterator[str]:
    """A table of single products; a row per method."""
    width, mlp = asked.shape.width, asked.shape.mlp
    shapes = ((width, width), (mlp, width), (width, mlp))
    yield _row((f"{asked.shape.tokens} tokens, ms and error", *(f"{n} x {k}" for n, k in shapes)))
    yield "|---|---|---|---|"
    for name, method in _there(PRODUCTS).items():
        yield _row((name, *(_product(method, n, k, asked) for n, k in shapes)))


def _product(method: Method, n: int, k: int, asked: Asked) -> str:
    x = torch.randn(asked.shape.tokens, k, device=asked.device).bfloat16()
    try:
        ours, plain = (made(each, "product", n, k, asked.place) for each in (method, Method()))
    except KernelError as problem:
        return f"refused: {problem.hint or problem}"
    lost = _lost(ours(x), plain(x))
    return f"{1e3 * _seconds(lambda: ours(x), 20, asked.device):.3f}, {lost:.2e}"


def _steps(asked: Asked) -> Iterator[str]:
    """A table of whole steps, a row per method, and the goals."""
    yield _row(("one step", "eager s", "compiled s", "weights GiB", "peak GiB", "error"))
    yield "|---|---|---|---|---|---|"
    found: dict[str, Step] = {}
    for name, method in _there(METHODS).items():
        if time.perf_counter() > asked.until:
            yield _row((name, "left out: no time", "", "", "", ""))
            continue
        try:
            step = found[name] = _step(method, asked)
        except (KernelError, torch.OutOfMemoryError) as problem:
            yield _row((name, f"failed: {str(problem).splitlines()[0]}", "", "", "", ""))
            continue
        seconds = (f"{each:.3f}" for each in (step.eager, step.compiled))
        sizes = (f"{each / GIB:.2f}" for each in (step.weights, step.peak))
        wanted = found[BF16].result if BF16 in found else step.result
        yield _row((name, *seconds, *sizes, f"{_lost(step.result, wanted):.2e}"))
    yield from _goals(found)


def _goals(found: dict[str, Step]) -> Iterator[str]:
    """What of the goals can be told."""
    if BF16 not in found or not found[BF16].peak:  # a rehearsal
        return
    for aim in AIMS:
        if aim.method in found:
            share = aim.of(found[aim.method]) / aim.of(found[BF16])
            verdict = aim.goal.verdict(Ratio(share, share))
            yield f"\n{aim.method}, {aim.what}: {share:.2f} of bf16's ({verdict})"


def _step(method: Method, asked: Asked) -> Step:
    """A model of its own, eager and then compiled block by block."""
    torch._dynamo.reset()
    before = _allocated(asked.device)
    model = Flux(lambda path, n, k: made(method, path, n, k, asked.place), asked.shape).eval()
    weights = _allocated(asked.device) - before
    given = inputs(asked.shape, asked.device)
    _forget_peak(asked.device)
    result = model(*given)
    peak = _peak(asked.device) - before
    eager = _seconds(lambda: model(*given), 5, asked.device)
    for block in (*model.doubles, *model.singles):
        _compile(block, asked.backend)
    compiled = _seconds(lambda: model(*given), 5, asked.device)
    return Step(eager=eager, compiled=compiled, weights=weights, peak=peak, result=result)


def _compile(block: nn.Module, backend: str) -> None:
    block.compile(fullgraph=True, backend=backend)


def _row(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _lost(ours: Tensor, wanted: Tensor) -> float:
    return float((ours.float() - wanted.float()).norm() / wanted.float().norm())


# What a CPU cannot tell is 0 there.


def _allocated(device: torch.device) -> int:
    """Bytes of tensors that live."""
    gc.collect()
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.memory_allocated()


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


def _seconds(work: Callable[[], object], rounds: int, device: torch.device) -> float:
    """The median of so many rounds, after two that do not count."""
    taken = _on_gpu(work, rounds + 2) if device.type == "cuda" else _on_cpu(work, rounds + 2)
    return median(taken[2:])


def _on_gpu(work: Callable[[], object], rounds: int) -> list[float]:
    """Seconds between marks in the stream, which is never empty where the host keeps up."""
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    marks[0].record()
    for mark in marks[1:]:
        work()
        mark.record()
    torch.cuda.synchronize()
    pairs = zip(marks, marks[1:], strict=False)
    return [start.elapsed_time(stop) / 1e3 for start, stop in pairs]


def _on_cpu(work: Callable[[], object], rounds: int) -> list[float]:
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return taken


if __name__ == "__main__":
    sys.exit(main())
