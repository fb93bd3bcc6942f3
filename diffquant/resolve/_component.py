"""One component: where its weights come from, what describes it, and what the rules say of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffquant.errors import UsageError
from diffquant.formats import Hints
from diffquant.online import Online
from diffquant.resolve._fetching import Hub, rule_6_chosen
from diffquant.resolve._flags import ModelFlags, flag_for
from diffquant.resolve._overrides import Override
from diffquant.resolve._pipelines import base_component, is_transformer, module_config
from diffquant.resolve._quantization import online, rule_8_quantization, rule_9_ignored
from diffquant.resolve._rules import Log
from diffquant.resolve._svdquant import rule_7_svdquant
from diffquant.sources import Checkpoint, PipelineFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentSource:
    """Where one component comes from.

    config        of the module alone, without what it says about quantization
    base          the base pipeline's own component; None when its weights were not downloaded
    override      whether `weights` come from another source than the base pipeline
    online        what to quantize while loading, and to what; None for weights as they are
    is_transformer  whether it is what takes the noise away, and no encoder or autoencoder
    """

    component: str
    class_name: str
    config: Mapping[str, Any]
    weights: Checkpoint
    base: Checkpoint | None
    override: bool
    hints: Hints
    online: Online | None = None
    is_transformer: bool = True


def component(
    name: str,
    class_name: str,
    override: Override | None,
    flags: ModelFlags,
    pipeline: PipelineFolder,
    hub: Hub,
    log: Log,
) -> ComponentSource:
    base = base_component(pipeline, name, required=override is None)
    weights, described = base, base
    if override is not None:
        weights, described = _overridden(override, base, hub, log)
        _require_class(override, described, base, class_name)
    rule_6_chosen(weights, log)
    hints = rule_7_svdquant(name, override, weights, flags, log)
    config = _classed(module_config(described.config), class_name, pipeline, name)
    scheme = rule_8_quantization(name, weights, flags, log)
    ignored = rule_9_ignored(name, class_name, scheme, weights, config, flags, log)
    return ComponentSource(
        component=name,
        class_name=class_name,
        config=config,
        weights=weights,
        base=base if base.files else None,
        override=override is not None,
        hints=hints,
        online=online(scheme, ignored, flags),
        is_transformer=is_transformer(name, {name: class_name}),
    )


def _overridden(
    override: Override, base: Checkpoint, hub: Hub, log: Log
) -> tuple[Checkpoint, Checkpoint]:
    """The checkpoint of the weights, and the one whose config describes the module."""
    name = override.component
    if override.weights is None:
        assert override.path is not None
        own = hub.checkpoint(override.path, name)
        if override.path_flag:
            log.fire("2", flag=override.path_flag, component=name, origin=override.path)
        if not own.config:
            raise UsageError(
                f"{override.path_flag} {override.path} has no config.json",
                hint=f"{flag_for(name, 'weights-path')} {override.path}",
            )
        return own, own
    weights = hub.checkpoint(override.weights, name)
    rule = "3" if override.path is None else "3c"
    log.fire(
        rule,
        flag=override.weights_flag,
        component=name,
        origin=override.weights,
        config=override.path,
    )
    if override.path is None:
        return weights, base
    return weights, hub.checkpoint(override.path, name)


def _require_class(
    override: Override, described: Checkpoint, base: Checkpoint, class_name: str
) -> None:
    """diffusers configs name the class, those of transformers a type that several classes share."""
    for key, wanted in (("_class_name", class_name), ("model_type", base.config.get("model_type"))):
        found = described.config.get(key, wanted)
        if wanted is not None and found != wanted:
            raise UsageError(
                f"{override.flag} gives {found}, and {override.component!r} of the pipeline is "
                f"{wanted}",
                hint=f"is this the {override.component} of another model? see `diffquant inspect`",
            )


def _classed(
    config: dict[str, Any], class_name: str, pipeline: PipelineFolder, name: str
) -> dict[str, Any]:
    """Only diffusers writes the class into the config; of all others the pipeline's index knows it."""
    library = (pipeline.index or {})[name][0]
    return (
        config
        if library == "diffusers"
        else {**config, "_class_name": class_name, "_library": library}
    )
