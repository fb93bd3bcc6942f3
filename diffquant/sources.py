"""Source string -> what lies there: files, sidecars, config, revision. The only hub client.

A source is read in this order:

  https://huggingface.co/org/repo[/tree|blob|resolve/revision/path]  a page of the hub
  ./folder  /folder  ~/folder  folder/file.safetensors               a path: anything that exists
  emoji_flux[/folder]                                                a bundled model
  org/repo[/folder][/file.safetensors]                               a repository of the hub

with `:Q4_K_M` behind it for the GGUF file of that quantization, and `@revision` behind a
repository for a branch, tag or commit. Whatever is taken from a repository in one call is taken
from one commit; pass `revision=result.revision` on to take more from the same one.
"""

import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from diffquant.errors import AmbiguousSourceError, OfflineError, SourceError, UsageError

INDEX = "model_index.json"
CONFIG = "config.json"
COMPONENT = "transformer"
MODELS = Path(__file__).parent / "models"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One component's stored weights, and what lies beside them.

    origin     the source as typed
    root       the directory the files lie in
    files      weights files, in shard order; empty for a directory with a config only
    sidecars   JSON files beside the weights, by name
    config     the parsed config.json beside the weights, {} when there is none
    revision   the hub commit everything was taken from; None for a local source
    """

    origin: str
    root: Path
    files: tuple[Path, ...]
    sidecars: Mapping[str, Path] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    revision: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineFolder:
    """A diffusers pipeline on this disk, or weights offered where a pipeline was asked for.

    index      the parsed model_index.json; None when there are weights but no such file, and then
               nothing was downloaded: `checkpoint` reads the same source
    revision   the hub commit everything was taken from; None for a local source
    """

    origin: str
    root: Path
    index: Mapping[str, Any] | None
    revision: str | None = None

    @property
    def is_weights_only(self) -> bool:
        return self.index is None

    @property
    def components(self) -> tuple[str, ...]:
        """Names of the components the pipeline is made of."""
        return _components(self.index or {})


def checkpoint(
    source: str,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    local_files_only: bool = False,
) -> Checkpoint:
    """The weights that `source` names, downloaded when they lie on the hub.

    A file is taken as it is, an index with its shards. In a directory one set of weights is chosen
    (see `weight_sets`): the only one, else the only one with an index, else the only `*-mixed`
    one. Where `source` is a whole pipeline the component `subfolder` (default: transformer) is
    meant. Raises SourceError when nothing fits, AmbiguousSourceError when several sets do,
    OfflineError when the hub is needed and out of reach.
    """
    reference = _reference(source)
    folder, file = _open(reference, revision, local_files_only)
    if file is None:
        folder = _component(folder, subfolder)
        chosen = _chosen(folder, reference.selector, _PREFERENCES)
    else:
        chosen = _named(folder, file)
    # small files first: a broken config must not cost a download of gigabytes
    sidecars = {name: folder.path(name) for name in folder.names() if folder.is_sidecar(name)}
    config = _json(sidecars[CONFIG]) if CONFIG in sidecars else {}
    return Checkpoint(
        origin=source,
        root=folder.root,
        files=tuple(folder.path(name) for name in chosen),
        sidecars=sidecars,
        config=config,
        revision=folder.revision,
    )


def pipeline(
    source: str,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    without_weights_of: frozenset[str] = frozenset(),
) -> PipelineFolder:
    """The pipeline that `source` names, downloaded when it lies on the hub.

    Only what its components need is downloaded: small files, and one set of safetensors each; no
    weights of the components in `without_weights_of`, which an override replaces. Raises as
    `checkpoint` does.
    """
    folder, file = _open(_reference(source), revision, local_files_only)
    names = folder.names()
    if file is None and INDEX in names:
        index = _json(folder.path(INDEX))
        for name in _components(index):
            _fetch(folder, name, with_weights=name not in without_weights_of)
        return PipelineFolder(
            origin=source, root=folder.root, index=index, revision=folder.revision
        )
    if file is None and not any(map(_is_weights, names)):
        raise SourceError(
            f"{folder.origin!r} is no pipeline: it holds neither {INDEX} nor weights",
            hint=_where_instead(folder) or "the base pipeline is what `--model-path` names",
        )
    return PipelineFolder(origin=source, root=folder.root, index=None, revision=folder.revision)


def weight_sets(directory: Path) -> tuple[tuple[Path, ...], ...]:
    """Every set of weights in a directory that could be meant, by name, each in shard order.

    One set is: the shards of an index; numbered shards; Nunchaku's older pair of files;
    msModelSlim's `quant_model_weight*`; or a file alone. Of sets that differ only in a precision
    tag (`.fp16`) the untagged one counts. Pickles are never listed; shards that are missing are.
    """
    folder = _LocalFolder(directory, str(directory))
    return tuple(tuple(folder.path(name) for name in found.files) for found in _sets(folder))


def bundled_names() -> tuple[str, ...]:
    """Models that come with the package."""
    if not MODELS.is_dir():
        return ()
    folders = (entry for entry in MODELS.iterdir() if entry.is_dir())
    return tuple(sorted(entry.name for entry in folders if entry.name[0] not in "._"))


# Reading what was typed.


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reference:
    """A source taken apart: a path on this disk, or a repository and a place inside it."""

    origin: str
    path: Path | None = None
    repository: str = ""
    inside: str = ""
    selector: str | None = None
    revision: str | None = None


_SUFFIXES = re.compile(r"(?P<body>[^@:]+)(:(?P<selector>[^@:/]+))?(@(?P<revision>[^@:]+))?")
_REPOSITORY = re.compile(r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(/(?P<inside>.+))?")
_FORMS = "a path, org/repo, org/repo/folder/file.safetensors or org/repo@revision"


def _reference(source: str) -> _Reference:
    if re.match(r"\w+://", source):
        return _from_url(source)
    if source and Path(source).expanduser().exists():
        return _Reference(origin=source, path=Path(source).expanduser())
    parts = _SUFFIXES.fullmatch(source)
    if parts is None:
        raise SourceError(f"{source!r} is no source", hint=f"a source is {_FORMS}")
    body, selector, revision = parts["body"], parts["selector"], parts["revision"]
    path = _on_disk(body)
    if path is not None and revision is not None:
        raise SourceError(
            f"{source!r}: the local path {body!r} has no revisions", hint=f"leave out `@{revision}`"
        )
    if path is not None:
        return _Reference(origin=body, path=path, selector=selector)
    place = _REPOSITORY.fullmatch(body.rstrip("/"))
    if place is None or (place["inside"] is None and _is_weights(body)):
        near = get_close_matches(body, bundled_names(), n=1) or _nearest_paths(Path(body))
        raise SourceError(
            f"{source!r} is no file or directory here, no bundled model and no repository name",
            hint=f"did you mean '{near[0]}'?" if near else f"a source is {_FORMS}",
        )
    return _Reference(
        origin=source,
        repository=place["repository"],
        inside=place["inside"] or "",
        selector=selector,
        revision=revision,
    )


def _on_disk(body: str) -> Path | None:
    """The path that `body` means, bundled models included; None when it must be a repository."""
    path = Path(body).expanduser()
    if path.exists():
        return path
    name, _, rest = body.partition("/")
    is_bundled = name in bundled_names()
    if is_bundled:
        path = MODELS / name / rest
    if is_bundled and path.exists():
        return path
    if is_bundled or body.startswith((".", "/", "~")):
        near = _nearest_paths(path)
        raise SourceError(
            f"no file or directory '{path}'", hint=f"did you mean '{near[0]}'?" if near else None
        )
    return None


def _nearest_paths(path: Path) -> list[Path]:
    """Paths that are here and spelled alike, where the path leaves the disk."""
    while not path.parent.exists():
        path = path.parent
    if not path.parent.is_dir():
        return [path.parent]
    return [path.parent / name for name in get_close_matches(path.name, os.listdir(path.parent))]


def _from_url(source: str) -> _Reference:
    url = urlsplit(source)
    hosts = {"huggingface.co", "www.huggingface.co", "hf.co", urlsplit(_endpoint()).netloc}
    parts = [unquote(part) for part in url.path.strip("/").split("/")]
    is_place = len(parts) == 2 or (len(parts) > 3 and parts[2] in ("tree", "blob", "resolve"))
    if url.netloc not in hosts or not is_place or parts[0] in ("datasets", "spaces"):
        raise SourceError(
            f"{source!r} is no page of a model on the hub",
            hint="like https://huggingface.co/org/repo or …/org/repo/blob/main/file.safetensors",
        )
    return _Reference(
        origin=source,
        repository="/".join(parts[:2]),
        inside="/".join(parts[4:]),
        revision=parts[3] if len(parts) > 2 else None,
    )


# Folders, on this disk or on the hub.


class _Folder(Protocol):
    """A directory of a source.

    origin      how messages call it
    root        where it lies, or will lie, on this disk
    is_partial  only what an earlier download left here can be seen
    """

    @property
    def origin(self) -> str: ...
    @property
    def root(self) -> Path: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def is_partial(self) -> bool: ...
    def names(self) -> list[str]: ...
    def folders(self) -> list[str]: ...
    def inside(self, name: str) -> "_Folder": ...
    def size(self, name: str) -> int | None: ...
    def is_sidecar(self, name: str) -> bool: ...
    def path(self, name: str) -> Path: ...


@dataclass(frozen=True, slots=True)
class _LocalFolder:
    root: Path
    origin: str

    @property
    def revision(self) -> None:
        return None

    @property
    def is_partial(self) -> bool:
        return False

    def names(self) -> list[str]:
        # a broken link counts: it is named in the error instead of vanishing
        return sorted(entry.name for entry in self.root.iterdir() if not entry.is_dir())

    def folders(self) -> list[str]:
        return sorted(entry.name for entry in self.root.iterdir() if entry.is_dir())

    def inside(self, name: str) -> "_LocalFolder":
        return _LocalFolder(self.root / name, f"{self.origin.rstrip('/')}/{name}")

    def size(self, name: str) -> int | None:
        path = self.root / name
        return path.stat().st_size if path.exists() else None

    def is_sidecar(self, name: str) -> bool:
        return name.endswith(".json")

    def path(self, name: str) -> Path:
        return self.root / name


@dataclass(frozen=True, slots=True, kw_only=True)
class _Repository:
    """One commit of a repository: its files, and where the cache keeps what is downloaded.

    sizes     every file by its path in the repository, with its bytes where they are known
    is_cache  the hub was not asked: `sizes` holds what an earlier download left here
    """

    name: str
    commit: str
    snapshot: Path
    sizes: Mapping[str, int | None]
    is_cache: bool

    def download(self, file: str) -> Path:
        here = self.snapshot / file
        if not here.exists():
            from huggingface_hub import hf_hub_download

            with _hub_errors(self.name, self.commit):
                hf_hub_download(self.name, file, revision=self.commit, endpoint=_endpoint())
        return here


@dataclass(frozen=True, slots=True)
class _HubFolder:
    repository: _Repository
    prefix: str = ""  # "" or "folder/"

    @property
    def origin(self) -> str:
        return f"{self.repository.name}/{self.prefix}".rstrip("/")

    @property
    def root(self) -> Path:
        return self.repository.snapshot / self.prefix

    @property
    def revision(self) -> str:
        return self.repository.commit

    @property
    def is_partial(self) -> bool:
        return self.repository.is_cache

    def names(self) -> list[str]:
        return sorted(name for name in self._below() if "/" not in name)

    def folders(self) -> list[str]:
        return sorted({name.partition("/")[0] for name in self._below() if "/" in name})

    def inside(self, name: str) -> "_HubFolder":
        return _HubFolder(self.repository, f"{self.prefix}{name}/")

    def size(self, name: str) -> int | None:
        return self.repository.sizes[self.prefix + name]

    def is_sidecar(self, name: str) -> bool:
        return any(PurePosixPath(name).match(pattern) for pattern in _HUB_SIDECARS)

    def path(self, name: str) -> Path:
        return self.repository.download(self.prefix + name)

    def _below(self) -> Iterator[str]:
        for name in self.repository.sizes:
            if name.startswith(self.prefix):
                yield name.removeprefix(self.prefix)


#: JSON files that formats read; the others of a repository are not downloaded beside weights.
_HUB_SIDECARS = (
    CONFIG,
    "*.index.json",
    "quant_model_description*.json",
    "hf_quant_config.json",
    "quantization_config.json",
    "*quantization_map.json",
)


def _open(
    reference: _Reference, revision: str | None, local_files_only: bool
) -> tuple[_Folder, str | None]:
    """The folder a reference leads to, and the file in it when it names one."""
    if (path := reference.path) is not None:
        if path.is_dir():
            return _LocalFolder(path, reference.origin), None
        return _LocalFolder(path.parent, str(path.parent)), path.name
    revision = _one_revision(reference, revision)
    repository = _repository(reference, revision, local_files_only)
    inside = reference.inside.strip("/")
    if not inside:
        return _HubFolder(repository), None
    folder, _, file = inside.rpartition("/")
    if inside in repository.sizes:
        return _HubFolder(repository, f"{folder}/" if folder else ""), file
    if any(name.startswith(f"{inside}/") for name in repository.sizes):
        return _HubFolder(repository, f"{inside}/"), None
    if repository.is_cache:
        raise _not_here(f"{repository.name}/{inside}", repository.name)
    known = {*repository.sizes, *(str(PurePosixPath(name).parent) for name in repository.sizes)}
    near = get_close_matches(inside, sorted(known - {"."}), n=3)
    raise SourceError(
        f"repository {repository.name!r} has no file or folder {inside!r}",
        hint=f"near are: {', '.join(near)}" if near else f"look at {_endpoint()}/{repository.name}",
    )


def _one_revision(reference: _Reference, revision: str | None) -> str | None:
    """The revision that was asked for; a full commit may pin the branch that was typed."""
    typed = reference.revision
    if None not in (typed, revision) and typed != revision and not _is_commit(revision or ""):
        raise UsageError(
            f"{reference.origin!r} asks for revision {typed!r} and the revision given is "
            f"{revision!r}",
            hint="give one of them",
        )
    return revision or typed


def _component(folder: _Folder, subfolder: str | None) -> _Folder:
    """Where the component lies: inside a pipeline its own folder, else the folder itself."""
    is_pipeline = INDEX in folder.names()
    wanted = subfolder or (COMPONENT if is_pipeline else None)
    if wanted is not None and wanted in folder.folders():
        return folder.inside(wanted)
    if subfolder is not None and is_pipeline:
        raise SourceError(
            f"the pipeline {folder.origin!r} has no folder {subfolder!r}",
            hint=f"it has: {', '.join(folder.folders())}",
        )
    return folder


# Choosing one set of weights.


@dataclass(frozen=True, slots=True, kw_only=True)
class _WeightSet:
    """Files that are one model together.

    name        what the set would be called as one file
    index       the index that lists them, if one does
    missing     files that belong to the set and are not there
    """

    name: str
    files: tuple[str, ...]
    index: str | None = None
    missing: tuple[str, ...] = ()


_WEIGHTS = (".safetensors", ".gguf")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_WEIGHTS_INDEX = re.compile(r"(?P<stem>.+)\.safetensors\.index(?P<tag>\.\w+)?\.json")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})(?P<tail>\..+)")
_NUNCHAKU_PAIR = ("transformer_blocks.safetensors", "unquantized_layers.safetensors")
#: Precision tags of copies of one model, the best first.
_TAGS = ("bf16", "fp32", "fp16", "non_ema")
_TAG = re.compile(rf"\.({'|'.join(_TAGS)})(?=[.-])")

_NO_PICKLES = "pickles can run code; save the weights again as safetensors and pass that file"

Preference = Callable[[_WeightSet], bool]

#: Asked in this order: the first that exactly one set fulfils decides.
_PREFERENCES: tuple[Preference, ...] = (
    lambda found: True,
    lambda found: found.index is not None,
    lambda found: found.name.endswith("-mixed.safetensors"),
)
_CANONICAL = ("diffusion_pytorch_model.safetensors", "model.safetensors")
_PIPELINE_PREFERENCES: tuple[Preference, ...] = (
    lambda found: found.name in _CANONICAL,
    *_PREFERENCES,
)


def _named(folder: _Folder, file: str) -> tuple[str, ...]:
    """The files an explicitly named file stands for: itself, or the shards of an index."""
    if _WEIGHTS_INDEX.fullmatch(file):
        return _whole(folder, _indexed_set(folder, file))
    if file.endswith(_PICKLES):
        raise SourceError(f"{folder.origin + '/' + file!r} is a pickle", hint=_NO_PICKLES)
    if file.endswith(".json"):
        raise SourceError(
            f"{folder.origin + '/' + file!r} holds no weights", hint=f"name {folder.origin!r}"
        )
    return (file,)


def _chosen(
    folder: _Folder, selector: str | None, preferences: Iterable[Preference]
) -> tuple[str, ...]:
    """The files of the set that is meant; none where there is a config and nothing else."""
    sets = [found for found in _sets(folder) if selector is None or _matches(found, selector)]
    for prefers in preferences:
        preferred = [found for found in sets if prefers(found)]
        if len(preferred) == 1:
            return _whole(folder, preferred[0])
    if sets:
        raise _ambiguous(folder, sets)
    if selector is not None:
        raise SourceError(
            f"{folder.origin!r} has no GGUF file for {selector!r}",
            hint=f"it has: {', '.join(found.name for found in _sets(folder)) or 'no weights'}",
        )
    if CONFIG in folder.names() and not folder.is_partial:
        return ()
    if folder.is_partial:
        raise _not_here(f"the weights of {folder.origin}", folder.origin)
    raise SourceError(
        f"{folder.origin!r} holds no safetensors or GGUF weights",
        hint=_where_instead(folder) or f"it holds: {', '.join(folder.names()) or 'nothing'}",
    )


def _sets(folder: _Folder) -> list[_WeightSet]:
    """Every set in the folder, by name; each file belongs to the first grouping that claims it."""
    free = [name for name in folder.names() if _is_weights(name)]
    found: list[_WeightSet] = []
    for grouping in (_indexed, _nunchaku_pair, _modelslim, _numbered, _alone):
        sets = grouping(folder, free)
        claimed = {name for one in sets for name in one.files}
        free = [name for name in free if name not in claimed]
        found += sets
    return sorted(_without_copies(found), key=lambda one: one.name)


def _indexed(folder: _Folder, free: list[str]) -> list[_WeightSet]:
    """The sets of all indexes, but for one whose shards were never brought here."""
    names = [name for name in folder.names() if _WEIGHTS_INDEX.fullmatch(name)]
    sets = [_indexed_set(folder, name) for name in names]
    return [one for one in sets if len(sets) == 1 or set(one.files) - set(one.missing)]


def _nunchaku_pair(folder: _Folder, free: list[str]) -> list[_WeightSet]:
    if not set(_NUNCHAKU_PAIR) <= set(free):
        return []
    return [_WeightSet(name=_NUNCHAKU_PAIR[0], files=_NUNCHAKU_PAIR)]


def _modelslim(folder: _Folder, free: list[str]) -> list[_WeightSet]:
    files = tuple(name for name in free if name.startswith("quant_model_weight"))
    return [_WeightSet(name="quant_model_weight.safetensors", files=files)] if files else []


def _numbered(folder: _Folder, free: list[str]) -> list[_WeightSet]:
    """Shards that count themselves, as GGUF splits do and safetensors whose index was lost."""
    groups: dict[tuple[str, str, str], set[str]] = {}
    for name in free:
        if (shard := _SHARD.fullmatch(name)) is not None:
            groups.setdefault((shard["stem"], shard["total"], shard["tail"]), set()).add(name)
    sets = []
    for (stem, total, tail), here in groups.items():
        files = tuple(f"{stem}-{n:05}-of-{total}{tail}" for n in range(1, int(total) + 1))
        missing = tuple(name for name in files if name not in here)
        sets.append(_WeightSet(name=stem + tail, files=files, missing=missing))
    return sets


def _alone(folder: _Folder, free: list[str]) -> list[_WeightSet]:
    return [_WeightSet(name=name, files=(name,)) for name in free]


def _indexed_set(folder: _Folder, index: str) -> _WeightSet:
    path = folder.path(index)
    weight_map = _json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"'{path}' lists no tensors: its weight_map is missing or empty")
    files = sorted({str(name) for name in weight_map.values()})
    for name in files:
        if PurePosixPath(name).name != name or not name.endswith(".safetensors"):
            raise SourceError(f"'{path}' lists the shard {name!r}, no safetensors file beside it")
    named = _WEIGHTS_INDEX.fullmatch(index)
    assert named is not None
    here = set(folder.names())
    return _WeightSet(
        name=f"{named['stem']}{named['tag'] or ''}.safetensors",
        files=tuple(files),
        index=index,
        missing=tuple(name for name in files if name not in here),
    )


def _without_copies(sets: list[_WeightSet]) -> Iterator[_WeightSet]:
    """Of sets that differ in a precision tag only, the untagged one, else the most precise."""
    families: dict[str, list[_WeightSet]] = {}
    for one in sets:
        families.setdefault(_TAG.sub("", one.name), []).append(one)
    for family, copies in families.items():
        plain = [one for one in copies if one.name == family]
        yield from plain or [min(copies, key=lambda one: _tag_rank(one.name))]


def _tag_rank(name: str) -> int:
    found = _TAG.search(name)
    return _TAGS.index(found[1]) if found else -1


def _whole(folder: _Folder, found: _WeightSet) -> tuple[str, ...]:
    """The files of a set. Raises SourceError when one is missing."""
    if not found.missing:
        return found.files
    what = f"{found.missing[0]!r}, shard of {found.index or found.name!r} in {folder.origin!r}"
    if folder.is_partial:
        raise _not_here(what, folder.origin)
    raise SourceError(
        f"{len(found.missing)} of {len(found.files)} shards are missing, first {what}",
        hint="download the folder again; `hf download` skips what is complete",
    )


def _matches(found: _WeightSet, selector: str) -> bool:
    """Whether the name of a GGUF set has the quantization as a word: Q4_K is not Q4_K_M."""
    word = re.compile(rf"(?<![a-z0-9]){re.escape(selector)}(?![a-z0-9_])", re.IGNORECASE)
    stem, _, suffix = found.name.rpartition(".")
    return suffix == "gguf" and word.search(stem) is not None


def _ambiguous(folder: _Folder, sets: list[_WeightSet]) -> AmbiguousSourceError:
    listed = "\n".join(f"  {one.name}  {_total(folder, one)}" for one in sets)
    return AmbiguousSourceError(
        f"{folder.origin!r} holds {len(sets)} sets of weights where one was needed:\n{listed}",
        hint=f"name one of them: `{folder.origin}/{sets[0].index or sets[0].files[0]}`",
    )


def _total(folder: _Folder, found: _WeightSet) -> str:
    there = (name for name in found.files if name not in found.missing)
    size = sum(folder.size(name) or 0 for name in there)
    shards = f" in {len(found.files)} files" if len(found.files) > 1 else ""
    return (f"{size / 1e9:.2f} GB" if size >= 1e7 else f"{size / 1e6:.2f} MB") + shards


def _where_instead(folder: _Folder) -> str | None:
    """Where the weights of a folder without any might be."""
    pickles = [name for name in folder.names() if name.endswith(_PICKLES)]
    if pickles:
        return f"{pickles[0]!r} is a pickle, and {_NO_PICKLES}"
    deeper = [name for name in folder.folders() if name[0] != "."]
    return f"it has folders, name one: `{folder.origin}/{deeper[0]}`" if deeper else None


def _is_weights(name: str) -> bool:
    return name.endswith(_WEIGHTS)


# Fetching a pipeline.

#: What the components of a pipeline never need: other frameworks' weights, pickles, pictures.
_FOREIGN = (*_PICKLES, ".msgpack", ".onnx", ".onnx_data", ".pb", ".h5", ".ot", ".xml", ".tflite")


def _components(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Names whose entry is a library and a class; [null, null] is a component left out."""
    return tuple(
        name for name, entry in index.items() if isinstance(entry, list) and None not in entry
    )


