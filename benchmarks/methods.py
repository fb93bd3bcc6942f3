"""`python -m benchmarks.methods`: every way to quantize the bundled model, drawn, judged, side by side.

    python -m benchmarks.methods                      the table, as Markdown on stdout
    python -m benchmarks.methods --output README.md --plot docs/methods.png
    python -m benchmarks.methods fp8 nvfp4 --prompts 4

Rows are every scheme of --quantization, the bundled FP8 transformer and what each converter writes.
Every row is drawn twice: with the arithmetic of this machine (auto) and with that of hardware which
multiplies the encoded numbers themselves (faithful). Prompts are captions the model was trained on,
so a picture counts as recognised when the glyph nearest to it, of all, is its own.
"""

import argparse
import importlib.util
import io
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import click

import diffquant
from benchmarks._results import table
from diffquant.attach import hush
from diffquant.compare import Candidate
from diffquant.compare.chart import Chart, Point, picture
from diffquant.compare.verdict import LEVELS, judge
from diffquant.errors import DiffquantError
from diffquant.schemes import SCHEMES

BASE = "emoji_flux"
NUMERICS = ("auto", "faithful")
MARK = "methods"
TRAINING = Path(__file__).parents[1] / "examples" / "train_emoji_flux.py"
MB = 1e6


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One row.

    kind       colour in the plot, and what a reader looks for
    flags      of `diffquant.load`; {out} is what was built
    converter  words of `diffquant convert` that build it, {out} and {prompts} to be filled in
    """

    name: str
    kind: str
    flags: Mapping[str, str]
    converter: str = ""

    def filled(self, out: Path) -> dict[str, str]:
        return {flag: value.format(out=out) for flag, value in self.flags.items()}


WHILE_LOADING, FILE, MEASURED = "while loading", "a file", "a measured preset"
PLAIN = "--from-bf16 emoji_flux/transformer --output-dir {out}"
MX = f"build_mx_transformer {PLAIN} --encoding"
SVDQ = f"build_svdquant_transformer {PLAIN} --precision"


def _file(name: str, converter: str, flag: str = "transformer_path") -> Method:
    return Method(name=name, kind=FILE, flags={flag: "{out}"}, converter=converter)


def _measured(scheme: str, budget: str) -> Method:
    """A scheme with the layers kept that `convert sensitivity` finds on the same prompts."""
    typed = f"{BASE} --encoding {scheme} --budget {budget} --output {{out}}.toml"
    return Method(
        name=f"{scheme}, {budget}",
        kind=MEASURED,
        flags={"quantization": scheme, "quantization_preset": "{out}.toml"},
        converter=f"sensitivity {typed} --prompts {{prompts}} --steps-per-prompt 2",
    )


FILES = (
    Method(
        name="ModelOpt FP8, bundled",
        kind=FILE,
        flags={"transformer_path": "emoji_flux_modelopt_fp8"},
    ),
    _file("ModelOpt FP8", f"build_modelopt_fp8_transformer {PLAIN}"),
    _file("ModelOpt NVFP4", f"build_modelopt_nvfp4_transformer {PLAIN}"),
    _file("ModelOpt MXFP8", f"{MX} mxfp8"),
    _file("ModelOpt MXFP4", f"{MX} mxfp4"),
    _file("ModelOpt INT8, weight-only", f"{MX} int8"),
    _file("compressed-tensors INT8", f"{MX} w8a8 --dialect compressed_tensors"),
    _file("Nunchaku INT4", f"{SVDQ} int4", "transformer_weights_path"),
    _file(
        "Nunchaku INT4, calibrated",
        f"{SVDQ} int4 --calibrate {{prompts}}",
        "transformer_weights_path",
    ),
    _file(
        "Nunchaku NVFP4, calibrated",
        f"{SVDQ} nvfp4 --calibrate {{prompts}}",
        "transformer_weights_path",
    ),
    _measured("fp8", "level=strict"),
    _measured("nvfp4", "size=0.35"),
    _measured("mxfp4", "level=strict"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of one method in one arithmetic: means over the drawings, the worst of the one-step errors.

    recognised  drawings that lie nearest to their own glyph; None where the font is missing
    levels      that all limits of `compare` hold for
    missed      the first figure that misses the strictest level
    """

    psnr: float
    ssim: float
    one_step: float
    recognised: int | None
    bytes: int
    levels: tuple[str, ...]
    missed: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A method with its figures by arithmetic, or why there are none."""

    method: Method
    figures: Mapping[str, Figures] = field(default_factory=dict)
    reason: str = ""


def methods() -> tuple[Method, ...]:
    """All of them, in the order of the table."""
    online = (
        Method(name=name, kind=WHILE_LOADING, flags={"quantization": name})
        for name in SCHEMES.names()
    )
    return (*online, *FILES)


def captions(count: int) -> list[str]:
    """Names of that many glyphs, evenly spread over all the model was trained on."""
    found: list[str] = training().evaluation_captions(_glyphs(), count)
    return found


def rows(
    chosen: Sequence[Method], prompts: Sequence[str], tell: Callable[[str], None]
) -> Iterator[Row]:
    """One row after the other; the dense model is drawn once."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        listed = work / "prompts.txt"
        listed.write_text("\n".join(prompts), "utf-8")
        for index, method in enumerate(chosen):
            tell(f"{index + 1} of {len(chosen)}: {method.name}")
            yield _row(method, prompts, work, listed)


