"""GGUF files: decoding held against the gguf package, kernels against the reference, files end to end.

What needs the gguf package, or diffusers' own loader of such files, is skipped where it is missing.
"""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import diffquant
from diffquant import device, headers, planner
from diffquant.audit import audit
from diffquant.cli import run
from diffquant.converters._options import Reading
from diffquant.converters.dequantize import dequantize
from diffquant.encodings import ENCODINGS
from diffquant.encodings._ggml import SIZES
from diffquant.errors import FormatError, HeaderError, PlanError
from diffquant.families import FAMILIES
from diffquant.formats import NO_HINTS
from diffquant.formats.gguf import FORMAT
from diffquant.kernels import KERNELS, Spec, refusal
from diffquant.pieces import dense
from diffquant.plan import Encoding, Plan, Role
from diffquant.sources import Checkpoint
from diffquant.tensors import Weights
from tests import gguf_files, published, tiny
from tests.gguf_files import plain, q8_0, quantized, random_blocks, random_codes, respelled, write

TYPES = [name for name in ENCODINGS.names() if ENCODINGS.load(name).scales_inside]
TO_Q = "transformer_blocks.0.attn.to_q"
#: Of two loaders of one file: diffusers multiplies codes and scales in float16.
LIKE = 1e-3
PROMPT = {"width": 32, "height": 32, "num_inference_steps": 1, "max_sequence_length": 16}

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves


def decoded(name: str, codes: Tensor) -> Tensor:
    values, width = SIZES[name.upper()]
    shape_NK = (len(codes), codes.shape[1] // width * values)
    return ENCODINGS.load(name).decode({Role.CODES: codes}, Encoding(name), shape_NK)


def opened(path: Path) -> tuple[Checkpoint, headers.Header]:
    source = Checkpoint(origin=path.name, root=path.parent, files=(path,))
    return source, headers.read(source.files)


def planned(path: Path, config: dict[str, Any]) -> Plan:
    return planner.plan(*opened(path), config=config)


# encodings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TYPES)
def test_every_type_decodes_bit_for_bit_as_its_owner_does(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    values, width = SIZES[name.upper()]
    codes = torch.randint(0, 256, (300, 2 * width), dtype=torch.uint8)
    codes[:5] = torch.tensor([0, 255, 0x7F, 0x80, 1], dtype=torch.uint8)[:, None]
    kind = gguf.GGMLQuantizationType[name.removeprefix("ggml_").upper()]
    with warnings.catch_warnings(action="ignore"):  # of scales that are infinite
        truth = torch.from_numpy(gguf.quants.dequantize(codes.numpy(), kind))
    found = decoded(name, codes)
    number = ~truth.isnan()
    assert torch.equal(found.isnan(), ~number)
    assert torch.equal(found.view(torch.int32)[number], truth.view(torch.int32)[number])


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e4])
@pytest.mark.parametrize("name", [name for name in TYPES if ENCODINGS.load(name).encode])
def test_what_is_written_is_bit_for_bit_its_owner_s(name: str, size: float) -> None:
    gguf = pytest.importorskip("gguf")
    values = torch.randn(64, 96) * size
    values[1], values[2] = 0, size / 2
    kind = gguf.GGMLQuantizationType[name.removeprefix("ggml_").upper()]
    truth = torch.from_numpy(gguf.quants.quantize(values.numpy(), kind))
    assert torch.equal(gguf_files.encoded(name, values), truth)


def test_the_bytes_of_a_block_lie_as_the_table_says() -> None:
    scale = torch.tensor([0.5]).half().view(torch.uint8)
    block = torch.cat((scale, torch.tensor([0x18, 0xF0], dtype=torch.uint8).repeat(8)))[None]
    low, high = decoded("ggml_q4_0", block)[0].split(16)
    assert low[:4].tolist() == [0.0, -4.0, 0.0, -4.0]
    assert high[:4].tolist() == [-3.5, 3.5, -3.5, 3.5]


@pytest.mark.parametrize("name", TYPES)
def test_blocks_in_another_order_are_another_weight(name: str) -> None:
    width = SIZES[name.upper()][1]
    codes = random_codes(name, 8, 512)
    assert not torch.equal(decoded(name, codes), decoded(name, codes.roll(width, 1)))


def test_a_row_that_holds_no_whole_blocks_does_not_decode() -> None:
    codes = random_codes("ggml_q4_k", 4, 512)
    with pytest.raises(PlanError, match="blocks of 256 columns need"):
        ENCODINGS.load("ggml_q4_k").decode({Role.CODES: codes}, Encoding("ggml_q4_k"), (4, 384))


