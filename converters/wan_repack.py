"""Make a diffusers pipeline of what msModelSlim wrote for Wan 2.2: names change, no number does.

    --quant-path                          --output-path
    high_noise_model/                     transformer/      of Wan2.2-T2V-A14B and Wan2.2-I2V-A14B
    low_noise_model/                      transformer_2/
    (itself)                              transformer/      of Wan2.2-TI2V-5B

    quant_model_weight*.safetensors       diffusion_pytorch_model*.safetensors, names of diffusers
    quant_model_description*.json         quant_model_description.json, keys likewise
    (none)                                config.json and all other components of --original-model-path

The writer's wrappers go: X.linear.weight becomes X.weight, X.div.mul_scale becomes X.mul_scale. One
tensor is in memory at a time. Everything lies in `<output>.partial` until both transformers were
read as whole models of their class and every quantized layer decoded to the very weight that the
source decodes to; a run that was killed goes on where it was.

Options and names are those of SGLang's tool of the same name, which loads the result as this does.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from diffquant import headers, planner, sources
from diffquant.converters._command import ConverterCommand
from diffquant.converters._options import Writing, writing_path
from diffquant.converters._progress import Bar, bar
from diffquant.converters._report import NOTHING, Report, compared, measured, tell
from diffquant.errors import ConvertError
from diffquant.families import FAMILIES, Naming, located
from diffquant.formats.modelslim import EXPERTS
from diffquant.plan import Plan
from diffquant.tensors import Passing
from diffquant.writing import Declared, require_absent, require_space, write

WEIGHTS = "quant_model_weight*.safetensors"
DESCRIPTION = "quant_model_description*.json"
#: Component -> folder below --quant-path.
ALONE = {"transformer": "."}
MODELS: Mapping[str, Mapping[str, str]] = {
    "Wan2.2-T2V-A14B": EXPERTS,
    "Wan2.2-I2V-A14B": EXPERTS,
    "Wan2.2-TI2V-5B": ALONE,
}
#: What the writer puts between a linear and its tensors.
WRAPPERS = (".linear", ".div")


@dataclass(frozen=True, slots=True, kw_only=True)
class Repacked:
    """The component that was written: how its layers read, its tensors and their bytes.

    report  every quantized layer as written against the source; empty where nothing was decoded
    """

    plan: Plan
    tensors: int
    total_size: int
    report: Report = NOTHING

    def to_json(self) -> dict[str, Any]:
        encodings = sorted({name for layer in self.plan.quantized for name in layer.encodings})
        return {
            "quantized_layers": len(self.plan.quantized),
            "layers": len(self.plan.layers),
            "encodings": encodings,
            "tensors": self.tensors,
            "bytes": self.total_size,
        }


def repack(
    original: Path,
    quantized: Path,
    writing: Writing,
    *,
    model_type: str,
) -> dict[str, Repacked]:
    """Write the pipeline `original` with the transformers of `quantized`; components as written.

    Raises ConvertError for folders that are not what they should be, when the output is in the way
    and when a layer decodes to other numbers than the source's, PlanError when a transformer is no
    whole model of its class.
    """
    output = writing.output_dir
    require_absent(output, writing.overwrite)
    folders = MODELS[model_type]
    found = {
        component: _Source.open(component, quantized / folder, original / component)
        for component, folder in folders.items()
    }
    copied = [path for path in _files(original) if path.parts[0] not in folders]
    if writing.dry_run:
        return {name: source.repacked(source.plan()) for name, source in found.items()}
    origin = json.dumps([model_type, str(original), [each.stamps() for each in found.values()]])
    with _folder(output, origin, writing.overwrite) as partial_output, bar() as shown:
        _require_space(partial_output, original, copied, found)
        _copy(original, copied, partial_output, shown)
        done = {
            component: _component(source, partial_output / component, writing, shown)
            for component, source in found.items()
        }
        whole(done).judge(writing.max_error or 0.0, writing.report)
    return done


def whole(done: Mapping[str, Repacked]) -> Report:
    """One report of all components, whose names lead the paths of their layers."""
    return measured(
        replace(layer, path=f"{component}.{layer.path}")
        for component, repacked in done.items()
        for layer in repacked.report.layers
    )


# a transformer -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Source:
    """One transformer as msModelSlim wrote it, and the folder of the plain one it stands for."""

    component: str
    original: Path
    header: headers.Header
    description: Path
    names: Mapping[str, str]

    @staticmethod
    def open(component: str, folder: Path, original: Path) -> "_Source":
        config = original / "config.json"
        if not config.is_file():
            raise ConvertError(
                f"no file {str(config)!r}",
                hint="--original-model-path is the diffusers pipeline that was quantized",
            )
        files = sorted(folder.glob(WEIGHTS))
        descriptions = sorted(folder.glob(DESCRIPTION))
        for pattern, matches in ((WEIGHTS, files), (DESCRIPTION, descriptions)):
            if not matches:
                raise ConvertError(
                    f"no {pattern} in {str(folder)!r}", hint=_advice(folder, component)
                )
        header = headers.read(files)
        naming = FAMILIES.load("wan").namings["original"]
        return _Source(
            component=component,
            original=original,
            header=header,
            description=descriptions[0],
            names={name: renamed(name, naming) for name in header.tensors},
        )

    def plan(self) -> Plan:
        """How the files read as they are, which the result must match."""
        checkpoint = sources.Checkpoint(
            origin=str(self.description.parent),
            root=self.description.parent,
            files=self.header.files,
            sidecars={self.description.name: self.description},
        )
        config = json.loads((self.original / "config.json").read_text("utf-8"))
        return planner.plan(checkpoint, self.header, config=config)

    def declared(self) -> Iterator[Declared]:
        weights = Passing(self.header.files)
        for name, tensor in self.header.tensors.items():
            make = partial(weights.tensor, tensor.file, name)
            yield Declared(self.names[name], tensor.dtype, tensor.shape, make)

    def described(self) -> dict[str, Any]:
        """The description under the names of diffusers; what is no tensor's stays."""
        said = json.loads(self.description.read_text("utf-8"))
        return {self.names.get(key, key): value for key, value in said.items()}

    def repacked(self, plan: Plan, report: Report = NOTHING) -> Repacked:
        tensors = self.header.tensors.values()
        total_size = sum(tensor.nbytes for tensor in tensors)
        return Repacked(plan=plan, tensors=len(tensors), total_size=total_size, report=report)

    def stamps(self) -> list[tuple[str, int]]:
        return [(str(path), path.stat().st_mtime_ns) for path in self.header.files]


