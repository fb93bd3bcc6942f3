"""How sources are fetched, and rule 6: which of several sets of weights in one place is taken."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from diffquant import headers, planner, sources
from diffquant.errors import AmbiguousSourceError, DiffquantError
from diffquant.resolve._flags import flag_for
from diffquant.resolve._overrides import names_weights_file
from diffquant.resolve._rules import Log
from diffquant.sources import Checkpoint, PipelineFolder


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """How every source of one run is fetched; a typed revision belongs to the base alone."""

    local_files_only: bool

    def checkpoint(self, source: str, component: str) -> Checkpoint:
        """The component at `source`; the error for several candidates describes each (rule 6)."""
        try:
            return sources.checkpoint(
                source, subfolder=component, local_files_only=self.local_files_only
            )
        except AmbiguousSourceError as error:
            raise rule_6_ambiguous(error, source, component) from None

    def small_folder(self, source: str, component: str) -> Path:
        """The folder of a component without weights."""
        return sources.small_folder(
            source, subfolder=component, local_files_only=self.local_files_only
        )

    def pipeline(
        self, source: str, revision: str | None, without_weights_of: Iterable[str]
    ) -> PipelineFolder:
        return sources.pipeline(
            source,
            revision=revision,
            local_files_only=self.local_files_only,
            without_weights_of=frozenset(without_weights_of),
        )


def rule_6_chosen(weights: Checkpoint, log: Log) -> None:
    """Several weight sets lay there and one was taken for its name: say which."""
    if not names_weights_file(weights.origin) and len(sources.weight_sets(weights.root)) > 1:
        log.fire("6", loud=True, origin=weights.origin, name=weights.files[0].name)


def rule_6_ambiguous(
    error: AmbiguousSourceError, source: str, component: str
) -> AmbiguousSourceError:
    """The same refusal with format, size and whether it runs here of each candidate.

    Candidates on the hub are not here to be looked into; their refusal stays as it is.
    """
    inside = Path(source).expanduser() / component
    folder = inside if inside.is_dir() else inside.parent
    if not folder.is_dir():
        return error
    candidates = sources.weight_sets(folder)
    listed = "\n".join(f"  {_described(files)}" for files in candidates)
    return AmbiguousSourceError(
        f"{source!r} holds {len(candidates)} sets of weights and one was needed:\n{listed}",
        hint=f"name one of them: {flag_for(component, 'weights-path')} {candidates[0][0]}",
    )


def _described(files: Sequence[Path]) -> str:
    """One candidate in one line. What is understood runs: the reference kernel runs everything."""
    size = sum(path.stat().st_size for path in files) / 1e9
    checkpoint = Checkpoint(origin=files[0].name, root=files[0].parent, files=tuple(files))
    try:
        name, _ = planner.identify(checkpoint, headers.read(files))
    except DiffquantError as error:
        return f"{files[0].name}  {size:.2f} GB  does not run here: {error.what}"
    return f"{files[0].name}  {size:.2f} GB  {name}  runs here"
