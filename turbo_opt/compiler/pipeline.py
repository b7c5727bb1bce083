"""Pipelines: an ordered list of passes with their options, and its one-line text form.

    canonicalize,quantize-linear{scheme=fp8-block skip={first=2 names=["*.attn2.*"]}},sparse-linear?

    pipeline := [ pass { "," pass } ]
    pass     := NAME [ "?" ] [ map ]                   `?`: may match nothing
    map      := "{" { KEY "=" value } "}"              entries separated by white space
    list     := "[" [ value { "," value } ] "]"
    value    := map | list | NUMBER | true | false | null | WORD | STRING
    NAME, KEY, WORD := a letter or `_`, then letters, digits and `_ . -`; a WORD may also hold
                       `/ * :`; a KEY may be a STRING
    STRING   := as in JSON, in double quotes

White space, newlines included, may stand between any two tokens.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pydantic import ValidationError

from turbo_opt.compiler.base import PassOptions, get_pass
from turbo_opt.compiler.pipeline_text import (
    KEY,
    MAX_DEPTH,
    NAME,
    NUMBER,
    STRING,
    WORD,
    Cursor,
    TextOrigin,
)
from turbo_opt.config.explain import KeyPath, explain, format_path
from turbo_opt.errors import BadInput

Value = bool | int | float | str | list[Any] | dict[str, Any] | None


class SpecOrigin(Protocol):
    """Where a `PassSpec` was written, for errors that are found later."""

    def complain(self, path: KeyPath, message: str, *, at_key: bool = False) -> str:
        """`message` about the option at `path` (empty: the pass itself), with its position."""


@dataclass(frozen=True)
class PassSpec:
    """One pass of a pipeline, not yet checked against the registry.

    Attributes:
        name: registered name of the pass.
        options: plain data: booleans, numbers, strings, lists and string-keyed mappings.
        optional: the pass may match nothing.
        origin: where it was written; takes no part in equality.

    Raises:
        BadInput: the name or an option cannot be written in a pipeline.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    optional: bool = False
    origin: SpecOrigin | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if not re.fullmatch(NAME, self.name):
            raise BadInput(f"{self.name!r} cannot be a pass name: write it like 'fuse-norms'")
        object.__setattr__(self, "options", _plain(self.options, (self.name,)))

    def __str__(self) -> str:
        return format_pipeline((self,))

    def error(self, message: str, path: KeyPath = (), *, at_key: bool = False) -> BadInput:
        """A `BadInput` about this pass or its option at `path`, with the position if known."""
        if self.origin is None:
            return BadInput(f"{format_path((self.name, *path))}: {message}")
        return BadInput(self.origin.complain(path, message, at_key=at_key))


def parse_pipeline(text: str) -> tuple[PassSpec, ...]:
    """The passes of a pipeline in text form; empty text is the empty pipeline.

    Raises:
        BadInput: not of the form above; the message shows the column.
    """
    cursor = Cursor(text)
    specs: list[PassSpec] = []
    if cursor.at_end():
        return ()
    while True:
        specs.append(_parse_pass(cursor))
        if cursor.at_end():
            return tuple(specs)
        cursor.expect(",", "',' and the next pass, or the end")


def format_pipeline(specs: Sequence[PassSpec]) -> str:
    """The text form; `parse_pipeline(format_pipeline(specs)) == tuple(specs)`."""
    return ",".join(
        spec.name
        + ("?" if spec.optional else "")
        + (_format_map(spec.options) if spec.options else "")
        for spec in specs
    )


def validate_options(spec: PassSpec) -> PassOptions:
    """The typed options of a pass, with its defaults filled in.

    Raises:
        BadInput: no such pass, or an option that it does not take; one line per fault, with the
            position, the key's path, the nearest known name and the allowed values.
    """
    try:
        cls = get_pass(spec.name)
    except BadInput as error:
        raise spec.error(str(error)) from None
    try:
        return cls.Options.model_validate(spec.options)
    except ValidationError as error:
        problems = explain(cls.Options, error, spec.options, kind="option")
        lines = [str(spec.error(p.message, p.path, at_key=p.at_key)) for p in problems]
        raise BadInput("\n".join(lines)) from None


def _parse_pass(cursor: Cursor) -> PassSpec:
    start = cursor.skip_space()
    name = cursor.expect(NAME, "a pass name")
    marks: dict[KeyPath, tuple[int, int]] = {(): (start, start)}
    optional = cursor.accept(r"\?") is not None
    options = _parse_map(cursor, (), marks) if cursor.peek("{") else {}
    return PassSpec(name, options, optional, TextOrigin(cursor.text, name, marks))