def _fetch(folder: _Folder, name: str, *, with_weights: bool) -> None:
    """Bring a component's files here: the small ones, and one set of weights."""
    if name not in folder.folders():
        if not with_weights:
            return
        if folder.is_partial:
            raise _not_here(f"component {name!r} of {folder.origin}", folder.origin)
        raise SourceError(
            f"{INDEX} of {folder.origin!r} names the component {name!r}, but it has no such folder",
            hint=f"`--{name.replace('_', '-')}-path` takes it from elsewhere",
        )
    component = folder.inside(name)
    names = component.names()
    for small in names:
        if not (_is_weights(small) or small.endswith(_FOREIGN) or _WEIGHTS_INDEX.fullmatch(small)):
            component.path(small)
    # models have a config.json; tokenizers, schedulers and processors call theirs otherwise
    if with_weights and (CONFIG in names or any(map(_is_weights, names))):
        _fetch_weights(component)


def _fetch_weights(component: _Folder) -> None:
    files = _chosen(component, None, _PIPELINE_PREFERENCES)
    pickles = [name for name in component.names() if name.endswith(_PICKLES)]
    if pickles and not files:
        raise SourceError(f"{component.origin!r} has pickled weights only", hint=_NO_PICKLES)
    for file in files:
        component.path(file)