# the kernel --------------------------------------------------------------------------------------


def products(
    name: str, codes: Tensor, x_MK: Tensor, kernel: str = "cpu_ggml"
) -> tuple[Tensor, Tensor]:
    spec = Spec(
        encoding=Encoding(name),
        shape_NK=(len(codes), x_MK.shape[1]),
        roles=frozenset({Role.CODES}),
    )
    parts = {Role.CODES: codes}
    ours = KERNELS.load(kernel).build(spec)(x_MK, parts)
    return ours.float(), KERNELS.load("reference").build(spec)(x_MK.float(), parts)


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", ["cpu_ggml", "decoded_ggml"])
@pytest.mark.parametrize("name", TYPES)
def test_products_of_every_type_are_the_reference_s(
    name: str, kernel: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    for m, n, k in ((16, 40, 256), (5, 1300, 512), (33, 7, 2816)):
        codes, x_MK = random_codes(name, n, k), torch.randn(m, k).to(dtype)
        if name in ("ggml_mxfp4", "ggml_nvfp4"):
            codes = codes & 0x7F  # exponents at which a product of bfloat16 is still a number
        ours, truth = products(name, codes, x_MK, kernel)
        assert distance(ours, truth) <= (3.5e-3 if dtype is torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("place", ["sm80", "sm90", "sm120", "gfx942"])
def test_an_accelerator_decodes_the_weight_whole(place: str) -> None:
    spec = Spec(encoding=Encoding("ggml_q4_k"), shape_NK=(8, 256), roles=frozenset({Role.CODES}))
    there = device.parse(place)
    assert refusal(KERNELS.load("decoded_ggml"), spec, there) is None
    assert refusal(KERNELS.load("cpu_ggml"), spec, there) == f"needs cpu, this is {there.kind}"


def test_a_scale_that_is_off_by_a_percent_would_be_seen() -> None:
    codes, x_MK = random_codes("ggml_q6_k", 64, 512), torch.randn(4, 512).bfloat16()
    wrong = codes.clone().view(-1, 210)
    scale = wrong[:, 208:].contiguous().view(torch.float16) * 1.01
    wrong[:, 208:] = scale.view(torch.uint8)
    assert (
        distance(
            products("ggml_q6_k", wrong.view(64, -1), x_MK)[0],
            products("ggml_q6_k", codes, x_MK)[1],
        )
        > 3.5e-3
    )


# reading -----------------------------------------------------------------------------------------


def test_its_evidence_counts_the_types_and_names_the_architecture(tmp_path: Path) -> None:
    blocks = {"a.weight": random_blocks("ggml_q4_k", 2, 256), "b.weight": q8_0(torch.ones(2, 32))}
    proof = FORMAT.evidence(*opened(write(tmp_path / "a.gguf", blocks, architecture="wan")))
    assert proof == "GGUF tensors are blocks of ggml (1 Q4_K, 1 Q8_0; general.architecture 'wan')"


def test_a_file_without_blocks_is_a_plain_checkpoint(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", {"a.weight": plain(torch.ones(2, 4).half())})
    assert planner.identify(*opened(path))[0] == "diffusers"


def test_a_type_that_is_not_decoded_is_refused_by_name(tmp_path: Path) -> None:
    stored = ("GGML_IQ2_XXS", (1, 256), bytes(66))
    path = write(tmp_path / "a.gguf", {"a.weight": stored})
    with pytest.raises(FormatError, match=r"'a\.weight' is stored as IQ2_XXS") as raised:
        planned(path, {})
    assert "Q4_K" in str(raised.value.hint)


def test_a_text_encoder_in_llama_cpp_s_names_is_refused(tmp_path: Path) -> None:
    blocks = {"enc.blk.0.attn_q.weight": q8_0(torch.ones(32, 32))}
    path = write(tmp_path / "t5.gguf", blocks, architecture="t5encoder")
    with pytest.raises(FormatError, match=r"language model of llama\.cpp \(t5encoder"):
        planned(path, {})


def test_more_axes_than_any_writer_knows_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", {"a.weight": plain(torch.ones(1, 1, 1, 1, 1, 2))})
    with pytest.raises(HeaderError, match=r"'a\.weight' .* has 6 axes"):
        opened(path)


def test_blocks_that_lie_across_rows_are_refused(tmp_path: Path) -> None:
    reshaped = headers.Tensor("a.weight", "GGML_Q4_K", (4, 64), 0, 0, 144)
    header = headers.Header((), {"a.weight": reshaped})
    with pytest.raises(FormatError, match="rows of 64 columns, which Q4_K blocks of 256"):
        FORMAT.read(Checkpoint(origin="a", root=tmp_path, files=()), header, NO_HINTS)


def test_sizes_that_were_written_the_wrong_way_round_are_refused(tmp_path: Path) -> None:
    model = tiny.tiny_flux().transformer
    stored = quantized(model.state_dict())
    dtype, shape, content = stored["x_embedder.weight"]
    stored["x_embedder.weight"] = (dtype, shape[::-1], content)
    with pytest.raises(PlanError, match="'x_embedder' stores N 64"):
        planned(write(tmp_path / "a.gguf", stored), dict(model.config))


def test_a_quantized_table_is_decoded_while_loading(tmp_path: Path) -> None:
    model = tiny.tiny_wan().transformer
    stored = quantized(model.state_dict())
    table = model.state_dict()["scale_shift_table"]
    stored["scale_shift_table"] = ("GGML_Q8_0", tuple(table.shape), q8_0(table[0])[2])
    plan = planned(write(tmp_path / "a.gguf", stored), dict(model.config))
    (found,) = (each for each in plan.plain if each.name == "scale_shift_table")
    assert found.sources[0].encoding.name == "ggml_q8_0"


def test_a_deep_audit_finds_a_scale_that_is_no_number(tmp_path: Path) -> None:
    model = tiny.tiny_flux().transformer
    stored = quantized(model.state_dict())
    whole = write(tmp_path / "whole.gguf", stored)
    dtype, shape, content = stored[f"{TO_Q}.weight"]
    infinite = torch.tensor([float("inf")]).half().view(torch.uint8).numpy().tobytes()
    stored[f"{TO_Q}.weight"] = (dtype, shape, infinite + content[2:])
    broken = write(tmp_path / "broken.gguf", stored)
    plans = {path: planned(path, dict(model.config)) for path in (whole, broken)}
    assert audit(plans[whole], opened(whole)[1], deep=True) == ()
    (problem,) = audit(plans[broken], opened(broken)[1], deep=True)
    assert problem.tensor == f"{TO_Q}.weight"


PUBLISHED = {
    "flux1": "bfl",
    "flux2": "bfl",
    "hunyuan_video": "original",
    "ltx2": "original",
    "qwen_image": "diffusers",
    "wan": "original",
    "z_image": "original",
}


@pytest.mark.parametrize(("name", "naming"), PUBLISHED.items())
def test_a_lone_file_of_published_size_is_whole(name: str, naming: str, tmp_path: Path) -> None:
    family = FAMILIES.load(name)
    shapes = published.fused(family, naming, family.inventory({}))
    tensors = {
        stored: headers.Tensor(stored, dtype_of(stored, shape), shape, 0, 0, 0)
        for stored, shape in shapes.items()
    }
    source = Checkpoint(origin=name, root=tmp_path, files=())
    plan = planner.plan(source, headers.Header((), tensors), config={})
    assert plan.family == name
    assert len(plan.quantized) > 200


def dtype_of(name: str, shape: tuple[int, ...]) -> str:
    whole = name.endswith(".weight") and len(shape) == 2 and shape[1] % 256 == 0
    return "GGML_Q4_K" if whole else "F32"


# end to end --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_flux_pipeline(tmp_path_factory.mktemp("gguf") / "base")


def flux_state(base: Path) -> dict[str, Tensor]:
    return load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def bfl(base: Path) -> Path:
    """As ComfyUI-GGUF writes FLUX.1: Black Forest Labs' names, q, k and v in one."""
    state = respelled(flux_state(base), FAMILIES.load("flux1").namings["bfl"])
    assert "double_blocks.0.img_attn.qkv.weight" in state
    return write(base.parent / "flux1-Q8_0.gguf", quantized(state), architecture="flux")


@pytest.fixture(scope="module")
def plainly_named(base: Path) -> Path:
    """The same weights in diffusers' names."""
    return write(base.parent / "diffusers-Q8_0.gguf", quantized(flux_state(base)))


@pytest.mark.parametrize("flag", ["transformer_path", "transformer_weights_path"])
def test_a_file_loads_under_either_flag_and_draws(base: Path, bfl: Path, flag: str) -> None:
    given: dict[str, Any] = {flag: str(bfl)}
    pipeline = diffquant.load(str(base), device="cpu", **given)
    (line,) = diffquant.report(pipeline).truth_lines
    assert line.startswith("transformer: 36/36 linears ggml_q8_0 via cpu_ggml")
    assert pipeline("red apple", **PROMPT).images[0].size == (32, 32)


def test_every_layer_is_within_half_a_step_of_what_was_quantized(base: Path, bfl: Path) -> None:
    config = json.loads((base / "transformer" / "config.json").read_text())
    plan, state = planned(bfl, config), flux_state(base)
    weights = Weights([bfl])
    for layer in plan.layers:
        weight, bias = dense(layer, weights)
        assert distance(weight, state[f"{layer.path}.weight"].float()) < 0.008, layer.path
        assert bias is not None and torch.equal(bias, state[f"{layer.path}.bias"].float())


def test_diffusers_reads_the_same_numbers(base: Path, plainly_named: Path) -> None:
    pytest.importorskip("gguf")
    from diffusers import FluxTransformer2DModel, GGUFQuantizationConfig

    theirs = FluxTransformer2DModel.from_single_file(
        str(plainly_named),
        config=str(base),
        subfolder="transformer",
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        torch_dtype=torch.float32,
    )
    ours = diffquant.load(
        str(base), transformer_path=str(plainly_named), device="cpu", dtype="float32"
    ).transformer
    source = torch.Generator().manual_seed(0)
    given: dict[str, Tensor] = {
        "hidden_states": torch.randn(1, 4, 64, generator=source),
        "encoder_hidden_states": torch.randn(1, 8, 96, generator=source),
        "pooled_projections": torch.randn(1, 64, generator=source),
        "timestep": torch.tensor([0.5]),
        "guidance": torch.tensor([3.5]),
        "img_ids": torch.zeros(4, 3),
        "txt_ids": torch.zeros(8, 3),
    }
    with torch.inference_mode():
        found, truth = (model(**given).sample for model in (ours, theirs))
        other = theirs(**given | {"timestep": torch.tensor([0.501])}).sample
    assert distance(found, truth) < LIKE
    assert distance(other, truth) > LIKE


def test_wan_in_its_own_names_with_a_convolution_of_five_axes(tmp_path: Path) -> None:
    base = tiny.tiny_wan_pipeline(tmp_path / "base")
    state = load_file(base / "transformer" / "diffusion_pytorch_model.safetensors")
    stored = quantized(respelled(state, FAMILIES.load("wan").namings["original"]))
    assert len(stored["patch_embedding.weight"][1]) == 5
    behind = {f"model.diffusion_model.{name}": tensor for name, tensor in stored.items()}
    path = write(tmp_path / "wan-Q8_0.gguf", behind, architecture="wan")
    loaded = diffquant.load(str(base), transformer_weights_path=str(path), device="cpu").transformer
    assert loaded.blocks[0].attn1.to_q.layer.encodings == ("ggml_q8_0",)
    assert torch.equal(loaded.patch_embedding.weight, state["patch_embedding.weight"])


def test_a_compiled_layer_is_one_graph_and_the_same(base: Path, bfl: Path) -> None:
    loaded = diffquant.load(str(base), transformer_path=str(bfl), device="cpu").transformer
    layer = loaded.transformer_blocks[0].attn.to_q
    compiled: Any = torch.compile(layer, fullgraph=True, backend="eager")
    x_MK = torch.randn(3, 128).bfloat16()
    with torch.inference_mode():
        assert torch.equal(compiled(x_MK), layer(x_MK))


def said(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert run(words) == 0
    return capsys.readouterr().out


def test_inspect_tells_format_family_and_types(
    bfl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = said(capsys, "inspect", str(bfl), "--deep")
    assert "Q8_0; general.architecture 'flux')" in told
    assert "flux1 (FluxTransformer2DModel)" in told
    assert "audit     whole" in told


def test_plan_and_explain_name_the_kernel(
    base: Path, bfl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ((), ("--quantization", "gguf")):
        told = said(
            capsys, "plan", "--model-path", str(base), "--transformer-path", str(bfl), *more
        )
        assert "36/36 linears ggml_q8_0 via cpu_ggml" in told
    assert f"--transformer-weights-path {bfl}" in said(capsys, "explain", str(bfl))


def test_a_file_in_diffusers_names_is_of_the_family_whose_shapes_it_has(
    plainly_named: Path,
) -> None:
    assert planned(plainly_named, {}).family == "flux1"


def test_it_becomes_a_plain_component(base: Path, bfl: Path, tmp_path: Path) -> None:
    dequantize(str(bfl), tmp_path / "plain", reading=Reading(base=str(base)))
    written = load_file(tmp_path / "plain" / "diffusion_pytorch_model.safetensors")
    for name, truth in flux_state(base).items():
        assert written[name].dtype == torch.bfloat16, name
        assert distance(written[name], truth) < 0.009, name
