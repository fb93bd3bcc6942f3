"""A video from a quantized Wan: its frames, its file, and how the file was made.

With a source (and an override) on the command line that model is used; without, a tiny one with
random weights is made, so that this runs anywhere.
"""

import sys
from pathlib import Path

import diffquant
from diffquant import run

ROOT = Path(__file__).resolve().parents[1]
base, *override = sys.argv[1:] or ["tiny-wan", str(ROOT / "tests" / "data" / "modelopt/wan/fp8")]
request = run.Request(prompt="red car", num_frames=17, num_inference_steps=20)

if base == "tiny-wan":
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny import tiny_wan_pipeline

    tiny_wan_pipeline(Path(base))
    request = run.Request(
        prompt="red car", width=64, height=64, num_frames=9, num_inference_steps=3, fps=8,
        max_sequence_length=16,
    )  # fmt: skip

pipeline = diffquant.load(base, transformer_path=override[0] if override else None)
print(*diffquant.report(pipeline).truth_lines, sep="\n")

result = run.generate(pipeline, run.fill(request, pipeline, {}))
result = run.recorded(result, flags={}, report=diffquant.report(pipeline).to_json())
for ending in ("mp4", "webp", "gif"):
    (path,) = run.save(result, Path("outputs"), f"car.{ending}")
    print(path, run.read_metadata(path)["request"]["num_frames"], "frames")