def markdown(found: Sequence[Row], prompts: int) -> str:
    """The table; a cell with two figures is auto, then faithful."""
    head = ("", "MB", "PSNR, dB", "SSIM", "recognised", "one-step error", "keeps")
    body = [*_told(found, prompts)]
    note = (
        f"{prompts} drawings of the bundled model, same noise as BF16; where a cell holds two figures, "
        "the first is this CPU's arithmetic and the second the scheme's own (`--numerics faithful`). "
        "*recognised*: nearest to its own glyph of all 860. *one-step error*: the worst relative L2 of "
        "a predicted noise on BF16's trajectory. *keeps*: the level of `diffquant compare`. "
        "Made by `python -m benchmarks.methods`."
    )
    return f"{table(head, body)}\n\n{note}\n"


def chart(found: Sequence[Row]) -> Chart:
    """Bytes against the one-step error in faithful numerics."""
    return Chart(
        title="The bundled model: what each method costs in bytes and in error",
        x="transformer, MB",
        y="worst one-step error (relative L2), faithful numerics",
        points=tuple(
            Point(
                x=row.figures[NUMERICS[-1]].bytes / MB,
                y=row.figures[NUMERICS[-1]].one_step,
                kind=row.method.kind,
                name=row.method.name,
            )
            for row in found
            if row.figures
        ),
        is_logarithmic=True,
    )


# measuring -------------------------------------------------------------------------------------------


def _row(method: Method, prompts: Sequence[str], work: Path, listed: Path) -> Row:
    try:
        out = _built(method, work, listed)
        return Row(
            method=method,
            figures={
                numerics: _figures(method.filled(out), numerics, prompts, work)
                for numerics in NUMERICS
            },
        )
    except ModuleNotFoundError as error:
        return Row(method=method, reason=f"not built: there is no {error.name}")
    except DiffquantError as error:
        return Row(method=method, reason=f"failed: {error.what}")


def _built(method: Method, work: Path, listed: Path) -> Path:
    """Where the converter wrote to, or would have."""
    out = work / re.sub(r"\W+", "-", method.name.lower())
    if method.converter:
        name, *words = method.converter.split()
        command = import_module(f"diffquant.converters.{name}").main
        typed = [word.format(out=out, prompts=listed) for word in words]
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            command.main(args=typed, standalone_mode=False)
    return out


def _figures(
    flags: Mapping[str, str], numerics: str, prompts: Sequence[str], work: Path
) -> Figures:
    saved = work / "reference.safetensors"
    asked: dict[str, Any] = (
        {"saved_reference": saved}
        if saved.exists()
        else {"prompts": prompts, "save_reference": saved}
    )
    found = diffquant.compare(
        BASE, candidates=[{**flags, "numerics": numerics}], device="cpu", **asked
    )
    candidate = found.candidates[0]
    figures = {name: value for name, value in candidate.figures.items() if value is not None}
    verdicts = {
        name: judge(name, {}, candidate.figures, candidate.verdict.defects) for name in LEVELS
    }
    return Figures(
        psnr=figures["psnr"],
        ssim=figures["ssim"],
        one_step=figures["one_step"],
        recognised=_recognised(candidate),
        bytes=candidate.cost.weight_bytes,
        levels=tuple(name for name, verdict in verdicts.items() if verdict.ok),
        missed=list(verdicts.values())[-1].first_failure,
    )


