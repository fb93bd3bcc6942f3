"""What calibration says of a layer's inputs: measured now, or read from a former run's file."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffquant import patterns, preset, sources
from diffquant.attach import hush
from diffquant.converters import calibrate
from diffquant.converters._options import Calibration
from diffquant.converters._progress import counted
from diffquant.errors import ConvertError, UsageError
from diffquant.loading import RunFlags, load
from diffquant.resolve import ModelFlags

PIPELINE = "model_index.json"


def amax(
    asked: Calibration,
    source: str,
    layers: Sequence[str],
    *,
    number: str = "fp8",
    dry_run: bool = False,
) -> dict[str, float]:
    """Layer -> largest magnitude of its input; empty where nothing was asked.

    source   the plain weights: a pipeline, or a component inside one, where prompts are to be drawn
    layers   the names that the model has
    number   what the inputs will become; the method mse weighs its rounding
    dry_run  draw nothing, and pretend that every layer was seen

    Raises UsageError for options that contradict, ConvertError for a file of another model.
    """
    _require_consistent(asked)
    if asked.calibration is not None:
        return read(asked.calibration, layers)
    if asked.calibrate is None:
        return {}
    if dry_run:
        return dict.fromkeys(layers, 1.0)
    return _measured(asked, asked.calibrate, source, number)


def read(path: Path, layers: Sequence[str]) -> dict[str, float]:
    """A calibration file. Raises ConvertError for one of another model."""
    table: dict[str, float] = json.loads(path.read_text("utf-8"))
    unknown = [name for name in table if name not in layers]
    if unknown:
        near = patterns.nearest(unknown[0], layers)
        raise ConvertError(
            f"calibration speaks of {unknown[0]!r}, which the model does not have",
            hint=f"nearest: {', '.join(near)}" if near else None,
        )
    return table


def _require_consistent(asked: Calibration) -> None:
    if asked.calibrate is not None and asked.calibration is not None:
        raise UsageError(
            "--calibrate measures inputs and --calibration names a file that has them",
            hint="leave one of the two out",
        )
    if asked.save_calibration is not None and asked.calibrate is None:
        raise UsageError("--save-calibration has nothing to save", hint="add --calibrate PROMPTS")


def _measured(asked: Calibration, prompts: Path, source: str, number: str) -> dict[str, float]:
    model, component = pipeline_of(source)
    known = preset.for_model(model)
    hush()
    with counted() as tell:
        found: dict[str, float] = calibrate.calibrate(
            load(ModelFlags(model_path=model), RunFlags()),
            calibrate.prompts_of(prompts),
            defaults=_defaults(known),
            component=component,
            method=asked.calibration_method,
            percentile=asked.percentile,
            number=number,
            tell=tell,
        )
    if asked.save_calibration is not None:
        calibrate.save(found, asked.save_calibration)
    return found


def _defaults(known: preset.Preset | None) -> Mapping[str, preset.Default]:
    return {} if known is None else known.defaults


def pipeline_of(source: str) -> tuple[str, str]:
    """The pipeline that can draw with these weights, and the name of their component in it."""
    root = sources.checkpoint(source).root
    if (root.parent / PIPELINE).is_file():
        return str(root.parent), root.name
    raise UsageError(
        f"--calibrate draws pictures, and {source!r} is a transformer without its pipeline",
        hint="name the pipeline, or its transformer folder; or --calibration FILE",
    )
