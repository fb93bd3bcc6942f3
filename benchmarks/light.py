"""How long a command takes that needs no weights: the whole process, as a person waits for it."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarks import Section, Settings
from benchmarks._measuring import Goal, Ratio, Times, in_turns
from benchmarks._results import table

GOAL = Goal(0.25)
ROUNDS = 7
BUNDLED = Path(__file__).parents[1] / "diffquant" / "models" / "emoji_flux_modelopt_fp8"
BARE = "python -c pass"
COMMANDS = {
    BARE: ("-c", "pass"),
    "diffquant --help": ("-m", "diffquant", "--help"),
    "diffquant inspect (the bundled FP8 transformer)": ("-m", "diffquant", "inspect", str(BUNDLED)),
    "diffquant plan (the bundled pipeline)": ("-m", "diffquant", "plan"),
    "python -c 'import torch'": ("-c", "import torch"),
    "python -c 'import diffusers'": ("-c", "import diffusers"),
}


def run(settings: Settings) -> str:
    environment = _environment(settings.work)
    tasks = {name: partial(_wait, asked, environment) for name, asked in COMMANDS.items()}
    times = in_turns(tasks, min(ROUNDS, settings.rounds))
    rows = [
        (
            f"`{name}`",
            f"{times.least(name):.3f} s",
            f"{times.median(name):.3f} s",
            _verdict(name, times),
        )
        for name in COMMANDS
    ]
    about = "Whole processes in turns, files in the page cache."
    return f"{about}\n\n{table(('', 'least', 'median', 'goal'), rows)}"


def _wait(arguments: tuple[str, ...], environment: dict[str, str]) -> None:
    asked = [sys.executable, *arguments]
    subprocess.run(asked, check=True, stdout=subprocess.DEVNULL, env=environment)


def _environment(work: Path) -> dict[str, str]:
    """With compiled modules kept, as an installation keeps them, but not in the checkout."""
    kept = {**os.environ, "PYTHONPYCACHEPREFIX": str(work / "compiled")}
    kept.pop("PYTHONDONTWRITEBYTECODE", None)
    return kept


def _verdict(name: str, times: Times) -> str:
    if not name.startswith(("diffquant --help", "diffquant inspect")):
        return ""
    return GOAL.verdict(Ratio(times.least(name), times.median(name)))


SECTION = Section(order=50, title="Commands that need no weights", run=run)
