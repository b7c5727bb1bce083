"""What every command shares: where it prints, how much, and whether as JSON."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

F = TypeVar("F", bound=Callable[..., Any])
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_WIDE = 240
"""Columns where the output is no terminal: nothing is wrapped or cut."""


class Session:
    """The settings and consoles of one command line.

    Attributes:
        debug: show tracebacks, and what other libraries print.
        quiet: no progress, and no summary from commands whose result is a file.
        json: the report is one JSON value on stdout.
        when_stopped: what to add to the message when the user stops the command.
    """

    def __init__(self) -> None:
        self.debug = False
        self.quiet = False
        self.json = False
        self.when_stopped = ""

    def console(self, *, stderr: bool = False) -> Console:
        """A console on the present stdout or stderr; plain where that is no terminal."""
        from rich.console import Console

        stream = sys.stderr if stderr else sys.stdout
        width = None if stream.isatty() else _WIDE
        return Console(file=stream, width=width, markup=False, highlight=False, emoji=False)

    def show(self, *parts: RenderableType) -> None:
        """Print a report for people to stdout."""
        console = self.console()
        for part in parts:
            if isinstance(part, str):
                console.print(printable(part), soft_wrap=True)
            elif console.is_terminal:
                console.print(part)
            else:
                with console.capture() as capture:
                    console.print(part)
                click.echo("\n".join(line.rstrip() for line in capture.get().split("\n")), nl=False)

    def report(self, value: Any, *parts: RenderableType) -> None:
        """Print `value` as JSON if that was asked for, else `parts`."""
        if self.json:
            print_json(value)
        else:
            self.show(*parts)

    def summary(self, value: Any, *parts: RenderableType) -> None:
        """As `report`, for commands whose result is a file: nothing for people under --quiet."""
        if self.json or not self.quiet:
            self.report(value, *parts)

    def note(self, text: str) -> None:
        """Print a remark to stderr."""
        if not self.quiet:
            click.echo(printable(text), err=True)

    def print_error(self, text: str) -> None:
        """Print to stderr whatever the settings are."""
        click.echo(printable(text), err=True)


def printable(text: str) -> str:
    """`text` without control characters, which may come from someone else's file."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def print_json(value: Any) -> None:
    """Print one JSON value; infinities must have been made text (`jsonable`)."""
    click.echo(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def session_of(ctx: click.Context) -> Session:
    """The session of a running command."""
    return ctx.ensure_object(Session)


def _flag(name: str, attribute: str, help_text: str) -> Callable[[F], F]:
    def remember(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value:
            setattr(session_of(ctx), attribute, True)

    return click.option(
        name, is_flag=True, expose_value=False, is_eager=True, callback=remember, help=help_text
    )


debug_option = _flag("--debug", "debug", "Show tracebacks and what other libraries print.")
quiet_option = _flag("--quiet", "quiet", "Show no progress and no summary.")
json_option = _flag("--json", "json", "Print the report as JSON on stdout.")

pass_session = click.make_pass_decorator(Session, ensure=True)


def common_options(function: F) -> F:
    """`--json`, `--quiet` and `--debug`, for every command that reports."""
    return json_option(quiet_option(debug_option(function)))
