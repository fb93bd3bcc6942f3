"""Which format a file is of, by its own proof, and which family and class its module is of."""

from collections.abc import Mapping, Set
from typing import Any

from diffquant.errors import FormatError
from diffquant.families import FAMILIES, Family, Naming
from diffquant.formats import FORMATS, NO_HINTS, Hints
from diffquant.formats.diffusers import trace
from diffquant.headers import Header
from diffquant.planner._spelling import PREFIXES, module, renamed
from diffquant.sources import Checkpoint


def identify(checkpoint: Checkpoint, header: Header, hints: Hints = NO_HINTS) -> tuple[str, str]:
    """The format's name and the sentence that proves it. Raw float8 is a person's word, and counts
    only where no format claims the file.

    Raises FormatError when two formats contradict each other, with both proofs, or when tensors
    look quantized and nothing explains them.
    """
    proofs = {
        name: proof
        for name, format in FORMATS.load_all().items()
        if (proof := format.evidence(checkpoint, header)) is not None
    }
    standing = [name for name in proofs if not _explained(name, proofs)]
    if len(standing) == 1:
        return standing[0], proofs[standing[0]]
    if standing:
        listed = "; ".join(f"{name}: {proofs[name]}" for name in standing)
        raise FormatError(
            f"{checkpoint.origin!r} claims to be of {len(standing)} formats: {listed}"
        )
    if hints.raw_fp8:
        return "raw_fp8", "--raw-fp8 was typed and no format claims the file"
    found = trace(header)
    raise FormatError(
        f"{checkpoint.origin!r} looks quantized and nothing in it says how: first {found}",
        hint="give the folder that holds its config.json (--transformer-path), "
        "or --raw-fp8 if its float8 weights truly have no scale",
    )


def _explained(name: str, proofs: Mapping[str, str]) -> bool:
    return any(name in FORMATS.load(other).explains for other in proofs if other != name)


def family_of(config: Mapping[str, Any], header: Header) -> str:
    """The family of a module config, else of the stored names; `generic` when none claims them."""
    class_name = class_of(config)
    for name, family in FAMILIES.load_all().items():
        if class_name in family.class_names:
            return name
    if class_name is not None:
        return "generic"
    return _family_by_names(header)


def class_of(config: Mapping[str, Any]) -> str | None:
    """The class a module config names: diffusers writes it itself, transformers its architecture."""
    architectures = config.get("architectures")
    told = architectures[0] if isinstance(architectures, list) and architectures else None
    named = config.get("_class_name", told)
    return None if named is None else str(named)


def _family_by_names(header: Header) -> str:
    """The family whose names most stored ones are: by the rules of a naming or, where those say
    little since it spells modules as diffusers does, by the class whose shapes these could be."""
    families = FAMILIES.load_all()
    stored = {module(name) for name in header.tensors}
    scores = {
        name: max((_hits(stored, naming) for naming in family.namings.values()), default=0)
        for name, family in families.items()
    }
    if 2 * max(scores.values()) < len(stored):
        for name, family in families.items():
            scores[name] = max(scores[name], _owned(header, family))
    best = max(scores, key=scores.__getitem__)
    return best if scores[best] else "generic"


def _hits(stored: Set[str], naming: Naming) -> int:
    """How many stored modules a rule of the naming (not its fall-through) covers."""
    return max(
        sum(renamed(naming, name[len(prefix) :]) for name in stored if name.startswith(prefix))
        for prefix in PREFIXES
    )


def _owned(header: Header, family: Family) -> int:
    """How many stored modules are those of the class whose config the stored shapes tell."""
    best = 0
    for prefix in PREFIXES:
        shapes = {
            name[len(prefix) :]: tensor.shape
            for name, tensor in header.tensors.items()
            if name.startswith(prefix)
        }
        try:
            config = family.config_from(shapes) if family.config_from and shapes else None
        except (LookupError, ValueError, ArithmeticError):
            continue  # shapes of something else
        if config:
            known = {module(name) for name in family.inventory(config).shapes}
            best = max(best, len(known & {module(name) for name in shapes}))
    return best
