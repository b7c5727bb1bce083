"""Tokens of the pipeline text form, and errors that point into it with a caret."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass

from turbo_opt.config.explain import KeyPath, format_path
from turbo_opt.errors import BadInput

MAX_DEPTH = 32
NAME = KEY = r"[A-Za-z_][A-Za-z0-9_.-]*"
WORD = r"[A-Za-z_][A-Za-z0-9_./*:-]*"
STRING = r'"(?:[^"\\\x00-\x1f]|\\.)*"'
NUMBER = r"[+-]?[0-9.][A-Za-z0-9_.+-]*"


class Cursor:
    """A position in a text; the methods that read a token skip white space before it."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0

    def skip_space(self) -> int:
        """Move to the next token and say where it starts."""
        while self.position < len(self.text) and self.text[self.position].isspace():
            self.position += 1
        return self.position

    def at_end(self) -> bool:
        """Nothing but white space is left."""
        return self.skip_space() == len(self.text)

    def peek(self, literal: str) -> bool:
        """The next token starts with `literal`."""
        return self.text.startswith(literal, self.skip_space())

    def accept(self, pattern: str) -> str | None:
        """Read a token that matches `pattern`, or nothing."""
        match = re.compile(pattern).match(self.text, self.skip_space())
        if match is None:
            return None
        self.position = match.end()
        return match.group()

    def expect(self, pattern: str, what: str) -> str:
        """Read a token that matches `pattern`.

        Raises:
            BadInput: something else stands there; the message calls the token `what`.
        """
        token = self.accept(pattern)
        if token is None:
            found = "the end" if self.at_end() else repr(self.text[self.position])
            raise self.error(f"expected {what}, found {found}")
        return token

    def unquote(self, quoted: str, start: int) -> str:
        """The text of a STRING token.

        Raises:
            BadInput: an escape that JSON does not know.
        """
        try:
            return str(json.loads(quoted))
        except ValueError:
            raise self.error("not a valid string: escapes are those of JSON", start) from None

    def error(self, message: str, position: int | None = None) -> BadInput:
        """A `BadInput` that points at `position`, by default the present one."""
        return BadInput(
            point_at(self.text, self.position if position is None else position, message)
        )


def point_at(text: str, position: int, message: str) -> str:
    """`message` with its column, the line of `text` and a caret below the column."""
    start = text.rfind("\n", 0, position) + 1
    line = text[start:].split("\n", 1)[0]
    number = text.count("\n", 0, position)
    where = f"line {number + 1}, " if number or "\n" in text.strip() else ""
    column = position - start
    indent = "".join("\t" if char == "\t" else " " for char in line[:column])
    return f"pipeline, {where}column {column + 1}: {message}\n  {line}\n  {indent}^"


@dataclass(frozen=True)
class TextOrigin:
    """A pass written in text form.

    Attributes:
        text: the whole pipeline.
        name: the pass.
        marks: option path → positions of its key and of its value; `()` is the pass itself.
    """

    text: str
    name: str
    marks: Mapping[KeyPath, tuple[int, int]]

    def complain(self, path: KeyPath, message: str, *, at_key: bool = False) -> str:
        """`message` about the option at `path`, with the column and a caret line."""
        known = path
        while known not in self.marks:
            known = known[:-1]
        key, value = self.marks[known]
        label = format_path((self.name, *path))
        return point_at(self.text, key if at_key else value, f"{label}: {message}")