def renamed(name: str, naming: Naming) -> str:
    """The diffusers name of a tensor of the original repository, its wrappers removed.

    A name that the naming does not know stays; then it is diffusers' own, or nobody's.
    """
    module, _, leaf = name.rpartition(".")
    for wrapper in WRAPPERS:
        module = module.removesuffix(wrapper)
    for stem, rest in ((name, ""), (module, f".{leaf}")):
        rule = located(naming, stem)
        if rule is not None and rule.rows != (stem,):
            return f"{rule.rows[0]}{rest}"
    return f"{module}.{leaf}" if module else leaf


def _advice(folder: Path, component: str) -> str:
    if folder.name in EXPERTS.values():
        return f"{folder.name} holds what becomes {component}; a model of one expert is a TI2V-5B"
    return "--quant-path is the folder that msModelSlim wrote"


def _component(source: _Source, output: Path, writing: Writing, shown: Bar) -> Repacked:
    """Write one transformer unless a former run did, read it as anybody would, and compare."""
    if not output.exists():
        write(
            output,
            list(source.declared()),
            origin=json.dumps(source.stamps()),
            beside=source.original,
            max_shard_size=writing.shard_bytes,
            on_progress=shown.told(source.component),
        )
    text = json.dumps(source.described(), indent=2)
    (output / "quant_model_description.json").write_text(text + "\n", "utf-8")
    checkpoint = sources.checkpoint(str(output))
    header = headers.read(checkpoint.files)
    plan = planner.plan(checkpoint, header, config=checkpoint.config)
    if writing.no_check:
        return source.repacked(plan)
    told = shown.told(f"checking {source.component}")
    return source.repacked(plan, compared(plan, source.plan(), told))


