"""Read YAML from strangers into a `Document`: plain values only, positions kept, sizes bounded.

Scalars follow the core schema of YAML 1.2, so `off` and `no` are words and `1e-3` is a number.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from turbo_opt.config.document import Document, Location, Mark
from turbo_opt.config.explain import KeyPath
from turbo_opt.errors import BadInput

MAX_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_NODES = 20_000

_TAG = "tag:yaml.org,2002:"
_INTEGER = re.compile(r"[-+]?[0-9]{1,4000}|0o[0-7]{1,4000}|0x[0-9a-fA-F]{1,4000}")


_NUMBER_START = list("-+.0123456789")
_SCALARS = {
    "bool": (r"(?:true|True|TRUE|false|False|FALSE)$", list("tTfF")),
    "null": (r"(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    "int": (r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$", _NUMBER_START),
    "float": (
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$",
        _NUMBER_START,
    ),
}
"""The core schema: by tag a pattern, and what such a scalar begins with."""


def _composing(base: Any) -> Any:
    """A loader that composes nodes with the scalars of YAML 1.2, and constructs nothing."""
    loader: Any = type("Loader", (base,), {"yaml_implicit_resolvers": {}})
    for tag, (pattern, first) in _SCALARS.items():
        loader.add_implicit_resolver(_TAG + tag, re.compile(pattern), first)
    return loader


_FAST = _composing(getattr(yaml, "CSafeLoader", yaml.SafeLoader))
_CLEAR = _composing(yaml.SafeLoader)
"""libyaml takes a tenth of the time; what is no YAML is named by Python's loader in either case."""


def read_yaml_file(path: Path, shown: str) -> Document:
    """The document in a file; `shown` is what errors call the file.

    Raises:
        BadInput: not readable, too large, or not YAML as `read_yaml` takes it.
    """
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
        text = raw[:MAX_BYTES].decode("utf-8") if len(raw) <= MAX_BYTES else None
    except OSError as error:
        raise BadInput(f"{shown}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise BadInput(f"{shown}: not UTF-8 text (byte {error.start})") from None
    if text is None:
        raise BadInput(f"{shown}: larger than {MAX_BYTES // 1024} KiB")
    return read_yaml(text, lambda line, column: Location(shown, line, column, path.parent))


def read_yaml(text: str, locate: Callable[[int, int], Location]) -> Document:
    """The document in a text.

    Args:
        text: YAML, one document; mappings have string keys, each once; no tags but the standard
            ones of scalars, mappings and lists; bounded in depth and in nodes, aliases expanded.
        locate: makes the location of a line and column, both counted from 1.

    Raises:
        BadInput: anything else; the message starts with the location.
    """

    def complain(mark: Any, message: str) -> BadInput:
        return BadInput(f"{locate(mark.line + 1, mark.column + 1)}: {message}")

    try:
        try:
            root = _composed(text, _FAST, complain)
        except yaml.YAMLError:
            root = _composed(text, _CLEAR, complain)
    except yaml.reader.ReaderError as error:
        raise BadInput(f"{locate(1, 1)}: not YAML: {error.reason}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise complain(mark, f"not YAML: {error.problem or error.context}") from None
    if root is None:
        return Document(None, {(): Mark(locate(1, 1), locate(1, 1))})
    return _Builder(locate, complain).build(root)


def _composed(text: str, loader: Any, complain: Callable[[Any, str], BadInput]) -> Any:
    """The root node, or None. What is nested too deep is not composed, as that recurses."""
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise complain(event.start_mark, f"nested more than {MAX_DEPTH} deep")
    return yaml.compose(text, Loader=loader)


class _Builder:
    """Turns composed nodes into plain data, and counts them."""

    def __init__(
        self, locate: Callable[[int, int], Location], complain: Callable[[Any, str], BadInput]
    ) -> None:
        self._locate = locate
        self._complain = complain
        self._nodes = 0
        self._marks: dict[KeyPath, Mark] = {}

    def build(self, root: Any) -> Document:
        """The document below `root`."""
        start = self._location(root)
        self._marks[()] = Mark(start, start)
        return Document(self._value(root, ()), self._marks)

    def _location(self, node: Any) -> Location:
        return self._locate(node.start_mark.line + 1, node.start_mark.column + 1)

    def _value(self, node: Any, path: KeyPath) -> Any:
        self._nodes += 1
        if self._nodes > MAX_NODES or len(path) > MAX_DEPTH:
            limit = f"more than {MAX_NODES} values or {MAX_DEPTH} levels"
            raise self._complain(node.start_mark, f"too large once aliases are expanded: {limit}")
        if isinstance(node, yaml.MappingNode) and node.tag == _TAG + "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _TAG + "seq":
            return [self._item(item, (*path, i)) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node)
        raise self._complain(node.start_mark, f"tag {_tag(node)!r} is not allowed here")

    def _item(self, node: Any, path: KeyPath) -> Any:
        start = self._location(node)
        self._marks[path] = Mark(start, start)
        return self._value(node, path)

    def _mapping(self, node: Any, path: KeyPath) -> dict[str, Any]:
        entries: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._scalar(key_node) if isinstance(key_node, yaml.ScalarNode) else None
            if not isinstance(key, str):
                raise self._complain(key_node.start_mark, "a key must be text; put it in quotes")
            if key in entries:
                first = self._marks[(*path, key)].key.line
                message = f"key {key!r} is given twice (first on line {first})"
                raise self._complain(key_node.start_mark, message)
            inner = (*path, key)
            self._marks[inner] = Mark(self._location(key_node), self._location(value_node))
            entries[key] = self._value(value_node, inner)
        return entries

    def _scalar(self, node: Any) -> Any:
        kind, text = _tag(node), node.value
        if kind == "str":
            return text
        if kind == "null":
            return None
        if kind == "bool" and text.lower() in ("true", "false"):
            return text.lower() == "true"
        if kind == "int" and _INTEGER.fullmatch(text):
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        if kind == "float":
            return self._float(node)
        raise self._complain(node.start_mark, f"{text[:40]!r} cannot be read as {kind!r}")

    def _float(self, node: Any) -> float:
        try:
            number = float(node.value)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise self._complain(node.start_mark, f"{node.value[:40]!r} is not a finite number")
        return number


def _tag(node: Any) -> str:
    return str(node.tag).removeprefix(_TAG)
