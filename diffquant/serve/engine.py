"""The pipeline behind the line: loaded, checked, drawing, let go. Only the worker's thread calls it."""

import gc
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from diffquant import loading, run
from diffquant.loading import Report
from diffquant.run._request import CALLED
from diffquant.serve import preview, readiness, wardrobe
from diffquant.serve.jobs import Job, Left, Preview, Stopped
from diffquant.serve.readiness import Check
from diffquant.serve.uploads import told

LOG = logging.getLogger("diffquant.serve")


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of the pipeline once it was loaded, also while it is let go.

    pipeline_class  its class; its call's signature says which fields mean anything
    fields          of a `run.Request` that its call takes
    no_guidance     the transformer has no input for `guidance_scale`, which would be ignored
    compares        a reference can be drawn beside
    decoded_bytes   of one pixel in the widest layer of the autoencoder
    """

    pipeline_class: type
    fields: frozenset[str]
    defaults: Mapping[str, Any]
    no_guidance: bool
    previews: bool
    compares: bool
    decoded_bytes: int
    report: Report
    checks: tuple[Check, ...]

    @property
    def lora(self) -> dict[str, float]:
        """LoRAs that are loaded, with the scale that was typed."""
        return wardrobe.of_server(self.report.lora)

    @property
    def makes_videos(self) -> bool:
        return "num_frames" in self.fields

    @property
    def takes_picture(self) -> bool:
        return "image" in self.fields

    @property
    def needs_picture(self) -> bool:
        """Whether it cannot begin without one."""
        taken = inspect.signature(self.pipeline_class.__call__).parameters
        follows = self.takes_picture and "image" not in taken
        return follows or ("image" in taken and taken["image"].default is inspect.Parameter.empty)

    @property
    def fps(self) -> int:
        """Frames per second where nothing else is said."""
        return int(self.defaults.get("fps", run.DEFAULT_FPS))

    @property
    def meaningful(self) -> frozenset[str]:
        """Fields that change the picture."""
        return self.fields - ({"guidance_scale"} if self.no_guidance else set())


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a pipeline comes from.

    load       gives the pipeline, as `loading.load` does
    defaults   of the model's preset
    flags      what was typed, for the record inside every picture
    reference  gives the same pipeline without quantization, where requests may compare with it
    """

    load: Callable[[], Any]
    defaults: Mapping[str, Any]
    flags: Mapping[str, Any]
    reference: Callable[[], Any] | None = None


