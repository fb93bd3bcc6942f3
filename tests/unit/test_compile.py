"""Blocks compile whole, whatever their weights are encoded as, and draw what they drew."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import diffquant
from diffquant import compiling, run
from diffquant.compiling import compile_blocks, require_compiler
from diffquant.device import Device, parse
from diffquant.errors import UsageError
from diffquant.offload import blocks, place
from diffquant.residence import Residence
from diffquant.schemes import SCHEMES
from tests import tiny

CPU = parse("cpu")
ASKED = {"num_inference_steps": 1, "height": 64, "width": 64, "max_sequence_length": 16}
#: One of every encoding, and with a low-rank branch beside it.
ONE_EACH = ("fp8", "int4", "int8", "mxfp4", "mxfp8", "nvfp4", "svdq_int4")
SINGLE = 2  # single blocks of the bundled model
REST = tuple(name for name in SCHEMES.names() if name not in ONE_EACH)

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*torch.compile:UserWarning"
)


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def loaded(quantization: str | None = None, **wanted: Any) -> Any:
    asked = {"model_path": "emoji_flux", "quantization": quantization} if quantization else {}
    return diffquant.load(device="cpu", **asked, **wanted)


def drawn(pipeline: Any) -> Tensor:
    asked = run.fill(run.Request(prompt="red apple"), pipeline, ASKED)
    return run.draw(pipeline, asked, lambda *_: {})


def compiled(pipeline: Any, first: int = 0) -> None:
    """Traced as for any compiler, and run as traced; a block that breaks apart raises."""
    for block in blocks(pipeline.transformer)[first:]:
        block.compile(backend="eager", fullgraph=True)


def test_every_block_of_the_bundled_file_is_one_graph() -> None:
    pipeline = loaded()
    wanted = drawn(pipeline)
    compiled(pipeline)
    assert torch.equal(drawn(pipeline), wanted)
    assert counters["stats"]["unique_graphs"] and not counters["graph_break"]


def last_block_draws_the_same(quantization: str) -> None:
    """Attention, MLP and what joins them, compiled; tracing one block costs a second."""
    pipeline = loaded(quantization)
    wanted = drawn(pipeline)
    compiled(pipeline, -1)
    assert torch.equal(drawn(pipeline), wanted)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


@pytest.mark.parametrize("quantization", ONE_EACH)
def test_a_block_is_one_graph_in_every_encoding(quantization: str) -> None:
    last_block_draws_the_same(quantization)


@pytest.mark.long
@pytest.mark.parametrize("quantization", REST)
def test_a_block_is_one_graph_in_every_scheme(quantization: str) -> None:
    last_block_draws_the_same(quantization)


def test_a_deep_model_has_no_more_graphs_than_a_shallow_one(tmp_path: Path) -> None:
    """torch falls back to plain Python after eight graphs of one function."""
    folder = tiny.tiny_flux_pipeline(tmp_path / "deep", num_single_layers=9)
    asked = {"quantization": "nvfp4", "quantize_all": True}
    pipeline = diffquant.load(str(folder), device="cpu", **asked)
    compiled(pipeline)
    drawn(pipeline)
    assert counters["stats"]["unique_graphs"] <= 3


def test_a_graph_break_would_be_noticed() -> None:
    pipeline = loaded()

    def breaks(*_: Any) -> None:
        torch._dynamo.graph_break()

    blocks(pipeline.transformer)[-1].attn.register_forward_pre_hook(breaks)
    compiled(pipeline, -1)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        drawn(pipeline)


@pytest.mark.parametrize("mode", ["disk", "layerwise"])
def test_a_stream_stays_outside_of_what_is_compiled(mode: Any) -> None:
    pipeline = loaded()
    wanted = drawn(pipeline)
    compiled(pipeline, -1)
    only = {"transformer": pipeline.transformer}
    place(pipeline, only, device=torch.device("cpu"), residence=Residence(mode=mode))
    assert torch.equal(drawn(pipeline), wanted)
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]


def test_a_lora_that_comes_later_is_compiled_with_its_block() -> None:
    pipeline = loaded()
    compiled(pipeline, -1)
    without = drawn(pipeline)
    path = f"single_transformer_blocks.{SINGLE - 1}.attn.to_q"
    layer = pipeline.transformer.get_submodule(path)
    down = torch.randn(4, layer.in_features) * 0.1
    up = torch.randn(layer.out_features, 4) * 0.1
    pipeline.load_lora_weights(
        {f"transformer.{path}.lora_A.weight": down, f"transformer.{path}.lora_B.weight": up}
    )
    with_lora = drawn(pipeline)
    blocks(pipeline.transformer)[-1]._compiled_call_impl = None
    assert torch.equal(drawn(pipeline), with_lora)
    assert not torch.equal(with_lora, without)


@pytest.mark.long
def test_the_flag_compiles_for_this_machine_and_draws_nearly_the_same() -> None:
    wanted = drawn(loaded())
    found = drawn(loaded(compile=True))
    assert 0 < counters["stats"]["unique_graphs"]
    assert (found - wanted).abs().max() < 0.05


def test_a_class_without_repeated_blocks_is_refused() -> None:
    with pytest.raises(UsageError, match="no repeated blocks to compile in any of a, b"):
        compile_blocks({"a": nn.Linear(1, 1), "b": nn.Linear(1, 1)})


def test_a_missing_compiler_is_told_before_anything_is_loaded(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UsageError, match=r"there is no g\+\+ or clang\+\+"):
        require_compiler(CPU, {})
    with pytest.raises(UsageError, match="there is no icpx"):
        require_compiler(CPU, {"CXX": "icpx"})
    here = Device(kind="cuda", arch="sm90", name="a GPU", sm=90)
    with pytest.raises(UsageError, match="needs triton on a GPU"):
        require_compiler(here)
    compiling.require_compiler(Device(kind="mps", arch="arm64", name="an Apple GPU"))
