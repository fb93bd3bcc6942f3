"""One denoising step of a two-billion-parameter FLUX transformer: FP8 against bf16, and memory."""

from functools import partial
from pathlib import Path

import torch

from benchmarks import Section, Settings, _flux
from benchmarks._fresh import call, resident
from benchmarks._measuring import Goal, Ratio, in_turns
from benchmarks._profile import shares
from benchmarks._results import table

PLAIN, ENCODED = "bf16", "fp8"
#: Tokens -> the ratio wanted, and rounds.
GOALS = {320: (Goal(1.30), 5), 1280: (Goal(1.12), 4)}
MEMORY = Goal(0.60)
GIB = 2**30


def run(settings: Settings) -> str:
    folders = {PLAIN: _flux.plain_folder(settings.work), ENCODED: _flux.fp8_folder(settings.work)}
    held = {name: int(call(f"{__name__}:memory", name, str(at))) for name, at in folders.items()}
    steps, why = _steps(folders, settings)
    rows = [*steps, _memory(held)]
    about = (
        "`FluxTransformer2DModel` with 3 double and 6 single blocks of FLUX.1's width, 1.9 B random "
        "parameters, every linear in FP8 with one scale, weight-only. diffusers' own bf16 model and "
        "ours take turns. Memory is what a process of its own has resident after one step of 320 "
        "tokens, libraries included."
    )
    return f"{about}\n\n{table(('', PLAIN, ENCODED, 'least / median ratio', 'goal'), rows)}{why}"


def memory(name: str, folder: str) -> int:
    """Bytes resident after one step, for a process of its own."""
    model = _load(name, Path(folder))
    with torch.inference_mode():
        model(**_flux.inputs(320))
    return resident()


def _load(name: str, folder: Path) -> torch.nn.Module:
    return _flux.plain_model(folder) if name == PLAIN else _flux.encoded_model(folder)


def _steps(folders: dict[str, Path], settings: Settings) -> tuple[list[tuple[str, ...]], str]:
    """Rows of the table, and where the time goes of what missed its goal."""
    models = {name: _load(name, folder) for name, folder in folders.items()}
    rows, spent = [], []
    for tokens, (goal, rounds) in GOALS.items():
        given = _flux.inputs(tokens)
        with torch.inference_mode():
            tasks = {name: partial(model, **given) for name, model in models.items()}
            times = in_turns(tasks, min(rounds, settings.rounds))
            ratio = times.ratio(ENCODED, PLAIN)
            if not goal.is_met(ratio):
                spent += [f"- {tokens} tokens, {name}: {shares(tasks[name])}" for name in tasks]
        seconds = [f"{times.median(name):.2f} s" for name in (PLAIN, ENCODED)]
        found = f"{ratio.least:.2f} / {ratio.median:.2f}"
        rows.append((f"step, {tokens} tokens", *seconds, found, goal.verdict(ratio)))
    return rows, "\n\n" + "\n".join(["What was missed, by operators:", "", *spent]) if spent else ""


def _memory(held: dict[str, int]) -> tuple[str, ...]:
    share = held[ENCODED] / held[PLAIN]
    sizes = [f"{held[name] / GIB:.2f} GiB" for name in (PLAIN, ENCODED)]
    return ("memory", *sizes, f"{share:.2f}", MEMORY.verdict(Ratio(share, share)))


SECTION = Section(order=30, title="A FLUX-shaped transformer", run=run)
