"""Answers to a plan's open questions, from data: Plan -> Plan."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from diffquant.errors import PlanError
from diffquant.plan import Layout, Plan, Question
from diffquant.tensors import Weights

#: The winner's figure must be this much clearer than the next one's.
CLEAR = 1.25


def settle(plan: Plan, base: Mapping[str, object] | None = None) -> Plan:
    """The plan with every open question answered. Raises PlanError where the data does not tell."""
    settled = plan
    for question in plan.open:
        raise PlanError(
            f"the {question.topic} of {len(question.paths)} layers cannot be told: {question.why}",
            hint="say it with --scale-layout linear|tiles",
        )
    return settled
