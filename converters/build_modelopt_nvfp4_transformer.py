"""Build an NVFP4 transformer: a ModelOpt export with sensitive layers in BF16, or from plain weights.

    X.weight          U8 [N, K / 2]        two E2M1, the even column in bits 0-3
    X.weight_scale    F8_E4M3 [N, K / 16]  multiplies
    X.weight_scale_2  F32 ()               multiplies, weight amax / 2688; one for q, k and v together
    X.input_scale     F32 ()               input amax / 2688; absent where inputs quantize dynamically
    config.json       quantization_config with quant_algo NVFP4 and `ignore`

--modelopt-hf-dir takes the codes and scales of an export as they are, and the layers that
--pattern-preset and --keep-bf16-pattern name from --base-transformer-dir; whatever belonged to those
layers in the export goes, smoothing and low-rank branches too. --swap-weight-nibbles says that the
export has the even column in bits 4-7; it is written with the even one in bits 0-3, as every reader
takes it. One layer is held against the base first, so a wrong order or a wrong base is refused.

--from-bf16 needs no ModelOpt and gives the codes and scales that ModelOpt's export of the same weights
has, byte for byte; --calibrate or --calibration adds the scales of inputs. --dialect compressed_tensors
writes them for vLLM: X.weight_packed, and X.weight_global_scale and X.input_global_scale, which divide.
--dialect comfy writes one .safetensors file for ComfyUI, with the bytes that comfy-kitchen makes.

Options are those of SGLang's tool of the same name, which this replaces.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import click

from diffquant import headers, planner, preset, settle, sources
from diffquant.converters import _inputs
from diffquant.converters._command import ConverterCommand
from diffquant.converters._component import spellings
from diffquant.converters._contract import Converted, convert, plain, quantized
from diffquant.converters._options import (
    Calibration,
    Choosing,
    Writing,
    calibration_options,
    writing_options,
)
from diffquant.converters._report import compared, tell
from diffquant.errors import ConvertError, UsageError
from diffquant.families import FAMILIES
from diffquant.formats import FORMATS, Hints
from diffquant.online import Stay
from diffquant.plan import Encoding, LayerPlan, Part, Piece, Plan, TensorRef

ENCODING = "nvfp4"
#: What --pattern-preset stands for where it is not typed: the peer's tool keeps nothing of an
#: export; plain weights have not been chosen from yet.
NOTHING, FAMILY = "none", "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class Spelling:
    """How a dialect's own tool makes NVFP4.

    encoding    in some the scale of the tensor divides
    arithmetic  whose order of rounding
    shared_by   the format whose stored weights are quantized as one each; None: q, k and v share a
                tensor scale wherever they lie
    """

    encoding: Encoding = Encoding(ENCODING)
    arithmetic: str = "modelopt"
    shared_by: str | None = None


#: Dialects of plain weights.
DIALECTS: Mapping[str, Spelling] = {
    "modelopt": Spelling(),
    "compressed_tensors": Spelling(encoding=Encoding(ENCODING, (("tensor_scale", "divide"),))),
    "comfy": Spelling(arithmetic="comfy", shared_by="comfy"),
}
#: NVFP4 loses a tenth; another order of nibbles, or another model, loses everything.
MUCH = 0.5


def mixed(
    writing: Writing,
    *,
    export: str,
    base: str,
    pattern_preset: str = NOTHING,
    keep_bf16: Sequence[str] = (),
    swap_weight_nibbles: bool | None = None,
) -> Converted:
    """Write the export with the layers named taken from the base.

    keep_bf16            globs that match the whole name of a layer; * matches dots too
    swap_weight_nibbles  None: as the export says itself

    Raises ConvertError for what is no NVFP4 export of that base, UsageError for a glob that matches
    nothing, PresetError for a preset that does not fit.
    """
    truth = plain(base)
    exported = _export(export, truth, swap_weight_nibbles)
    chosen = _preset(pattern_preset, truth.family)
    rules = {} if chosen is None else preset.kept(chosen, [layer.path for layer in truth.layers])
    name = "" if chosen is None else chosen.name
    stays = {path: Stay(f"preset {name}", rule.reason) for path, rule in rules.items()}
    plan = _spliced(exported, truth, stays | globbed(truth, keep_bf16))
    return convert(plan, truth, "modelopt", writing)


def fresh(
    writing: Writing,
    *,
    source: str,
    dialect: str = "modelopt",
    pattern_preset: str = FAMILY,
    keep_bf16: Sequence[str] = (),
    calibration: Calibration = Calibration(),  # noqa: B008 - frozen
) -> Converted:
    """Quantize the plain weights of `source`; inputs are static where calibration saw them.

    Raises what `_contract.plain`, `quantized` and `convert` raise, and UsageError for a glob that
    matches nothing.
    """
    truth = plain(source)
    paths = [layer.path for layer in truth.layers]
    kept = globbed(truth, keep_bf16)
    amax = _inputs.amax(calibration, source, paths, number=ENCODING, dry_run=writing.dry_run)
    plan = quantized(truth, ENCODING, Choosing(preset=pattern_preset), amax, keep=kept)
    return convert(_stored_as(plan, DIALECTS[dialect]), truth, dialect, writing)


def globbed(plan: Plan, globs: Iterable[str]) -> dict[str, Stay]:
    """Layers that a glob matches by any name they have. Raises UsageError for one without any."""
    family = FAMILIES.load(plan.family)
    names = {layer.path: spellings(layer.path, family) for layer in plan.layers}
    found: dict[str, Stay] = {}
    for glob in globs:
        whole = re.compile(".*".join(map(re.escape, glob.split("*"))))
        hit = [path for path, known in names.items() if any(map(whole.fullmatch, known))]
        if not hit:
            raise UsageError(
                f"--keep-bf16-pattern {glob!r} matches no linear layer",
                hint=f"names are like {next(iter(names))!r}",
            )
        found |= dict.fromkeys(hit, Stay(f"--keep-bf16-pattern {glob}"))
    return found


def _preset(name: str, family: str) -> preset.Preset | None:
    if name == NOTHING:
        return None
    if name == FAMILY:
        return preset.for_algorithm(family, "modelopt_nvfp4")
    return preset.rules_for(family, name)


def _stored_as(plan: Plan, spelling: Spelling) -> Plan:
    """The plan with NVFP4 spelled that way, of inputs too where their scale is stored."""
    together = {} if spelling.shared_by is None else _stored_together(plan, spelling.shared_by)
    layers = tuple(
        replace(
            layer,
            pieces=tuple(
                _respelled(piece, spelling, together.get((layer.path, number)))
                for number, piece in enumerate(layer.pieces)
            ),
        )
        for layer in plan.layers
    )
    return replace(plan, layers=layers)


def _stored_together(plan: Plan, name: str) -> dict[tuple[str, int], str]:
    """Pieces of the plan that the format stacks -> the weight they are stacked in."""
    write = FORMATS.load(name).write
    assert write is not None, "DIALECTS names formats that are written"
    several = (layer for layer in write(plan).layers if len(layer.members) > 1)
    return {member: layer.name for layer in several for member in layer.members}


def _respelled(piece: Piece, spelling: Spelling, together: str | None) -> Piece:
    recode = piece.recode
    if recode is None:
        return piece
    activation = recode.activation
    if activation is not None and activation.mode == "static":
        activation = replace(activation, number=str(spelling.encoding))
    spelled = replace(
        recode,
        encoding=spelling.encoding,
        activation=activation,
        arithmetic=spelling.arithmetic,
        shared_amax=recode.shared_amax if spelling.shared_by is None else together,
    )
    return replace(piece, recode=spelled)


# an export -----------------------------------------------------------------------------------------


def _export(source: str, truth: Plan, swapped: bool | None) -> Plan:
    """The plan of a ModelOpt NVFP4 export of that base."""
    checkpoint = sources.checkpoint(source)
    hints = Hints(nibbles=None if swapped is None else "high" if swapped else "low")
    header = headers.read(checkpoint.files)
    plan = planner.plan(checkpoint, header, config=checkpoint.config, hints=hints)
    if plan.open:
        plan = settle.settle(plan, settle.of_plan(truth))
    if plan.format != "modelopt" or all(ENCODING not in layer.encodings for layer in plan.layers):
        raise ConvertError(
            f"a ModelOpt NVFP4 export was needed, {source!r} is {plan.format}",
            hint="--from-bf16 quantizes plain weights",
        )
    _require_same_model(plan, truth)
    return plan


def _require_same_model(plan: Plan, truth: Plan) -> None:
    """Raises ConvertError when the export is of another model, or decodes to another weight."""
    ours, theirs = ({layer.path: layer.shape_NK for layer in each.layers} for each in (plan, truth))
    if ours != theirs:
        path = next(path for path in ours | theirs if ours.get(path) != theirs.get(path))
        raise ConvertError(
            f"export and base differ: {path!r} is {ours.get(path)} in one and {theirs.get(path)} "
            "in the other",
            hint="--base-transformer-dir is the transformer that was exported",
        )
    layers = (layer for layer in plan.layers if ENCODING in layer.encodings)
    smallest = min(layers, key=lambda layer: layer.shape_NK[0] * layer.shape_NK[1])
    (found,) = compared(replace(plan, layers=(smallest,)), truth).layers
    if found.fidelity is not None and found.fidelity.relative_error > MUCH:
        raise ConvertError(
            f"{smallest.path!r} of the export does not decode to the base's weight, its relative "
            f"error is {found.fidelity.relative_error:.2f}",
            hint="--swap-weight-nibbles or --no-swap-weight-nibbles, or another base",
        )


def _spliced(export: Plan, truth: Plan, stays: Mapping[str, Stay]) -> Plan:
    """The export's plan with the layers that stay taken from the base."""
    base = {layer.path: _moved(layer, len(export.files)) for layer in truth.layers}
    layers = tuple(
        replace(base[layer.path], why=f"stays: {stays[layer.path]}")
        if layer.path in stays
        else layer
        for layer in export.layers
    )
    taken = len(set(stays) & {layer.path for layer in export.quantized})
    plan = replace(export, files=(*export.files, *truth.files), layers=layers, unused={})
    told = (
        f"{len(plan.quantized)} layers are the export's",
        f"{taken} of its layers are the base's",
    )
    rules = dict.fromkeys(str(why) for why in stays.values())
    return replace(plan, notes=(*truth.notes, *told, *rules))


