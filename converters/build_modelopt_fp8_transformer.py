"""Build a per-tensor FP8 transformer: from a ModelOpt export, a native save, or plain BF16.

What is written is a ModelOpt export that says everything about itself:

    X.weight          F8_E4M3 [N, K]    weight / weight_scale, saturated at 448
    X.weight_scale    F32 [1]           weight amax / 448, multiplies
    X.input_scale     F32 [1]           input amax / 448; absent where no input was ever seen
    config.json       quantization_config with quant_algo, quant_type and `ignore`, also in the
                      header of every shard

Where scales come from, per layer: beside stored FP8 codes, else the `_amax` buffers of
backbone.pt, else those stored in the files of a native save; with --from-bf16 from the weights
themselves and a calibration file. Which layers stay as they are: what the export ignores, what it
has no scale for, what is no matrix (convolutions), the preset of the family, and what was typed.
A kept layer that is stored in FP8 is taken from the base transformer.

Options are those of SGLang's tool of the same name, which this replaces. Its arithmetic (divide in
float32) is kept for exports left in BF16. --from-bf16 divides in the model's dtype, as ModelOpt's
own exports of FLUX.1 do, code for code; its exports of Wan divide in float32.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import click
import torch
from torch import Tensor

from diffquant import patterns, preset
from diffquant.converters._command import ConverterCommand
from diffquant.converters._component import Component, family_of, spellings
from diffquant.converters._fp8_report import Judged
from diffquant.converters._fp8_scales import FP8, Scales, source_and_scales
from diffquant.converters._options import (
    Calibration,
    Writing,
    calibration_options,
    writing_options,
)
from diffquant.converters._progress import bar
from diffquant.converters._report import NOTHING, Report, row_spans, tell
from diffquant.encodings import ENCODINGS, Recipe
from diffquant.errors import ConvertError, UsageError
from diffquant.families import FAMILIES, Family
from diffquant.plan import Encoding, Role
from diffquant.writing import Declared, require_absent, write

LARGEST = 448.0
#: Weights that are encoded together: their float32 copy stays in the cache.
IN_CACHE = 1 << 17
SCALES = ("weight_scale", "input_scale")


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What was done, in counts of weights, under the names of the peer's tool where it has one."""

    quantized_weights: int
    bf16_fallback_weights: int
    preserved_ignored_weights: int
    added_scale_tensors: int
    dynamic_inputs: int
    output_shards: int
    output_bytes: int
    preset: str | None
    report: Report = NOTHING

    def to_json(self) -> dict[str, Any]:
        """The counts, and what the worst layers lost."""
        counts = {name: value for name, value in asdict(self).items() if name != "report"}
        return {**counts, "fidelity": self.report.to_json()}


def build(
    writing: Writing,
    *,
    export: str | None = None,
    backbone: Path | None = None,
    from_bf16: str | None = None,
    calibration: Calibration = Calibration(),  # noqa: B008 - frozen
    base: str | None = None,
    model_type: str = "auto",
    keep_bf16: Sequence[str] = (),
    maxbound: float = LARGEST,
) -> Statistics:
    """Write the FP8 transformer; one of `export` and `from_bf16` names the weights.

    calibration  where input scales of plain weights come from; layers it lacks are quantized
                 dynamically
    base         the BF16 transformer: kept layers come from it, and the report compares with it
    keep_bf16    regular expressions, searched in module names

    Raises ConvertError for what is no per-tensor FP8 source and for a layer that lost more than
    `writing.max_error`, UsageError for options that match nothing, PresetError for a preset that
    does not fit, SourceError for what cannot be found.
    """
    source, measured = source_and_scales(
        export, backbone, from_bf16, calibration, maxbound, dry_run=writing.dry_run
    )
    family = family_of(source)
    chosen = _preset(model_type, family, source)
    kept = _kept(source, family, chosen, keep_bf16)
    original = None if base is None else Component.open(base)
    layers = _layers(source, family, measured, kept)
    stored = list(_declared(source, original, layers))
    block = _quantization_config(source, family, layers)
    config = {**source.config, "quantization_config": block}
    done = _statistics(layers, source, stored, chosen)
    if writing.dry_run:
        require_absent(writing.output_dir, writing.overwrite)
        return done
    scales = {module: layer.scales for module, layer in layers.items() if layer.scales is not None}
    judged = Judged(scales, source, original, writing)
    with bar() as shown:
        written = write(
            writing.output_dir,
            stored,
            origin=_origin(source, original, backbone, layers, maxbound),
            beside=source.root,
            config=config,
            metadata=_metadata(config),
            max_shard_size=writing.shard_bytes,
            overwrite=writing.overwrite,
            check=None if writing.no_check else judged.check(shown.told("checking")),
            on_progress=shown.told("writing"),
        )
    return replace(done, output_shards=len(written.shards), report=judged.report)


