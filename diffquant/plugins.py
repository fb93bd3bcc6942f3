"""The one registry: a package whose modules each define one UPPER-CASE object.

The module's name is the public name. Adding a thing is adding a file; there is no second list.
Modules that start with an underscore are private to their package.
"""

import os
import pkgutil
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Generic, TypeVar

from diffquant.errors import UsageError, meant

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Registry(Generic[T]):
    """The objects called `attribute` in the modules of `package`."""

    package: str
    attribute: str

    def names(self) -> tuple[str, ...]:
        """Public names in alphabetical order; imports no plugin."""
        folders = tuple(import_module(self.package).__path__)
        return _public_modules(folders, tuple(os.stat(folder).st_mtime_ns for folder in folders))

    def load(self, name: str) -> T:
        """The object of that name. Raises UsageError, with the nearest names, when there is none."""
        if name not in self.names():
            kind = self.attribute.lower()
            raise UsageError(f"no {kind} is called {name!r}", hint=meant(name, self.names()))
        return self._object(name)

    def load_all(self) -> dict[str, T]:
        """Every object by name, in alphabetical order."""
        return {name: self._object(name) for name in self.names()}

    def _object(self, name: str) -> T:
        found: T = getattr(import_module(f"{self.package}.{name}"), self.attribute)
        return found


@cache
def _public_modules(folders: tuple[str, ...], changed: tuple[int, ...]) -> tuple[str, ...]:
    """Listed again only when a folder changed: plans ask for names thousands of times."""
    found = (module.name for module in pkgutil.iter_modules(folders))
    return tuple(sorted(name for name in found if not name.startswith("_")))
