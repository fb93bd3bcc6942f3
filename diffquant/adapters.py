"""What a LoRA would reach in a model, from the headers of both: no torch, no weights.

`lora.py` loads one through diffusers' converters; this is the dry run, and reads the same spellings
through the namings of the family.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffquant import headers, sources
from diffquant.errors import UsageError
from diffquant.families import FAMILIES, Family, Rule, located, spelled
from diffquant.headers import Header
from diffquant.plan import LayerPlan, Plan

#: What follows the name of a module in a LoRA's tensors: PEFT, Kohya, diffusers' old, LyCORIS.
TENSOR = re.compile(
    r"\.(?:lora_[AB](?:\.default)?\.(?:weight|bias)|lora_(?:down|up)\.weight|lora\.(?:down|up)\.weight"
    r"|alpha|dora_scale|lora_magnitude_vector|lokr_\w+|hada_\w+|diff|diff_b)$"
)
DOWN = re.compile(r"lora_A|lora_down|lora\.down")
UP = re.compile(r"lora_B|lora_up|lora\.up")
#: Prefix of module names -> what writes it. Longer ones first.
SPELLINGS: Mapping[str, str] = {
    "base_model.model.": "PEFT",
    "model.diffusion_model.": "Comfy",
    "diffusion_model.": "Comfy",
    "lora_transformer_": "Kohya",
    "lora_unet_": "Kohya",
    "transformer.": "diffusers",
}
TEXT_ENCODERS = ("text_encoder", "lora_te", "text_encoders")


@dataclass(frozen=True, slots=True)
class Asked:
    """One typed LoRA. The component is the one of two transformers it is for."""

    source: str
    scale: float = 1.0
    component: str = "transformer"

    def __str__(self) -> str:
        """As it is typed."""
        second = "" if self.component == "transformer" else f"{self.component}="
        return f"{second}{self.source}:{self.scale:g}"


def parsed(text: str) -> Asked:
    """`[COMPONENT=]SOURCE[:scale]`. A colon that no number follows belongs to the source."""
    component, equals, rest = text.partition("=")
    if not (equals and component in ("transformer", "transformer_2")):
        component, rest = "transformer", text
    source, colon, number = rest.rpartition(":")
    try:
        scale = float(number) if colon and source else None
    except ValueError:
        scale = None
    return Asked(rest, component=component) if scale is None else Asked(source, scale, component)


def file_of(source: str, *, local_files_only: bool = False) -> Path:
    """The one file of a source, whose header could be read.

    Raises SourceError for what cannot be found, HeaderError for what holds no tensors, and
    UsageError for several files.
    """
    files = sources.checkpoint(source, local_files_only=local_files_only).files
    if len(files) != 1:
        raise UsageError(
            f"the LoRA {source!r} consists of {len(files)} files and one was needed",
            hint="--lora FILE.safetensors",
        )
    headers.read(files)
    return files[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reach:
    """What one LoRA finds in one model.

    spelling   of its names
    ranks      distinct, in rising order
    matched    module as the LoRA calls it -> layers of the model
    unmatched  modules it speaks of that the model does not have
    misfits    matched modules of another shape: "to_q is 64x64, the LoRA is for 96x64"
    beside     modules of text encoders, which this model is not
    encoded    layers reached that keep an encoded weight
    """

    spelling: str
    ranks: tuple[int, ...]
    matched: Mapping[str, tuple[str, ...]]
    unmatched: tuple[str, ...]
    misfits: tuple[str, ...]
    beside: tuple[str, ...]
    encoded: int

    @property
    def ok(self) -> bool:
        return bool(self.matched) and not self.misfits

    def __str__(self) -> str:
        missed = f", first {self.unmatched[0]!r}" if self.unmatched else ""
        misfit = f"; {self.misfits[0]}" if self.misfits else ""
        return (
            f"{len(self.matched)} modules matched, {self.layers} layers touched ({self.encoded} "
            f"encoded), {len(self.unmatched)} not matched{missed}{misfit}"
        )

    @property
    def layers(self) -> int:
        """How many layers of the model would change."""
        return len({path for paths in self.matched.values() for path in paths})

    def to_json(self) -> dict[str, Any]:
        return {
            "spelling": self.spelling,
            "ranks": list(self.ranks),
            "matched": {name: list(paths) for name, paths in self.matched.items()},
            "unmatched": list(self.unmatched),
            "misfits": list(self.misfits),
            "beside": list(self.beside),
            "layers": self.layers,
            "encoded": self.encoded,
        }


def reach(lora: Header, plan: Plan) -> Reach:
    """Hold the names and shapes of a LoRA against the layers of a model."""
    names = list(dict.fromkeys(TENSOR.split(name)[0] for name in lora.tensors))
    beside = tuple(name for name in names if name.startswith(TEXT_ENCODERS))
    layers = {layer.path: layer for layer in plan.layers}
    family = FAMILIES.load(plan.family)
    underscored = _underscored(family, layers)
    found = {name: _rule(family, layers, underscored, name) for name in names if name not in beside}
    matched = {name: rule for name, rule in found.items() if rule is not None}
    shapes = {name: _shape(lora, name) for name in names}
    reached = {path for rule in matched.values() for path in rule.rows}
    return Reach(
        spelling=next((_spelling(name) for name in found), "none"),
        ranks=tuple(sorted({rank for rank, _, _ in shapes.values() if rank})),
        matched={name: rule.rows for name, rule in matched.items()},
        unmatched=tuple(name for name in found if name not in matched),
        misfits=tuple(_misfits(matched, layers, shapes)),
        beside=beside,
        encoded=sum(not layers[path].is_ordinary for path in reached),
    )


def _underscored(family: Family, layers: Mapping[str, LayerPlan]) -> dict[str, str]:
    """Kohya's spelling of every name of every layer -> the name."""
    names = {
        name
        for naming in family.namings.values()
        for path in layers
        for name in (path, *spelled(naming, path))
    }
    return {name.replace(".", "_"): name for name in sorted(names)}


