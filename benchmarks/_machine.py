"""What the numbers were taken on, and whether something else was running meanwhile."""

import datetime
import os
import platform
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "numpy")
#: Cores that others may keep busy before measuring is refused. A second thread that has to wait for
#: its core makes a product three times as slow, so this is little.
TOLERATED = 0.25
WATCHED = 2.0  # seconds


def description(threads: int) -> str:
    """One paragraph: processor, memory, date, commit, versions."""
    found = ", ".join(f"{name} {_version(name)}" for name in PACKAGES)
    return (
        f"{_processor()}, {os.cpu_count()} cores, {_memory_gib():.0f} GiB, {platform.system()} "
        f"{platform.release()}; {threads} threads; "
        f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC; commit {_commit()}; "
        f"Python {platform.python_version()}, {found}."
    )


def others_busy() -> float:
    """Cores that are busy while this process sleeps; 0.0 where the system does not tell."""
    before = _busy_ticks()
    time.sleep(WATCHED)
    ticks = os.sysconf("SC_CLK_TCK") * WATCHED if before is not None else 1.0
    after = _busy_ticks()
    return 0.0 if before is None or after is None else (after - before) / ticks


def _busy_ticks() -> int | None:
    """user, nice, system, irq and softirq time of all cores; waiting for disks is no work."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    numbers = [int(word) for word in stat.read_text().splitlines()[0].split()[1:]]
    return sum(numbers[index] for index in (0, 1, 2, 5, 6))


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    family = next((line.split()[-1] for line in lines if line.startswith("cpu family")), "?")
    return f"{next(names, platform.processor())} (family {family})"


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    asked = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
