"""Ways to read a file wrongly that give a picture all the same, each on a true file: who notices.

audit     the plan is refused, with the name of the tensor
evidence  shapes or statistics of what is stored tell the right reading from the wrong one
fidelity  `diffquant inspect --base`: a layer's error is out of proportion

`table` renders them for the README. In every row the right reading of the same file passes.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffquant import headers, planner, settle, sources
from diffquant.converters.dequantize import dequantize
from diffquant.errors import FormatError, PlanError
from diffquant.fidelity import LayerFidelity, compare_plans
from diffquant.plan import ROW_MAJOR, LayerPlan, Layout, Piece, Plan, Question, Role, Span

DATA = Path(__file__).resolve().parents[1] / "data"
FLUX = DATA / "modelopt" / "flux" / "fp8"
WAN = DATA / "settle" / "wan_nvfp4_swizzle"
SMOOTHED = DATA / "modelopt" / "wan" / "ex_int8_cut"
NUNCHAKU = DATA / "nunchaku" / "tiny_flux" / "svdq-int4_r32-tiny-flux.safetensors"
NAMES = {
    FLUX: "ModelOpt FP8, FLUX.1",
    WAN: "ModelOpt NVFP4, Wan",
    SMOOTHED: "ModelOpt INT8 SmoothQuant, Wan",
    NUNCHAKU: "Nunchaku INT4, FLUX.1",
}
#: What each was made from. Nunchaku's own base is too large to keep: there it is what the file
#: decodes to, which `test_nunchaku.py` holds against the writer's.
BASES = {FLUX: "flux/bf16", WAN: "wan/bf16", SMOOTHED: "wan/bf16"}

TILES = Layout("tiles_128x4")
HIGH_FIRST = Layout("row_major", (("nibbles", "high"),))

Tensors = dict[str, Tensor]
#: (file, an empty directory, whether to do it wrongly) -> what is noticed, None for nothing
Check = Callable[[Path, Path, bool], str | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """What is done wrongly, to which file, who notices, and in which words."""

    what: str
    file: Path
    by: str
    words: str
    check: Check


def planned(source: Path) -> Plan:
    """The plan of a file; one that was cut down for these tests lacks parameters."""
    checkpoint = sources.checkpoint(str(source))
    return planner.draft(checkpoint, headers.read(checkpoint.files), config=checkpoint.config).plan


def base_of(file: Path, directory: Path) -> Plan:
    if file in BASES:
        return planned(DATA / "modelopt" / BASES[file])
    if not (directory / "base").exists():
        dequantize(str(file), directory / "base", dtype="f32")
    return planned(directory / "base")


def told(plan: Plan, base: Plan) -> str | None:
    """The worst outlier in words; layers that a cut file lacks do not count."""
    held = {layer.path for layer in plan.layers}
    same = replace(base, layers=tuple(layer for layer in base.layers if layer.path in held))
    outliers = [layer for layer in compare_plans(plan, same) if layer.is_outlier()]
    return _sentence(outliers[0]) if outliers else None


def _sentence(layer: LayerFidelity) -> str:
    assert layer.fidelity is not None
    error = f"error {layer.fidelity.relative_error:.2g}"
    bias = f"bias error {layer.bias_error:.2g}"
    return f"{bias if layer.bias_error > 0.05 else error}: {layer.suspicion}"


# ways to go wrong --------------------------------------------------------------------------------


def reread(change: Callable[[LayerPlan, Piece], Piece]) -> Check:
    """The plan is changed: the reader takes the file for something it is not."""

    def check(file: Path, directory: Path, wrongly: bool) -> str | None:
        plan, base = planned(file), base_of(file, directory)
        if wrongly:
            layers = (
                replace(layer, pieces=tuple(change(layer, piece) for piece in layer.pieces))
                for layer in plan.layers
            )
            plan = replace(plan, layers=tuple(layers))
        return told(plan, base)

    return check


def rewritten(change: Callable[[Tensors], Tensors]) -> Callable[[Path, Path, bool], Path]:
    """The file is changed: its writer made the mistake."""

    def copy(file: Path, directory: Path, wrongly: bool) -> Path:
        folder = directory / f"copy-{wrongly}"
        folder.mkdir()
        (weights,) = file.glob("*.safetensors")
        tensors = load_file(weights)
        save_file(change(tensors) if wrongly else tensors, folder / weights.name)
        (folder / "config.json").write_text((file / "config.json").read_text())
        return folder

    return copy


def refused(change: Callable[[Tensors], Tensors]) -> Check:
    copy = rewritten(change)

    def check(file: Path, directory: Path, wrongly: bool) -> str | None:
        checkpoint = sources.checkpoint(str(copy(file, directory, wrongly)))
        try:
            planner.plan(checkpoint, headers.read(checkpoint.files), config=checkpoint.config)
        except (PlanError, FormatError) as error:
            return error.what.rpartition("does not fit: ")[2]
        return None

    return check


def compared(change: Callable[[Tensors], Tensors]) -> Check:
    copy = rewritten(change)

    def check(file: Path, directory: Path, wrongly: bool) -> str | None:
        return told(planned(copy(file, directory, wrongly)), base_of(file, directory))

    return check


def with_codes_high_first(layer: LayerPlan, piece: Piece) -> Piece:
    narrow = layer.encodings == ("nvfp4",)
    parts = (
        replace(part, layout=HIGH_FIRST) if narrow and part.role is Role.CODES else part
        for part in piece.parts
    )
    return replace(piece, parts=tuple(parts))


def scales_in_rows(file: Path, directory: Path, wrongly: bool) -> str | None:
    """What the scales themselves say when they are asked, rows first; None when they say rows."""
    plan = planned(file)
    paths = tuple(layer.path for layer in plan.quantized if layer.shape_NK[0] % 128 == 0)
    order = (ROW_MAJOR, TILES) if wrongly else (TILES, ROW_MAJOR)
    question = Question(
        topic="scale layout", role=Role.BLOCK_SCALE, layouts=order, paths=paths, why="a test asks"
    )
    settled = settle.settle(replace(plan, open=(question,)))
    layer = settled.layer(paths[0])
    part = layer.pieces[0].part(Role.BLOCK_SCALE)
    assert part is not None
    return layer.why.split("; ")[-1] if part.layout != order[0] else None


def transposed(tensors: Tensors) -> Tensors:
    name = "blocks.0.attn1.to_q.weight_scale"
    return {**tensors, name: tensors[name].T.contiguous()}


def divided(tensors: Tensors) -> Tensors:
    return {
        name: 1 / tensor if name.endswith("weight_scale") else tensor
        for name, tensor in tensors.items()
    }


def without_a_scale(tensors: Tensors) -> Tensors:
    name = "transformer_blocks.0.attn.to_q.weight_scale"
    return {key: tensor for key, tensor in tensors.items() if key != name}


def exchanged(tensors: Tensors) -> Tensors:
    """q stored under the name of k, and k under that of q."""
    names = {"to_q": "to_k", "to_k": "to_q"}

    def other(name: str) -> str:
        return ".".join(names.get(segment, segment) for segment in name.split("."))

    return {other(name): tensor for name, tensor in tensors.items()}


def with_halves_as_stored(layer: LayerPlan, piece: Piece) -> Piece:
    """BFL stores shift before scale, diffusers the other way round."""
    if layer.path != "norm_out.linear":
        return piece
    half = layer.shape_NK[0] // 2
    return replace(piece, take=(Span(half, 2 * half), Span(0, half)))


def without_smoothing(layer: LayerPlan, piece: Piece) -> Piece:
    return replace(piece, smooth=None) if layer.encodings == ("dense",) else piece


FAILURES = (
    Failure(
        what="nibbles swapped",
        file=WAN,
        by="fidelity",
        words="error 1.",
        check=reread(with_codes_high_first),
    ),
    Failure(
        what="swizzled scales taken as rows",
        file=WAN,
        by="evidence",
        words="variance of scales that rows and columns leave: row_major",
        check=scales_in_rows,
    ),
    Failure(
        what="scale transposed",
        file=WAN,
        by="evidence",
        words="has shape [8, 128], its weight needs [128, 8]",
        check=refused(transposed),
    ),
    Failure(
        what="divided by the scale",
        file=FLUX,
        by="fidelity",
        words="a scale dropped, divided",
        check=compared(divided),
    ),
    Failure(
        what="scale dropped",
        file=FLUX,
        by="audit",
        words="'transformer_blocks.0.attn.to_q.weight' is fp8 without its scale",
        check=refused(without_a_scale),
    ),
    Failure(
        what="q and k exchanged",
        file=FLUX,
        by="fidelity",
        words="exchanged? it matches",
        check=compared(exchanged),
    ),
    Failure(
        what="swap of shift and scale omitted",
        file=FLUX,
        by="fidelity",
        words="its halves are exchanged: shift and scale?",
        check=reread(with_halves_as_stored),
    ),
    Failure(
        what="shift before GELU's layer omitted",
        file=NUNCHAKU,
        by="fidelity",
        words="the bias is not the base's",
        check=reread(lambda layer, piece: replace(piece, shift=0.0)),
    ),
    Failure(
        what="1 left in the modulation's bias",
        file=NUNCHAKU,
        by="fidelity",
        words="the bias is not the base's",
        check=reread(lambda layer, piece: replace(piece, bias_offsets=())),
    ),
    Failure(
        what="ignored but smoothed layer taken as plain",
        file=SMOOTHED,
        by="fidelity",
        words="columns are scaled",
        check=reread(without_smoothing),
    ),
)


def table(directory: Path) -> str:
    """The rows as Markdown, with what is said about each."""
    rows = ["| silent failure | tried on | noticed by | as |", "|---|---|---|---|"]
    for number, failure in enumerate(FAILURES):
        scratch = directory / str(number)
        scratch.mkdir()
        said = failure.check(failure.file, scratch, True)
        rows.append(f"| {failure.what} | {NAMES[failure.file]} | {failure.by} | {said} |")
    return "\n".join(rows)


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.what)
def test_a_silent_failure_is_noticed(failure: Failure, tmp_path: Path) -> None:
    said = failure.check(failure.file, tmp_path, True)
    assert said is not None and failure.words in said, said


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.what)
def test_the_right_reading_of_the_same_file_passes(failure: Failure, tmp_path: Path) -> None:
    assert failure.check(failure.file, tmp_path, False) is None
