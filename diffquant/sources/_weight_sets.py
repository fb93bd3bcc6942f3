"""Which files of a folder are one model, and which of several models is meant."""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from diffquant.errors import AmbiguousSourceError, SourceError
from diffquant.sources._folders import CONFIG, Folder, is_weights, not_here, read_json


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightSet:
    """Files that are one model together.

    name        what the set would be called as one file
    index       the index that lists them, if one does
    missing     files that belong to the set and are not there
    """

    name: str
    files: tuple[str, ...]
    index: str | None = None
    missing: tuple[str, ...] = ()


PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WEIGHTS_INDEX = re.compile(r"(?P<stem>.+)\.safetensors\.index(?P<tag>\.\w+)?\.json")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<tail>\..+)")
_NUNCHAKU_PAIR = ("transformer_blocks.safetensors", "unquantized_layers.safetensors")
#: Precision tags of copies of one model, the best first.
_TAGS = ("bf16", "fp32", "fp16", "non_ema")
_TAG = re.compile(rf"\.({'|'.join(_TAGS)})(?=[.-])")

NO_PICKLES = "pickles can run code; save the weights again as safetensors and pass that file"

Preference = Callable[[WeightSet], bool]

#: Asked in this order: the first that exactly one set fulfils decides.
PREFERENCES: tuple[Preference, ...] = (
    lambda found: True,
    lambda found: found.index is not None,
    lambda found: found.name.endswith("-mixed.safetensors"),
)
_CANONICAL = ("diffusion_pytorch_model.safetensors", "model.safetensors")
PIPELINE_PREFERENCES: tuple[Preference, ...] = (
    lambda found: found.name in _CANONICAL,
    *PREFERENCES,
)


def named(folder: Folder, file: str) -> tuple[str, ...]:
    """The files an explicitly named file stands for: itself, or the shards of an index."""
    if WEIGHTS_INDEX.fullmatch(file):
        return _whole(folder, _indexed_set(folder, file))
    if file.endswith(PICKLES):
        raise SourceError(f"{folder.origin + '/' + file!r} is a pickle", hint=NO_PICKLES)
    if file.endswith(".json"):
        raise SourceError(
            f"{folder.origin + '/' + file!r} holds no weights", hint=f"name {folder.origin!r}"
        )
    return (file,)


def choose(
    folder: Folder, selector: str | None, preferences: Iterable[Preference]
) -> tuple[str, ...]:
    """The files of the set that is meant; none where there is a config and nothing else."""
    sets = [found for found in sets_of(folder) if selector is None or _matches(found, selector)]
    for prefers in preferences:
        preferred = [found for found in sets if prefers(found)]
        if len(preferred) == 1:
            return _whole(folder, preferred[0])
    if sets:
        raise _ambiguous(folder, sets)
    if selector is not None:
        raise SourceError(
            f"{folder.origin!r} has no GGUF file for {selector!r}",
            hint=f"it has: {', '.join(found.name for found in sets_of(folder)) or 'no weights'}",
        )
    if CONFIG in folder.names() and not folder.is_partial:
        _require_no_pickles(folder)
        return ()
    if folder.is_partial:
        raise not_here(f"the weights of {folder.origin}", folder.origin)
    raise SourceError(
        f"{folder.origin!r} holds no safetensors or GGUF weights",
        hint=where_instead(folder) or f"it holds: {', '.join(folder.names()) or 'nothing'}",
    )


def _require_no_pickles(folder: Folder) -> None:
    """Raises SourceError for weights that are there and cannot be read."""
    if any(name.endswith(PICKLES) for name in folder.names()):
        raise SourceError(f"{folder.origin!r} has pickled weights only", hint=NO_PICKLES)


def sets_of(folder: Folder) -> list[WeightSet]:
    """Every set in the folder, by name; each file belongs to the first grouping that claims it."""
    free = [name for name in folder.names() if is_weights(name)]
    found: list[WeightSet] = []
    for grouping in (_indexed, _nunchaku_pair, _modelslim, _numbered, _alone):
        sets = grouping(folder, free)
        claimed = {name for one in sets for name in one.files}
        free = [name for name in free if name not in claimed]
        found += sets
    return sorted(_without_copies(found), key=lambda one: one.name)


def _indexed(folder: Folder, free: list[str]) -> list[WeightSet]:
    """The sets of all indexes, but for one whose shards were never brought here."""
    names = [name for name in folder.names() if WEIGHTS_INDEX.fullmatch(name)]
    sets = [_indexed_set(folder, name) for name in names]
    return [one for one in sets if len(sets) == 1 or set(one.files) - set(one.missing)]


