"""What is quantized while loading, as files that other tools read and `--transformer-path` loads."""

import json
from collections.abc import Callable
from pathlib import Path

from diffquant import exporting
from diffquant.errors import FormatError
from diffquant.online import Online
from diffquant.plan import Plan
from diffquant.schemes import SCHEMES
from diffquant.sources import CONFIG

WEIGHTS = "diffusion_pytorch_model.safetensors"


def save(
    plan: Plan,
    online: Online,
    folder: Path,
    *,
    on_progress: Callable[[int, int], None] | None = None,
) -> None:
    """Write a settled plan, encoded layer by layer, to a component folder in its scheme's format.

    A dialect of single files gets a config.json beside the file, so that the folder is a component.

    Raises FormatError where the dialect would lose something, ConvertError where there is no room.
    """
    scheme = SCHEMES.load(online.scheme)
    assert scheme.saved_as is not None, "online.require_saveable is asked first"
    prepared = exporting.prepare(plan, scheme.saved_as)
    if prepared.losses:
        raise FormatError(
            f"{scheme.saved_as} cannot hold all of {online.scheme}: {prepared.losses[0]}",
            hint="leave --save-quantized out",
        )

    def told(done: int, total: int, name: str) -> None:
        if on_progress is not None:
            on_progress(done, total)

    output = folder if prepared.is_folder else folder / WEIGHTS
    exporting.save(prepared, output, on_progress=told)
    if not prepared.is_folder:
        text = json.dumps(dict(plan.config), indent=2) + "\n"
        (folder / CONFIG).write_text(text, encoding="utf-8")