# which layers stay ----------------------------------------------------------------------------------


def _preset(model_type: str, family: Family | None, source: Component) -> preset.Preset | None:
    """The rules of what stays: of the family in `auto`, none in `none`, else of the family named."""
    algorithm = "fp8" if source.fresh else "modelopt_fp8"
    if model_type == "none":
        return None
    if model_type != "auto":
        named = preset.for_algorithm(model_type.replace("-", "_"), algorithm)
        if named is None:
            raise UsageError(
                f"--model-type {model_type} has no preset for {algorithm}",
                hint=f"one of: auto, none, {', '.join(_with_preset(algorithm))}",
            )
        return named
    own = next((name for name, each in FAMILIES.load_all().items() if each is family), None)
    if own is None and source.fresh:
        raise ConvertError(
            f"nothing is known about which layers of a {source.config.get('_class_name')} may be "
            "quantized",
            hint="--model-type none quantizes every linear; --keep-bf16-pattern leaves some out",
        )
    return None if own is None else preset.for_algorithm(own, algorithm)


def _with_preset(algorithm: str) -> list[str]:
    presets = (preset.load(name) for name in preset.names())
    return sorted(each.family for each in presets if algorithm in each.algorithms)


def _kept(
    source: Component,
    family: Family | None,
    chosen: preset.Preset | None,
    expressions: Sequence[str],
) -> frozenset[str]:
    """Modules that stay because a preset, the family or a typed expression says so."""
    modules = source.modules()
    matrices = [module for module in modules if len(source.weight(module).shape) == 2]
    kept = set() if chosen is None else set(preset.kept(chosen, matrices))
    if chosen is not None and source.fresh and family is not None:
        for pattern in family.sensitive:
            kept.update(patterns.select(pattern, matrices))
    for expression in expressions:
        typed = re.compile(expression)
        hit = {
            module
            for module in modules
            if any(typed.search(name) for name in spellings(module, family))
        }
        if not hit:
            raise UsageError(
                f"--keep-bf16-pattern {expression!r} matches no module",
                hint=f"names are like {matrices[0]!r}",
            )
        kept |= hit
    return frozenset(kept)


Treatment = Literal["fp8", "from_base", "as_it_is"]


@dataclass(frozen=True, slots=True)
class _Layer:
    """What becomes of one module; `scales` of those in FP8."""

    treatment: Treatment
    fallback: bool = False
    scales: Scales | None = field(default=None, compare=False)


def _layers(
    source: Component,
    family: Family | None,
    measured: Mapping[str, Scales],
    kept: frozenset[str],
) -> dict[str, _Layer]:
    """Every module with a weight, and what becomes of it. A kept one stays even if it is ignored."""
    linears = _linears(source, family)
    ignored = _ignored(source, family)
    layers: dict[str, _Layer] = {}
    for module in source.modules():
        weight = source.weight(module)
        if module in kept:
            coded = weight.dtype == FP8
            layers[module] = _Layer("from_base" if coded else "as_it_is", fallback=True)
        elif (
            module in measured
            and module in linears
            and (weight.dtype == FP8 or module not in ignored)
        ):
            layers[module] = _Layer("fp8", scales=measured[module])
        elif weight.dtype == FP8:
            raise ConvertError(
                f"{module!r} is stored in FP8 and has no scale",
                hint="--modelopt-backbone-ckpt backbone.pt has it",
            )
        else:
            layers[module] = _Layer("as_it_is")
    return layers


