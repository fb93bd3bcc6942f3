"""`python -m benchmarks [SECTION ...]`: run sections, write RESULTS.md and its plots."""

import argparse
import os
import sys
import tempfile
import time
import warnings
from importlib import import_module
from pathlib import Path

from benchmarks import FOLDER, Section, Settings, _machine, _results
from diffquant.errors import DiffquantError
from diffquant.plugins import Registry

SECTIONS: Registry[Section] = Registry("benchmarks", "SECTION")


def main() -> int:
    known = _sections()
    options = _parser(known).parse_args()
    for folder in reversed(options.peers):
        sys.path.insert(0, str(folder.resolve()))
    busy = _machine.others_busy()
    if busy > _machine.TOLERATED and not options.anyway:
        print(
            f"error: others keep {busy:.1f} cores busy (load average {os.getloadavg()[0]:.1f}), "
            "times would tell of them\nhint: wait, or measure --anyway",
            file=sys.stderr,
        )
        return 1
    settings = _settings(options)
    for name in options.sections or sorted(known, key=lambda name: known[name].order):
        _results.store(options.output, [_part(name, known[name], settings, busy)])
    return 0


def _sections() -> dict[str, Section]:
    """Modules that have a SECTION; the others are programs of their own."""
    modules = {name: import_module(f"benchmarks.{name}") for name in SECTIONS.names()}
    return {
        name: SECTIONS.load(name) for name, found in modules.items() if hasattr(found, "SECTION")
    }


def _parser(known: dict[str, Section]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "sections",
        nargs="*",
        choices=[[], *sorted(known)],
        metavar="SECTION",
        help=f"one or more of {', '.join(sorted(known))} [all]",
    )
    parser.add_argument(
        "--peers",
        type=Path,
        action="append",
        default=[],
        metavar="DIR",
        help="folder other libraries were installed into (pip install --target)",
    )
    parser.add_argument("--output", type=Path, default=FOLDER / "RESULTS.md", metavar="FILE")
    parser.add_argument(
        "--work",
        type=Path,
        default=Path(tempfile.gettempdir()) / "diffquant-benchmarks",
        metavar="DIR",
        help="where generated checkpoints are kept [%(default)s]",
    )
    parser.add_argument("--rounds", type=int, default=9, metavar="N", help="at most so many [9]")
    parser.add_argument(
        "--threads",
        type=int,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="of torch [every core]",
    )
    parser.add_argument("--anyway", action="store_true", help="measure although others are at work")
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    import torch

    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # of the processes sections start
    options.work.mkdir(parents=True, exist_ok=True)
    return Settings(rounds=options.rounds, work=options.work, threads=options.threads)


def _part(name: str, section: Section, settings: Settings, busy: float) -> tuple[int, str, str]:
    print(f"{name} …", file=sys.stderr, flush=True)
    start = time.perf_counter()
    text = section.run(settings)
    took = time.perf_counter() - start
    print(f"{text}\n", flush=True)
    foot = (
        f"<sub>`python -m benchmarks {name}`, {took:.0f} s; before it others kept {busy:.2f} cores "
        f"busy. {_machine.description(settings.threads)}</sub>"
    )
    return section.order, name, f"## {section.title}\n\n{text}\n\n{foot}"


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    try:
        sys.exit(main())
    except DiffquantError as problem:
        sys.exit(f"error: {problem}")
