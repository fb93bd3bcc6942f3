"""A step from disk, block by block, against one with every weight in memory: time, and memory."""

from functools import partial
from pathlib import Path

import torch
from torch import nn

from benchmarks import Section, Settings, _flux
from benchmarks._fresh import call, peak_resident
from benchmarks._measuring import Goal, Ratio, in_turns
from benchmarks._results import table
from diffquant.offload import blocks, stream_from_disk
from diffquant.paging import tensors_of
from diffquant.residence import Residence

RESIDENT = "resident"
#: How many blocks are on their way while one works.
AHEAD = {"from disk, none ahead": 0, "from disk, one ahead": 1}
TIME = Goal(1.25)
#: What a process may hold beside two blocks: Python, torch, diffusers and the activations.
BESIDE = 0.6e9
GB = 1e9
ROUNDS, TOKENS = 5, (320, 1280)


def run(settings: Settings) -> str:
    folder = _flux.fp8_folder(settings.work)
    names = (RESIDENT, *AHEAD)
    peaks = {name: int(call(f"{__name__}:memory", name, str(folder))) for name in names}
    rows = [*_steps(folder, settings), _peaks(folder, peaks)]
    about = (
        "The same transformer in FP8, its files in the page cache. Streamed blocks are mapped when "
        "they are needed and given back when they are done; models take turns. Memory is the peak of "
        "a process of its own that loads and takes two steps of 320 tokens."
    )
    return f"{about}\n\n{table(('', *names, 'least / median ratio', 'goal'), rows)}"


def memory(name: str, folder: str) -> int:
    """The peak of two steps in bytes, for a process of its own."""
    model = _load(name, Path(folder))
    with torch.inference_mode():
        for _ in range(2):
            model(**_flux.inputs(320))
    return peak_resident()


def _load(name: str, folder: Path) -> nn.Module:
    model = _flux.encoded_model(folder)
    if name in AHEAD:
        stream_from_disk(model, Residence(mode="disk", prefetch=AHEAD[name]), torch.device("cpu"))
    return model


def _steps(folder: Path, settings: Settings) -> list[tuple[str, ...]]:
    models = {name: _load(name, folder) for name in (RESIDENT, *AHEAD)}
    rows = []
    for tokens in TOKENS:
        given = _flux.inputs(tokens)
        with torch.inference_mode():
            tasks = {name: partial(model, **given) for name, model in models.items()}
            times = in_turns(tasks, min(ROUNDS, settings.rounds))
        ratios = [times.ratio(name, RESIDENT) for name in AHEAD]
        found = "; ".join(f"{ratio.least:.2f} / {ratio.median:.2f}" for ratio in ratios)
        seconds = [f"{times.median(name):.2f} s" for name in models]
        rows.append((f"step, {tokens} tokens", *seconds, found, TIME.verdict(ratios[-1])))
    return rows


def _peaks(folder: Path, peaks: dict[str, int]) -> tuple[str, ...]:
    held = (tensors_of(block) for block in blocks(_flux.encoded_model(folder)))
    largest = max(sum(tensor.nbytes for tensor in tensors) for tensors in held)
    goal = 2 * largest + BESIDE
    share = peaks[list(AHEAD)[-1]] / goal
    sizes = [f"{size / GB:.2f} GB" for size in peaks.values()]
    verdict = Goal(1.0).verdict(Ratio(share, share))
    return ("peak memory", *sizes, f"{share:.2f} of {goal / GB:.2f} GB", verdict)


SECTION = Section(order=45, title="Streaming from disk", run=run)
