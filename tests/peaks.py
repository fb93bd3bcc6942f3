"""A child process that draws one picture and tells the host memory each stage of it peaked at.

    python tests/peaks.py '{"flags": {"model_path": …}, "request": {"width": 64 …}}'

Prints {"stages": {name: bytes}, "seconds": of the denoising steps}. Linux: the kernel keeps the peak
of resident memory, and forgets it when asked.
"""

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

peaks: dict[str, int] = {}


def peaked(stage: str) -> None:
    """The peak since the last stage belongs to this one."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    peak = next(line for line in lines if line.startswith("VmHWM:"))
    peaks[stage] = max(peaks.get(stage, 0), int(peak.split()[1]) * 1024)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def watched(owner: Any, name: str, before: str, after: str) -> None:
    """Calls of `owner.name` begin and end a stage."""
    inner: Callable[..., Any] = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        peaked(before)
        result = inner(*args, **kwargs)
        peaked(after)
        return result

    setattr(owner, name, call)


def main(asked: dict[str, Any]) -> None:
    import diffquant
    from diffquant import run

    pipeline = diffquant.load(**asked["flags"])
    peaked("load")
    watched(pipeline, "encode_prompt", "encode", "encode")
    watched(pipeline.vae, "decode", "denoise", "decode")
    request = run.fill(run.Request(**asked["request"]), pipeline, {})
    result = run.generate(pipeline, request)
    peaked("decode")
    print(json.dumps({"stages": peaks, "seconds": result.step_seconds}))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(json.loads(sys.argv[1]))
