"""Weights come and go, and every picture and every byte stays what it was."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diffquant
from diffquant import headers, loading, paging, planner, run, sources
from diffquant.device import parse
from diffquant.errors import UsageError
from diffquant.families import FAMILIES
from diffquant.kernels import choose
from diffquant.linear import QuantLinear
from diffquant.materialize import materialize
from diffquant.offload import Stream, blocks, others, place, stream_from_disk
from diffquant.paging import PAGE, Mapped, Pages, Spill, tensors_of
from diffquant.residence import ON_DEVICE, Residence
from diffquant.schemes import SCHEMES
from diffquant.visiting import OnDevice, visiting
from tests import tiny

CPU = torch.device("cpu")
GPU = parse("sm89")
DATA = Path(__file__).parents[1] / "data"
ASKED = {"num_inference_steps": 1, "height": 64, "width": 64, "max_sequence_length": 16}
#: None is the bundled file, in FP8; the others are quantized while loading.
ENCODED = (None, *SCHEMES.names())
FILES = (
    "modelopt/flux/fp8",
    "modelopt/wan/mixed",
    "modelopt/native/int8_sq",
    "modelopt/native/mxfp8",
    "modelopt/native/nvfp4",
    "nunchaku/tiny_flux/svdq-int4_r32-tiny-flux.safetensors",
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
    pytest.mark.skipif(sys.platform != "linux", reason="pages are given back as Linux does"),
]


def loaded(quantization: str | None = None, **wanted: Any) -> Any:
    source = {} if quantization is None else {"model_path": "emoji_flux"}
    asked = {} if quantization is None else {"quantization": quantization}
    return diffquant.load(**source, **asked, device="cpu", **wanted)


def drawn(pipeline: Any) -> Tensor:
    asked = run.fill(run.Request(prompt="red apple"), pipeline, ASKED)
    return run.draw(pipeline, asked, lambda *_: {})


def content(model: nn.Module) -> dict[str, bytes]:
    """Every byte of every parameter and buffer, by name."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {
        name: tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in named
    }


def streamed(model: nn.Module, residence: Residence) -> nn.Module:
    """The model as a pipeline's only component, its blocks copied as if to another device."""

    class Alone:
        components = {"transformer": model}

    place(Alone(), {"transformer": model}, device=CPU, residence=residence)
    return model


# ------------------------------------------------------------------------------------------- by bytes


@pytest.fixture(scope="module", params=ENCODED)
def whole(request: pytest.FixtureRequest) -> tuple[str | None, Any, Tensor, dict[str, bytes]]:
    """A pipeline in one encoding with nothing offloaded: its picture and its bytes."""
    pipeline = loaded(request.param)
    return request.param, pipeline, drawn(pipeline), content(pipeline.transformer)


def test_disk_draws_the_same_picture_and_keeps_every_byte(whole: Any) -> None:
    quantization, _, wanted, held = whole
    pipeline = loaded(quantization, offload="disk")
    assert torch.equal(drawn(pipeline), wanted)
    assert content(pipeline.transformer) == held


def test_layerwise_copies_draw_the_same_picture_and_keep_every_byte(whole: Any) -> None:
    _, pipeline, wanted, held = whole
    addresses = [tensor.data_ptr() for tensor in tensors_of(pipeline.transformer)]
    streamed(pipeline.transformer, Residence(mode="layerwise", prefetch=2))
    assert torch.equal(drawn(pipeline), wanted)
    assert content(pipeline.transformer) == held
    assert [tensor.data_ptr() for tensor in tensors_of(pipeline.transformer)] == addresses


def test_a_byte_lost_on_the_way_would_be_seen() -> None:
    pipeline = loaded()
    wanted, held = drawn(pipeline), content(pipeline.transformer)
    layer = next(each for each in pipeline.transformer.modules() if isinstance(each, QuantLinear))
    codes = next(layer.buffers())
    codes.data = codes.data.view(torch.uint8).roll(1).view(codes.dtype)
    assert content(pipeline.transformer) != held
    assert not torch.equal(drawn(pipeline), wanted)


def test_a_block_computes_with_copies_that_keep_strides() -> None:
    layer = nn.Linear(24, 16, bias=False).requires_grad_(False)
    layer.weight.data = torch.randn(24, 16).t()
    layer.register_buffer("gaps", torch.randn(8, 32)[:, ::3])
    layer.register_buffer("row", torch.randn(1, 8).expand(4, 8))
    home = {name: each.data_ptr() for name, each in layer.state_dict().items()}
    before = content(layer)
    strides = [tensor.stride() for tensor in tensors_of(layer)]
    moved = OnDevice(layer, CPU)
    moved.bring(), moved.arrive()
    assert [tensor.stride() for tensor in tensors_of(layer)] == strides
    assert all(tensor.data_ptr() not in home.values() for tensor in tensors_of(layer))
    assert content(layer) == before
    moved.release()
    assert {name: each.data_ptr() for name, each in layer.state_dict().items()} == home


