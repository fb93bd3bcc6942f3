"""Time and memory: measured in turns, over the same rounds, by nobody's leave."""

import pytest
import torch

import diffquant
from diffquant.compare.comparison import Comparison
from diffquant.compare.cost import Cost, Meter, joined, slowdown, weight_bytes
from diffquant.compare.means import mean
from diffquant.compare.rounds import further
from diffquant.compare.sides import Side
from diffquant.loading import RunFlags
from diffquant.resolve import ModelFlags
from diffquant.run import Request

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers and transformers warn of themselves

SIDES = [
    Side(name="bf16", model=ModelFlags(model_path="emoji_flux"), run=RunFlags(device="cpu")),
    Side(name="fp8", model=ModelFlags(), run=RunFlags(device="cpu")),
]
DRAWING = Request(prompt="car", seed=1, num_inference_steps=2, num_images_per_prompt=1)


def cost(*seconds: float, peak: tuple[int, ...] = ()) -> Cost:
    return Cost(load_seconds=seconds, step_seconds=seconds, peak_bytes=peak, weight_bytes=10)


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return diffquant.compare(prompts=["car"], num_inference_steps=2, device="cpu", repeat=3)


def test_the_sides_take_turns_and_every_second_round_goes_backwards() -> None:
    order: list[str] = []

    def note(what: str, done: int, of: int) -> None:
        if what.startswith("drawing with") and done == 0:
            order.append(what.split()[2])

    costs = further(SIDES, DRAWING, 3, note)
    assert order == ["fp8", "bf16", "bf16", "fp8", "fp8", "bf16"]
    assert [len(each) for each in costs] == [3, 3]
    assert all(each.step_seconds[0] > 0 and each.load_seconds[0] > 0 for each in costs[0])


def test_a_comparison_has_one_value_per_round_and_an_interval(comparison: Comparison) -> None:
    told = comparison.to_json()
    ours, theirs = told["candidates"][0], told["reference"]
    for side in (ours["cost"], theirs["cost"]):
        assert len(side["step_seconds"]["rounds"]) == len(side["load_seconds"]["rounds"]) == 3
        assert side["step_seconds"]["low"] <= side["step_seconds"]["value"]
    assert ours["slowdown"]["low"] <= ours["slowdown"]["value"] <= ours["slowdown"]["high"]
    assert "Measured in 3 rounds" in comparison.to_html()


def test_a_ratio_is_taken_within_a_round() -> None:
    """Twice as slow in a slow and in a fast round is twice as slow, and sure of it."""
    found = slowdown(cost(2.0, 8.0), cost(1.0, 4.0))
    assert (found.low, found.value, found.high) == (2.0, 2.0, 2.0)
    unsure = slowdown(cost(2.0, 8.0), cost(4.0, 1.0))
    assert unsure.low is not None and unsure.high is not None
    assert unsure.low < 1 < unsure.high


def test_rounds_are_joined_and_a_middling_one_tells_the_peak() -> None:
    found = joined([cost(1.0, peak=(900,)), cost(2.0, peak=(100,)), cost(3.0, peak=(200,))])
    assert found.step_seconds == (1.0, 2.0, 3.0)
    assert found.peak == 200
    assert joined([cost(1.0)]).peak is None


def test_one_round_has_no_interval() -> None:
    assert cost(1.0).step.low is None
    assert slowdown(cost(2.0), cost(1.0)).low is None


def test_the_meter_sees_what_was_allocated_after_it_was_made() -> None:
    before = torch.ones(4_000_000)
    meter = Meter("cpu")
    held = torch.ones(8_000_000)
    assert before.numel() and held.numel()
    for peak in meter.peak():
        assert 30e6 < peak < 60e6


def test_shared_storage_weighs_once() -> None:
    one = torch.nn.Linear(4, 4, bias=False)
    other = torch.nn.Linear(4, 4, bias=False)
    other.weight = one.weight
    assert weight_bytes([one, other]) == 64


def test_a_mean_has_an_interval_that_holds_it_and_one_value_has_none() -> None:
    many = mean([1.0, 2.0, 3.0, 4.0])
    assert many.low is not None
    assert many.high is not None
    assert 1.0 <= many.low < many.value == 2.5 < many.high <= 4.0
    assert mean([1.0]).low is None
    assert mean([1.0, float("inf")]).low is None
