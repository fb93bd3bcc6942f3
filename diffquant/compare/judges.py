"""Figures that only a trained judge gives, measured where its package and its weights lie already.

    lpips         perceptual distance of two pictures, 0 for equal ones (AlexNet, torchmetrics)
    image_reward  by how much the candidate follows its prompt better than the reference does

Nothing is downloaded and nobody has to have them: `unmeasured` says why one is absent. CLIP is not
among them, because it hardly sees what quantization does to a picture.
"""

import sys
from collections.abc import Callable, Container, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffquant.errors import UsageError

WHITE = 255
#: Pixels of the shorter side below which AlexNet has nothing left to look at.
SMALLEST = 32
ALEXNET = "alexnet-owt-7be5be79.pth"
ALEXNET_URL = f"https://download.pytorch.org/models/{ALEXNET}"

#: prompt, reference and candidate as uint8 [F, 3, H, W] -> the figure, None where it does not apply
Measure = Callable[[str, Tensor, Tensor], float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """A trained model that looks at pictures.

    figure   its name in `verdict.FIGURES`
    package  what has to be importable
    weights  files that have to be there
    hint     how to come by both
    load     makes the measure; ImportError and OSError mean that it cannot be had
    """

    figure: str
    package: str
    weights: Callable[[], tuple[Path, ...]]
    hint: str
    load: Callable[[], Measure]

    def absence(self) -> str | None:
        """Why it cannot judge here; None when it can."""
        if find_spec(self.package) is None:
            return f"{self.package} is not installed"
        missing = next((path for path in self.weights() if not path.is_file()), None)
        return None if missing is None else f"its weights are not at {str(missing)!r}"


class Bench:
    """The judges that are here; each is loaded when it first has something to judge."""

    def __init__(self, judges: "tuple[Judge, ...] | None" = None) -> None:
        self.unmeasured: dict[str, str] = {}
        self._judges = JUDGES if judges is None else judges
        self._waiting: dict[str, Judge] = {}
        self._measures: dict[str, Measure] = {}
        for judge in self._judges:
            absence = judge.absence()
            if absence is None:
                self._waiting[judge.figure] = judge
            else:
                self.unmeasured[judge.figure] = absence

    def require(self, figures: Container[str]) -> None:
        """Raises UsageError where one of the figures is a judge's that is not here."""
        for judge in self._judges:
            if judge.figure in figures and judge.figure in self.unmeasured:
                raise UsageError(
                    f"{judge.figure} cannot be measured: {self.unmeasured[judge.figure]}",
                    hint=judge.hint,
                )

    def figures(self, prompt: str, reference: Tensor, candidate: Tensor) -> dict[str, float]:
        """What every judge says of one pair of pictures or videos."""
        self._load()
        said = {
            name: measure(prompt, reference, candidate) for name, measure in self._measures.items()
        }
        return {name: value for name, value in said.items() if value is not None}

    def _load(self) -> None:
        while self._waiting:
            name, judge = self._waiting.popitem()
            try:
                self._measures[name] = judge.load()
            except (ImportError, OSError) as error:
                self.unmeasured[name] = f"{judge.package} is here but does not load: {error}"


# --------------------------------------------------------------------------------------- the judges


def _lpips() -> Measure:
    from torchmetrics.functional.image.lpips import _lpips_update, _NoTrainLpips

    net = _NoTrainLpips(net="alex")

    def measure(prompt: str, reference: Tensor, candidate: Tensor) -> float | None:
        if min(reference.shape[-2:]) < SMALLEST:
            return None
        with torch.inference_mode():
            said = _lpips_update(reference / WHITE, candidate / WHITE, net, True)
        return float(said.mean())

    return measure


def _image_reward() -> Measure:
    import ImageReward

    model, config = (str(path) for path in _image_reward_weights())
    with redirect_stdout(sys.stderr):
        judge: Any = ImageReward.load(model, device="cpu", med_config=config)

    def score(prompt: str, frames: Tensor) -> float:
        return fmean(judge.score(prompt, picture) for picture in _pictures(frames))

    return lambda prompt, reference, candidate: score(prompt, candidate) - score(prompt, reference)


def _pictures(frames_F3HW: Tensor) -> Iterator[Image.Image]:
    for frame in frames_F3HW:
        yield Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy())


def _alexnet() -> tuple[Path, ...]:
    return (Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET,)


def _image_reward_weights() -> tuple[Path, ...]:
    folder = Path("~/.cache/ImageReward").expanduser()
    return folder / "ImageReward.pt", folder / "med_config.json"


JUDGES = (
    Judge(
        figure="lpips",
        package="torchvision",
        weights=_alexnet,
        hint=f"pip install 'diffquant[lpips]', and put {ALEXNET_URL} there",
        load=_lpips,
    ),
    Judge(
        figure="image_reward",
        package="ImageReward",
        weights=_image_reward_weights,
        hint="pip install image-reward, then hf download THUDM/ImageReward "
        "--local-dir ~/.cache/ImageReward (1.5 does not load beside transformers 5)",
        load=_image_reward,
    ),
)
