"""The class a config names, empty, and what it calls the tensors that files store for it.

diffusers stores parameters under the names they have in memory. transformers respells many of them
while loading, each version in its own way, so only the installed class can tell what they become.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from diffquant.errors import PlanError
from diffquant.families import FAMILIES
from diffquant.plan import DENSE, LayerPlan, Plain, PlainSource, Plan, Role, TensorRef

DIFFUSERS, TRANSFORMERS = "diffusers", "transformers"
#: Keys of a config that are ours or the pipeline's, and no setting of the module.
OURS = frozenset({"_library"})

Spell = Callable[[str], str]


def skeleton(config: Mapping[str, Any], dtype: torch.dtype | None = None) -> nn.Module:
    """The class named in the config with parameters on meta and its computed buffers real.

    dtype  the model is going to have; transformers computes some buffers in it

    Raises PlanError when the installed library has no such class.
    """
    from accelerate import init_empty_weights

    found = _class_of(config)
    told = {key: value for key, value in config.items() if key not in OURS}
    with init_empty_weights():
        if _library(config) != TRANSFORMERS:
            made: nn.Module = found.from_config(told)
            return made
        settings = found.config_class.from_dict(told)
        made = found._from_config(settings, dtype=dtype or settings.dtype)
        return made


def tie(model: nn.Module) -> None:
    """Give every parameter that got no value the one it is tied to, as the class says."""
    for target, source in _tied(model).items():
        path, _, leaf = target.rpartition(".")
        owner = model.get_submodule(path)
        held = owner._parameters.get(leaf)
        if held is not None and held.is_meta:
            owner._parameters[leaf] = model.get_parameter(source)


def kept_float32(model: nn.Module, dtype: torch.dtype = torch.bfloat16) -> tuple[str, ...]:
    """Words that name the modules which the class keeps in float32 when the model is in `dtype`.

    transformers has two lists; the longer one counts in float16 only.
    """
    listed = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    strict = getattr(model, "_keep_in_fp32_modules_strict", None)
    if strict is None:
        return listed
    return (*strict, *(listed if dtype == torch.float16 else ()))


def respelled(plan: Plan) -> Plan:
    """The plan in the names of its class, where the names are those of a file.

    Stored layers that are no linears of the class become plain. Tensors the class itself passes
    over, and the second of two that are tied, are unused.

    Raises PlanError for a tensor that belongs to nothing, of another shape, or missing.
    """
    if FAMILIES.load(plan.family).is_described:
        return plan
    model = skeleton(plan.config)
    draft = _Draft(plan, model)
    layers, plain = tuple(draft.layers()), tuple(draft.plain())
    draft.require_whole(layers, plain)
    return replace(
        plan,
        layers=layers,
        plain=(*plain, *draft.demoted),
        unused={**plan.unused, **draft.unused},
    )


@dataclass(frozen=True, slots=True)
class _Module:
    """What a class knows of its parameters."""

    shapes: Mapping[str, tuple[int, ...]]
    linears: frozenset[str]
    tied: Mapping[str, str]
    passed_over: tuple[str, ...]


class _Draft:
    """One plan laid over its class."""

    def __init__(self, plan: Plan, model: nn.Module) -> None:
        self.old = plan
        self.spell = _speller(model)
        self.module = _Module(
            shapes={name: tuple(value.shape) for name, value in model.state_dict().items()},
            linears=frozenset(
                path for path, part in model.named_modules() if isinstance(part, nn.Linear)
            ),
            tied=_tied(model),
            passed_over=tuple(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()),
        )
        self.stored = {self.spell(each.name) for each in plan.plain}
        self.stored |= {self.spell(f"{layer.path}.weight") for layer in plan.layers}
        self.demoted: list[Plain] = []
        self.unused: dict[TensorRef, str] = {}
        self.problems: list[str] = []

    def layers(self) -> Iterator[LayerPlan]:
        for layer in self.old.layers:
            weight = self._own(f"{layer.path}.weight")
            refs = [part.ref for piece in layer.pieces for part in piece.parts]
            if not self._belongs(weight, layer.shape_NK, f"{layer.path}.weight", refs):
                continue
            path = weight.removesuffix(".weight")
            if path in self.module.linears:
                yield replace(layer, path=path)
            else:
                self.demoted += _as_plain(replace(layer, path=path))

    def plain(self) -> Iterator[Plain]:
        for each in self.old.plain:
            name = self._own(each.name)
            refs = [part.ref for source in each.sources for part in source.parts]
            if self._belongs(name, each.shape, each.name, refs):
                yield replace(each, name=name)

    def require_whole(self, layers: tuple[LayerPlan, ...], plain: tuple[Plain, ...]) -> None:
        """Every parameter of the class has a source, every stored tensor an owner."""
        given = {each.name for each in (*plain, *self.demoted)}
        given |= {f"{layer.path}.{leaf}" for layer in layers for leaf in ("weight", "bias")}
        missing = self.module.shapes.keys() - given - self.module.tied.keys()
        told = [f"{name!r} has no stored tensor" for name in sorted(missing)]
        if problems := [*self.problems, *told]:
            more = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
            raise PlanError(
                f"the weights do not fit {self.old.config.get('_class_name')}: "
                f"{'; '.join(problems[:3])}{more}",
                hint="is this the component of another model? see `diffquant inspect`",
            )

    def _own(self, stored: str) -> str:
        """The class's name; the parameter it is tied to where only that one is stored."""
        own = self.spell(stored)
        source = self.module.tied.get(own)
        return own if source is None or source in self.stored else source

    def _belongs(
        self, own: str, shape: tuple[int, ...], stored: str, refs: list[TensorRef]
    ) -> bool:
        """Whether the class has a parameter of that name and shape for itself."""
        if own in self.module.tied:
            self._leave(refs, f"tied to {self.module.tied[own]!r} by the config")
            return False
        if own not in self.module.shapes:
            if any(re.search(pattern, own) for pattern in self.module.passed_over):
                self._leave(refs, "the class passes over it")
            else:
                self.problems.append(f"{stored!r} belongs to no module")
            return False
        wanted = self.module.shapes[own]
        if wanted != shape:
            self.problems.append(f"{stored!r} has shape {list(shape)}, {list(wanted)} was needed")
        return wanted == shape

    def _leave(self, refs: list[TensorRef], why: str) -> None:
        self.unused |= dict.fromkeys(refs, why)


