"""Schedulers and tokenizers from another folder, as diffusers takes them; and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import diffquant
from diffquant import cli
from diffquant.batch import name_of
from diffquant.errors import DiffquantError, UsageError
from diffquant.resolve import ModelFlags, resolve
from diffquant.run import Request
from tests import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_flux_pipeline(tmp_path_factory.mktemp("tiny") / "flux")


@pytest.fixture
def shifted(tmp_path: Path) -> Path:
    folder = tmp_path / "shifted"
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder)
    return folder


def drawn(pipeline: Any) -> Any:
    told = {"prompt": "red apple", "width": 32, "height": 32, "num_inference_steps": 3}
    seed = torch.Generator("cpu").manual_seed(0)
    with torch.inference_mode():
        return pipeline(**told, max_sequence_length=16, generator=seed, output_type="pt").images


def test_a_scheduler_of_another_folder_draws_what_it_draws_in_diffusers(
    base: Path, shifted: Path
) -> None:
    plain = diffquant.load(str(base), device="cpu")
    ours = diffquant.load(str(base), component_paths={"scheduler": str(shifted)}, device="cpu")
    assert ours.scheduler.config.shift == 3.0
    before = drawn(plain)
    plain.scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(shifted)
    assert torch.equal(drawn(ours), drawn(plain))
    assert not torch.equal(drawn(ours), before)


def test_a_scheduler_of_another_class_is_that_class(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "unipc"
    diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True
    ).save_pretrained(folder)
    ours = diffquant.load(str(base), component_paths={"scheduler": str(folder)}, device="cpu")
    assert type(ours.scheduler) is diffusers.UniPCMultistepScheduler
    assert drawn(ours).isfinite().all()


@pytest.mark.parametrize("component", ["tokenizer", "tokenizer_2"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_tokenizer_comes_from_a_pipeline_or_from_its_own_folder(
    base: Path, tmp_path: Path, component: str, whole: bool
) -> None:
    other = tmp_path / "other" / component
    shutil.copytree(base / component, other)
    (tmp_path / "other" / "model_index.json").write_text("{}")
    text = (other / "tokenizer.json").read_text().replace('"apple"', '"orange"')
    (other / "tokenizer.json").write_text(text)
    source = str(tmp_path / "other" if whole else other)
    pipeline = diffquant.load(str(base), component_paths={component: source}, device="cpu")
    assert "orange" in getattr(pipeline, component).get_vocab()
    untouched = "tokenizer_2" if component == "tokenizer" else "tokenizer"
    assert "apple" in getattr(pipeline, untouched).get_vocab()


def test_the_rule_that_fired_names_flag_folder_and_class(base: Path, shifted: Path) -> None:
    flags = ModelFlags(model_path=str(base), component_paths={"scheduler": str(shifted)})
    resolution = resolve(flags)
    (fired,) = (fired for fired in resolution.fired if fired.rule == "2b")
    assert fired.sentence.startswith("--scheduler-path gives scheduler its settings")
    assert fired.sentence.endswith("a FlowMatchEulerDiscreteScheduler")
    assert set(resolution.components) == {"transformer"}


def _wrong(tmp_path: Path, file: str, text: str) -> str:
    (tmp_path / file).write_text(text)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("component", "make", "says"),
    [
        ("scheduler", lambda path: str(path), "has no scheduler_config.json"),
        ("tokenizer", lambda path: str(path), "has no tokenizer_config.json"),
        (
            "scheduler",
            lambda path: _wrong(path, "scheduler_config.json", "{"),
            "is not valid JSON at line 1",
        ),
        (
            "scheduler",
            lambda path: _wrong(path, "scheduler_config.json", '{"_class_name": "AutoencoderKL"}'),
            "describes AutoencoderKL, a scheduler was needed",
        ),
        (
            "scheduler",
            lambda path: _wrong(path, "scheduler_config.json", '{"_class_name": "OddScheduler"}'),
            "has no 'OddScheduler'",
        ),
        (
            "tokenizer",
            lambda path: _wrong(path, "tokenizer_config.json", "{}"),
            "cannot be read as a PreTrainedTokenizerFast",
        ),
        ("scheduler", lambda path: str(path / "nowhere"), "no file or directory"),
    ],
)
def test_a_folder_without_such_a_component_is_one_clear_error(
    base: Path, tmp_path: Path, component: str, make: Callable[[Path], str], says: str
) -> None:
    with pytest.raises(DiffquantError, match=says) as caught:
        diffquant.load(str(base), component_paths={component: make(tmp_path)}, device="cpu")
    assert "\n" not in caught.value.what


def test_one_file_and_words_about_weights_are_refused(base: Path, shifted: Path) -> None:
    told = {"scheduler": str(shifted / "scheduler_config.json")}
    with pytest.raises(DiffquantError, match="is one file") as caught:
        resolve(ModelFlags(model_path=str(base), component_paths=told))
    assert str(shifted) in (caught.value.hint or "")
    told = {"scheduler": str(shifted)}
    with pytest.raises(UsageError, match=r"'scheduler' .* has no weights"):
        resolve(ModelFlags(model_path=str(base), component_weights_paths=told))
    with pytest.raises(UsageError, match="which is loaded from"):
        diffquant.load(str(base), component_paths=told, components={"scheduler": None})


def test_a_tokenizer_of_another_kind_is_refused(base: Path, tmp_path: Path) -> None:
    index = json.loads((base / "model_index.json").read_text())
    index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    named = shutil.copytree(base, tmp_path / "named")
    (named / "model_index.json").write_text(json.dumps(index))
    folder = shutil.copytree(base / "tokenizer", tmp_path / "t5")
    for kind, refused in (("T5TokenizerFast", True), ("CLIPTokenizerFast", False)):
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
        flags = ModelFlags(model_path=str(named), component_paths={"tokenizer": str(folder)})
        if refused:
            with pytest.raises(UsageError, match="gives a T5TokenizerFast, and 'tokenizer'"):
                resolve(flags)
        else:
            assert resolve(flags).weightless["tokenizer"].class_name == "CLIPTokenizer"


def test_another_scheduler_gives_a_line_of_a_file_another_name() -> None:
    report = {"dtype": "bfloat16", "numerics": "auto", "lora": []}
    first, second = ({"settings": {"scheduler": {"digest": digit}}} for digit in "12")
    names = {name_of(Request(prompt="a"), {**report, **more}) for more in ({}, first, second)}
    assert len(names) == 3


def test_a_picture_is_drawn_again_with_its_scheduler_and_told_when_that_changed(
    base: Path, shifted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--output-path", str(tmp_path), "--output-file-name"]
    small = ["--width", "32", "--height", "32", "--num-inference-steps", "2", "--device", "cpu"]
    words = ["--prompt", "red car", "--model-path", str(base), "--scheduler-path", str(shifted)]
    assert cli.run(["generate", *words, *small, *place, "one.png"]) == 0
    again = ["generate", "--config-from-metadata", str(tmp_path / "one.png"), *place]
    assert cli.run([*again, "two.png"]) == 0
    assert "files differ" not in capsys.readouterr().err
    diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0).save_pretrained(shifted)
    assert cli.run([*again, "three.png"]) == 0
    assert "scheduler is not the one that drew the picture" in capsys.readouterr().err