# The hub.


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def _repository(reference: _Reference, revision: str | None, local_files_only: bool) -> _Repository:
    """The commit that `revision` (default: the main branch) is now, and its files.

    Without the hub: the commit it was when something was last downloaded, and what is left of it.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.file_download import repo_folder_name

    name = reference.repository
    store = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="model")
    branch = revision or constants.DEFAULT_REVISION
    if local_files_only or constants.is_offline_mode():
        return _cached(name, store, branch)
    try:
        with _hub_errors(name, branch):
            info = HfApi(endpoint=_endpoint()).model_info(
                name, revision=branch, files_metadata=True, timeout=constants.HF_HUB_ETAG_TIMEOUT
            )
    except OfflineError as error:
        if not (store / "snapshots").is_dir():
            raise
        _log.warning("%s; using what was downloaded earlier", error.what)
        return _cached(name, store, branch)
    commit = info.sha or branch
    _remember(store, branch, commit)
    return _Repository(
        name=name,
        commit=commit,
        snapshot=store / "snapshots" / commit,
        sizes={file.rfilename: file.size for file in info.siblings or ()},
        is_cache=False,
    )


def _cached(name: str, store: Path, branch: str) -> _Repository:
    reference = store / "refs" / branch
    commit = reference.read_text().strip() if reference.is_file() else branch
    snapshot = store / "snapshots" / commit
    if not snapshot.is_dir():
        raise _not_here(name if branch == "main" else f"{name}@{branch}", name)
    files = (path for path in snapshot.rglob("*") if path.is_file())
    return _Repository(
        name=name,
        commit=commit,
        snapshot=snapshot,
        sizes={path.relative_to(snapshot).as_posix(): path.stat().st_size for path in files},
        is_cache=True,
    )


def _remember(store: Path, branch: str, commit: str) -> None:
    """Note what a branch is now, where huggingface_hub notes it, so that offline runs know."""
    reference = store / "refs" / branch
    if _is_commit(branch) or (reference.is_file() and reference.read_text().strip() == commit):
        return
    try:
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)
    except OSError as error:
        _log.warning("the cache cannot be written: %s", error)


def _is_commit(revision: str) -> bool:
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def _not_here(what: str, place: str) -> OfflineError:
    name = "/".join(place.split("/")[:2])
    return OfflineError(
        f"{what} is not on this machine, and the hub is out of reach or ruled out (offline)",
        hint=f"`hf download {name}` with a network, or `--model-path DIRECTORY` for a copy of yours",
    )


@contextmanager
def _hub_errors(name: str, revision: str) -> Iterator[None]:
    """Turn what huggingface_hub raises into our errors, each with what to do."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    # hub 1 speaks httpx and hub 2 httpx2; the base of its own error is that of all transport errors
    transport: type[Exception] = HfHubHTTPError.__mro__[1]
    try:
        yield
    except (transport, OSError, HFValidationError) as error:
        raise _explained(error, name, revision) from error


