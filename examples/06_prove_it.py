"""BF16 against several recipes from Python: verdicts, the worst layer, a page to open. No network needed."""

import sys
from pathlib import Path

import diffquant

report = Path(sys.argv[1] if len(sys.argv) > 1 else "compare.html")
comparison = diffquant.compare(
    "emoji_flux",
    prompts=["red apple", "fox face"],
    seeds=[0, 1],
    num_inference_steps=6,
    candidates=[{"quantization": "fp8"}, {"quantization": "nvfp4", "numerics": "faithful"}],
    level="strict",
    thresholds={"ssim": 0.97},
)
for candidate in comparison.candidates:
    psnr = candidate.mean(lambda pair: pair.likeness.psnr_db)
    (worst,) = candidate.worst(lambda layer: layer.output, 1)
    print(f"{candidate.name}: {candidate.verdict.first_failure or 'keeps everything'}")
    print(f"  PSNR {psnr.value:.1f} dB, between {psnr.low:.1f} and {psnr.high:.1f} (95 %)")
    print(f"  largest error at {worst.path}: {worst.output:.3f}")
print(comparison.to_markdown())
report.write_text(comparison.to_html(), encoding="utf-8")
sys.exit(not comparison.ok)
