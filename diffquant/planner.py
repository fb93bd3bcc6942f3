"""Checkpoint, format and family -> Plan. The only place where the three meet.

A format gives layers in the file's names; a naming of the family says which modules those are and
how one stored weight is cut along N or joined along K. Tensors that no format mentions are dense
linears or plain parameters. Everything must fit: each parameter of the module has a source and each
stored tensor an owner, or the draft carries the problem by name.
"""

import difflib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from diffquant.errors import FormatError, PlanError
from diffquant.families import FAMILIES, Family, Inventory, Naming, Rule, located
from diffquant.formats import (
    FORMATS,
    NO_HINTS,
    Format,
    Hints,
    Reading,
    StoredLayer,
    StoredPart,
)
from diffquant.formats.diffusers import trace
from diffquant.headers import Header, Tensor
from diffquant.patterns import matches
from diffquant.plan import (
    DENSE,
    BiasOffset,
    LayerPlan,
    Part,
    Piece,
    Plain,
    PlainSource,
    Plan,
    PlanFile,
    Problem,
    Question,
    Role,
    Span,
    TensorRef,
)
from diffquant.sources import Checkpoint

#: What single-file checkpoints put before every name.
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.", "model.")

TORCH_NAMES: Mapping[str, str] = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
}
LEAVES = (".weight", ".bias")
#: Parts that give a layer its bias.
BIASES = frozenset({Role.BIAS, Role.INT_BIAS})
#: Multiples that writers pad N and K to: tensor cores' own, those of mxfp8, whole tiles.
PADDINGS = (16, 32, 128)
#: Problems that get a nearest name: to find one takes time that grows with the model.
NEAREST = 10


@dataclass(frozen=True, slots=True)
class Draft:
    """A plan, and what is wrong with it."""

    plan: Plan
    problems: tuple[Problem, ...]


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
    config = _module_config(config or reading.config or checkpoint.config)
    family_name = family_of(config, header)
    family = FAMILIES.load(family_name)
    reading = _without_surplus(reading, header, family)
    sheet = _Sheet(header, reading, family, config, inventory)
    layers, plain, problems = sheet.laid_out()
    plan = Plan(
        files=tuple(PlanFile(str(path), path.stat().st_size) for path in header.files),
        format=name,
        family=family_name,
        config=sheet.config,
        layers=layers,
        plain=plain,
        unused={_ref(header, tensor): why for tensor, why in reading.unused.items()},
        open=tuple(sheet.questions()),
        evidence=(proof,) if proof else (),
        notes=reading.notes,
    )
    return Draft(plan, (*problems, *_scale_problems(plan)))


def plan(checkpoint: Checkpoint, header: Header, **wanted: Any) -> Plan:
    """Like `draft`, and raises PlanError when there is any problem."""
    drawn = draft(checkpoint, header, **wanted)
    if drawn.problems:
        raise PlanError(_told(checkpoint, drawn), hint=_hinted(drawn))
    return drawn.plan


def inventory_of(plan: Plan) -> Inventory:
    """The module's parameters as the plan fills them."""
    shapes: dict[str, tuple[int, ...]] = {item.name: item.shape for item in plan.plain}
    for layer in plan.layers:
        shapes[f"{layer.path}.weight"] = layer.shape_NK
        if any(Role.BIAS in piece.roles for piece in layer.pieces):
            shapes[f"{layer.path}.bias"] = layer.shape_NK[:1]
    return Inventory(shapes=shapes, linears=frozenset(layer.path for layer in plan.layers))


def _without_surplus(reading: Reading, header: Header, family: Family) -> Reading:
    """Tensors no class of the family has are nobody's, and one of two that are the same."""
    nobodys = {
        name: reason
        for pattern, reason in family.surplus.items()
        for name in header.tensors
        if matches(pattern, name)
    }
    for name, same in family.tied.items():
        if name in header.tensors and same in header.tensors:
            nobodys[name] = f"the same numbers as {same!r}"
    if not nobodys:
        return reading
    layers = tuple(
        layer for layer in reading.layers if not any(part.tensor in nobodys for part in layer.parts)
    )
    return replace(reading, layers=layers, unused={**reading.unused, **nobodys})


def _explained(name: str, proofs: Mapping[str, str]) -> bool:
    return any(name in _format(other).explains for other in proofs if other != name)


def _format(name: str) -> Format:
    return FORMATS.load(name)


