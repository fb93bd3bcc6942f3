"""The bundled FP8 transformer, and broken copies of it, held against the bundled BF16 one."""

import gc
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import diffquant
from diffquant.compare import Question, compare, requests
from diffquant.compare.asking import sides
from diffquant.compare.comparison import Candidate, Comparison
from diffquant.compare.report import page
from diffquant.compare.trajectory import read
from diffquant.errors import RunError, UsageError
from diffquant.loading import RunFlags
from diffquant.resolve import ModelFlags
from diffquant.run import Request

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves

OVERRIDE = Path(diffquant.__file__).parent / "models" / "emoji_flux_modelopt_fp8"
WEIGHTS = "diffusion_pytorch_model.safetensors"
ATTENTION = "transformer_blocks.0.attn"
LAST = "single_transformer_blocks.1.proj_out"
STEPS = 3
Tensors = dict[str, Tensor]


def compared(**flags: Any) -> Comparison:
    """With the defaults of these tests."""
    return diffquant.compare(**{"device": "cpu", "num_inference_steps": STEPS, **flags})


def measured(candidate: Candidate) -> dict[str, float]:
    """The figures there are."""
    return {name: value for name, value in candidate.figures.items() if value is not None}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saved") / "reference.safetensors"


@pytest.fixture(scope="module")
def comparison(saved: Path) -> Comparison:
    return compared(prompts=["red apple", "fox face"], level="strict", save_reference=saved)


def test_fp8_keeps_strict_with_figures_worth_having(comparison: Comparison) -> None:
    (candidate,) = comparison.candidates
    assert comparison.ok
    assert comparison.first_failure is None
    assert measured(candidate)["psnr"] > 30
    assert 0.02 < measured(candidate)["weight"] < 0.04
    assert 0 < measured(candidate)["kernel"] < 0.005
    assert 0 < measured(candidate)["one_step"] < 0.15
    assert candidate.cost.weight_bytes < 0.6 * comparison.reference_cost.weight_bytes


def test_both_sides_start_from_the_same_noise(comparison: Comparison) -> None:
    (candidate,) = comparison.candidates
    assert candidate.notes == ()
    for pair in candidate.pairs:
        errors = [step.relative_l2 for step in pair.steps]
        assert len(errors) == STEPS
        assert 0 < errors[0] < 0.05


def test_a_figure_names_its_layer_and_kernel(comparison: Comparison) -> None:
    (candidate,) = comparison.candidates
    worst = candidate.worst(lambda layer: layer.kernel, 1)[0]
    assert worst.kernel == measured(candidate)["kernel"]
    assert (worst.encoding, worst.choice) == ("fp8", "cpu_fp8")
    assert all(layer.output is not None for layer in candidate.layers)
    assert sum(layer.weight is not None for layer in candidate.layers) == len(candidate.layers)


def test_the_data_is_strict_json_with_stable_keys(comparison: Comparison) -> None:
    told = json.loads(json.dumps(comparison.to_json(), allow_nan=False))
    (candidate,) = told["candidates"]
    assert set(candidate["pairs"][0]["per_step"][0]) == {
        "timestep", "cosine", "relative_l2", "mae", "mse", "rmse", "max_abs", "l2",
    }  # fmt: skip
    assert candidate["verdict"]["ok"]
    assert candidate["means"]["psnr_db"]["low"] <= candidate["means"]["psnr_db"]["value"]
    assert len(candidate["one_step"]) == STEPS


def test_the_markdown_is_a_table_with_a_row_for_each_side(comparison: Comparison) -> None:
    lines = comparison.to_markdown().splitlines()
    assert lines[2].startswith("| bf16 | reference |")
    assert lines[3].startswith("| emoji_flux_modelopt_fp8 | strict passed |")
    assert len({line.count("|") for line in lines[:4]}) == 1


def test_the_report_holds_everything_it_shows(comparison: Comparison) -> None:
    html = page(comparison)
    assert not re.findall(r"""(?:src|href)=|https?://|@import""", html)
    assert html.count("data:image/png;base64") == 2 + 2 * 2  # references once, two views each
    assert html.count("<svg") == 2
    assert 'emoji_flux_modelopt_fp8 <b class="good">keeps strict</b>' in html
    assert "red apple" in html


def test_a_saved_reference_answers_as_the_drawn_one(comparison: Comparison, saved: Path) -> None:
    again = compared(saved_reference=saved, level="strict")
    (first,), (second,) = comparison.candidates, again.candidates
    assert second.figures == first.figures
    assert [pair.request for pair in second.pairs] == [pair.request for pair in first.pairs]


def test_a_saved_reference_refuses_what_it_was_not_drawn_with(
    comparison: Comparison, saved: Path
) -> None:
    prompts = ["red apple", "fox face"]
    with pytest.raises(UsageError, match="num inference steps 3, not 4"):
        compared(saved_reference=saved, prompts=prompts, num_inference_steps=4)
    with pytest.raises(UsageError, match="prompt 'fox face', not 'car'"):
        compared(saved_reference=saved, prompts=["red apple", "car"])
    with pytest.raises(UsageError, match="holds 2 drawings, 1 are asked for"):
        compared(saved_reference=saved, prompts=["red apple"])


