"""Checkpoint, format and family -> Plan. The only place where the three meet.

A format gives layers in the file's names; a naming of the family says which modules those are and
how one stored weight is cut along N or joined along K. Tensors that no format mentions are dense
linears or plain parameters. Everything must fit: each parameter of the module has a source and each
stored tensor an owner, or the draft carries the problem by name.

  _identity    which format, family and class
  _unclaimed   tensors that no layer of the format claims
  _spelling    prefix and naming of the stored names
  _modules     what the component is made of
  _linears     its linears, each of one or more stored pieces
  _parameters  all else
  _problems    what does not fit
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffquant.errors import FormatError, PlanError
from diffquant.families import FAMILIES, Inventory
from diffquant.formats import FORMATS, NO_HINTS, Hints
from diffquant.headers import Header
from diffquant.plan import Plan, PlanFile, Problem, Role
from diffquant.planner._identity import class_of, family_of, identify
from diffquant.planner._linears import Linears
from diffquant.planner._modules import inventory_of, modules_of
from diffquant.planner._parameters import Parameters
from diffquant.planner._problems import Problems, missing_scales
from diffquant.planner._references import reference
from diffquant.planner._unclaimed import unmentioned, without_surplus
from diffquant.sources import Checkpoint

__all__ = [
    "Draft",
    "class_of",
    "draft",
    "family_of",
    "identify",
    "inventory_of",
    "plan",
]

#: What a module config says of its weights and of where it came from, and not of the architecture.
FOREIGN_KEYS = frozenset({"quantization_config", "compression_config", "_name_or_path"})


@dataclass(frozen=True, slots=True)
class Draft:
    """A plan, and what is wrong with it."""

    plan: Plan
    problems: tuple[Problem, ...]


def draft(
    checkpoint: Checkpoint,
    header: Header,
    *,
    config: Mapping[str, Any],
    hints: Hints = NO_HINTS,
    format_name: str | None = None,
    inventory: Inventory | None = None,
) -> Draft:
    """The plan of one component, and every problem found while making it.

    config     the diffusers config of the module; may be {} when the names tell the family
    inventory  of the module, where the family cannot tell it (any class, from its base checkpoint);
               where the names of that base are others, the checkpoint's own header tells
    """
    name, proof = (format_name, "") if format_name else identify(checkpoint, header, hints)
    reading = FORMATS.load(name).read(checkpoint, header, hints)
    config = _architecture(config or reading.config or checkpoint.config)
    family_name = family_of(config, header)
    family = FAMILIES.load(family_name)
    reading = without_surplus(reading, header, family)
    loose = unmentioned(header, reading)
    modules = modules_of(header, reading, loose, family=family, config=config, inventory=inventory)
    problems = Problems(modules)
    linears = Linears(header, reading, loose, modules, problems)
    plain = tuple(Parameters(header, modules, problems).plain(linears.rest, linears.encoded))
    problems.check(linears.layers, plain)
    plan = Plan(
        files=tuple(PlanFile(str(path), path.stat().st_size) for path in header.files),
        format=name,
        family=family_name,
        config=modules.config,
        layers=linears.layers,
        plain=plain,
        unused={reference(header, tensor): why for tensor, why in reading.unused.items()},
        open=tuple(linears.questions()),
        evidence=(proof,) if proof else (),
        notes=reading.notes,
    )
    return Draft(plan, (*problems.found, *missing_scales(plan)))


def plan(checkpoint: Checkpoint, header: Header, **wanted: Any) -> Plan:
    """Like `draft`, and raises PlanError when there is any problem, FormatError when SVDQuant was
    promised and no layer has a low-rank branch."""
    drawn = draft(checkpoint, header, **wanted)
    if drawn.problems:
        raise PlanError(_told(checkpoint, drawn), hint=_hinted(drawn))
    if wanted.get("hints", NO_HINTS).svdquant and not _has_low_rank(drawn.plan):
        raise FormatError(
            f"SVDQuant was promised, and no layer of {checkpoint.origin!r} has a low-rank branch: "
            f"it is {drawn.plan.format}",
            hint="leave out --enable-svdquant and its companions, or rename the file",
        )
    return drawn.plan


def _has_low_rank(plan: Plan) -> bool:
    return any(Role.LOWRANK_UP in piece.roles for each in plan.layers for piece in each.pieces)


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config without what it says of weights, which the plan tells."""
    return {key: value for key, value in config.items() if key not in FOREIGN_KEYS}


def _told(checkpoint: Checkpoint, drawn: Draft) -> str:
    """All problems as one sentence: how many, of which sides, and the first ones."""
    listed = "; ".join(f"{item.tensor!r} {item.what}" for item in drawn.problems[:3])
    more = f" (and {len(drawn.problems) - 3} more)" if len(drawn.problems) > 3 else ""
    return f"{checkpoint.origin!r} does not fit: {listed}{more}"


def _hinted(drawn: Draft) -> str:
    sizes = {Path(file.path).name: file.size for file in drawn.plan.files}
    return (
        f"diffquant inspect {next(iter(sizes), 'SOURCE')} lists all {len(drawn.problems)} problems"
    )
