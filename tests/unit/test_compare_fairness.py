"""What would make a comparison unfair, done to real pipelines: refused before or told after drawing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from diffusers.hooks import FirstBlockCacheConfig
from diffusers.models.attention_dispatch import attention_backend
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import diffquant
from diffquant.compare.comparison import Comparison
from diffquant.compare.sides import PINNED, Side, captured, loaded, require_fair, unfair
from diffquant.compare.trajectory import Capture, follow, read, save
from diffquant.errors import DiffquantError, RunError, UsageError
from diffquant.loading import RunFlags
from diffquant.resolve import ModelFlags
from diffquant.run import Request

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves

BASE = Path(diffquant.__file__).parent / "models" / "emoji_flux"
SIDE = Side(name="fp8", model=ModelFlags(), run=RunFlags(device="cpu"))
DRAWING = Request(prompt="car", seed=1, num_inference_steps=1, num_images_per_prompt=1)


def quiet(what: str, done: int, of: int) -> None:
    """Progress that nobody wants to see."""


def compared(**flags: Any) -> Comparison:
    return diffquant.compare(**{"device": "cpu", **flags})


def defects(**flags: Any) -> tuple[str, ...]:
    (candidate,) = compared(prompts=["car"], num_inference_steps=1, **flags).candidates
    return tuple(candidate.verdict.defects)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "reference.safetensors"
    base = replace(SIDE, name="bf16", model=ModelFlags(model_path="emoji_flux"))
    save(captured(loaded(base, quiet), [DRAWING], quiet), path)
    return path


@pytest.fixture(scope="module")
def reference(saved: Path) -> Capture:
    return read(saved)


# refused ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PINNED)
def test_every_pinned_condition_is_refused_when_it_differs(name: str, reference: Capture) -> None:
    there = reference.conditions
    assert name in there
    with pytest.raises(RunError, match=f"would be unfair: {name} is"):
        list(unfair(there, {**there, name: "other"}))


def test_another_scheduler_is_refused_before_anything_is_drawn(tmp_path: Path, saved: Path) -> None:
    FlowMatchEulerDiscreteScheduler(shift=7.0).save_pretrained(tmp_path)
    own = {"component_paths": {"scheduler": str(tmp_path)}}
    with pytest.raises(DiffquantError, match="scheduler"):
        compared(saved_reference=saved, candidates=[own])


def test_a_scheduler_that_a_pipeline_brings_is_refused(saved: Path, reference: Capture) -> None:
    here = loaded(SIDE, quiet)
    config = {**here.pipeline.scheduler.config, "shift": 7.0}
    here.pipeline.scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    with pytest.raises(RunError, match="would be unfair: scheduler is"):
        require_fair(reference.conditions, here)


def test_another_attention_backend_is_refused(saved: Path) -> None:
    with (
        attention_backend("_native_math"),
        pytest.raises(RunError, match="attention is 'FluxAttnProcessor native' .* _native_math'"),
    ):
        compared(saved_reference=saved)


def test_a_cache_on_one_side_is_refused(reference: Capture) -> None:
    here = loaded(SIDE, quiet)
    require_fair(reference.conditions, here)
    here.pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(RunError, match="cache is 'none' .* 'transformer' for the candidate"):
        require_fair(reference.conditions, here)


def test_another_dtype_is_refused(saved: Path) -> None:
    with pytest.raises(RunError, match="unfair: dtype is 'bfloat16'"):
        compared(saved_reference=saved, dtype="float32")


def test_noise_of_another_generator_is_refused(
    saved: Path, reference: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a generator of another device would, this one answers a seed with other numbers."""
    other = torch.Generator
    monkeypatch.setattr(
        "diffquant.run.torch.Generator",
        lambda device: type(
            "Other", (), {"manual_seed": lambda _, seed: other().manual_seed(~seed)}
        )(),
    )
    with pytest.raises(RunError, match="unfair: noise is"):
        compared(saved_reference=saved)


def test_another_size_is_refused(saved: Path) -> None:
    with pytest.raises(UsageError, match="drawn with width 64, not 128"):
        compared(saved_reference=saved, width=128)


# told ---------------------------------------------------------------------------------------------


