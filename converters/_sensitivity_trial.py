"""The model with any of its layers kept dense: what a budget chooses by, one measurement at a time."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from diffquant import loading, preset
from diffquant.compare import budget as budgets
from diffquant.compare.alone import Exchange, Questions, Unit
from diffquant.compare.sides import Side, loaded
from diffquant.converters._progress import Tell
from diffquant.converters._sensitivity_figures import Place, Wish
from diffquant.loading import DTYPES, RunFlags
from diffquant.resolve import ModelFlags
from diffquant.run import Request, fill


class Trial:
    """What `budget` looks at; nothing is measured twice."""

    def __init__(
        self,
        exchange: Exchange,
        questions: Questions,
        pipeline: Any,
        keep_sensitive: bool,
        tell: Tell,
    ) -> None:
        self.exchange, self.questions, self.pipeline = exchange, questions, pipeline
        self.family = self.scheme = ""
        self._tell = tell
        self._errors: dict[frozenset[Unit], float] = {}
        self.alone = dict(self._each_alone())
        ranked = sorted(self.alone, key=lambda unit: -budgets.worth(self.alone[unit], unit))
        self.always = tuple(unit for unit in ranked if unit.sensitive and keep_sensitive)
        self.order = tuple(unit for unit in ranked if unit not in self.always)
        self.wide_bytes = exchange.bytes(())

    @staticmethod
    def of(wish: Wish, tell: Tell) -> "Trial":
        run = RunFlags(device=wish.device, dtype=wish.dtype, numerics=wish.numerics)
        quantized = loading.dry_run(
            ModelFlags(
                model_path=wish.source,
                component_quantizations={wish.component: wish.encoding},
                quantize_all=True,
            ),
            run,
        )
        here = loaded(Side(name="dense", model=ModelFlags(model_path=wish.source), run=run), tell)
        here.pipeline.set_progress_bar_config(disable=True)
        known = preset.for_model(*here.dry.resolution.model_names)
        requests = [
            fill(_request(wish, prompt), here.pipeline, known.defaults if known else {})
            for prompt in wish.prompts
        ]
        questions = Questions.of(
            here.pipeline,
            wish.component,
            requests,
            wish.steps,
            lambda done, of: tell("drawing", done, of),
        )
        twin = loading.build(
            quantized,
            wish.component,
            torch.device(quantized.device.torch_name),
            getattr(torch, DTYPES[wish.dtype]),
            on_progress=lambda _, done, of: tell(f"quantizing to {wish.encoding}", done, of),
        )
        plan = loading.settled_plan(quantized, wish.component)
        dense = getattr(here.pipeline, wish.component)
        exchange = Exchange(dense, twin, plan)
        trial = Trial(exchange, questions, here.pipeline, wish.keep_sensitive, tell)
        online = quantized.resolution.components[wish.component].online
        assert online is not None, "resolution refuses an encoding it does not know"
        trial.family, trial.scheme = plan.family, online.scheme
        return trial

    def bytes(self, kept: Sequence[Unit]) -> int:
        return self.exchange.bytes(self._others(kept))

    def error(self, kept: Sequence[Unit]) -> float:
        key = frozenset(kept)
        if key not in self._errors:
            self._errors[key] = self.exchange.error(self._others(kept), self.questions)
        return self._errors[key]

    def figures(self, kept: Sequence[Unit]) -> Mapping[str, float | None]:
        self._tell("drawing with the chosen layers kept", 0, 1)
        return self.exchange.figures(self._others(kept), self.questions, self.pipeline)

    def curve(self, most: int) -> Iterator[Place]:
        """At most that many beginnings of the order, the empty and the whole one among them."""
        last = len(self.order)
        few = min(most, last + 1)
        for done, count in enumerate(sorted({last * i // max(1, few - 1) for i in range(few)})):
            kept = (*self.always, *self.order[:count])
            yield Place(
                kept=sum(len(unit.paths) for unit in kept),
                bytes=self.bytes(kept),
                error=self.error(kept),
                unit=self.order[count - 1] if count else None,
            )
            self._tell("measuring sets of layers", done + 1, few)

    def _each_alone(self) -> Iterator[tuple[Unit, float]]:
        units = self.exchange.units
        for done, unit in enumerate(units, start=1):
            yield unit, self.exchange.error([unit], self.questions)
            self._tell("quantizing one layer at a time", done, len(units))

    def _others(self, kept: Iterable[Unit]) -> list[Unit]:
        stays = frozenset(kept)
        return [unit for unit in self.exchange.units if unit not in stays]


def _request(wish: Wish, prompt: str) -> Request:
    return Request(**{**wish.settings.typed, "prompt": prompt, "seed": wish.seed})