def _rule(
    family: Family, layers: Mapping[str, LayerPlan], underscored: Mapping[str, str], name: str
) -> Rule | None:
    """The layers a module of the LoRA stands for, under any naming of the family."""
    bare = _bare(name)
    bare = underscored.get(bare, bare)
    for naming in family.namings.values():
        rule = located(naming, bare)
        if rule is not None and all(row in layers for row in rule.rows):
            return rule
    return Rule(bare, (bare,)) if bare in layers else None


def _bare(name: str) -> str:
    prefix = next((prefix for prefix in SPELLINGS if name.startswith(prefix)), "")
    return name.removeprefix(prefix)


def _spelling(name: str) -> str:
    found = (tool for prefix, tool in SPELLINGS.items() if name.startswith(prefix))
    return next(found, "module names alone")


def _shape(lora: Header, name: str) -> tuple[int | None, int | None, int | None]:
    """Rank, N and K of one module's pair, as far as its tensors tell."""
    rank = n = k = None
    for tensor, entry in lora.tensors.items():
        if not tensor.startswith(f"{name}.") or len(entry.shape) != 2:
            continue
        leaf = tensor.removeprefix(name)
        if DOWN.search(leaf):
            rank, k = entry.shape
        elif UP.search(leaf):
            n = entry.shape[0]
    return rank, n, k


def _misfits(
    matched: Mapping[str, Rule],
    layers: Mapping[str, LayerPlan],
    shapes: Mapping[str, tuple[int | None, int | None, int | None]],
) -> Iterator[str]:
    for name, rule in matched.items():
        _, n, k = shapes[name]
        rows = [layers[path].shape_NK for path in rule.rows]
        whole_n, whole_k = sum(row[0] for row in rows), rows[0][1]
        wide = k is not None and (k > whole_k if rule.cols is not None else k != whole_k)
        if wide or (n is not None and n != whole_n):
            yield f"{name} is {whole_n}x{whole_k}, the LoRA is for {n}x{k}"