def _parse_value(cursor: Cursor, path: KeyPath, marks: dict[KeyPath, tuple[int, int]]) -> Value:
    if len(path) > MAX_DEPTH:
        raise cursor.error(f"nested more than {MAX_DEPTH} deep")
    if cursor.peek("{"):
        return _parse_map(cursor, path, marks)
    if cursor.accept(r"\["):
        return _parse_list(cursor, path, marks)
    start = cursor.skip_space()
    if (quoted := cursor.accept(STRING)) is not None:
        return cursor.unquote(quoted, start)
    if (word := cursor.accept(WORD)) is not None:
        return {"true": True, "false": False, "null": None}.get(word, word)
    return _number(cursor.expect(NUMBER, "a value"), cursor, start)


def _number(token: str, cursor: Cursor, start: int) -> int | float:
    if re.fullmatch(r"-?\d{1,4000}", token):
        return int(token)
    try:
        number = float(token)
    except ValueError:
        raise cursor.error(f"{token!r} is not a number; put text in double quotes", start) from None
    if not math.isfinite(number):
        raise cursor.error(f"{token[:20]!r} is too large a number", start)
    return number


def _parse_list(
    cursor: Cursor, path: KeyPath, marks: dict[KeyPath, tuple[int, int]]
) -> list[Value]:
    items: list[Value] = []
    if cursor.accept(r"\]"):
        return items
    while True:
        start = cursor.skip_space()
        marks[(*path, len(items))] = (start, start)
        items.append(_parse_value(cursor, (*path, len(items)), marks))
        if cursor.accept(r"\]"):
            return items
        cursor.expect(",", "',' or ']'")


def _parse_map(
    cursor: Cursor, path: KeyPath, marks: dict[KeyPath, tuple[int, int]]
) -> dict[str, Value]:
    entries: dict[str, Value] = {}
    cursor.expect(r"\{", "'{'")
    while not cursor.accept(r"\}"):
        start = cursor.skip_space()
        if entries and cursor.peek(","):
            raise cursor.error("options are separated by spaces, not commas")
        if entries and not cursor.at_end() and not cursor.text[start - 1].isspace():
            raise cursor.error("expected a space before the next option")
        quoted = cursor.accept(STRING)
        key = cursor.expect(KEY, "an option or '}'") if quoted is None else ""
        key = key if quoted is None else cursor.unquote(quoted, start)
        if key in entries:
            raise cursor.error(f"option {key!r} is given twice", start)
        cursor.expect("=", f"'=' after option {key!r}")
        marks[(*path, key)] = (start, cursor.skip_space())
        entries[key] = _parse_value(cursor, (*path, key), marks)
    return entries


def _format_map(entries: Mapping[str, Any]) -> str:
    pairs = (
        f"{key if re.fullmatch(KEY, key) else _quote(key)}={_format_value(value)}"
        for key, value in entries.items()
    )
    return "{" + " ".join(pairs) + "}"


def _format_value(value: Any) -> str:
    if isinstance(value, Mapping):
        return _format_map(value)
    if isinstance(value, list):
        return "[" + ", ".join(_format_value(item) for item in value) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, str):
        reserved = value in ("true", "false", "null")
        return value if re.fullmatch(KEY, value) and not reserved else _quote(value)
    return repr(value)


def _quote(text: str) -> str:
    return json.dumps(text, ensure_ascii=not text.isprintable())


def _plain(value: Any, path: KeyPath) -> Value:
    """A private copy of `value` as plain data."""
    if len(path) > MAX_DEPTH + 1:
        raise BadInput(f"{format_path(path[:4])}…: nested more than {MAX_DEPTH} deep")
    if isinstance(value, Mapping):
        if bad := [key for key in value if not isinstance(key, str)]:
            raise BadInput(f"{format_path(path)}: key {bad[0]!r} must be a string")
        return {key: _plain(item, (*path, key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, (*path, i)) for i, item in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise BadInput(f"{format_path(path)}: must be a finite number, got {value!r}")
    if value is None or type(value) in (bool, int, float, str):
        return value  # type: ignore[no-any-return]
    kind = type(value).__name__
    raise BadInput(f"{format_path(path)}: must be plain data, got {value!r} ({kind})")
