"""Rules 1 and 5: the base pipeline, and what it says of each of its components."""

import difflib
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffquant import headers, planner, sources
from diffquant.errors import AmbiguousSourceError, SourceError, UsageError
from diffquant.families import FAMILIES
from diffquant.resolve._fetching import Hub, rule_6_ambiguous
from diffquant.resolve._flags import (
    ModelFlags,
    asks_for_quantization,
    components_to_quantize,
    flag_for,
)
from diffquant.resolve._overrides import Override
from diffquant.resolve._rules import Log
from diffquant.sources import Checkpoint, PipelineFolder

BUNDLED_PIPELINE = "emoji_flux"
BUNDLED_OVERRIDE = "emoji_flux_modelopt_fp8"

#: Base pipelines of weights that are published alone, by the family their tensors belong to.
KNOWN_BASES: Mapping[str, str] = {
    "flux1": "black-forest-labs/FLUX.1-dev",
    "flux2": "black-forest-labs/FLUX.2-dev",
}
QUANTIZATION_KEYS = frozenset({"quantization_config", "compression_config"})


def rule_1_base(
    flags: ModelFlags, overrides: dict[str, Override], hub: Hub, log: Log
) -> tuple[PipelineFolder, dict[str, Override]]:
    """--model-path names the base; without it the bundled pipeline, with its override."""
    if flags.model_path is None and not overrides and not asks_for_quantization(flags):
        overrides = {"transformer": Override(component="transformer", path=BUNDLED_OVERRIDE)}
        log.fire("1b", origin=BUNDLED_PIPELINE)
        log.fire("1c", component="transformer", origin=BUNDLED_OVERRIDE)
    else:
        rule = "1b" if flags.model_path is None else "1"
        log.fire(rule, origin=flags.model_path or BUNDLED_PIPELINE)
    source = flags.model_path or BUNDLED_PIPELINE
    return hub.pipeline(source, flags.revision, overrides), overrides


def rule_5_weights_alone(
    pipeline: PipelineFolder, overrides: dict[str, Override], hub: Hub, log: Log
) -> tuple[PipelineFolder, dict[str, Override]]:
    """Weights given as --model-path: their tensors tell the family, the family tells the base."""
    source = pipeline.origin
    if "transformer" in overrides:
        raise UsageError(
            f"--model-path {source} holds weights and no pipeline, and "
            f"{overrides['transformer'].flag} gives weights too",
            hint="--model-path names a folder or repository with a model_index.json",
        )
    weights = hub.checkpoint(source, "transformer")
    family = planner.family_of(weights.config, headers.read(weights.files))
    if family not in KNOWN_BASES:
        raise UsageError(
            f"--model-path {source} holds weights and no model_index.json, and no base pipeline is "
            f"known for the family {family!r}",
            hint=f"--model-path BASE --transformer-weights-path {source}",
        )
    base = KNOWN_BASES[family]
    log.fire("5", origin=source, family=family, base=base)
    override = Override(component="transformer", weights=source, weights_flag="--model-path")
    overrides = {**overrides, "transformer": override}
    return hub.pipeline(base, None, overrides), overrides


def base_component(pipeline: PipelineFolder, name: str, *, required: bool) -> Checkpoint:
    """The base's own component, without files where an override replaces weights that are not here
    or cannot be told apart."""
    origin = f"{pipeline.origin}/{name}"
    try:
        found = sources.checkpoint(str(pipeline.root), subfolder=name)
    except AmbiguousSourceError as error:
        if required:
            raise rule_6_ambiguous(error, str(pipeline.root), name) from None
    except SourceError:
        if required:
            raise
    else:
        return replace(found, origin=origin, revision=pipeline.revision)
    config = pipeline.root / name / sources.CONFIG
    text = config.read_text(encoding="utf-8") if config.is_file() else "{}"
    return Checkpoint(origin=origin, root=config.parent, files=(), config=json.loads(text))


def module_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture alone: a quantization config speaks of the weights beside it only."""
    return {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}


def is_transformer(name: str, classes: Mapping[str, str]) -> bool:
    known = {
        cls
        for family in FAMILIES.load_all().values()
        for cls in family.class_names
        if family.part == "transformer"
    }
    return classes[name] in known or name.startswith(("transformer", "unet"))


def require_components(
    flags: ModelFlags,
    overrides: Mapping[str, Override],
    classes: Mapping[str, str],
    pipeline: PipelineFolder,
) -> None:
    """Every component a flag names exists in the pipeline."""
    named = {name: override.flag for name, override in overrides.items()}
    named |= {name: flag_for(name, "quantization") for name in components_to_quantize(flags)}
    for name, flag in named.items():
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=1) or list(classes)
            raise UsageError(
                f"{flag} names a component {name!r}, {pipeline.origin!r} has none of that name",
                hint=f"its components: {', '.join(near)}",
            )


def model_names(flags: ModelFlags, pipeline: PipelineFolder) -> tuple[str, ...]:
    """Typed id, the source as typed, its last part, the directory, what the index calls itself."""
    origin = pipeline.origin.partition("@")[0]
    told = (pipeline.index or {}).get("_name_or_path")
    names = (flags.model_id, origin, Path(origin).name, pipeline.root.name, told)
    return tuple(dict.fromkeys(name for name in names if name))