def _module_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The architecture only: how the weights are stored is told by the plan."""
    foreign = {"quantization_config", "compression_config", "_name_or_path"}
    return {key: value for key, value in config.items() if key not in foreign}


def _family_by_names(header: Header) -> str:
    best, best_hits = "generic", 0
    for name, family in FAMILIES.load_all().items():
        hits = max((_hits(header, naming) for naming in family.namings.values()), default=0)
        if hits > best_hits:
            best, best_hits = name, hits
    return best


def _hits(header: Header, naming: Naming) -> int:
    """How many stored modules a rule of the naming (not its fall-through) covers."""
    modules = {_module(name) for name in header.tensors}
    return max(
        sum(_renamed(naming, name[len(prefix) :]) for name in modules if name.startswith(prefix))
        for prefix in PREFIXES
    )


def _renamed(naming: Naming, name: str) -> bool:
    rule = located(naming, name)
    return rule is not None and rule.rows != (name,)


def _module(tensor: str) -> str:
    return tensor.rsplit(".", 1)[0] if "." in tensor else tensor


def _ref(header: Header, tensor: str) -> TensorRef:
    return TensorRef(header.tensors[tensor].file, tensor)


@dataclass(frozen=True, slots=True)
class _Placed:
    """A piece in its module, its place along K not yet settled."""

    path: str
    piece: Piece
    order: int
    why: str
    dtype: str


class _Sheet:
    """The working sheet of one plan: stored layers and tensors laid over the family's modules."""

    def __init__(
        self,
        header: Header,
        reading: Reading,
        family: Family,
        config: Mapping[str, Any],
        inventory: Inventory | None,
    ) -> None:
        self.header = header
        self.reading = reading
        self.family = family
        self.problems: list[Problem] = []
        self.paths: dict[str, tuple[str, ...]] = {}
        mentioned = {part.tensor for layer in reading.layers for part in layer.parts}
        self.encoded: list[tuple[StoredLayer, Rule]] = []
        self.rest = {
            name: None
            for name in header.tensors
            if name not in mentioned and name not in reading.unused
        }
        if inventory is None and config and family.is_described:
            inventory = family.inventory(config)
        elif inventory is not None and not family.is_described:
            inventory = self._agreeing(inventory)
        self.prefix, self.naming = self._naming(inventory)
        self.config = dict(config) or self._inferred()
        self.inventory = inventory or self._inventory()

    def laid_out(self) -> tuple[tuple[LayerPlan, ...], tuple[Plain, ...], tuple[Problem, ...]]:
        placed: dict[str, list[_Placed]] = defaultdict(list)
        for layer in self._layers():
            for item in self._place(layer):
                placed[item.path].append(item)
        layers = tuple(self._layer(path, placed[path]) for path in self._ordered(placed))
        plain = tuple(self._plain())
        self._check_parameters(layers, plain)
        return layers, plain, tuple(self.problems)

    def questions(self) -> Iterator[Question]:
        for open_part in self.reading.open:
            paths = (path for name in open_part.layers for path in self.paths.get(name, ()))
            yield Question(
                topic=open_part.topic,
                role=open_part.role,
                layouts=open_part.layouts,
                paths=tuple(dict.fromkeys(paths)),
                why=open_part.why,
            )

    # names -------------------------------------------------------------------------------------

    def _naming(self, inventory: Inventory | None) -> tuple[str, Naming]:
        """The prefix and naming under which most stored names belong to a module of the inventory;
        without one, the naming that renames most. The first wins among equals."""
        names = self._stored_modules()
        if self.reading.naming is not None:
            namings = {self.reading.naming: self.family.namings[self.reading.naming]}
        else:
            namings = dict(self.family.namings)
        prefixes = PREFIXES if self.family.part == "transformer" else PREFIXES[:1]
        prefix = self.reading.strip or max(
            prefixes, key=lambda text: (sum(name.startswith(text) for name in names), len(text))
        )
        stripped = [name.removeprefix(prefix) for name in names]
        if inventory is None:
            scores = [
                sum(_renamed(naming, name) for name in stripped) for naming in namings.values()
            ]
        else:
            scores = [_owned(naming, stripped, inventory) for naming in namings.values()]
        return prefix, list(namings.values())[scores.index(max(scores))]

    def _stored_modules(self) -> list[str]:
        names = [layer.name for layer in self.reading.layers]
        return names + list(dict.fromkeys(_split(name)[0] for name in self.rest))

    def _agreeing(self, inventory: Inventory) -> Inventory | None:
        """The base's inventory, unless the file spells most names in another way: which of two
        spellings is the class's own is known once there is a class."""
        names = self._stored_modules()
        known = max(_owned(each, names, inventory) for each in self.family.namings.values())
        return inventory if 2 * known >= len(names) else None

    def _rule(self, name: str) -> Rule | None:
        return located(self.naming, name.removeprefix(self.prefix))

    def _inferred(self) -> dict[str, Any]:
        """A config from the stored shapes, for a file that comes without one."""
        if self.family.config_from is None:
            return {}
        try:
            config = self.family.config_from(dict(self._diffusers_shapes()))
        except (LookupError, ValueError, ArithmeticError) as error:
            raise PlanError(
                f"the stored shapes fit no {self.family.class_names[0]}: {error}",
                hint="is the file whole? a config.json beside it, or its base, would describe it",
            ) from error
        return dict(config) if config else {}

    def _diffusers_shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Shapes under diffusers names, as far as one stored tensor is one parameter."""
        shapes: dict[str, tuple[int, ...]] = {
            f"{layer.name}.weight": layer.stored_NK for layer in self.reading.layers
        }
        shapes |= {
            f"{layer.name}.bias": layer.stored_NK[:1]
            for layer in self.reading.layers
            if any(part.role in BIASES for part in layer.parts)
        }
        shapes |= {name: self.header.tensors[name].shape for name in self.rest}
        for name, shape in shapes.items():
            stem, leaf = _split(name)
            rule = self._rule(stem)
            if rule is not None and rule.cols is None:
                n = shape[0] // len(rule.rows) if shape else 0
                for row in rule.rows:
                    yield row + leaf, (n, *shape[1:]) if len(rule.rows) > 1 else shape

    def _inventory(self) -> Inventory:
        if self.config and self.family.is_described:
            return self.family.inventory(self.config)
        shapes = dict(self._diffusers_shapes())
        quantized = {row for layer in self.reading.layers for row in self._rows(layer.name)}
        matrices = {
            name.removesuffix(".weight")
            for name, shape in shapes.items()
            if name.endswith(".weight") and len(shape) == 2
        }
        tables = {
            path
            for path in matrices | quantized
            if any(matches(pattern, path) for pattern in self.family.tables)
        }
        return Inventory(shapes=shapes, linears=frozenset((matrices | quantized) - tables))

    def _rows(self, stored: str) -> tuple[str, ...]:
        rule = self._rule(stored)
        return () if rule is None else rule.rows

    # linears -----------------------------------------------------------------------------------

    def _layers(self) -> Iterator[StoredLayer]:
        """The format's layers with their biases, then the dense linears nobody mentioned."""
        for layer in self.reading.layers:
            bias = f"{layer.name}.bias"
            if bias in self.rest:
                self.rest.pop(bias)
                layer = replace(layer, parts=(*layer.parts, StoredPart(Role.BIAS, bias)))
            yield layer
        for name in [name for name in self.rest if self._is_linear(name)]:
            yield self._dense(name)

    def _is_linear(self, name: str) -> bool:
        if not name.endswith(".weight") or len(self.header.tensors[name].shape) < 2:
            return False
        rows = self._rows(name.removesuffix(".weight"))
        return bool(rows) and all(row in self.inventory.linears for row in rows)

    def _dense(self, name: str) -> StoredLayer:
        stem = name.removesuffix(".weight")
        tensor = self.header.tensors[name]
        parts = [StoredPart(Role.CODES, name)]
        bias = f"{stem}.bias"
        if bias in self.rest:
            self.rest.pop(bias)
            parts.append(StoredPart(Role.BIAS, bias))
        self.rest.pop(name)
        return StoredLayer(
            name=stem,
            stored_NK=(tensor.shape[0], prod(tensor.shape[1:])),
            encoding=DENSE,
            parts=tuple(parts),
            why=f"stored {TORCH_NAMES.get(tensor.dtype, tensor.dtype)}",
        )

    def _place(self, layer: StoredLayer) -> Iterator[_Placed]:
        """The modules a stored layer serves, each with its cut of it."""
        rule = self._rule(layer.name)
        if rule is None or not all(row in self.inventory.linears for row in rule.rows):
            self._place_elsewhere(layer, rule)
            return
        self.paths[layer.name] = rule.rows
        counts = [self._shape(row)[0] for row in rule.rows]
        if not _fits(layer.stored_NK[0], sum(counts)):
            self._misfit(layer, rule, "N", sum(counts))
            return
        start = 0
        for row, count in zip(rule.rows, counts, strict=True):
            piece = self._piece(layer, rule, row, Span(start, start + count))
            yield _Placed(row, piece, rule.cols or 0, layer.why, self._dtype(layer))
            start += count

    def _place_elsewhere(self, layer: StoredLayer, rule: Rule | None) -> None:
        """A quantized convolution or table is decoded while loading; anything else has no owner."""
        if rule is None or f"{rule.rows[0]}.weight" not in self.inventory.shapes:
            self._unowned(layer.name, rule)
            return
        self.encoded.append((layer, rule))
        for part in layer.parts:
            if part.role is Role.BIAS:
                self.rest[part.tensor] = None

    def _piece(self, layer: StoredLayer, rule: Rule, path: str, rows: Span) -> Piece:
        n, k = self._shape(path)
        chunks = self._chunks(path) if layer.interleaved else None
        shift = layer.gelu_shift if layer.gelu_shift and self._behind_gelu(path, rule) else 0.0
        activation = layer.activation
        if shift and activation is not None:
            activation = replace(activation, unsigned=True)
        return Piece(
            encoding=layer.encoding,
            stored_NK=layer.stored_NK,
            parts=tuple(
                Part(part.role, _ref(self.header, part.tensor), part.layout) for part in layer.parts
            ),
            out=Span(0, n),
            cols=Span(0, layer.stored_NK[1] if rule.cols is not None else k),
            take=_take(layer, rule, rows, chunks),
            activation=activation,
            smooth=layer.smooth,
            shift=shift,
            rotation=layer.rotation,
            lowrank_input=layer.lowrank_input,
            bias_offsets=_offsets(n, chunks) if layer.plus_one else (),
        )

    def _layer(self, path: str, items: list[_Placed]) -> LayerPlan:
        shape_NK = self._shape(path)
        ordered = sorted(items, key=lambda item: item.order)
        pieces, start = [], 0
        for item in ordered:
            width = len(item.piece.cols)
            pieces.append(replace(item.piece, cols=Span(start, start + width)))
            start += width if len(ordered) > 1 else 0
        total = start if len(ordered) > 1 else len(pieces[0].cols)
        stored = ordered[0].piece.stored_NK[1]
        if total != shape_NK[1] or (len(ordered) == 1 and not _fits(stored, shape_NK[1])):
            found = total if len(ordered) > 1 else stored
            self.problems.append(
                Problem(path, f"stores K {found}, the {self._class()} expects {shape_NK[1]}")
            )
        return LayerPlan(
            path=path,
            shape_NK=shape_NK,
            pieces=tuple(pieces),
            dtype=ordered[0].dtype,
            why=ordered[0].why,
        )

    def _behind_gelu(self, path: str, rule: Rule) -> bool:
        """Whether GELU feeds the layer, or the slice of its input this rule speaks of."""
        keys = (path,) if rule.cols is None else (f"{path}:{rule.cols}",)
        fed = self.family.fed_by.items()
        return any(matches(pattern, key) for pattern, kind in fed if "gelu" in kind for key in keys)

    def _chunks(self, path: str) -> tuple[int, tuple[int, ...]] | None:
        for pattern, chunks in self.family.chunked.items():
            if matches(pattern, path):
                return chunks
        self.problems.append(Problem(path, "is stored interleaved, and the family names no chunks"))
        return None

    def _shape(self, path: str) -> tuple[int, int]:
        n, *rest = self.inventory.shapes[f"{path}.weight"]
        return n, prod(rest)

    def _dtype(self, layer: StoredLayer) -> str:
        """What the layer computes in: the dtype of its plain tensors, bfloat16 when it has none."""
        for part in layer.parts:
            name = TORCH_NAMES.get(self.header.tensors[part.tensor].dtype)
            if part.role in (Role.BIAS, Role.SMOOTH, Role.CODES) and name is not None:
                return name
        return "bfloat16"

    # everything else ---------------------------------------------------------------------------

    def _plain(self) -> Iterator[Plain]:
        sources: dict[str, list[tuple[str, Rule]]] = defaultdict(list)
        for tensor in self.rest:
            owner = self._owner(tensor)
            if owner is None:
                self._unowned(tensor, None)
                continue
            for parameter, rule in owner:
                sources[parameter].append((tensor, rule))
        for parameter, given in sources.items():
            yield self._parameter(parameter, given)
        for layer, rule in self.encoded:
            yield self._encoded_parameter(layer, rule)

    def _owner(self, tensor: str) -> list[tuple[str, Rule]] | None:
        """The parameters a plain tensor serves, each with the rule that says so."""
        stem, leaf = _split(tensor)
        for name, ending in ((tensor, ""), (stem, leaf)):
            rule = self._rule(name)
            owned = [] if rule is None else [row + ending for row in rule.rows]
            if rule is not None and all(name in self.inventory.shapes for name in owned):
                return [(name, rule) for name in owned]
        return None

    def _parameter(self, parameter: str, given: list[tuple[str, Rule]]) -> Plain:
        shape = self.inventory.shapes[parameter]
        tensor, rule = given[0]
        stored = self.header.tensors[tensor]
        if len(given) > 1:
            self.problems.append(Problem(tensor, f"and {given[1][0]!r} both give {parameter!r}"))
        take = self._plain_take(parameter, rule)
        if prod(stored.shape) != prod(shape) and not take:
            what = f"has shape {list(stored.shape)}, {parameter!r} needs {list(shape)}"
            self.problems.append(Problem(tensor, what))
        return Plain(
            name=parameter,
            shape=shape,
            sources=(PlainSource(parts=(Part(Role.CODES, _ref(self.header, tensor)),), take=take),),
            dtype=TORCH_NAMES.get(stored.dtype, stored.dtype),
            why="plain",
        )

    def _encoded_parameter(self, layer: StoredLayer, rule: Rule) -> Plain:
        parameter = f"{rule.rows[0]}.weight"
        shape = self.inventory.shapes[parameter]
        if prod(layer.stored_NK) != prod(shape):
            what = f"stores {list(layer.stored_NK)}, {parameter!r} needs {list(shape)}"
            self.problems.append(Problem(layer.name, what))
        parts = (
            Part(part.role, _ref(self.header, part.tensor), part.layout)
            for part in layer.parts
            if part.role is not Role.BIAS
        )
        return Plain(
            name=parameter,
            shape=shape,
            sources=(
                PlainSource(parts=tuple(parts), encoding=layer.encoding, stored_NK=layer.stored_NK),
            ),
            dtype="bfloat16",
            why=f"{layer.encoding}, decoded while loading: no linear ({layer.why})",
        )

    def _plain_take(self, parameter: str, rule: Rule) -> tuple[Span, ...]:
        leaf = "." + parameter.rsplit(".", 1)[-1]
        counts = [
            self.inventory.shapes.get(row + leaf, self.inventory.shapes.get(row))
            for row in rule.rows
        ]
        sizes = [count[0] if count else 0 for count in counts]
        if rule.chunks is not None:
            return _permuted(sizes[0], rule.chunks)
        if len(rule.rows) == 1:
            return ()
        index = [row + leaf for row in rule.rows].index(parameter)
        start = sum(sizes[:index])
        return (Span(start, start + sizes[index]),)

    # problems ----------------------------------------------------------------------------------

    def _unowned(self, name: str, rule: Rule | None) -> None:
        spelled = name if rule is None else rule.rows[0]
        near = []
        if len(self.problems) < NEAREST:
            near = difflib.get_close_matches(spelled, self._known(), n=1, cutoff=0.6)
        nearest = f", nearest is {near[0]!r}" if near else ""
        self.problems.append(Problem(name, f"belongs to no module of {self._class()}{nearest}"))

    def _known(self) -> list[str]:
        return [*self.inventory.linears, *self.inventory.shapes]

    def _misfit(self, layer: StoredLayer, rule: Rule, axis: str, wanted: int) -> None:
        stored = layer.stored_NK[0 if axis == "N" else 1]
        modules = ", ".join(repr(row) for row in rule.rows)
        self.problems.append(
            Problem(
                layer.name, f"stores {axis} {stored}, {modules} of {self._class()} need {wanted}"
            )
        )

    def _check_parameters(self, layers: Iterable[LayerPlan], plain: Iterable[Plain]) -> None:
        """Every parameter of the module has a source; a layer without a stored bias misses it."""
        given = {item.name for item in plain}
        for layer in layers:
            given.add(f"{layer.path}.weight")
            if any(BIASES & piece.roles or piece.shift for piece in layer.pieces):
                given.add(f"{layer.path}.bias")
            self._check_cover(layer)
        for name in self.inventory.shapes:
            if name not in given:
                self.problems.append(Problem(name, f"of {self._class()} has no stored tensor"))
        for layer in layers:
            bias = f"{layer.path}.bias"
            if (
                bias in given
                and bias not in self.inventory.shapes
                and not self._zero_allowed(layer)
            ):
                self.problems.append(Problem(bias, f"is stored, {self._class()} has no such bias"))

    def _zero_allowed(self, layer: LayerPlan) -> bool:
        """SVDQuant writers, the only ones that divide, store a zero bias on layers that have none."""
        return any(piece.smooth == "divide" for piece in layer.pieces)

    def _check_cover(self, layer: LayerPlan) -> None:
        n, k = layer.shape_NK
        area = sum(len(piece.out) * len(piece.cols) for piece in layer.pieces)
        if area != n * k and not any(item.tensor == layer.path for item in self.problems):
            what = f"has {len(layer.pieces)} stored pieces that cover {area} of {n * k} weights"
            self.problems.append(Problem(layer.path, what))

    def _class(self) -> str:
        return class_of(self.config) or "the model"

    def _ordered(self, placed: Mapping[str, object]) -> list[str]:
        """Module order, so that a plan does not depend on the order of tensors in a file."""
        order = {name: index for index, name in enumerate(self.inventory.shapes)}
        return sorted(placed, key=lambda path: order.get(f"{path}.weight", 0))


