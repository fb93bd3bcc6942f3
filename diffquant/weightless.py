"""Components without weights that a person takes from elsewhere -> the objects a pipeline holds."""

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from typing import Any

from diffquant.errors import SourceError
from diffquant.resolve import Weightless


def opened(found: Mapping[str, Weightless]) -> dict[str, Any]:
    """Each by its component's name, read the way diffusers reads those of the base.

    Raises SourceError where the installed library has no such class or cannot read the folder.
    """
    return {name: _opened(each) for name, each in found.items()}


def _opened(found: Weightless) -> Any:
    kind = getattr(import_module(found.library), found.class_name, None)
    if kind is None:
        raise SourceError(
            f"{found.flag} {found.origin}: {found.library} {version(found.library)} has no "
            f"{found.class_name!r}",
            hint=f"pip install --upgrade {found.library}",
        )
    try:
        return kind.from_pretrained(found.root, local_files_only=True)
    except Exception as error:  # what a broken folder raises is each library's own affair
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise SourceError(
            f"{found.flag} {found.origin} cannot be read as a {found.class_name}: {why}",
            hint="are all files of the folder there, as `save_pretrained` writes them?",
        ) from error
