"""Typed flags -> which checkpoint serves which component, and the log of the rules that fired.

The rules are numbered as in `RULES`; each is one small function and one test. They read folders and
headers, never weights.

  _flags         what was typed
  _rules         the sentence each rule logs
  _pipelines     rules 1 and 5: the base pipeline
  _overrides     rules 2 and 3: components from elsewhere
  _weightless    rule 2b: those that have no weights
  _stored        rule 5b: what the base stores quantized
  _experts       rule 4: two transformers
  _fetching      rule 6: several sets of weights in one place
  _svdquant      rule 7: promises
  _quantization  rules 8 and 9: what is quantized while loading
  _component     all that the rules say of one component
"""

from collections.abc import Mapping
from dataclasses import dataclass

from diffquant.resolve._component import ComponentSource, component
from diffquant.resolve._experts import (
    rule_4_one_of_two,
    rule_4b_both_experts,
    rule_4e_expert_folders,
)
from diffquant.resolve._fetching import Hub
from diffquant.resolve._flags import ModelFlags, components_to_quantize, require_choice
from diffquant.resolve._overrides import rule_2_components, rule_3_weights
from diffquant.resolve._pipelines import (
    BUNDLED_OVERRIDE,
    BUNDLED_PIPELINE,
    KNOWN_BASES,
    is_transformer,
    model_names,
    require_components,
    rule_1_base,
    rule_5_weights_alone,
)
from diffquant.resolve._quantization import (
    flags_about,
    require_quantizable,
    require_something_to_quantize,
)
from diffquant.resolve._rules import RULES, Fired, Log
from diffquant.resolve._stored import rule_5b_stored_quantized
from diffquant.resolve._svdquant import SVDQUANT_NAME
from diffquant.resolve._weightless import Weightless, rule_2b_weightless
from diffquant.sources import PipelineFolder

__all__ = [
    "BUNDLED_OVERRIDE",
    "BUNDLED_PIPELINE",
    "KNOWN_BASES",
    "RULES",
    "SVDQUANT_NAME",
    "ComponentSource",
    "Fired",
    "ModelFlags",
    "Resolution",
    "Weightless",
    "require_choice",
    "resolve",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """The pipeline, every transformer of it and every overridden component, and why.

    model_names   names a preset may know the model by, the surest first
    weightless    schedulers, tokenizers and processors that are taken from elsewhere
    """

    pipeline: PipelineFolder
    components: Mapping[str, ComponentSource]
    fired: tuple[Fired, ...]
    model_names: tuple[str, ...]
    weightless: Mapping[str, Weightless]


def resolve(flags: ModelFlags) -> Resolution:
    """Follow the rules. Raises UsageError for flags that contradict each other or the pipeline,
    SourceError for what cannot be found, FormatError where tensors deny what was promised."""
    require_something_to_quantize(flags)
    log = Log()
    hub = Hub(local_files_only=flags.local_files_only)
    overrides = rule_3_weights(rule_2_components(flags), log)
    overrides = rule_4e_expert_folders(overrides, log)
    pipeline, overrides = rule_1_base(flags, overrides, hub, log)
    if pipeline.is_weights_only:
        pipeline, overrides = rule_5_weights_alone(pipeline, overrides, hub, log)
    classes = {name: (pipeline.index or {})[name][1] for name in pipeline.components}
    require_components(flags, overrides, classes, pipeline)
    overrides, weightless = rule_2b_weightless(overrides, classes, pipeline, hub, log)
    overrides = rule_4b_both_experts(overrides, classes, pipeline, hub, log)
    rule_4_one_of_two(overrides, classes, log)
    require_quantizable(flags, overrides, classes, pipeline)
    components = {
        name: component(
            name,
            classes[name],
            overrides.get(name),
            flags_about(name, flags, classes),
            pipeline,
            hub,
            log,
        )
        for name in classes
        if name in overrides
        or name in components_to_quantize(flags)
        or is_transformer(name, classes)
        or (name not in weightless and rule_5b_stored_quantized(name, pipeline, log))
    }
    return Resolution(
        pipeline=pipeline,
        components=components,
        fired=tuple(log),
        model_names=model_names(flags, pipeline),
        weightless=weightless,
    )