def _linears(source: Component, family: Family | None) -> frozenset[str]:
    """Modules that are linears: as the class has them, where it is known; otherwise matrices."""
    matrices = frozenset(name for name in source.modules() if len(source.weight(name).shape) == 2)
    if family is None:
        return matrices
    return matrices & family.inventory(source.config).linears


def _ignored(source: Component, family: Family | None) -> frozenset[str]:
    """Modules the export ignores. Patterns speak of its own names, whole names may be the peer's.

    A pattern must not meet the peer's: `*proj_out` would hit every `ff.net.2`, its `ff.proj_out`.
    """
    ignore = source.declaration.get("ignore", ())
    return frozenset(
        module
        for module in source.modules()
        if any(patterns.ignores(pattern, module) for pattern in ignore)
        or not set(ignore).isdisjoint(spellings(module, family))
    )


# what is written ------------------------------------------------------------------------------------


def _declared(
    source: Component, base: Component | None, layers: Mapping[str, _Layer]
) -> Iterator[Declared]:
    """Every tensor of the output, in the order of the input."""
    for name in source.header.tensors:
        module, _, leaf = name.rpartition(".")
        if "_quantizer." in name:
            continue
        layer = layers.get(module, _Layer("as_it_is"))
        if leaf == "weight" and layer.scales is not None:
            yield from _quantized(source, module, layer.scales)
        elif leaf in SCALES and module in layers:
            continue
        elif layer.treatment == "from_base":
            yield _copied(_require_base(base, module), name)
        else:
            yield _copied(source, name)


def _copied(component: Component, name: str) -> Declared:
    stored = component.header.tensors.get(name)
    if stored is None:
        raise ConvertError(f"the base transformer {str(component.root)!r} has no {name!r}")
    return Declared(name, stored.dtype, stored.shape, partial(component.tensor, name))


def _require_base(base: Component | None, module: str) -> Component:
    if base is None:
        raise ConvertError(
            f"{module!r} is to stay in BF16 and the export has it in FP8 only",
            hint="--base-transformer-dir DIR, or --model-type none to keep what the export chose",
        )
    return base


def _quantized(source: Component, module: str, scales: Scales) -> Iterator[Declared]:
    shape = source.weight(module).shape
    make = partial(_codes, source, module, scales.weight)
    yield Declared(f"{module}.weight", FP8, shape, make)
    yield Declared(f"{module}.weight_scale", "F32", (1,), scales.weight)
    if scales.input is not None:
        yield Declared(f"{module}.input_scale", "F32", (1,), partial(torch.clone, scales.input))


def _codes(source: Component, module: str, scale: Callable[[], Tensor]) -> Tensor:
    """FP8 codes of a weight: saturated, never NaN.

    A ModelOpt export of zeros has a scale of zero and NaN codes; they are zeros here.
    """
    weight = source.tensor(f"{module}.weight")
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    recipe = Recipe(granularity="tensor", scale=scale().reshape(()))
    for rows in row_spans((weight.shape[0], weight.shape[1]), IN_CACHE):
        codes[rows.as_slice()] = _coded(weight[rows.as_slice()], source.fresh, recipe)
    return codes


def _coded(weight: Tensor, fresh: bool, recipe: Recipe) -> Tensor:
    if weight.dtype == torch.float8_e4m3fn:
        return weight.float().nan_to_num_(nan=0.0).to(weight.dtype)
    encode = ENCODINGS.load("fp8").encode
    assert encode is not None, "fp8 can be written"
    return encode(weight if fresh else weight.float(), Encoding("fp8"), recipe)[Role.CODES]


def _quantization_config(
    source: Component, family: Family | None, layers: Mapping[str, _Layer]
) -> dict[str, Any]:
    """The export's own block, completed; `ignore` also in the names the peer's runtime uses."""
    plain = [module for module, layer in layers.items() if layer.scales is None]
    names = {name for module in plain for name in spellings(module, family)}
    fallback = {"producer": {"name": "diffquant"}, "config_groups": _config_groups(layers)}
    return {
        **fallback,
        **source.declaration,
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "quant_type": "FP8",
        "ignore": sorted(names | set(source.declaration.get("ignore", ()))),
    }


