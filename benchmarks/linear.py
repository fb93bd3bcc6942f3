"""One linear layer, K = 3072 and N = 12288, in every encoding against bf16 `F.linear`."""

from collections.abc import Mapping
from functools import partial
from statistics import median

import torch
from torch import nn

from benchmarks import FOLDER, Section, Settings
from benchmarks._layers import KINDS, TOKENS, K, N, dense, encoded, error
from benchmarks._measuring import Times, in_turns
from benchmarks._plots import Group, bars
from benchmarks._profile import shares
from benchmarks._results import table
from diffquant.linear import QuantLinear

PLAIN = "bf16 `F.linear`"
PLOT = "linear.png"
#: Fewer rounds where one takes seconds.
ROUNDS = {256: 9, 1024: 9, 4096: 7}

#: The times of every way to store the layer, each beside its own of bf16.
Timed = Mapping[str, Times]


def run(settings: Settings) -> str:
    with torch.inference_mode():
        plain = dense()
        layers = {name: encoded(plain.weight, kind) for name, kind in KINDS.items()}
        timed = {tokens: _timed(plain, layers, tokens, settings) for tokens in TOKENS}
        errors = {name: error(layer, KINDS[name]) for name, layer in layers.items()}
        why = _profiles(timed, layers)
    _plot(timed)
    return f"{_about(timed)}\n\n{_table(timed, errors)}{why}\n\n![ratios]({PLOT})"


def _timed(
    plain: nn.Linear, layers: Mapping[str, QuantLinear], tokens: int, settings: Settings
) -> Timed:
    """Each layer in turns with bf16 alone. What runs before a layer decides what of the heap it finds
    in memory: among others, one of them pays 6,000 page faults at every call and another none."""
    x_MK = torch.randn(tokens, K).bfloat16()
    rounds = min(settings.rounds, ROUNDS[tokens])
    return {
        name: in_turns({PLAIN: partial(plain, x_MK), name: partial(layer, x_MK)}, rounds)
        for name, layer in layers.items()
    }


def _about(timed: Mapping[int, Timed]) -> str:
    medians = (median(times.median(PLAIN) for times in each.values()) for each in timed.values())
    plain = ", ".join(f"{1e3 * seconds:.1f} ms" for seconds in medians)
    return (
        f"A `QuantLinear` [{N}, {K}] without bias as a pipeline has it, M tokens, in turns with "
        f"{PLAIN} ({plain} in the median). Each cell: least / median ratio, and the goal. *error* is "
        "relative to `reference` in float32."
    )


def _table(timed: Mapping[int, Timed], errors: dict[str, float]) -> str:
    header = ("stored as", *(f"M = {tokens}" for tokens in TOKENS), "error")
    rows = [
        (
            name,
            *(_cell(name, tokens, timed[tokens][name]) for tokens in TOKENS),
            f"{errors[name]:.1e}",
        )
        for name in KINDS
    ]
    return table(header, rows)


def _cell(name: str, tokens: int, times: Times) -> str:
    ratio, goal = times.ratio(name, PLAIN), KINDS[name].goal(tokens)
    return f"{ratio.least:.2f} / {ratio.median:.2f}" + (f" ({goal.verdict(ratio)})" if goal else "")


def _profiles(timed: Mapping[int, Timed], layers: Mapping[str, QuantLinear]) -> str:
    """Where the time goes of what missed its goal."""
    lines = []
    for tokens, each in timed.items():
        for name, layer in layers.items():
            goal = KINDS[name].goal(tokens)
            if goal and not goal.is_met(each[name].ratio(name, PLAIN)):
                spent = shares(partial(layer, torch.randn(tokens, K).bfloat16()))
                lines.append(f"- {name}, M = {tokens}, missed its goal; its time: {spent}")
    return "\n\n" + "\n".join(lines) if lines else ""


def _plot(timed: Mapping[int, Timed]) -> None:
    groups = [
        Group(
            name,
            tuple(timed[tokens][name].ratio(name, PLAIN).median for tokens in TOKENS),
            kind.goals or None,
        )
        for name, kind in KINDS.items()
    ]
    labels = tuple(f"M = {tokens}" for tokens in TOKENS)
    bars(FOLDER / PLOT, "time as a multiple of bf16 F.linear (mark: goal)", labels, groups)


SECTION = Section(order=10, title="Linear layers", run=run)
