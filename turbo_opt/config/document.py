"""A document: plain data, and where each key and value of it was written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from turbo_opt.config.explain import KeyPath, format_path


@dataclass(frozen=True)
class Location:
    """A place in a file, or a flag of the command line.

    Attributes:
        source: the file as shown to the user, or the flag.
        line: counted from 1; 0 for a flag.
        column: counted from 1; 0 for a flag.
        folder: what relative paths written here are relative to.
    """

    source: str
    line: int = 0
    column: int = 0
    folder: Path = Path()

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass(frozen=True)
class Mark:
    """Where a key and its value stand; items of a list have no key of their own."""

    key: Location
    value: Location


@dataclass
class Document:
    """Plain data and the mark of every key path in it; `()` marks the whole."""

    data: Any
    marks: dict[KeyPath, Mark] = field(default_factory=dict)

    def location(self, path: KeyPath, *, at_key: bool = False) -> Location | None:
        """Where `path` was written, or else the nearest mapping or list around it."""
        while path and path not in self.marks:
            path = path[:-1]
            at_key = False
        mark = self.marks.get(path)
        if mark is None:
            return None
        return mark.key if at_key else mark.value

    def complain(self, path: KeyPath, message: str, *, at_key: bool = False) -> str:
        """`file:line:column: key.path: message`."""
        location = self.location(path, at_key=at_key)
        parts = [str(part) for part in (location, format_path(path)) if part]
        return ": ".join([*parts, message])

    def at(self, path: KeyPath) -> Any:
        """The data at `path`, which must exist."""
        value = self.data
        for part in path:
            value = value[part]
        return value

    def replace(self, path: KeyPath, new: Document) -> None:
        """Put `new` at `path`, whose parent must exist, with its marks."""
        self._forget(path)
        self.at(path[:-1])[path[-1]] = new.data
        self.marks.update({(*path, *inner): mark for inner, mark in new.marks.items()})

    def remove(self, path: KeyPath) -> None:
        """Take the mapping entry at `path` out."""
        self._forget(path)
        del self.at(path[:-1])[path[-1]]

    def merge(self, child: Document) -> None:
        """Lay `child` over this: mappings merge key by key, anything else is replaced."""
        self._merge((), child)

    def _merge(self, path: KeyPath, child: Document) -> None:
        for key, value in child.at(path).items():
            here = (*path, key)
            old = self.at(path).get(key)
            if isinstance(value, Mapping) and isinstance(old, Mapping):
                self.marks[here] = child.marks[here]
                self._merge(here, child)
            else:
                self.replace(here, child.part(here))

    def part(self, path: KeyPath) -> Document:
        """What lies at `path`, as a document of its own."""
        depth = len(path)
        marks = {inner[depth:]: m for inner, m in self.marks.items() if inner[:depth] == path}
        return Document(self.at(path), marks)

    def _forget(self, path: KeyPath) -> None:
        for inner in [inner for inner in self.marks if inner[: len(path)] == path]:
            del self.marks[inner]