def _moved(layer: LayerPlan, files: int) -> LayerPlan:
    """The layer with its parts in files that come `files` later."""
    pieces = tuple(
        replace(piece, parts=tuple(_moved_part(part, files) for part in piece.parts))
        for piece in layer.pieces
    )
    return replace(layer, pieces=pieces)


def _moved_part(part: Part, files: int) -> Part:
    return replace(part, ref=TensorRef(part.ref.file + files, part.ref.name))


# the command ---------------------------------------------------------------------------------------


@click.command(cls=ConverterCommand, short_help="NVFP4 of an export or plain BF16.")
@click.option("--modelopt-hf-dir", metavar="DIR", help="ModelOpt export, or its pipeline.")
@click.option(
    "--base-transformer-dir", metavar="DIR", help="The BF16 transformer it was made from."
)
@click.option("--from-bf16", metavar="DIR", help="Plain weights to quantize instead of an export.")
@click.option(
    "--dialect", type=click.Choice(list(DIALECTS)), help="Of --from-bf16; modelopt by default."
)
@click.option(
    "--pattern-preset",
    metavar="NAME",
    help="Layers that stay: none (default for an export), auto (what the family needs; default for "
    "--from-bf16), a preset's name such as flux1-nvfp4, or a TOML file.",
)
@click.option("--keep-bf16-pattern", multiple=True, metavar="GLOB", help="May be repeated.")
@click.option(
    "--swap-weight-nibbles/--no-swap-weight-nibbles",
    default=None,
    help="Whether the export has the even column in bits 4-7; as it says itself by default.",
)
@calibration_options
@writing_options
def main(
    modelopt_hf_dir: str | None,
    base_transformer_dir: str | None,
    from_bf16: str | None,
    dialect: str | None,
    pattern_preset: str | None,
    keep_bf16_pattern: tuple[str, ...],
    swap_weight_nibbles: bool | None,
    calibration: Calibration,
    writing: Writing,
) -> None:
    """Build an NVFP4 transformer from a ModelOpt export and its base, or from plain weights.

    Prints what was done as JSON, and the layers that lost most on stderr.
    """
    chosen: dict[str, Any] = {"keep_bf16": keep_bf16_pattern}
    if pattern_preset is not None:
        chosen["pattern_preset"] = pattern_preset
    if from_bf16 is not None:
        _require_absent(
            "--from-bf16",
            {
                "--modelopt-hf-dir": modelopt_hf_dir,
                "--base-transformer-dir": base_transformer_dir,
                "--swap-weight-nibbles": swap_weight_nibbles,
            },
        )
        chosen["dialect"] = dialect or "modelopt"
        done = fresh(writing, source=from_bf16, calibration=calibration, **chosen)
    elif modelopt_hf_dir is None or base_transformer_dir is None:
        raise UsageError(
            "weights are needed: an export and its base, or plain ones",
            hint="--modelopt-hf-dir DIR --base-transformer-dir DIR, or --from-bf16 DIR",
        )
    else:
        measured = {
            "--calibrate": calibration.calibrate,
            "--calibration": calibration.calibration,
            "--save-calibration": calibration.save_calibration,
            "--dialect": dialect,
        }
        _require_absent("--modelopt-hf-dir", measured)
        done = mixed(
            writing,
            export=modelopt_hf_dir,
            base=base_transformer_dir,
            swap_weight_nibbles=swap_weight_nibbles,
            **chosen,
        )
    tell(done.report, done.to_json(), writing)


def _require_absent(beside: str, typed: Mapping[str, object]) -> None:
    """Raises UsageError for an option that says nothing beside the one that chose the source."""
    for name, value in typed.items():
        if value is not None:
            raise UsageError(f"{name} says nothing beside {beside}", hint=f"leave {name} out")


if __name__ == "__main__":
    main()