def test_a_file_that_is_no_capture_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="holds no captured reference"):
        read(OVERRIDE / WEIGHTS)
    with pytest.raises(UsageError, match="there is no file"):
        read(tmp_path / "nothing.safetensors")


# ------------------------------------------------------------------------------------- broken files


def exchanged(tensors: Tensors) -> None:
    for part in ("weight", "weight_scale", "input_scale"):
        query, key = f"{ATTENTION}.to_q.{part}", f"{ATTENTION}.to_k.{part}"
        tensors[query], tensors[key] = tensors[key], tensors[query]


def without_scale(tensors: Tensors) -> None:
    tensors[f"{LAST}.weight_scale"] = torch.ones(())


def not_finite(tensors: Tensors) -> None:
    tensors[f"{LAST}.weight_scale"] = torch.full((), torch.nan)


def transposed(tensors: Tensors) -> None:
    name = f"{ATTENTION}.to_q.weight"
    tensors[name] = tensors[name].view(torch.uint8).T.contiguous().view(torch.float8_e4m3fn)


def divided(tensors: Tensors) -> None:
    name = f"{LAST}.weight_scale"
    tensors[name] = 1 / tensors[name]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (exchanged, rf"{ATTENTION}.to_q: weight error .*\(q and k exchanged"),
        (without_scale, rf"{LAST}: weight error .* scale dropped"),
        (not_finite, r"latents are not finite from step 1 of 3 \('red apple', seed 42\)"),
        (transposed, rf"{ATTENTION}.to_q: weight error 1.4"),
        (divided, rf"{LAST}: weight error"),
    ],
)
def test_a_broken_file_misses_smoke_and_is_named(
    change: Callable[[Tensors], None],
    said: str,
    tmp_path: Path,
    comparison: Comparison,
    saved: Path,
) -> None:
    shutil.copy(OVERRIDE / "config.json", tmp_path)
    with safe_open(OVERRIDE / WEIGHTS, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(OVERRIDE / WEIGHTS)
    change(tensors)
    save_file(tensors, tmp_path / WEIGHTS, metadata=metadata)
    found = compared(saved_reference=saved, transformer_path=str(tmp_path))
    assert found.first_failure is not None
    assert re.search(said, found.first_failure)
    json.dumps(found.to_json(), allow_nan=False)
    assert "misses smoke" in page(found)


def test_several_candidates_are_told_apart_and_drawn_by_what_they_cost(
    comparison: Comparison, saved: Path
) -> None:
    recipes = [{"quantization": "int8"}, {"quantization": "int4"}, {"quantization": "int4"}]
    found = compared(saved_reference=saved, model_path="emoji_flux", candidates=recipes)
    assert [each.name for each in found.candidates] == ["int8", "int4 (1)", "int4 (2)"]
    int8, int4, _ = found.candidates
    assert measured(int8)["weight"] < measured(int4)["weight"]
    assert measured(int8)["one_step"] < measured(int4)["one_step"]
    html = page(found)
    assert html.count('role="tab"') == 3
    assert "Bytes against error" in html


def test_the_base_against_itself_is_identical(comparison: Comparison, saved: Path) -> None:
    found = compared(saved_reference=saved, model_path="emoji_flux")
    (candidate,) = found.candidates
    assert measured(candidate)["mae"] == measured(candidate)["relative_l2"] == 0.0
    assert found.to_json()["candidates"][0]["pairs"][0]["identical"]
    assert "every value is zero" in page(found)


def test_the_two_sides_are_never_in_memory_together() -> None:
    from diffusers import FluxTransformer2DModel

    def alive() -> set[int]:
        return {id(each) for each in gc.get_objects() if type(each) is FluxTransformer2DModel}

    seen = []
    gc.collect()
    others = alive()  # fixtures of other tests may hold models of their own

    def count(what: str, done: int, of: int) -> None:
        if done == of:
            seen.append(len(alive() - others))

    ours, candidates = sides(ModelFlags(), RunFlags(device="cpu"), reference={}, candidates=[{}])
    drawings = requests(Request(num_inference_steps=1), ["car"], [0])
    compare(Question(reference=ours, candidates=candidates, requests=drawings, repeat=2), count)
    assert max(seen) == 1


def test_a_reference_that_is_quantized_itself_is_refused(tmp_path: Path) -> None:
    whole = shutil.copytree(OVERRIDE.parent / "emoji_flux", tmp_path / "whole")
    for name in ("config.json", WEIGHTS):
        shutil.copy(OVERRIDE / name, whole / "transformer" / name)
    with pytest.raises(RunError, match=r"the reference's transformer is quantized itself"):
        compared(prompts=["car"], model_path=str(whole))
    found = compared(prompts=["car"], model_path=str(whole), reference={"model_path": "emoji_flux"})
    assert found.ok


def test_a_comparison_without_a_prompt_is_refused() -> None:
    with pytest.raises(UsageError, match="there is no prompt"):
        compared()
