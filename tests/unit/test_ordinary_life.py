"""What somebody who knows diffusers does with a pipeline: it works, or it says why not."""

import copy
import io
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image
from torch import Tensor

import diffquant
from diffquant.errors import RunError, SourceError, UsageError

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves


def loaded() -> Any:
    return diffquant.load(device="cpu")


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return loaded()


@pytest.fixture(scope="module")
def drawn(pipeline: Any) -> Tensor:
    return draw(pipeline)


def draw(pipeline: Any, **more: Any) -> Tensor:
    noise = torch.Generator().manual_seed(0)
    words = {"num_inference_steps": 2, "height": 64, "width": 64, "max_sequence_length": 16}
    pixels: Tensor = pipeline(
        "red apple", **words, **more, generator=noise, output_type="pt"
    ).images
    return pixels


def stored(model: Any) -> Any:
    """Through torch.save and torch.load, as a whole module."""
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, stored], ids=["deepcopy", "torch.save"])
def test_a_copy_of_the_transformer_draws_the_same_picture(drawn: Tensor, again: Any) -> None:
    other = loaded()
    other.transformer = again(other.transformer)
    assert torch.equal(draw(other), drawn)


def test_a_state_dict_is_stored_without_pickle_and_comes_back(pipeline: Any, drawn: Tensor) -> None:
    stream = io.BytesIO()
    torch.save(pipeline.transformer.state_dict(), stream)
    stream.seek(0)
    other = loaded()
    with torch.no_grad():
        other.transformer.transformer_blocks[0].attn.to_q.get_buffer("piece0_tensor_scale").mul_(3)
    assert not torch.equal(draw(other), drawn)
    other.transformer.load_state_dict(torch.load(stream, weights_only=True))
    assert torch.equal(draw(other), drawn)


def test_one_pipeline_is_made_of_another_and_still_tells_the_truth(pipeline: Any) -> None:
    other = diffusers.FluxImg2ImgPipeline.from_pipe(loaded(), torch_dtype=torch.bfloat16)
    picture = Image.new("RGB", (64, 64), "red")
    assert draw(other, image=picture, strength=1.0).shape == (1, 3, 64, 64)
    assert diffquant.report(other).truth_lines == diffquant.report(pipeline).truth_lines
    other.transformer = copy.deepcopy(other.transformer)
    with pytest.raises(UsageError, match="not loaded by diffquant"):
        diffquant.report(other)


def test_another_pipelines_transformer_takes_the_place_of_this_one(drawn: Tensor) -> None:
    one, other = loaded(), loaded()
    one.transformer = other.transformer
    assert torch.equal(draw(one), drawn)
    one.register_modules(transformer=loaded().transformer)
    assert torch.equal(draw(one), drawn)


@pytest.mark.parametrize("saved", ["the pipeline", "its transformer"])
def test_saving_what_would_come_back_as_noise_is_refused(
    pipeline: Any, saved: str, tmp_path: Path
) -> None:
    what = pipeline if saved == "the pipeline" else pipeline.transformer
    with pytest.raises(UsageError, match="reloads as random weights"):
        what.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_lora_that_lies_nowhere_is_not_called_misspelled(pipeline: Any) -> None:
    with pytest.raises(SourceError, match="there is no LoRA '/nowhere/ink.safetensors'"):
        pipeline.load_lora_weights("/nowhere/ink.safetensors")


def test_training_through_encoded_weights_is_refused_and_calling_is_not() -> None:
    transformer = loaded().transformer
    layer = transformer.transformer_blocks[0].attn.to_q
    given = torch.randn(2, layer.in_features, dtype=torch.bfloat16, requires_grad=True)
    drawn = layer(given)
    assert torch.equal(drawn.detach(), layer(given.detach()))
    with pytest.raises(RunError, match="gradients do not pass through encoded weights"):
        drawn.sum().backward()