def _recognised(candidate: Candidate) -> int | None:
    """How many drawings lie nearest to the glyph their prompt names."""
    if not training().FONT.exists():
        return None
    import numpy as np

    drawn = np.stack([pair.candidate_frames[0].permute(1, 2, 0) for pair in candidate.pairs])
    names = [glyph.name for glyph in _glyphs()]
    nearest = training().nearest_glyphs(drawn, _rendered())
    return sum(
        bool(names[index] == pair.request.prompt)
        for index, pair in zip(nearest, candidate.pairs, strict=True)
    )


@cache
def training() -> ModuleType:
    """examples/train_emoji_flux.py, which made the model and knows its glyphs."""
    spec = importlib.util.spec_from_file_location("train_emoji_flux", TRAINING)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@cache
def _glyphs() -> tuple[Any, ...]:
    folder = Path(diffquant.__file__).parent / "models" / BASE
    return tuple(training().read_glyphs(folder))


@cache
def _rendered() -> Any:
    return training().render_all(_glyphs())


# telling ---------------------------------------------------------------------------------------------


def _told(found: Sequence[Row], prompts: int) -> Iterator[tuple[str, ...]]:
    for row in found:
        if not row.figures:
            yield (row.method.name, row.reason, "", "", "", "", "")
            continue
        both = [row.figures[numerics] for numerics in NUMERICS]
        yield (
            row.method.name,
            f"{both[0].bytes / MB:.2f}",
            _pair(*(f"{each.psnr:.1f}" for each in both)),
            _pair(*(f"{each.ssim:.3f}" for each in both)),
            _pair(*(f"{each.recognised}/{prompts}" for each in both)),
            _pair(*(f"{each.one_step:.3f}" for each in both)),
            _pair(*(each.levels[-1] if each.levels else "nothing" for each in both)),
        )


def _pair(auto: str, faithful: str) -> str:
    return auto if auto == faithful else f"{auto} · {faithful}"


def _store(path: Path, text: str) -> None:
    """Between the marks of a file that has them; a new file of its own otherwise."""
    block = f"<!-- {MARK} -->\n{text}<!-- /{MARK} -->"
    held = path.read_text("utf-8") if path.exists() else ""
    between = re.compile(rf"<!-- {MARK} -->.*?<!-- /{MARK} -->", re.DOTALL)
    if held and not between.search(held):
        raise SystemExit(f"error: {path} has no place for the table: {block.splitlines()[0]}")
    path.write_text(between.sub(lambda _: block, held) if held else f"{block}\n", "utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """0, or 1 where a method that is there does not draw."""
    known = {method.name: method for method in methods()}
    parser = argparse.ArgumentParser(prog="python -m benchmarks.methods", description=__doc__)
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="[all]")
    parser.add_argument("--prompts", type=int, default=8, metavar="N", help="drawings [8]")
    parser.add_argument("--output", type=Path, metavar="FILE", help="put the table into this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="bytes against error, as PNG")
    parser.add_argument("--json", type=Path, metavar="FILE", help="everything measured")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.methods if name not in known]
    if unknown:
        parser.error(f"no method is called {unknown[0]!r}; there are {', '.join(known)}")
    warnings.simplefilter("ignore")
    hush()
    prompts = captions(options.prompts)
    chosen = [known[name] for name in options.methods or known]
    found = list(rows(chosen, prompts, lambda text: click.echo(text, err=True)))
    text = markdown(found, len(prompts))
    print(text)
    if options.output:
        _store(options.output, text)
    if options.plot:
        picture(chart(found)).save(options.plot, optimize=True)
    if options.json:
        told = [asdict(row) for row in found]
        options.json.write_text(json.dumps(told, indent=1) + "\n", "utf-8")
    return int(any(row.reason.startswith("failed") for row in found))


if __name__ == "__main__":
    sys.exit(main())
