"""kill -9 at any point of a conversion: nothing that loads is wrong, and the next run finishes it.

A server process imports torch once and forks for every run. Its child is killed when the writer has
made a certain number of calls, so a point is a number and can be repeated.
"""

import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffquant import headers, planner, sources
from diffquant.errors import DiffquantError
from diffquant.formats.modelslim import EXPERTS
from tests.tiny import tiny_wan_pipeline
from tests.unit.test_wan_repack import modelslim, stored

SERVER = """
import os, signal, sys
from pathlib import Path
import torch
from diffquant import writing
from diffquant.converters import build_modelopt_fp8_transformer as fp8, build_mx_transformer as mx
from diffquant.converters import build_svdquant_transformer as svdquant, wan_repack as wan
from diffquant.converters._options import Choosing, Writing

torch.set_num_threads(1)
writing.MARK = 4096
source, pipeline, modelslim = sys.argv[1:]
whole = dict(overwrite=True)
settings = dict(max_shard_size=200_000 / 2**30, **whole)
CONVERTERS = {
    "fp8": lambda out: fp8.build(Writing(output_dir=out, **settings), from_bf16=source),
    "mxfp8": lambda out: mx.build(source, Writing(output_dir=out, **settings), encoding="mxfp8"),
    "comfy": lambda out: mx.build(
        source, Writing(output_dir=out, **whole), encoding="mxfp8", dialect="comfy"
    ),
    "svdquant": lambda out: svdquant.build(
        Writing(output_dir=out, **whole), from_bf16=source, rank=16, rounds=1
    ),
    "wan": lambda out: wan.repack(
        Path(pipeline), Path(modelslim), Writing(output_dir=out, **settings),
        model_type="Wan2.2-T2V-A14B",
    ),
}

def run(name, output, point):
    calls = 0
    def count(frame, event, _):
        nonlocal calls
        if frame.f_code.co_filename in (writing.__file__, wan.__file__):
            calls += 1
            if calls == point:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.setprofile(count)
    CONVERTERS[name](Path(output))
    sys.setprofile(None)
    return calls

warmed = set()
for line in sys.stdin:
    name, output, point = line.split()
    if name not in warmed:  # so that no child has to import what is imported late
        warmed.add(name)
        CONVERTERS[name](Path(output))
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.write(writer, str(run(name, output, int(point))).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    print(os.read(reader, 64).decode() or "killed", flush=True)
    os.close(reader)
"""

#: Converters that write no folder.
SINGLE_FILES = {"comfy", "svdquant"}

Server = "subprocess.Popen[str]"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    source = Path(__file__).resolve().parents[1] / "data" / "modelopt" / "flux" / "bf16"
    folder = tmp_path_factory.mktemp("wan")
    pipeline = tiny_wan_pipeline(folder / "base", experts=2)
    for component, name in EXPERTS.items():
        modelslim(folder / "quantized" / name, stored(pipeline / component))
    places = map(str, (source, pipeline, folder / "quantized"))
    words = [sys.executable, "-c", SERVER, *places]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as found:
        yield found
        assert found.stdin is not None
        found.stdin.close()


def run(server: Server, name: str, output: Path, point: int = 0) -> str:
    """`killed`, or how many calls the writer needed."""
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(f"{name} {output} {point}\n")
    server.stdin.flush()
    return server.stdout.readline().strip()


def contents(output: Path) -> dict[str, bytes]:
    if output.is_file():
        return {output.name: output.read_bytes()}
    files = (file for file in sorted(output.rglob("*")) if file.is_file())
    return {str(file.relative_to(output)): file.read_bytes() for file in files}


def models(output: Path) -> list[Path]:
    """What can be loaded by itself: the transformers of a pipeline, or the place."""
    return [output / name for name in EXPERTS if (output / name).is_dir()] or [output]


def loadable(output: Path) -> dict[str, bytes] | None:
    """What lies there if it can be read as a whole model, else None."""
    try:
        checkpoint = sources.checkpoint(str(output))
        if output.is_dir() and not checkpoint.config:
            return None  # without its config.json a folder is no component
        planner.plan(checkpoint, headers.read(checkpoint.files), config=checkpoint.config)
    except DiffquantError:
        return None
    return contents(output)


def require_whole_or_absent(server: Server, name: str, folder: Path, points: list[float]) -> None:
    suffix = ".safetensors" if name in SINGLE_FILES else ""
    straight = folder / f"straight{suffix}"
    calls = int(run(server, name, straight))
    truth = contents(straight)
    for number, part in enumerate(points):
        output = folder / f"{number}" / f"straight{suffix}"
        output.parent.mkdir()
        assert run(server, name, output, 1 + int(part * calls)) == "killed"
        for left in output.parent.iterdir():
            for model in models(left):
                found, inside = loadable(model), model.relative_to(left)
                wanted = contents(straight / inside) if found else {}
                assert found is None or wanted.items() <= found.items(), (model, part)
        assert run(server, name, output) != "killed"
        assert contents(output) == truth, f"resumed after {part}"
        assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize(("name", "count"), [("fp8", 4), ("comfy", 2)])
def test_a_killed_conversion_leaves_nothing_wrong_and_is_finished_by_the_next(
    server: Server, name: str, count: int, tmp_path: Path
) -> None:
    points = random.Random(0)
    require_whole_or_absent(server, name, tmp_path, [points.random() for _ in range(count)])


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "count"),
    [("fp8", 20), ("mxfp8", 15), ("comfy", 15), ("svdquant", 12), ("wan", 20)],
)
def test_eighty_killed_conversions_leave_nothing_wrong(
    server: Server, name: str, count: int, tmp_path: Path
) -> None:
    points = random.Random(1)
    require_whole_or_absent(server, name, tmp_path, [points.random() for _ in range(count)])
