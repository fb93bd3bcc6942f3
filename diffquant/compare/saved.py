"""A reference that was captured before, and everything typed that it may contradict."""

from collections.abc import Sequence
from pathlib import Path

from diffquant.compare.sides import digests
from diffquant.compare.trajectory import Capture, read
from diffquant.errors import UsageError
from diffquant.loading import DryRun
from diffquant.run import Request

AGAIN = "leave it out, or capture the reference again with --save-reference"


def reused(
    path: Path, requests: Sequence[Request], settings: Request, seeds: Sequence[int]
) -> Capture:
    """The capture in the file.

    requests  typed drawings, which have to be its drawings in this order; none means all of its own
    settings  what was typed for every drawing
    seeds     typed ones; none means all of its own

    Raises UsageError where anything typed is not what the reference was drawn with.
    """
    capture = read(path)
    if not requests:
        _require_seeds(capture.requests, seeds)
    elif len(requests) != len(capture.requests):
        raise UsageError(
            f"the saved reference holds {len(capture.requests)} drawings, "
            f"{len(requests)} are asked for",
            hint="leave --prompt and --seeds out: they are those of the saved reference",
        )
    typed = requests or [settings] * len(capture.requests)
    for drawn, asked in zip(capture.requests, typed, strict=True):
        _require_same(drawn, asked)
    return capture


def require_same_base(capture: Capture, dry: DryRun) -> None:
    """Raises UsageError where the base that is named now is not the one that was captured."""
    for component, digest in digests(dry).items():
        if capture.base.get(component) != digest:
            raise UsageError(
                f"the saved reference was drawn by another model: its {component} is not that of "
                f"{dry.resolution.components[component].weights.origin!r}",
                hint="--reference-model-path names the one it was drawn by",
            )


def _require_same(drawn: Request, typed: Request) -> None:
    for name, value in typed.typed.items():
        there = getattr(drawn, name)
        if there != value:
            told = name.replace("_", " ")
            raise UsageError(
                f"the saved reference was drawn with {told} {there!r}, not {value!r}", hint=AGAIN
            )


def _require_seeds(drawn: Sequence[Request], seeds: Sequence[int]) -> None:
    there = sorted({request.seeds[0] for request in drawn})
    if seeds and sorted(set(seeds)) != there:
        raise UsageError(
            f"the saved reference was drawn with seeds {there}, not {sorted(set(seeds))}",
            hint=AGAIN,
        )