class Engine:
    """One pipeline, and where it comes from."""

    def __init__(self, origin: Origin) -> None:
        self.origin = origin
        self._pipeline: Any = None
        self._reference: Any = None
        self._worn: Mapping[str, float] = {}
        self.facts: Facts | None = None

    def open(self) -> None:
        """Load, and refuse to go on with a kernel that `reference` contradicts."""
        pipeline = self.origin.load()
        report = loading.report(pipeline)
        checks = readiness.checks(pipeline, report)
        readiness.require_agreement(checks)
        _settle()
        compares = self.origin.reference is not None
        self.facts = _facts(pipeline, report, checks, self.origin.defaults, compares)
        self._pipeline, self._worn = pipeline, self.facts.lora
        for line in report.truth_lines:
            LOG.info("%s", line)

    def draw(self, job: Job) -> run.Result:
        """Draw the job's pictures; Stopped is raised at the step at which it should end."""
        assert self.facts is not None
        pipeline, wanted = self._pipeline, job.request
        self._wear(self.facts.lora if job.lora is None else job.lora)
        latest: list[Tensor] = []

        def on_step(done: int, of: int) -> None:
            job.require_going()
            job.step = done
            shown = done in job.previews and latest
            job.moved(_preview(pipeline, latest[-1], job) if shown else None)

        def seen(latents: Tensor) -> None:
            latest[:] = [latents]

        with ExitStack() as stack:
            if job.previews:
                stack.enter_context(preview.watched(pipeline, seen))
            result = run.generate(pipeline, wanted, on_step)
        if job.reference:
            job.compared = self._compared(job)
        return self._recorded(result)

    def _compared(self, job: Job) -> run.Result:
        """The same request drawn by the reference, which is loaded when it is first asked for."""
        assert self.origin.reference is not None
        if self._reference is None:
            self._reference = self.origin.reference()
            _settle()
        if self._has_loras:
            wardrobe.wear(self._reference, self._worn)
        drawn = job.step

        def on_step(done: int, of: int) -> None:
            job.require_going()
            job.step = drawn + done
            job.moved()

        result = run.generate(self._reference, job.request, on_step)
        report = loading.report(self._reference).to_json()
        return run.recorded(result, flags={}, report=report)

    def draw_together(self, jobs: Sequence[Job], left: Left) -> tuple[run.Result, ...]:
        """Draw several jobs as one batch. Who is stopped on the way is told by `left`, and drawn in
        vain; Stopped is raised when nobody is left."""
        assert self.facts is not None
        going = list(jobs)
        self._wear(self.facts.lora if jobs[0].lora is None else jobs[0].lora)

        def on_step(done: int, of: int) -> None:
            for job in list(going):
                job.step = done
                if job.why_stopped is not None:
                    going.remove(job)
                    left(job, Stopped(job.why_stopped))
                else:
                    job.moved()
            if not going:
                raise Stopped("nobody waits for any of them")

        results = run.generate_together(self._pipeline, [job.request for job in jobs], on_step)
        return tuple(map(self._recorded, results))

    @property
    def _has_loras(self) -> bool:
        return self.facts is not None and bool(self.facts.lora)

    def _recorded(self, result: run.Result) -> run.Result:
        """With everything needed to draw it again; a batch is drawn again one by one."""
        assert self.facts is not None
        result = replace(result, request=told(result.request))
        adapters = self.facts.report.lora
        report = self.facts.report.to_json() | {"lora": wardrobe.told(adapters, self._worn)}
        flags = wardrobe.typed(self.origin.flags, adapters, self._worn)
        return run.recorded(result, flags=flags, report=report)

    def _wear(self, worn: Mapping[str, float]) -> None:
        if worn != self._worn:
            wardrobe.wear(self._pipeline, worn)
            self._worn = worn

    def switch(self, origin: Origin) -> None:
        """Another pipeline in the place of this one, which comes back where the other cannot be
        loaded or a kernel is wrong with it."""
        before = self.origin
        self.close()
        self.origin = origin
        try:
            self.open()
        except Exception:
            self.origin = before
            self.open()
            raise

    def recover(self) -> None:
        """Leave nothing of a job that ended early."""
        if hasattr(self._pipeline, "maybe_free_model_hooks"):
            self._pipeline.maybe_free_model_hooks()
        _free()

    def close(self) -> None:
        """Let the model go; `open` brings it back."""
        self._pipeline = self._reference = None
        gc.unfreeze()
        _free()
        LOG.info("the model is let go")


def _preview(pipeline: Any, latents: Tensor, job: Job) -> Preview:
    request = job.request
    assert request.height is not None
    assert request.width is not None
    return Preview(job.step, preview.picture(pipeline, latents, request.height, request.width))


def _settle() -> None:
    """Tell the garbage collector that what is loaded stays. It takes a second to look through the
    libraries, at the end of every stopped job and whenever it likes, and holds every thread meanwhile.
    """
    gc.collect()
    gc.freeze()


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _facts(
    pipeline: Any,
    report: Report,
    checks: tuple[Check, ...],
    defaults: Mapping[str, Any],
    compares: bool,
) -> Facts:
    kind = type(pipeline)
    return Facts(
        pipeline_class=kind,
        fields=_fields(kind),
        defaults=defaults,
        no_guidance=_has_no_guidance(pipeline),
        previews=preview.is_possible(pipeline),
        compares=compares,
        decoded_bytes=_decoded_bytes(pipeline),
        report=report,
        checks=checks,
    )


def _fields(kind: type) -> frozenset[str]:
    """Those of a request that mean something to the class; seed and fps are ours."""
    taken = frozenset(inspect.signature(kind.__call__).parameters)
    known = {item.name for item in fields(run.Request)} & taken
    known |= {name for name, theirs in CALLED.items() if theirs in taken}
    return frozenset({"seed", *known, *(("fps",) if "num_frames" in known else ())})


def _has_no_guidance(pipeline: Any) -> bool:
    config = getattr(getattr(pipeline, "transformer", None), "config", None)
    return getattr(config, "guidance_embeds", True) is False


def _decoded_bytes(pipeline: Any) -> int:
    """Channels of the autoencoder's last, widest stage times the bytes of a number."""
    vae = getattr(pipeline, "vae", None)
    channels = getattr(getattr(vae, "config", None), "block_out_channels", None)
    return channels[0] * vae.dtype.itemsize if vae is not None and channels else 0
