"""Loading 1.9 GB of FP8: ours from FP8 files against torchao quantizing bf16 files on load."""

import time
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import Section, Settings
from benchmarks._fresh import MIB, call, peak_resident, resident
from benchmarks._measuring import Goal, Ratio
from benchmarks._results import table
from benchmarks.peers import is_installed

SECONDS, SPEED, MEMORY = Goal(0.15), 50.0, Goal(0.05)
#: Of ours, and of those that take many seconds.
ROUNDS, SLOW_ROUNDS = 5, 2

Loaded = dict[str, float]


def run(settings: Settings) -> str:
    from benchmarks import _flux

    plain, encoded = _flux.plain_folder(settings.work), _flux.fp8_folder(settings.work)
    rounds, slow = min(ROUNDS, settings.rounds), min(SLOW_ROUNDS, settings.rounds)
    runs = {
        "diffquant, fp8 files": _runs("ours", encoded, rounds),
        "diffusers, bf16 files": _runs("plain", plain, slow),
    }
    if is_installed("torchao"):
        runs["diffusers + torchao Float8WeightOnly on load, bf16 files"] = _runs(
            "torchao", plain, slow
        )
    rows = [
        (name, *(_cell(found, key) for key in ("seconds", "peak", "held")))
        for name, found in runs.items()
    ]
    header = ("", "load, least / median", "peak memory before first use", "after first use")
    return f"{_about()}\n\n{table(header, rows)}\n\n{_verdict(runs)}"


def ours(folder: str) -> Loaded:
    from benchmarks import _flux

    return _watched(lambda: _flux.encoded_model(Path(folder)))


def plain(folder: str) -> Loaded:
    from benchmarks import _flux

    return _watched(lambda: _flux.plain_model(Path(folder)))


def torchao(folder: str) -> Loaded:
    import torch
    from diffusers import FluxTransformer2DModel, TorchAoConfig
    from torchao.quantization import Float8WeightOnlyConfig

    config = TorchAoConfig(Float8WeightOnlyConfig())
    return _watched(
        lambda: FluxTransformer2DModel.from_pretrained(
            folder, torch_dtype=torch.bfloat16, quantization_config=config
        )
    )


def _watched(load: Any) -> Loaded:
    """Seconds, and bytes above what the imported libraries hold; the first use is one step."""
    import torch

    from benchmarks import _flux

    _flux.imported()
    before = resident()
    start = time.perf_counter()
    model = load()
    seconds = time.perf_counter() - start
    peak = peak_resident() - before
    with torch.inference_mode():
        model(**_flux.inputs(80))
    return {"seconds": seconds, "peak": peak / MIB, "held": (resident() - before) / MIB}


def _runs(function: str, folder: Path, rounds: int) -> list[Loaded]:
    return [call(f"{__name__}:{function}", str(folder)) for _ in range(rounds)]


def _cell(runs: list[Loaded], key: str) -> str:
    values = [run[key] for run in runs]
    if key == "seconds":
        return f"{min(values):.3f} s / {median(values):.3f} s"
    return f"{median(values):,.0f} MiB"


def _about() -> str:
    return (
        "The transformer of the section above from files in the page cache, each load in a process "
        "of its own whose imports do not count. Weights are mapped, so memory grows with first use."
    )


def _verdict(runs: dict[str, list[Loaded]]) -> str:
    own, _, *others = (list(found) for found in runs.values())
    seconds = median(run["seconds"] for run in own)
    said = [f"Ours in {seconds:.3f} s: goal {SECONDS.verdict(Ratio(seconds, seconds))}."]
    for found in others:
        times = median(run["seconds"] for run in found) / seconds
        share = median(run["peak"] for run in own) / median(run["peak"] for run in found)
        said.append(
            f"torchao takes {times:.0f} times as long: goal ≥ {SPEED:.0f} "
            f"{'met' if times >= SPEED else '**missed**'}. Our peak before first use is {share:.3f} "
            f"of its: goal {MEMORY.verdict(Ratio(share, share))}."
        )
    return " ".join(said) if others else f"{said[0]} torchao is not installed."


SECTION = Section(order=40, title="Loading", run=run)
