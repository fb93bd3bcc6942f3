"""A function in a process of its own, so that its memory and its imports are its own.

    python -m benchmarks._fresh benchmarks.flux:memory '["bf16", "/tmp/x"]'

prints what the function returns, as JSON.
"""

import json
import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

MIB = 2**20


def call(function: str, *arguments: Any) -> Any:
    """What `module:function` returns for these JSON values; its errors end this process too."""
    asked = [sys.executable, "-W", "ignore", "-m", __name__, function, json.dumps(arguments)]
    paths = os.pathsep.join([path for path in sys.path if path])
    environment = {**os.environ, "PYTHONPATH": paths}
    done = subprocess.run(asked, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{function} failed: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def resident() -> int:
    """Bytes of this process in memory now, mapped files included."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_resident() -> int:
    """The most there ever was of this process in memory, in bytes."""
    status = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in status if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _main(function: str, arguments: str) -> None:
    module, _, name = function.partition(":")
    print(json.dumps(getattr(import_module(module), name)(*json.loads(arguments))))


if __name__ == "__main__":
    _main(*sys.argv[1:])
