"""Rules 8 and 9: what is quantized while loading, to what, and which layers are not."""

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffquant import aliases, headers, patterns, planner, sources
from diffquant.errors import FormatError, UsageError, meant
from diffquant.families import FAMILIES
from diffquant.formats import FORMATS, Hints
from diffquant.online import Online
from diffquant.resolve._flags import ModelFlags, asks_for_quantization, components_to_quantize
from diffquant.resolve._overrides import Override
from diffquant.resolve._pipelines import is_transformer
from diffquant.resolve._rules import PLAIN_FORMAT, Log
from diffquant.schemes import SCHEMES
from diffquant.sources import Checkpoint, PipelineFolder


def require_something_to_quantize(flags: ModelFlags) -> None:
    """Words about how to quantize need a word about what to."""
    typed = {
        "--quantization-scope": flags.quantization_scope,
        "--quantization-preset": flags.quantization_preset,
        "--quantize-all": flags.quantize_all,
        "--requantize": flags.requantize,
    }
    named = next((flag for flag, value in typed.items() if value), None)
    if named is not None and not asks_for_quantization(flags):
        raise UsageError(
            f"{named} has nothing to act on: nothing is quantized while loading",
            hint=f"add --quantization NAME, or leave {named} out",
        )
    if flags.quantization_preset and flags.quantize_all:
        raise UsageError(
            "--quantization-preset keeps layers, and --quantize-all keeps none",
            hint="leave one of them out",
        )


def require_quantizable(
    flags: ModelFlags,
    overrides: Mapping[str, Override],
    classes: Mapping[str, str],
    pipeline: PipelineFolder,
) -> None:
    """Words about quantizing one component are about a component that has weights."""
    weighty = [name for name in classes if sources.weight_sets(pipeline.root / name)]
    for name in components_to_quantize(flags):
        if name not in weighty and name not in overrides:
            raise UsageError(
                f"{name!r} ({classes[name]}) has no weights to quantize",
                hint=f"one of: {', '.join(weighty)}",
            )


def flags_about(name: str, flags: ModelFlags, classes: Mapping[str, str]) -> ModelFlags:
    """The flags as far as they speak of the component: those that name none mean transformers."""
    if is_transformer(name, classes):
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


def rule_8_quantization(name: str, weights: Checkpoint, flags: ModelFlags, log: Log) -> str | None:
    """--quantization quantizes dense weights while loading, or asserts the format they have."""
    asked = flags.component_quantizations.get(name, flags.quantization)
    if asked is None:
        return None
    meaning = _meaning(asked)
    header = headers.read(weights.files)
    found, evidence = planner.identify(weights, header)
    if meaning.online is None:
        _require_asserted(asked, meaning, weights, header)
        log.fire("8b", component=name, name=asked, evidence=evidence)
        return None
    if found == PLAIN_FORMAT:
        log.fire("8", component=name, name=meaning.online)
    elif flags.requantize:
        log.fire("8c", loud=True, component=name, found=found, name=meaning.online)
    else:
        raise UsageError(
            f"--quantization {asked} quantizes dense weights, and {name!r} from "
            f"{weights.origin!r} is already {found}: {evidence}",
            hint="leave out --quantization, give dense weights, or add --requantize to quantize "
            "them twice",
        )
    return meaning.online


def _meaning(asked: str) -> aliases.Quantization:
    """A scheme by its own name, else what the table says of the word."""
    if asked in SCHEMES.names():
        return aliases.Quantization(online=asked)
    words = aliases.quantizations()
    if asked not in words:
        known = dict.fromkeys([*SCHEMES.names(), *(w for w in words if not words[w].refused)])
        raise UsageError(f"no quantization is called {asked!r}", hint=meant(asked, known))
    if words[asked].refused:
        raise UsageError(
            f"--quantization {asked} is refused: {words[asked].refused}",
            hint="leave it out for weights that are quantized; for others --quantization fp8, int8 …",
        )
    return words[asked]


def _require_asserted(
    asked: str, meaning: aliases.Quantization, weights: Checkpoint, header: headers.Header
) -> None:
    """The file is of the format, and has the encoding, that a person says it has."""
    found, evidence = planner.identify(weights, header)
    layers = FORMATS.load(found).read(weights, header, Hints()).layers
    encodings = {layer.encoding.name for layer in layers}
    if meaning.format != found or (meaning.encoding and meaning.encoding not in encodings):
        held = f"{found} {', '.join(sorted(encodings))}".strip()
        raise FormatError(
            f"--quantization {asked} says what {weights.origin!r} is, and it is {held}: {evidence}",
            hint="leave out --quantization; a file's own format needs no flag",
        )


def rule_9_ignored(
    name: str,
    class_name: str,
    scheme: str | None,
    weights: Checkpoint,
    config: Mapping[str, Any],
    flags: ModelFlags,
    log: Log,
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
    known = _names_of_layers(weights, config)
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


def _names_of_layers(weights: Checkpoint, config: Mapping[str, Any]) -> list[str]:
    """The file's own names, and paths of the module's linears where its family can tell them."""
    header = headers.read(weights.files)
    stored = {tensor.rpartition(".")[0] or tensor for tensor in header.tensors}
    family = FAMILIES.load(planner.family_of(config, header))
    linears = family.inventory(config).linears if family.is_described else frozenset()
    return sorted(stored | linears)


def online(scheme: str | None, ignored: tuple[str, ...], flags: ModelFlags) -> Online | None:
    """Everything that was typed about quantizing while loading; None where nothing is."""
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