def _owned(naming: Naming, names: Sequence[str], inventory: Inventory) -> int:
    """How many stored modules or lone parameters land in the inventory."""
    parents = {_module(name) for name in inventory.shapes} | set(inventory.shapes)
    rules = (located(naming, name) for name in names)
    return sum(rule is not None and all(row in parents for row in rule.rows) for rule in rules)


def _split(tensor: str) -> tuple[str, str]:
    """(module, '.weight' or '.bias'); a lone parameter keeps its whole name."""
    for leaf in LEAVES:
        if tensor.endswith(leaf):
            return tensor.removesuffix(leaf), leaf
    return tensor, ""


def _fits(stored: int, wanted: int) -> bool:
    """Equal, or padded up to the next multiple that writers pad to."""
    return stored == wanted or any(stored == -(-wanted // pad) * pad for pad in PADDINGS)


def _take(
    layer: StoredLayer, rule: Rule, rows: Span, chunks: tuple[int, tuple[int, ...]] | None
) -> tuple[Span, ...]:
    if chunks is not None:
        count = chunks[0]
        return tuple(Span(chunk, len(rows), count) for chunk in range(count))
    if rule.chunks is not None:
        return _permuted(len(rows), rule.chunks)
    whole = len(rule.rows) == 1 and len(rows) == layer.stored_NK[0]
    return () if whole else (rows,)


def _permuted(count: int, chunks: tuple[int, ...]) -> tuple[Span, ...]:
    """Rows in module order, when stored chunk i is the module's chunk chunks[i]."""
    size = count // len(chunks)
    order = [chunks.index(wanted) for wanted in range(len(chunks))]
    return tuple(Span(index * size, (index + 1) * size) for index in order)


def _offsets(count: int, chunks: tuple[int, tuple[int, ...]] | None) -> tuple[BiasOffset, ...]:
    """-1 on the scale chunks, whose bias was stored with 1 added."""
    if chunks is None:
        return ()
    size = count // chunks[0]
    return tuple(BiasOffset(Span(index * size, (index + 1) * size), -1.0) for index in chunks[1])


def _scale_problems(plan: Plan) -> Iterator[Problem]:
    """A missing weight-side scale is an error, never 1.0."""
    from diffquant.encodings import ENCODINGS

    codecs = ENCODINGS.load_all()
    for layer in plan.layers:
        for piece in layer.pieces:
            codec = codecs[piece.encoding.name]
            if not codec.is_complete(piece.encoding, piece.roles):
                codes = piece.part(Role.CODES)
                stored = codes.ref.name if codes else layer.path
                needed = " or ".join(sorted("+".join(sorted(roles)) for roles in codec.scales))
                yield Problem(stored, f"is {piece.encoding} without its scale ({needed})")


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


def stored_bytes(plan: Plan, header: Header) -> int:
    """Bytes of all stored tensors a plan uses."""
    return sum(tensor.nbytes for tensor in _used(plan, header))


def _used(plan: Plan, header: Header) -> Iterator[Tensor]:
    skipped = {ref.name for ref in plan.unused}
    return (tensor for name, tensor in header.tensors.items() if name not in skipped)
