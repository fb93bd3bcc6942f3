"""A profile of a real run: the trace opens, the table names the layers."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from diffquant.cli import run
from diffquant.profiling import profiled

pytestmark = pytest.mark.filterwarnings("ignore")  # the profiler and diffusers warn of themselves


def test_the_table_counts_every_layer_the_slowest_first_and_hooks_are_gone(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2000))
    with profiled({"transformer": model}, tmp_path):
        for _ in range(3):
            model(torch.zeros(500, 8))
    head, *rows = (tmp_path / "layers.txt").read_text().splitlines()
    assert head.split() == ["milliseconds", "share", "calls", "layer"]
    assert {row.split()[3] for row in rows} == {"transformer.0", "transformer.2"}
    assert {row.split()[2] for row in rows} == {"3"}
    times = [float(row.split()[0]) for row in rows]
    assert times[0] >= times[1] > 0
    assert not model[0]._forward_hooks


def test_generate_and_compare_leave_profiles(tmp_path: Path) -> None:
    words = ["--prompt", "car", "--device", "cpu", "--num-inference-steps", "1"]
    words += ["--profile", str(tmp_path / "profile")]
    assert run(["generate", *words, "--output-path", str(tmp_path)]) == 0
    assert run(["compare", *words]) == 0
    for folder in ("", "bf16", "emoji_flux_modelopt_fp8"):
        table = (tmp_path / "profile" / folder / "layers.txt").read_text()
        assert "transformer.transformer_blocks.0.attn.to_q" in table
        trace = json.loads((tmp_path / "profile" / folder / "trace.json").read_text())
        assert trace["traceEvents"]
