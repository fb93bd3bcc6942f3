"""The components of a pipeline: where each lies, and what of it must be here to run."""

from collections.abc import Mapping
from typing import Any

from diffquant.errors import SourceError
from diffquant.sources._folders import COMPONENT, CONFIG, INDEX, Folder, is_weights, not_here
from diffquant.sources._weight_sets import (
    PICKLES,
    PIPELINE_PREFERENCES,
    WEIGHTS_INDEX,
    choose,
)

#: What the components of a pipeline never need: other frameworks' weights, pickles, pictures.
_FOREIGN = (*PICKLES, ".msgpack", ".onnx", ".onnx_data", ".pb", ".h5", ".ot", ".xml", ".tflite")


def components(index: Mapping[str, Any]) -> tuple[str, ...]:
    """Names whose entry is a library and a class; [null, null] is a component left out."""
    return tuple(
        name for name, entry in index.items() if isinstance(entry, list) and None not in entry
    )


def fetch(folder: Folder, name: str, *, with_weights: bool) -> None:
    """Bring a component's files here: the small ones, and one set of weights."""
    if name not in folder.folders():
        if not with_weights:
            return
        if folder.is_partial:
            raise not_here(f"component {name!r} of {folder.origin}", folder.origin)
        raise SourceError(
            f"{INDEX} of {folder.origin!r} names the component {name!r}, but it has no such folder",
            hint=f"`--{name.replace('_', '-')}-path` takes it from elsewhere",
        )
    component = folder.inside(name)
    fetch_small(component)
    names = component.names()
    # models have a config.json; tokenizers, schedulers and processors call theirs otherwise
    if with_weights and (CONFIG in names or any(map(is_weights, names))):
        _fetch_weights(component)


def fetch_small(component: Folder) -> None:
    """Bring the files here that are no weights."""
    for small in component.names():
        if not (is_weights(small) or small.endswith(_FOREIGN) or WEIGHTS_INDEX.fullmatch(small)):
            component.path(small)


def _fetch_weights(component: Folder) -> None:
    for file in choose(component, None, PIPELINE_PREFERENCES):
        component.path(file)


def component_folder(folder: Folder, subfolder: str | None) -> Folder:
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
