"""A transformer on disk as converters see it: header, configuration, mapped tensors, names."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from diffquant import headers, sources
from diffquant.families import FAMILIES, Family, spelled
from diffquant.tensors import Passing, Weights

#: Names the peer's tool writes into `ignore` instead of diffusers' own.
PEER_NAMES = (
    (re.compile(r"((?:^|\.)(?:audio_)?ff)\.net\.0\.proj$"), r"\1.proj_in"),
    (re.compile(r"((?:^|\.)(?:audio_)?ff)\.net\.2$"), r"\1.proj_out"),
    (re.compile(r"(\.(?:img|txt)_mod)\.1$"), r"\1"),
)


@dataclass(frozen=True, slots=True)
class Component:
    """A component on disk: header, configuration and mapped tensors."""

    root: Path
    config: Mapping[str, Any]
    header: headers.Header
    weights: Weights
    fresh: bool = False  # plain weights that nobody quantized yet

    @staticmethod
    def open(source: str, fresh: bool = False) -> "Component":
        found = sources.checkpoint(source)
        header = headers.read(found.files)
        return Component(found.root, found.config, header, Passing(found.files), fresh)

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


def family_of(source: Component) -> Family | None:
    class_name = source.config.get("_class_name")
    known = FAMILIES.load_all().values()
    return next((family for family in known if class_name in family.class_names), None)


def spellings(module: str, family: Family | None) -> tuple[str, ...]:
    """The module's own name, and those the peer's tool and runtime know it by."""
    names = {module: None}
    for expression, replacement in PEER_NAMES:
        names[expression.sub(replacement, module)] = None
    if family is not None and "sglang" in family.namings:
        names.update(dict.fromkeys(spelled(family.namings["sglang"], module)))
    return tuple(names)
