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
from dataclasses import asdict, dataclass, field
from functools import cache, partial
from pathlib import Path
from pickle import UnpicklingError  # noqa: TID251 - raised by torch.load(weights_only=True)
from typing import Any, Literal

import click
import torch
from torch import Tensor

from diffquant import headers, patterns, preset, sources
from diffquant.encodings import ENCODINGS, Recipe
from diffquant.errors import ConvertError, DiffquantError, UsageError
from diffquant.families import FAMILIES, Family, spelled
from diffquant.plan import Encoding, Role
from diffquant.tensors import Weights
from diffquant.writing import GIB, Declared, Progress, write

FP8 = "F8_E4M3"
LARGEST = 448.0
SCALES = ("weight_scale", "input_scale")

#: Leaves that no per-tensor FP8 file has: their layers mean something else than codes * scale.
FOREIGN = ("pre_quant_scale", "svdquant_lora_a", "svdquant_lora_b", "weight_scale_2")

#: Names the peer's tool writes into `ignore` instead of diffusers' own.
PEER_NAMES = (
    (re.compile(r"((?:^|\.)(?:audio_)?ff)\.net\.0\.proj$"), r"\1.proj_in"),
    (re.compile(r"((?:^|\.)(?:audio_)?ff)\.net\.2$"), r"\1.proj_out"),
    (re.compile(r"(\.(?:img|txt)_mod)\.1$"), r"\1"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """What was done, in counts of weights, under the names of the peer's tool where it has one."""

    quantized_weights: int
    bf16_fallback_weights: int
    preserved_ignored_weights: int
    added_scale_tensors: int
    dynamic_inputs: int
    output_shards: int
    preset: str | None


def build(
    output: Path,
    *,
    export: str | None = None,
    backbone: Path | None = None,
    from_bf16: str | None = None,
    calibration: Path | None = None,
    base: str | None = None,
    model_type: str = "auto",
    keep_bf16: Sequence[str] = (),
    maxbound: float = LARGEST,
    max_shard_size: int = 10 * GIB,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> Statistics:
    """Write the FP8 transformer to `output`; one of `export` and `from_bf16` names the weights.

    keep_bf16    regular expressions, searched in module names
    calibration  JSON: layer -> amax of its input; layers it lacks are quantized dynamically

    Raises ConvertError for what is no per-tensor FP8 source, UsageError for options that match
    nothing, PresetError for a preset that does not fit, SourceError for what cannot be found.
    """
    source, measured = _source(export, backbone, from_bf16, calibration, maxbound)
    family = _family(source)
    chosen = _preset(model_type, family, source)
    kept = _kept(source, family, chosen, keep_bf16)
    original = None if base is None else _Component.open(base)
    layers = _layers(source, family, measured, kept)
    stored = list(_declared(source, original, layers))
    block = _quantization_config(source, family, layers)
    config = {**source.config, "quantization_config": block}
    written = write(
        output,
        stored,
        origin=_origin(source, original, backbone, calibration, maxbound),
        beside=source.root,
        config=config,
        metadata=_metadata(config),
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        on_progress=on_progress,
    )
    return _statistics(layers, source, len(written.shards), chosen)


# where weights and scales come from -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Component:
    """A component on disk: header, configuration and mapped tensors."""

    root: Path
    config: Mapping[str, Any]
    header: headers.Header
    weights: Weights
    fresh: bool = False  # plain weights that nobody quantized yet

    @staticmethod
    def open(source: str, fresh: bool = False) -> "_Component":
        found = sources.checkpoint(source)
        header = headers.read(found.files)
        return _Component(found.root, found.config, header, Weights(found.files), fresh)

    def tensor(self, name: str) -> Tensor:
        return self.weights.tensor(self.header.tensors[name].file, name)

    def modules(self) -> list[str]:
        """Modules that have a weight, in stored order."""
        names = (name.rpartition(".") for name in self.header.tensors)
        return [module for module, _, leaf in names if leaf == "weight"]

    def weight(self, module: str) -> headers.Tensor:
        return self.header.tensors[f"{module}.weight"]

    @property
    def declaration(self) -> Mapping[str, Any]:
        return self.config.get("quantization_config") or {}


@dataclass(frozen=True, slots=True)
class _Scales:
    """Scales of one layer, float32 (1,). `weight` is called when it is needed: it may read it."""

    weight: Callable[[], Tensor]
    input: Tensor | None


def _source(
    export: str | None,
    backbone: Path | None,
    from_bf16: str | None,
    calibration: Path | None,
    maxbound: float,
) -> tuple[_Component, dict[str, _Scales]]:
    """The component to convert, and the scales known for its layers."""
    if (export is None) == (from_bf16 is None):
        raise UsageError("one source is needed", hint="--modelopt-hf-dir DIR, or --from-bf16 DIR")
    if from_bf16 is not None:
        if backbone is not None:
            raise UsageError(
                "--modelopt-backbone-ckpt belongs to an export, not to --from-bf16",
                hint="--calibration FILE gives input scales to plain weights",
            )
        plain = _Component.open(from_bf16, fresh=True)
        _require_unquantized(plain)
        return plain, _measured(plain, calibration, maxbound)
    if calibration is not None:
        raise UsageError("--calibration goes with --from-bf16; an export has its own scales")
    component = _Component.open(str(export))
    _require_fp8(component)
    buffers = {name: component.tensor for name in component.header.tensors if "_amax" in name}
    known = _from_amax({name: read(name) for name, read in buffers.items()}, maxbound)
    if backbone is not None:
        known |= _from_amax(_backbone(backbone), maxbound)
    known |= _beside_codes(component)
    if not known:
        raise ConvertError(
            f"{str(component.root)!r} holds no FP8 scales: an exporter of 0.44 or older left the "
            "weights as they were",
            hint="--modelopt-backbone-ckpt backbone.pt has them, or use --from-bf16",
        )
    return component, known


def _require_fp8(component: _Component) -> None:
    block = component.declaration
    algorithm = block.get("quant_algo") or "FP8"
    native = any("_quantizer._amax" in name for name in component.header.tensors)
    if block.get("quant_method") != "modelopt" and not native:
        raise ConvertError(
            f"{str(component.root)!r} is no ModelOpt export: its config.json says quant_method "
            f"{block.get('quant_method')!r}",
            hint="--from-bf16 quantizes plain weights",
        )
    foreign = [name for name in component.header.tensors if name.endswith(FOREIGN)]
    if algorithm != "FP8" or foreign:
        raise ConvertError(
            f"per-tensor FP8 was needed, {str(component.root)!r} is "
            f"{algorithm if algorithm != 'FP8' else f'something with {foreign[0]!r}'}",
            hint="diffquant loads it as it is: --transformer-path",
        )


def _require_unquantized(component: _Component) -> None:
    low = [name for name, each in component.header.tensors.items() if each.dtype == FP8]
    if low or component.declaration.get("quant_algo"):
        first = low[0] if low else "its config.json"
        raise ConvertError(
            f"--from-bf16 needs plain weights, and {first!r} says they are quantized",
            hint="--modelopt-hf-dir takes a ModelOpt export",
        )


def _from_amax(buffers: Mapping[str, Tensor], maxbound: float) -> dict[str, _Scales]:
    """Scales of the layers for which both quantizers saw values. The input's may have seen zero."""
    ending = ".weight_quantizer._amax"
    layers = [name.removesuffix(ending) for name in buffers if name.endswith(ending)]
    pairs = {
        layer: (buffers[layer + ending], buffers.get(f"{layer}.input_quantizer._amax"))
        for layer in layers
    }
    return {
        layer: _Scales(
            partial(_scale, layer, weight, maxbound),
            None if not inputs.any() else _scale(layer, inputs, maxbound),
        )
        for layer, (weight, inputs) in pairs.items()
        if inputs is not None
    }


def _scale(layer: str, amax: Tensor, maxbound: float) -> Tensor:
    if amax.numel() != 1:
        raise ConvertError(
            f"{layer!r} has amax values of shape {list(amax.shape)}, one per tensor was needed"
        )
    return _nonzero(amax.float().reshape(1) / maxbound)


def _nonzero(scale: Tensor) -> Tensor:
    """A layer of zeros has codes of zero, and any scale will do: one that can be divided by."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _backbone(path: Path) -> dict[str, Tensor]:
    """The `_amax` buffers of a ModelOpt state, mapped; nothing of it is executed."""
    file = path / "backbone.pt" if path.is_dir() else path
    if not file.is_file():
        raise ConvertError(f"no file {str(file)!r}", hint="mto.save writes it: backbone.pt")
    try:
        loaded = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, UnpicklingError) as error:
        raise ConvertError(f"{str(file)!r} is no plain torch state: {error}") from error
    state = loaded.get("model_state_dict", loaded)
    return {name: value for name, value in state.items() if name.endswith("_amax")}


def _beside_codes(component: _Component) -> dict[str, _Scales]:
    """Scales stored beside FP8 codes: those are the ones the codes were made with."""
    known = component.header.tensors
    found: dict[str, _Scales] = {}
    for module in component.modules():
        if component.weight(module).dtype != FP8:
            continue
        names = (f"{module}.weight_scale", f"{module}.weight_quantizer._scale")
        name = next((name for name in names if name in known), None)
        if name is None:
            continue
        if component.tensor(name).numel() != 1:
            raise ConvertError(
                f"{name!r} has shape {list(known[name].shape)}, one scale per tensor was needed",
                hint="diffquant loads it as it is: --transformer-path",
            )
        inputs = f"{module}.input_scale"
        seen = component.tensor(inputs).float().reshape(1) if inputs in known else None
        found[module] = _Scales(
            partial(_stored_scale, component, name), seen if seen is not None and seen else None
        )
    return found


def _stored_scale(component: _Component, name: str) -> Tensor:
    return _nonzero(component.tensor(name).float().reshape(1))


def _measured(
    component: _Component, calibration: Path | None, maxbound: float
) -> dict[str, _Scales]:
    """Scales of every matrix from its own values, and of inputs from the calibration file."""
    modules = component.modules()
    inputs = _calibrated(calibration, modules)
    return {
        module: _Scales(
            cache(partial(_measure, component, module, maxbound)),
            torch.tensor([inputs[module] / maxbound]) if inputs.get(module) else None,
        )
        for module in modules
        if len(component.weight(module).shape) == 2
    }


def _measure(component: _Component, module: str, maxbound: float) -> Tensor:
    low, high = component.tensor(f"{module}.weight").aminmax()
    return _scale(module, torch.maximum(-low, high), maxbound)


def _calibrated(path: Path | None, modules: Sequence[str]) -> dict[str, float]:
    if path is None:
        return {}
    table: dict[str, float] = json.loads(path.read_text("utf-8"))
    unknown = [name for name in table if name not in modules]
    if unknown:
        near = patterns.nearest(unknown[0], modules)
        raise ConvertError(
            f"calibration speaks of {unknown[0]!r}, which the model does not have",
            hint=f"nearest: {', '.join(near)}" if near else None,
        )
    return table


# which layers stay ----------------------------------------------------------------------------------


def _family(source: _Component) -> Family | None:
    class_name = source.config.get("_class_name")
    known = FAMILIES.load_all().values()
    return next((family for family in known if class_name in family.class_names), None)


def _preset(model_type: str, family: Family | None, source: _Component) -> preset.Preset | None:
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
    source: _Component,
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
            if any(typed.search(name) for name in _names(module, family))
        }
        if not hit:
            raise UsageError(
                f"--keep-bf16-pattern {expression!r} matches no module",
                hint=f"names are like {matrices[0]!r}",
            )
        kept |= hit
    return frozenset(kept)


def _names(module: str, family: Family | None) -> tuple[str, ...]:
    """The module's own name, and those the peer's tool and runtime know it by."""
    names = {module: None}
    for expression, replacement in PEER_NAMES:
        names[expression.sub(replacement, module)] = None
    if family is not None and "sglang" in family.namings:
        names.update(dict.fromkeys(spelled(family.namings["sglang"], module)))
    return tuple(names)


Treatment = Literal["fp8", "from_base", "as_it_is"]


@dataclass(frozen=True, slots=True)
class _Layer:
    """What becomes of one module; `scales` of those in FP8."""

    treatment: Treatment
    fallback: bool = False
    scales: _Scales | None = field(default=None, compare=False)


def _layers(
    source: _Component,
    family: Family | None,
    measured: Mapping[str, _Scales],
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


def _linears(source: _Component, family: Family | None) -> frozenset[str]:
    """Modules that are linears: as the class has them, where it is known; otherwise matrices."""
    matrices = frozenset(name for name in source.modules() if len(source.weight(name).shape) == 2)
    if family is None:
        return matrices
    return matrices & family.inventory(source.config).linears


def _ignored(source: _Component, family: Family | None) -> frozenset[str]:
    """Modules the export ignores. Patterns speak of its own names, whole names may be the peer's.

    A pattern must not meet the peer's: `*proj_out` would hit every `ff.net.2`, its `ff.proj_out`.
    """
    ignore = source.declaration.get("ignore", ())
    return frozenset(
        module
        for module in source.modules()
        if any(patterns.ignores(pattern, module) for pattern in ignore)
        or not set(ignore).isdisjoint(_names(module, family))
    )


# what is written ------------------------------------------------------------------------------------


def _declared(
    source: _Component, base: _Component | None, layers: Mapping[str, _Layer]
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


def _copied(component: _Component, name: str) -> Declared:
    stored = component.header.tensors.get(name)
    if stored is None:
        raise ConvertError(f"the base transformer {str(component.root)!r} has no {name!r}")
    return Declared(name, stored.dtype, stored.shape, partial(component.tensor, name))


def _require_base(base: _Component | None, module: str) -> _Component:
    if base is None:
        raise ConvertError(
            f"{module!r} is to stay in BF16 and the export has it in FP8 only",
            hint="--base-transformer-dir DIR, or --model-type none to keep what the export chose",
        )
    return base


def _quantized(source: _Component, module: str, scales: _Scales) -> Iterator[Declared]:
    shape = source.weight(module).shape
    make = partial(_codes, source, module, scales.weight)
    yield Declared(f"{module}.weight", FP8, shape, make)
    yield Declared(f"{module}.weight_scale", "F32", (1,), scales.weight)
    if scales.input is not None:
        yield Declared(f"{module}.input_scale", "F32", (1,), partial(torch.clone, scales.input))


def _codes(source: _Component, module: str, scale: Callable[[], Tensor]) -> Tensor:
    """FP8 codes of a weight: saturated, never NaN.

    A ModelOpt export of zeros has a scale of zero and NaN codes; they are zeros here.
    """
    weight = source.tensor(f"{module}.weight")
    if weight.dtype == torch.float8_e4m3fn:
        finite = weight.float().nan_to_num_(nan=0.0)
        return finite.to(weight.dtype)
    values = weight if source.fresh else weight.float()
    encode = ENCODINGS.load("fp8").encode
    assert encode is not None, "fp8 can be written"
    recipe = Recipe(granularity="tensor", scale=scale().reshape(()))
    return encode(values, Encoding("fp8"), recipe)[Role.CODES]


def _quantization_config(
    source: _Component, family: Family | None, layers: Mapping[str, _Layer]
) -> dict[str, Any]:
    """The export's own block, completed; `ignore` also in the names the peer's runtime uses."""
    plain = [module for module, layer in layers.items() if layer.scales is None]
    names = {name for module in plain for name in _names(module, family)}
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
    source: _Component,
    base: _Component | None,
    backbone: Path | None,
    calibration: Path | None,
    maxbound: float,
) -> str:
    """Names everything the data depends on, so that only a run of the same inputs is resumed."""
    weights = [*source.header.files, *(base.header.files if base else ())]
    files = [*weights, *(path for path in (backbone, calibration) if path is not None)]
    facts = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return json.dumps([facts, maxbound])


def _statistics(
    layers: Mapping[str, _Layer], source: _Component, shards: int, chosen: preset.Preset | None
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
        output_shards=shards,
        preset=None if chosen is None else chosen.name,
    )


# the command ----------------------------------------------------------------------------------------


@click.command(name="build_modelopt_fp8_transformer")
@click.option("--modelopt-hf-dir", metavar="DIR", help="ModelOpt export, or its pipeline.")
@click.option(
    "--modelopt-backbone-ckpt",
    type=click.Path(exists=True, path_type=Path),
    help="backbone.pt or its directory; only exports of 0.44 and older need it.",
)
@click.option("--from-bf16", metavar="DIR", help="Plain weights to quantize instead of an export.")
@click.option(
    "--calibration",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="JSON, layer -> amax of its input; for --from-bf16.",
)
@click.option("--output-dir", required=True, type=click.Path(path_type=Path))
@click.option(
    "--base-transformer-dir", metavar="DIR", help="The BF16 transformer that kept layers come from."
)
@click.option("--model-type", default="auto", show_default=True, help="auto, none, or a family.")
@click.option("--keep-bf16-pattern", multiple=True, metavar="REGEX", help="May be repeated.")
@click.option("--maxbound", default=LARGEST, show_default=True)
@click.option("--overwrite", is_flag=True, help="Replace the output directory.")
def main(
    modelopt_hf_dir: str | None,
    modelopt_backbone_ckpt: Path | None,
    from_bf16: str | None,
    calibration: Path | None,
    output_dir: Path,
    base_transformer_dir: str | None,
    model_type: str,
    keep_bf16_pattern: tuple[str, ...],
    maxbound: float,
    overwrite: bool,
) -> None:
    """Build a per-tensor FP8 transformer from a ModelOpt export or from plain weights.

    Prints what was done as JSON.
    """
    try:
        done = build(
            output_dir,
            export=modelopt_hf_dir,
            backbone=modelopt_backbone_ckpt,
            from_bf16=from_bf16,
            calibration=calibration,
            base=base_transformer_dir,
            model_type=model_type,
            keep_bf16=keep_bf16_pattern,
            maxbound=maxbound,
            overwrite=overwrite,
        )
    except DiffquantError as error:
        refusal = click.ClickException(str(error))
        refusal.exit_code = error.exit_code
        raise refusal from error
    click.echo(json.dumps(asdict(done), indent=2))


if __name__ == "__main__":
    main()