def _config_groups(layers: Mapping[str, _Layer]) -> dict[str, Any]:
    """One group for all linears; inputs are static when every layer has their scale."""
    found = [layer.scales for layer in layers.values() if layer.scales is not None]
    dynamic = any(scales.input is None for scales in found)
    number = {"num_bits": 8, "type": "float"}
    return {
        "group_0": {
            "weights": {"dynamic": False, **number},
            "input_activations": {"dynamic": dynamic, **number},
            "targets": ["Linear"],
        }
    }


def _metadata(config: Mapping[str, Any]) -> dict[str, str]:
    """What the peer's loader reads from a shard when there is no config.json beside it."""
    block = json.dumps(config["quantization_config"], sort_keys=True)
    return {
        "_class_name": str(config.get("_class_name", "")),
        "config": json.dumps(config, sort_keys=True),
        "quantization_config": block,
        "_quantization_metadata": block,
    }


def _origin(
    source: Component,
    base: Component | None,
    backbone: Path | None,
    layers: Mapping[str, _Layer],
    maxbound: float,
) -> str:
    """Names everything the data depends on, so that only a run of the same inputs is resumed."""
    weights = [*source.header.files, *(base.header.files if base else ())]
    files = [*weights, *([] if backbone is None else [backbone])]
    facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    found = ((module, layer.scales) for module, layer in layers.items())
    inputs = {
        module: float(scales.input)
        for module, scales in found
        if scales is not None and scales.input is not None
    }
    return json.dumps([facts, inputs, maxbound])


def _statistics(
    layers: Mapping[str, _Layer],
    source: Component,
    stored: Sequence[Declared],
    chosen: preset.Preset | None,
) -> Statistics:
    scaled = [layer.scales for layer in layers.values() if layer.scales is not None]
    fallbacks = sum(layer.fallback for layer in layers.values())
    dynamic = sum(scales.input is None for scales in scaled)
    return Statistics(
        quantized_weights=len(scaled),
        bf16_fallback_weights=fallbacks,
        preserved_ignored_weights=len(layers) - len(scaled) - fallbacks,
        added_scale_tensors=2 * len(scaled) - dynamic,
        dynamic_inputs=dynamic,
        output_shards=0,
        output_bytes=sum(tensor.nbytes for tensor in stored),
        preset=None if chosen is None else chosen.name,
    )


# the command ----------------------------------------------------------------------------------------


@click.command(cls=ConverterCommand, short_help="Per-tensor FP8 of an export or plain BF16.")
@click.option("--modelopt-hf-dir", metavar="DIR", help="ModelOpt export, or its pipeline.")
@click.option(
    "--modelopt-backbone-ckpt",
    type=click.Path(exists=True, path_type=Path),
    help="backbone.pt or its directory; only exports of 0.44 and older need it.",
)
@click.option("--from-bf16", metavar="DIR", help="Plain weights to quantize instead of an export.")
@calibration_options
@click.option(
    "--base-transformer-dir", metavar="DIR", help="The BF16 transformer that kept layers come from."
)
@click.option("--model-type", default="auto", show_default=True, help="auto, none, or a family.")
@click.option("--keep-bf16-pattern", multiple=True, metavar="REGEX", help="May be repeated.")
@click.option("--maxbound", default=LARGEST, show_default=True)
@writing_options
def main(
    modelopt_hf_dir: str | None,
    modelopt_backbone_ckpt: Path | None,
    from_bf16: str | None,
    calibration: Calibration,
    base_transformer_dir: str | None,
    model_type: str,
    keep_bf16_pattern: tuple[str, ...],
    maxbound: float,
    writing: Writing,
) -> None:
    """Build a per-tensor FP8 transformer from a ModelOpt export or from plain weights.

    Prints what was done as JSON, and the layers that lost most on stderr.
    """
    done = build(
        writing,
        export=modelopt_hf_dir,
        backbone=modelopt_backbone_ckpt,
        from_bf16=from_bf16,
        calibration=calibration,
        base=base_transformer_dir,
        model_type=model_type,
        keep_bf16=keep_bf16_pattern,
        maxbound=maxbound,
    )
    tell(done.report, done.to_json(), writing)


if __name__ == "__main__":
    main()
