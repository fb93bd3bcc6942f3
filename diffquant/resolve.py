"""Typed flags -> which checkpoint serves which component, and the log of the rules that fired.

The rules are numbered as in `RULES`; each is one small function below and one test. They read
folders and headers, never weights.
"""

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from diffquant import aliases, headers, patterns, planner, sources
from diffquant.errors import (
    AmbiguousSourceError,
    DiffquantError,
    FormatError,
    SourceError,
    UsageError,
)
from diffquant.families import FAMILIES
from diffquant.formats import FORMATS, Hints
from diffquant.formats.modelslim import expert_folders
from diffquant.online import Online
from diffquant.schemes import SCHEMES
from diffquant.sources import Checkpoint, PipelineFolder

BUNDLED_PIPELINE = "emoji_flux"
BUNDLED_OVERRIDE = "emoji_flux_modelopt_fp8"

#: Base pipelines of weights that are published alone, by the family their tensors belong to.
KNOWN_BASES: Mapping[str, str] = {
    "flux1": "black-forest-labs/FLUX.1-dev",
    "flux2": "black-forest-labs/FLUX.2-dev",
}

#: The sentence each rule logs when it fires.
RULES: Mapping[str, str] = {
    "1": "the base pipeline is {origin!r}",
    "1b": "no --model-path was typed: the base pipeline is the bundled {origin!r}",
    "1c": "no override was typed: {component} is the bundled {origin!r}",
    "2": "{flag} gives {component} its own config and weights: {origin!r}",
    "3": "{flag} gives {component} its weights: {origin!r}; its config stays the base's",
    "3b": "{flag} names a weights file, so the config of {component} stays the base's",
    "3c": "{flag} gives {component} its weights: {origin!r}; its config comes from {config!r}",
    "4": "only {component} is overridden; {other} stays the base's (to replace it: {flag})",
    "4c": "{component} was held against the base and is that expert, not {other}",
    "4d": "whether {component} and {other} are in their places is unknown: the base's weights are not here",
    "4b": "{origin!r} holds {component} too, and its config agrees with the base",
    "4e": "{origin!r} keeps {component} in {folder!r}; its config stays the base's",
    "5": "{origin!r} is weights of the family {family}; its base pipeline is {base!r}",
    "6": "of several weight files in {origin!r} {name!r} is taken",
    "7": "the name {name!r} promises SVDQuant {precision} of rank {rank}; the tensors must agree",
    "7b": "the flags promise SVDQuant {precision} of rank {rank}; the tensors must agree",
    "8": "{component} is quantized to {name} while loading",
    "8b": "{component} is {name} as --quantization says: {evidence}",
    "8c": "{component} is {found} and becomes {name} while loading: it is quantized twice",
    "9": "--quantization-ignored-layers keeps {count} layers of {component}, first {first!r}",
}