# everything else -----------------------------------------------------------------------------------


def _files(pipeline: Path) -> list[Path]:
    """Files of the pipeline relative to it; hidden ones are nobody's business."""
    if not (pipeline / "model_index.json").is_file():
        raise ConvertError(
            f"no model_index.json in {str(pipeline)!r}",
            hint="--original-model-path is the diffusers pipeline that was quantized",
        )
    every = (path.relative_to(pipeline) for path in sorted(pipeline.rglob("*")) if path.is_file())
    return [path for path in every if not any(part.startswith(".") for part in path.parts)]


def _copy(pipeline: Path, copied: list[Path], output: Path, shown: Bar) -> None:
    told, done = shown.told("other components"), 0
    total = sum((pipeline / path).stat().st_size for path in copied)
    for path in copied:
        target = output / path
        size = (pipeline / path).stat().st_size
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            fresh = target.with_name(f"{target.name}.new")
            shutil.copyfile(pipeline / path, fresh)
            fresh.replace(target)
        done += size
        told(done, total, str(path))


def _require_space(
    output: Path, pipeline: Path, copied: list[Path], found: Mapping[str, _Source]
) -> None:
    """Raises ConvertError when the disk is too small for what is not there yet."""
    others = [pipeline / path for path in copied if not (output / path).exists()]
    transformers = [
        path
        for component, source in found.items()
        if not (output / component).exists()
        for path in source.header.files
    ]
    require_space(output, sum(path.stat().st_size for path in (*others, *transformers)))


@contextmanager
def _folder(output: Path, origin: str, overwrite: bool) -> Iterator[Path]:
    """`<output>.partial`, which takes the output's name when the block ends well.

    An error removes it. What a killed run left is kept if it was made from the same `origin`.
    """
    made = output.with_name(f"{output.name}.partial")
    note = made / ".origin.json"
    if not (note.exists() and note.read_text("utf-8") == origin):
        shutil.rmtree(made, ignore_errors=True)
        made.mkdir(parents=True)
        note.write_text(origin, "utf-8")
    try:
        yield made
    except Exception:
        shutil.rmtree(made, ignore_errors=True)
        raise
    note.unlink()
    if output.exists() and overwrite:
        old = output.with_name(f"{output.name}.old")
        output.rename(old)
        made.rename(output)
        shutil.rmtree(old)
    else:
        made.rename(output)


# the command ---------------------------------------------------------------------------------------

FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command(cls=ConverterCommand, short_help="msModelSlim's Wan 2.2 for diffusers.")
@click.option("--model-type", required=True, type=click.Choice(list(MODELS)))
@click.option(
    "--original-model-path", required=True, type=FOLDER, help="The plain diffusers pipeline."
)
@click.option("--quant-path", required=True, type=FOLDER, help="What msModelSlim wrote.")
@writing_path
def main(model_type: str, original_model_path: Path, quant_path: Path, writing: Writing) -> None:
    """Repack msModelSlim's Wan 2.2 as a diffusers pipeline.

    Prints what became of each transformer as JSON. `--model-path OUTPUT` draws with it. No number
    changes, so --max-error is 0 where none is typed.
    """
    done = repack(original_model_path, quant_path, writing, model_type=model_type)
    tell(whole(done), {name: each.to_json() for name, each in done.items()}, writing)


if __name__ == "__main__":
    main()
