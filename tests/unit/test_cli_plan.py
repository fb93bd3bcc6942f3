"""`diffquant plan` tells the memory a run takes, and where weights would have to wait."""

import json

import pytest

from diffquant.cli import run


def test_plan_says_which_offload_fits(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--device", "sm89", "--offload", "layerwise"]
    assert run([*words, "--memory", "6 MB"]) == 0
    told = capsys.readouterr().out
    assert "peaks at 64x64 with --offload layerwise, estimated:" in told
    fits = {line.split()[1]: line for line in told.splitlines() if line.startswith("  --offload ")}
    assert list(fits) == ["none", "model", "layerwise", "disk"]
    assert fits["none"].endswith("does not fit into 6.00 MB")
    assert fits["layerwise"].endswith("  fits into 6.00 MB")
    command = told.splitlines()[-1]
    assert command == "diffquant generate --prompt 'red apple' --offload layerwise"


def test_the_command_keeps_a_device_that_is_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--device", "cpu"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == "diffquant generate --prompt 'red apple' --device cpu"


def test_plan_asks_for_the_memory_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", "--device", "sm89"]) == 0
    assert "--memory 24GiB would say whether it fits" in capsys.readouterr().out
    assert run(["plan", "--memory", "lots"]) == 2
    assert "--memory 'lots' is no size" in capsys.readouterr().err


def test_plan_on_a_cpu_says_what_moving_to_it_would_change(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["plan", "--device", "cpu", "--dit-cpu-offload", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [way["mode"] for way in found["offload"]] == ["none", "disk"]
    (rule,) = [each for each in found["rules"] if each["rule"] == "offload"]
    assert "--offload model moves nothing here" in rule["sentence"]


def test_plan_counts_what_a_budget_keeps_decoded(capsys: pytest.CaptureFixture[str]) -> None:
    def drawing(*more: str) -> int:
        assert run(["plan", "--quantization", "fp8", "--device", "cpu", "--json", *more]) == 0
        stages = json.loads(capsys.readouterr().out)["peaks"]
        return next(stage["host"] for stage in stages if stage["stage"] == "denoise")

    assert drawing("--memory-budget", "1MB") == drawing() + 10**6
    assert run(["plan", "--quantization", "fp8", "--memory-budget", "1MB", "--device", "cpu"]) == 0
    assert "with --offload none and --memory-budget 1MB, estimated:" in capsys.readouterr().out