def _as_plain(layer: LayerPlan) -> Iterator[Plain]:
    """A table stored like a linear: kept as it is, or decoded where the file quantized it."""
    (piece,) = layer.pieces
    parts = tuple(part for part in piece.parts if part.role is not Role.BIAS)
    encoded = {} if piece.encoding == DENSE else {"stored_NK": piece.stored_NK}
    yield Plain(
        name=f"{layer.path}.weight",
        shape=layer.shape_NK,
        sources=(PlainSource(parts=parts, encoding=piece.encoding, take=piece.take, **encoded),),
        dtype=layer.dtype,
        why=f"{layer.why}; no linear of the class",
    )


def _class_of(config: Mapping[str, Any]) -> Any:
    """A class of the library the pipeline's index names: diffusers, transformers, or the folder of
    a pipeline of diffusers that brings a model of its own."""
    library, name = _library(config), str(config.get("_class_name"))
    outer = library if library in (DIFFUSERS, TRANSFORMERS) else DIFFUSERS
    inside = outer if outer == library else f"{DIFFUSERS}.pipelines.{library}"
    found = getattr(import_module(inside), name, None) if find_spec(inside) else None
    if found is None:
        raise PlanError(
            f"{inside} {version(outer)} has no class {name!r}",
            hint=f"pip install --upgrade {outer}",
        )
    return found


def _library(config: Mapping[str, Any]) -> str:
    return str(config.get("_library", DIFFUSERS))


def _tied(model: nn.Module) -> Mapping[str, str]:
    """Parameter -> the one it is tied to."""
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return tied


def _speller(model: nn.Module) -> Spell:
    """Stored name -> name in memory, as the library itself respells it while loading."""
    if not hasattr(model, "base_model_prefix"):
        return lambda name: name
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    changes = get_model_conversion_mapping(model)
    renamings = [each for each in changes if isinstance(each, WeightRenaming)]
    converters = [each for each in changes if isinstance(each, WeightConverter)]
    prefix, own = str(model.base_model_prefix), model.state_dict()

    def spell(stored: str) -> str:
        name, rearranged = rename_source_key(stored, renamings, converters, prefix, own)
        if name not in own and stored in own:
            return stored
        if rearranged is not None:
            raise PlanError(
                f"transformers rearranges {stored!r} of {type(model).__name__} while loading, "
                "which an encoded weight cannot follow",
                hint="leave this component as the base has it",
            )
        return str(name)

    return spell
