"""One linear layer, K = 3072 and N = 12288, in every encoding against bf16 `F.linear`."""

from functools import partial

import torch

from benchmarks import FOLDER, Section, Settings
from benchmarks._layers import KINDS, TOKENS, K, N, dense, encoded, error
from benchmarks._measuring import Times, in_turns
from benchmarks._plots import Group, bars
from benchmarks._profile import shares
from benchmarks._results import table
from diffquant.linear import QuantLinear

PLAIN = "bf16 `F.linear`"
PLOT = "linear.png"
#: Rounds are shortened where one takes seconds.
ROUNDS = {256: 9, 1024: 7, 4096: 4}


def run(settings: Settings) -> str:
    with torch.inference_mode():
        plain = dense()
        layers = {name: encoded(plain.weight, kind) for name, kind in KINDS.items()}
        tasks = {PLAIN: plain, **layers}
        timed = {}
        for tokens in TOKENS:
            x_MK = torch.randn(tokens, K).bfloat16()
            calls = {name: partial(layer, x_MK) for name, layer in tasks.items()}
            timed[tokens] = in_turns(calls, min(settings.rounds, ROUNDS[tokens]))
        errors = {name: error(layer, KINDS[name]) for name, layer in layers.items()}
        why = _profiles(timed, layers)
    _plot(timed)
    return f"{_about(timed)}\n\n{_table(timed, errors)}{why}\n\n![ratios]({PLOT})"


def _about(timed: dict[int, Times]) -> str:
    plain = ", ".join(f"{1e3 * times.median(PLAIN):.1f} ms" for times in timed.values())
    return (
        f"A `QuantLinear` [{N}, {K}] without bias as a pipeline has it, M tokens. Each cell: least / "
        f"median ratio to {PLAIN} ({plain} in the median), and the goal. *error* is relative to "
        "`reference` in float32."
    )


def _table(timed: dict[int, Times], errors: dict[str, float]) -> str:
    header = ("stored as", *(f"M = {tokens}" for tokens in TOKENS), "error")
    rows = [
        (name, *(_cell(name, tokens, timed[tokens]) for tokens in TOKENS), f"{errors[name]:.1e}")
        for name in KINDS
    ]
    return table(header, rows)


def _cell(name: str, tokens: int, times: Times) -> str:
    ratio, goal = times.ratio(name, PLAIN), KINDS[name].goal(tokens)
    return f"{ratio.least:.2f} / {ratio.median:.2f}" + (f" ({goal.verdict(ratio)})" if goal else "")


def _profiles(timed: dict[int, Times], layers: dict[str, QuantLinear]) -> str:
    """Where the time goes of what missed its goal."""
    lines = []
    for tokens, times in timed.items():
        for name, layer in layers.items():
            goal = KINDS[name].goal(tokens)
            if goal and not goal.is_met(times.ratio(name, PLAIN)):
                spent = shares(partial(layer, torch.randn(tokens, K).bfloat16()))
                lines.append(f"- {name}, M = {tokens}, missed its goal; its time: {spent}")
    return "\n\n" + "\n".join(lines) if lines else ""


def _plot(timed: dict[int, Times]) -> None:
    groups = [
        Group(
            name,
            tuple(timed[tokens].ratio(name, PLAIN).median for tokens in TOKENS),
            kind.goals or None,
        )
        for name, kind in KINDS.items()
    ]
    labels = tuple(f"M = {tokens}" for tokens in TOKENS)
    bars(FOLDER / PLOT, "time as a multiple of bf16 F.linear (mark: goal)", labels, groups)


SECTION = Section(order=10, title="Linear layers", run=run)