def test_weights_that_visit_a_device_are_back_when_the_visit_ends() -> None:
    layer = nn.Linear(2, 2).requires_grad_(False)
    home = layer.weight.data_ptr()
    with visiting(layer, CPU):
        assert layer.weight.data_ptr() == home
    # Another name of the same device: copies are made as for any other.
    with pytest.raises(ZeroDivisionError), visiting(layer, torch.device("cpu", 0)):
        assert layer.weight.data_ptr() != home
        _ = 1 / 0
    assert layer.weight.data_ptr() == home


# ------------------------------------------------------------------------------------------ in order


class Noted:
    """A block that writes down what is done to it."""

    def __init__(self, log: list[str], name: int) -> None:
        self.log, self.name = log, name

    def bring(self) -> None:
        self.log.append(f"bring {self.name}")

    def arrive(self) -> None:
        self.log.append(f"arrive {self.name}")

    def release(self) -> None:
        self.log.append(f"release {self.name}")


def passed(stream: Stream, order: tuple[int, ...]) -> None:
    for number in order:
        stream.enter(number)
        stream.leave(number)


def test_without_prefetch_a_block_comes_when_it_works_and_goes_before_the_next() -> None:
    log: list[str] = []
    passed(Stream([Noted(log, name) for name in range(2)], 0), (0, 1))
    assert log == [
        "bring 0", "arrive 0", "release 0", "bring 1", "arrive 1", "release 1",
    ]  # fmt: skip


def test_the_second_pass_knows_that_the_first_block_follows_the_last() -> None:
    log: list[str] = []
    stream = Stream([Noted(log, name) for name in range(3)], 1)
    passed(stream, (0, 1, 2))
    assert log.count("bring 0") == 1
    passed(stream, (0, 1, 2))
    assert log.count("bring 0") == 3
    assert log.index("bring 2") < log.index("arrive 2")


def test_blocks_that_were_brought_for_nothing_are_let_go() -> None:
    log: list[str] = []
    stream = Stream([Noted(log, name) for name in range(4)], 1)
    passed(stream, (0, 2, 3))
    assert "arrive 1" not in log and "release 1" in log
    assert sorted(log.count(f"bring {name}") - log.count(f"release {name}") for name in range(4)) == [
        0, 0, 0, 0,
    ]  # fmt: skip


def test_a_block_that_fails_is_let_go_and_can_be_called_again() -> None:
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Linear(2, 2)])
    streamed(model.requires_grad_(False), Residence(mode="layerwise"))
    with pytest.raises(RuntimeError, match="shapes"):
        model.blocks[0](torch.zeros(1, 3))
    assert model.blocks[0](torch.zeros(1, 2)).shape == (1, 2)


def test_the_first_blocks_stay_and_the_rest_moves() -> None:
    pipeline = loaded()
    model = streamed(pipeline.transformer, Residence(mode="layerwise", resident=2))
    moves = [block._compiled_call_impl is not None for block in blocks(model)]
    assert moves == [False, False] + [True] * (len(moves) - 2)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("flux1", tiny.tiny_flux),
        ("wan", tiny.tiny_wan),
        ("qwen_image", tiny.tiny_qwen_image_edit),
        ("hunyuan_video", tiny.tiny_hunyuan_video),
    ],
)
def test_the_blocks_are_those_the_family_names(name: str, make: Callable[[], Any]) -> None:
    model = make().transformer
    there = {path for path, _ in model.named_modules()}
    lists = [model.get_submodule(path) for path in FAMILIES.load(name).blocks if path in there]
    assert {*map(id, blocks(model))} == {id(block) for held in lists for block in held}


@pytest.mark.parametrize("make", [tiny.tiny_flux, tiny.tiny_wan])
def test_blocks_and_others_are_all_modules_with_weights_and_each_once(
    make: Callable[[], Any],
) -> None:
    model = make().transformer
    units = [*blocks(model), *others(model)]
    found = [id(tensor) for unit in units for tensor in tensors_of(unit)]
    own = {id(tensor) for tensor in [*model._parameters.values(), *model._buffers.values()]}
    assert sorted(found) == sorted({*map(id, tensors_of(model))} - own)


# ------------------------------------------------------------------------------------------ by files


def built(case: str, **wanted: Any) -> nn.Module:
    """The model of one of the true files, on a CPU."""
    source = DATA / case
    if source.is_dir():
        checkpoint = sources.checkpoint(str(source))
    else:
        checkpoint = sources.Checkpoint(
            origin=source.name, root=source.parent, files=(source,), config={}
        )
    plan = planner.plan(checkpoint, headers.read(checkpoint.files), config=checkpoint.config)
    choices = [choose(layer, parse("cpu")) for layer in plan.layers]
    return materialize(plan, choices, device=CPU, dtype=torch.bfloat16, **wanted)


@pytest.mark.parametrize("case", FILES)
def test_every_byte_of_every_file_comes_back_from_the_disk(case: str) -> None:
    wanted = content(built(case))
    model = built(case, keep=Spill().keep)
    Pages(tensors_of(model)).release()
    assert content(model) == wanted