def _nunchaku_pair(folder: Folder, free: list[str]) -> list[WeightSet]:
    if not set(_NUNCHAKU_PAIR) <= set(free):
        return []
    return [WeightSet(name=_NUNCHAKU_PAIR[0], files=_NUNCHAKU_PAIR)]


def _modelslim(folder: Folder, free: list[str]) -> list[WeightSet]:
    files = tuple(name for name in free if name.startswith("quant_model_weight"))
    return [WeightSet(name="quant_model_weight.safetensors", files=files)] if files else []


def _numbered(folder: Folder, free: list[str]) -> list[WeightSet]:
    """Shards that count themselves, as GGUF splits do and safetensors whose index was lost."""
    groups: dict[tuple[str, str, str], set[str]] = {}
    for name in free:
        if (shard := _SHARD.fullmatch(name)) is not None:
            groups.setdefault((shard["stem"], shard["total"], shard["tail"]), set()).add(name)
    sets = []
    for (stem, total, tail), here in groups.items():
        files = tuple(f"{stem}-{n:05}-of-{total}{tail}" for n in range(1, int(total) + 1))
        missing = tuple(name for name in files if name not in here)
        sets.append(WeightSet(name=stem + tail, files=files, missing=missing))
    return sets


def _alone(folder: Folder, free: list[str]) -> list[WeightSet]:
    return [WeightSet(name=name, files=(name,)) for name in free]


def _indexed_set(folder: Folder, index: str) -> WeightSet:
    path = folder.path(index)
    weight_map = read_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"'{path}' lists no tensors: its weight_map is missing or empty")
    files = sorted({str(name) for name in weight_map.values()})
    for name in files:
        if PurePosixPath(name).name != name or not name.endswith(".safetensors"):
            raise SourceError(f"'{path}' lists the shard {name!r}, no safetensors file beside it")
    named = WEIGHTS_INDEX.fullmatch(index)
    assert named is not None
    here = set(folder.names())
    return WeightSet(
        name=f"{named['stem']}{named['tag'] or ''}.safetensors",
        files=tuple(files),
        index=index,
        missing=tuple(name for name in files if name not in here),
    )


def _without_copies(sets: list[WeightSet]) -> Iterator[WeightSet]:
    """Of sets that differ in a precision tag only, the untagged one, else the most precise."""
    families: dict[str, list[WeightSet]] = {}
    for one in sets:
        families.setdefault(_TAG.sub("", one.name), []).append(one)
    for family, copies in families.items():
        plain = [one for one in copies if one.name == family]
        yield from plain or [min(copies, key=lambda one: _tag_rank(one.name))]


def _tag_rank(name: str) -> int:
    found = _TAG.search(name)
    return _TAGS.index(found[1]) if found else -1


def _whole(folder: Folder, found: WeightSet) -> tuple[str, ...]:
    """The files of a set. Raises SourceError when one is missing."""
    if not found.missing:
        return found.files
    what = f"{found.missing[0]!r}, shard of {found.index or found.name!r} in {folder.origin!r}"
    if folder.is_partial:
        raise not_here(what, folder.origin)
    raise SourceError(
        f"{len(found.missing)} of {len(found.files)} shards are missing, first {what}",
        hint="download the folder again; `hf download` skips what is complete",
    )


def _matches(found: WeightSet, selector: str) -> bool:
    """Whether the name of a GGUF set has the quantization as a word: Q4_K is not Q4_K_M."""
    word = re.compile(rf"(?<![a-z0-9]){re.escape(selector)}(?![a-z0-9_])", re.IGNORECASE)
    stem, _, suffix = found.name.rpartition(".")
    return suffix == "gguf" and word.search(stem) is not None


def _ambiguous(folder: Folder, sets: list[WeightSet]) -> AmbiguousSourceError:
    listed = "\n".join(f"  {one.name}  {_total(folder, one)}" for one in sets)
    return AmbiguousSourceError(
        f"{folder.origin!r} holds {len(sets)} sets of weights where one was needed:\n{listed}",
        hint=f"name one of them: `{folder.origin}/{sets[0].index or sets[0].files[0]}`",
    )


def _total(folder: Folder, found: WeightSet) -> str:
    there = (name for name in found.files if name not in found.missing)
    size = sum(folder.size(name) or 0 for name in there)
    shards = f" in {len(found.files)} files" if len(found.files) > 1 else ""
    return (f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB") + shards


def where_instead(folder: Folder) -> str | None:
    """Where the weights of a folder without any might be."""
    pickles = [name for name in folder.names() if name.endswith(PICKLES)]
    if pickles:
        return f"{pickles[0]!r} is a pickle, and {NO_PICKLES}"
    deeper = [name for name in folder.folders() if name[0] != "."]
    return f"it has folders, name one: `{folder.origin}/{deeper[0]}`" if deeper else None
