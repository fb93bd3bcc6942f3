"""The report of a per-tensor FP8 transformer: what was written, against the weights it was made from."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffquant import headers
from diffquant.converters._component import Component
from diffquant.converters._fp8_scales import Scales
from diffquant.converters._options import Writing
from diffquant.converters._report import Report, measured, row_spans
from diffquant.encodings import ENCODINGS
from diffquant.fidelity import LayerFidelity, Running
from diffquant.plan import Encoding, Role, Span
from diffquant.tensors import Passing
from diffquant.writing import Check, Progress


class Judged:
    """The layers in FP8, and where the weights lie that they stand for: the base, else the source."""

    def __init__(
        self,
        scales: Mapping[str, Scales],
        source: Component,
        base: Component | None,
        writing: Writing,
    ) -> None:
        self._scales = scales
        self._source = source
        self._base = base
        self._writing = writing
        self.report = Report(())

    def check(self, on_progress: Progress) -> Check:
        """Makes the report from finished files. It raises ConvertError over --max-error."""

        def check(files: Sequence[Path]) -> None:
            self.report = measured(self._layers(_Written(files), on_progress))
            self.report.judge(self._writing.max_error, self._writing.report, may_stay=True)

        return check

    def _layers(self, written: "_Written", on_progress: Progress) -> Iterator[LayerFidelity]:
        total = sum(self._source.weight(module).nbytes for module in self._scales)
        done = 0
        for module in self._scales:
            running, truth = Running(), self._truth(module)
            for rows in row_spans(written.shape(module)):
                running.add(self._true(truth, module, rows), written.decoded(module, rows))
            done += self._source.weight(module).nbytes
            on_progress(done, total, module)
            yield LayerFidelity(path=module, encoding="fp8", fidelity=running.figures())

    def _truth(self, module: str) -> Component:
        known = None if self._base is None else self._base.header.tensors.get(f"{module}.weight")
        if known is None or known.shape != self._source.weight(module).shape:
            return self._source
        assert self._base is not None, "it knows the layer"
        return self._base

    def _true(self, truth: Component, module: str, rows: Span) -> Tensor:
        """Rows of the weight: as it is, or as the export's own codes and scale say."""
        weight: Tensor = truth.tensor(f"{module}.weight")[rows.as_slice()]
        if weight.dtype != torch.float8_e4m3fn:
            return weight
        finite: Tensor = weight.float().nan_to_num_(nan=0.0)
        finite *= self._scales[module].weight()
        return finite


class _Written:
    """The layers of the finished files."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._header = headers.read(tuple(files))
        self._weights = Passing(files)

    def shape(self, module: str) -> tuple[int, int]:
        shape = self._header.tensors[f"{module}.weight"].shape
        return (shape[0], shape[1])

    def decoded(self, module: str, rows: Span) -> Tensor:
        codes: Tensor = self._tensor(f"{module}.weight")[rows.as_slice()]
        scale = self._tensor(f"{module}.weight_scale")
        parts = {Role.CODES: codes, Role.TENSOR_SCALE: scale.reshape(())}
        return ENCODINGS.load("fp8").decode(
            parts, Encoding("fp8"), (codes.shape[0], codes.shape[1])
        )

    def _tensor(self, name: str) -> Tensor:
        return self._weights.tensor(self._header.tensors[name].file, name)