@pytest.mark.parametrize("case", FILES)
def test_whatever_a_file_is_made_into_lies_in_a_file_again(case: str) -> None:
    model, mapped = built(case, keep=Spill().keep), Mapped()
    encoded = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
    held = [tensor for layer in encoded for tensor in tensors_of(layer)]
    assert all(mapped.holds(tensor) for tensor in held if tensor.nbytes >= PAGE)


def test_what_is_quantized_while_loading_would_stay_in_memory_without_a_spill() -> None:
    model, mapped = loaded("nvfp4").transformer, Mapped()
    assert not all(mapped.holds(tensor) for tensor in tensors_of(model) if tensor.nbytes >= PAGE)


def test_a_spill_keeps_values_and_strides_and_leaves_no_file(tmp_path: Path) -> None:
    spill, tensor = Spill(tmp_path), torch.randn(200, 64)
    column = spill.keep(tensor.t())
    row = spill.keep(tensor[:, :40])
    assert torch.equal(column, tensor.t()) and column.stride() == tensor.t().stride()
    assert torch.equal(row, tensor[:, :40])
    assert spill.keep(column) is column and spill.size > 0
    assert not list(tmp_path.iterdir())


def test_a_spill_goes_on_where_one_map_is_full(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(paging, "EXTENT", 3 * PAGE)
    spill = Spill(tmp_path)
    tensors = [torch.full((size * PAGE,), size, dtype=torch.uint8) for size in (2, 2, 5, 1)]
    kept = [spill.keep(tensor) for tensor in tensors]
    Pages(kept).release()
    assert all(torch.equal(*pair) for pair in zip(kept, tensors, strict=True))
    assert spill.size == 10 * PAGE


def test_pages_that_were_given_back_are_out_of_memory_until_they_are_read(tmp_path: Path) -> None:
    kept = Spill(tmp_path).keep(torch.ones(1 << 20))
    pages = Pages([kept])
    pages.bring()
    full = resident()
    pages.release()
    assert full - resident() > 0.9 * kept.nbytes
    assert kept.sum() == kept.numel()


class Embedded(nn.Module):
    """Four megabytes in front of one block."""

    def __init__(self) -> None:
        super().__init__()
        self.embedder = nn.Linear(1024, 1024, bias=False)
        self.blocks = nn.ModuleList([nn.Linear(1024, 16)])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](self.embedder(x))  # type: ignore[no-any-return]


def test_what_is_in_no_block_leaves_memory_with_its_call(tmp_path: Path) -> None:
    model, x = Embedded().requires_grad_(False), torch.randn(1, 1024)
    wanted = model(x)
    stream_from_disk(model, Residence(mode="disk"), CPU, Spill(tmp_path).keep)
    model.embedder.weight.sum()
    before = resident()
    assert torch.equal(model(x), wanted)
    assert before - resident() > 0.9 * model.embedder.weight.nbytes


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


# -------------------------------------------------------------------------------- with others, or not


def test_merging_into_streamed_weights_is_refused() -> None:
    pipeline = diffquant.load(model_path="emoji_flux", device="cpu", offload="disk")
    with pytest.raises(UsageError, match="streamed from disk, and nothing can be merged"):
        pipeline.transformer.fuse_lora()


def test_diffusers_moves_whole_components(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = loaded()
    asked: list[torch.device] = []
    monkeypatch.setattr(
        type(pipeline), "enable_model_cpu_offload", lambda _, device: asked.append(device)
    )
    place(pipeline, {}, device=CPU, residence=Residence(mode="model"))
    assert asked == [CPU]


def test_other_components_go_through_diffusers_group_offloading_bit_for_bit() -> None:
    from diffusers.hooks import HookRegistry

    pipeline = loaded()
    wanted = drawn(pipeline)
    only = {"transformer": pipeline.transformer}
    place(pipeline, only, device=CPU, residence=Residence(mode="layerwise"))
    assert torch.equal(drawn(pipeline), wanted)
    layer = pipeline.text_encoder_2.encoder.block[0].layer[0].SelfAttention.q
    assert HookRegistry.check_if_exists_or_initialize(layer).hooks


def test_a_cpu_has_nowhere_to_move_weights_and_says_so() -> None:
    for mode in ("model", "layerwise"):
        wish = Residence(mode=mode)  # type: ignore[arg-type]
        assert wish.on(parse("cpu")) == ON_DEVICE
        assert f"--offload {mode} moves nothing here" in str(wish.note(parse("cpu")))
        assert wish.on(GPU) == wish and wish.note(GPU) is None


def test_disk_is_refused_where_memory_is_not_given_back() -> None:
    with pytest.raises(UsageError, match="as Linux does, this is darwin"):
        Residence(mode="disk").on(parse("cpu"), platform="darwin")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"offload": "dsk"}, "offload 'dsk'"),
        ({"offload_prefetch": 2}, "--offload-prefetch 2 means nothing to --offload none"),
        ({"offload": "model", "resident_layers": 3}, "--resident-layers 3 means nothing"),
        ({"offload": "disk", "offload_prefetch": -1}, "--offload-prefetch -1 is too small"),
    ],
)
def test_flags_that_mean_nothing_together_are_refused(flags: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        loading.RunFlags(**flags)
