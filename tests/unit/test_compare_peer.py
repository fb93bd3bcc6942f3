"""The peer's per-step metrics, computed its way on the trajectories we drew, are ours.

SGLang's `compare_diffusion_trajectory_similarity`: float32 over all elements of a step, cosine 1 where
both norms are zero and 0 where one is. `tests/oracle/peer_trajectory.py` runs its own functions.
"""

from dataclasses import replace
from math import inf, isclose, log10
from typing import Any

import numpy as np
import pytest

import diffquant
from diffquant.compare.metrics import likeness, per_step
from diffquant.compare.sides import Side, captured, loaded
from diffquant.compare.trajectory import Trajectory
from diffquant.loading import RunFlags
from diffquant.resolve import ModelFlags
from diffquant.run import Request

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves

SIDE = Side(name="side", model=ModelFlags(), run=RunFlags(device="cpu"))
DRAWING = Request(prompt="red apple", seed=3, num_inference_steps=4, num_images_per_prompt=1)
OURS = {"cosine_similarity": "cosine"}


def theirs(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> dict[str, float]:
    """All of the peer's metrics of two arrays, by its names, in double precision."""
    one, other = (side.astype(np.float32).astype(np.float64).ravel() for side in (left, right))
    norms, gap = np.linalg.norm(one) * np.linalg.norm(other), one - other
    both_zero = not one.any() and not other.any()
    mse = float((gap**2).mean())
    return {
        "cosine_similarity": float(one @ other / norms) if norms else float(both_zero),
        "mae": float(abs(gap).mean()),
        "mse": mse,
        "rmse": mse**0.5,
        "max_abs": float(abs(gap).max()),
        "l2": float(np.linalg.norm(gap)),
    }


@pytest.fixture(scope="module")
def drawn() -> tuple[Trajectory, Trajectory]:
    """BF16 and FP8."""

    def draw(model: ModelFlags) -> Trajectory:
        here = loaded(replace(SIDE, model=model), lambda what, done, of: None)
        return captured(here, [DRAWING], lambda what, done, of: None).trajectories[0]

    return draw(ModelFlags(model_path="emoji_flux")), draw(ModelFlags())


def test_every_step_has_the_peers_figures(drawn: tuple[Trajectory, Trajectory]) -> None:
    left, right = (side.latents.float().numpy() for side in drawn)
    for step, ours in enumerate(per_step(tuple(drawn[0].latents), tuple(drawn[1].latents))):
        for name, value in theirs(left[step], right[step]).items():
            assert isclose(getattr(ours, OURS.get(name, name)), value, rel_tol=1e-5), (step, name)


def test_another_step_has_other_figures(drawn: tuple[Trajectory, Trajectory]) -> None:
    left, right = (side.latents.float().numpy() for side in drawn)
    first = per_step(tuple(drawn[0].latents), tuple(drawn[1].latents))[0]
    assert not isclose(first.mae, theirs(left[1], right[1])["mae"], rel_tol=1e-2)


def test_a_comparison_reports_the_same_figures(drawn: tuple[Trajectory, Trajectory]) -> None:
    found = diffquant.compare(prompts=["red apple"], seeds=[3], num_inference_steps=4, device="cpu")
    told = found.to_json()["candidates"][0]["pairs"][0]["per_step"]
    left, right = (side.latents.float().numpy() for side in drawn)
    assert [step["timestep"] for step in told] == list(drawn[0].timesteps)
    for step, ours in enumerate(told):
        assert isclose(ours["l2"], theirs(left[step], right[step])["l2"], rel_tol=1e-5)


def test_frames_have_the_peers_psnr(drawn: tuple[Trajectory, Trajectory]) -> None:
    left, right = (side.frames for side in drawn)
    mse = theirs(left.numpy(), right.numpy())["mse"]
    psnr = 20 * log10(255) - 10 * log10(mse)
    assert isclose(likeness(left, right).psnr_db, psnr, rel_tol=1e-5)
    assert likeness(left, left).psnr_db == inf
