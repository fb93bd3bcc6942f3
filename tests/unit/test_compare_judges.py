"""Judges that are there, that are not there, and that do not load; one of them in full."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import diffquant
from diffquant.compare.judges import ALEXNET, JUDGES, Bench, Judge, require
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
    absent = (judge(package="no_such_package"),)
    with pytest.raises(UsageError, match="lpips cannot be measured: no_such_package is not"):
        require({"lpips": 0.1}, Bench(absent), absent)
    require({"psnr": 28.0}, Bench(absent), absent)


@pytest.fixture
def torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A torchvision with nothing but AlexNet, and a file where its weights would be."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("from torchvision import models\n")
    (tmp_path / "torchvision" / "models.py").write_text(ALEXNET_IN_TORCHVISION)
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / ALEXNET).touch()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("torchmetrics.functional.image.lpips._TORCHVISION_AVAILABLE", True)
    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("torchvision")
def test_lpips_is_zero_for_equal_pictures_and_grows_with_the_difference() -> None:
    bench = Bench(JUDGES[:1])
    assert bench.unmeasured == {}
    same, near, far = (
        bench.figures("", pictures(), pictures(shift)).get("lpips", -1.0) for shift in (0, 2, 12)
    )
    assert same == 0.0 < near < far
    assert bench.figures("", pictures(side=16), pictures(side=16)) == {}


@pytest.mark.usefixtures("torchvision")
def test_a_comparison_judges_where_it_can_and_says_where_it_cannot() -> None:
    found = diffquant.compare(
        prompts=["car"], num_inference_steps=1, device="cpu", thresholds={"lpips": 0.5}
    )
    told = found.to_json()
    assert told["candidates"][0]["figures"]["lpips"] > 0
    assert told["candidates"][0]["pairs"][0]["picture"]["lpips"] > 0
    assert told["unmeasured"] == {"image_reward": "ImageReward is not installed"}
    assert "LPIPS <b>" in found.to_html()
