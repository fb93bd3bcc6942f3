"""Rule 4: pipelines with two transformers, and sources that hold both."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from diffquant.errors import SourceError, UsageError
from diffquant.formats.modelslim import expert_folders
from diffquant.resolve._fetching import Hub
from diffquant.resolve._flags import flag_for
from diffquant.resolve._overrides import Override
from diffquant.resolve._pipelines import base_component, is_transformer, module_config
from diffquant.resolve._rules import Log
from diffquant.sources import Checkpoint, PipelineFolder


def rule_4_one_of_two(
    overrides: Mapping[str, Override], classes: Mapping[str, str], log: Log
) -> None:
    """One of two transformers overridden: say so, with the flag for the other."""
    transformers = [name for name in classes if is_transformer(name, classes)]
    overridden = [name for name in transformers if name in overrides]
    for other in transformers:
        if overridden and other not in overrides:
            kind = "weights-path" if overrides[overridden[0]].weights else "path"
            flag = flag_for(other, kind)
            log.fire("4", loud=True, component=", ".join(overridden), other=other, flag=flag)


def rule_4e_expert_folders(overrides: dict[str, Override], log: Log) -> dict[str, Override]:
    """A folder of msModelSlim's with both experts serves each that has no flag of its own.

    Configs beside the weights are the original repository's, which describe no diffusers class.
    """
    spread = dict(overrides)
    for override in overrides.values():
        source = Path(override.weights or override.path or "").expanduser()
        inside = (path.name for path in source.iterdir()) if source.is_dir() else ()
        for component, folder in expert_folders(inside).items():
            if component != override.component and component in overrides:
                continue
            log.fire("4e", origin=str(source), component=component, folder=folder)
            spread[component] = Override(
                component=component, weights=str(source / folder), weights_flag=override.flag
            )
    return spread


def rule_4b_both_experts(
    overrides: dict[str, Override],
    classes: Mapping[str, str],
    pipeline: PipelineFolder,
    hub: Hub,
    log: Log,
) -> dict[str, Override]:
    """A source with one folder per transformer serves each that has no flag of its own."""
    spread = dict(overrides)
    for name, override in overrides.items():
        others = [other for other in classes if other not in spread and other != name]
        for other in (other for other in others if is_transformer(other, classes)):
            source = override.path or override.weights or ""
            if not _has_folders_for((name, other), source, hub):
                continue
            require_same_architecture(hub.checkpoint(source, other), pipeline, other)
            log.fire("4b", origin=source, component=other)
            spread[other] = replace(override, component=other)
    return spread


def _has_folders_for(components: Iterable[str], source: str, hub: Hub) -> bool:
    """Whether the source keeps each of the components in a folder of its name."""
    try:
        return all(hub.checkpoint(source, name).root.name == name for name in components)
    except SourceError:
        return False


def require_same_architecture(
    weights: Checkpoint, pipeline: PipelineFolder, component: str
) -> None:
    """The fingerprint: what both configs say about the architecture is the same."""
    ours = module_config(weights.config)
    theirs = module_config(base_component(pipeline, component, required=False).config)
    for key in sorted(ours.keys() & theirs.keys()):
        if not key.startswith("_") and ours[key] != theirs[key]:
            raise UsageError(
                f"{component!r} in {weights.origin!r} is not of the base pipeline: {key} is "
                f"{ours[key]!r}, the base has {theirs[key]!r}",
                hint=f"{flag_for(component, 'path')} names a source for it",
            )
