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

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffquant.errors import SourceError
from diffquant.sources._components import component_folder, components, fetch, fetch_small
from diffquant.sources._folders import COMPONENT, CONFIG, INDEX, LocalFolder, is_weights, read_json
from diffquant.sources._hub import opened
from diffquant.sources._reference import bundled_names, referenced
from diffquant.sources._weight_sets import (
    PREFERENCES,
    choose,
    named,
    sets_of,
    where_instead,
)

__all__ = [
    "COMPONENT",
    "CONFIG",
    "INDEX",
    "Checkpoint",
    "PipelineFolder",
    "bundled_names",
    "checkpoint",
    "pipeline",
    "read_json",
    "small_folder",
    "weight_sets",
]


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
        return components(self.index or {})


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
    reference = referenced(source)
    folder, file = opened(reference, revision, local_files_only)
    if file is None:
        folder = component_folder(folder, subfolder)
        chosen = choose(folder, reference.selector, PREFERENCES)
    else:
        chosen = named(folder, file)
    # small files first: a broken config must not cost a download of gigabytes
    sidecars = {name: folder.path(name) for name in folder.names() if folder.is_sidecar(name)}
    config = read_json(sidecars[CONFIG]) if CONFIG in sidecars else {}
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
    folder, file = opened(referenced(source), revision, local_files_only)
    names = folder.names()
    if file is None and INDEX in names:
        index = read_json(folder.path(INDEX))
        for name in components(index):
            fetch(folder, name, with_weights=name not in without_weights_of)
        return PipelineFolder(
            origin=source, root=folder.root, index=index, revision=folder.revision
        )
    if file is None and not any(map(is_weights, names)):
        raise SourceError(
            f"{folder.origin!r} is no pipeline: it holds neither {INDEX} nor weights",
            hint=where_instead(folder) or "the base pipeline is what `--model-path` names",
        )
    return PipelineFolder(origin=source, root=folder.root, index=None, revision=folder.revision)


def small_folder(source: str, *, subfolder: str, local_files_only: bool = False) -> Path:
    """The folder of a component without weights, a scheduler or a tokenizer, with its files here.

    A source is that folder, or a pipeline that has it as `subfolder`. Raises SourceError for a
    file, and what `pipeline` raises for what cannot be found.
    """
    folder, file = opened(referenced(source), None, local_files_only)
    if file is not None:
        raise SourceError(
            f"{source!r} is one file, and {subfolder!r} is read from a folder",
            hint=f"the folder is {folder.origin!r}",
        )
    found = component_folder(folder, subfolder)
    fetch_small(found)
    return found.root


def weight_sets(directory: Path) -> tuple[tuple[Path, ...], ...]:
    """Every set of weights in a directory that could be meant, by name, each in shard order.

    One set is: the shards of an index; numbered shards; Nunchaku's older pair of files;
    msModelSlim's `quant_model_weight*`; or a file alone. Of sets that differ only in a precision
    tag (`.fp16`) the untagged one counts. Pickles are never listed; shards that are missing are.
    """
    folder = LocalFolder(directory, str(directory))
    return tuple(tuple(folder.path(name) for name in found.files) for found in sets_of(folder))
