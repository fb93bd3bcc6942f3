"""Every error a user can cause, as one tree.

DiffquantError                 anything below; carries `what` and an optional `hint`
  UsageError                   wrong usage: an unknown option or value, flags that contradict (exit code 2)
  SourceError                  a path, repository or file that cannot be found or opened
    AmbiguousSourceError       several candidate files where one was needed
    OfflineError               the hub is needed and cannot be reached
  HeaderError                  a container that is not whole: truncated, overlapping, unreadable, a pointer file
  FormatError                  no format, or two, explain a checkpoint
  PlanError                    tensors and model do not fit: shapes, owners, missing scales
  AuditError                   a file whose contents fail a check
  PresetError                  a preset that cannot be read or matches nothing
  KernelError                  no kernel may run a layer, or a demanded one may not
  ConvertError                 a converter that cannot do what was asked
  RunError                     a run that went wrong
    NonFiniteError             NaN or infinity in latents or pixels
"""

import difflib
from collections.abc import Iterable


class DiffquantError(Exception):
    """A clear refusal: what is and what was needed, then a hint that can be typed."""

    exit_code = 1

    def __init__(self, what: str, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return self.what if self.hint is None else f"{self.what}\nhint: {self.hint}"


class UsageError(DiffquantError):
    """What was typed cannot be meant: an unknown option or value, or flags that contradict."""

    exit_code = 2


class SourceError(DiffquantError):
    """A path, repository or file cannot be found or opened."""


class AmbiguousSourceError(SourceError):
    """Several candidate weight files lie where one was needed."""


class OfflineError(SourceError):
    """The hub is needed and cannot be reached, or offline mode forbids it."""


class HeaderError(DiffquantError):
    """A weights container is truncated, contradictory or not a container at all."""


class FormatError(DiffquantError):
    """No format explains a checkpoint, or two contradict each other."""


class PlanError(DiffquantError):
    """Stored tensors and the model's parameters do not fit each other."""


class AuditError(DiffquantError):
    """A file fails a check of its contents."""


class PresetError(DiffquantError):
    """A preset cannot be read, or one of its patterns matches nothing."""


class KernelError(DiffquantError):
    """No kernel may run a layer, or a demanded kernel may not."""


class ConvertError(DiffquantError):
    """A converter cannot do what was asked of it."""


class RunError(DiffquantError):
    """A generation run went wrong."""


class NonFiniteError(RunError):
    """NaN or infinity appeared in latents or pixels."""


def meant(word: str, known: Iterable[str]) -> str:
    """The hint for a name that nobody has: the nearest ones, or all where none is near."""
    names = tuple(known)
    near = difflib.get_close_matches(word, names, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(near)}?" if near else f"one of: {', '.join(names)}"
