"""Checkpoint, format and family become a plan in which everything fits, or the draft says what does not."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffquant import headers, planner, sources
from diffquant.encodings import ENCODINGS
from diffquant.errors import FormatError, PlanError
from diffquant.formats import NO_HINTS, Hints
from diffquant.headers import Header
from diffquant.plan import Plan, Problem, Role
from diffquant.planner import Draft
from diffquant.sources import Checkpoint

DATA = Path(__file__).resolve().parents[1] / "data"
FLUX = DATA / "modelopt" / "flux" / "fp8"
PLAIN = DATA / "modelopt" / "flux" / "bf16"
SVDQ = DATA / "nunchaku" / "tiny_flux" / "svdq-int4_r32-tiny-flux.safetensors"
TO_Q = "transformer_blocks.0.attn.to_q"
#: Encodings whose scales are tensors of their own.
SCALED = [name for name in ENCODINGS.names() if frozenset() not in ENCODINGS.load(name).scales]


def opened(source: Path) -> tuple[Checkpoint, Header]:
    checkpoint = sources.checkpoint(str(source))
    return checkpoint, headers.read(checkpoint.files)


def drafted(source: Path, hints: Hints = NO_HINTS) -> Draft:
    checkpoint, header = opened(source)
    return planner.draft(checkpoint, header, config=checkpoint.config, hints=hints)


def changed(target: Path, tensors: dict[str, Tensor | None], **config: Any) -> Path:
    """The true FP8 export with tensors replaced (None: left out) and config entries changed."""
    shutil.copytree(FLUX, target)
    (stored,) = target.glob("*.safetensors")
    held = {**load_file(stored), **tensors}
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, stored)
    told = json.loads((target / "config.json").read_text()) | config
    (target / "config.json").unlink()
    (target / "config.json").write_text(json.dumps(told))
    return target


@pytest.mark.parametrize("source", [FLUX, PLAIN, SVDQ], ids=lambda path: path.name)
def test_in_a_true_file_everything_fits_and_every_tensor_has_one_owner(source: Path) -> None:
    drawn = drafted(source)
    assert drawn.problems == ()
    plan, (_, header) = drawn.plan, opened(source)
    of_layers = {part.ref for layer in plan.layers for it in layer.pieces for part in it.parts}
    of_plain = {part.ref for item in plan.plain for it in item.sources for part in it.parts}
    owned = {ref.name for ref in of_layers | of_plain | set(plan.unused)}
    assert owned == set(header.tensors)
    assert not of_layers & of_plain and not (of_layers | of_plain) & set(plan.unused)


def test_pieces_cover_their_layer() -> None:
    for layer in drafted(SVDQ).plan.layers:
        n, k = layer.shape_NK
        assert sum(len(it.out) * len(it.cols) for it in layer.pieces) == n * k


def test_a_fused_weight_serves_its_modules_in_cuts_of_rows() -> None:
    plan = drafted(SVDQ).plan
    cuts = [
        plan.layer(f"transformer_blocks.0.attn.{name}").pieces[0]
        for name in ("to_q", "to_k", "to_v")
    ]
    refs = {cut.part(Role.CODES).ref for cut in cuts}  # type: ignore[union-attr]
    assert len(refs) == 1
    starts = [cut.take[0].start for cut in cuts]
    assert starts == [0, 256, 512]


def test_two_stored_weights_serve_one_module_side_by_side() -> None:
    pieces = drafted(SVDQ).plan.layer("single_transformer_blocks.0.proj_out").pieces
    assert len(pieces) == 2
    assert pieces[0].cols.start == 0
    assert pieces[1].cols.start == pieces[0].cols.stop


def test_the_plan_does_not_depend_on_the_order_of_tensors(tmp_path: Path) -> None:
    (stored,) = FLUX.glob("*.safetensors")
    folder = shutil.copytree(FLUX, tmp_path / "flux")
    save_file(dict(reversed(list(load_file(stored).items()))), folder / stored.name)
    assert drafted(folder).plan.layers == drafted(FLUX).plan.layers


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", "transformer."])
def test_prefixes_of_single_files_are_seen_through(prefix: str, tmp_path: Path) -> None:
    (stored,) = FLUX.glob("*.safetensors")
    folder = shutil.copytree(FLUX, tmp_path / "flux")
    tensors = {prefix + name: tensor for name, tensor in load_file(stored).items()}
    save_file(tensors, folder / stored.name)
    drawn = drafted(folder)
    assert drawn.problems == ()
    assert [layer.path for layer in drawn.plan.layers] == [
        layer.path for layer in drafted(FLUX).plan.layers
    ]


# what does not fit


def test_a_missing_parameter_is_named(tmp_path: Path) -> None:
    folder = changed(tmp_path / "it", {"transformer_blocks.0.attn.norm_q.weight": None})
    assert drafted(folder).problems == (
        Problem(
            "transformer_blocks.0.attn.norm_q.weight",
            "of FluxTransformer2DModel has no stored tensor",
        ),
    )


def test_a_tensor_nobody_owns_is_named_with_the_nearest(tmp_path: Path) -> None:
    stray = {"transformer_blocks.0.attn.norm_qq.weight": torch.ones(64).bfloat16()}
    (problem,) = drafted(changed(tmp_path / "it", stray)).problems
    assert problem.tensor == "transformer_blocks.0.attn.norm_qq.weight"
    assert problem.what == (
        "belongs to no module of FluxTransformer2DModel, "
        "nearest is 'transformer_blocks.0.attn.norm_q.weight'"
    )


@pytest.mark.parametrize(
    ("name", "shape", "what"),
    [
        (f"{TO_Q}.weight", (144, 128), "stores N 144"),
        (f"{TO_Q}.weight", (128, 96), "stores K 96"),
        (f"{TO_Q}.weight", (96, 128), "stores N 96"),
    ],
)
def test_a_weight_of_another_shape_is_named(
    name: str, shape: tuple[int, int], what: str, tmp_path: Path
) -> None:
    codes = torch.ones(shape).to(torch.float8_e4m3fn)
    problems = drafted(changed(tmp_path / "it", {name: codes})).problems
    assert any(what in problem.what for problem in problems)


def test_a_norm_of_another_shape_is_named(tmp_path: Path) -> None:
    name = "transformer_blocks.0.attn.norm_q.weight"
    (problem,) = drafted(changed(tmp_path / "it", {name: torch.ones(63).bfloat16()})).problems
    assert problem == Problem(name, f"has shape [63], {name!r} needs [64]")


def test_blocks_the_config_does_not_have_are_named(tmp_path: Path) -> None:
    config = {"num_single_layers": 1}
    problems = drafted(changed(tmp_path / "it", {}, **config)).problems
    assert all(problem.tensor.startswith("single_transformer_blocks.1.") for problem in problems)
    assert all("belongs to no module" in problem.what for problem in problems)


def test_plan_raises_what_draft_collects_and_counts_the_rest(tmp_path: Path) -> None:
    folder = changed(tmp_path / "it", {}, num_layers=2)
    checkpoint, header = opened(folder)
    count = len(drafted(folder).problems)
    with pytest.raises(PlanError, match=rf"\(and {count - 3} more\)") as raised:
        planner.plan(checkpoint, header, config=checkpoint.config)
    assert f"lists all {count} problems" in str(raised.value)


@pytest.mark.parametrize("name", SCALED)
def test_every_codec_decides_itself_what_is_complete(name: str) -> None:
    """`is_complete` is what the planner asks; a waiver is the codec's word, not the planner's."""
    from diffquant.plan import Encoding

    codec = ENCODINGS.load(name)
    assert not codec.is_complete(Encoding(name), frozenset({Role.CODES}))
    for option, roles in codec.waived.items():
        key, value = option.split("=")
        rest = max(codec.scales, key=len) - roles
        assert codec.is_complete(Encoding(name, ((key, value),)), rest | {Role.CODES})


def test_a_waived_scale_is_no_problem_and_a_lost_one_is(tmp_path: Path) -> None:
    codes = {"a.weight": torch.ones(16, 16).to(torch.float8_e4m3fn)}
    save_file(codes, tmp_path / "a.safetensors")
    assert drafted(tmp_path / "a.safetensors", Hints(raw_fp8=True)).problems == ()
    lost = changed(tmp_path / "it", {f"{TO_Q}.weight_scale": None})
    assert [problem.tensor for problem in drafted(lost).problems] == [f"{TO_Q}.weight"]


# which format, which family


def test_two_formats_that_contradict_are_an_error_with_both_proofs(tmp_path: Path) -> None:
    (stored,) = SVDQ.parent.glob("svdq*.safetensors")
    shutil.copy(stored, tmp_path / stored.name)
    block = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": []}
    config = {"_class_name": "FluxTransformer2DModel", "quantization_config": block}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match="claims to be of 2 formats") as raised:
        planner.identify(*opened(tmp_path))
    assert "modelopt: config.json quantization_config" in str(raised.value)
    assert "nunchaku: " in str(raised.value)


def test_an_unexplained_file_is_named_by_its_first_tensor(tmp_path: Path) -> None:
    (stored,) = FLUX.glob("*.safetensors")
    shutil.copy(stored, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match=r"nothing in it says how: first '.+' \(F") as raised:
        planner.identify(*opened(tmp_path / "x.safetensors"))
    assert "--transformer-path" in str(raised.value)


@pytest.mark.parametrize(
    ("config", "family"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "flux1"),
        ({"_class_name": "WanTransformer3DModel"}, "wan"),
        ({"_class_name": "SomethingElse"}, "generic"),
    ],
)
def test_the_class_name_tells_the_family(config: dict[str, Any], family: str) -> None:
    assert planner.family_of(config, opened(FLUX)[1]) == family


def test_without_a_config_the_names_tell_the_family() -> None:
    assert planner.family_of({}, opened(SVDQ)[1]) == "flux1"


def test_the_config_of_a_plan_describes_the_module_alone() -> None:
    plan: Plan = drafted(FLUX).plan
    assert "quantization_config" not in plan.config
    assert "_name_or_path" not in plan.config
    assert plan.config["_class_name"] == "FluxTransformer2DModel"


def test_a_promise_of_svdquant_is_held_against_the_low_rank_branches() -> None:
    promised = Hints(svdquant=True)
    config = json.loads((FLUX / "config.json").read_text())
    with pytest.raises(FormatError, match="no layer of .* has a low-rank branch: it is modelopt"):
        planner.plan(*opened(FLUX), config=config, hints=promised)
    assert planner.plan(*opened(SVDQ), config={}, hints=promised).format == "nunchaku"
    assert planner.plan(*opened(FLUX), config=config).format == "modelopt"
