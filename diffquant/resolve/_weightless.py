"""Rule 2b: schedulers, tokenizers and processors from elsewhere. They are settings and have no weights."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffquant import sources
from diffquant.errors import SourceError, UsageError
from diffquant.resolve._fetching import Hub
from diffquant.resolve._flags import flag_for
from diffquant.resolve._overrides import Override
from diffquant.resolve._rules import Log
from diffquant.sources import PipelineFolder

#: The files of which one says what such a component is, by a word of its class.
DESCRIBED_BY: Mapping[str, tuple[str, ...]] = {
    "Scheduler": ("scheduler_config.json",),
    "Tokenizer": ("tokenizer_config.json",),
    "FeatureExtractor": ("preprocessor_config.json",),
    "Processor": ("processor_config.json", "preprocessor_config.json"),
}
#: Classes that read every tokenizer.json, so that their name denies nothing.
ANY_TOKENIZER = frozenset({"PreTrainedTokenizer", "TokenizersBackend"})
SMALL = frozenset({".json", ".txt", ".model", ".jinja"})
DIGITS = 16  # hexadecimal, of a digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Weightless:
    """A component without weights that is taken from elsewhere.

    library, class_name  of the object it becomes: a scheduler's own, else the base pipeline's
    root      the folder its files lie in
    digest    of its small files
    """

    component: str
    library: str
    class_name: str
    origin: str
    root: Path
    digest: str

    @property
    def flag(self) -> str:
        return flag_for(self.component, "path")


def rule_2b_weightless(
    overrides: Mapping[str, Override],
    classes: Mapping[str, str],
    pipeline: PipelineFolder,
    hub: Hub,
    log: Log,
) -> tuple[dict[str, Override], dict[str, Weightless]]:
    """Overrides of components with weights, and those of the others, found and described."""
    found = {
        name: _found(override, classes[name], pipeline, hub)
        for name, override in overrides.items()
        if _descriptions(classes[name])
    }
    for name, each in found.items():
        log.fire(
            "2b", flag=each.flag, component=name, origin=each.origin, class_name=each.class_name
        )
    return {name: each for name, each in overrides.items() if name not in found}, found


def _descriptions(class_name: str) -> tuple[str, ...]:
    return next((files for word, files in DESCRIBED_BY.items() if word in class_name), ())


def _found(override: Override, class_name: str, pipeline: PipelineFolder, hub: Hub) -> Weightless:
    name = override.component
    if override.path is None:
        raise UsageError(
            f"{override.weights_flag} {override.weights}: {name!r} ({class_name}) has no weights",
            hint=f"{flag_for(name, 'path')} DIR takes it from elsewhere",
        )
    root = hub.small_folder(override.path, name)
    wanted = _descriptions(class_name)
    described = next((root / file for file in wanted if (root / file).is_file()), None)
    if described is None:
        raise SourceError(
            f"{override.path_flag} {override.path} has no {' or '.join(wanted)}",
            hint=f"a folder as `save_pretrained` writes it, or a pipeline with a folder {name!r}",
        )
    told = sources.read_json(described)
    own = _require_kind(override, class_name, told)
    return Weightless(
        component=name,
        library=(pipeline.index or {})[name][0],
        class_name=own,
        origin=override.path,
        root=root,
        digest=_digest(root),
    )


def _require_kind(override: Override, class_name: str, told: Mapping[str, object]) -> str:
    """The class it becomes: any scheduler may follow another, a tokenizer only one of its kind."""
    if "Scheduler" in class_name:
        named = str(told.get("_class_name", class_name))
        if "Scheduler" not in named:
            raise UsageError(
                f"{override.path_flag} {override.path} describes {named}, a scheduler was needed"
            )
        return named
    named = str(told.get("tokenizer_class") or class_name)
    kinds = {each.removesuffix("Fast") for each in (named, class_name)}
    if "Tokenizer" in class_name and len(kinds - ANY_TOKENIZER) > 1:
        raise UsageError(
            f"{override.path_flag} gives a {named}, and {override.component!r} of the pipeline is a "
            f"{class_name}",
            hint=f"is this the {override.component} of another model?",
        )
    return class_name


def _digest(root: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(root.iterdir()):
        if path.is_file() and path.suffix in SMALL:
            digest.update(f"{path.name}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:DIGITS]
