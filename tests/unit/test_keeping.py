"""Weights that stay decoded: the same bits, the budget, what is remembered. The clock is a list."""

import json
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffquant import device, keeping, loading
from diffquant.cli import run
from diffquant.errors import UsageError
from diffquant.kernels import KERNELS
from diffquant.kernels._keeping import Kept
from diffquant.linear import QuantLinear
from diffquant.loading import RunFlags
from diffquant.residence import bytes_of
from diffquant.resolve import ModelFlags
from tests.contracts.test_every_kernel import cases

CPU = device.parse("cpu")
KEEPERS = [name for name in KERNELS.names() if KERNELS.load(name).keeps]
FLAG = "--memory-budget"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kernel", KEEPERS)
def test_kept_rows_give_the_same_bits(kernel: str, dtype: torch.dtype) -> None:
    for case in cases(kernel, dtype):
        kept = Kept(KERNELS.load(kernel).build(case.spec))
        fresh = KERNELS.load(kernel).build(case.spec)(case.x_MK, case.parts)
        for _ in range(2):
            again = kept(case.x_MK, case.parts)
            assert torch.equal(again.nan_to_num(), fresh.nan_to_num()), case.spec
        assert kept.decoded


@pytest.mark.parametrize("kernel", KEEPERS)
def test_what_is_kept_is_what_multiplies(kernel: str) -> None:
    case = next(cases(kernel, torch.float32))
    kept = Kept(KERNELS.load(kernel).build(case.spec))
    first = kept(case.x_MK, case.parts)
    for rows in kept.decoded.values():
        rows.mul_(2)
    assert torch.equal(kept(case.x_MK, case.parts), first * 2)


# a transformer --------------------------------------------------------------------------------


def ticking(decoding: float, kept: float) -> Callable[[], float]:
    """A clock by which products take those seconds in turn: decoding at the call, kept, …"""

    def seconds() -> Iterator[float]:
        now = 0.0
        for call in count():
            yield now
            now += decoding if call % 2 == 0 else kept
            yield now

    return iter(seconds()).__next__


@pytest.fixture(scope="module")
def dry() -> loading.DryRun:
    return loading.dry_run(ModelFlags(quantization="fp8"), RunFlags(device="cpu"))


@pytest.fixture
def model(dry: loading.DryRun) -> nn.Module:
    return loading.build(dry, "transformer", torch.device("cpu"), torch.bfloat16)


def kept_linears(model: nn.Module) -> list[QuantLinear]:
    linears = [each for each in model.modules() if isinstance(each, QuantLinear)]
    return [each for each in linears if isinstance(each.terms[0].multiply, Kept)]


def keep(model: nn.Module, dry: loading.DryRun, **given: Any) -> keeping.Outcome:
    return keeping.keep(model, dry.choices["transformer"], device=CPU, **given)


def test_everything_stays_that_gains_and_fits(
    model: nn.Module, dry: loading.DryRun, tmp_path: Path
) -> None:
    outcome = keep(model, dry, budget=1 << 30, cache=tmp_path / "t", clock=ticking(2.0, 1.0))
    assert outcome.kept == outcome.layers == len(kept_linears(model)) > 0
    weights = [each.in_features * each.out_features for each in kept_linears(model)]
    assert outcome.bytes == 2 * sum(weights)
    assert f"{outcome.kept} of {outcome.kept} encoded linears kept decoded" in str(outcome)


def test_nothing_stays_that_does_not_gain(
    model: nn.Module, dry: loading.DryRun, tmp_path: Path
) -> None:
    outcome = keep(model, dry, budget=1 << 30, cache=tmp_path / "t", clock=ticking(1.0, 1.0))
    assert outcome.kept == outcome.bytes == 0
    assert not kept_linears(model)


def test_the_budget_is_not_overspent(model: nn.Module, dry: loading.DryRun, tmp_path: Path) -> None:
    whole = keep(model, dry, budget=1 << 30, cache=tmp_path / "t", clock=ticking(2.0, 1.0))
    half = whole.bytes // 2
    fresh = loading.build(dry, "transformer", torch.device("cpu"), torch.bfloat16)
    outcome = keep(fresh, dry, budget=half, cache=tmp_path / "t", clock=ticking(2.0, 1.0))
    assert half // 2 < outcome.bytes <= half
    assert 0 < outcome.kept < whole.kept


def test_times_are_remembered_and_not_taken_twice(
    model: nn.Module, dry: loading.DryRun, tmp_path: Path
) -> None:
    cache = tmp_path / "deep" / "times.json"
    keep(model, dry, budget=0, cache=cache, clock=ticking(2.0, 1.0))
    (machine,) = json.loads(cache.read_text())
    assert CPU.name in machine and torch.__version__ in machine

    def never() -> float:
        raise AssertionError("measured again")

    fresh = loading.build(dry, "transformer", torch.device("cpu"), torch.bfloat16)
    assert keep(fresh, dry, budget=1 << 30, cache=cache, clock=never).kept


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_spoilt_memory_is_begun_anew(
    text: str, model: nn.Module, dry: loading.DryRun, tmp_path: Path
) -> None:
    cache = tmp_path / "times.json"
    cache.write_text(text)
    assert keep(model, dry, budget=1 << 30, cache=cache, clock=ticking(2.0, 1.0)).kept
    assert len(json.loads(cache.read_text())) == 1
    assert [each.name for each in tmp_path.iterdir()] == ["times.json"]


def test_pictures_are_equal_bit_by_bit_and_the_truth_line_says_which(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(keeping, "remembered_at", lambda: tmp_path / "times.json")
    monkeypatch.setattr(keeping, "_measured", lambda *_: keeping.Times(2.0, 1.0))
    pictures = []
    for budget in (None, "1GiB"):
        flags = RunFlags(device="cpu", memory_budget=budget)
        pipeline = loading.load(ModelFlags(quantization="fp8"), flags)
        generator = torch.Generator().manual_seed(0)
        drawn = pipeline("red apple", num_inference_steps=2, generator=generator, output_type="pt")
        pictures.append(drawn.images)
        told = loading.report(pipeline).truth_lines
        assert any("kept decoded" in line for line in told) == (budget is not None)
        assert bool(kept_linears(pipeline.transformer)) == (budget is not None)
    assert torch.equal(*pictures)


# what is typed --------------------------------------------------------------------------------


def test_sizes_are_read() -> None:
    assert bytes_of(FLAG, "8GiB") == 8 << 30
    assert bytes_of(FLAG, "1.5MB") == 1_500_000


@pytest.mark.parametrize("text", ["8", "8X", "lots", "-1GiB", "GiB", ""])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no size") as caught:
        RunFlags(memory_budget=text)
    assert caught.value.hint == "--memory-budget 8GiB"


def test_what_leaves_nothing_to_keep_is_refused() -> None:
    with pytest.raises(UsageError, match="--compile does not let it"):
        RunFlags(memory_budget="1GiB", compile=True)
    with pytest.raises(UsageError, match="--offload disk does not let it"):
        RunFlags(memory_budget="1GiB", offload="disk")
    with pytest.raises(UsageError, match="for kernels of the CPU, this is cuda"):
        loading.dry_run(
            ModelFlags(quantization="fp8"), RunFlags(memory_budget="1GiB", device="sm89")
        )


def test_a_wrong_size_is_wrong_usage() -> None:
    assert run(["plan", "--quantization", "fp8", FLAG, "much"]) == 2