PRECISIONS = {
    "int4": "int4",
    "fp4": "nvfp4",
}  # fp4 in a file's name is called nvfp4 everywhere else
SVDQUANT_NAME = re.compile(r"svdq-(?P<precision>int4|fp4)_r(?P<rank>\d+)")
WEIGHTS_SUFFIXES = frozenset({".safetensors", ".sft", ".gguf", ".bin", ".pt", ".pth", ".ckpt"})
PLAIN_FORMAT = "diffusers"
QUANTIZATION_KEYS = frozenset({"quantization_config", "compression_config"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFlags:
    """What a person typed about models; nothing here is ever filled in by diffquant.

    component_*   by component name with underscores: "transformer_2"
    """

    model_path: str | None = None
    transformer_path: str | None = None
    transformer_weights_path: str | None = None
    component_paths: Mapping[str, str] = field(default_factory=dict)
    component_weights_paths: Mapping[str, str] = field(default_factory=dict)
    quantization: str | None = None
    quantization_ignored_layers: tuple[str, ...] = ()
    quantization_scope: str | None = None
    quantization_preset: str | None = None
    quantize_all: bool = False
    requantize: bool = False
    component_quantizations: Mapping[str, str] = field(default_factory=dict)
    component_quantization_ignored_layers: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )
    enable_svdquant: bool = False
    quantization_precision: str | None = None
    quantization_rank: int | None = None
    model_id: str | None = None
    revision: str | None = None
    local_files_only: bool = False
    nvfp4_nibbles: str | None = None
    scale_layout: str | None = None
    raw_fp8: bool = False

    def __post_init__(self) -> None:
        """Refuses values nobody knows, whichever way they were typed: an ignored one is a silent one."""
        require_choice("nvfp4_nibbles", self.nvfp4_nibbles, ("low", "high"))
        require_choice("scale_layout", self.scale_layout, ("linear", "tiles"))
        require_choice("quantization_precision", self.quantization_precision, ("int4", "nvfp4"))


def require_choice(flag: str, value: str | None, choices: Sequence[str]) -> None:
    """Raises UsageError when a value was typed that is none of the choices."""
    if value is not None and value not in choices:
        raise UsageError(f"unknown {flag} {value!r}", hint=f"one of: {', '.join(choices)}")


@dataclass(frozen=True, slots=True)
class Fired:
    """A rule that decided something; `loud` ones deserve a person's attention."""

    rule: str
    sentence: str
    loud: bool = False


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

    @property
    def quantization(self) -> str | None:
        """The scheme the component is quantized to while loading."""
        return None if self.online is None else self.online.scheme

    @property
    def ignored_layers(self) -> tuple[str, ...]:
        """Patterns of layers a person wants left as they are."""
        return () if self.online is None else self.online.ignored


@dataclass(frozen=True, slots=True, kw_only=True)
class Resolution:
    """The pipeline, every transformer of it and every overridden component, and why.

    model_names   names a preset may know the model by, the surest first
    """

    pipeline: PipelineFolder
    components: Mapping[str, ComponentSource]
    fired: tuple[Fired, ...]
    model_names: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Override:
    """A component from elsewhere: `path` has a config of its own, `weights` has none."""

    component: str
    path: str | None = None
    weights: str | None = None
    path_flag: str = ""
    weights_flag: str = ""

    @property
    def flag(self) -> str:
        return self.weights_flag or self.path_flag


class _Log(list[Fired]):
    """Rules in the order they fired."""

    def fire(self, rule: str, *, loud: bool = False, **values: object) -> None:
        self.append(Fired(rule, RULES[rule].format(**values), loud))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Hub:
    """How every source of one run is fetched; a typed revision belongs to the base alone."""

    local_files_only: bool

    def checkpoint(self, source: str, component: str) -> Checkpoint:
        """The component at `source`; the error for several candidates describes each (rule 6)."""
        try:
            return sources.checkpoint(
                source, subfolder=component, local_files_only=self.local_files_only
            )
        except AmbiguousSourceError as error:
            raise _rule_6_ambiguous(error, source, component) from None

    def pipeline(
        self, source: str, revision: str | None, without_weights_of: Iterable[str]
    ) -> PipelineFolder:
        return sources.pipeline(
            source,
            revision=revision,
            local_files_only=self.local_files_only,
            without_weights_of=frozenset(without_weights_of),
        )


def resolve(flags: ModelFlags) -> Resolution:
    """Follow the rules. Raises UsageError for flags that contradict each other or the pipeline,
    SourceError for what cannot be found, FormatError where tensors deny what was promised."""
    _require_something_to_quantize(flags)
    log = _Log()
    hub = _Hub(local_files_only=flags.local_files_only)
    overrides = _rule_3_weights(_rule_2_components(flags), log)
    overrides = _rule_4e_expert_folders(overrides, log)
    pipeline, overrides = _rule_1_base(flags, overrides, hub, log)
    if pipeline.is_weights_only:
        pipeline, overrides = _rule_5_weights_alone(pipeline, overrides, hub, log)
    classes = {name: (pipeline.index or {})[name][1] for name in pipeline.components}
    _require_components(flags, overrides, classes, pipeline)
    overrides = _rule_4b_both_experts(overrides, classes, pipeline, hub, log)
    _rule_4_one_of_two(overrides, classes, log)
    _require_quantizable(flags, overrides, classes, pipeline)
    components = {
        name: _component(
            name,
            classes[name],
            overrides.get(name),
            _about(name, flags, classes),
            pipeline,
            hub,
            log,
        )
        for name in classes
        if name in overrides or name in _named(flags) or _is_transformer(name, classes)
    }
    return Resolution(
        pipeline=pipeline,
        components=components,
        fired=tuple(log),
        model_names=_model_names(flags, pipeline),
    )


# ------------------------------------------------------------------------------------- rules 1 to 5


def _rule_1_base(
    flags: ModelFlags, overrides: dict[str, _Override], hub: _Hub, log: _Log
) -> tuple[PipelineFolder, dict[str, _Override]]:
    """--model-path names the base; without it the bundled pipeline, with its override."""
    if flags.model_path is None and not overrides and not _asks_for_quantization(flags):
        overrides = {"transformer": _Override(component="transformer", path=BUNDLED_OVERRIDE)}
        log.fire("1b", origin=BUNDLED_PIPELINE)
        log.fire("1c", component="transformer", origin=BUNDLED_OVERRIDE)
    else:
        rule = "1b" if flags.model_path is None else "1"
        log.fire(rule, origin=flags.model_path or BUNDLED_PIPELINE)
    source = flags.model_path or BUNDLED_PIPELINE
    return hub.pipeline(source, flags.revision, overrides), overrides


def _rule_2_components(flags: ModelFlags) -> dict[str, _Override]:
    """Gather every path flag by the component it names."""
    paths = _one_each("path", flags.transformer_path, flags.component_paths)
    weights = _one_each(
        "weights-path", flags.transformer_weights_path, flags.component_weights_paths
    )
    return {
        name: _Override(
            component=name,
            path=paths.get(name),
            weights=weights.get(name),
            path_flag=_flag_for(name, "path") if name in paths else "",
            weights_flag=_flag_for(name, "weights-path") if name in weights else "",
        )
        for name in {**paths, **weights}
    }


def _rule_3_weights(overrides: dict[str, _Override], log: _Log) -> dict[str, _Override]:
    """A component path that names a weights file is a weights path; weights win over a path."""
    return {name: _as_weights(override, log) for name, override in overrides.items()}


def _as_weights(override: _Override, log: _Log) -> _Override:
    name, path, weights = override.component, override.path, override.weights
    if path is not None and _names_weights_file(path):
        if weights is not None and weights != path:
            raise UsageError(
                f"{override.path_flag} {path} and {override.weights_flag} {weights} both give "
                f"weights to {name!r}",
                hint=f"keep one of them; {override.path_flag} takes a folder with a config.json",
            )
        log.fire("3b", flag=override.path_flag, component=name)
        return replace(
            override, path=None, path_flag="", weights=path, weights_flag=override.path_flag
        )
    return override


def _rule_4_one_of_two(
    overrides: Mapping[str, _Override], classes: Mapping[str, str], log: _Log
) -> None:
    """One of two transformers overridden: say so, with the flag for the other."""
    transformers = [name for name in classes if _is_transformer(name, classes)]
    overridden = [name for name in transformers if name in overrides]
    for other in transformers:
        if overridden and other not in overrides:
            kind = "weights-path" if overrides[overridden[0]].weights else "path"
            flag = _flag_for(other, kind)
            log.fire("4", loud=True, component=", ".join(overridden), other=other, flag=flag)


def _rule_4e_expert_folders(overrides: dict[str, _Override], log: _Log) -> dict[str, _Override]:
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
            spread[component] = _Override(
                component=component, weights=str(source / folder), weights_flag=override.flag
            )
    return spread


def _rule_4b_both_experts(
    overrides: dict[str, _Override],
    classes: Mapping[str, str],
    pipeline: PipelineFolder,
    hub: _Hub,
    log: _Log,
) -> dict[str, _Override]:
    """A source with one folder per transformer serves each that has no flag of its own."""
    spread = dict(overrides)
    for name, override in overrides.items():
        others = [other for other in classes if other not in spread and other != name]
        for other in (other for other in others if _is_transformer(other, classes)):
            source = override.path or override.weights or ""
            if not _has_folders_for((name, other), source, hub):
                continue
            _require_same_architecture(hub.checkpoint(source, other), pipeline, other)
            log.fire("4b", origin=source, component=other)
            spread[other] = replace(override, component=other)
    return spread


def _has_folders_for(components: Iterable[str], source: str, hub: _Hub) -> bool:
    """Whether the source keeps each of the components in a folder of its name."""
    try:
        return all(hub.checkpoint(source, name).root.name == name for name in components)
    except SourceError:
        return False


def _rule_5_weights_alone(
    pipeline: PipelineFolder, overrides: dict[str, _Override], hub: _Hub, log: _Log
) -> tuple[PipelineFolder, dict[str, _Override]]:
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
    override = _Override(component="transformer", weights=source, weights_flag="--model-path")
    overrides = {**overrides, "transformer": override}
    return hub.pipeline(base, None, overrides), overrides


# ------------------------------------------------------------------------------------ one component


def _component(
    name: str,
    class_name: str,
    override: _Override | None,
    flags: ModelFlags,
    pipeline: PipelineFolder,
    hub: _Hub,
    log: _Log,
) -> ComponentSource:
    base = _base(pipeline, name, required=override is None)
    weights, described = base, base
    if override is not None:
        weights, described = _overridden(override, base, hub, log)
        _require_class(override, described, base, class_name)
    _rule_6_chosen(weights, log)
    hints = _rule_7_svdquant(name, override, weights, flags, log)
    config = _classed(_module_config(described.config), class_name, pipeline, name)
    scheme = _rule_8_quantization(name, weights, flags, log)
    ignored = _rule_9_ignored(name, class_name, scheme, weights, config, flags, log)
    return ComponentSource(
        component=name,
        class_name=class_name,
        config=config,
        weights=weights,
        base=base if base.files else None,
        override=override is not None,
        hints=hints,
        online=_online(scheme, ignored, flags),
        is_transformer=_is_transformer(name, {name: class_name}),
    )


def _base(pipeline: PipelineFolder, name: str, *, required: bool) -> Checkpoint:
    """The base's own component, without files where an override replaces weights that are not here
    or cannot be told apart."""
    origin = f"{pipeline.origin}/{name}"
    try:
        found = sources.checkpoint(str(pipeline.root), subfolder=name)
    except AmbiguousSourceError as error:
        if required:
            raise _rule_6_ambiguous(error, str(pipeline.root), name) from None
    except SourceError:
        if required:
            raise
    else:
        return replace(found, origin=origin, revision=pipeline.revision)
    config = pipeline.root / name / sources.CONFIG
    text = config.read_text(encoding="utf-8") if config.is_file() else "{}"
    return Checkpoint(origin=origin, root=config.parent, files=(), config=json.loads(text))


def _overridden(
    override: _Override, base: Checkpoint, hub: _Hub, log: _Log
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
                hint=f"{_flag_for(name, 'weights-path')} {override.path}",
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
    override: _Override, described: Checkpoint, base: Checkpoint, class_name: str
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


def _module_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture alone: a quantization config speaks of the weights beside it only."""
    return {key: value for key, value in config.items() if key not in QUANTIZATION_KEYS}


# ------------------------------------------------------------------------------------- rules 6 to 9


def _rule_6_chosen(weights: Checkpoint, log: _Log) -> None:
    """Several weight sets lay there and one was taken for its name: say which."""
    if not _names_weights_file(weights.origin) and len(sources.weight_sets(weights.root)) > 1:
        log.fire("6", loud=True, origin=weights.origin, name=weights.files[0].name)


def _rule_6_ambiguous(
    error: AmbiguousSourceError, source: str, component: str
) -> AmbiguousSourceError:
    """The same refusal with format, size and whether it runs here of each candidate.

    Candidates on the hub are not here to be looked into; their refusal stays as it is.
    """
    inside = Path(source).expanduser() / component
    folder = inside if inside.is_dir() else inside.parent
    if not folder.is_dir():
        return error
    candidates = sources.weight_sets(folder)
    listed = "\n".join(f"  {_described(files)}" for files in candidates)
    return AmbiguousSourceError(
        f"{source!r} holds {len(candidates)} sets of weights and one was needed:\n{listed}",
        hint=f"name one of them: {_flag_for(component, 'weights-path')} {candidates[0][0]}",
    )


def _described(files: Sequence[Path]) -> str:
    """One candidate in one line. What is understood runs: the reference kernel runs everything."""
    size = sum(path.stat().st_size for path in files) / 1e9
    checkpoint = Checkpoint(origin=files[0].name, root=files[0].parent, files=tuple(files))
    try:
        name, _ = planner.identify(checkpoint, headers.read(files))
    except DiffquantError as error:
        return f"{files[0].name}  {size:.2f} GB  does not run here: {error.what}"
    return f"{files[0].name}  {size:.2f} GB  {name}  runs here"


def _rule_7_svdquant(
    name: str, override: _Override | None, weights: Checkpoint, flags: ModelFlags, log: _Log
) -> Hints:
    """What a name or the flags promise about SVDQuant is handed to the format to be confirmed."""
    hints = Hints(
        nibbles=flags.nvfp4_nibbles,  # type: ignore[arg-type]  # the command line checks the choice
        scales=flags.scale_layout,  # type: ignore[arg-type]
        raw_fp8=flags.raw_fp8,
    )
    named = _promised_by_name(override, weights)
    precision, rank = flags.quantization_precision, flags.quantization_rank
    if override is None and named is None and not flags.enable_svdquant:
        return hints
    if named is not None:
        said = f"{named[0]} of rank {named[1]}"
        if precision not in (None, named[0]) or rank not in (None, named[1]):
            raise UsageError(
                f"the name {weights.origin!r} promises SVDQuant {said}, the flags say "
                f"{precision or named[0]} of rank {rank or named[1]}",
                hint="leave out --quantization-precision and --quantization-rank",
            )
        log.fire("7", name=Path(weights.origin).name, precision=named[0], rank=named[1])
        precision, rank = named
    elif flags.enable_svdquant or precision or rank:
        log.fire("7b", precision=precision or "of any kind", rank=rank or "any")
    else:
        return hints
    _require_quantized(name, weights)
    return replace(hints, precision=precision, rank=rank)  # type: ignore[arg-type]


def _promised_by_name(override: _Override | None, weights: Checkpoint) -> tuple[str, int] | None:
    typed = (override.weights or override.path or "") if override else ""
    for text in (typed, *(path.name for path in weights.files)):
        if found := SVDQUANT_NAME.search(text):
            return PRECISIONS[found["precision"]], int(found["rank"])
    return None


def _require_quantized(name: str, weights: Checkpoint) -> None:
    found, evidence = planner.identify(weights, headers.read(weights.files))
    if found == PLAIN_FORMAT:
        raise FormatError(
            f"SVDQuant was promised for {name!r}, and {weights.origin!r} is not quantized: {evidence}",
            hint="leave out --enable-svdquant and its companions, or name the quantized file",
        )


def _rule_8_quantization(
    name: str, weights: Checkpoint, flags: ModelFlags, log: _Log
) -> str | None:
    """--quantization quantizes dense weights while loading, or asserts the format they have."""
    asked = flags.component_quantizations.get(name, flags.quantization)
    if asked is None:
        return None
    meaning = _meaning(asked)
    if meaning is None:
        synonyms = [key for key, entry in aliases.quantizations().items() if not entry.refused]
        known = list(dict.fromkeys([*SCHEMES.names(), *synonyms]))
        near = difflib.get_close_matches(asked, known, n=3)
        raise UsageError(
            f"no quantization is called {asked!r}", hint=f"one of: {', '.join(near or known)}"
        )
    if meaning.refused:
        raise UsageError(f"--quantization {asked} is refused: {meaning.refused}")
    header = headers.read(weights.files)
    found, evidence = planner.identify(weights, header)
    if meaning.online:
        if found != PLAIN_FORMAT and flags.requantize:
            log.fire("8c", loud=True, component=name, found=found, name=meaning.online)
            return meaning.online
        if found != PLAIN_FORMAT:
            raise UsageError(
                f"--quantization {asked} quantizes dense weights, and {name!r} from "
                f"{weights.origin!r} is already {found}: {evidence}",
                hint="leave out --quantization, give dense weights, or add --requantize to quantize "
                "them twice",
            )
        log.fire("8", component=name, name=meaning.online)
        return meaning.online
    encodings = {
        layer.encoding.name for layer in FORMATS.load(found).read(weights, header, Hints()).layers
    }
    if meaning.format != found or (meaning.encoding and meaning.encoding not in encodings):
        held = f"{found} {', '.join(sorted(encodings))}".strip()
        raise FormatError(
            f"--quantization {asked} says what {weights.origin!r} is, and it is {held}: {evidence}",
            hint="leave out --quantization; a file's own format needs no flag",
        )
    log.fire("8b", component=name, name=asked, evidence=evidence)
    return None


def _meaning(asked: str) -> aliases.Quantization | None:
    """A scheme by its own name, else what the table says of the word."""
    if asked in SCHEMES.names():
        return aliases.Quantization(online=asked)
    return aliases.quantizations().get(asked)


def _online(scheme: str | None, ignored: tuple[str, ...], flags: ModelFlags) -> Online | None:
    if scheme is None:
        return None
    return Online(
        scheme=scheme,
        ignored=ignored,
        scope=flags.quantization_scope or "all",
        quantize_all=flags.quantize_all,
        requantize=flags.requantize,
        preset=flags.quantization_preset,
    )


def _named(flags: ModelFlags) -> dict[str, object]:
    """Components that words about quantization name."""
    return {**flags.component_quantizations, **flags.component_quantization_ignored_layers}


def _about(name: str, flags: ModelFlags, classes: Mapping[str, str]) -> ModelFlags:
    """The flags as far as they speak of the component: those that name none mean transformers."""
    if _is_transformer(name, classes):
        return flags
    return replace(
        flags,
        quantization=None,
        quantization_ignored_layers=(),
        quantization_preset=None,
        enable_svdquant=False,
        quantization_precision=None,
        quantization_rank=None,
    )


def _require_quantizable(
    flags: ModelFlags,
    overrides: Mapping[str, _Override],
    classes: Mapping[str, str],
    pipeline: PipelineFolder,
) -> None:
    """Words about quantizing one component are about a component that has weights."""
    weighty = [name for name in classes if sources.weight_sets(pipeline.root / name)]
    for name in _named(flags):
        if name not in weighty and name not in overrides:
            raise UsageError(
                f"{name!r} ({classes[name]}) has no weights to quantize",
                hint=f"one of: {', '.join(weighty)}",
            )


def _require_something_to_quantize(flags: ModelFlags) -> None:
    """Words about how to quantize need a word about what to."""
    typed = {
        "--quantization-scope": flags.quantization_scope,
        "--quantization-preset": flags.quantization_preset,
        "--quantize-all": flags.quantize_all,
        "--requantize": flags.requantize,
    }
    named = next((flag for flag, value in typed.items() if value), None)
    if named is not None and not _asks_for_quantization(flags):
        raise UsageError(
            f"{named} has nothing to act on: nothing is quantized while loading",
            hint=f"add --quantization NAME, or leave {named} out",
        )
    if flags.quantization_preset and flags.quantize_all:
        raise UsageError(
            "--quantization-preset keeps layers, and --quantize-all keeps none",
            hint="leave one of them out",
        )


def _rule_9_ignored(
    name: str,
    class_name: str,
    scheme: str | None,
    weights: Checkpoint,
    config: Mapping[str, Any],
    flags: ModelFlags,
    log: _Log,
) -> tuple[str, ...]:
    """Each typed pattern hits a layer, by module path or by the file's own name."""
    asked = flags.component_quantization_ignored_layers.get(name, flags.quantization_ignored_layers)
    if not asked:
        return ()
    if scheme is None:
        raise UsageError(
            f"--quantization-ignored-layers {','.join(asked)} has nothing to act on: {name!r} is not "
            "quantized while loading",
            hint="add --quantization NAME, or leave the layers out",
        )
    header = headers.read(weights.files)
    stored = {tensor.rpartition(".")[0] or tensor for tensor in header.tensors}
    known = sorted(stored | _linears(config, header))
    for pattern in asked:
        if not any(patterns.hits(pattern, path) for path in known):
            near = difflib.get_close_matches(pattern, known, n=3, cutoff=0.3)
            raise UsageError(
                f"--quantization-ignored-layers {pattern} matches no layer of the {class_name}",
                hint=f"names are like {', '.join(near or known[:3])}",
            )
    kept = [path for path in known if any(patterns.hits(pattern, path) for pattern in asked)]
    log.fire("9", count=len(kept), component=name, first=kept[0])
    return asked


def _linears(config: Mapping[str, Any], header: headers.Header) -> frozenset[str]:
    """Paths of the module's linears, where its family can tell them."""
    family = FAMILIES.load(planner.family_of(config, header))
    return family.inventory(config).linears if family.is_described else frozenset()


# ---------------------------------------------------------------------------------------- questions


def _one_each(kind: str, transformer: str | None, others: Mapping[str, str]) -> dict[str, str]:
    """Sources by component; the same component named twice with two sources is a contradiction."""
    gathered = {name.replace("-", "_"): source for name, source in others.items()}
    if transformer is None:
        return gathered
    if gathered.get("transformer", transformer) != transformer:
        flag = _flag_for("transformer", kind)
        raise UsageError(
            f"{flag} names both {transformer!r} and {gathered['transformer']!r}",
            hint=f"keep one {flag}",
        )
    return {**gathered, "transformer": transformer}


def _flag_for(component: str, kind: str) -> str:
    return f"--{component.replace('_', '-')}-{kind}"


def _names_weights_file(source: str) -> bool:
    path = Path(source.partition("@")[0])
    is_weights = path.suffix in WEIGHTS_SUFFIXES or path.name.endswith(".index.json")
    return is_weights and not path.is_dir()


def _asks_for_quantization(flags: ModelFlags) -> bool:
    return flags.quantization is not None or bool(flags.component_quantizations)


def _is_transformer(name: str, classes: Mapping[str, str]) -> bool:
    known = {
        cls
        for family in FAMILIES.load_all().values()
        for cls in family.class_names
        if family.part == "transformer"
    }
    return classes[name] in known or name.startswith(("transformer", "unet"))


def _require_components(
    flags: ModelFlags,
    overrides: Mapping[str, _Override],
    classes: Mapping[str, str],
    pipeline: PipelineFolder,
) -> None:
    """Every component a flag names exists in the pipeline."""
    named = {name: override.flag for name, override in overrides.items()}
    named |= {name: _flag_for(name, "quantization") for name in _named(flags)}
    for name, flag in named.items():
        if name not in classes:
            near = difflib.get_close_matches(name, classes, n=1) or list(classes)
            raise UsageError(
                f"{flag} names a component {name!r}, {pipeline.origin!r} has none of that name",
                hint=f"its components: {', '.join(near)}",
            )


def _require_same_architecture(
    weights: Checkpoint, pipeline: PipelineFolder, component: str
) -> None:
    """The fingerprint: what both configs say about the architecture is the same."""
    ours = _module_config(weights.config)
    theirs = _module_config(_base(pipeline, component, required=False).config)
    for key in sorted(ours.keys() & theirs.keys()):
        if not key.startswith("_") and ours[key] != theirs[key]:
            raise UsageError(
                f"{component!r} in {weights.origin!r} is not of the base pipeline: {key} is "
                f"{ours[key]!r}, the base has {theirs[key]!r}",
                hint=f"{_flag_for(component, 'path')} names a source for it",
            )


def _model_names(flags: ModelFlags, pipeline: PipelineFolder) -> tuple[str, ...]:
    """Typed id, the source as typed, its last part, the directory, what the index calls itself."""
    origin = pipeline.origin.partition("@")[0]
    told = (pipeline.index or {}).get("_name_or_path")
    names = (flags.model_id, origin, Path(origin).name, pipeline.root.name, told)
    return tuple(dict.fromkeys(name for name in names if name))
