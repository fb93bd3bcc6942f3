"""Judges that are there, that are not there, and that do not load; one of them in full."""

import sys
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import diffquant
from diffquant.compare.judges import ALEXNET, JUDGES, Bench, Judge
from diffquant.errors import UsageError

pytestmark = pytest.mark.filterwarnings("ignore")  # torchmetrics warns of its network's weights

ALEXNET_IN_TORCHVISION = '''
from enum import Enum
from torch import manual_seed, nn


class AlexNet_Weights(Enum):
    DEFAULT = "imagenet"


def alexnet(weights=None):
    """The layers of the real one; random weights, for there is no network here."""
    manual_seed(0)
    model = nn.Module()
    model.features = nn.Sequential(
        nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU(),
        nn.MaxPool2d(3, 2),
    )
    return model
'''


def judge(**changed: Any) -> Judge:
    """One that is here and always says 0.5."""
    says: dict[str, Any] = {"load": lambda: lambda prompt, reference, candidate: 0.5}
    there = {"figure": "lpips", "package": "json", "weights": tuple, "hint": "install it", **says}
    return Judge(**{**there, **changed})


def pictures(shift: int = 0, side: int = 64) -> Tensor:
    """uint8 [1, 3, side, side]: a bright disc."""
    down, right = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    inside = (down - side / 2) ** 2 + (right - side / 2 - shift) ** 2 < (side / 4) ** 2
    return (inside * 200).to(torch.uint8).expand(1, 3, side, side).contiguous()


def test_a_judge_that_is_here_says_its_figure() -> None:
    bench = Bench((judge(),))
    assert bench.unmeasured == {}
    assert bench.figures("car", pictures(), pictures()) == {"lpips": 0.5}


def test_a_figure_that_does_not_apply_is_left_out() -> None:
    bench = Bench((judge(load=lambda: lambda prompt, reference, candidate: None),))
    assert bench.figures("car", pictures(), pictures()) == {}


def test_absence_has_a_reason(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pth"
    bench = Bench((judge(package="no_such_package"),))
    assert bench.unmeasured == {"lpips": "no_such_package is not installed"}
    bench = Bench((judge(weights=lambda: (weights,)),))
    assert bench.unmeasured == {"lpips": f"its weights are not at {str(weights)!r}"}


def test_a_judge_that_does_not_load_is_told_and_the_rest_goes_on() -> None:
    def load() -> Any:
        raise ImportError("cannot import name 'apply_chunking_to_forward'")

    bench = Bench((judge(figure="image_reward", load=load), judge()))
    assert bench.figures("car", pictures(), pictures()) == {"lpips": 0.5}
    assert bench.unmeasured["image_reward"].startswith("json is here but does not load: cannot")


def test_a_threshold_for_an_absent_judge_is_refused_before_anything_is_loaded() -> None:
    bench = Bench((judge(package="no_such_package"),))
    with pytest.raises(UsageError, match="lpips cannot be measured: no_such_package is not"):
        bench.require({"lpips": 0.1})
    bench.require({"psnr": 28.0})


@pytest.fixture
def torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchvision with nothing but AlexNet, and a file where its weights would be."""
    lpips = import_module("torchmetrics.functional.image.lpips")  # before it could find this one
    monkeypatch.setattr(lpips, "_TORCHVISION_AVAILABLE", True)
    source = tmp_path / "torchvision.py"
    source.write_text(ALEXNET_IN_TORCHVISION)
    spec = spec_from_file_location("torchvision", source)
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "models", module, raising=False)
    monkeypatch.setitem(sys.modules, "torchvision", module)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / ALEXNET).touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


@pytest.mark.usefixtures("torchvision")
def test_lpips_is_zero_for_equal_pictures_and_grows_with_the_difference() -> None:
    bench = Bench(JUDGES[:1])
    assert bench.unmeasured == {}
    same, near, far = (
        bench.figures("", pictures(), pictures(shift)).get("lpips", -1.0) for shift in (0, 2, 12)
    )
    assert same == 0.0 < near < far
    assert bench.figures("", pictures(side=16), pictures(side=16)) == {}


def test_a_comparison_judges_where_it_can_and_says_where_it_cannot(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    absent = judge(figure="image_reward", package="no_such_package")
    monkeypatch.setattr(import_module("diffquant.compare.judges"), "JUDGES", (judge(), absent))
    found = diffquant.compare(
        prompts=["car"], num_inference_steps=1, device="cpu", thresholds={"lpips": 0.4}
    )
    told = found.to_json()
    assert told["candidates"][0]["figures"]["lpips"] == 0.5
    assert told["candidates"][0]["pairs"][0]["picture"]["lpips"] == 0.5
    assert told["unmeasured"] == {"image_reward": "no_such_package is not installed"}
    assert found.first_failure == "emoji_flux_modelopt_fp8: LPIPS 0.5000 > 0.4000"
    assert "LPIPS <b>" in found.to_html()
