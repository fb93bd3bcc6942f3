"""Our per-step metrics against those of the peer's own functions, on the same two trajectories.

    python tests/oracle/peer_trajectory.py COMPARE_DIFFUSION_TRAJECTORY_SIMILARITY.PY

The argument is SGLang's tool of that name (sglang/multimodal_gen/tools in its wheel). Draws the bundled
model in BF16 and FP8 and prints the largest relative difference of every metric over all steps.
"""

import importlib.util
import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

from diffquant.compare.metrics import likeness, per_step
from diffquant.compare.sides import Side, captured, loaded
from diffquant.compare.trajectory import Trajectory
from diffquant.loading import RunFlags
from diffquant.resolve import ModelFlags
from diffquant.run import Request

OURS = {"cosine_similarity": "cosine"}
SIDE = Side(name="side", model=ModelFlags(), run=RunFlags(device="cpu"))
DRAWINGS = [
    Request(prompt=prompt, seed=seed, num_images_per_prompt=1)
    for prompt in ("red apple", "fox face")
    for seed in (0, 1)
]


def peer(path: str) -> ModuleType:
    """The tool as a module; it reads pictures with imageio, which its metrics do not need."""
    absent = [name for name in ("imageio", "imageio.v3") if name not in sys.modules]
    sys.modules.update({name: ModuleType(name) for name in absent})
    spec = importlib.util.spec_from_file_location("peer", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in absent:  # diffusers looks for it too, and must not find this one
        del sys.modules[name]
    return module


def drawn(model: ModelFlags) -> tuple[Trajectory, ...]:
    here = loaded(replace(SIDE, model=model), lambda what, done, of: None)
    return captured(here, DRAWINGS, lambda what, done, of: None).trajectories


def gap(ours: float, theirs: float) -> float:
    return abs(ours - theirs) / abs(theirs) if theirs else abs(ours)


def main(path: str) -> None:
    tool: Any = peer(path)
    worst: dict[str, float] = {}
    for left, right in zip(
        drawn(ModelFlags(model_path="emoji_flux")), drawn(ModelFlags()), strict=True
    ):
        # Theirs is [B, S, ...], ours [S, B, ...].
        said = tool.summarize_trajectory_metrics(
            left.latents.transpose(0, 1), right.latents.transpose(0, 1)
        )
        steps = per_step(tuple(left.latents), tuple(right.latents))
        assert len(steps) == said["num_steps"]
        for ours, theirs in zip(steps, said["per_step_metrics"], strict=True):
            for name in ("cosine_similarity", "mae", "mse", "rmse", "max_abs", "l2"):
                value = gap(getattr(ours, OURS.get(name, name)), theirs[name])
                worst[name] = max(worst.get(name, 0.0), value)
        frames = tool.summarize_output_frame_metrics(
            [frame.numpy() for frame in left.frames], [frame.numpy() for frame in right.frames]
        )
        pair, theirs = likeness(left.frames, right.frames), frames["all_frames_metrics"]
        for name, value in (("psnr_db", pair.psnr_db), ("frame mae", pair.mae)):
            worst[name] = max(worst.get(name, 0.0), gap(value, theirs[name.split()[-1]]))
    for name, value in worst.items():
        print(f"| {name} | {value:.1e} |")


if __name__ == "__main__":
    main(sys.argv[1])