def test_other_versions_and_threads_are_told(reference: Capture) -> None:
    here = {**reference.conditions, "torch": "0.1", "threads": "96"}
    assert list(unfair(reference.conditions, here)) == [
        f"threads is {reference.conditions['threads']} for the reference and 96 for the candidate",
        f"torch is {reference.conditions['torch']} for the reference and 0.1 for the candidate",
    ]


# saved references ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"seeds": [2]}, r"drawn with seeds \[1\], not \[2\]"),
        ({"num_inference_steps": 2}, "drawn with num inference steps 1, not 2"),
        ({"prompts": ["car"], "seeds": [2]}, "drawn with seed 1, not 2"),
        ({"save_reference": Path("again.safetensors")}, "a saved reference is not saved again"),
        ({"repeat": 0}, "--repeat 0 measures nothing"),
    ],
)
def test_what_is_typed_beside_a_saved_reference_is_never_ignored(
    flags: dict[str, Any], said: str, saved: Path
) -> None:
    with pytest.raises(UsageError, match=said):
        compared(saved_reference=saved, **flags)


def test_a_reference_of_another_model_is_refused(
    tmp_path: Path, saved: Path, reference: Capture
) -> None:
    other = tmp_path / "other.safetensors"
    save(replace(reference, base={"transformer": "0123456789abcdef"}), other)
    with pytest.raises(UsageError, match="was drawn by another model: its transformer is not that"):
        compared(saved_reference=other)


def test_a_reference_of_another_version_is_refused(tmp_path: Path, saved: Path) -> None:
    with safe_open(saved, "pt") as file:
        metadata = file.metadata()
    told = metadata["diffquant.capture"].replace('"version": "2"', '"version": "1"')
    save_file(load_file(saved), tmp_path / "old.safetensors", {"diffquant.capture": told})
    with pytest.raises(UsageError, match="captured by another version of diffquant"):
        compared(saved_reference=tmp_path / "old.safetensors")


def test_a_capture_that_cannot_be_written_leaves_nothing(
    tmp_path: Path, reference: Capture
) -> None:
    broken = replace(reference, layers={"bad": torch.ones(2, device="meta")})
    with pytest.raises(Exception, match="meta"):
        save(broken, tmp_path / "reference.safetensors")
    assert not list(tmp_path.iterdir())


# worthless pictures -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def paint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A VAE that decodes everything to one brightness, between -1 and 1."""

    def folder(brightness: float) -> str:
        vae = AutoencoderKL.from_pretrained(BASE / "vae")
        vae.decoder.conv_out.weight.data.zero_()
        vae.decoder.conv_out.bias.data.fill_(brightness)
        path = tmp_path_factory.mktemp("vae")
        vae.save_pretrained(path)
        return str(path)

    return folder


@pytest.mark.parametrize(
    ("brightness", "said"), [(2.0, "white"), (-2.0, "black"), (0.0, "one colour (128)")]
)
def test_a_blank_candidate_is_named(brightness: float, said: str, paint: Any) -> None:
    own = {"component_paths": {"vae": paint(brightness)}}
    assert defects(candidates=[own]) == (f"the picture is {said} ('car', seed 42)",)


def test_two_blank_pictures_are_equal_and_prove_nothing(paint: Any) -> None:
    own = {"component_paths": {"vae": paint(-2.0)}}
    assert defects(reference=own, candidates=[own]) == (
        "the reference proves nothing: the picture is black ('car', seed 42)",
        "the picture is black ('car', seed 42)",
    )


@pytest.mark.parametrize(
    ("pixels", "said"),
    [
        (
            torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1,
            "the picture is noise",
        ),
        (torch.full((1, 3, 64, 64), torch.nan), "pixels are not finite"),
    ],
    ids=["noise", "nan"],
)
def test_noise_and_nan_are_named(
    pixels: torch.Tensor, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = loaded(SIDE, quiet).pipeline
    monkeypatch.setattr(pipeline.vae, "decode", lambda latents, return_dict: (pixels,))
    filled = replace(DRAWING, width=64, height=64, max_sequence_length=16)
    assert follow(pipeline, filled, lambda step: None).flaws == (said,)
