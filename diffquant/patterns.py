"""Three ways to name layers by pattern, each where its readers expect it.

matches, select   ours, in presets and families: the whole path, segment by segment
                    `*` any run inside one segment    `**` any number of segments
                    `[:3]` `[-5:]` `[2:58]`  blocks by number, counted as a Python slice does
hits              what a person types (--quantization-ignored-layers, resolution rule 9): segments
                  anywhere in the path, whole, but the last is a prefix when it ends in `_` or `*`
                    `attention.to_` hits layers.0.attention.to_q    `to_q` misses attn.to_qkv
                    `blocks.1` hits blocks.1.attn.to_q              `blocks.1` misses blocks.10.attn
ignores           what files say (ModelOpt's `ignore`): the whole path, `*` crosses dots
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cache

_SLICE = re.compile(r"\[(-?\d*):(-?\d*)\]")


def matches(pattern: str, path: str) -> bool:
    """Whether the pattern names the path. A slice of blocks needs all paths: see `select`."""
    return _whole(pattern).fullmatch(f".{path}") is not None


def select(pattern: str, paths: Sequence[str]) -> tuple[str, ...]:
    """The paths the pattern names, in their order; slices are counted among these paths."""
    numbered = tuple(_numbered(pattern, paths))
    return tuple(path for path in paths if any(matches(each, path) for each in numbered))


def hits(pattern: str, path: str) -> bool:
    """Whether what was typed means the path, or something the path lies in."""
    return _typed(pattern).search(f".{path}") is not None


def ignores(pattern: str, path: str) -> bool:
    """Whether an entry of a file's ignore list names the path."""
    return _ignored(pattern).fullmatch(path) is not None


def nearest(pattern: str, paths: Iterable[str], count: int = 3) -> tuple[str, ...]:
    """Runs of segments in the paths that look most like a pattern that hit nothing."""
    length = pattern.count(".") + 1
    runs = {run: None for path in paths for run in _runs(path.split("."), length)}
    return tuple(difflib.get_close_matches(pattern, runs, n=count, cutoff=0.5))


# Every segment brings the dot before it, so that `**` may stand for none and no name is cut.


@cache
def _whole(pattern: str) -> re.Pattern[str]:
    segments = pattern.split(".")
    return re.compile(
        "".join(r"(?:\.[^.]+)*" if each == "**" else _segment(each) for each in segments)
    )


@cache
def _typed(pattern: str) -> re.Pattern[str]:
    prefix = pattern.endswith("_")
    segments = (_segment(each) for each in f"{pattern}{'*' * prefix}".split("."))
    return re.compile("".join(segments) + r"(?=\.|$)")


@cache
def _ignored(pattern: str) -> re.Pattern[str]:
    return re.compile(".*".join(re.escape(piece) for piece in pattern.split("*")))


def _segment(segment: str) -> str:
    return r"\." + "[^.]*".join(re.escape(piece) for piece in segment.split("*"))


def _numbered(pattern: str, paths: Sequence[str]) -> Iterator[str]:
    """The pattern with its slices written out, block by block."""
    segments = pattern.split(".")
    found = ((at, _SLICE.fullmatch(segment)) for at, segment in enumerate(segments))
    at, slice_ = next(((at, match) for at, match in found if match), (0, None))
    if slice_ is None:
        yield pattern
        return
    start, stop = (int(bound) if bound else None for bound in slice_.groups())
    for number in range(_blocks(segments[:at], paths))[start:stop]:
        yield from _numbered(".".join([*segments[:at], str(number), *segments[at + 1 :]]), paths)


def _blocks(parent: list[str], paths: Sequence[str]) -> int:
    """How many numbered blocks the paths have below the parent."""
    inside = ".".join([*parent, "*", "**"])
    numbers = (path.split(".")[len(parent)] for path in paths if matches(inside, path))
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)


def _runs(segments: list[str], length: int) -> Iterator[str]:
    for start in range(len(segments) - length + 1):
        yield ".".join(segments[start : start + length])