def _explained(error: Exception, name: str, revision: str) -> SourceError:
    from huggingface_hub import errors

    endpoint = _endpoint()
    if isinstance(error, errors.GatedRepoError):
        return SourceError(
            f"repository {name!r} is gated, and this machine has no access to it",
            hint=f"accept its terms at {endpoint}/{name}, then `hf auth login`",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return SourceError(
            f"{name!r} is no directory here and no repository on {endpoint}, or a private one",
            hint="check the spelling; for a private repository `hf auth login`",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceError(
            f"repository {name!r} has no revision {revision!r}",
            hint=f"the branches and tags are listed at {endpoint}/{name}/tree/main",
        )
    if isinstance(error, errors.HfHubHTTPError):
        return SourceError(
            f"{endpoint} refused {name!r} with status {error.response.status_code}",
            hint="`hf auth whoami` shows whether this machine is logged in; or try again later",
        )
    if isinstance(error, errors.HFValidationError):
        return SourceError(f"{name!r} is no repository name", hint=f"a source is {_FORMS}")
    return OfflineError(
        f"{endpoint} cannot be reached for {name!r}: {error}",
        hint=f"`hf download {name}` with a network, or `--model-path DIRECTORY` for a copy of yours",
    )


def _json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises SourceError with line and column."""
    try:
        found = json.loads(path.read_bytes())
    except json.JSONDecodeError as error:
        raise SourceError(
            f"'{path}' is not valid JSON at line {error.lineno}, column {error.colno}: {error.msg}",
            hint="correct it, or download it again",
        ) from error
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"'{path}' cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise SourceError(
            f"'{path}' holds a JSON {type(found).__name__} where an object was needed"
        )
    return found
